"""Probes find out what a made-up matrix unit does to its sums, and say so where they can't tell."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks.tensor_core_probes import Product, exponents, probe
from formats import quantize
from train.accumulate import NAMED, accumulated_product, parse_accumulation

SMALLEST = torch.tensor(2.0**-6)  # of e4m3fn's normal numbers


def unit(word: str, smallest: Tensor | None = SMALLEST) -> Product:
    """A matrix unit that sums as the word says, and takes e4m3fn operands alone."""
    accumulation = parse_accumulation(word)
    assert accumulation is not None

    def multiply(a: Tensor, b: Tensor) -> Tensor:
        assert all(torch.equal(operand, quantize(operand, "e4m3fn")) for operand in (a, b))
        return accumulated_product(a[None], b[None], accumulation, smallest, smallest)[0]

    return multiply


@pytest.mark.parametrize(
    "word",
    [
        *(accumulation.name for accumulation in NAMED.values()), "k16p14a13:toward_zero", "k64p16a13f256:toward_zero",
        "k32p12a13:nearest_even", "k32p24a25:toward_zero", "k32p14:toward_zero", "k32p11:nearest_even",
        "k16p24:nearest_even", "k128p14f128:toward_zero",
    ],
)  # fmt: skip
def test_probes_recover_what_a_unit_was_made_with(word: str) -> None:
    answers = probe(unit(word))
    assert answers["accumulate"] == word
    assert answers["chunk_is_contiguous"]
    assert answers.get("accumulator_aligned", True)


def test_an_output_in_bf16_tells_all_but_the_registers_width() -> None:
    multiply = unit("hopper-fp8-promoted")
    answers = probe(lambda a, b: multiply(a, b).bfloat16().float())
    assert (answers["fraction_bits"], answers["chunk"], answers["promotion"]["8192"]) == (13, 32, 128)
    assert answers["significand_bits"] == 8


def test_the_convention_of_exponents_is_told_apart() -> None:
    assert exponents(unit("hopper-fp8"), 13) == {
        "product": "sum of the operands'",
        "subnormal": "the smallest normal's",
    }
    assert exponents(unit("hopper-fp8", None), 13)["subnormal"] == "its own"

    def normalised(a: Tensor, b: Tensor) -> Tensor:
        """A unit that takes each product's own exponent: products come in as one operand, the other is 1."""
        terms = (a[:, :, None] * b[None]).permute(0, 2, 1).reshape(1, -1, a.shape[1])
        accumulation = NAMED["hopper-fp8"]
        sums = [accumulated_product(row[None, None], torch.ones(1, a.shape[1], 1), accumulation) for row in terms[0]]
        return torch.stack(sums).view(a.shape[0], b.shape[1])

    assert exponents(normalised, 13)["product"] == "the product's own"


def interleaved(a: Tensor, b: Tensor) -> Tensor:
    """Even places of 64 first, then odd ones."""
    order = torch.arange(a.shape[1]).view(-1, 32, 2).transpose(1, 2).flatten()
    return unit("hopper-fp8")(a[:, order], b[order])


def cut_in_four(a: Tensor, b: Tensor) -> Tensor:
    """K in four parts, as a library with too few tiles for its units does, and FP32 sums of them."""
    parts = zip(a.chunk(4, 1), b.chunk(4, 0), strict=True)
    return torch.stack([unit("hopper-fp8")(x.contiguous(), w.contiguous()) for x, w in parts]).sum(0)


def aligned_apart(a: Tensor, b: Tensor) -> Tensor:
    """Chunks aligned among themselves, and added to an accumulator that is not one of their terms."""
    total = torch.zeros(a.shape[0], b.shape[1])
    for x, w in zip(a.split(32, 1), b.split(32, 0), strict=True):
        total = total + unit("hopper-fp8")(x.contiguous(), w.contiguous())
    return total


def away(a: Tensor, b: Tensor) -> Tensor:
    """Exact sums, rounded to 14 bits to nearest with ties away from zero."""
    return quantize(a.double() @ b.double(), "e8m13", "nearest_away").float()


@pytest.mark.parametrize(
    ("multiply", "answer"),
    [
        (interleaved, {"chunk_is_contiguous": False, "accumulate": None}),
        (cut_in_four, {"promotion": {"512": 128, "2048": 512, "8192": 2048}, "accumulate": None}),
        (aligned_apart, {"accumulator_aligned": False, "accumulate": None}),
        (away, {"rounding": "nearest_away", "chunk": None, "accumulate": None}),
        (lambda a, b: a @ b, {"fraction_bits": None, "significand_bits": 24}),
        (lambda a, b: torch.zeros(a.shape[0], b.shape[1]), {"significand_bits": None, "accumulate": None}),
    ],
)
def test_a_unit_of_another_kind_is_not_taken_for_a_known_one(multiply: Product, answer: dict[str, Any]) -> None:
    answers = probe(multiply)
    assert answers | answer == answers
