"""Judging a quantiser of blocks that share a scale: the scale by its rule, then the elements under it.

A wrong block is told apart by what it equals: if another power of two (or, of FP32 scales, a neighbour) makes it right, it is
`scale_rule` that is broken; if elements come out as they would under the scale before its own rounding, `scale_then_quantise`;
else each wrong element breaks the law of its quotient, as a number by itself would: ties, subnormals, rounding, ...
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from formats import element_format
from formats.scaled import Granularity, ScaledFormat
from verification import block_oracle, oracle
from verification.block_calls import Answer, BlockCaller
from verification.block_oracle import BlockQuestion, quotient
from verification.block_points import beside_others, block_size
from verification.calls import decoded
from verification.elements import not_applicable
from verification.laws import OF_INPUTS, Failure, Flags, Floats, Places, Verdict, is_odd_function, law_of
from verification.points import INTEGERS

OF_ELEMENTS = tuple(law for law in OF_INPUTS if law not in ("nan", "infinity", "single_rounding"))
OF_BLOCKS = ("scale_rule", "scale_then_quantise", "zero_block")
"""Laws whose counts are of blocks."""
POWERS = (-2, -1, 1, 2)
SHRINKING = 400


class Judged(NamedTuple):
    """Blocks x [B, n] with what was answered, what is right, and each element's own law as a place in OF_INPUTS, alike.

    broken: which elements break what, by law. scales: [B], as answered, where they were. tensor_scale: above the right ones.
    """

    x: Floats
    got: Floats
    right: Floats
    own: Places
    answered: Flags
    broken: dict[str, Flags]
    scales: Floats | None
    right_scales: Floats
    tensor_scale: float

    def only(self, rows: slice | Flags) -> Judged:
        """Some of the blocks, without what they break."""
        scales = None if self.scales is None else self.scales[rows]
        return Judged(self.x[rows], self.got[rows], self.right[rows], self.own[rows], self.answered[rows], {}, scales,
                      self.right_scales[rows], self.tensor_scale)  # fmt: skip


def judge(caller: BlockCaller, question: BlockQuestion, batches: list[Tensor]) -> tuple[int, int, list[Verdict]]:
    """How many elements were asked and wrong, and what became of each law."""
    dtype = _name(batches[0].dtype)
    every = [judged(caller, question, batch, dtype) for batch in batches]
    count = sum(int(j.answered.sum()) * j.x.shape[1] for j in every)
    wrong = sum(int(np.any(list(j.broken.values()), axis=0).sum()) for j in every)
    found: list[Verdict] = []
    for law in ("scale_rule", "scale_then_quantise", "zero_block", *OF_ELEMENTS, "on_grid"):
        found.append(_verdict(caller, question, law, every, batches))
    found.append(_idempotent(caller, question, every, batches))
    found.append(_odd(caller, question, every, batches))
    found.append(_nan(caller, question, batches[0].dtype))
    found.append(_deterministic(caller, question, every, batches))
    judged_laws = {verdict.law for verdict in found}
    found += [not_applicable(law) for law in ("infinity", "single_rounding", "monotone") if law not in judged_laws]
    return count, wrong, found


def judged(caller: BlockCaller, question: BlockQuestion, batch: Tensor, dtype: str) -> Judged:
    """One tensor of finite blocks."""
    x = batch.double().numpy()
    answer = caller.answer(batch)
    answered = ~caller.unanswered.cpu().numpy()
    right = block_oracle.right(question, x, dtype)
    codes = answer.elements is not None
    got, want = (answer.elements, right.elements) if codes else (answer.values, right.values)
    assert got is not None
    zero: Flags = np.asarray(~x.any(1))
    wrong = _differs(got, want) & answered[:, None]
    bad_scale = _bad_scales(question, x, answer, right, wrong, dtype) & answered & ~zero
    broken = {"scale_rule": np.zeros(x.shape, np.bool_), "zero_block": wrong & zero[:, None]}
    # Where scales were told, at amax; else at an element that shows it.
    shows = np.abs(x) if codes else np.where(wrong, np.abs(x), -1.0)
    broken["scale_rule"][bad_scale, np.argmax(shows[bad_scale], 1)] = True
    wrong = wrong & ~bad_scale[:, None] & ~zero[:, None]
    raw = block_oracle.by_unrounded_scale(question, x, right.scales, right.tensor_scale, dtype)
    otherwise = raw.elements if codes else raw.values
    unrounded = wrong & ~_differs(got, otherwise)
    # One place may agree by chance: all places where the two readings differ must.
    telling = _differs(otherwise, want)
    alike: Flags = np.asarray((~_differs(got, otherwise) | ~telling).all(1) & telling.any(1))
    unrounded &= alike[:, None]
    broken["scale_then_quantise"] = unrounded
    wrong = wrong & ~unrounded
    divisor = (right.scales * right.tensor_scale)[:, None]
    with np.errstate(all="ignore"):
        quotients = quotient(x, divisor)
        ratio = got if codes else got / divisor
    own = law_of(question.element, dtype, quotients, right.elements)
    for place, law in enumerate(OF_INPUTS):
        if law in OF_ELEMENTS:
            broken[law] = wrong & (own == place)
    broken["on_grid"] = wrong & _off_grid(question.f, ratio) & np.isfinite(got) & np.isfinite(want)
    return Judged(x, got, want, own, answered, broken, answer.scales, right.scales, right.tensor_scale)


def _off_grid(f: ScaledFormat, ratio: Floats) -> Flags:
    """Which are no values of the element; only told of powers of two as scales, by which division is exact."""
    values = oracle.finite_values(f.element)
    place = np.clip(np.searchsorted(values, ratio), 0, len(values) - 1)
    return np.asarray((values[place] != ratio) & (f.scale == "e8m0fnu"))


def _bad_scales(
    question: BlockQuestion, x: Floats, answer: Answer, right: block_oracle.Right, wrong: Flags, dtype: str
) -> Flags:
    """Blocks whose scale is not the rule's: read off, or told from the values that another scale would have given."""
    if answer.scales is not None:
        return np.asarray(_differs(answer.scales, right.scales))
    suspects = wrong.any(1)
    found = np.zeros(len(x), np.bool_)
    if not suspects.any():
        return found
    scales = right.scales[suspects]
    if question.f.scale == "e8m0fnu":
        others = [scales * 2.0**power for power in POWERS]
    elif question.f.scale == "fp32":
        others = [np.nextafter(scales.astype(np.float32), np.float32(way)).astype(np.float64) for way in (0, np.inf)]
    else:
        grid = np.array(_grid_of_scales(question.f.scale))
        place = np.searchsorted(grid, scales)
        others = [grid[np.clip(place + step, 0, len(grid) - 1)] for step in (-2, -1, 1, 2)]
    for other in others:
        instead = block_oracle.of_scales(question, x[suspects], other, right.tensor_scale, dtype)
        found[suspects] |= ~_differs(answer.values[suspects], instead.values).any(1)
    return found


