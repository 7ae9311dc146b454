"""`exmy bench`: its clock, its peers, what it says of them, and what it refuses. How fast anything is no test says."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner, Result

from exmy import bench as module
from exmy.bench import PARTS, SIZES, Row, Sizes, Spread, Task, bench, spread
from exmy.bench_table import bench_table
from exmy.cli import main
from exmy.console import output
from exmy.machine_commands import PARTS as NAMED
from train.model import ModelShape
from train.study import StudyError

TINY = Sizes(2**12, 2, 300, ModelShape(1, 2, 16, 16, 256), 3, 2, 2)
CPU = torch.device("cpu")


@pytest.fixture
def eager(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing compiled, and little of everything."""
    monkeypatch.setattr(module, "has_cpp_compiler", lambda: False)
    monkeypatch.setitem(SIZES, "cpu", TINY)


def invoke(*arguments: str) -> Result:
    return CliRunner().invoke(main, ["bench", *arguments])


class Clock:
    """A clock that only work moves."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now

    def takes(self, *seconds: float) -> Any:
        """Work that takes the first of these, then the next, and so on in a circle."""
        calls = iter(range(10**9))

        def work() -> None:
            self.now += seconds[next(calls) % len(seconds)]

        return work


def test_a_rate_and_how_many_times_as_long(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock()
    monkeypatch.setattr("exmy.bench.time.perf_counter", clock)
    task = Task("x", "work", "things/s", 50, clock.takes(0.1), {"slow": clock.takes(0.3), "quick": clock.takes(0.05)})
    monkeypatch.setitem(PARTS, "x", lambda *_: iter([task]))
    (row,) = bench(["x"], "cpu", 6)
    assert (row.rate.median, row.rate.least, row.rate.most) == pytest.approx((500, 500, 500))
    assert {name: found.median for name, found in row.times.items()} == pytest.approx({"slow": 3, "quick": 0.5})


def test_numbers_are_shown_without_powers_of_ten() -> None:
    times = Spread(1434.9, 9995.0, 92_345.0, 0.0, 0.0)
    shown = bench_table([Row("x", "work", "things/s", Spread(999.9, 0.01234, 12.345, 0, 0), {"slow": times})], "cpu", 6)
    cells = [list(column.cells) for column in shown.columns]
    assert list(zip(*cells, strict=True)) == [
        ("work", "1,000 [0.0123, 12.3] things/s"), ("  slow", "1,430 [10,000, 92,300] ×"),
    ]  # fmt: skip


def test_in_a_pipe_each_line_is_whole_and_no_wider_than_a_page(capsys: pytest.CaptureFixture[str]) -> None:
    """Of the longest rows that there are: a pack's, whose numbers have a long unit, and the search for sharpness."""
    ratio = Spread(1234.0, 1000.0, 2345.0, 0.0, 0.0)
    shape = "training 4 × 128, 8 × 256 tokens a step, native-bf16, a pack of 128"
    search = "exact logit sharpness, V = 50,257, epsilon 5e-4, compiled, 2 tokens"
    rows = [
        Row("packs", shape, "run-steps/s", Spread(12.25, 9.834, 14.21, 0, 0), {"128 runs one after another": ratio}),
        Row(
            "sharpness",
            search,
            "tokens/s",
            Spread(270.0, 70.1, 740.0, 0, 0),
            {},
            ("ten iterations of SciPy's L-BFGS-B",),
        ),
    ]
    output().print(bench_table(rows, "cpu", 6))
    lines = capsys.readouterr().out.splitlines()
    assert max(len(line.rstrip()) for line in lines) <= 100
    for what, value in (
        (shape, "12.2 [9.83, 14.2] run-steps/s"), ("  128 runs one after another", "1,230 [1,000, 2,340] ×"),
        (search, "270 [70.1, 740] tokens/s"), ("  ten iterations of SciPy's L-BFGS-B", "gives other values, not timed"),
    ):  # fmt: skip
        assert any(line.startswith(what) and line.rstrip().endswith(value) for line in lines), what


def test_what_is_short_is_repeated_and_its_first_pass_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    clock, calls = Clock(), []
    monkeypatch.setattr("exmy.bench.time.perf_counter", clock)

    def short() -> None:
        calls.append(1)
        clock.now += 1e-3

    monkeypatch.setitem(PARTS, "x", lambda *_: iter([Task("x", "work", "things/s", 1, short)]))
    (row,) = bench(["x"], "cpu", 7)
    assert row.rate.median == pytest.approx(1000)
    assert len(calls) == 2 + 7 * (
        1 + 5
    )  # a first one, one to see how long it takes; in each round one and then five that count


