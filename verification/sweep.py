"""All inputs there are: 2^32 in FP32, on the device where the quantiser runs, against the oracle's staircase.

The numbers are taken in ascending order, so that what is right is a few runs of equal results (`verification.staircase`), which
the device repeats at the speed of its memory. Only where something differs is anything looked at one by one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
import torch
from torch import Tensor

from verification import oracle
from verification.calls import Caller
from verification.elements import failures, same_bits, size
from verification.laws import OF_INPUTS, Failure, Verdict, law_of
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
    laws = AllLaws(question)
    for start, x, right in _inputs(question, caller.device, progress):
        got = caller(x)
        there = ~caller.unanswered
        answered += int(there.sum())
        if torch.equal(got.view(torch.int32), right):
            continue
        wrong = there & ~same_bits(got, right.view(torch.float32))
        if bool(wrong.any()):
            laws.sort_out(start, x, got, wrong, found)
    return answered, found


class AllLaws:
    """Which law each key belongs to, as runs, so that however many inputs are wrong they are counted where they lie."""

    def __init__(self, question: Question) -> None:
        self.question = question
        self.keys = keys_around(question.f)
        x = inputs_of(torch.from_numpy(self.keys.astype(np.int32))).double().numpy()
        self.own = law_of(question, "float32", x, question.expected(x))

    def sort_out(self, start: int | None, x: Tensor, got: Tensor, wrong: Tensor, found: Found) -> None:
        """What is wrong in a chunk of keys from `start` on, or of NaN if that is None, added to what was found."""
        off = wrong & ~got.isnan() & ~self._on_grid(got)
        self._add("on_grid", x, got, off, found, [(0, len(x))])
        if start is None:
            self._add("nan", x, got, wrong, found, [(0, len(x))])
            return
        low, high = np.searchsorted(self.keys, [start, start + len(x)], side="right")
        edges = np.clip(self.keys[low - 1 : high] - start, 0, len(x))
        runs = list(zip(edges.tolist(), [*edges[1:].tolist(), len(x)], strict=True))
        for place in np.unique(self.own[low - 1 : high]):
            own = [run for run, law in zip(runs, self.own[low - 1 : high], strict=True) if law == place]
            self._add(OF_INPUTS[place], x, got, wrong, found, own)

    def _on_grid(self, got: Tensor) -> Tensor:
        values = torch.tensor(oracle.finite_values(self.question.f), dtype=torch.float32, device=got.device)
        place = torch.searchsorted(values, got.contiguous()).clamp(max=len(values) - 1)
        fine = values[place] == got
        return fine | got.isinf() if self.question.f.has_inf else fine

    def _add(self, law: str, x: Tensor, got: Tensor, wrong: Tensor, found: Found, runs: list[tuple[int, int]]) -> None:
        """The smallest lies at an end of a run, since keys ascend: the first above zero, the last below."""
        upto = torch.cat([wrong.new_zeros(1, dtype=torch.int64), wrong.cumsum(0)])
        edges = torch.tensor(runs, device=x.device).reshape(-1, 2)
        at = upto[edges].cpu().numpy()
        counted = at[:, 1] - at[:, 0]
        if not counted.any():
            return
        broken = np.flatnonzero(counted)
        ranks = np.unique(np.concatenate([at[broken, 0] + 1, at[broken, 1]]))
        places = torch.searchsorted(upto, torch.from_numpy(ranks).to(x.device)).cpu() - 1
        some = places.to(x.device)
        (smallest,) = failures(self.question, x[some].cpu(), got[some].cpu(), np.arange(len(some)), 1, law)
        count, before = found[law]
        found[law] = (count + int(counted.sum()), min(filter(None, (before, smallest)), key=size))


def _inputs(question: Question, device: str, progress: Progress | None) -> Iterator[tuple[int | None, Tensor, Tensor]]:
    """Keys, inputs and the patterns of their results: the numbers in ascending order, then, where NaN is a law, all NaN."""
    stairs = Staircase(question, device)
    chunk = CHUNK[device.partition(":")[0]]
    for start in range(-1 - INFINITY, INFINITY + 1, chunk):
        stop = min(start + chunk, INFINITY + 1)
        keys = torch.arange(start, stop, dtype=torch.int32, device=device)
        yield start, inputs_of(keys), stairs.patterns(start, stop)
        if progress:
            progress((stop + INFINITY) / (2 * INFINITY + 1))
    if question.f.has_nan:
        for start in range(INFINITY + 1, 1 << 31, chunk):
            nan = torch.arange(start, min(start + chunk, 1 << 31), device=device).to(torch.int32)
            for patterns in (nan, nan | -(1 << 31)):
                yield None, patterns.view(torch.float32), torch.full_like(patterns, 0x7FC00000)


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
