"""A study file from a stranger: whatever is in it, it is read as data, or refused in one line, soon, and nothing is written."""

from __future__ import annotations

import contextlib
import string
from pathlib import Path
from typing import Any

import pytest
import tomli_w
import torch
from click.testing import CliRunner
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from exmy.cli import main
from train.adaptive import round_under_way
from train.axes import Axes
from train.named_recipes import NAMED
from train.plan import plan
from train.recipe_table import AXES, RecipeTable
from train.settings import (
    RUNS_LIMIT,
    DataSettings,
    DivergenceTable,
    ExecutionTable,
    ModelSettings,
    ProbeSettings,
    SignalsTable,
    TrainingSettings,
)  # fmt: skip
from train.strategy_table import StrategyTable
from train.study import Study, StudyError
from train.study_file import read_study

CPU = torch.device("cpu")
WORKING: dict[str, Any] = {
    "name": "mine",
    "axes": {"recipe": ["e8m7", "mine"], "learning_rate": [1e-3], "seed": 2},
    "model": {"layers": 1, "heads": 2, "width": 16, "context": 8},
    "training": {"steps": 20, "sequences": 2, "warmup": 2},
    "recipes": {"mine": {"base": "e4m3fn"}},
}
TABLES: dict[str, list[str]] = {
    "axes": [*Axes.model_fields, *AXES, *ModelSettings.model_fields, *TrainingSettings.model_fields],
    "model": list(ModelSettings.model_fields),
    "training": list(TrainingSettings.model_fields),
    "data": list(DataSettings.model_fields),
    "probe": list(ProbeSettings.model_fields),
    "signals": list(SignalsTable.model_fields),
    "divergence": list(DivergenceTable.model_fields),
    "execution": list(ExecutionTable.model_fields),
    "strategy": list(StrategyTable.model_fields),
    "recipes": ["mine", "../up", "e8m7"],
}

words = st.one_of(
    st.sampled_from(["bisect", "seeds"]),
    st.sampled_from([*NAMED, "e4m3fn", "native-bf16", "e99m99", "mxfp8", "nf4", "bytes", "gpt2-12m", "cosine", "none", "auto"]),
    st.sampled_from(["../../up", "/etc/passwd", "~/.ssh/id_rsa", "C:\\", "a\x1b[2J", "<script>", "$(id)", "\u202e", "x" * 5000]),
    st.text(string.printable, max_size=20),
)  # fmt: skip
numbers = st.one_of(
    st.integers(-(10**6), 10**6), st.sampled_from([0, -1, 2**31, 2**63 - 1, -(2**63), 10**40]),
    st.floats(), st.sampled_from([1e308, -1e308, 5e-324, 0.1]),
)  # fmt: skip
values = st.recursive(
    st.one_of(words, numbers, st.booleans()),
    lambda inner: st.one_of(st.lists(inner, max_size=4), st.dictionaries(words.filter(bool), inner, max_size=3)),
    max_leaves=6,
)
recipes = st.dictionaries(st.sampled_from(sorted(RecipeTable.__dataclass_fields__)), values, max_size=4)


def assert_is_a_line(message: str) -> None:
    """For a terminal: nothing that moves its cursor, nothing to scroll through."""
    assert 0 < len(message) <= 1000
    assert message.isprintable()


@st.composite
def studies(draw: st.DrawFn) -> dict[str, Any]:
    """A study that works, with a few of its words, or words that it could have, replaced by anything."""
    content = {key: dict(value) if isinstance(value, dict) else value for key, value in WORKING.items()}
    for _ in range(draw(st.integers(1, 3))):
        table = draw(st.sampled_from([*TABLES, "more", "top"]))
        if table == "top":
            content[draw(st.sampled_from([*Study.model_fields, "other"]))] = draw(values)
            continue
        if table == "more":
            content["more"] = draw(
                st.lists(st.dictionaries(st.sampled_from(TABLES["axes"]), values, max_size=3), max_size=3)
            )
            continue
        inside = content.setdefault(table, {})
        if isinstance(inside, dict):
            key = draw(st.sampled_from(TABLES[table]))
            inside[key] = draw(recipes if table == "recipes" else values)
    return content


