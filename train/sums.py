"""The words for how sums are formed, apart from the sums themselves, which are `accumulate`'s and need torch."""

from __future__ import annotations

import re
from dataclasses import dataclass

from formats import Rounding

CARRIER_SUMS = "fp32"
ROUNDINGS = (Rounding.TOWARD_ZERO, Rounding.NEAREST_EVEN)
CHUNKS, SIGNIFICANDS, FRACTIONS = (1, 4096), (2, 24), (1, 30)
WORD = re.compile(r"k(\d+)p(\d+)(?:a(\d+))?(?:f(\d+))?:([a-z_]+)")


@dataclass(frozen=True)
class Accumulation:
    """Chunks of `chunk` products, an accumulator of `significand_bits` (the leading one included) rounded by `rounding`.

    `fraction_bits`: to how many a chunk's terms are aligned and cut, None where it is summed exactly. `promote`: after how many
    products the accumulator goes to an FP32 total, None for never. ValueError, in one line, for what can't be.
    """

    chunk: int
    significand_bits: int
    rounding: Rounding
    fraction_bits: int | None = None
    promote: int | None = None

    def __post_init__(self) -> None:
        self._within("k (products in a chunk)", self.chunk, CHUNKS)
        self._within("p (significand bits)", self.significand_bits, SIGNIFICANDS)
        if self.fraction_bits is not None:
            self._within("a (aligned fraction bits)", self.fraction_bits, FRACTIONS)
        if self.rounding not in ROUNDINGS:
            raise ValueError(f"an accumulator rounds by {' or '.join(ROUNDINGS)}, got {str(self.rounding)!r}")
        if self.promote is not None and (self.promote < 1 or self.promote % self.chunk):
            raise ValueError(f"f (promotion) must be a multiple of the chunk, {self.chunk}, got {self.promote}")

    @staticmethod
    def _within(what: str, value: int, limits: tuple[int, int]) -> None:
        if not limits[0] <= value <= limits[1]:
            raise ValueError(f"{what} must be {limits[0]}..{limits[1]}, got {value}")

    @property
    def name(self) -> str:
        """The compact word, "k32p14a13f128:toward_zero"; `parse_accumulation` reads it back."""
        aligned = "" if self.fraction_bits is None else f"a{self.fraction_bits}"
        promoted = "" if self.promote is None else f"f{self.promote}"
        return f"k{self.chunk}p{self.significand_bits}{aligned}{promoted}:{self.rounding.value}"

    @property
    def description(self) -> str:
        """What follows "summed" in a sentence."""
        chunks = (
            f"in chunks of {self.chunk} into {self.significand_bits} significant bits by {self.rounding.value}"
            if self.fraction_bits is None
            else f"in chunks of {self.chunk}, aligned to {self.fraction_bits} fraction bits, into {self.significand_bits} "
            f"significant bits by {self.rounding.value}"
        )
        return chunks if self.promote is None else f"{chunks}, promoted to FP32 every {self.promote}"

    @property
    def step(self) -> int:
        """A sum may be interrupted after multiples of so many products, and go on from its FP32 value."""
        return self.promote or self.chunk


NAMED = {
    "hopper-fp8": Accumulation(32, 14, Rounding.TOWARD_ZERO, fraction_bits=13),
    "hopper-fp8-promoted": Accumulation(32, 14, Rounding.TOWARD_ZERO, fraction_bits=13, promote=128),
}


def parse_accumulation(word: str | None) -> Accumulation | None:
    """The accumulation that a word names; None for "fp32", the carrier's own sums, and for None.

    A word is a name of `NAMED` or k{chunk}p{bits}[a{fraction bits}][f{promotion}]:{rounding}, such as "k32p14:toward_zero".
    ValueError otherwise.
    """
    if word is None or word == CARRIER_SUMS:
        return None
    if word in NAMED:
        return NAMED[word]
    parts = WORD.fullmatch(word)
    if parts is None:
        raise ValueError(
            f"accumulate {word!r} is none of {CARRIER_SUMS}, {', '.join(NAMED)} and "
            "k<chunk>p<bits>[a<bits>][f<every>]:<rounding>, such as 'k32p14:toward_zero'"
        )
    chunk, bits, fraction, promote, rounding = parts.groups()
    if rounding not in list(ROUNDINGS):
        raise ValueError(f"accumulate {word!r}: the rounding must be {' or '.join(ROUNDINGS)}, got {rounding!r}")
    try:
        return Accumulation(
            int(chunk), int(bits), Rounding(rounding), int(fraction) if fraction else None, int(promote) if promote else None
        )  # fmt: skip
    except ValueError as error:
        raise ValueError(f"accumulate {word!r}: {error}") from None
