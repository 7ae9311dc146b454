"""Judging a quantiser of single numbers: each input's result by the oracle, and results by each other."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from verification.calls import Caller, decoded
from verification.laws import (
    OF_INPUTS,
    Failure,
    Places,
    Verdict,
    asymmetries,
    decision_point,
    falls,
    is_odd_function,
    law_of,
    off_grid,
)
from verification.points import INTEGERS
from verification.question import Question

MAX_LISTED = 100
FOR_LAYOUTS = 2048
ALONE = 32


def find_wrong(question: Question, x: Tensor, got: Tensor) -> Places:
    """Indices where `got` is not what x becomes, NaN staying NaN; two 1-D CPU tensors of one dtype."""
    right = torch.from_numpy(question.expected(x.double().numpy())).to(x.dtype)
    return np.flatnonzero(~same_bits(got, right).numpy())


def find_broken(question: Question, x: Tensor, got: Tensor) -> Places:
    """The same without NaN where the format has none: what becomes of that is a convention."""
    wrong = find_wrong(question, x, got)
    return np.asarray(wrong[question.f.has_nan | ~np.isnan(x.double().numpy()[wrong])])


def same_bits(a: Tensor, b: Tensor) -> Tensor:
    """Where two tensors of one dtype are bit for bit the same, any NaN being any other."""
    return (a.view(INTEGERS[a.dtype]) == b.view(INTEGERS[a.dtype])) | (a.isnan() & b.isnan())


def verdicts(caller: Caller, question: Question, x: Tensor, got: Tensor, wrong: Places) -> list[Verdict]:
    """On every law that one can have for a deterministic quantiser but `interface`."""
    f, values, results = question.f, x.double().numpy(), got.double().numpy()
    own = law_of(question, _name(x.dtype), values, question.expected(values))
    found: list[Verdict] = []
    for place, law in enumerate(OF_INPUTS):
        of_law = np.flatnonzero(own == place)
        if not len(of_law) or (law == "nan" and not f.has_nan):
            found.append(not_applicable(law))
        else:
            found.append(verdict(question, law, len(of_law), x, got, wrong[own[wrong] == place]))
    found.append(verdict(question, "on_grid", len(x), x, got, off_grid(f, values, results)))
    found.append(_monotone(question, x, got))
    found.append(_idempotent(caller, question, got))
    if is_odd_function(f, question.rounding):
        broken = asymmetries(values, results)
        found.append(verdict(question, "odd_symmetry", len(x), x, got, broken, "-x gives something else"))
    else:
        found.append(not_applicable("odd_symmetry"))
    found += [_deterministic(caller, question, x, got), _round_trip(caller, question, x.dtype)]
    return found


def not_applicable(law: str, note: str = "") -> Verdict:
    """No input belongs to it."""
    return Verdict(law, "not applicable", 0, 0, None, note)


def verdict(
    question: Question, law: str, checked: int, x: Tensor, got: Tensor, broken: Places, note: str = ""
) -> Verdict:
    """On one law, from where it is broken."""
    if not len(broken):
        return Verdict(law, "pass", checked, 0)
    (smallest,) = failures(question, x, got, broken, 1, law, note)
    return Verdict(law, "fail", checked, len(broken), smallest)


def interface(caller: Caller, checked: int) -> Verdict:
    """On the call itself."""
    if caller.complaints:
        return Verdict("interface", "fail", checked, max(1, len(caller.raised)), None, "; ".join(caller.complaints))
    return Verdict("interface", "pass", checked, 0)


def _monotone(question: Question, x: Tensor, got: Tensor) -> Verdict:
    with np.errstate(invalid="ignore"):
        places, before = falls(x.double().numpy(), got.double().numpy())
    if not len(places):
        return Verdict("monotone", "pass", len(x), 0)
    first = int(np.argmin(np.abs(x.double().numpy()[places])))
    smaller, its = float(x[before[first]]), float(got[before[first]])
    note = f"less than {its!r}, the result of {smaller!r}"
    (smallest,) = failures(question, x, got, places[first : first + 1], 1, "monotone", note)
    return Verdict("monotone", "fail", len(x), len(places), smallest)


def _idempotent(caller: Caller, question: Question, got: Tensor) -> Verdict:
    """Over every finite result that there was."""
    results = torch.unique(got[got.isfinite()])
    if not len(results):
        return not_applicable("idempotent")
    again = caller(results)
    keeps = ~caller.unanswered
    broken = np.flatnonzero((keeps & (again != results)).numpy())
    return verdict(question, "idempotent", int(keeps.sum()), results, again, broken)


def _deterministic(caller: Caller, question: Question, x: Tensor, got: Tensor) -> Verdict:
    """The same inputs again, in another order, in other batches, alone, beside NaN, strided, and one element off."""
    some = torch.from_numpy(np.unique(np.linspace(0, len(x) - 1, min(len(x), FOR_LAYOUTS)).astype(np.int64)))
    chosen, first = x[some], got[some]
    if not len(chosen) or caller.complaints:
        return not_applicable("deterministic", "the interface is broken" if len(x) else "")
    for way, ask in _ways(caller, chosen).items():
        other = ask()
        answered = first[: len(other)]
        broken = np.flatnonzero((~same_bits(other, answered) & ~other.isnan()).numpy())
        if len(broken):
            return verdict(question, "deterministic", len(chosen), chosen[: len(other)], other, broken, way)
    return Verdict("deterministic", "pass", len(chosen), 0)


def _ways(caller: Caller, x: Tensor) -> dict[str, Callable[[], Tensor]]:
    beside = torch.tensor([torch.nan, torch.inf, 0.0], dtype=x.dtype)

    def beside_others() -> Tensor:
        mixed = torch.stack([x, *(b.expand(len(x)) for b in beside)], 1).flatten()
        return caller(mixed)[:: len(beside) + 1]

    return {
        "again": lambda: caller(x),
        "in reverse order": lambda: caller(x.flip(0)).flip(0),
        "strided": lambda: caller(x, "strided"),
        "one element off": lambda: caller(x, "offset"),
        "in batches of 33": lambda: torch.cat([caller(piece) for piece in x.split(33)]),
        "alone": lambda: torch.cat([caller(piece) for piece in x[:ALONE].split(1)]),
        "beside NaN, infinity and 0": beside_others,
    }


def _round_trip(caller: Caller, question: Question, dtype: torch.dtype) -> Verdict:
    """Each code's value has that code; of codes that stand for the same, any of them."""
    if caller.gives != "codes":
        return not_applicable("round_trip")
    values = decoded(question.f)
    x = values[values.isfinite()].to(dtype)
    got = caller(x)
    expected = x + 0.0 if question.zero == "unsigned" else x
    broken = np.flatnonzero((~same_bits(got, expected) & ~caller.unanswered).numpy())
    return verdict(question, "round_trip", len(x), x, got, broken)


def failures(
    question: Question, x: Tensor, got: Tensor, wrong: Places,
    most: int = MAX_LISTED, law: str | None = None, note: str = "",
) -> tuple[Failure, ...]:  # fmt: skip
    """The smallest of these inputs, each with its own law or with this one."""
    values, results = x.double().numpy()[wrong], got.double().numpy()[wrong]
    right = question.expected(values)
    own: Any = law_of(question, _name(x.dtype), values, right) if law is None and len(wrong) else []
    width = x.dtype.itemsize * 8
    bits = [int(b) & ((1 << width) - 1) for b in x.view(INTEGERS[x.dtype]).numpy()[wrong].tolist()]
    order = np.argsort(np.abs(values), kind="stable")[:most]
    return tuple(
        Failure(float(values[i]), bits[i], float(results[i]), float(right[i]), law or OF_INPUTS[own[i]], note,
                decision_point(question.f, float(values[i])))
        for i in order
    )  # fmt: skip


def size(failure: Failure) -> float:
    """For finding the smallest."""
    return abs(failure.input) if not np.isnan(failure.input) else float("inf")


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
