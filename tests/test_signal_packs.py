"""Signals in packs and studies: they change nothing, belong to their run alone, and are stored under their names."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import xarray as xr

from tests.small import SHAPES, make_program, make_slots, resolve
from tests.test_execute import Recorder, runs, tiny
from tests.test_pack import CPU, NEIGHBOURS
from tests.test_step import most_memory, wide_text
from train import open_study, run_study
from train.loss_scale import DynamicLossScale
from train.model import ModelShape
from train.optim import Muon
from train.pack import Pack, train_pack
from train.program import PackResult, Program, Slot
from train.recipe_table import RecipeTable
from train.resolve import resolve_recipe
from train.schema import GROUPS
from train.signals import OF_OPERANDS, SIGNALS, markdown
from train.text import Text

ROOT = Path(__file__).parent.parent

PROGRAMS: dict[str, dict[str, Any]] = {
    "e4m3": {}, "native-bf16": {}, "native-fp64": {}, "stochastic-e4m3": {}, "fp8-hybrid-delayed": {}, "mxfp4": {},
    "nvfp4-all": {}, "deepseek": {}, "native-fp16-scaled": {"dynamic_loss_scale": DynamicLossScale()},
    "e8m7": {"optimizer": Muon()},
}  # fmt: skip


def as_bytes(result: PackResult) -> list[bytes]:
    arrays = [result.train_loss, result.grad_norm, result.grad_norm_block, result.validation_loss]
    return [array.tobytes() for array in (*arrays, *result.sharpness.values()) if array is not None]


def program_of(name: str) -> Program:
    return make_program(name, steps=12, signals_every=3, state=resolve(name).state, **PROGRAMS.get(name, {}))


@pytest.mark.parametrize("name", PROGRAMS)
def test_runs_are_the_same_bits_with_and_without_signals(name: str, text: Text, device: torch.device) -> None:
    program = program_of(name)
    watched = train_pack(program, make_slots([name] * 2), text, device)
    alone = train_pack(dataclasses.replace(program, signals_every=0), make_slots([name] * 2), text, device)
    assert as_bytes(watched) == as_bytes(alone)
    assert set(watched.signals) == set(SIGNALS)
    assert not alone.signals
    for signal, values in watched.signals.items():
        assert values.shape[:2] == (4, 2), signal
        if "block" not in SIGNALS[signal].dims and name not in ("native-fp64",):
            assert np.isfinite(values).all(), signal


@pytest.mark.parametrize("option", SHAPES)
def test_every_option_of_the_model_can_be_looked_at(option: str, text: Text) -> None:
    """And looking changes nothing."""
    program = make_program("e4m3", shape=SHAPES[option], signals_every=2, steps=6)
    results = [
        train_pack(dataclasses.replace(program, signals_every=every), make_slots(["e4m3"]), text, CPU)
        for every in (0, 2)
    ]
    assert as_bytes(results[0]) == as_bytes(results[1])
    assert np.isfinite(results[1].signals["attention_logit"][..., 1:]).all()


def signals_of(text: Text, device: torch.device, recipes: list[str], slot: int, wild: bool = False) -> list[bytes]:
    """Every signal of the run "seeds 99" put into a slot of a pack."""
    slots = make_slots(recipes)
    slots[slot] = Slot(resolve("e4m3" if recipes[0].startswith("e") else recipes[0]), 4e-3, 99, 99)
    program = make_program(recipes[0], steps=8, signals_every=3, state=slots[slot].recipe.state)
    pack = Pack(program, slots, text, device)
    other = (slot + 1) % len(slots)
    if wild:
        with torch.no_grad():
            for p in pack.parameters.values():
                p[other] = torch.nan
    for _ in range(8):
        pack.step()
    if wild:
        assert pack.signals.values["logsumexp_mean"][:, other].isnan().all()
        assert pack.signals.values["update_rms"][:, other].isnan().all()
    values = [pack.grad_norm_block, *pack.signals.values.values()]
    assert all(v[0, slot].isfinite().any() for v in values)
    return [v[:, slot].cpu().contiguous().numpy().tobytes() for v in values]


@pytest.mark.parametrize("recipes", [NEIGHBOURS, ["nvfp4-all"] * 4, ["fp8-hybrid-delayed"] * 4], ids=lambda r: r[0])
def test_a_runs_signals_are_the_same_bits_in_every_slot_and_beside_a_neighbour_driven_to_nan(
    recipes: list[str], text: Text, device: torch.device
) -> None:
    bits = [signals_of(text, device, recipes, slot) for slot in (0, 1, 3)]
    assert bits[1:] == bits[:-1]
    assert signals_of(text, device, recipes, 1, wild=True) == bits[0]


def test_a_runs_signals_are_the_same_bits_beside_other_formats(text: Text, device: torch.device) -> None:
    assert signals_of(text, device, NEIGHBOURS, 2) == signals_of(text, device, ["e8m1", "e3m2f", "e8m7", "e8m7"], 2)


def test_other_data_gives_other_signals(text: Text) -> None:
    """The comparisons above can fail."""
    slots = make_slots(["e4m3"] * 2)
    slots[1] = dataclasses.replace(slots[0], data_seed=slots[0].data_seed + 1)
    pack = Pack(make_program(signals_every=1), slots, text, CPU)
    pack.step()
    for name, values in pack.signals.values.items():
        if name not in ("clipped", "at_maximum", "scale"):
            assert not torch.equal(values[0, 0], values[0, 1]), name


def test_a_run_that_changes_its_recipe_is_looked_at_in_both(text: Text) -> None:
    """The first three steps in BF16, then in E4M3 with scales."""
    tables = {"late": RecipeTable(base="fp8-hybrid", before="native-bf16", until=3)}
    recipe = resolve_recipe("late", tables)
    assert recipe.before is not None
    program = dataclasses.replace(
        make_program("e4m3", signals_every=2), structure=recipe.structure, before=recipe.before.structure, until=recipe.until
    )  # fmt: skip
    result = train_pack(program, [Slot(recipe, 1e-3, 1, 1)], text, CPU)
    assert (result.signals["scale"][:2, 0, :8] == 0).all()
    assert (result.signals["scale"][2:, 0, :8] < -4).all()


def test_eight_exponent_bits_neither_clip_nor_flush_and_four_do(text: Text) -> None:
    program = make_program("e8m3", steps=60, signals_every=10)
    signals = train_pack(program, make_slots(["e8m3", "e4m3"], 1e-2), text, CPU).signals
    assert not signals["clipped"][:, 0].any()
    assert not signals["flushed"][:, 0].any()
    assert (signals["flushed"][:, 1, -1, 2] > 0.2).all(), "gradients of the LM head"


def test_signals_are_traced_whole_by_the_compiler(text: Text, monkeypatch: pytest.MonkeyPatch) -> None:
    """The statistics of all shapes by one function, and the update's: the same numbers by the compiler's tracing alone."""
    torch._dynamo.reset()
    found = []
    for compiled in (False, True):
        pack = Pack(make_program("fp8-hybrid", signals_every=2), make_slots(["fp8-hybrid"] * 2), text, CPU)
        if compiled:
            wrap: Any = torch.compile(pack._statistics, backend="eager", dynamic=True, fullgraph=True)
            monkeypatch.setattr(pack, "_statistics", wrap)
            for name, piece in pack._pieces.update_signals.items():
                pack._pieces.update_signals[name] = torch.compile(piece, backend="eager", dynamic=False, fullgraph=True)
        for _ in range(3):
            pack.step()
        found.append(pack.signals.values)
    torch._dynamo.reset()
    for name, values in found[0].items():
        torch.testing.assert_close(found[1][name], values, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize(
    ("recipe", "context", "sequences", "vocabulary"),
    [
        ("native-fp32", 512, 1, 64),
        ("native-fp32", 256, 1, 64),
        ("native-fp32", 32, 1, 1000),
        ("e4m3", 32, 16, 200),
        ("fp8-hybrid", 64, 1, 64),
    ],
)
def test_the_memory_of_a_look_is_in_the_estimate(recipe: str, context: int, sequences: int, vocabulary: int) -> None:
    shape = ModelShape(2, 2, 32, context, vocabulary)
    program = make_program(recipe, shape=shape, sequences=sequences, evaluation_sequences=sequences, signals_every=1)
    text = wide_text()
    text = dataclasses.replace(text, train=text.train % vocabulary, validation=text.validation % vocabulary)

    def work() -> None:
        pack = Pack(program, make_slots([recipe] * 2), text, CPU)
        pack.step()
        pack.step()

    measured = most_memory(work) / 2
    assert measured <= program.bytes_per_run(compiled=False) <= 4 * measured


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A study of two depths, tied to no one format."""
    directory = tmp_path_factory.mktemp("signals")
    run_study(
        tiny(axes={"recipe": ["e8m7", "mxfp8"], "layers": [1, 2]}, signals={"every": 5}), directory, "cpu", Recorder()
    )
    return directory


