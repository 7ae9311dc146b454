"""What an implementation does where standards leave a choice, found out by asking: no convention is called a bug.

Each convention has a name, and a few inputs that tell it from the others. An answer that fits none is "other", or "mixed"
where inputs that should be treated alike are not.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from formats import ElementFormat, FloatFormat, Overflow
from formats.rounding import DETERMINISTIC
from verification import oracle
from verification.points import INTEGERS, from_codes
from verification.question import smallest_normal

Quantizer = Callable[[Tensor], Tensor]
REPEATS = 24
Asker = Callable[[list[float]], npt.NDArray[np.float64]]


class Conventions(NamedTuple):
    """By name.

    overflow: of finite values, one of formats.Overflow or "other". infinity: "largest", "infinity", "nan" or "other". nan:
    "nan", or what it becomes: "zero", "largest", "other". zero: "signed"; "unsigned" where -0 becomes +0; "signed_anyway"
    where signs of zeros stay in a tensor, though the format has no -0; in a format without zero "smallest" or "nan".
    subnormals: "kept"; "flushed", where subnormal results become zero; "flushed_early", where inputs below the smallest
    normal number do; "none" where the format has none. rounding: one of formats.Rounding; "nearest_even_code" where e8m0fnu's
    ties go to even codes; "stochastic" where results vary; "none" where no input lies between two values; or "other".
    """

    rounding: str
    overflow: str
    infinity: str
    nan: str
    zero: str
    subnormals: str


def find_conventions(
    quantizer: Quantizer, f: ElementFormat, dtype: torch.dtype, claimed: str = "nearest_even"
) -> Conventions:
    """Ask the quantiser; a thousand inputs or so. Of roundings that the answers can't tell apart, the claimed one."""

    def ask(values: list[float]) -> npt.NDArray[np.float64]:
        exact = torch.tensor(values, dtype=torch.float64)
        x = exact.to(dtype)
        x = torch.where(x.double() == exact, x, torch.nan)  # only what the dtype holds
        return np.where(x.isnan().numpy(), np.nan, quantizer(x).double().numpy())

    rounding = _rounding(quantizer, f, dtype, claimed)
    beyond = _beyond(ask, f, dtype)
    return Conventions(
        rounding, _overflow(f, rounding, beyond), _word(beyond[False, True], f), _nan(quantizer, f, dtype),
        _zero(quantizer, f, dtype), _subnormals(quantizer, ask, f, dtype),
    )  # fmt: skip


def _rounding(quantizer: Quantizer, f: ElementFormat, dtype: torch.dtype, claimed: str) -> str:
    """The one mode that all answers fit, among values well inside the range: neighbours of steps, and points between."""
    listed = oracle.table(f)
    values = oracle.finite_values(f)
    inside = values[(np.abs(values) >= _normal(f)) & (values != values[0]) & (values != values[-1])]
    some = inside[np.linspace(0, len(inside) - 1, min(len(inside), 24)).astype(int)] if len(inside) else values
    points = []
    for value in some.tolist():
        place = int(np.searchsorted(listed.entries, value))
        if place + 1 < len(listed.entries) and np.isfinite(listed.entries[place + 1]):
            gap = listed.entries[place + 1] - value
            points += [value + gap * share for share in (0.25, 0.5, 0.75)]
    given = torch.tensor(points, dtype=torch.float64).to(dtype)  # the nearest that the dtype holds
    x = given.double().numpy()
    repeated = quantizer(given.repeat(REPEATS)).double().numpy().reshape(REPEATS, -1)
    if ((repeated != repeated[0]) & ~np.isnan(repeated)).any():
        return "stochastic"
    got = repeated[0]
    known = ~np.isnan(got) & ~np.isin(x, values)
    if not known.any():
        return "none"
    modes = [str(mode) for mode in DETERMINISTIC]
    if isinstance(f, FloatFormat) and not f.zero:
        modes.append("nearest_even_code")
    fitting = [mode for mode in modes if np.array_equal(oracle.expected(f, mode, x[known]), got[known])]
    return claimed if claimed in fitting else fitting[0] if fitting else "other"


