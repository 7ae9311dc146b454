"""A pack that was stopped goes on with the bits that it would have had; a checkpoint that won't do is never gone on from."""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import json
import logging
import shutil
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from tests.recipe_packs import WIDE, program_for, slot
from tests.small import SHAPE, make_program, make_slots
from tests.test_recipe_packs import BROAD, OWN
from train import checkpoint
from train.checkpoint import Checkpointer, CheckpointError, Times, read, remove_finished, write
from train.interruption import Interrupted, Interruption
from train.loss_scale import DynamicLossScale
from train.optim import Muon
from train.pack import Pack, train_pack
from train.program import PackResult, Probe, Program, Slot
from train.recipe_table import RecipeTable
from train.resolve import resolve_recipe
from train.state import StateFormats
from train.text import Text

CPU = torch.device("cpu")
STEPS = 12
OF = {"program": "abc", "runs": ["r0", "r1"], "pack_size": 2}
RECIPES = OWN | {
    "delayed later": RecipeTable(base="delayed head", before="native-bf16", until=4),
    "delayed before": RecipeTable(base="mxfp8", before="delayed head", until=4),
}
# A first scale beyond what FP32 has room for, so that a step is skipped; then it grows at every third.
DYNAMIC = DynamicLossScale(2.0**126, backoff=2.0**-100, interval=3)
KAHAN = StateFormats(master="bf16", first="e4m3fn@tensor", second="bf16", rounding="stochastic", kahan=True)
CHANGES: dict[str, dict[str, Any]] = {
    "native-fp32": {"dynamic_loss_scale": DYNAMIC},
    "native-fp16-scaled": {"dynamic_loss_scale": dataclasses.replace(DYNAMIC, initial=2.0**30, backoff=2.0**-14)},
    "e4m3": {"optimizer": Muon()},
    "e8m7": {"state": KAHAN, "shape": dataclasses.replace(WIDE, dropout=0.1)},
    "native-fp64": {"shape": dataclasses.replace(SHAPE, tied=False, positions="rope", qk_norm=True)},
}
NAMES = [
    "e8m7", "e4m3", "native-fp32", "native-fp16-scaled", "native-fp64", "fp8-hybrid-delayed", "nvfp4", "stochastic-e5m2",
    "ms-amp-o2", *RECIPES,
]  # fmt: skip
# Of what a state may hold one recipe each: all others as a proof, and whether their states are whole is asked of all, below.
OFTEN = {
    "e8m7", "e4m3", "native-fp16-scaled", "fp8-hybrid-delayed", "stochastic-e5m2", "products plain", "delayed later",
}  # fmt: skip
MOST = [name if name in OFTEN else pytest.param(name, marks=pytest.mark.proof) for name in NAMES]


def setting(name: str, device: torch.device = CPU) -> tuple[Program, list[Slot]]:
    """A program of the recipe, with everything on that is recorded, and three runs, the last of which diverges."""
    recipe = resolve_recipe(name, RECIPES)
    changes = {
        "steps": STEPS,
        "evaluate_every": 5,
        "probe": Probe(every=4),
        "signals_every": 3,
        **CHANGES.get(name, {}),
    }
    slots = [slot(recipe, 0), slot(recipe, 1, 1e-2), slot(recipe, 2, 1e4)]
    if changes.get("dynamic_loss_scale"):
        slots = [dataclasses.replace(one, loss_scale=1.0) for one in slots]
    shape = WIDE if device.type == "cpu" else BROAD
    return program_for(recipe, changes.pop("shape", shape), **changes), slots


class After(Interruption):
    """Ctrl-C after so many steps."""

    def __init__(self, steps: int) -> None:
        self.asked, self.steps = -1, steps

    @property
    def number(self) -> int | None:  # type: ignore[override]
        self.asked += 1
        return signal.SIGINT if self.asked == self.steps else None