def test_packs_of_different_depths_are_joined(finished: Path) -> None:
    tree = open_study(finished)
    signals, history = tree["signals"].to_dataset(), tree["history"].to_dataset()
    assert signals["signal_step"].values.tolist() == [0, 5, 10]
    assert signals["block"].values.tolist() == history["block"].values.tolist() == [-1, 0, 1]
    assert set(signals["tensor"].values) == {
        f"h.{i}.{name}" for i in (0, 1) for name in ("attn.qkv", "attn.proj", "mlp.fc", "mlp.proj")
    } | {"lm_head"}
    assert signals["role"].values.tolist() == ["activation", "weight", "gradient"]
    assert signals["measured"].values.all()
    shallow = history["layers"].values == 1
    for values in (history["grad_norm_block"], history["gnmr_block"], signals["kurtosis"], signals["update_rms"]):
        assert np.isnan(values.sel(block=1).values[shallow]).all()
    assert np.isfinite(signals["kurtosis"].sel(block=0)).all()
    assert np.isnan(signals["kurtosis"].sel(block=-1)).all()
    error = signals["quantization_error"].sel(tensor="h.0.mlp.fc")
    assert (error.sel(run=signals["recipe"] == "mxfp8") > 0.005).all()
    assert (error.sel(run=signals["recipe"] == "e8m7") < 0.005).all()
    head = signals["quantization_error"].sel(tensor="lm_head")
    assert np.isfinite(head).all()
    assert np.isnan(signals["clipped"].sel(tensor="h.1.mlp.fc").values[shallow]).all()


