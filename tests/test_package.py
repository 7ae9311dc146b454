"""What is built: the sdist holds all that the wheel is made of, and the wheel all that the code opens, and nothing else.

Built once, wheel from sdist, by setuptools itself: no network, no isolation. The wheel is tried where the checkout can't be seen.
"""

from __future__ import annotations

import ast
import email.parser
import os
import re
import shutil
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parent.parent
PACKAGES = ("exmy", "formats", "landscape", "studies", "train", "verification")
OF_ALARMS = ("digest.nc", "digest.sha256", "study.toml")
NOT_OF_THE_SOURCE = shutil.ignore_patterns(".*", "__pycache__", "*.egg-info", "runs", "build", "dist")


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The sdist, unpacked, and the wheel, unpacked as pip does it, without its dependencies."""
    work = tmp_path_factory.mktemp("built")
    shutil.copytree(ROOT, work / "source", ignore=NOT_OF_THE_SOURCE)
    of_alarms = work / "source" / "studies" / "results" / "warning"  # which stands for those that are there one day
    of_alarms.mkdir(exist_ok=True)
    for name in OF_ALARMS:
        (of_alarms / name).touch()
    build = "import sys; from setuptools import build_meta as b; getattr(b, sys.argv[1])(sys.argv[2])"

    def make(what: str, source: Path) -> Path:
        out = work / what
        out.mkdir()
        subprocess.run([sys.executable, "-c", build, what, str(out)], cwd=source, check=True, capture_output=True)
        (made,) = out.iterdir()
        return made

    with tarfile.open(make("build_sdist", work / "source")) as archive:
        archive.extractall(work / "unpacked", filter="data")
    (sdist,) = (work / "unpacked").iterdir()
    with zipfile.ZipFile(make("build_wheel", sdist)) as wheel:
        wheel.extractall(work / "site")
    return sdist, work / "site"


def files(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


def opened() -> Iterator[str]:
    """Every file that the code opens beside itself, read off the source: `files("package") / "name"`, and names in constants."""
    for package in PACKAGES:
        for path in sorted((ROOT / package).rglob("*.py")):
            text = path.read_text(encoding="utf-8")
            if "importlib.resources" not in text:
                continue
            names = [
                str(n.value)
                for n in ast.walk(ast.parse(text))
                if isinstance(n, ast.Constant) and isinstance(n.value, str)
            ]
            yield from (name for name in names if re.fullmatch(r"[\w-]+\.(html\.j2|j2|toml|css|js)", name))


def test_the_wheel_has_every_module_and_no_test(built: tuple[Path, Path]) -> None:
    modules = {p.relative_to(ROOT).as_posix() for package in PACKAGES for p in (ROOT / package).rglob("*.py")}
    wanted = {module for module in modules if not module.startswith("verification/test_")}
    assert len(modules) > len(wanted) > 200
    there = {name for name in files(built[1]) if ".dist-info/" not in name}
    assert {name for name in there if name.endswith(".py")} == wanted
    assert {name.split("/")[0] for name in there} == set(PACKAGES)
    data = {name for name in there if not name.endswith(".py")}
    assert {f"{package}/py.typed" for package in PACKAGES} <= data
    assert {f"studies/{path.name}" for path in (ROOT / "studies").glob("*.toml")} <= data
    of_alarms = {f"studies/results/warning/{name}" for name in OF_ALARMS}
    assert of_alarms <= data
    assert all(
        re.fullmatch(r"\w+/py\.typed|studies/[\w-]+\.toml|exmy/(report/)?[\w.-]+\.(j2|css|js)", name)
        for name in data - of_alarms
    ), data


def test_the_wheel_has_every_file_that_the_code_opens(built: tuple[Path, Path]) -> None:
    wanted = set(opened())
    assert {
        "first-look-cpu.toml",
        "first-look-gpu.toml",
        "claims.toml",
        "page.html.j2",
        "conformance.html.j2",
    } <= wanted
    assert wanted <= {Path(name).name for name in files(built[1])}


def test_the_sdist_has_what_the_suite_and_the_reader_need(built: tuple[Path, Path]) -> None:
    there = files(built[0])
    for folder in (*PACKAGES, "tests", "docs", "scripts", "benchmarks"):
        for path in (ROOT / folder).rglob("*"):
            name = path.relative_to(ROOT)
            if path.is_file() and not any(part == "__pycache__" or part.startswith(".") for part in name.parts):
                assert name.as_posix() in there
    assert {
        "README.md", "CHANGELOG.md", "CONTRIBUTING.md", "SECURITY.md", "CITATION.cff", "LICENSE", "Makefile", "requirements.lock",
        "pyproject.toml", "setup.py", "MANIFEST.in",
    } <= there  # fmt: skip


def test_the_wheel_works_without_the_checkout(built: tuple[Path, Path], tmp_path: Path) -> None:
    """Beside third-party packages as they are installed here; the checkout is not on its path, which is looked at first."""
    code = (
        "import sys, os, runpy, pathlib\n"
        f"site, root = {str(built[1])!r}, {str(ROOT)!r}\n"
        "import exmy, formats, landscape, studies, train, verification\n"
        "for module in (exmy, formats, landscape, studies, train, verification):\n"
        "    assert module.__file__.startswith(site), module.__file__\n"
        "from exmy.claims import default_claims\n"
        "from exmy.sweep import default_study\n"
        "from train import read_study\n"
        "assert [str(p) for p in (default_claims(), default_study('cpu'))] == \\\n"
        "    [f'{site}/studies/{name}.toml' for name in ('claims', 'first-look-cpu')]\n"
        "assert read_study(default_study('cpu'), []).name == 'first-look-cpu'\n"
        "from exmy.doctor import _shipped, _extras\n"
        "assert _shipped().state == 'ok', _shipped()\n"
        "assert 'zarr' in _extras().measured['lacks']\n"
        "from click.testing import CliRunner\n"
        "from exmy.cli import main\n"
        "for words in ('--version', 'sweep --dry-run --device cpu', 'formats show mxfp4', 'recipes list'):\n"
        "    done = CliRunner().invoke(main, words.split())\n"
        "    assert done.exit_code == 0, (words, done.output, done.exception)\n"
        "    print(done.output.splitlines()[0])\n"
        "assert not [m for m in sys.modules.values() if (getattr(m, '__file__', None) or '').startswith(root + os.sep)\n"
        "            and '/.venv/' not in m.__file__]\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env=os.environ | {"PYTHONPATH": str(built[1])},
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    version = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    assert done.stdout.splitlines()[0] == f"exmy, version {version}"


def test_the_wheel_says_what_it_needs_and_how_it_is_started(built: tuple[Path, Path]) -> None:
    (info,) = built[1].glob("exmy-*.dist-info")
    told = email.parser.Parser().parsestr((info / "METADATA").read_text(encoding="utf-8"))
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert told.get_all("Provides-Extra") == list(project["optional-dependencies"])
    needed = {line for line in told.get_all("Requires-Dist", []) if "extra ==" not in line}
    assert len(needed) == len(project["dependencies"])
    assert "exmy = exmy.__main__:program" in (info / "entry_points.txt").read_text()
    assert {path.name for path in (info / "licenses").iterdir()} == {"LICENSE"}


# Triton comes with torch where there is a GPU; `train.on_ray` is imported where Ray is asked for.
ELSEWHERE = {"triton", "ray"}


def test_everything_imported_at_once_is_a_dependency() -> None:
    """Of what the packages import when they are imported, each third-party name belongs to something in `dependencies`."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    declared = {re.split(r"[<>=\[]", line)[0].replace("-", "_").lower() for line in project["dependencies"]}
    ours = {*PACKAGES, *sys.stdlib_module_names}
    found: set[str] = set()
    for package in PACKAGES:
        for path in (ROOT / package).glob("*.py"):
            if path.name.startswith("test_") or path.name == "pytest_plugin.py":
                continue
            for node in ast.parse(path.read_text(encoding="utf-8")).body:
                if isinstance(node, ast.Import):
                    found |= {alias.name.split(".")[0] for alias in node.names}
                elif isinstance(node, ast.ImportFrom) and node.module:
                    found.add(node.module.split(".")[0])
    assert found - ours <= declared | ELSEWHERE
    assert "torch" in found


CALLER = """
from formats import element_format, list_formats
from train import read_study
from verification import verify

f = element_format("e4m3fn")
bits: int = f.bits
names: list[str] = list_formats()
wrong: str = f.bits
reveal_type(verify)
"""


def test_types_are_seen_from_outside(built: tuple[Path, Path], tmp_path: Path) -> None:
    """mypy takes an installed package's types for its own only where there is a py.typed."""
    (tmp_path / "caller.py").write_text(CALLER)
    (tmp_path / "mypy.ini").write_text(
        "[mypy]\nstrict = True\n[mypy-torch.*,numpy.*,xarray.*,pydantic.*]\nfollow_imports = skip\n"
    )
    venv = tmp_path / "venv"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(venv)], check=True)
    (site,) = (venv / "lib").glob("python*/site-packages")
    shutil.copytree(built[1], site, dirs_exist_ok=True)
    done = subprocess.run(
        [sys.executable, "-m", "mypy", "--python-executable", str(venv / "bin" / "python"), "caller.py"],
        cwd=tmp_path, env={k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "MYPYPATH")},
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    said = [line for line in done.stdout.splitlines() if line.startswith("caller.py")]
    assert (
        'error: Incompatible types in assignment (expression has type "int", variable has type "str")  [assignment]'
        in done.stdout
    )
    assert len([line for line in said if "error" in line]) == 1, done.stdout
    assert any("Revealed type" in line and "Report" in line for line in said), done.stdout


