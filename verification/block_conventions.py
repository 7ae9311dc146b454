"""What an implementation of a scaled format does where standards leave a choice: its scale rule before all.

Every rule for such scales, with every rounding of elements, is held against the answers for some blocks, and the one that
most elements fit is the one that the implementation means: a rule computed by a rounded logarithm fits everywhere but beside
powers of two, and must not become "other" by that. Where not three in four elements fit anything, it is "other".
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from formats import FloatFormat
from formats.rounding import DETERMINISTIC
from formats.scaled import ScaledFormat
from verification import block_oracle
from verification.block_calls import Answer, BlockCaller
from verification.block_oracle import BlockQuestion
from verification.block_points import beside_others, block_size, decision_blocks, every_rule
from verification.laws import Flags, Floats

ENOUGH = 0.75


class BlockConventions(NamedTuple):
    """By name. rule: of formats.ScaleRule; rounding: of elements, one of formats.Rounding; either may be "other".

    zero: "signed", "unsigned" where -0 becomes +0, "signed_anyway" where it stays though elements have none. subnormals: of
    elements, "kept" or "flushed". zero_block: the scale of a block of zeros where it is told, else what becomes of it:
    "zero", "nan" or "other". nan, infinity: of one of them in a block, "block" if all of it becomes NaN, "element" if it
    alone does, "largest" if it alone becomes the largest value, "raises", or "other".
    """

    rule: str
    rounding: str
    zero: str
    subnormals: str
    zero_block: str
    nan: str
    infinity: str


def find_block_conventions(caller: BlockCaller, f: ScaledFormat, dtype: torch.dtype) -> BlockConventions:
    """Ask the quantiser for some hundred blocks."""
    batches = decision_blocks(f, dtype, "quick")
    answers = [(batch.double().numpy(), caller.answer(batch)) for batch in batches]
    zero = _zero(caller, f, dtype)
    fits = {}
    name = str(dtype).removeprefix("torch.")
    has_subnormals = isinstance(f.element, FloatFormat) and f.element.subnormals and f.element.mantissa_bits > 0
    for rule in every_rule(f):
        for mode in DETERMINISTIC:
            for subnormals in ("kept", "flushed") if has_subnormals else ("kept",):
                question = BlockQuestion(rule, str(mode), zero=zero, subnormals=subnormals)
                fits[str(rule.rule), str(mode), subnormals] = _share(question, answers, name)
    best = max(fits, key=lambda key: fits[key])
    rule_name, rounding, subnormals = best
    known = fits[best] >= ENOUGH
    return BlockConventions(
        rule_name if known else "other", rounding if known else "other", zero, subnormals,
        _zero_block(caller, f, dtype), _special(caller, f, dtype, torch.nan), _special(caller, f, dtype, torch.inf),
    )  # fmt: skip


def _share(question: BlockQuestion, answers: list[tuple[Floats, Answer]], dtype: str) -> float:
    """Of elements that came out as this says, in blocks that are not all zeros; 0 and -0 are the same here."""
    same, count = 0, 0
    for x, answer in answers:
        right = block_oracle.right(question, x, dtype)
        if answer.elements is None or answer.scales is None:
            fine = _equal(answer.values, right.values)
        else:
            fine = _equal(answer.elements, right.elements) & _equal(answer.scales, right.scales)[:, None]
        nonzero: Flags = np.asarray(x.any(1))
        same += int(fine[nonzero].sum())
        count += int(nonzero.sum()) * x.shape[1]
    return same / max(count, 1)


def _equal(a: Floats, b: Floats) -> Flags:
    return np.asarray((a == b) | (np.isnan(a) & np.isnan(b)))


def _zero(caller: BlockCaller, f: ScaledFormat, dtype: torch.dtype) -> str:
    block = _ones(f, dtype)
    place = beside_others(f)
    block[0, place] = -0.0
    answer = caller.answer(block)
    got = answer.values if answer.elements is None else answer.elements
    if not np.signbit(got[0, place]):
        return "unsigned"
    return "signed" if f.element.has_negative_zero else "signed_anyway"


def _zero_block(caller: BlockCaller, f: ScaledFormat, dtype: torch.dtype) -> str:
    answer = caller.answer(torch.zeros(1, block_size(f), dtype=dtype))
    if caller.unanswered.any():
        return "raises"
    if answer.scales is not None and np.isfinite(answer.scales[0]):
        scale = float(answer.scales[0])
        exponent = np.log2(scale) if scale > 0 else 0.5
        return f"scale 2^{int(exponent)}" if float(exponent).is_integer() else f"scale {scale!r}"
    values = answer.values
    return "zero" if not values.any() else "nan" if np.isnan(values).all() else "other"


def _special(caller: BlockCaller, f: ScaledFormat, dtype: torch.dtype, special: float) -> str:
    """What one NaN or infinity does to a block of ones."""
    before = list(caller.complaints)
    block = _ones(f, dtype)
    place = beside_others(f)
    block[0, place] = special
    values = caller.answer(block).values[0]
    raised = bool(caller.unanswered.any())
    caller.complaints[:] = before  # to refuse such a block is a convention too
    caller.raised.clear()
    if raised:
        return "raises"
    others = np.delete(values, place)
    if np.isnan(values).all():
        return "block"
    if np.isnan(values[place]):
        return "element"
    if np.isposinf(values[place]):
        return "infinity"
    return "largest" if np.isinf(special) and values[place] > 0 and (others <= values[place]).all() else "other"


def _ones(f: ScaledFormat, dtype: torch.dtype) -> Tensor:
    return torch.ones(1, block_size(f), dtype=dtype)