def test_ratios_are_of_the_stored_norms(finished: Path) -> None:
    history = open_study(finished)["history"].to_dataset()
    norms = history["grad_norm"].values.astype(np.float64)
    np.testing.assert_allclose(history["gnmr"].values[:, 7], norms[:, 7] / norms[:, :7].mean(1), rtol=1e-6)
    blocks = history["grad_norm_block"].sel(block=0).values.astype(np.float64)
    ratio = history["gnmr_block"].sel(block=0).values
    np.testing.assert_allclose(ratio[:, 7], blocks[:, 7] / blocks[:, :7].mean(1), rtol=1e-6)
    assert np.isnan(ratio[:, 0]).all()
    total = (history["grad_norm_block"].astype(np.float64) ** 2).sum("block").values
    np.testing.assert_allclose(total, norms**2, rtol=2e-6)


def test_packs_hold_no_ratios(finished: Path) -> None:
    for path in (finished / "packs").glob("*.nc"):
        with xr.open_datatree(path, engine="h5netcdf") as tree:
            assert "grad_norm_block" in tree["history"]
            assert not {"gnmr", "gnmr_block"} & set(tree["history"].data_vars)


def test_how_often_signals_are_recorded_is_no_part_of_a_run(tmp_path: Path) -> None:
    """Finished runs stay, with their signals or without; what is new follows the study as it is now."""
    none, some = {"every": 0}, {"every": 4}
    assert [r.identity for r in tiny(signals=none).runs()] == [r.identity for r in tiny(signals=some).runs()]
    run_study(tiny(signals=none), tmp_path, "cpu", Recorder())
    tree = open_study(tmp_path)
    assert "signals" not in tree.children
    assert "gnmr" in tree["history"]
    recorder = Recorder()
    run_study(tiny(axes={"seed": 3}, signals=some), tmp_path, "cpu", recorder)
    assert runs(recorder) == 4
    again = open_study(tmp_path)
    signals, history = again["signals"].to_dataset(), again["history"].to_dataset()
    assert signals["run"].values.tolist() == history["run"].values.tolist()
    assert signals["measured"].values.tolist() == (history["seed"].values == 2).tolist()
    assert signals["recipe"].values.tolist() == history["recipe"].values.tolist()
    for name in SIGNALS:
        assert np.isnan(signals[name].values[~signals["measured"].values]).all()
    assert np.isfinite(signals["logsumexp_max"].values[signals["measured"].values]).all()
    for name, row in GROUPS["signals"].items():
        assert signals[name].dims == row.dims
        assert signals[name].attrs == row.attrs()
    xr.testing.assert_identical(
        tree["history"].to_dataset()["train_loss"],
        history["train_loss"].sel(run=tree["history"].to_dataset()["run"].values),
    )


