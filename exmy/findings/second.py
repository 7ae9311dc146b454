"""The second half of the findings' page: its own claims, with an alpha of their own, its studies, and what warns early."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from exmy.busy import busy
from exmy.findings import sharpness_part
from exmy.findings.block import block, command
from exmy.findings.canvas import Drawing
from exmy.findings.page import Findings, Pictures, anchor, heading, shown
from exmy.findings.second_figures import cost_drawings
from exmy.findings.second_text import SECOND
from exmy.findings.studies import Available, Evidence, load
from exmy.findings.tables import condition_table, line, rate_words
from exmy.findings.text import Finding
from exmy.findings.warnings_part import CHOSEN, UNSEEN, WHOLE, Ranked, alarm_drawing, part, ranked
from train.claims import Claims, Judged

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

    def part(self) -> Iterator[str]:
        """All of it, in Markdown."""
        yield "## The second half"
        yield ""
        yield (
            "FP8 as people use it, remedies, texts, schedules, optimisers and what warns. Its "
            f"{len(self.claims.claims)} claims, in "
            f"`studies/claims-second.toml`, have an alpha of their own, {100 * self.claims.alpha:g} %, by Holm for them alone."
        )
        yield ""
        there = [name for name in STUDIES if isinstance(self.studies[name], Evidence)]
        yield f"Studies of it that are here: {', '.join(f'`{name}`' for name in there) or 'none'}."
        missing = [f"`{name}` ({self.studies[name]})" for name in STUDIES if name not in there]
        yield f"Not here: {', '.join(missing)}." if missing else "None of them is missing."
        yield ""
        headings = ("finding", "claim", "study", "effect [interval over all looks]", "seeds", "verdict")
        yield from (line(headings), line(["---"] * len(headings)))
        for finding in SECOND:
            first = f"[{finding.key}](#{anchor(heading(finding))})"
            own = self._of(finding)
            yield from (self._row(first, of) for of in own)
            if not own:
                yield line([first, *self._unclaimed(finding)])
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
            return ["no claim", f"`{study}`", "–", "–", "described" if isinstance(found, Evidence) else str(found)]
        row = of.table.isel(signal=0)
        words = "no claim, a ranking: the best is " + f"`{of.best.name}`" + (", falling" if of.best.below else "")
        value, low, high = (float(row[f"auroc{end}"]) for end in ("", "_low", "_high"))
        measured = f"AUROC {value:.3f}" + (f" [{low:.3f}, {high:.3f}]" if math.isfinite(low) else "")
        return [words, f"`{study}`", measured, str(of.table.attrs["seeds_scored_on"]), "described"]

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
