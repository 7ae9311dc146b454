"""The guide does what it says: its blocks are run in order, and what it shows is what comes out.

`sh` blocks go through the command line, `python` blocks share one namespace, a `toml` block is the file `mine.toml`, and a
`text` block is what the python block before it printed. A python block that begins with `# NAME.py` is that file as well. A
`console` block is shown and not run: `make`, which installs, and commands whose exit status is the point. Pages that are not in
here have tests of their own; of every page and the README, commands have to be such as the command line takes, and studies valid.
"""

from __future__ import annotations

import contextlib
import io
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
from fractions import Fraction
from pathlib import Path
from typing import Any

import click
import pytest
import torch
from click.testing import CliRunner

import landscape
from exmy.cli import main
from formats import quantize
from train.settings import TrainingSettings
from train.study_file import read_study

ROOT = Path(__file__).parent.parent
TUTORIAL = ROOT / "docs" / "tutorial.md"
FORMATS = ROOT / "docs" / "formats.md"
BOXES = ROOT / "docs" / "landscape-boxes.md"
STABILITY = ROOT / "docs" / "stability.md"
FOLLOWED = sorted([*(ROOT / "docs" / "how-to").glob("*.md"), *(ROOT / "docs" / "explanation").glob("*.md")])
PAGES = sorted([ROOT / "README.md", *(ROOT / "docs").rglob("*.md")])
# Pages with python blocks that other tests run: test_conformance, test_landscape_page, test_signal_packs, test_strategies.
ELSEWHERE = {"conformance.md", "landscape.md", "signals.md", "strategies.md"}
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def blocks(page: Path) -> list[tuple[str, str, int]]:
    """Language, text and first line of each fenced block."""
    text = page.read_text(encoding="utf-8")
    return [(m[1], m[2], text.count("\n", 0, m.start()) + 2) for m in FENCE.finditer(text)]


def shell(text: str) -> None:
    for line in text.splitlines():
        program, *arguments = shlex.split(line, comments=True)
        assert program == "exmy", line
        done = CliRunner().invoke(main, arguments)
        assert done.exit_code == 0, f"{line}\n{done.output}"


def python(text: str, namespace: dict[str, Any], where: str) -> str:
    if file := re.match(r"# (\w+\.py)\n", text):
        Path(file[1]).write_text(text)
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        exec(compile(text, where, "exec"), namespace)
    return printed.getvalue()