def test_packs_of_before_have_no_norms_of_blocks(tmp_path: Path) -> None:
    """As they were written then, beside new ones."""
    run_study(tiny(axes={"seed": [0]}), tmp_path, "cpu", Recorder())
    [path] = (tmp_path / "packs").glob("*.nc")
    with xr.open_datatree(path, engine="h5netcdf") as tree:
        old = tree.load()
    groups = {f"/{name}": group.to_dataset() for name, group in old.children.items() if name != "signals"}
    groups["/history"] = groups["/history"].drop_vars(["grad_norm_block", "block"])
    stripped = xr.DataTree.from_dict(groups)
    stripped.attrs = old.attrs
    stripped.to_netcdf(path, engine="h5netcdf")
    path.with_suffix(".sha256").unlink()
    alone = open_study(tmp_path)["history"].to_dataset()
    assert "gnmr" in alone
    assert "gnmr_block" not in alone
    run_study(tiny(), tmp_path, "cpu", Recorder())
    history = open_study(tmp_path)["history"].to_dataset()
    assert np.isnan(history["gnmr_block"].values[history["seed"].values == 0]).all()
    assert np.isfinite(history["gnmr_block"].values[history["seed"].values == 1][:, 1:]).all()


def test_the_guide_has_the_table_of_signals(finished: Path) -> None:
    page = (ROOT / "docs" / "signals.md").read_text(encoding="utf-8")
    assert markdown() in page
    [example] = re.findall(r"^```python\n(.*?)^```$", page, re.MULTILINE | re.DOTALL)
    names: dict[str, Any] = {}
    exec(example.replace('"runs/first-look-cpu"', f'"{finished}"'), names)
    assert names["flushed"].dims == ("recipe", "signal_step")
    for name in ("grad_norm_block", "gnmr", "gnmr_block"):
        assert re.search(rf"^\| `{name}` \|", page, re.MULTILINE), name


def test_every_signal_is_in_the_schema_with_the_rest_of_its_words() -> None:
    assert set(GROUPS["signals"]) == {*SIGNALS, "measured"}
    for name in OF_OPERANDS:
        assert SIGNALS[name].dims == ("tensor", "role")
    for name, signal in SIGNALS.items():
        assert all((signal.units, signal.long_name, signal.source)), name
