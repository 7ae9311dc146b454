"""Put a quantiser, ours or anyone's, to the proof, law by law, and say exactly how much that proves."""

from __future__ import annotations

import json
import platform
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import xarray as xr
from hypothesis import HealthCheck, Phase, find, settings
from hypothesis import strategies as st
from hypothesis.errors import NoSuchExample
from torch import Tensor

from formats import ElementFormat, Overflow, Rounding, element_format, float_format
from formats.rounding import DETERMINISTIC, check_overflow
from verification import oracle
from verification.calls import Caller
from verification.conventions import Conventions, find_conventions
from verification.laws import (
    LAWS,
    OF_INPUTS,
    Failure,
    Places,
    Verdict,
    asymmetries,
    falls,
    is_odd_function,
    law_of,
    off_grid,
)
from verification.points import CARRIERS, INTEGERS, decision_inputs, from_codes
from verification.staircase import INFINITY, Staircase, inputs_of

MAX_LISTED = 100
PROVES = {
    "quick": "right at some decision points and wherever Hypothesis looked; a search, no proof",
    "conditional": (
        "right at every decision point and at its neighbours in the input's dtype; "
        "a proof for all inputs only if the quantiser is monotone, which no list of points shows"
    ),
    "exhaustive": "right for every input of the dtype; a proof",
}
QUICK_POINTS, QUICK_EXAMPLES = 64, 300
CHUNK = 1 << 22
FOR_LAYOUTS = 2048
FOUND = "found"


@dataclass(frozen=True)
class Report:
    """What was checked and what failed, by law; `failures` lists the smallest inputs first, at most 100 of `failure_count`.

    checked and failure_count are of single inputs; the laws that compare results with each other have counts of their own.
    conventions: what the quantiser does where standards leave a choice. environment: versions and the state of the processor.
    """

    implementation: str
    format: str
    rounding: str
    overflow: str
    input_dtype: str
    level: str
    proves: str
    checked: int
    failure_count: int
    failures: tuple[Failure, ...]
    laws: tuple[Verdict, ...]
    conventions: Conventions
    environment: dict[str, str]

    @property
    def passed(self) -> bool:
        """Whether every law that applies was kept."""
        return not any(verdict.verdict == "fail" for verdict in self.laws)

    def raise_for_failures(self) -> None:
        """VerificationError, with the first failures, unless it passed."""
        if not self.passed:
            raise VerificationError(str(self))

    def law(self, name: str) -> Verdict:
        """The verdict on the law of that name."""
        return next(verdict for verdict in self.laws if verdict.law == name)

    def to_json(self) -> str:
        """A certificate: everything in the report, numbers that JSON lacks as words."""
        return json.dumps(_plain(asdict(self) | {"conventions": self.conventions._asdict()}), indent=1)

    def to_dataset(self) -> xr.Dataset:
        """verdict, checked and failed on the dimension `law`; what was asked, found and where as attributes."""
        return xr.Dataset(
            {
                "verdict": ("law", [v.verdict for v in self.laws]),
                "checked": ("law", [v.checked for v in self.laws], {"long_name": "inputs asked", "units": "1"}),
                "failed": ("law", [v.failed for v in self.laws], {"long_name": "inputs that break the law", "units": "1"}),
                "counterexample": ("law", [str(v.smallest or v.note) for v in self.laws]),
                "sentence": ("law", [LAWS[v.law].sentence for v in self.laws]),
            },
            {"law": [v.law for v in self.laws]},
            {
                **{name: getattr(self, name) for name in (
                    "implementation", "format", "rounding", "overflow", "input_dtype", "level", "proves"
                )},
                **{f"convention_{name}": value for name, value in self.conventions._asdict().items()},
                **self.environment,
            },
        )  # fmt: skip

    def __str__(self) -> str:
        what = f"{self.implementation}: {self.format} {self.rounding} {self.overflow} from {self.input_dtype}"
        if self.passed:
            return f"{what}: {self.checked} inputs right ({self.level}: {self.proves})"
        heading = f"{what}: {self.failure_count} of {self.checked} inputs wrong, the smallest first"
        broken = [f"breaks {verdict}" for verdict in self.laws if verdict.verdict == "fail"]
        return "\n  ".join([heading, *map(str, self.failures[:10]), *broken])


