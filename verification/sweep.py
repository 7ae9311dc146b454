"""All inputs there are: 2^32 in FP32, on the device where the quantiser runs, against the oracle's staircase.

The numbers are taken in ascending order, so that what is right is a few runs of equal results (`verification.staircase`), which
the device repeats at the speed of its memory. Only where something differs is anything looked at one by one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
import torch
from torch import Tensor

from verification.calls import Caller
from verification.elements import failures, same_bits, size
from verification.laws import OF_INPUTS, Failure, Verdict, law_of, off_grid
from verification.question import Question
from verification.staircase import INFINITY, Staircase, inputs_of, keys_around

CHUNK = {"cpu": 1 << 22, "cuda": 1 << 26}
ALL = 1 << 32
NUMBERS = 2 * (INFINITY + 1)
BY_POINTS = ("monotone", "idempotent", "odd_symmetry")
"""Laws that hold for all inputs if every single one is right."""
Progress = Callable[[float], None]
Found = dict[str, tuple[int, Failure | None]]


def all_fp32(caller: Caller, question: Question, progress: Progress | None) -> tuple[int, Found]:
    """How many inputs were answered, and for each law that one belongs to, how many broke it and the smallest of these."""
    answered = 0
    found: Found = dict.fromkeys((*OF_INPUTS, "on_grid"), (0, None))
    for x, right in _inputs(question, caller.device, progress):
        got = caller(x)
        there = ~caller.unanswered
        answered += int(there.sum())
        if torch.equal(got.view(torch.int32), right):
            continue
        wrong = there & ~same_bits(got, right.view(torch.float32))
        if bool(wrong.any()):
            _sort_out(question, x[wrong].cpu(), got[wrong].cpu(), found)
    return answered, found


def _sort_out(question: Question, x: Tensor, got: Tensor, found: Found) -> None:
    values = x.double().numpy()
    own = law_of(question, "float32", values, question.expected(values))
    broken = {law: np.flatnonzero(own == place) for place, law in enumerate(OF_INPUTS)}
    broken["on_grid"] = off_grid(question.f, values, got.double().numpy())
    for law, places in broken.items():
        if len(places):
            (smallest,) = failures(question, x, got, places, 1, law)
            count, before = found[law]
            found[law] = (count + len(places), min(filter(None, (before, smallest)), key=size))


def _inputs(question: Question, device: str, progress: Progress | None) -> Iterator[tuple[Tensor, Tensor]]:
    """Inputs and the patterns of their results: the numbers in ascending order, then, where NaN is a law, all NaN."""
    stairs = Staircase(question, device)
    chunk = CHUNK[device.partition(":")[0]]
    for start in range(-1 - INFINITY, INFINITY + 1, chunk):
        stop = min(start + chunk, INFINITY + 1)
        keys = torch.arange(start, stop, dtype=torch.int32, device=device)
        yield inputs_of(keys), stairs.patterns(start, stop)
        if progress:
            progress((stop + INFINITY) / (2 * INFINITY + 1))
    if question.f.has_nan:
        for start in range(INFINITY + 1, 1 << 31, chunk):
            nan = torch.arange(start, min(start + chunk, 1 << 31), device=device).to(torch.int32)
            for patterns in (nan, nan | -(1 << 31)):
                yield patterns.view(torch.float32), torch.full_like(patterns, 0x7FC00000)


def with_all(verdict: Verdict, found: Found, question: Question, answered: int) -> Verdict:
    """A law's verdict from points with what all inputs said."""
    law = verdict.law
    if verdict.verdict == "not applicable" or (verdict.verdict == "fail" and law not in found):
        return verdict
    if law in BY_POINTS:
        all_right = not any(count for count, _ in found.values())
        return Verdict(law, "pass", answered if all_right else verdict.checked, 0)
    if law not in found:
        return verdict
    count = answered if law == "on_grid" else counts(question).get(law, verdict.checked)
    failed, smallest = found[law]
    if not failed:
        return Verdict(law, "pass", count, 0) if verdict.verdict == "pass" else verdict
    return Verdict(law, "fail", count, failed, smallest)


def counts(question: Question) -> dict[str, int]:
    """How many FP32 inputs belong to each law: between two neighbouring keys of `keys_around` all belong to the same."""
    keys = keys_around(question.f)
    x = inputs_of(torch.from_numpy(keys.astype(np.int32))).double().numpy()
    own = law_of(question, "float32", x, question.expected(x))
    lengths = np.diff(keys, append=INFINITY + 1)
    found = {law: int(lengths[own == place].sum()) for place, law in enumerate(OF_INPUTS)}
    return found | {"nan": ALL - NUMBERS}