def _grid_of_scales(name: str) -> list[float]:
    values = decoded(element_format(name))
    return sorted({float(v) for v in values[values.isfinite() & (values > 0)].tolist()})


def _differs(a: Floats, b: Floats) -> Flags:
    """Bit for bit, any NaN being any other."""
    return np.asarray((a.view(np.int64) != b.view(np.int64)) & ~(np.isnan(a) & np.isnan(b)))


def _verdict(
    caller: BlockCaller, question: BlockQuestion, law: str, every: list[Judged], batches: list[Tensor]
) -> Verdict:
    """A law's, over all tensors; its counterexample is the block with the smallest amax, made simple."""
    checked = sum(_checked(law, question, j) for j in every)
    if not checked:
        return not_applicable(law)
    whole = law in OF_BLOCKS
    failed = sum(int(j.broken[law].any(1).sum() if whole else j.broken[law].sum()) for j in every)
    if not failed:
        return Verdict(law, "pass", checked, 0)
    rows = [(float(np.abs(j.x[row]).max()), i, row) for i, j in enumerate(every)
            for row in np.flatnonzero(j.broken[law].any(1)).tolist()]  # fmt: skip
    _, i, row = min(rows)
    return Verdict(law, "fail", checked, failed, _counterexample(caller, question, law, every[i], row, batches[i]))


