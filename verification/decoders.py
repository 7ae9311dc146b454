"""Judging a decoder, from codes to values: every code there is, against mpmath's list of what codes stand for."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from formats import ElementFormat, GridFormat
from verification.calls import Caller, decoded
from verification.elements import not_applicable
from verification.laws import OF_INPUTS, Failure, Places, Verdict
from verification.points import INTEGERS
from verification.question import smallest_normal

CODES = {8: torch.uint8, 16: torch.uint16, 32: torch.int32}


def judge_decoder(caller: Caller, f: ElementFormat) -> tuple[int, list[Verdict]]:
    """How many codes there are, and what became of each law."""
    listed = decoded(f)
    defined = torch.arange(1 << f.bits)[_stand_for_something(f)]
    codes = defined.to(CODES[next(width for width in CODES if f.bits <= width)])
    got = caller(codes)
    answered = ~caller.unanswered
    codes, defined, got = codes[answered], defined[answered], got[answered]
    right = listed[defined]
    same = (got.view(INTEGERS[got.dtype]) == right.view(INTEGERS[right.dtype])) | (got.isnan() & right.isnan())
    if not f.has_negative_zero:
        same |= (got == 0) & (right == 0)
    broken = np.flatnonzero(~same.numpy())
    magnitude, normal = right.abs(), smallest_normal(f)
    law_of = {
        "nan": right.isnan(), "infinity": right.isinf(), "signed_zero": right == 0, "subnormals": magnitude < normal,
        "round_trip": torch.ones_like(same),
    }  # fmt: skip
    verdicts: list[Verdict] = []
    taken = torch.zeros_like(same)
    for law, applies in law_of.items():
        mine = applies & ~taken if law != "round_trip" else applies
        taken |= applies if law != "round_trip" else taken
        verdicts.append(_verdict(law, int(mine.sum()), broken[mine.numpy()[broken]], defined, got, right))
    verdicts += [not_applicable(law) for law in OF_INPUTS if law not in law_of]
    verdicts.append(_deterministic(caller, codes, defined, got))
    return len(codes), verdicts


def _stand_for_something(f: ElementFormat) -> Tensor:
    if not isinstance(f, GridFormat):
        return torch.ones(1 << f.bits, dtype=torch.bool)
    listed = torch.zeros(1 << f.bits, dtype=torch.bool)
    listed[[*f.codes, *([] if f.nan_code is None else [f.nan_code])]] = True
    return listed


def _verdict(
    law: str, checked: int, broken: Places, codes: Tensor, got: Tensor, right: Tensor, note: str = ""
) -> Verdict:
    if not checked:
        return not_applicable(law)
    if not len(broken):
        return Verdict(law, "pass", checked, 0)
    i = int(broken[0])
    note = note or "the input is a code"
    smallest = Failure(float(codes[i]), int(codes[i]), float(got[i]), float(right[i]), law, note)
    return Verdict(law, "fail", checked, len(broken), smallest)


def _deterministic(caller: Caller, codes: Tensor, defined: Tensor, got: Tensor) -> Verdict:
    if caller.complaints or not len(codes):
        return not_applicable("deterministic", "the interface is broken" if caller.complaints else "")
    backwards = caller(defined.flip(0).to(codes.dtype)).flip(0)
    pieces = torch.cat([caller(piece) for piece in codes.split(33)])
    for other, way in ((backwards, "in reverse order"), (pieces, "in batches of 33")):
        broken = np.flatnonzero(~((other == got) | (other.isnan() & got.isnan())).numpy())
        if len(broken):
            return _verdict("deterministic", len(codes), broken, defined, other, got, way)
    return Verdict("deterministic", "pass", len(codes), 0)
