"""Imports only ever point down, and a package's `__init__.py` is its face: both read off the source, not off what runs.

An import inside a function, under TYPE_CHECKING or by importlib counts like any other. The checker is tested on small
made-up trees first: a check that can't fail proves nothing.
"""

from __future__ import annotations

import ast
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest
import setuptools

ROOT = Path(__file__).parent.parent

# What each may import of ours, from the picture in the design.
MAY_IMPORT: dict[str, set[str]] = {
    "formats": set(),
    "landscape": set(),
    "studies": set(),
    "train": {"formats", "landscape"},
    "verification": {"formats"},
    "exmy": {"formats", "landscape", "train", "verification", "studies"},
    "scripts": {"formats", "landscape", "train"},
    "docs": {"formats", "landscape", "train", "exmy"},
}
OURS = MAY_IMPORT.keys() | {"tests", "benchmarks"}


def imported(tree: ast.Module, package: str) -> Iterator[tuple[int, str]]:
    """Line and dotted name of every import in a module of `package` (dotted, for relative imports)."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            parts = package.split(".")
            # One dot is the package itself, each further one its parent; beyond the top, Python itself refuses.
            base = parts[: len(parts) - node.level + 1] if node.level else []
            yield node.lineno, ".".join([*base, *filter(None, [node.module])])
        elif isinstance(node, ast.Call) and node.args and isinstance(node.args[0], ast.Constant):
            name = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
            if name in {"import_module", "__import__"}:
                yield node.lineno, str(node.args[0].value)


def forbidden_imports(root: Path) -> list[str]:
    """One line for each import of ours that points anywhere but down."""
    found = []
    for room, allowed in MAY_IMPORT.items():
        for path in sorted((root / room).rglob("*.py")):
            place = path.relative_to(root)
            for line, name in imported(ast.parse(path.read_text()), ".".join(place.parent.parts)):
                target = name.split(".")[0]
                if target in OURS - allowed - {room}:
                    found.append(f"{place.as_posix()}:{line}: {room} may not import {target}")
    return found


def is_reexport(node: ast.stmt) -> bool:
    """Whether a statement belongs in a face: an import, `__all__`, the docstring, a lazy `__getattr__` or its twin for types."""
    match node:
        case ast.Import() | ast.ImportFrom() | ast.Expr(value=ast.Constant(value=str())):
            return True
        case ast.Assign(targets=[ast.Name(id="__all__")]) | ast.AnnAssign(target=ast.Name(id="__all__")):
            return True
        case ast.FunctionDef(name="__getattr__" | "__dir__"):
            return True
        case ast.If(test=ast.Name(id="TYPE_CHECKING"), orelse=[]):
            return all(isinstance(inner, ast.Import | ast.ImportFrom) for inner in node.body)
    return False


def faces_with_code(root: Path) -> list[str]:
    """One line for each statement in a package's `__init__.py` that is no re-export."""
    faces = [face for room in MAY_IMPORT for face in sorted((root / room).rglob("__init__.py"))]
    return [
        f"{face.relative_to(root).as_posix()}:{node.lineno}: a package's __init__ only re-exports"
        for face in faces
        for node in ast.parse(face.read_text()).body
        if not is_reexport(node)
    ]


def test_imports_only_point_down() -> None:
    assert forbidden_imports(ROOT) == []


def test_a_packages_init_only_reexports() -> None:
    assert faces_with_code(ROOT) == []


def test_no_package_escapes_the_table() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    found = project["tool"]["setuptools"]["packages"]["find"]
    packages = set(setuptools.find_packages(str(ROOT), include=found["include"]))
    assert {name for name in packages if "." not in name} == MAY_IMPORT.keys() - {"scripts", "docs"}
    within = {path.parent for room in MAY_IMPORT for path in (ROOT / room).glob("*/**/__init__.py")}
    assert {".".join(folder.relative_to(ROOT).parts) for folder in within} == packages - MAY_IMPORT.keys()
    with_code = {path.parent.name for path in ROOT.glob("*/*.py") if not path.parent.name.startswith((".", "build"))}
    assert with_code <= OURS


def make(root: Path, files: dict[str, str]) -> Path:
    for name, source in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(source)
    return root


@pytest.mark.parametrize(
    ("file", "source", "target"),
    [
        ("formats/a.py", "import train", "train"),
        ("formats/a.py", "import numpy, landscape.logits as ll", "landscape"),
        ("landscape/deep/down/a.py", "from formats.spec import FloatFormat", "formats"),
        ("train/a.py", "def f():\n    class C:\n        from verification import verify", "verification"),
        ("train/a.py", "if TYPE_CHECKING:\n    from exmy.cli import main", "exmy"),
        ("train/a.py", "try:\n    import studies\nexcept ImportError:\n    pass", "studies"),
        ("verification/test_a.py", "from landscape import logit_sharpness", "landscape"),
        ("studies/__init__.py", "from formats import float_format", "formats"),
        ("scripts/a.py", "from verification import verify", "verification"),
        ("exmy/a.py", "from tests.small import study", "tests"),
        ("exmy/a.py", "import benchmarks.test_speed", "benchmarks"),
        ("formats/a.py", "import importlib\nimportlib.import_module('train.pack')", "train"),
        ("formats/a.py", "m = __import__('exmy')", "exmy"),
    ],
)
def test_an_import_that_points_up_is_caught(tmp_path: Path, file: str, source: str, target: str) -> None:
    (line,) = forbidden_imports(make(tmp_path, {file: source}))
    assert line.startswith(f"{file}:")
    assert line.endswith(f"{file.split('/')[0]} may not import {target}")


def test_imports_that_point_down_inside_or_out_are_let_through(tmp_path: Path) -> None:
    files = {
        "formats/a.py": "import numpy\nfrom formats import b\nfrom . import c\nfrom .train import d\nimport training",
        "formats/deep/a.py": "from ..b import c\nfrom .. import train",
        "train/a.py": "from formats import quantize\nimport landscape\nfrom train.b import c",
        "verification/a.py": "import formats",
        "exmy/a.py": "import formats, landscape, train, verification, studies",
        "scripts/a.py": "from train import open_study\nfrom landscape import half_width",
        "tests/test_a.py": "import formats, train, exmy, verification",
    }
    assert forbidden_imports(make(tmp_path, files)) == []


@pytest.mark.parametrize(
    "source",
    [
        "x = 1",
        "def f(): ...",
        "class C: ...",
        "for i in (): ...",
        "print()",
        "if TYPE_CHECKING:\n    x = 1",
        "if True:\n    import a",
    ],
)
def test_code_in_a_face_is_caught(tmp_path: Path, source: str) -> None:
    (line,) = faces_with_code(make(tmp_path, {"train/__init__.py": f'"""A face."""\n{source}'}))
    assert line.startswith("train/__init__.py:2: ")


def test_a_face_with_lazy_names_is_let_through(tmp_path: Path) -> None:
    source = (
        '"""A face."""\nfrom typing import TYPE_CHECKING\nimport a\nif TYPE_CHECKING:\n    from b import c\n'
        "__all__ = ['a', 'c']\ndef __getattr__(name):\n    from b import c\n    return c\n"
    )
    assert faces_with_code(make(tmp_path, {"formats/__init__.py": source})) == []