def arrays(result: PackResult) -> Iterator[tuple[str, Any]]:
    """All that a pack gives back but its times and its memory."""
    for field in dataclasses.fields(result):
        value = getattr(result, field.name)
        if not field.name.startswith(("seconds", "peak")):
            yield from value.items() if isinstance(value, dict) else [(field.name, value)]


def assert_same(one: PackResult, other: PackResult) -> None:
    for (name, mine), (_, theirs) in zip(arrays(one), arrays(other), strict=True):
        np.testing.assert_array_equal(mine, theirs, err_msg=name)


def bits(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: t.detach().cpu().nan_to_num(-1.0) if t.is_floating_point() else t.cpu() for name, t in state.items()}


@pytest.mark.parametrize("name", MOST)
def test_a_pack_stopped_three_times_gives_the_results_of_one_that_was_not(
    name: str, text: Text, tmp_path: Path, device: torch.device
) -> None:
    """After 2 steps, 4, the last before a switch of precision, and 7."""
    program, slots = setting(name, device)
    whole = train_pack(program, slots, text, device)
    steps = []
    for stop in (2, 2, 3):
        steps.append(stop)
        with pytest.raises(Interrupted, match=f"up to step {sum(steps)}$"):
            train_pack(program, slots, text, device, checkpointer=Checkpointer(tmp_path / "c", OF, 1e9, After(stop)))
    assert_same(train_pack(program, slots, text, device, checkpointer=Checkpointer(tmp_path / "c", OF, 1e9)), whole)
    assert [path.name for path in tmp_path.iterdir()] == ["c"], "it started over"


@pytest.mark.parametrize("name", MOST)
def test_what_is_loaded_is_all_that_the_steps_after_it_need(name: str, text: Text, device: torch.device) -> None:
    """The whole state of two packs, of which one was loaded in the middle; before, at and after a switch of precision."""
    program, slots = setting(name, device)
    one = Pack(program, slots, text, device)
    saved: dict[int, dict[str, Tensor]] = {}
    for made in range(STEPS):
        one.measure()
        saved[made] = {key: t.clone() for key, t in one.state().items()}
        one.step()
    one.measure()
    for made in (1, 4, 5, 9):
        other = Pack(program, slots, text, device)
        other.load(saved[made])
        while other.made < STEPS:
            other.measure()
            other.step()
        other.measure()
        for (key, mine), theirs in zip(bits(one.state()).items(), bits(other.state()).values(), strict=True):
            assert torch.equal(mine, theirs), f"{key} after {made} steps"


@pytest.mark.parametrize("name", NAMES)
def test_loading_leaves_every_tensor_where_it_is(name: str, text: Text, device: torch.device) -> None:
    """What a GPU has recorded reads and writes the same addresses, before and after."""
    program, slots = setting(name, device)
    pack = Pack(program, slots, text, device)
    places = {key: t.data_ptr() for key, t in pack.state().items()}
    other = Pack(program, slots, text, device)
    for _ in range(3):
        other.step()
    pack.load({key: t.cpu() for key, t in other.state().items()})
    assert {key: t.data_ptr() for key, t in pack.state().items()} == places
    assert len(set(places.values())) == len(places), "two of them share memory"


# Attributes whose tensors follow from the program, the slots and the text, or are written before they are read.
DERIVED = {"slots", "program", "rates", "offsets", "text", "held_out", "numerics", "_draws", "rules", "words", "_words"}
SCRATCH = {"_evaluated", "_sharpness", "_small", "_amaxes"}


