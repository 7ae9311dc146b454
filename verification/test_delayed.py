"""Delayed scaling against a plain loop over lists, and that no run sees another."""

import math
from fractions import Fraction

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from formats import round_exact
from formats.delayed import AmaxHistory, quantize_delayed
from formats.scaled import scaled_format
from formats.scaled_reference import quantize_group
from formats.scaling import quantize_scaled
from verification.test_conditional import needs_compiler
from verification.test_scaled import bits

AMAXES = st.sampled_from([0.0, 1.0, 448.0, 2.0**127, 2.0**-148, math.inf, math.nan]) | st.floats(0, 2.0**127, width=32)


def by_hand(amaxes: list[float], length: int, rule: str, largest: int, margin: int) -> float:
    """The scale after those amaxes, oldest first, by a loop and rationals."""
    window = [a for a in amaxes[::-1][:length] if 0 < a < math.inf]
    if not window:
        return 1.0
    chosen = max(window) if rule == "max" else window[0]
    ratio = Fraction(chosen) * Fraction(2) ** margin / largest
    return max(float(round_exact(ratio, "fp32")), 2.0**-149)


@pytest.mark.parametrize(("name", "largest"), [("e4m3fn@tensor", 448), ("e5m2@tensor", 57344), ("nvfp4", 2688)])
@settings(max_examples=100)
@given(
    amaxes=st.lists(AMAXES, max_size=9),
    length=st.integers(1, 4),
    rule=st.sampled_from(["max", "most_recent"]),
    margin=st.integers(-3, 3),
)
def test_the_scale_is_what_a_plain_loop_gives(
    name: str, largest: int, amaxes: list[float], length: int, rule: str, margin: int
) -> None:
    history = AmaxHistory.empty(length)
    for amax in amaxes:
        history = history.record(torch.tensor(amax))
    assert history.scale(name, rule, margin).item() == by_hand(amaxes, length, rule, largest, margin)


def test_the_scale_comes_before_the_tensor_is_recorded() -> None:
    first, second = torch.tensor([448.0, 100.0]), torch.tensor([896.0, 3.0])
    history = AmaxHistory.empty(2)
    out, history = quantize_delayed(first, "e4m3fn@tensor", history)
    assert out.tolist() == [448.0, 96.0]  # under a scale of 1, where 100 is a tie
    out, history = quantize_delayed(second, "e4m3fn@tensor", history)
    assert out.tolist() == [448.0, 3.0]  # 896 is more than the history knew of
    out, history = quantize_delayed(second, "e4m3fn@tensor", history)
    assert out.tolist() == [896.0, 3.0]
    assert history.amaxes.tolist() == [896.0, 896.0]


def test_a_runs_scale_never_depends_on_another_run() -> None:
    generator = torch.Generator().manual_seed(0)
    steps = [torch.randn(3, 4, 32, generator=generator) * 2.0**k for k in range(5)]
    for name in ("e4m3fn@tensor", "nvfp4"):
        packed, wild = AmaxHistory.empty(3, runs=3), AmaxHistory.empty(3, runs=3)
        alone = [AmaxHistory.empty(3) for _ in range(3)]
        for x in steps:
            disturbed = x.clone()
            disturbed[1, 0, 0] = float("inf")
            out, packed = quantize_delayed(x, name, packed)
            beside, wild = quantize_delayed(disturbed, name, wild)
            assert torch.equal(beside[[0, 2]], out[[0, 2]])
            for run in range(3):
                single, alone[run] = quantize_delayed(x[run], name, alone[run])
                assert torch.equal(single, out[run])


def test_the_scale_is_used_as_it_is() -> None:
    x = torch.randn(64, generator=torch.Generator().manual_seed(1))
    history = AmaxHistory.empty(1).record(torch.tensor(5.0))
    out, _ = quantize_delayed(x, "e4m3fn@tensor", history, margin=1, rounding="toward_zero")
    scale = history.scale("e4m3fn@tensor", margin=1).item()
    want = quantize_group(x.tolist(), scaled_format("e4m3fn@tensor"), "toward_zero", tensor_scale=scale)
    assert out.tolist() == want.values("fp32")


@needs_compiler
def test_a_compiled_step_carries_its_history() -> None:
    def step(x: torch.Tensor, history: AmaxHistory) -> tuple[torch.Tensor, AmaxHistory]:
        return quantize_delayed(x, "e5m2@tensor", history, margin=1)

    torch._dynamo.reset()
    compiled = torch.compile(step, fullgraph=True)
    eager = fast = AmaxHistory.empty(4, runs=2)
    for k in range(6):
        x = torch.randn(2, 64, generator=torch.Generator().manual_seed(k)) * 3.0**k
        want, eager = step(x, eager)
        got, fast = compiled(x, fast)
        assert torch.equal(bits(got), bits(want))
        assert torch.equal(fast.amaxes, eager.amaxes)


def test_bad_arguments_are_refused() -> None:
    history = AmaxHistory.empty(4)
    with pytest.raises(ValueError, match="length must be at least 1, got 0"):
        AmaxHistory.empty(0)
    with pytest.raises(ValueError, match="mxfp4 has no tensor scale to delay"):
        history.scale("mxfp4")
    with pytest.raises(ValueError, match="rule must be one of max, most_recent, got 'mean'"):
        history.scale("nvfp4", "mean")
    with pytest.raises(ValueError, match=r"margin must be -64\.\.64, got 65"):
        history.scale("nvfp4", margin=65)
    with pytest.raises(ValueError, match=r"x of shape \(3, 4\) must begin with the history's 2 runs"):
        quantize_delayed(torch.ones(3, 4), "nvfp4", AmaxHistory.empty(4, runs=2))


def test_tensor_scale_without_history_is_dynamic() -> None:
    x = torch.randn(64, generator=torch.Generator().manual_seed(2))
    history = AmaxHistory.empty(1).record(x.abs().max())
    delayed, _ = quantize_delayed(x, "e4m3fn@tensor", history)
    assert torch.equal(delayed, quantize_scaled(x, "e4m3fn@tensor"))