class VerificationError(AssertionError):
    """A quantiser is not what it says it is."""


def verify(
    quantizer: Callable[[Any], Any],
    format: ElementFormat | str,  # noqa: A002 RUF100
    rounding: str = Rounding.NEAREST_EVEN,
    overflow: str = Overflow.SATURATE,
    input_dtype: torch.dtype = torch.float32,
    level: str = "conditional",
    *,
    takes: str = "tensor",
    gives: str = "values",
    seconds: float = 60.0,
    name: str | None = None,
    progress: Callable[[float], None] | None = None,
) -> Report:
    """Hold a quantiser against the definition, bit for bit, law by law (`verification.laws`).

    quantizer: from a 1-D CPU tensor of input_dtype, or with takes="array" a NumPy array, to one of its shape: of values, or
    with gives="codes" of integer codes. It may put it elsewhere meanwhile. rounding and overflow: what it is judged against;
    "found" for what it was found to do. level: "quick", "conditional" or "exhaustive" (see PROVES). seconds: how long one
    call may take. progress: called with the share of an exhaustive proof that is done.

    Any NaN will do for NaN; what NaN becomes in a format without one is a convention, and no law. A quantiser that raises,
    hangs, gives another shape or dtype or writes into its input breaks the law `interface`, and is judged on what it answers.
    ValueError for a level, rounding, overflow or dtype that there is no proof for, or a dtype that does not hold the format.
    """
    f = element_format(format) if isinstance(format, str) else format
    _check_question(f, rounding, overflow, input_dtype, level)
    caller = Caller(quantizer, f, takes, gives, seconds)
    conventions = find_conventions(caller, f, input_dtype)
    judged = _judged_by(f, rounding, overflow, conventions)
    x = decision_inputs(f, input_dtype, QUICK_POINTS if level == "quick" else None)
    if level == "quick":
        found = _searched(caller, f, *judged, input_dtype)
        x = torch.cat([x, found[~torch.isin(found.view(INTEGERS[input_dtype]), x.view(INTEGERS[input_dtype]))]])
    elif level == "exhaustive" and input_dtype in (torch.bfloat16, torch.float16):
        x = from_codes(np.arange(1 << 16), input_dtype)
    got = caller(x)
    answered = np.flatnonzero(~caller.unanswered.numpy())
    x, got = x[answered], got[answered]
    wrong = find_wrong(f, judged[0], x, got, judged[1])
    wrong = wrong[f.has_nan | ~np.isnan(x.double().numpy()[wrong])]
    failures = _failures(f, *judged, x, got, wrong)
    verdicts = _verdicts(caller, f, *judged, x, got, wrong)
    checked, count = len(x), len(wrong)
    if level == "exhaustive" and input_dtype == torch.float32 and len(x):
        checked, swept = _sweep(caller, f, *judged, progress)
        count = sum(failed for failed, _ in swept.values())
        verdicts = [_with_sweep(verdict, swept) for verdict in verdicts]
        failures = tuple(sorted((*failures, *(w for _, w in swept.values() if w)), key=_size))[:MAX_LISTED]
    return Report(
        implementation=name or str(getattr(quantizer, "__name__", type(quantizer).__name__)),
        format=f.name,
        rounding=judged[0],
        overflow=judged[1],
        input_dtype=_name(input_dtype),
        level=level,
        proves=PROVES[level],
        checked=checked,
        failure_count=count,
        failures=failures,
        laws=(_interface(caller, checked), *verdicts),
        conventions=conventions,
        environment=environment(),
    )


def find_wrong(
    f: ElementFormat, rounding: str, x: Tensor, got: Tensor, overflow: str = Overflow.SATURATE
) -> npt.NDArray[np.intp]:
    """Indices where `got` is not what the oracle says x rounds to; two 1-D CPU tensors of one dtype."""
    right = torch.from_numpy(oracle.expected(f, rounding, x.double().numpy(), overflow)).to(x.dtype)
    same = got.view(INTEGERS[x.dtype]) == right.view(INTEGERS[x.dtype])
    return np.flatnonzero(~(same | (got.isnan() & right.isnan())).numpy())


