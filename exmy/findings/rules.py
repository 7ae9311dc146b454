"""What is said of a claim: its rule, which finding it is about, whether it came as expected, and what it leaves open."""

from __future__ import annotations

import math

from exmy.findings.numbers import losses, spread
from exmy.findings.studies import Evidence, axis_words
from exmy.findings.tables import rate_words
from exmy.findings.text import FINDINGS
from train.claims import UNITS, Claim, Claims, Judged
from train.optimum import optimum
from train.window import MARGIN

STATISTICS = {
    "divergence": "the share of runs that diverge",
    "loss": "the final training loss (the initial one where that is lower, or the final one not finite)",
    "window": "the stable window of learning rates, in octaves",
    "sensitivity": "LR sensitivity over the grid of learning rates",
    "optimum_shift": "the best learning rate, in octaves",
}


def as_expected(of: Judged) -> str:
    """Whether a claim came as its file said that we expected, or how it came."""
    if of.state == "not tested":
        return "–"
    shown = of.state == "supported"
    return "yes" if shown == of.claim.expected else f"**no**, {'not shown' if of.state == 'undecided' else of.state}"


def left_open(of: Judged) -> str:
    """Of a claim that is not decided, how large an effect its interval leaves."""
    if of.state != "undecided" or of.claim.expect == "alike":
        return ""
    most = of.high if of.claim.expect == "higher" else of.low
    return f"; an effect beyond {most:+.3f} {UNITS[of.claim.statistic]} is excluded" if math.isfinite(most) else ""


def finding_of(claim: Claim) -> str | None:
    """Which finding a claim is about, by its name; None where it is about none."""
    first = claim.name.partition("-")[0]
    return next((finding.key for finding in FINDINGS if first == finding.key or claim.name in finding.also), None)


def rule(claim: Claim, claims: Claims) -> str:
    """A claim's rule in a sentence."""
    at = ""
    if claim.statistic in ("divergence", "loss"):
        where = (
            rate_words(claim.learning_rate) if claim.learning_rate else f"the rate that is best for `{claim.baseline}`"
        )
        at = f", at {where}, in pairs of the same seed"
    if claim.statistic == "window":
        at = f", within {claim.loss_margin or MARGIN:g} nats/token of the recipe's own best"
    group = "".join(f", {axis_words(axis, value)}" for axis, value in claim.where.items())
    if claim.beyond:
        elsewhere = ", ".join(axis_words(axis, value) for axis, value in claim.beyond.items())
        group += f", less the same at {elsewhere} on the same seeds"
    if claim.expect == "alike":
        test = f"supported if shown to differ by less than {claim.margin:g}, refuted if shown to differ by more"
    else:
        other = {"higher": "lower", "lower": "higher"}[claim.expect]
        test = f"supported if shown to be {claim.expect}, refuted if shown to be {other}"
    looks = ", ".join(map(str, claim.looks))
    doubt = "" if claim.expected else " We expect it not to be supported here."
    return (
        f"{STATISTICS[claim.statistic]}{at}, of `{claim.recipe}` against `{claim.baseline}`{group}: {test}, with p at most "
        f"{claims.alpha:g} after Holm's adjustment for all {len(claims.claims)} claims; looked at with {looks} seeds, and "
        f"at no other number.{doubt}"
    )


def past_best(of: Judged, evidence: Evidence | str) -> str:
    """Of losses that don't decide, compared at a rate beyond the baseline's best, at which it does worse: by how much."""
    claim = of.claim
    if (
        not isinstance(evidence, Evidence)
        or of.state != "undecided"
        or claim.statistic != "loss"
        or not claim.learning_rate
    ):
        return ""
    for part in evidence.parts:
        if claim.where.items() <= part.where.items() and claim.baseline in part.recipes:
            best = optimum(part.grid, claim.baseline)
            here, there = (spread(losses(part, claim.baseline, rate)).median for rate in (claim.learning_rate, best))
            if claim.learning_rate > best and here > there + MARGIN:
                return (
                    f" At this rate `{claim.baseline}` itself ends {here - there:+.3f} nats/token above its best, at "
                    f"{rate_words(best)}: it was chosen badly."
                )
    return ""