def tensors_of(thing: object, seen: set[int], path: str = "") -> Iterator[tuple[str, Tensor]]:
    """Every tensor that can be reached from an object of ours, but by DERIVED and SCRATCH, with the way there."""
    if id(thing) in seen:
        return
    seen.add(id(thing))
    if isinstance(thing, Tensor):
        yield path, thing
    elif isinstance(thing, dict):
        for key, value in thing.items():
            yield from tensors_of(value, seen, f"{path}[{key}]")
    elif hasattr(thing, "_fields"):
        for key in thing._fields:
            if key not in DERIVED:
                yield from tensors_of(getattr(thing, key), seen, f"{path}.{key}")
    elif isinstance(thing, list | tuple):
        for i, value in enumerate(thing):
            yield from tensors_of(value, seen, f"{path}[{i}]")
    elif type(thing).__module__.startswith("train."):
        for key, value in vars(thing).items():
            if key not in DERIVED | SCRATCH:
                yield from tensors_of(value, seen, f"{path}.{key}")


@pytest.mark.parametrize("name", NAMES)
def test_no_tensor_of_a_pack_is_forgotten(name: str, text: Text) -> None:
    """A new one is in the state, or named here as derived; and what is derived, no step changes."""
    program, slots = setting(name)
    pack = Pack(program, slots, text, CPU)
    derived = {key: value for key, value in vars(pack).items() if key in DERIVED}
    before = {path: t.clone() for path, t in tensors_of(list(derived.values()), set())}
    for _ in range(3):
        pack.measure()
        pack.step()
    known = {t.data_ptr() for t in pack.state().values()}
    forgotten = [path for path, t in tensors_of(pack, set()) if t.data_ptr() not in known]
    assert forgotten == []
    assert len(before) > 5
    for path, t in tensors_of(list(derived.values()), set()):
        assert torch.equal(before[path], t), path


def test_a_forgotten_tensor_is_found(text: Text) -> None:
    pack = Pack(make_program(), make_slots(["e4m3"]), text, CPU)
    pack.histories.momentum = torch.zeros(2)  # type: ignore[attr-defined]
    known = {t.data_ptr() for t in pack.state().values()}
    assert [path for path, t in tensors_of(pack, set()) if t.data_ptr() not in known] == [".histories.momentum"]


def test_the_state_of_another_program_is_refused_and_changes_nothing(text: Text) -> None:
    program, slots = setting("delayed later")
    pack, other = (Pack(program, slots, text, CPU) for _ in range(2))
    for _ in range(6):
        other.step()
    saved = other.state()
    before = {key: t.clone() for key, t in pack.state().items()}
    for wrong in (
        {key: t for key, t in saved.items() if key != "first wte"},
        saved | {"more": torch.zeros(1)},
        saved | {"first wte": saved["first wte"][:1]},
        saved | {"first wte": saved["first wte"].double()},
        saved | {"counter": torch.tensor([99])},
        {},
    ):
        with pytest.raises(ValueError, match="not a state of this program"):
            pack.load(wrong)
        assert pack.made == 0
        for (key, mine), theirs in zip(bits(before).items(), bits(pack.state()).values(), strict=True):
            assert torch.equal(mine, theirs), key


STATE = {"counter": torch.tensor([7]), "w": torch.arange(6.0).view(2, 3), "b": torch.tensor([True, False])}


def test_a_checkpoint_is_read_as_it_was_written_and_replaces_the_one_before(tmp_path: Path) -> None:
    assert read(tmp_path / "c", OF) is None
    write(tmp_path / "c", OF, 3, Times(1.0, 0.1), {"counter": torch.tensor([3])})
    write(tmp_path / "c", OF, 7, Times(2.0 / 3, 0.1), STATE)
    assert {path.name for path in (tmp_path / "c").iterdir()} == {"checkpoint.json", "7.safetensors"}
    found = read(tmp_path / "c", OF)
    assert found is not None
    step, times, state = found
    assert (step, times) == (7, Times(2.0 / 3, 0.1))
    assert state.keys() == STATE.keys()
    assert all(torch.equal(state[name], t) and state[name].dtype == t.dtype for name, t in STATE.items())


def not_to_be_called(state: object) -> None:
    pytest.fail("a checkpoint was loaded that won't do")


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 4
    path.write_bytes(content)


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def empty(path: Path) -> None:
    path.write_bytes(b"")