def environment() -> dict[str, str]:
    """Versions, processor, and whether it flushes subnormals: what two certificates must share to be compared."""
    tiny = torch.tensor([2.0**-130])
    return {
        "torch": torch.__version__,
        "numpy": np.__version__,
        "python": platform.python_version(),
        "machine": platform.machine(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "flushes_results": str(bool((tiny * 0.5 == 0).item())),
        "flushes_inputs": str(bool((tiny * 2.0**20 == 0).item())),
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
    }


def _judged_by(f: ElementFormat, rounding: str, overflow: str, found: Conventions) -> tuple[str, str]:
    """The modes to judge by: those asked for, or those found, where they have a name."""
    mode = found.rounding if rounding == FOUND else str(rounding)
    over = found.overflow if overflow == FOUND else str(overflow)
    default = "nonsaturating" if f.has_inf else "saturate"
    return (mode if mode != "other" else "nearest_even"), (over if over != "other" else default)


def _verdicts(
    caller: Caller, f: ElementFormat, rounding: str, overflow: str, x: Tensor, got: Tensor, wrong: Places
) -> list[Verdict]:
    values, results = x.double().numpy(), got.double().numpy()
    right = oracle.expected(f, rounding, values, overflow)
    own = law_of(f, _name(x.dtype), rounding, overflow, values, right)
    verdicts = []
    for place, law in enumerate(OF_INPUTS):
        of_law = np.flatnonzero(own == place)
        broken = wrong[own[wrong] == place]
        if not len(of_law) or (law == "nan" and not f.has_nan):
            verdicts.append(Verdict(law, "not applicable", 0, 0))
        else:
            verdicts.append(_verdict(law, len(of_law), broken, f, rounding, overflow, x, got))

    def compared(law: str, broken: Places, note: str = "") -> Verdict:
        return _verdict(law, len(x), broken, f, rounding, overflow, x, got, note)

    verdicts.append(compared("on_grid", off_grid(f, values, results)))
    verdicts.append(compared("monotone", falls(values, results), "less than the result of the input before it"))
    verdicts.append(_idempotent(caller, f, rounding, overflow, got))
    if is_odd_function(f, rounding):
        verdicts.append(compared("odd_symmetry", asymmetries(values, results), "-x gives something else"))
    else:
        verdicts.append(Verdict("odd_symmetry", "not applicable", 0, 0))
    verdicts.append(_deterministic(caller, f, rounding, overflow, x, got))
    return verdicts


def _verdict(
    law: str, checked: int, broken: Places, f: ElementFormat, rounding: str, overflow: str, x: Tensor, got: Tensor,
    note: str = "",
) -> Verdict:  # fmt: skip
    if not len(broken):
        return Verdict(law, "pass", checked, 0)
    (smallest,) = _failures(f, rounding, overflow, x, got, broken, most=1, law=law, note=note)
    return Verdict(law, "fail", checked, len(broken), smallest)


def _interface(caller: Caller, checked: int) -> Verdict:
    if caller.complaints:
        return Verdict("interface", "fail", checked, max(1, len(caller.raised)), None, "; ".join(caller.complaints))
    return Verdict("interface", "pass", checked, 0)


def _idempotent(caller: Caller, f: ElementFormat, rounding: str, overflow: str, got: Tensor) -> Verdict:
    """Over every finite result that there was."""
    results = torch.unique(got[got.isfinite()])
    if not len(results):
        return Verdict("idempotent", "not applicable", 0, 0)
    again = caller(results)
    keeps = ~caller.unanswered
    broken = np.flatnonzero((keeps & (again != results)).numpy())
    return _verdict("idempotent", int(keeps.sum()), broken, f, rounding, overflow, results, again)


def _deterministic(caller: Caller, f: ElementFormat, rounding: str, overflow: str, x: Tensor, got: Tensor) -> Verdict:
    """The same inputs in another order, in other batches, strided, and one element off."""
    some = torch.from_numpy(np.unique(np.linspace(0, len(x) - 1, min(len(x), FOR_LAYOUTS)).astype(np.int64)))
    chosen, first = x[some], got[some]
    ways: dict[str, Callable[[], Tensor]] = {
        "again": lambda: caller(chosen),
        "in reverse order": lambda: caller(chosen.flip(0)).flip(0),
        "strided": lambda: caller(chosen, "strided"),
        "one element off": lambda: caller(chosen, "offset"),
        "in batches of 33": lambda: torch.cat([caller(piece) for piece in chosen.split(33)]),
    }
    if not len(chosen) or caller.complaints:
        return Verdict("deterministic", "not applicable", 0, 0, None, "the interface is broken" if len(x) else "")
    for way, ask in ways.items():
        other = ask()
        same = (other.view(INTEGERS[x.dtype]) == first.view(INTEGERS[x.dtype])) | (other.isnan() & first.isnan())
        broken = np.flatnonzero((~same & ~other.isnan()).numpy())
        if len(broken):
            return _verdict("deterministic", len(ways) * len(chosen), broken, f, rounding, overflow, chosen, other, way)
    return Verdict("deterministic", "pass", len(ways) * len(chosen), 0)


def _searched(caller: Caller, f: ElementFormat, rounding: str, overflow: str, dtype: torch.dtype) -> Tensor:
    """What Hypothesis found wrong, made as simple as it could; at most one input."""
    points = decision_inputs(f, dtype)
    width = dtype.itemsize * 8
    places = st.integers(0, len(points) - 1).map(lambda i: points[i : i + 1])
    patterns = st.integers(-(2 ** (width - 1)), 2 ** (width - 1) - 1).map(
        lambda bits: torch.tensor([bits], dtype=INTEGERS[dtype]).view(dtype)
    )

    def is_wrong(x: Tensor) -> bool:
        got = caller(x)
        if bool(caller.unanswered.any()) or (not f.has_nan and bool(x.isnan().any())):
            return False
        return len(find_wrong(f, rounding, x, got, overflow)) > 0

    quiet = settings(
        max_examples=QUICK_EXAMPLES, database=None, deadline=None, derandomize=True,
        phases=(Phase.generate, Phase.shrink), suppress_health_check=list(HealthCheck),
    )  # fmt: skip
    try:
        return find(places | patterns, is_wrong, settings=quiet)
    except NoSuchExample:
        return torch.empty(0, dtype=dtype)


def _sweep(
    caller: Caller, f: ElementFormat, rounding: str, overflow: str, progress: Callable[[float], None] | None
) -> tuple[int, dict[str, tuple[int, Failure | None]]]:
    """All 2^32 FP32 inputs: how many were answered, and for each law that one belongs to, how many broke it and the smallest."""
    stairs = Staircase(f, rounding, overflow)
    answered = 0
    found: dict[str, tuple[int, Failure | None]] = dict.fromkeys(OF_INPUTS, (0, None))
    for x, right in _all_inputs(stairs, f, progress):
        got = caller(x)
        there = ~caller.unanswered
        same = (got.view(torch.int32) == right) | (got.isnan() & right.view(torch.float32).isnan())
        answered += int(there.sum())
        wrong = np.flatnonzero((there & ~same).numpy())
        if not len(wrong):
            continue
        values = x.double().numpy()[wrong]
        own = law_of(f, "float32", rounding, overflow, values, oracle.expected(f, rounding, values, overflow))
        for place, law in enumerate(OF_INPUTS):
            broken = wrong[own == place]
            if len(broken):
                (smallest,) = _failures(f, rounding, overflow, x, got, broken, most=1, law=law)
                count, before = found[law]
                found[law] = (count + len(broken), min(filter(None, (before, smallest)), key=_size))
    return answered, found


def _all_inputs(
    stairs: Staircase, f: ElementFormat, progress: Callable[[float], None] | None
) -> Iterator[tuple[Tensor, Tensor]]:
    """Inputs and the patterns of their results: the numbers in ascending order, then, where NaN is a law, all NaN."""
    for start in range(-1 - INFINITY, INFINITY + 1, CHUNK):
        keys = np.arange(start, min(start + CHUNK, INFINITY + 1))
        yield inputs_of(torch.from_numpy(keys.astype(np.int32))), torch.from_numpy(stairs.patterns(keys))
        if progress:
            progress((keys[-1] + 1 + INFINITY) / (2 * INFINITY + 1))
    if f.has_nan:
        nan = torch.arange(INFINITY + 1, 1 << 31).to(torch.int32)
        for patterns in (nan, nan | -(1 << 31)):
            for piece in patterns.split(CHUNK):
                yield piece.view(torch.float32), torch.full_like(piece, 0x7FC00000)


def _with_sweep(verdict: Verdict, swept: dict[str, tuple[int, Failure | None]]) -> Verdict:
    """A law's verdict with what the sweep over all inputs added to it."""
    if verdict.law not in swept or verdict.verdict == "not applicable" or not swept[verdict.law][0]:
        return verdict
    failed, smallest = swept[verdict.law]
    return Verdict(verdict.law, "fail", verdict.checked, failed, smallest)


def _size(failure: Failure) -> float:
    return abs(failure.input) if not np.isnan(failure.input) else float("inf")


def _failures(
    f: ElementFormat, rounding: str, overflow: str, x: Tensor, got: Tensor, wrong: Places,
    most: int = MAX_LISTED, law: str | None = None, note: str = "",
) -> tuple[Failure, ...]:  # fmt: skip
    values, results = x.double().numpy()[wrong], got.double().numpy()[wrong]
    right = oracle.expected(f, rounding, values, overflow)
    own: Any = law_of(f, _name(x.dtype), rounding, overflow, values, right) if law is None and len(wrong) else []
    width = x.dtype.itemsize * 8
    bits = [int(b) & ((1 << width) - 1) for b in x.view(INTEGERS[x.dtype]).numpy()[wrong].tolist()]
    order = np.argsort(np.abs(values), kind="stable")[:most]
    return tuple(
        Failure(float(values[i]), bits[i], float(results[i]), float(right[i]), law or OF_INPUTS[own[i]], note)
        for i in order
    )


def _check_question(f: ElementFormat, rounding: str, overflow: str, dtype: torch.dtype, level: str) -> None:
    if level not in PROVES:
        raise ValueError(f"level must be one of {', '.join(PROVES)}, got {level!r}")
    if rounding not in (*DETERMINISTIC, FOUND):
        raise ValueError(f"rounding must be one of {', '.join([*DETERMINISTIC, FOUND])}, got {rounding!r}")
    if overflow not in (*Overflow, FOUND):
        raise ValueError(f"overflow must be one of {', '.join([*Overflow, FOUND])}, got {overflow!r}")
    if overflow != FOUND:
        check_overflow(f.name, f.has_inf, f.has_nan, Overflow(overflow))
    if dtype not in CARRIERS:
        names = ", ".join(_name(carrier) for carrier in CARRIERS)
        raise ValueError(f"input_dtype must be one of {names}, got {_name(dtype)}")
    if not float_format(CARRIERS[dtype]).holds(f):
        raise ValueError(f"{f.name} does not fit {_name(dtype)}, so no tensor of it can be right")
    if f.bits > oracle.MAX_BITS:
        raise ValueError(f"{f.name}: this level lists every value, so at most {oracle.MAX_BITS} bits, got {f.bits}")
    if level == "exhaustive" and dtype == torch.float64:
        raise ValueError("2^64 inputs can't all be asked: for float64 the levels are quick and conditional")


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _plain(content: Any) -> Any:
    """With words for the numbers that JSON lacks."""
    if isinstance(content, dict):
        return {key: _plain(value) for key, value in content.items()}
    if isinstance(content, list | tuple):
        return [_plain(value) for value in content]
    if isinstance(content, float) and not np.isfinite(content):
        return str(content)
    return content
