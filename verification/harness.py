"""Put a quantiser, ours or anyone's, to the proof, law by law, and say exactly how much that proves."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import torch

from formats import ElementFormat, Overflow, Rounding, float_format, get_format
from formats.rounding import DETERMINISTIC, check_overflow
from formats.scaled import ScaledFormat, rules_for
from formats.spec import Format
from verification import oracle
from verification.block_calls import BlockCaller
from verification.block_conventions import find_block_conventions
from verification.block_oracle import BlockQuestion
from verification.block_points import decision_blocks
from verification.blocks import judge
from verification.calls import GIVES, TAKES, Caller
from verification.chance import judge_chance
from verification.conventions import Conventions, find_conventions
from verification.decoders import judge_decoder
from verification.elements import MAX_LISTED, failures, find_broken, interface, not_applicable, size, verdicts
from verification.laws import LAWS, OF_INPUTS, Failure, Verdict
from verification.points import CARRIERS, INTEGERS, decision_inputs, from_codes
from verification.question import FOUND, SUBNORMALS, ZEROS, Question
from verification.report import (
    PROVES,
    PROVES_OF_BLOCKS,
    PROVES_OF_CHANCE,
    PROVES_OF_DECODERS,
    Report,
    environment,
)
from verification.search import searched, searched_blocks
from verification.sweep import Progress, all_fp32, with_all

QUICK_POINTS = 64
STOCHASTIC = "stochastic"
MAX_ELEMENT_BITS = 8
BLOCK_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def verify(
    quantizer: Callable[[Any], Any],
    format: Format | str,  # noqa: A002 RUF100
    rounding: str = Rounding.NEAREST_EVEN,
    overflow: str = Overflow.SATURATE,
    input_dtype: torch.dtype = torch.float32,
    level: str = "conditional",
    *,
    zero: str = "signed",
    subnormals: str = "kept",
    rule: str | None = None,
    claimed: str = Rounding.NEAREST_EVEN,
    takes: str = "tensor",
    gives: str = "values",
    bias: float = 0.0,
    device: str = "cpu",
    seconds: float = 60.0,
    name: str | None = None,
    version: str = "",
    progress: Progress | None = None,
) -> Report:
    """Hold a quantiser against the definition, bit for bit, law by law (`verification.LAWS`).

    quantizer: from a 1-D tensor of input_dtype on `device`, or with takes="array" a NumPy array, to one of its shape: of
    values, or with gives="codes" of integer codes, or of a dtype whose bits they are. With takes="codes" it is a decoder:
    from all codes of the format, as integers, to values. For a scaled format it takes blocks, [B, n], along the last axis
    (tiles side by side below each other; a tensor scaled as one alone), and gives values alike, or with gives="codes" a tuple
    (codes [B, n], one to an element, scales [B] or [B, 1], codes or FP32 values [, the tensor's scale]).

    rounding, overflow, zero ("signed", "unsigned"), subnormals ("kept", "flushed", "flushed_early") and, of scaled formats,
    rule: what it is judged by; "found" for what it was found to do, where that has a name, and of roundings else for what it
    `claimed` to do. rounding="stochastic" is judged by statistics, up to a `bias`, a share of the distance between neighbours
    (2^-N where N random bits allow no less). level: "quick", "conditional" or "exhaustive"; `proves` of the report says what
    that proves. seconds: how long one call may take. name, version: for the report. progress: called with the share of an
    exhaustive proof that is done.

    Any NaN will do for NaN; what NaN becomes in a format without one is a convention, and no law. A quantiser that raises,
    hangs, gives another shape or dtype or writes into its input breaks the law `interface`, and is judged on what it answers.
    ValueError, before any work, for a level, rounding, overflow or dtype that there is no proof for, or a dtype that does not
    hold the format.
    """
    f, asked = check(
        format, rounding, overflow, input_dtype, level, zero=zero, subnormals=subnormals, rule=rule, claimed=claimed,
        takes=takes, gives=gives, bias=bias, device=device,
    )  # fmt: skip
    question = asked | {"takes": takes, "gives": gives, "bias": str(bias), "seconds": str(seconds)}
    if isinstance(f, ScaledFormat):
        blocks = BlockCaller(quantizer, f, takes, gives, seconds, device)
        outcome = _blocks(blocks, f, asked, claimed, input_dtype, level)
    else:
        assert isinstance(f, ElementFormat)
        result_dtype = torch.float64 if takes == "codes" else None
        caller = Caller(quantizer, f, takes, gives, seconds, device, result_dtype)
        if takes == "codes":
            outcome = _decoder(caller, f, asked, level)
        else:
            outcome = _elements(caller, f, asked, claimed, input_dtype, level, bias, progress)
    return Report(
        implementation=name or str(getattr(quantizer, "__name__", type(quantizer).__name__)),
        version=version,
        format=f.name,
        claimed=str(claimed),
        rounding=outcome.asked["rounding"],
        overflow=outcome.asked["overflow"],
        input_dtype="codes" if takes == "codes" else _name(input_dtype),
        device=device,
        level=outcome.level,
        proves=outcome.proves,
        checked=outcome.checked,
        failure_count=outcome.wrong,
        failures=outcome.failures,
        laws=tuple(sorted(outcome.laws, key=lambda verdict: list(LAWS).index(verdict.law))),
        asked=outcome.asked,
        conventions=outcome.conventions,
        environment=environment(device),
        question=question,
    )


def check(
    format: Format | str,  # noqa: A002 RUF100
    rounding: str = Rounding.NEAREST_EVEN,
    overflow: str = Overflow.SATURATE,
    input_dtype: torch.dtype = torch.float32,
    level: str = "conditional",
    *,
    zero: str = "signed",
    subnormals: str = "kept",
    rule: str | None = None,
    claimed: str = Rounding.NEAREST_EVEN,
    takes: str = "tensor",
    gives: str = "values",
    bias: float = 0.0,
    device: str = "cpu",
) -> tuple[Format, dict[str, str]]:
    """What `verify` refuses before any work, refused; the format, and by which words it would judge."""
    f = get_format(format) if isinstance(format, str) else format
    asked = {"rounding": str(rounding), "overflow": str(overflow), "zero": zero, "subnormals": subnormals}
    if isinstance(f, ScaledFormat):
        asked["rule"] = rule or str(f.rule)
    if not 0 <= bias < 1:
        raise ValueError(f"bias is a share of the distance between neighbours, 0..1, got {bias}")
    _one_of("claimed", str(claimed), tuple(map(str, DETERMINISTIC)))
    _check(f, asked, input_dtype, level, takes, gives, device)
    return f, asked


def strongest_level(
    format: Format | str,  # noqa: A002 RUF100
    level: str,
    input_dtype: torch.dtype = torch.float32,
    rounding: str = Rounding.NEAREST_EVEN,
) -> str:
    """The level, or "conditional" for an exhaustive one where there is none: of scaled formats, FP64, stochastic rounding."""
    f = get_format(format) if isinstance(format, str) else format
    unending = isinstance(f, ScaledFormat) or input_dtype == torch.float64 or str(rounding) == STOCHASTIC
    return "conditional" if level == "exhaustive" and unending else level


class _Outcome(NamedTuple):
    """What a report says of a judgement."""

    checked: int
    wrong: int
    failures: tuple[Failure, ...]
    laws: list[Verdict]
    asked: dict[str, str]
    conventions: dict[str, str]
    level: str
    proves: str


def _elements(
    caller: Caller, f: ElementFormat, asked: dict[str, str], claimed: str, dtype: torch.dtype, level: str,
    bias: float, progress: Progress | None,
) -> _Outcome:  # fmt: skip
    conventions = find_conventions(caller, f, dtype, claimed)
    overflow = str(Overflow.NONSATURATING if f.has_inf else Overflow.SATURATE)
    judged = _judged_by(asked, conventions._asdict(), claimed, {"overflow": overflow})
    question = Question(f, **judged)
    if question.rounding == STOCHASTIC:
        return _chance(caller, question, judged, conventions, dtype, level, bias)
    x = decision_inputs(f, dtype, QUICK_POINTS if level == "quick" else None)
    if level == "quick":
        found = searched(caller, question, dtype)
        x = torch.cat([x, found[~torch.isin(found.view(INTEGERS[dtype]), x.view(INTEGERS[dtype]))]])
    elif level == "exhaustive" and dtype in (torch.bfloat16, torch.float16):
        x = from_codes(np.arange(1 << 16), dtype)
    got = caller(x)
    answered = np.flatnonzero(~caller.unanswered.numpy())
    x, got = x[answered], got[answered]
    wrong = find_broken(question, x, got)
    listed = failures(question, x, got, wrong)
    laws = verdicts(caller, question, x, got, wrong)
    checked, count = len(x), len(wrong)
    if level == "exhaustive" and dtype == torch.float32 and len(x):
        checked, swept = all_fp32(caller, question, progress)
        count = sum(failed for law, (failed, _) in swept.items() if law in OF_INPUTS)
        laws = [with_all(verdict, swept, question, checked) for verdict in laws]
        more = {w.input_bits: w for w in (*listed, *(w for _, w in swept.values() if w))}
        listed = tuple(sorted(more.values(), key=size))[:MAX_LISTED]
    laws = _all(caller, checked, laws)
    return _Outcome(checked, count, listed, laws, judged, conventions._asdict(), level, PROVES[level])


def _chance(
    caller: Caller, question: Question, judged: dict[str, str], conventions: Conventions, dtype: torch.dtype, level: str,
    bias: float,
) -> _Outcome:  # fmt: skip
    level = strongest_level(question.f, level, dtype, STOCHASTIC)  # it may have been found to be stochastic
    checked, laws = judge_chance(caller, question, dtype, level, bias)
    laws = _all(caller, checked, laws)
    listed = tuple(verdict.smallest for verdict in laws if verdict.smallest)
    count = sum(verdict.failed for verdict in laws if verdict.law in ("rounding", "idempotent", "nan", "infinity"))
    return _Outcome(checked, count, listed, laws, judged, conventions._asdict(), level, PROVES_OF_CHANCE[level])


def _decoder(caller: Caller, f: ElementFormat, asked: dict[str, str], level: str) -> _Outcome:
    checked, laws = judge_decoder(caller, f)
    laws = _all(caller, checked, laws)
    listed = tuple(verdict.smallest for verdict in laws if verdict.smallest)
    count = sum(verdict.failed for verdict in laws if verdict.law == "round_trip")
    return _Outcome(checked, count, listed, laws, asked, {}, level, PROVES_OF_DECODERS[level])


def _blocks(
    caller: BlockCaller, f: ScaledFormat, asked: dict[str, str], claimed: str, dtype: torch.dtype, level: str
) -> _Outcome:
    conventions = find_block_conventions(caller, f, dtype)
    judged = _judged_by(
        asked, conventions._asdict(), claimed, {"overflow": str(Overflow.SATURATE), "rule": str(f.rule)}
    )
    described = f.with_rule(judged["rule"])
    question = BlockQuestion(described, judged["rounding"], judged["overflow"], judged["zero"], judged["subnormals"])
    batches = decision_blocks(described, dtype, level)
    if level == "quick":
        batches += searched_blocks(caller, question, dtype)
    checked, count, laws = judge(caller, question, batches)
    laws = _all(caller, checked, laws)
    listed = tuple(verdict.smallest for verdict in laws if verdict.smallest)
    return _Outcome(checked, count, listed, laws, judged, conventions._asdict(), level, PROVES_OF_BLOCKS[level])


def _all(caller: Caller, checked: int, laws: list[Verdict]) -> list[Verdict]:
    """With `interface`, once nothing is called any more, and the laws that there was nothing to say of."""
    laws = [interface(caller, checked), *laws]
    named = {verdict.law for verdict in laws}
    return [*laws, *(not_applicable(law) for law in LAWS if law not in named)]


def _judged_by(asked: dict[str, str], found: dict[str, str], claimed: str, otherwise: dict[str, str]) -> dict[str, str]:
    """What was asked for, or what was found, where that has a name."""
    otherwise = {"rounding": str(claimed), "zero": "signed", "subnormals": "kept"} | otherwise
    named = {name: word for name, word in found.items() if word not in ("other", "none")}
    return {name: named.get(name, otherwise[name]) if word == FOUND else word for name, word in asked.items()}


def _check(
    f: Format, asked: dict[str, str], dtype: torch.dtype, level: str, takes: str, gives: str, device: str
) -> None:
    """ValueError for what there is no proof for, or no such thing."""
    _one_of("level", level, tuple(PROVES))
    roundings = (
        (*map(str, DETERMINISTIC), FOUND)
        if isinstance(f, ScaledFormat)
        else (*map(str, DETERMINISTIC), STOCHASTIC, FOUND)
    )
    _one_of("rounding", asked["rounding"], roundings)
    _one_of("overflow", asked["overflow"], (*map(str, Overflow), FOUND))
    _one_of("zero", asked["zero"], (*ZEROS, FOUND))
    _one_of("subnormals", asked["subnormals"], (*SUBNORMALS, FOUND))
    _one_of("takes", takes, TAKES)
    _one_of("gives", gives, GIVES)
    if device != "cpu" and not torch.cuda.is_available():
        raise ValueError(f"device must be cpu here, got {device}: there is no CUDA device")
    if device != "cpu" and takes == "array":
        raise ValueError("arrays lie in the host's memory: device must be cpu where takes is 'array'")
    if isinstance(f, ScaledFormat):
        _check_blocks(f, asked, dtype, level, takes)
        return
    assert isinstance(f, ElementFormat)
    if asked["overflow"] != FOUND:
        check_overflow(f.name, f.has_inf, f.has_nan, Overflow(asked["overflow"]))
    if f.bits > oracle.MAX_BITS:
        raise ValueError(f"{f.name}: every level lists every value, so at most {oracle.MAX_BITS} bits, got {f.bits}")
    if takes == "codes":
        if gives == "codes":
            raise ValueError("what takes codes gives values: gives must be 'values'")
        return
    if dtype not in CARRIERS:
        names = ", ".join(_name(carrier) for carrier in CARRIERS)
        raise ValueError(f"input_dtype must be one of {names}, got {_name(dtype)}")
    if not float_format(CARRIERS[dtype]).holds(f):
        raise ValueError(f"{f.name} does not fit {_name(dtype)}, so no tensor of it can be right")
    if level == "exhaustive" and dtype == torch.float64:
        raise ValueError("2^64 inputs can't all be asked: for float64 the levels are quick and conditional")
    if level == "exhaustive" and asked["rounding"] == STOCHASTIC:
        raise ValueError("stochastic results can't all be asked: for them the levels are quick and conditional")


def _check_blocks(f: ScaledFormat, asked: dict[str, str], dtype: torch.dtype, level: str, takes: str) -> None:
    if takes == "codes":
        raise ValueError(f"{f.name}: decoders are judged of element formats, such as {f.element.name}")
    if dtype not in BLOCK_DTYPES:
        names = ", ".join(_name(known) for known in BLOCK_DTYPES)
        raise ValueError(f"input_dtype must be one of {names} for scaled formats, got {_name(dtype)}")
    if level == "exhaustive":
        raise ValueError(
            f"{f.name}: all blocks can't be asked: for scaled formats the levels are quick and conditional"
        )
    if f.element.bits > MAX_ELEMENT_BITS:
        raise ValueError(f"{f.name}: elements have at most {MAX_ELEMENT_BITS} bits here, got {f.element.bits}")
    if asked["rule"] != FOUND:
        _one_of("rule", asked["rule"], (*map(str, rules_for(f.scale)), FOUND))


def _one_of(what: str, word: str, known: tuple[str, ...]) -> None:
    if word not in known:
        raise ValueError(f"{what} must be one of {', '.join(known)}, got {word!r}")


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