@pytest.mark.parametrize("harm", [flip, cut, empty, Path.unlink])
@pytest.mark.parametrize("name", ["checkpoint.json", "7.safetensors"])
def test_a_damaged_checkpoint_is_kept_aside_and_the_pack_starts_over(
    name: str, harm: Callable[[Path], None], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = tmp_path / "c"
    write(folder, OF, 7, Times(), STATE)
    harm(folder / name)
    loaded: list[object] = []
    assert Checkpointer(folder, OF).restore(loaded.append) == Times()
    assert not loaded
    if harm is Path.unlink and name == "checkpoint.json":
        return  # then there is none
    [line] = [record.message for record in caplog.records]
    assert "damaged" in line or "can't be read" in line
    assert "kept as c.damaged, and its pack starts over" in line
    assert [path.name for path in tmp_path.iterdir()] == ["c.damaged"]
    write(folder, OF, 7, Times(), STATE)
    harm(folder / name)
    Checkpointer(folder, OF).restore(loaded.append)
    assert {path.name for path in tmp_path.iterdir()} == {"c.damaged", "c.damaged-2"}


def test_a_checkpoint_names_no_file_but_its_own(tmp_path: Path) -> None:
    """Whoever writes the JSON can seal it, too: a checkpoint that comes with a study is a stranger's."""
    write(tmp_path / "c", OF, 7, Times(), STATE)
    elsewhere = tmp_path / "elsewhere.safetensors"
    elsewhere.write_bytes((tmp_path / "c" / "7.safetensors").read_bytes())
    for name in (str(elsewhere), "../elsewhere.safetensors"):
        described = json.loads((tmp_path / "c" / "checkpoint.json").read_bytes()) | {"tensors": name}
        del described["seal"]
        described["seal"] = checkpoint._seal(described)
        (tmp_path / "c" / "checkpoint.json").write_text(json.dumps(described), encoding="utf-8")
        with pytest.raises(CheckpointError, match="names another file than its own"):
            read(tmp_path / "c", OF)


def test_every_bit_of_a_checkpoint_is_vouched_for(tmp_path: Path) -> None:
    write(tmp_path, OF, 7, Times(1.5), STATE)
    for name in ("checkpoint.json", "7.safetensors"):
        content = (tmp_path / name).read_bytes()
        for i in range(len(content)):
            (tmp_path / name).write_bytes(content[:i] + bytes([content[i] ^ 1]) + content[i + 1 :])
            with pytest.raises(CheckpointError, match="damaged"):
                read(tmp_path, OF)
        (tmp_path / name).write_bytes(content)
    assert read(tmp_path, OF) is not None


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"program": "def"}, "of another program (abc, now def)"),
        ({"runs": ["r0", "r2"]}, "of another runs"),
        ({"version_of_torch": "2.11"}, "of another version of torch (None, now 2.11)"),
    ],
)
def test_the_checkpoint_of_another_program_is_kept_aside(
    changed: dict[str, Any], words: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    write(tmp_path / "c", OF, 7, Times(), STATE)
    with pytest.raises(CheckpointError):
        read(tmp_path / "c", OF | changed)
    assert Checkpointer(tmp_path / "c", OF | changed).restore(not_to_be_called) == Times()
    assert words in caplog.text
    assert (tmp_path / "c.other" / "7.safetensors").is_file()


def test_a_state_that_the_pack_refuses_is_kept_aside(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    def refuse(state: object) -> None:
        raise ValueError("not a state of this program: w")

    write(tmp_path / "c", OF, 7, Times(), STATE)
    assert Checkpointer(tmp_path / "c", OF).restore(refuse) == Times()
    assert "not a state of this program: w" in caplog.text
    assert (tmp_path / "c.other").is_dir()


class Clock:
    """Seconds that pass when told to."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def written(folder: Path) -> int:
    found = read(folder, OF)
    return found[0] if found else 0


def test_checkpoints_come_every_minute_or_as_rarely_as_keeps_their_cost_below_two_percent(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock, real = Clock(), checkpoint.write

    def slow(*arguments: Any) -> int:
        clock.now += 4.0
        return real(*arguments)

    monkeypatch.setattr(checkpoint, "write", slow)
    keeper = Checkpointer(tmp_path, OF, clock=clock)
    at = []
    for step in range(1, 900):
        clock.now += 1.0
        before = written(tmp_path)
        keeper.after_step(step, lambda: STATE, Times)
        at += [step] if written(tmp_path) != before else []
    assert at == [60, 300, 540, 780]  # 60 times 4 seconds


@pytest.mark.parametrize(("seconds", "expected"), [(2.5, [3, 6, 9]), (0.0, [])])
def test_a_study_says_how_often(seconds: float, expected: list[int], tmp_path: Path) -> None:
    clock, at = Clock(), list[int]()
    keeper = Checkpointer(tmp_path, OF, seconds, clock=clock)
    for step in range(1, 11):
        clock.now += 1.0
        before = written(tmp_path)
        keeper.after_step(step, lambda: STATE, Times)
        at += [step] if written(tmp_path) != before else []
    assert at == expected


def test_a_full_disk_costs_a_line_and_the_checkpoint_before_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    clock = Clock()
    keeper = Checkpointer(tmp_path, OF, 1.0, clock=clock)

    def go(step: int) -> None:
        clock.now += 1.0
        keeper.after_step(step, lambda: STATE, Times)

    go(1)
    real, budget = Path.write_bytes, [0]

    def full(path: Path, content: bytes) -> int:
        if budget[0]:
            raise OSError(errno.ENOSPC, "No space left on device")
        return real(path, content)

    monkeypatch.setattr(Path, "write_bytes", full)
    budget[0] = 1
    go(2)
    go(3)
    [line] = [record.message for record in caplog.records if record.levelno == logging.WARNING]
    assert "can't be written (No space left on device); the training goes on, and the one of step 1 stays" in line
    assert written(tmp_path) == 1
    assert {path.name for path in tmp_path.iterdir()} == {"checkpoint.json", "1.safetensors"}
    budget[0] = 0
    go(4)
    assert written(tmp_path) == 4


def test_a_checkpoint_leaves_room_for_results(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    size = sum(t.nbytes for t in STATE.values())
    for free, fits in ((2 * size, True), (2 * size - 1, False)):
        monkeypatch.setattr(shutil, "disk_usage", lambda _, free=free: shutil._ntuple_diskusage(0, 0, free))
        with contextlib.nullcontext() if fits else pytest.raises(OSError, match="No space left"):
            write(tmp_path, OF, 3, Times(), STATE)


def test_what_a_finished_pack_had_no_time_to_remove_is_removed(tmp_path: Path) -> None:
    """But nothing that is damaged, set aside for another reason or still wanted."""
    folders = {name: tmp_path / "checkpoints" / name for name in ("ended", "under way", "damaged", "empty")}
    for name, folder in folders.items():
        write(folder, OF | {"runs": ["r0", "r9" if name == "under way" else "r1"]}, 3, Times(), STATE)
    flip(folders["damaged"] / "checkpoint.json")
    (folders["empty"] / "checkpoint.json").unlink()
    remove_finished(tmp_path, {"r0", "r1", "r2"})
    assert {path.name for path in (tmp_path / "checkpoints").iterdir()} == folders.keys() - {"ended"}
    remove_finished(tmp_path / "none", {"r0"})


def test_a_signal_keeps_the_step_that_was_made(tmp_path: Path) -> None:
    with pytest.raises(Interrupted, match="up to step 7") as stop:
        Checkpointer(tmp_path, OF, interruption=After(0)).after_step(7, lambda: STATE, Times)
    assert stop.value.name == "SIGINT"
    assert written(tmp_path) == 7
    described = json.loads((tmp_path / "checkpoint.json").read_text())
    assert described["of"] == {"schema": 1} | OF