@settings(max_examples=300, suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture])
@given(content=studies())
@example(content=WORKING)
@example(
    content=WORKING | {"strategy": {"kind": "bisect"}, "axes": {"recipe": ["e8m7"], "learning_rate": [5e-324, 100.0]}}
)
@example(content=WORKING | {"strategy": {"kind": "seeds"}, "axes": WORKING["axes"] | {"seed": [2**32 - 1]}})
@example(content=WORKING | {"more": [{"recipe": "e4m3", "round": 2}, {"seed": 99_999}]})
def test_any_study_is_read_or_refused_in_a_line(content: dict[str, Any], tmp_path: Path) -> None:
    """And planned or refused: no other error, no run that could not be named in a folder of its own."""
    path = tmp_path / "study.toml"
    path.write_bytes(tomli_w.dumps(content).encode("utf-8", "replace"))
    refused = ""
    try:
        study = read_study(path)
        packs = plan(round_under_way(study, tmp_path / "none", CPU), CPU)
    except StudyError as error:
        refused = str(error)
        assert_is_a_line(refused)
    if not refused:
        assert 1 <= sum(len(pack.runs) for pack in packs) <= RUNS_LIMIT
        out = (tmp_path / "runs" / study.name).resolve()
        assert out.parent == (tmp_path / "runs").resolve()
        assert study.name.isprintable()
    assert [entry.name for entry in tmp_path.iterdir()] == ["study.toml"]


@settings(max_examples=200, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    content=st.one_of(st.binary(max_size=200), st.text(max_size=200).map(lambda t: t.encode("utf-8", "surrogatepass")))
)
def test_any_bytes_are_refused_in_a_line(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "study.toml"
    path.write_bytes(content)
    with pytest.raises(StudyError) as refused:
        read_study(path)
    assert_is_a_line(str(refused.value))


BASES = "\n".join(f'{"a" * i} = {{lm_head = "{"a" * (i + 1)}", base = "e8m7"}}' for i in range(1, 400))


@pytest.mark.parametrize(
    "content",
    [
        "a = " + "[" * 20_000,
        "a = " + "{a=" * 20_000,
        "[" + "a." * 20_000 + "b]",
        "seed = " + "9" * 5_000,
        "x = 1\n" * 300_000,
        "[axes]\nrecipe = [" + '"e8m7",' * 200_000 + "]",
        "[axes]\nlearning_rate = [" + "1e-3," * 100_000 + ']\nrecipe = ["e8m7", "e8m3"]',
        '[axes]\nlearning_rate = [1e-3]\nrecipe = ["a"]\n[recipes]\n' + BASES,
        '[axes]\nlearning_rate = [1e-3]\nrecipe = ["a"]\n[recipes.a]\nbase = "e2' + "3" * 50 + 'm3fn"',
        "name = '/dev/zero'",
    ],
    ids=["arrays", "tables", "dotted", "digits", "long", "recipes", "axes", "bases", "bits", "empty"],
)  # fmt: skip
def test_what_is_deep_long_or_large_is_refused_in_a_line(content: str, tmp_path: Path) -> None:
    path = tmp_path / "study.toml"
    path.write_text(content, encoding="utf-8")
    with pytest.raises(StudyError) as refused:
        read_study(path)
    assert_is_a_line(str(refused.value))


@pytest.mark.parametrize(
    "name", ["../up", "/tmp/x", ".", "..", ".hidden", "a/b", "a\\b", "a\x1b[31m", "", "x" * 101, "-rf", "nul\x00"]
)
def test_a_name_is_that_of_one_folder(name: str, tmp_path: Path) -> None:
    path = tmp_path / "study.toml"
    path.write_text(tomli_w.dumps(WORKING | {"name": name}), encoding="utf-8")
    with pytest.raises(StudyError, match="name: must be a folder's name") as refused:
        read_study(path)
    assert_is_a_line(str(refused.value))
    result = CliRunner().invoke(main, ["sweep", str(path), "--device", "cpu", "--dry-run"])
    assert result.exit_code == 2


@pytest.mark.parametrize(
    ("table", "key", "value", "message"),
    [
        ("axes", "rounding", [], "axes.rounding has no values"),
        ("axes", "seed", 100_001, "seed counts seeds from 0, so it must be from 1 to 100000"),
        ("axes", "a\x1b[2J", 1, r"axes.a\\x1b\[2J is no axis"),
        ("training", "no_decay", [[]], "no_decay"),
        ("recipes", "r\x1b", {"base": "e8m7"}, "a recipe's name and a text's path"),
        ("axes", "dataset", "./" + "x" * 2000, "a recipe's name and a text's path"),
    ],
)  # fmt: skip
def test_what_a_table_may_not_hold(table: str, key: str, value: object, message: str, tmp_path: Path) -> None:
    path = tmp_path / "study.toml"
    path.write_text(tomli_w.dumps(WORKING | {table: {**WORKING.get(table, {}), key: value}}), encoding="utf-8")
    with pytest.raises(StudyError, match=message) as refused:
        read_study(path)
    assert_is_a_line(str(refused.value))


def test_a_device_is_no_study_file(tmp_path: Path) -> None:
    with pytest.raises(StudyError, match="1 MiB"):
        read_study(Path("/dev/zero"))
    with contextlib.suppress(FileNotFoundError):
        assert not any(tmp_path.iterdir())