def _checked(law: str, question: BlockQuestion, j: Judged) -> int:
    nonzero = j.x.any(1) & j.answered
    if law == "zero_block":
        return int((~j.x.any(1) & j.answered).sum())
    if law in ("scale_rule", "scale_then_quantise"):
        return int(nonzero.sum())
    if law == "on_grid":
        return int(nonzero.sum()) * j.x.shape[1] if question.f.scale == "e8m0fnu" else 0
    return int(((j.own == OF_INPUTS.index(law)) & nonzero[:, None]).sum())


def _counterexample(
    caller: BlockCaller, question: BlockQuestion, law: str, j: Judged, row: int, batch: Tensor
) -> Failure:
    """The block's failing element, among as few others as the failure needs where blocks don't share a tensor's scale."""
    block = batch[row : row + 1]
    dtype = _name(batch.dtype)
    shown = j
    at = row
    if not question.f.has_tensor_scale:
        block, alone = _shrunk(caller, question, law, block, dtype)
        if alone is not None:
            shown, at = alone, 0
    place = int(np.flatnonzero(shown.broken[law][at])[0])
    values = shown.x[at]
    bits = _bits(block, 0, place)
    if law == "scale_rule" and shown.scales is not None:
        got, right, note = float(shown.scales[at]), float(shown.right_scales[at]), "scales, of this amax"
    else:
        got, right = float(shown.got[at, place]), float(shown.right[at, place])
        scale = float(shown.right_scales[at])
        upper = f" times the tensor's {shown.tensor_scale!r}" if question.f.has_tensor_scale else ""
        note = f"element {place} of its block, whose scale should be {scale!r}{upper}"
        note += ", elements" if shown.scales is not None else ""
    return Failure(float(values[place]), bits, got, right, law, note, "", tuple(float(v) for v in values))


def _shrunk(
    caller: BlockCaller, question: BlockQuestion, law: str, block: Tensor, dtype: str
) -> tuple[Tensor, Judged | None]:
    """The block with zeros wherever it still fails with them; None where it does not fail alone."""
    alone = judged(caller, question, block, dtype)
    if not alone.broken[law].any():
        return block, None
    for place in range(min(block.shape[1], SHRINKING)):
        if block[0, place] == 0:
            continue
        simpler = block.clone()
        simpler[0, place] = 0
        instead = judged(caller, question, simpler, dtype)
        if instead.broken[law].any():
            block, alone = simpler, instead
    return block, alone


def _compared(
    law: str, j: Judged, batch: Tensor, got: Floats, right: Floats, checked: int, note: str
) -> Verdict:  # fmt: skip
    """From two sets of results that should be equal, [B, n]."""
    broken = _differs(got, right) & j.answered[:, None] & ~np.isnan(got)
    if not broken.any():
        return Verdict(law, "pass", checked, 0)
    row, place = (int(i) for i in np.argwhere(broken)[0])
    values = tuple(float(v) for v in j.x[row])
    bits = _bits(batch, row, place)
    example = Failure(values[place], bits, float(got[row, place]), float(right[row, place]), law, note, "", values)
    return Verdict(law, "fail", checked, int(broken.sum()), example)


def _bits(batch: Tensor, row: int, place: int) -> int:
    return int(batch.view(INTEGERS[batch.dtype])[row, place]) & ((1 << (batch.dtype.itemsize * 8)) - 1)