def test_the_citation_is_one() -> None:
    """By the Citation File Format 1.2.0: its required keys, and of ours what says the same elsewhere."""
    cited = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert cited.keys() >= {"cff-version", "message", "title", "authors"}
    assert cited["cff-version"] == "1.2.0"
    assert (cited["type"], cited["version"], cited["license"]) == ("software", project["version"], project["license"])
    assert all(author.keys() & {"name", "family-names"} for author in cited["authors"])


def test_the_change_log_has_this_version() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    headings = re.findall(r"^## (\S+)", (ROOT / "CHANGELOG.md").read_text(encoding="utf-8"), re.MULTILINE)
    assert headings[0] == project["version"]


@pytest.mark.parametrize("page", ["CONTRIBUTING.md", "SECURITY.md", "CHANGELOG.md"])
def test_pages_name_files_that_are_there(page: str) -> None:
    text = (ROOT / page).read_text(encoding="utf-8")
    for path in re.findall(r"`((?:tests|docs|train|formats|exmy|verification|landscape|\.ci)/[\w./-]+)`", text):
        assert (ROOT / path).exists(), path
    for target in re.findall(r"`make ([a-z-]+)`", text):
        assert re.search(rf"^{target}:", (ROOT / "Makefile").read_text(), re.MULTILINE), target


def test_no_pickle_is_read_from_a_file() -> None:
    """As SECURITY.md says: what loads objects by name is called nowhere, but for what Ray's own processes send each other."""
    found = {
        (path.relative_to(ROOT).as_posix(), ast.unparse(node.func))
        for package in PACKAGES
        for path in (ROOT / package).glob("*.py")
        if not path.name.startswith("test_")
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Call)
        and re.search(
            r"^(torch|np|numpy|pickle|yaml|joblib|pd|dill)\.(load|loads|read_pickle)$", ast.unparse(node.func)
        )
    }
    assert found == {("train/on_ray.py", "pickle.loads")}