def test_a_median_has_the_interval_of_order_statistics() -> None:
    found = spread(np.random.default_rng(0).permutation(np.arange(1.0, 21.0)))
    # Of 20, the 6th and the 15th: P(Binomial(20, 1/2) <= 5) = 2.07 %, with one more 5.77 %.
    assert (found.median, found.low, found.high, found.least, found.most) == (10.5, 6.0, 15.0, 1.0, 20.0)
    six = spread(np.arange(6.0))
    assert (six.low, six.high) == (0.0, 5.0)


@pytest.mark.usefixtures("eager")
def test_all_parts_in_miniature(tmp_path: Path) -> None:
    file = tmp_path / "bench.json"
    asked = invoke("--device", "cpu", "--rounds", "6", "--json", str(file))
    assert asked.exit_code == 0, asked.output
    told = json.loads(file.read_text())
    assert (told["rounds"], told["version_torch"]) == (6, torch.__version__)
    peers: dict[str, set[str]] = {}
    for row in told["rows"]:
        assert row["wrong"] == []
        assert 0 < row["rate"]["least"] <= row["rate"]["low"] <= row["rate"]["median"] <= row["rate"]["high"]
        assert all(times["median"] > 0 for times in row["times"].values())
        peers.setdefault(row["part"], set()).update(row["times"])
    assert peers == {
        "elements": {"a copy", "torch's casts", "ml_dtypes"},
        "blocks": {"a copy"},
        "sharpness": {"ten iterations of SciPy's L-BFGS-B"},
        "packs": {"3 runs one after another"},
    }
    assert len(re.findall(r"3 runs one after another +\S+ \[\S+, \S+\] ×", asked.output)) == 2
    assert tuple(PARTS) == NAMED


@pytest.mark.usefixtures("eager")
def test_a_peer_with_other_values_is_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_cast", lambda x, _: x.clone())
    asked = invoke("elements", "--device", "cpu", "--rounds", "6")
    assert asked.exit_code == 1
    assert len(re.findall("torch's casts +gives other values, not timed", asked.output)) == 3
    for share in (2.0, 0.25):  # more than there is; so little that it hardly searched
        monkeypatch.setattr(module, "lbfgsb_logit_sharpness", _finds(share))
        (row,) = bench(["sharpness"], "cpu", 6)
        assert (row.wrong, row.times) == (("ten iterations of SciPy's L-BFGS-B",), {})


def _finds(share: float) -> Any:
    """A search that finds this share of the exact sharpness."""
    from landscape import Bracket, logit_sharpness

    def search(logits: torch.Tensor, targets: torch.Tensor) -> Bracket:
        found = share * logit_sharpness(logits, targets).double()
        return Bracket(found, None, found > 0, found)

    return search


def test_a_pack_is_held_against_as_many_steps_one_after_another(monkeypatch: pytest.MonkeyPatch) -> None:
    taken: list[int] = []

    class Counted:
        def __init__(self, _program: Any, slots: list[Any], *_: Any) -> None:
            self.runs = len(slots)

        def step(self) -> None:
            taken.append(self.runs)

    monkeypatch.setattr(module, "Pack", Counted)
    for task in PARTS["packs"](CPU, TINY):
        taken.clear()
        task.call()
        assert (sum(taken), set(taken)) == (task.amount, {3})
        taken.clear()
        (alone,) = task.against.values()
        alone()
        assert (sum(taken), set(taken)) == (task.amount, {1})


def test_what_can_not_be_measured_is_refused_before_any_work(tmp_path: Path) -> None:
    for arguments, words in (
        (("nothing",), "'nothing' is not one of 'elements', 'blocks', 'sharpness', 'packs'"),
        (("--rounds", "5"), "5 is not in the range x>=6"),
        (("--json", str(tmp_path / "none" / "x.json")), "none"),
        *(() if torch.cuda.is_available() else ((("--device", "cuda"), "PyTorch sees no CUDA device here"),)),
    ):
        asked = invoke(*arguments)
        assert (asked.exit_code, asked.output.count("\n")) == (2, 1), asked.output
        assert words in asked.output
    with pytest.raises(StudyError, match="there is no part 'nothing': elements, blocks, sharpness, packs"):
        next(bench(["nothing"], "cpu", 6))
    with pytest.raises(StudyError, match="rounds must be at least 6"):
        next(bench([], "cpu", 5))


@pytest.mark.cuda
@pytest.mark.usefixtures("cuda")
def test_all_parts_in_miniature_on_a_gpu() -> None:
    rows = list(bench([], "cuda", 6, TINY))
    assert {row.part for row in rows} == set(PARTS)
    assert not any(row.wrong for row in rows)
    assert all(row.rate.least > 0 for row in rows)
    assert not any("ml_dtypes" in row.times for row in rows)  # of the CPU alone