def _normal(f: ElementFormat) -> float:
    return f.smallest_normal if isinstance(f, FloatFormat) else 0.0


def _beyond(ask: Asker, f: ElementFormat, dtype: torch.dtype) -> dict[tuple[bool, bool], float]:
    """What comes of values far beyond each end, where the dtype has such, and of infinities: by (below, infinite)."""
    found = {}
    for below in (False, True):
        sign = -1.0 if below else 1.0
        most = torch.finfo(dtype).max
        far = [sign * x for x in (4.0 * f.max, 64.0 * f.max) if x <= most]
        if not far and most > oracle.table(f).middles[-1]:
            far = [sign * most]
        found[below, True] = float(ask([sign * float("inf")])[0])
        answers = ask(far) if far else np.array([found[below, True]])
        alike = all(_same(float(answer), float(answers[0])) for answer in answers)
        if far:
            found[below, False] = float(answers[0]) if alike else 0.0
    return found


def _overflow(f: ElementFormat, rounding: str, found: dict[tuple[bool, bool], float]) -> str:
    """The first overflow mode, in the order of formats.Overflow, that gives all these answers."""
    mode = rounding if rounding in DETERMINISTIC else "nearest_even"
    for over in Overflow:
        if over is Overflow.NONSATURATING and not (f.has_inf or f.has_nan):
            continue
        gives = {(b, i): oracle.beyond(f, mode, str(over), below=b, infinite=i) for b, i in found}
        if all(_same(gives[where], answer) for where, answer in found.items()):
            return str(over)
    return "other"


def _same(a: float, b: float) -> bool:
    return a == b or (np.isnan(a) and np.isnan(b))


def _word(value: float, f: ElementFormat) -> str:
    return "nan" if np.isnan(value) else "infinity" if np.isinf(value) else "largest" if value == f.max else "other"


def _nan(quantizer: Quantizer, f: ElementFormat, dtype: torch.dtype) -> str:
    got = quantizer(torch.tensor([torch.nan, -torch.nan, 1.0], dtype=dtype)).double().numpy()[:2]
    if np.isnan(got).all():
        return "nan"
    if np.isnan(got).any():
        return "mixed"
    return "zero" if (got == 0).all() else "largest" if (np.abs(got) == f.max).all() else "other"


def _zero(quantizer: Quantizer, f: ElementFormat, dtype: torch.dtype) -> str:
    if isinstance(f, FloatFormat) and not f.zero:
        got = quantizer(torch.tensor([-0.0, 0.0], dtype=dtype)).double().numpy()
        return "nan" if np.isnan(got).all() else "smallest" if (got == f.min).all() else "other"
    tiny = torch.finfo(dtype).tiny
    got = quantizer(torch.tensor([-0.0, 0.0, -tiny, tiny], dtype=dtype)).double().numpy()
    if not (got[:2] == 0).all():
        return "other"
    zeros = np.flatnonzero(got == 0)
    negative = np.signbit(got[zeros])
    if not negative.any():
        return "unsigned"
    if not np.array_equal(negative, zeros % 2 == 0):
        return "other"
    return "signed" if f.has_negative_zero else "signed_anyway"


def _subnormals(quantizer: Quantizer, ask: Asker, f: ElementFormat, dtype: torch.dtype) -> str:
    normal = smallest_normal(f)
    if not normal:
        return "none"
    below = oracle.values(f)
    below = below[(below > 0) & (below < normal)]
    some = below[np.linspace(0, len(below) - 1, min(len(below), 16)).astype(int)]
    got = ask(some.tolist())
    known = ~np.isnan(got)
    if not known.any() or np.array_equal(got[known], some[known]):
        return "kept"
    if not (got[known] == 0).all():
        return "other"
    just_below = from_codes(_code_of(normal, dtype) - 1, dtype)
    return "flushed_early" if float(quantizer(just_below)[0]) == 0 else "flushed"


def _code_of(value: float, dtype: torch.dtype) -> npt.NDArray[np.int64]:
    return torch.tensor([value], dtype=dtype).view(INTEGERS[dtype]).numpy().astype(np.int64)
