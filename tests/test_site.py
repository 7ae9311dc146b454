"""The guide as a site: it builds without a warning, its notebooks run, and its reference lists what the code has."""

from __future__ import annotations

import dataclasses
import html
import json
import os
import re
import subprocess
import sys
from importlib import import_module
from pathlib import Path
from typing import Any, get_args, get_type_hints

import click
import pytest
from pydantic import BaseModel

from exmy.cli import main
from formats import get_format, list_formats
from formats.names import well_known
from train.named_recipes import NAMED
from train.schema import GROUPS, OF_MEASURES
from train.study import Study

ROOT = Path(__file__).parent.parent
NOTEBOOKS = sorted((ROOT / "docs" / "notebooks").glob("*.ipynb"))


def commands(group: click.Group, name: str) -> list[str]:
    found = [name]
    for word, command in group.commands.items():
        found += commands(command, f"{name}-{word}") if isinstance(command, click.Group) else [f"{name}-{word}"]
    return found


def test_the_site_builds_without_a_warning_and_lists_what_there_is(tmp_path: Path) -> None:
    """One test, since building takes its time."""
    pytest.importorskip("sphinx", reason="the extra 'docs' is not installed")
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    built = subprocess.run(
        [sys.executable, "-m", "sphinx", "-W", "--keep-going", "-q", "-b", "html", "-d", tmp_path / "trees", "docs",
         tmp_path / "site"],
        cwd=ROOT, env=environment, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert built.returncode == 0, built.stderr

    def page(name: str) -> str:
        return (tmp_path / "site" / f"{name}.html").read_text(encoding="utf-8")

    for package in ("formats", "verification", "train", "landscape"):
        text = page(f"reference/api-{package}")
        for name in import_module(package).__all__:
            assert f'id="{package}.{name}"' in text, name
    line = page("reference/command-line")
    for command in commands(main, "exmy"):
        assert f'id="{command}"' in line or f'id="{command.removeprefix("exmy-")}"' in line, command
    datasets = page("reference/dataset")
    for group in (*GROUPS.values(), *OF_MEASURES.values()):
        assert all(f">{name}<" in datasets for name in group)
    assert all(f'id="{name}"' in page("reference/named-recipes") for name in NAMED)
    assert all(f">{name}<" in page("reference/named-formats") for name in list_formats())
    assert "largest" in page("reference/named-formats")
    for notebook in NOTEBOOKS:
        text = page(f"notebooks/{notebook.stem}")
        assert "cell_output" in text
        assert re.search(r'<img [^>]*src="\.\./_images/\w+\.png"', text), "its figure"
    for path in (tmp_path / "site").rglob("*.html"):
        loaded = re.findall(
            r'<(?:script|img)[^>]* src="(http[^"]*)"|<link[^>]*href="(http[^"]*)"', path.read_text("utf-8")
        )
        assert not loaded, f"{path.name} needs a network"


def test_the_page_on_study_files_has_every_key_with_its_limits_and_default() -> None:
    """Against the study that is made of next to nothing, whose file has every default."""
    from docs.site_tables import TABLES

    text = html.unescape(TABLES["study-file"]())
    sections = dict(re.findall(r"^## \[+([\w.]+)\]+\n(.*?)(?=^## |\Z)", text, re.MULTILINE | re.DOTALL))
    study = Study.model_validate({"axes": {"recipe": ["e4m3"], "learning_rate": [1e-3]}})
    for name in ("model", "training", "data", "strategy", "probe", "signals", "divergence", "execution"):
        table = getattr(study, name)
        rows = dict(re.findall(r"^\| `(\w+)` \| (.*) \|$", sections[name], re.MULTILINE))
        assert rows.keys() == set(type(table).model_fields)
        for key in rows:
            default = getattr(table, key)
            if isinstance(default, int | float) and not isinstance(default, bool) and not table.model_fields_set:
                assert f"`{default:g}`" in rows[key] or f"`{default}`" in rows[key], (name, key)
    assert "integer ≥ 1 and ≤ 1,000,000 | `300`" in sections["training"]
    assert "number > 0 | `1`" in sections["training"], "clip"
    assert {"axes", "more", "recipes.NAME", "recipes.NAME.forward"} <= sections.keys()


def tables_of(model: Any) -> dict[str, set[str]]:
    """Every model that a study file is checked by, down from a class, with its fields: what types say, and no schema."""
    fields = getattr(model, "model_fields", None) or {field.name: field for field in dataclasses.fields(model)}
    hints = get_type_hints(model)
    found = {model.__name__: set(fields)}
    waiting = [hints[name] for name in fields]
    while waiting:
        hint = waiting.pop()
        waiting += get_args(hint)
        if isinstance(hint, type) and (issubclass(hint, BaseModel) or dataclasses.is_dataclass(hint)):
            found |= tables_of(hint)
    return found


def test_no_key_of_a_study_file_is_without_a_meaning_a_default_and_what_it_accepts() -> None:
    from docs.site_tables import ORDER, TABLES

    text = TABLES["study-file"]()
    found = tables_of(Study)
    top = found.pop("Study") - {name.split(".")[0] for name in ORDER}
    assert {*ORDER.values()} == found.keys()
    sections = dict(re.findall(r"^## ([^\n]+)\n(.*?)(?=^## |\Z)", text, re.MULTILINE | re.DOTALL))
    rows = {
        title.strip("[]"): re.findall(r"^\| `(\w+)` \| (.*?) \| (.*?) \| (.*) \|$", section, re.MULTILINE)
        for title, section in sections.items()
    }
    for title, keys in {"Above all tables": top, **{name: found[model] for name, model in ORDER.items()}}.items():
        assert {key for key, *_ in rows[title]} == keys, title
        for key, accepts, default, meaning in rows[title]:
            assert all(map(str.strip, (accepts, default))), (title, key)
            assert len(meaning.split()) >= 2, (title, key)


def test_the_page_on_formats_says_what_the_standard_says() -> None:
    """OCP OFP8 v1.0, table 1, and MX v1.0, section 5.3."""
    from docs.site_tables import TABLES

    text = TABLES["formats"]()
    assert re.search(r"^\| `e4m3fn` \| 8 \| 448 \|", text, re.MULTILINE)
    assert re.search(r"^\| `e5m2` \| 8 \| 57344 \|", text.replace("57,344", "57344"), re.MULTILINE)
    assert re.search(r"^\| `e2m1fn` \| 4 \| 6 \| 1 \|", text, re.MULTILINE)
    assert all(f"`{name}`" in text and get_format(name) for name in well_known())


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebooks_are_kept_without_outputs(path: Path) -> None:
    notebook = json.loads(path.read_text(encoding="utf-8"))
    for cell in notebook["cells"]:
        assert not cell.get("outputs")
        assert cell.get("execution_count") is None


def test_there_are_two_notebooks() -> None:
    assert [path.stem for path in NOTEBOOKS] == ["formats", "reading-a-study"]
