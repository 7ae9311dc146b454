"""The second half of the findings' page: its own claims, with an alpha of their own, its studies, and what warns early."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path

from exmy.busy import busy
from exmy.findings import sharpness_part
from exmy.findings.beyond import LEVEL, TITLE
from exmy.findings.block import block, command
from exmy.findings.canvas import Drawing
from exmy.findings.contrast import at_other_rates, told, validation_of
from exmy.findings.page import Findings, Pictures, shown
from exmy.findings.second_beyond import BEYOND, of_natives
from exmy.findings.second_figures import cost_drawings
from exmy.findings.second_short import came, in_short
from exmy.findings.second_text import SECOND
from exmy.findings.studies import Available, Evidence, load
from exmy.findings.tables import condition_table, rate_words
from exmy.findings.text import Finding
from exmy.findings.warnings_part import CHOSEN, UNSEEN, WHOLE, Ranked, alarm_drawing, part, ranked
from train.claims import Claims, Judged
from train.paired import Difference

STUDIES = (*dict.fromkeys(section for finding in SECOND for section in finding.sections), *UNSEEN)


def second_studies(results: Path) -> dict[str, Evidence | str]:
    """Those that the second half is about."""
    with busy("reading the second half's studies"):
        return {name: load(results, name) for name in STUDIES}


def rankings(studies: Available) -> dict[str, Ranked]:
    """The alarms of the studies that have them, ranked."""
    found = {}
    for name in (CHOSEN, WHOLE):
        with busy(f"ranking the alarms of {name}"):
            of = ranked(studies, name)
        if of is not None:
            found[name] = of
    return found


def rates_of(name: str, claims: Claims, evidence: Evidence) -> list[float]:
    """The rates that a study's claims are about; all of its rates where no claim names one."""
    named = {claim.learning_rate for claim in claims.claims if claim.study == name and claim.learning_rate is not None}
    return sorted(named or {rate for part in evidence.parts for rate in part.rates})


def second_drawings(studies: Available, claims: Claims, alarms: Mapping[str, Ranked]) -> Iterator[Drawing]:
    """In the order of the page; none of what is not there."""
    for name in STUDIES:
        evidence = studies[name]
        if name in alarms and alarms[name].table.sizes["signal"]:
            yield alarm_drawing(alarms[name])
        elif isinstance(evidence, Evidence) and name not in (CHOSEN, WHOLE, *UNSEEN):
            yield from cost_drawings(evidence, rates_of(name, claims, evidence))


