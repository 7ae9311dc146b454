"""Every 1009th FP32 input on the CPU, and, in ranges, what the GPU's proof of all inputs counts."""

import numpy as np
import pytest
import torch
from torch import Tensor

from formats import element_format, float_format, quantize
from verification import every_input, on_gpu, staircase
from verification.every_input import INFINITY, NAMES, ROUNDINGS, first_wrong
from verification.question import Question

PRIME = 1009
SIZE = 1 << 18
needs_compiler = pytest.mark.skipif(not every_input.has_compiler(), reason="no C++ compiler to compile with")


@pytest.mark.parametrize("rounding", ROUNDINGS)
@pytest.mark.parametrize("name", [*NAMES, "e4m0f"])
def test_every_1009th_input(name: str, rounding: str) -> None:
    codes = np.arange(0, 1 << 31, PRIME)
    assert not first_wrong(float_format(name), rounding, codes, lambda x: quantize(x, name, rounding))


@pytest.mark.parametrize(
    ("becomes", "pattern"), [(-1.5, 1_000_000 * PRIME), (2.0, INFINITY + 1 + (-INFINITY - 1) % PRIME)]
)
def test_one_wrong_input_is_found(becomes: float, pattern: int) -> None:
    """A number, and a NaN, of one sign only."""

    def broken(x: Tensor) -> Tensor:
        return torch.where(x.view(torch.int32) == pattern, becomes, quantize(x, "e4m3fn"))

    found = first_wrong(float_format("e4m3fn"), "nearest_even", np.arange(0, 1 << 31, PRIME), broken)
    assert f"becomes {becomes.hex()}" in found


PROGRAMS = [
    ("e4m3fn", "nearest_even"), ("binary8p3sf", "nearest_away"), ("binary16p15se", "toward_positive"),
    ("binary9p1se", "to_odd"), ("binary8p3uf", "toward_negative"), ("e8m0fnu", "nearest_even"), ("int8q6", "nearest_even"),
    ("nf4", "toward_zero"),
]  # fmt: skip
MORE_OF_THE_SAME_KINDS = [
    ("bf16", "to_odd"), ("binary8p1se", "nearest_even"), ("binary16p8sf", "nearest_even"), ("binary7p1uf", "to_odd"),
    ("binary16p9uf", "nearest_even"), ("posit8", "to_odd"),
]  # fmt: skip


@needs_compiler
@pytest.mark.parametrize(
    ("name", "rounding"),
    [*PROGRAMS, *(pytest.param(*program, marks=pytest.mark.proof) for program in MORE_OF_THE_SAME_KINDS)],
)
def test_changes_between_neighbours_are_the_oracles_steps(name: str, rounding: str) -> None:
    """Around zero, one and minus one, and at both infinities, by the programs that the GPU runs over everything."""
    torch._dynamo.reset()  # programs of one function count against one limit
    f = element_format(name)
    steps = staircase.step_keys(Question(f, rounding))
    count = on_gpu.counter(f, rounding, "cpu", SIZE)
    one = 0x3F800000
    for start in (-SIZE // 2, one - SIZE // 2, INFINITY - SIZE, -1 - one - SIZE // 2, -1 - INFINITY):
        changes = int(count(torch.tensor(start, dtype=torch.int32), torch.tensor(SIZE, dtype=torch.int32)))
        assert changes == ((steps > start) & (steps <= start + SIZE)).sum()


@pytest.mark.parametrize(
    ("name", "results"),
    [("e4m3fn", 254), ("int8", 256), ("e8m0fnu", 255), ("nf4", 16), ("e5m2fnuz", 255), ("binary8p3uf", 255)],
)
def test_results_step_from_each_to_the_next(name: str, results: int) -> None:
    """As many steps as there are results from -inf to +inf, less one; -0 and +0 are two of them."""
    found = on_gpu.steps_of(element_format(name), ("nearest_even", "to_odd"))
    for steps in found.values():
        assert steps.steps == results - 1
        assert len(steps.keys) == len(steps.patterns) == 2 * steps.steps + 2
        assert len(set(steps.patterns.tolist())) == results


@pytest.mark.proof
@needs_compiler
def test_the_proof_for_a_gpu_works_on_a_cpu_and_fails_where_it_should() -> None:
    f = element_format("e2m1fn")
    steps = on_gpu.steps_of(f, ("nearest_even",))["nearest_even"]
    assert on_gpu.prove(f, "nearest_even", steps, "cpu") == ""
    assert "changes between neighbours" in on_gpu.prove(f, "nearest_even", steps._replace(steps=steps.steps + 1), "cpu")
    assert "inputs beside a step" in on_gpu.prove(f, "toward_zero", steps, "cpu")


def test_changes_are_counted_within_the_count() -> None:
    """The last piece is shorter than the program's size: what lies past its end is another's, or NaN."""
    step = int(staircase.step_keys(Question(element_format("e4m3fn")))[-1])

    def changes(start: int, count: int) -> int:
        first, pairs = (torch.tensor(n, dtype=torch.int32) for n in (start, count))
        return int(on_gpu.changes(lambda x: quantize(x, "e4m3fn"), first, pairs, 256))

    assert changes(step - 1 - 100, 100) == 0
    assert changes(step - 1 - 100, 101) == 1


@pytest.mark.parametrize("name", ["e4m3fn", "e8m0fnu", "binary8p3uf", "int8", "posit8"])
def test_narrow_carriers_agree_with_fp32(name: str) -> None:
    f = element_format(name)
    for dtype in on_gpu.narrow_carriers(f):
        assert on_gpu.agrees(f, "nearest_even", dtype, "cpu")


def test_every_registered_format_has_a_proof() -> None:
    formats = on_gpu.every_format()
    assert len(formats) == len(set(formats)) > 600
    assert {f.bits for f in formats} == set(range(2, 17))
    # A lone format's program is compiled for itself: a few dozen in all, lists included.
    assert len({on_gpu.program_of(f) for f in formats}) < 40
