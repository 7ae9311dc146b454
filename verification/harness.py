"""Put a quantiser, ours or anyone's, to the proof, and say exactly how much that proves."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from formats import ElementFormat, Overflow, Rounding, element_format, float_format
from formats.rounding import DETERMINISTIC, check_overflow
from verification import oracle
from verification.points import CARRIERS, INTEGERS, decision_inputs

MAX_LISTED = 100
PROVES = {
    "conditional": (
        "right at every decision point and at its neighbours in the input's dtype; "
        "a proof for all inputs only if the quantiser is monotone, which no list of points shows"
    ),
}


@dataclass(frozen=True)
class Failure:
    """One input that came out wrong. Floats hold FP32, BF16 and FP16 numbers exactly."""

    input: float
    input_bits: int
    got: float
    expected: float

    def __str__(self) -> str:
        where = f"{self.input!r} ({self.input.hex()}, bits {self.input_bits:#x})"
        return f"{where}: got {self.got!r}, expected {self.expected!r}"


@dataclass(frozen=True)
class Report:
    """What was checked and what failed; `failures` lists the smallest inputs first, at most 100 of `failure_count`."""

    format: str
    rounding: str
    overflow: str
    input_dtype: str
    level: str
    proves: str
    checked: int
    failure_count: int
    failures: tuple[Failure, ...]

    @property
    def passed(self) -> bool:
        """Whether every input came out right."""
        return self.failure_count == 0

    def raise_for_failures(self) -> None:
        """VerificationError, with the first failures, unless it passed."""
        if not self.passed:
            raise VerificationError(str(self))

    def __str__(self) -> str:
        what = f"{self.format} {self.rounding} {self.overflow} from {self.input_dtype}"
        if self.passed:
            return f"{what}: {self.checked} inputs right ({self.level}: {self.proves})"
        heading = f"{what}: {self.failure_count} of {self.checked} inputs wrong, the smallest first"
        return "\n  ".join([heading, *map(str, self.failures[:10])])


class VerificationError(AssertionError):
    """A quantiser is not what it says it is."""


def verify(
    quantizer: Callable[[Tensor], Tensor],
    format: ElementFormat | str,  # noqa: A002 RUF100
    rounding: str = Rounding.NEAREST_EVEN,
    overflow: str = Overflow.SATURATE,
    input_dtype: torch.dtype = torch.float32,
    level: str = "conditional",
) -> Report:
    """Hold a quantiser, a function from a tensor to one of its shape and dtype, against the definition, bit for bit.

    It is called once, on a 1-D CPU tensor, and may put it elsewhere. Zeros must have the right sign; any NaN will do
    for NaN. ValueError for a level, rounding, overflow, or dtype that there is no proof for yet, or a dtype that does
    not hold the format; TypeError if the quantiser changes dtype or shape.
    """
    f = element_format(format) if isinstance(format, str) else format
    _check_question(f, rounding, overflow, input_dtype, level)
    x = decision_inputs(f, input_dtype)
    got = quantizer(x.clone()).detach().cpu()
    if got.dtype != x.dtype or got.shape != x.shape:
        made, given = f"{got.dtype} {tuple(got.shape)}", f"{x.dtype} {tuple(x.shape)}"
        raise TypeError(f"the quantiser made {made} of {given}; it must keep dtype and shape")
    wrong = find_wrong(f, rounding, x, got, overflow)
    return Report(
        format=f.name,
        rounding=str(rounding),
        overflow=str(overflow),
        input_dtype=str(input_dtype).removeprefix("torch."),
        level=level,
        proves=PROVES[level],
        checked=len(x),
        failure_count=len(wrong),
        failures=_failures(f, rounding, overflow, x, got, wrong),
    )


def find_wrong(
    f: ElementFormat, rounding: str, x: Tensor, got: Tensor, overflow: str = Overflow.SATURATE
) -> npt.NDArray[np.intp]:
    """Indices where `got` is not what the oracle says x rounds to; two 1-D CPU tensors of one dtype."""
    right = torch.from_numpy(oracle.expected(f, rounding, x.double().numpy(), overflow)).to(x.dtype)
    same = got.view(INTEGERS[x.dtype]) == right.view(INTEGERS[x.dtype])
    return np.flatnonzero(~(same | (got.isnan() & right.isnan())).numpy())


def _failures(
    f: ElementFormat, rounding: str, overflow: str, x: Tensor, got: Tensor, wrong: npt.NDArray[np.intp]
) -> tuple[Failure, ...]:
    values, results = x.double().numpy()[wrong], got.double().numpy()[wrong]
    right = oracle.expected(f, rounding, values, overflow)
    width = x.dtype.itemsize * 8
    bits = x.view(INTEGERS[x.dtype]).numpy()[wrong].astype(np.int64) & ((1 << width) - 1)
    order = np.argsort(np.abs(values), kind="stable")[:MAX_LISTED]
    return tuple(Failure(float(values[i]), int(bits[i]), float(results[i]), float(right[i])) for i in order)


def _check_question(f: ElementFormat, rounding: str, overflow: str, dtype: torch.dtype, level: str) -> None:
    if level not in PROVES:
        raise ValueError(f"level must be one of {', '.join(PROVES)}, got {level!r}")
    if rounding not in DETERMINISTIC:
        raise ValueError(f"rounding must be one of {', '.join(DETERMINISTIC)}, got {rounding!r}")
    if overflow not in list(Overflow):
        raise ValueError(f"overflow must be one of {', '.join(Overflow)}, got {overflow!r}")
    check_overflow(f.name, f.has_inf, f.has_nan, Overflow(overflow))
    if dtype not in CARRIERS:
        names = ", ".join(str(carrier).removeprefix("torch.") for carrier in CARRIERS)
        raise ValueError(f"input_dtype must be one of {names}, got {str(dtype).removeprefix('torch.')}")
    if not float_format(CARRIERS[dtype]).holds(f):
        raise ValueError(f"{f.name} does not fit {str(dtype).removeprefix('torch.')}, so no tensor of it can be right")
    if f.bits > oracle.MAX_BITS:
        raise ValueError(f"{f.name}: this level lists every value, so at most {oracle.MAX_BITS} bits, got {f.bits}")