class SecondHalf(Findings):
    """What its part of the page is made of; studies: of both halves, since what differs here may be tried there."""

    def __init__(
        self, studies: Available, claims: Claims, judged: Sequence[Judged], reasons: Mapping[str, str], pictures: Pictures,
        alarms: Mapping[str, Ranked],
    ) -> None:  # fmt: skip
        super().__init__(studies, claims, judged, reasons, pictures)
        self.alarms = alarms
        there = {name: of for name in STUDIES if isinstance(of := studies[name], Evidence)}
        self.rates = {name: rates_of(name, claims, of) for name, of in there.items()}

    def part(self) -> Iterator[str]:
        """All of it, in Markdown."""
        yield "## The second half"
        yield ""
        yield (
            "FP8 as people use it, remedies, texts, schedules, optimisers and what warns. Its "
            f"{len(self.claims.claims)} claims, in "
            f"`studies/claims-second.toml`, have an alpha of their own, {100 * self.claims.alpha:g} %, by Holm for "
            "them alone, so that "
            "of both files together the chance of any wrong verdict is as large as both alphas."
        )
        yield ""
        there = [name for name in STUDIES if isinstance(self.studies[name], Evidence)]
        yield f"Studies of it that are here: {', '.join(f'`{name}`' for name in there) or 'none'}."
        missing = [f"`{name}` ({self.studies[name]})" for name in STUDIES if name not in there]
        yield f"Not here: {', '.join(missing)}." if missing else "None of them is missing."
        yield ""
        short = [self._short(name, words) for name, words in in_short(self.studies, self.rates, self.alarms)]
        if short:
            yield from ("### The second half in short", "", *short, "")
        yield from ("### The second half's claims", "")
        yield from self._table(SECOND)
        yield ""
        yield self._surprises()
        yield ""
        for finding in SECOND:
            yield from self._finding(finding)
            yield ""

    def _unclaimed(self, finding: Finding) -> list[str]:
        """The row of a finding that no claim is about: of warnings, what came out at the top."""
        study = finding.sections[0]
        of = self.alarms.get(study)
        if of is None or of.best is None:
            found = self.studies[study]
            return ["no claim", f"`{study}`", "–", "–", "described" if isinstance(found, Evidence) else str(found), "–"]
        row = of.table.isel(signal=0)
        words = "no claim, a ranking: the best is " + f"`{of.best.name}`" + (", falling" if of.best.below else "")
        value, low, high = (float(row[f"auroc{end}"]) for end in ("", "_low", "_high"))
        measured = f"AUROC {value:.3f}" + (f" [{low:.3f}, {high:.3f}]" if math.isfinite(low) else "")
        return [words, f"`{study}`", measured, str(of.table.attrs["seeds_scored_on"]), "described", "–"]

    def _short(self, name: str, words: str) -> str:
        about = ", ".join(finding.key[0].upper() + finding.key[1:] for finding in SECOND if name in finding.sections)
        found = self.studies[name]
        by = str(found.summary["diverged"].attrs["definition"]) if isinstance(found, Evidence) else ""
        return f"- **{about}**, study [`{name}`](#study-{name}), in which runs fail by `{by}`. {words}"

    def _surprises(self) -> str:
        """The same as of the first half; and which claims were refuted, which the file does not tell from not shown."""
        refuted = [f"`{of.claim.name}`" for of in self.judged if of.state == "refuted"]
        unclear = [of for of in self.judged if not of.claim.expected]
        words = super()._surprises()
        if unclear:
            words += (
                f" Of {len(unclear)} claims the file expects that they won't be supported; it tells neither what we "
                "thought false from what "
                "we could not foresee, nor not shown from refuted."
            )
        if refuted:
            words += f" Refuted, so that the contrary is shown, are {', '.join(refuted)}."
        turned = [f"`{of.claim.name}` at {_listed(rates)}" for of in self.judged if (rates := self._turned(of))]
        if turned:
            words += (
                f" A verdict is of its rule's rate: of {sum(map(len, self._others.values()))} looks at the same contrast at "
                "other rates, where no rule looks, these show the other way round (Bonferroni over all of them): "
                f"{', '.join(turned)}."
            )
        return words

    def _result(self, of: Judged) -> str:
        """With what the validation loss says of the same contrast: rules are of the training loss, tables and figures of that."""
        words, evidence = super()._result(of), self.studies[of.claim.study]
        if of.claim.name in self.reasons or not isinstance(evidence, Evidence):
            return words
        other = validation_of(of, evidence)
        if other is None or not math.isfinite(other.mean):
            return words
        here, there = (x.low > 0 or x.high < 0 for x in (of, other))
        odd = ", and whose interval has zero in it" if here and not there else ""
        odd = ", and whose interval has no zero in it" if there and not here else odd
        odd = ", and which is of the other sign" if here and there and (of.effect > 0) != (other.mean > 0) else odd
        return (
            f"{words} That is the training loss; in validation loss the same is {told(other)} (95 %, Student's), by "
            "which no rule "
            f"decides{odd if of.claim.expect != 'alike' else ''}." + self._at_other_rates(of)
        )

    @cached_property
    def _others(self) -> Mapping[str, Sequence[tuple[float, Difference]]]:
        """Of each claim its own contrast at the rates where its rule does not look."""
        found = {}
        for of in self.judged:
            evidence = self.studies[of.claim.study]
            if isinstance(evidence, Evidence) and of.claim.name not in self.reasons:
                found[of.claim.name] = at_other_rates(of, evidence)
        return found

    def _turned(self, of: Judged) -> list[float]:
        """Rates at which what was decided is shown to be the other way round, over all contrasts at other rates (Bonferroni)."""
        if of.claim.expect == "alike" or of.state not in ("supported", "refuted"):
            return []
        looks = sum(map(len, self._others.values()))
        return [
            rate
            for rate, there in self._others.get(of.claim.name, ())
            if there.p <= LEVEL / looks and (there.mean > 0) != (of.effect > 0)
        ]

    def _at_other_rates(self, of: Judged) -> str:
        """The same contrast where the rule does not look; and whether it turns round there."""
        found = self._others.get(of.claim.name, ())
        if not found:
            return ""
        where = "at one rate for all" if of.claim.learning_rate is None else "at the study's other rates"
        each = ", ".join(f"{told(there)} at {rate_words(rate)}" for rate, there in found)
        words = f" Training losses {where}, where no rule looks: {each} (95 %, each for itself)."
        turned = self._turned(of)
        if turned:
            words += f" **At {_listed(turned)} it is the other way round**, so that the verdict is of the rule's rate."
        decided = of.claim.expect != "alike" and of.state in ("supported", "refuted")
        rest = [
            rate
            for rate, there in found
            if decided and rate not in turned and (there.low <= 0 <= there.high or (there.mean > 0) != (of.effect > 0))
        ]
        if rest:
            words += f" At {_listed(rest)} the same is not shown."
        return words

    def _tried(self, study: str) -> str:
        words = came(self.studies, study, self.rates)
        return f" (tried in [`{study}`](#study-{study}): {words})" if words else super()._tried(study)

    def _of(self, finding: Finding) -> list[Judged]:
        return [of for of in self.judged if of.claim.name.partition("-")[0] == finding.key]

    def _section(self, section: str, finding: Finding) -> Iterator[str]:
        if section == CHOSEN and isinstance(of_bits := self.studies.get(sharpness_part.STUDY), Evidence):
            yield from sharpness_part.sharpness_by_bits(of_bits)
        found = self.studies[section]
        first = next(of for of in SECOND if section in of.sections) is finding
        if not first:
            yield f"Of [study `{section}`](#study-{section})."
            yield ""
            return
        yield f"### Study `{section}`"
        yield ""
        if not isinstance(found, Evidence):
            yield f"`{section}`: {found}. When it has: `{command(section)}`, then `make figures`."
            yield ""
            return
        yield from block(found)
        yield ""
        yield from shown(self.pictures.get(section, ()))
        if section in self.alarms:
            yield from part(self.alarms[section], self.studies)
        else:
            yield from self._costs(section, found)
        yield ""

    def _costs(self, name: str, evidence: Evidence) -> Iterator[str]:
        """What each recipe costs, at the rates that claims are about."""
        if isinstance(evidence.comparison, str):
            yield f"No comparison: {evidence.comparison}."
            return
        rates = rates_of(name, self.claims, evidence)
        yield from condition_table(evidence, rates)
        yield ""
        every = sorted({rate for part in evidence.parts for rate in part.rates})
        rest = [rate_words(rate) for rate in every if rate not in rates]
        yield (
            f"Final validation losses, each against `{evidence.baseline}` in the same setting and at the same "
            "rate; Student's intervals "
            "over pairs of the same seed, Holm over all rows of the study"
            + (
                f", of which those at {', '.join(rest)}, which no claim is about, are in the dataset alone."
                if rest
                else "."
            )
        )
        yield ""
        more = list(BEYOND[name](evidence, rates)) if name in BEYOND else []
        if name == "hardware" and isinstance(seeds := self.studies.get("seeds"), Evidence):
            more.extend(of_natives(evidence, seeds))
        if any(more):
            yield from (TITLE, "", *more)


def _listed(rates: Sequence[float]) -> str:
    return " and ".join(map(rate_words, rates))
