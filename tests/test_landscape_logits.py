"""Logit sharpness against things that don't know the closed form: all corners of the box, an optimiser, the slope, 50
digits.

The closed form's claim is that one known corner is the maximum. The witnesses here evaluate the cross entropy alone:
NumPy at every corner, scipy's L-BFGS-B from inside, mpmath at 80 digits for the arithmetic.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from typing import Any

import mpmath
import numpy as np
import numpy.typing as npt
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import minimize
from torch import Tensor

from landscape import SHARPNESS, half_width, logit_sharpness, small_box_sharpness

Floats = npt.NDArray[np.float64]
U32 = 2.0**-24  # unit roundoff of FP32


def draw(shape: tuple[int, ...], scale: float = 3.0, seed: int = 0) -> tuple[Tensor, Tensor]:
    """FP64 logits and targets."""
    generator = torch.Generator().manual_seed(seed)
    logits = scale * torch.randn(shape, generator=generator, dtype=torch.float64)
    return logits, torch.randint(shape[-1], shape[:-1], generator=generator)


def cross_entropy(z: Floats, t: int) -> Any:
    return np.logaddexp.reduce(z, axis=-1) - z[..., t]


def exact(z: Tensor, t: int, eps: float, centred: bool = False) -> tuple[Any, float, float]:
    """phi at 80 digits, by subtracting the losses; and the m and largest c of the error bound."""
    with mpmath.workdps(80):
        row = [mpmath.mpf(float(v)) for v in z]
        mean = mpmath.fsum(row) / len(row) if centred else mpmath.mpf(0)
        box = [mpmath.mpf(eps) * (abs(v - mean) + 1) for v in row]
        worst = [v - b if i == t else v + b for i, (v, b) in enumerate(zip(row, box, strict=True))]

        def loss(r: list[Any]) -> Any:
            # Relative to the target, so that a loss of 1e-30 keeps its digits.
            return mpmath.log1p(mpmath.fsum(mpmath.exp(v - r[t]) for i, v in enumerate(r) if i != t))

        m = mpmath.log(mpmath.expm1(loss(row))) if loss(row) < 50 else loss(row)
        phi = 100 * (loss(worst) - loss(row)) / (1 + loss(row))
        return phi, float(m), float(max(b + box[t] for b in box))


def bound(m: float, c: float) -> float:
    """Relative error of the FP32 result.

    In units of U32: c is four roundings, and the sum's sensitivity to it is at most 1 + c; m is a rounded difference
    and a rounded logarithm, and sigmoid(m) passes an error of |m| u on; logits 12 + c below the largest still count,
    each with a rounded difference; two sums, four exponentials or logarithms of up to two units each, the two
    softplus and the last division make up the rest.
    """
    return (40 + 2 * abs(m) + 6 * c) * U32  # 1e-5 at |m| = 60


# --- the maximum


@pytest.mark.parametrize("centred", [False, True])
@pytest.mark.parametrize("v", range(2, 9))
def test_no_corner_of_the_box_is_worse_than_the_closed_form(v: int, centred: bool) -> None:
    logits, targets = draw((20, v), seed=v)
    for eps in (5e-4, 0.1, 1.0):
        phi = logit_sharpness(logits, targets, eps, centred=centred)
        for z, t, got in zip(logits.numpy(), targets.tolist(), phi.tolist(), strict=True):
            box = eps * (abs(z - z.mean() * centred) + 1)
            corners = z + box * np.array(list(itertools.product([-1, 1], repeat=v)))
            f = cross_entropy(z, t)
            expected = 100 * (cross_entropy(corners, t).max() - f) / (1 + f)
            # The enumeration subtracts losses of up to 40, each right to 1e-15 of that, and scales by 100.
            assert got == pytest.approx(expected, abs=2e-11, rel=0)


def test_ten_steps_of_an_optimiser_never_exceed_it_and_fall_short_where_the_token_is_sure() -> None:
    logits, targets = draw((30, 50), scale=4.0)
    logits[0, targets[0]] = logits[0].max() + 30  # 1 - p_t < 1e-5: the slope is below the optimiser's tolerance
    phi = logit_sharpness(logits, targets, 5e-4)
    shares = []
    for z, t, most in zip(logits.numpy(), targets.tolist(), phi.tolist(), strict=True):
        box = 5e-4 * (abs(z) + 1)

        def descend(y: Floats, t: int = t) -> tuple[float, Floats]:
            p = np.exp(y - np.logaddexp.reduce(y))
            p[t] -= 1
            return -cross_entropy(y, t), -p

        found = minimize(
            descend, z, jac=True, method="L-BFGS-B", bounds=np.stack([z - box, z + box], 1), options={"maxiter": 10}
        )
        f = cross_entropy(z, t)
        reached = 100 * (-found.fun - f) / (1 + f)
        assert reached <= most + 2e-12  # two losses of up to 40 subtracted, in percent
        shares.append(reached / most)
    assert shares[0] == 0
    assert max(shares) > 0.5  # and the optimiser does climb this very function


@pytest.mark.parametrize("centred", [False, True])
def test_towards_epsilon_zero_it_is_the_weighted_slope(centred: bool) -> None:
    logits, targets = draw((40, 30), seed=3)
    eps = 1e-7
    z = logits.numpy()
    p = np.exp(z - np.logaddexp.reduce(z, axis=1, keepdims=True))
    f = -np.log(p[np.arange(40), targets])
    p[np.arange(40), targets] -= 1
    weight = abs(z - centred * z.mean(1, keepdims=True)) + 1
    slope = 100 * eps * abs(weight * p).sum(1) / (1 + f)
    phi = logit_sharpness(logits, targets, eps, centred=centred).numpy()
    # The next term is of relative size c = 2 eps (max |z| + 1), at most 2e-7 * 15.
    np.testing.assert_allclose(phi, slope, rtol=4e-6)


# --- shifts


def test_a_shift_of_all_logits_changes_the_plain_sharpness_and_not_the_centred() -> None:
    logits, targets = draw((10, 64))
    shifted = logits + 20
    plain = logit_sharpness(shifted, targets) / logit_sharpness(logits, targets)
    assert (plain > 2).all()  # boxes of 1 + |z|, around 3.4, have become boxes of around 21
    centred = logit_sharpness(shifted, targets, centred=True) / logit_sharpness(logits, targets, centred=True)
    # Logits around 20 are rounded to 3.6e-15, and a relative change of phi is at most a few times that.
    torch.testing.assert_close(centred, torch.ones_like(centred), rtol=0, atol=1e-13)


def test_centred_is_plain_at_the_centred_logits() -> None:
    logits, targets = draw((10, 64), seed=5)
    at_centre = logit_sharpness(logits - logits.mean(-1, keepdim=True), targets)
    torch.testing.assert_close(logit_sharpness(logits, targets, centred=True), at_centre, rtol=1e-13, atol=0)


# --- the arithmetic


def sure(z: Tensor, t: int, margin: float) -> Tensor:
    """The target's logit above the others' logsumexp by a margin: m = -margin."""
    others = z.clone()
    others[t] = -torch.inf
    z[t] = torch.logsumexp(others, 0) + margin
    return z


CASES: dict[str, Callable[[Tensor], Tensor]] = {
    "ordinary": lambda z: z,
    "sure: 1 - p = 1e-6": lambda z: sure(z, 3, 14.0),
    "surer: 1 - p = 1e-22": lambda z: sure(z, 3, 50.0),
    "wrong by 40": lambda z: sure(z, 3, -40.0),
    "all equal": torch.zeros_like,
    "logits of 1e4": lambda z: 1e4 + z,
    "logits of -1e4": lambda z: -1e4 + z,
    "spread of 1e3": lambda z: 1e3 * z,
    "tiny": lambda z: 1e-20 * z,
    "one far below": lambda z: torch.cat([z[:-1], torch.full((1,), -3e4)]),
}


@pytest.mark.parametrize("centred", [False, True])
@pytest.mark.parametrize("eps", [1e-12, 1e-6, 5e-4, 1e-3, 0.3])
@pytest.mark.parametrize("name", CASES)
def test_fp32_keeps_its_digits(name: str, eps: float, centred: bool) -> None:
    z = CASES[name](draw((40,), scale=2.0)[0].float())
    expected, m, c = exact(z, 3, eps, centred)
    got = logit_sharpness(z, torch.tensor(3), eps, centred=centred)
    assert got.dtype == torch.float32
    if expected < 1e-36:  # below FP32's smallest normal number; 100 and a few factors away from it
        assert 0 <= float(got) < 1e-36
    else:
        # The mean of n logits carries a few roundings of its own size, and with it the box.
        extra = 8 * U32 * float(z.abs().max()) / (1 + float((z - z.mean()).abs().min())) if centred else 0
        assert abs(float(got) / float(expected) - 1) <= bound(m, c) + extra


@pytest.mark.parametrize("eps", [1e-12, 1e-6, 5e-4])
def test_ordinary_tokens_err_by_a_few_ulp_however_small_epsilon_is(eps: float) -> None:
    # |m| < 8 and c < 0.02 here; errors of separate roundings add like a random walk, well below `bound`'s worst case.
    # Taking the rise through a logarithm, which huge epsilons need, would cost |log eps| = 28 units at the smallest.
    logits, targets = draw((40, 40), scale=1.5, seed=2)
    logits = logits.float()
    for z, t, got in zip(logits, targets.tolist(), logit_sharpness(logits, targets, eps).tolist(), strict=True):
        assert abs(got / float(exact(z, t, eps)[0]) - 1) < 10 * U32


def test_the_rise_does_not_cancel_where_two_losses_subtracted_do() -> None:
    z, t, eps = draw((40,), scale=2.0)[0].float(), torch.tensor(3), 1e-6
    expected = float(exact(z, 3, eps)[0])
    box = half_width(z, eps)
    worst = torch.where(torch.arange(40) == t, z - box, z + box)
    f, f_worst = (torch.nn.functional.cross_entropy(x, t) for x in (z, worst))
    assert abs(float(100 * (f_worst - f) / (1 + f)) / expected - 1) > 0.005
    assert abs(float(logit_sharpness(z, t, eps)) / expected - 1) < 3e-6


@pytest.mark.parametrize(("dtype", "unit"), [(torch.float32, U32), (torch.float64, 2.0**-53)])
@pytest.mark.parametrize(("low", "high"), [(0.24, 0.25), (0.2501, 0.5)])
def test_nothing_is_left_out_where_the_series_ends_and_the_sums_begin(
    dtype: torch.dtype, unit: float, low: float, high: float
) -> None:
    """Two equal logits of 0: widths of 1 and 1, so c = 2 epsilon, S = expm1(c) / 2, and small boxes end at epsilon 1/4.

    Roundings go either way and average out, but for that of 1 + log 2, which all share; a term less, 2 units in FP32 and
    more in FP64, would not.
    """
    epsilons = np.linspace(low, high, 200).tolist()
    got = logit_sharpness(torch.zeros(2, dtype=dtype), torch.tensor(0), epsilons).tolist()
    with mpmath.workdps(40):
        errors = [
            float(g * (1 + mpmath.log(2)) / (100 * mpmath.log1p(mpmath.expm1(2 * mpmath.mpf(eps)) / 2)) - 1) / unit
            for g, eps in zip(got, epsilons, strict=True)
        ]
    assert abs(np.mean(errors)) < 1.5
    assert max(map(abs, errors)) < 6


def test_boxes_are_small_up_to_a_half() -> None:
    """Two logits and their widths: 1 + 1, 2 + 1, and one without end, which is NaN by either way."""
    logits, targets = torch.tensor([[0.0, 0.0], [1.0, 0.0], [math.inf, 0.0]]), torch.zeros(3, dtype=torch.int64)
    percent, small = small_box_sharpness(logits, targets, (0.125, 0.25, 0.26))
    assert small.tolist() == [[True, True, False], [True, False, False], [True, True, True]]
    assert percent[2].isnan().all()
    assert torch.equal(percent[small][:3], logit_sharpness(logits, targets, (0.125, 0.25, 0.26))[small][:3])


@settings(max_examples=150)
@given(
    st.lists(st.floats(-60, 60, width=32), min_size=2, max_size=12),
    st.integers(0, 11),
    st.sampled_from([1e-6, 1e-4, 5e-4, 1e-2, 1.0, 30.0]),
)
def test_fp32_and_fp64_keep_their_digits_anywhere(z: list[float], target: int, eps: float) -> None:
    t = target % len(z)
    logits = torch.tensor(z, dtype=torch.float32)
    expected, m, c = exact(logits, t, eps)
    for dtype, unit in ((torch.float32, 1.0), (torch.float64, 2.0**-29)):  # FP64's roundoff in FP32's
        got = float(logit_sharpness(logits.to(dtype), torch.tensor(t), eps))
        if expected > 1e-34:
            assert abs(got / float(expected) - 1) <= unit * bound(m, c)


@pytest.mark.parametrize(
    ("scale", "eps"), [(1e30, 5e-4), (1.0, 1e6), (1e4, 1e3), (1e18, 1e18), (1e-30, 50.0), (1e37, 1e-3)]
)
def test_huge_logits_and_epsilons_do_not_overflow(scale: float, eps: float) -> None:
    logits, targets = draw((6, 40), seed=8)
    logits = (logits * scale).float()
    for z, t, got in zip(logits, targets.tolist(), logit_sharpness(logits, targets, eps).tolist(), strict=True):
        expected = exact(z, t, eps)[0]
        # With c or m huge the rise is close to their sum, each rounded a few times, and no longer an exponential of
        # them.
        assert got == pytest.approx(float(expected), rel=40 * U32, abs=1e-36)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("at_target", [False, True])
def test_a_non_finite_logit_spoils_its_own_token_only(bad: float, at_target: bool) -> None:
    logits, targets = draw((3, 8))
    clean = logit_sharpness(logits, targets, [5e-4, 1e-3])
    logits[1, targets[1] if at_target else (targets[1] + 1) % 8] = bad
    phi = logit_sharpness(logits, targets, [5e-4, 1e-3])
    assert phi[1].isnan().all()
    assert torch.equal(phi[[0, 2]], clean[[0, 2]])


# --- the interface


def test_a_list_of_epsilons_is_single_calls_side_by_side() -> None:
    logits, targets = draw((2, 3, 16))
    epsilons = (1e-6, 5e-4, 1e-3)
    for centred in (False, True):
        together = logit_sharpness(logits, targets, epsilons, centred=centred)
        assert together.shape == (2, 3, 3)
        for e, eps in enumerate(epsilons):
            assert torch.equal(together[..., e], logit_sharpness(logits, targets, eps, centred=centred))
    assert logit_sharpness(logits, targets, [5e-4]).shape == (2, 3, 1)


@pytest.mark.parametrize("lead", [(), (1,), (5,), (2, 3), (2, 1, 4), (0,)])
def test_any_leading_axes(lead: tuple[int, ...]) -> None:
    logits, targets = draw((*lead, 9))
    phi = logit_sharpness(logits, targets)
    assert phi.shape == lead
    rows = [logit_sharpness(z, t) for z, t in zip(logits.reshape(-1, 9), targets.reshape(-1), strict=True)]
    assert torch.equal(phi.reshape(-1), torch.stack(rows) if rows else phi.reshape(-1))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("centred", [False, True])
def test_narrow_logits_are_widened_first(dtype: torch.dtype, centred: bool) -> None:
    logits, targets = draw((7, 33))
    narrow = logits.to(dtype)
    phi = logit_sharpness(narrow, targets, centred=centred)
    assert phi.dtype == torch.float32
    assert torch.equal(phi, logit_sharpness(narrow.float(), targets, centred=centred))


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.uint8])
def test_targets_of_any_integer_dtype(dtype: torch.dtype) -> None:
    logits, targets = draw((7, 33))
    assert torch.equal(logit_sharpness(logits, targets.to(dtype)), logit_sharpness(logits, targets))


def test_it_compiles_as_one_graph() -> None:
    # aot_eager traces and decomposes as the full compiler does and needs no C++ compiler; a break in the graph is an
    # error.
    logits, targets = draw((4, 33))
    compiled = torch.compile(logit_sharpness, backend="aot_eager", fullgraph=True)
    with torch.no_grad():
        got = compiled(logits.float(), targets, [5e-4, 1e-3], centred=True)
    torch.testing.assert_close(
        got, logit_sharpness(logits.float(), targets, [5e-4, 1e-3], centred=True), rtol=1e-6, atol=0
    )


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_a_gpu_agrees_compiled_and_not() -> None:
    logits, targets = draw((4, 64, 257))
    expected = logit_sharpness(logits, targets, [5e-4, 1e-3])
    for call in (logit_sharpness, torch.compile(logit_sharpness)):
        got = call(logits.float().cuda(), targets.cuda(), [5e-4, 1e-3]).cpu().double()
        # Logits of a few units rounded to FP32, then the bound at |m| and c of these draws.
        torch.testing.assert_close(got, expected, rtol=2 * bound(20, 0.1), atol=0)


LOGITS, TARGETS = torch.zeros(2, 3), torch.zeros(2, dtype=torch.int64)


@pytest.mark.parametrize(
    ("logits", "targets", "epsilon", "message"),
    [
        (torch.zeros(2, 1), TARGETS, 5e-4, r"V >= 2, got shape \(2, 1\)"),
        (torch.zeros(()), torch.zeros((), dtype=torch.int64), 5e-4, r"V >= 2, got shape \(\)"),
        (torch.zeros(2, 3, dtype=torch.int32), TARGETS, 5e-4, r"floating dtype, got torch.int32; convert"),
        (LOGITS, TARGETS[:1], 5e-4, r"shape of logits without V, \(2,\), got \(1,\)"),
        (LOGITS, TARGETS.float(), 5e-4, r"integer dtype, got torch.float32; use .long\(\)"),
        (LOGITS, TARGETS.bool(), 5e-4, r"integer dtype, got torch.bool"),
        (LOGITS, TARGETS, 0.0, r"epsilon must be positive and finite, got 0.0; Keskar's are"),
        (LOGITS, TARGETS, [5e-4, -1.0], r"positive and finite, got -1.0"),
        (LOGITS, TARGETS, float("nan"), r"positive and finite, got nan"),
        (LOGITS, TARGETS, [], r"at least one, got none"),
    ],
)
def test_what_does_not_fit_is_refused(logits: Tensor, targets: Tensor, epsilon: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        logit_sharpness(logits, targets, epsilon)


def test_half_width_by_hand() -> None:
    torch.testing.assert_close(half_width(torch.tensor([-3.0, 0.0, 1.0]), 0.5), torch.tensor([2.0, 0.5, 1.0]))


def test_the_schema_names_percent_and_where_it_comes_from() -> None:
    for name in ("logit_sharpness", "logit_sharpness_centred"):
        assert SHARPNESS[name].units == "percent"
        assert SHARPNESS[name].dims == ("run", "probe_step", "epsilon")
        assert "Keskar" in SHARPNESS[name].source
        assert set(SHARPNESS[name].dims) <= {"run"} | SHARPNESS.keys()
    assert all(row.long_name and row.source for row in SHARPNESS.values())
