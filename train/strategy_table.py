"""[strategy]: how a study chooses its runs. `grid`, the default, takes all that the file multiplies out to.

A word that another kind of strategy has is refused, so that nothing that was written is without effect.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal, get_args

from pydantic import Field, field_validator, model_validator

from train.settings import Share, Table

Kind = Literal["grid", "bisect", "seeds"]
Spending = Literal["obrien-fleming", "pocock"]
Outcome = Literal["divergence", "loss"]
KINDS: tuple[Kind, ...] = get_args(Kind)
WORDS: dict[str, tuple[str, ...]] = {
    "grid": (),
    "bisect": ("per_octave", "allowed", "points", "octaves", "rounds"),
    "seeds": ("looks", "alpha", "spending", "outcome"),
}


class StrategyTable(Table):
    """[strategy], by kind.

    kind            all runs of the file; a search for the largest stable rate; or seeds in planned looks
    bisect: the largest stable learning rate of every recipe, by rounds of packs (see `bisect`)
        per_octave  learning rates of the lattice 2^(k / per_octave) in an octave: 4 for a quarter octave
        allowed     a rate is stable where at most this share of its seeds diverged
        points      learning rates a round of each search; "auto" for as many as fill a pack
        octaves     how far beyond the study's own learning rates it may look, on either side
        rounds      after how many rounds it gives up
    seeds: more seeds, in looks that are planned beforehand (see `sequential`), each as many as `axes.seed` has
        looks       at most; the study's plan: it may end before, and never goes on after
        alpha       chance of any false finding in the whole study, two-sided
        spending    how much of alpha each look may use: little of it early, or about alike
        outcome     what is held against the baseline, pair by pair: whether runs diverged, or their final losses
    """

    kind: Kind = "grid"
    per_octave: Annotated[int, Field(ge=1, le=64)] = 4
    allowed: Annotated[Share, Field(lt=1)] = 0.0
    points: Literal["auto"] | int = "auto"
    octaves: Annotated[int, Field(ge=0, le=32)] = 8
    rounds: Annotated[int, Field(ge=1, le=100)] = 20
    looks: Annotated[int, Field(ge=1, le=100)] = 4
    alpha: Annotated[float, Field(ge=1e-6, le=0.5)] = 0.05
    spending: Spending = "obrien-fleming"
    outcome: Outcome = "divergence"

    @field_validator("points")
    @classmethod
    def _some_points(cls, points: Literal["auto"] | int) -> Literal["auto"] | int:
        if points != "auto" and not 1 <= points <= 64:
            raise ValueError(f'points must be "auto" or from 1 to 64, got {points}')
        return points

    @model_validator(mode="after")
    def _of_its_kind(self) -> StrategyTable:
        for word in sorted(self.model_fields_set - {"kind", *WORDS[self.kind]}):
            of = next(kind for kind, words in WORDS.items() if word in words)
            raise ValueError(f"{word} is a word of kind = {of!r}, and kind is {self.kind!r}: leave it out")
        return self

    def as_table(self) -> dict[str, Any]:
        """As a study file has it, with every default; nothing for a grid, as files of before."""
        return {} if self.kind == "grid" else {key: getattr(self, key) for key in ("kind", *WORDS[self.kind])}