def _idempotent(caller: BlockCaller, question: BlockQuestion, every: list[Judged], batches: list[Tensor]) -> Verdict:
    """Of results that the definition itself leaves alone: with powers of two as scales all but those that overflow."""
    if question.f.scale != "e8m0fnu" or caller.with_codes:
        return not_applicable("idempotent")
    j, dtype = every[0], _name(batches[0].dtype)
    finite = np.where(np.isfinite(j.got), j.got, 0.0)
    stays = block_oracle.right(question, finite, dtype).values
    fine = np.isfinite(j.got).all(1) & ~_differs(stays + 0.0, j.got + 0.0).any(1) & j.answered
    if not fine.any():
        return not_applicable("idempotent")
    results = torch.from_numpy(j.got[fine]).to(batches[0].dtype)
    again = caller.answer(results).values
    sub = j.only(fine)._replace(x=j.got[fine], answered=~caller.unanswered.cpu().numpy())
    return _compared("idempotent", sub, results, again + 0.0, sub.x + 0.0, sub.x.size, "quantised again")


def _odd(caller: BlockCaller, question: BlockQuestion, every: list[Judged], batches: list[Tensor]) -> Verdict:
    if not is_odd_function(question.f.element, question.rounding):
        return not_applicable("odd_symmetry")
    i = int(np.argmax([len(batch) for batch in batches]))
    answer = caller.answer(-batches[i])
    mirrored = answer.values if answer.elements is None else answer.elements
    j = every[i]
    return _compared("odd_symmetry", j, batches[i], 0.0 - mirrored, j.got + 0.0, j.x.size, "-x gives something else")


def _nan(caller: BlockCaller, question: BlockQuestion, dtype: torch.dtype) -> Verdict:
    """A NaN among ones is NaN; where elements have none, what becomes of it is a convention."""
    if not question.f.element.has_nan:
        return not_applicable("nan", "elements have no NaN: a convention")
    block = torch.ones(1, block_size(question.f), dtype=dtype)
    place = beside_others(question.f)
    block[0, place] = torch.nan
    answer = caller.answer(block)
    if caller.unanswered.any():
        return not_applicable("nan", "no answer, as the interface says")
    got = float(answer.values[0, place])
    if np.isnan(got):
        return Verdict("nan", "pass", 1, 0)
    values = tuple(float(v) for v in block[0].tolist())
    return Verdict(
        "nan",
        "fail",
        1,
        1,
        Failure(float("nan"), 0, got, float("nan"), "nan", f"element {place} of its block", "", values),
    )


def _deterministic(caller: BlockCaller, question: BlockQuestion, every: list[Judged], batches: list[Tensor]) -> Verdict:
    """The same blocks again, strided, one element off; in another order and alone where no tensor's scale joins them."""
    if caller.complaints:
        return not_applicable("deterministic", "the interface is broken")
    i = int(np.argmax([len(batch) for batch in batches]))
    some = slice(0, 256) if not question.f.has_tensor_scale else slice(None)
    batch, j = batches[i][some], every[i].only(some)

    def ask(x: Tensor, layout: str = "plain") -> Floats:
        answer = caller.answer(x, layout)
        return answer.values if answer.elements is None else answer.elements

    ways: dict[str, Callable[[], Floats]] = {
        "again": lambda: ask(batch), "strided": lambda: ask(batch, "strided"), "one element off": lambda: ask(batch, "offset")
    }  # fmt: skip
    if not question.f.has_tensor_scale and question.f.granularity is not Granularity.TENSOR:
        ways["in reverse order"] = lambda: ask(batch.flip(0))[::-1].copy()
        ways["in other batches"] = lambda: np.concatenate([ask(piece) for piece in batch.split(17)])
    for way, other in ways.items():
        found = _compared("deterministic", j, batch, other(), j.got, len(ways) * j.x.size, way)
        if found.verdict == "fail":
            return found
    return Verdict("deterministic", "pass", len(ways) * j.x.size, 0)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