@pytest.fixture
def after_make_sweep(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where a reader stands after `make sweep`, with the results that were committed of it."""
    shutil.copytree(ROOT / "studies" / "results" / "first-look-cpu", tmp_path / "runs" / "first-look-cpu")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MPLBACKEND", "Agg")
    return tmp_path


def follow(page: Path, folder: Path) -> None:
    """Do what the page says, in this folder."""
    namespace: dict[str, Any] = {"__name__": page.stem}
    printed = ""
    for language, text, line in blocks(page):
        where = f"{page.name}:{line}"
        match language:
            case "sh":
                shell(text)
            case "python":
                printed = python(text, namespace, where)
            case "toml":
                (folder / "mine.toml").write_text(text)
            case "text":
                assert printed == text, where
            case "bash":
                checked = subprocess.run(["bash", "-n"], input=text, text=True, capture_output=True, check=False)
                assert (checked.returncode, checked.stderr) == (0, ""), where
            case "console":
                assert all(re.match(r"\$ (make|exmy|python) ", command) for command in text.splitlines()), where
            case _:
                pytest.fail(f"{where}: a block of {language or 'no language'} is not tested")


def test_the_formats_page_does_what_it_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    follow(FORMATS, tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"formats.png", "e4m3fn.hex", "e2m1fn.csv", "values.csv"}


def test_the_page_on_boxes_does_what_it_says_and_its_table_names_functions(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    follow(BOXES, tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"slice.png", "plane.png", "sam.png"}
    named = re.findall(r"^\| (`.*?`) \|", BOXES.read_text(encoding="utf-8"), re.MULTILINE)
    functions = {name for cell in named for name in re.findall(r"\w+", cell)}
    assert {"hidden_sharpness", "slice_between"} <= functions <= set(landscape.__all__)


def test_the_page_on_stability_does_what_it_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.copytree(ROOT / "studies" / "results" / "first-look-gpu", tmp_path / "runs" / "first-look-gpu")
    monkeypatch.chdir(tmp_path)
    follow(STABILITY, tmp_path)


def test_the_tutorial_does_what_it_says(after_make_sweep: Path) -> None:
    follow(TUTORIAL, after_make_sweep)
    left = {path.relative_to(after_make_sweep).as_posix() for path in after_make_sweep.rglob("*") if path.is_file()}
    assert {
        "runs/first-look-cpu/report/index.html",
        "runs/mine/report/index.html",
        "formats.png",
        "curves.png",
    } <= left


@pytest.mark.parametrize("page", FOLLOWED, ids=lambda page: page.stem)
def test_how_to_pages_and_explanations_do_what_they_say(
    page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("first-look-cpu", "first-look-gpu"):
        shutil.copytree(ROOT / "studies" / "results" / name, tmp_path / "runs" / name)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setenv("MPLBACKEND", "Agg")
    monkeypatch.delitem(sys.modules, "kernels", raising=False)
    follow(page, tmp_path)


def test_no_page_has_python_that_nobody_runs() -> None:
    with_python = {page.name for page in PAGES if any(language == "python" for language, _, _ in blocks(page))}
    run = {page.name for page in [TUTORIAL, FORMATS, BOXES, STABILITY, *FOLLOWED]}
    assert with_python - run == ELSEWHERE | {"README.md"}


def commands(page: Path) -> list[str]:
    """Every line of a block, fenced or indented, that begins with exmy, also behind a shell's sign; without a second column."""
    fenced = "".join(body for language, body, _ in blocks(page) if language != "text")
    indented = re.findall(r"^ {4}(exmy .*?)(?: {3}.*)?$", page.read_text(encoding="utf-8"), re.MULTILINE)
    lines = [*re.findall(r"^(?:\$ )?(exmy .*)$", fenced, re.MULTILINE), *indented]
    return [line.removesuffix(" &").removesuffix("...") for line in lines]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_every_command_that_a_page_shows_is_one(page: Path) -> None:
    """Its name, its options and the values of those that are choices or numbers; files need not be there."""
    for line in commands(page):
        command: click.Command = main
        words = shlex.split(line, comments=True)
        while isinstance(command, click.Group):
            name = words.pop(0) if command is not main else (words.pop(0), words.pop(0))[1]
            assert name in command.commands, line
            command = command.commands[name]
        context = click.Context(command, info_name=command.name)
        try:
            command.make_parser(context).parse_args(words)
        except click.UsageError as error:
            pytest.fail(f"{page.name}: {line}: {error.format_message()}")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_every_study_that_a_page_shows_is_valid(page: Path, tmp_path: Path) -> None:
    for language, text, line in blocks(page):
        if language == "toml":
            content = tomllib.loads(text)
            if "axes" in content:
                (tmp_path / "mine.toml").write_text(text)
                assert read_study(tmp_path / "mine.toml"), f"{page.name}:{line}"


@pytest.mark.parametrize("page", [TUTORIAL, FORMATS, BOXES, STABILITY, *FOLLOWED], ids=lambda page: page.stem)
def test_what_a_python_block_prints_is_shown(page: Path) -> None:
    """So that a reader without a shell can follow, and no printed number goes unchecked."""
    listed = blocks(page)
    for (language, text, line), (following, _, _) in zip(listed, [*listed[1:], ("", "", 0)], strict=True):
        assert language != "python" or ("print(" in text) == (following == "text"), f"{page.name}:{line}"


@pytest.mark.parametrize("page", [ROOT / "README.md", TUTORIAL, FORMATS])
def test_a_reader_is_told_where_the_command_is_before_it_is_used(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    first = re.search(r"^exmy ", text, re.MULTILINE)
    assert first is not None
    assert "`. .venv/bin/activate`" in text[: first.start()]


@pytest.mark.parametrize(
    "page", [page.relative_to(ROOT).as_posix() for page in PAGES if page.parent.name != "reference"]
)
def test_the_readme_leads_to_every_page(page: str) -> None:
    """Those of the reference are lists that are made with the site."""
    assert page == "README.md" or f"({page})" in (ROOT / "README.md").read_text(encoding="utf-8")


def test_the_readmes_links_lead_somewhere() -> None:
    links = re.findall(r"\]\(([^)#]+)\)", (ROOT / "README.md").read_text(encoding="utf-8"))
    assert len(links) > 30
    assert not [link for link in links if not (ROOT / link).exists()]


def test_the_readmes_links_into_pages_lead_to_headings() -> None:
    """By the rule of the code host: a heading in lower case without marks, spaces as minus signs."""
    links = re.findall(r"\]\(([^)#]+\.md)#([^)]+)\)", (ROOT / "README.md").read_text(encoding="utf-8"))
    assert len(links) > 10
    for page, anchor in links:
        headings = re.findall(r"^#+ (.*)$", (ROOT / page).read_text(encoding="utf-8"), re.MULTILINE)
        assert anchor in {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}, (
            page,
            anchor,
        )


def test_the_readme_is_read_in_five_minutes() -> None:
    """1,250 words, at 250 a minute: without blocks of code and the targets of links, and a number is a word as well."""
    text = FENCE.sub("", (ROOT / "README.md").read_text(encoding="utf-8"))
    words = [word for word in re.sub(r"\]\([^)]*\)", "]", text).split() if re.search(r"\w", word)]
    assert len(words) <= 1250


def test_the_readmes_python_runs(after_make_sweep: Path) -> None:
    """With the names that a reader would have."""
    assert after_make_sweep.is_dir()
    torch.manual_seed(0)
    names: dict[str, Any] = {
        "x": torch.randn(4, 64), "logits": torch.randn(2, 9), "targets": torch.tensor([1, 2]), "my_quantizer": e4m3fn,
    }  # fmt: skip
    for language, text, line in blocks(ROOT / "README.md"):
        if language == "python":
            python(text, names, f"README.md:{line}")
    assert names["round_exact"](0.3, "e4m3fn") == Fraction(5, 16)
    assert list(names["study"].children) == ["history", "evaluation", "sharpness", "summary"]


def e4m3fn(x: torch.Tensor) -> torch.Tensor:
    return quantize(x, "e4m3fn")


def test_the_page_on_training_has_every_setting_with_its_default(tmp_path: Path) -> None:
    page = (ROOT / "docs" / "training.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| (.*?) \| .* \| (.*?) \|$", page, re.MULTILINE)[1:]
    named = {field: defaults for fields, defaults in rows for field in re.findall(r"`(\w+)`", fields)}
    evaluations = {"evaluate_every", "evaluation_batches", "final_fraction", "decay_fraction", "muon_rate"}
    assert named.keys() | evaluations == set(TrainingSettings.model_fields) | {"no_decay"}
    assert all(f"`{field}`" in page for field in ("final_fraction", "decay_fraction", "muon_rate"))
    for field, defaults in named.items():
        default = getattr(TrainingSettings(), field)
        words = (
            default if isinstance(default, list) else [f"{default:g}" if isinstance(default, float) else str(default)]
        )
        assert all(word.replace("1e-08", "1e-8") in defaults for word in words), field
    (study,) = re.findall(r"```toml\n(.*?)```", page, re.DOTALL)
    (tmp_path / "mine.toml").write_text(study)
    assert len(list(read_study(tmp_path / "mine.toml").runs())) == 2 * 2 * 2 * 2
