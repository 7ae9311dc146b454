"""The page of findings, put together: for each finding the paper's sentence, our claims with their rules and what came of them,
the studies' tables and figures, what would change our mind, and in what our setting differs.

Whatever is not there is said: a study that was not run, one under way, a claim that can't be judged yet and why.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import fields

from exmy.claims import effect, seeds
from exmy.compare_page import p_value
from exmy.findings import beyond
from exmy.findings.block import block, command
from exmy.findings.flushed import of_signals
from exmy.findings.numbers import has_signals
from exmy.findings.rules import as_expected, finding_of, left_open, past_best, rule
from exmy.findings.studies import STUDIES, Available, Evidence
from exmy.findings.summary import came, in_short
from exmy.findings.tables import (
    condition_table,
    divergence_words,
    endings_table,
    follows,
    line,
    loss_words,
    rate_words,
    recipe_table,
    rounding_table,
    seed_table,
    signal_table,
    size_table,
)
from exmy.findings.text import FINDINGS, OPEN, Finding
from train.claims import Claims, Judged
from train.stability import DEFINITIONS, VARIABLES, DivergenceSettings
from train.window import ALLOWED, MARGIN

PAPER = "Lee et al."  # how the source of a claim of the paper's begins
VERDICTS = {
    "supported": "**supported**",
    "refuted": "**refuted**",
    "undecided": "undecided",
    "not tested": "not yet run",
}
HEADINGS = ("finding", "claim", "study", "effect [interval over all looks]", "seeds", "verdict", "as we expected")
SECTIONS = {  # what a section shows, and of which study
    "seeds": "seeds", "mantissa": "mantissa", "conditions": "conditions", "exponent": "exponent", "endings": "exponent",
    "signals": "exponent", "rounding": "rounding", "scaling": "scaling", "size": "size",
}  # fmt: skip

Pictures = Mapping[str, Sequence[tuple[str, str]]]
"""Of a section, (alternative text, path from the page) of each figure."""


class Findings:
    """What the page is made of. reasons: of claims, by name, why they can't be judged although their study is there."""

    def __init__(
        self,
        studies: Available,
        claims: Claims,
        judged: Sequence[Judged],
        reasons: Mapping[str, str],
        pictures: Pictures,
    ) -> None:
        self.studies, self.claims, self.judged, self.reasons, self.pictures = studies, claims, judged, reasons, pictures

    def page(self, second: Sequence[str] = ()) -> str:
        """All of it, in Markdown; second: the lines of the second half, without which what it is about is said to be open."""
        lines = ["# Findings: what the paper said, and what came of it here", "", *self._head(), ""]
        for finding in FINDINGS:
            lines += [*self._finding(finding), ""]
        other = [of for of in self.judged if finding_of(of.claim) is None]
        if other:
            lines += ["## Further claims", "", *self._claims(other), ""]
        if not second:
            lines += ["## Still open", "", "Of a later study, not of these:", ""]
            lines += [f"- {key}: {words}" for key, words in OPEN.items()]
        lines += second
        return re.sub(r"\n{3,}", "\n\n", "\n".join(lines)) + "\n"

    def _head(self) -> Iterator[str]:
        yield (
            'Lee et al., "To FP8 and Back Again" (arXiv 2405.18710), say that a format is as good as the one it replaces '
            "only if it trains as stably. F1 to F7 are what they found, R1 to R7 what their reviewers asked. Every number, "
            "table and figure here is made by `make figures` from the datasets in `studies/results`; the claims and their "
            "rules, in `studies/claims.toml`, were written before the runs. How intervals and tests are made is on "
            "[the page on stability](stability.md)."
        )
        yield ""
        there = [name for name in STUDIES if isinstance(self.studies[name], Evidence)]
        missing = [f"`{name}` ({self.studies[name]})" for name in STUDIES if name not in there]
        yield f"Studies that are here: {', '.join(f'`{name}`' for name in there) or 'none'}."
        yield f"Not here: {', '.join(missing)}." if missing else "None is missing."
        yield ""
        short = [self._short(name, words) for name, words in in_short(self.studies)]
        if short:
            yield from ("## In short", "", *short, "", "## The claims", "")
        yield from self._table(FINDINGS)
        yield from (self._row("–", of) for of in self.judged if finding_of(of.claim) is None)
        yield ""
        yield self._surprises()
        yield ""
        yield (
            f"Verdicts are of p-values adjusted by Holm for all {len(self.claims.claims)} claims of the file, at "
            f"{100 * self.claims.alpha:g} % over all looks. Undecided is neither: what was claimed is not shown, nor its "
            "opposite, and the interval says what it may yet be. Elsewhere on this page intervals are 95 %, each for itself; "
            "learning rates are peak rates; a loss is in nats/token."
        )

        yield ""
        yield (
            "A run has diverged by the definition that its study's block names. Counts are of each of the four, as they stand by "
            "default:"
        )
        yield ""
        by_default = {field.name: field.default for field in fields(DivergenceSettings)} | {"baseline": "the baseline"}
        yield from (f"- `{name}`: {VARIABLES[name][2].format(**by_default)}" for name in DEFINITIONS)

    def _short(self, name: str, words: str) -> str:
        """What a study came to, with the findings that it is about, and by which definition its runs fail."""
        about = dict.fromkeys(of.key for of in FINDINGS for section in of.sections if SECTIONS[section] == name)
        found = self.studies[name]
        by = str(found.summary["diverged"].attrs["definition"]) if isinstance(found, Evidence) else ""
        keys = ", ".join(key[0].upper() + key[1:] for key in about)
        return f"- **{keys}**, study [`{name}`](#study-{name}), in which runs fail by `{by}`. {words}"

    def _table(self, findings: Sequence[Finding]) -> Iterator[str]:
        """What came of every claim, finding by finding; a finding without one has a row of its own."""
        yield from (line(HEADINGS), line(["---"] * len(HEADINGS)))
        for finding in findings:
            first = f"[{finding.key}](#{anchor(heading(finding))})"
            own = self._of(finding)
            yield from (self._row(first, of) for of in own)
            if not own:
                yield line([first, *self._unclaimed(finding)])

    def _unclaimed(self, finding: Finding) -> list[str]:  # noqa: ARG002
        """The row of a finding that no claim is about, but for its first cell."""
        return ["no claim", *["–"] * (len(HEADINGS) - 2)]

    def _row(self, first: str, of: Judged) -> str:
        words = VERDICTS[of.state] if of.claim.name not in self.reasons else f"not yet: {self.reasons[of.claim.name]}"
        words += f", {of.more} more seeds until its next look" if of.state == "undecided" and of.more else ""
        used = seeds(of) if of.n else "–"
        measured = effect(of).replace("inf", "∞") if of.looks else "–"
        expected = as_expected(of) if of.claim.name not in self.reasons else "–"
        claim = f"`{of.claim.name}`: {of.claim.claim}"
        return line([first, claim, f"`{of.claim.study}`", measured, used, words, expected])

    def _surprises(self) -> str:
        """What came otherwise than was written down before."""
        told = [of for of in self.judged if of.state != "not tested" and of.claim.name not in self.reasons]
        other = [of for of in told if as_expected(of) != "yes"]
        words = (
            f"{len(told) - len(other)} of the {len(told)} that are judged came as we expected; otherwise came "
            f"{'; '.join(_by_state(other))}."
            if other
            else f"All {len(told)} that are judged came as we expected."
            if told
            else "No claim is judged yet."
        )
        return (
            f"{words} What we expected stands in the claims' file; it was written after pilots at these sizes and rates, with "
            "seeds of their own, so that to be right is no feat. What we had not expected at all is under *Beyond the claims*."
        )

    def _of(self, finding: Finding) -> list[Judged]:
        return [of for of in self.judged if finding_of(of.claim) == finding.key]

    def _finding(self, finding: Finding) -> Iterator[str]:
        own = self._of(finding)
        yield f"## {heading(finding)}"
        yield ""
        yield f"**The paper.** {finding.paper}"
        yield ""
        yield from self._claims(own)
        yield ""
        for section in finding.sections:
            yield from self._section(section, finding)
        yield f"**What would change our mind.** {finding.mind}"
        yield ""
        yield self._standing(finding, own)
        yield ""
        for cause in finding.causes:
            yield f"- *{cause.word}:* {cause.sentence}{self._tried(cause.study)}."

    def _claims(self, own: Sequence[Judged]) -> Iterator[str]:
        if not own:
            yield "**Our claim.** None in the claims' file: what follows is described, not decided."
            return
        for of in own:
            yield f"**Our claim, `{of.claim.name}`.** {of.claim.claim} *Rule:* {rule(of.claim, self.claims)}"
            yield ""
            yield f"**Our result.** {self._result(of)}"
            yield ""

    def _result(self, of: Judged) -> str:
        if of.claim.name in self.reasons:
            return f"Not yet: {self.reasons[of.claim.name]}."
        if of.state == "not tested":
            return f"Not yet run: there is no dataset of `{of.claim.study}`."
        if not of.looks:
            return f"Undecided: {of.n} seeds, and the first look is at {of.claim.looks[0]}."
        more = f"; the next look is at {of.n + of.more} seeds" if of.state == "undecided" and of.more else ""
        more += left_open(of)
        return (
            f"**{of.state.capitalize()}**: {effect(of).replace('inf', '∞')}, "
            f"{100 * (1 - self.claims.alpha):g} % interval over all looks, {seeds(of)} seeds, Holm p {p_value(of.p_holm)}{more}."
            + past_best(of, self.studies[of.claim.study])
        )

    def _standing(self, finding: Finding, own: Sequence[Judged]) -> str:
        """Whether we agree with the paper, or what came of the reviewers' questions, by the claims' states."""
        by_state = {state: ", ".join(f"`{of.claim.name}`" for of in own if of.state == state) for state in VERDICTS}
        theirs, said = finding.key.startswith("F"), []
        if by_state["refuted"]:
            said.append(f"**{'Where we disagree' if theirs else 'Refuted, at this size'}.** {by_state['refuted']}.")
        if by_state["undecided"]:
            state = "Where we do not see it" if theirs else "Open"
            waiting = any(of.more for of in own if of.state == "undecided")
            looks = (
                "more seeds may show it"
                if waiting
                else "the looks that were planned are over, and the intervals say how much is left"
            )
            said.append(f"**{state}.** {by_state['undecided']}: not shown, at this size; {looks}.")
        shown = [of.claim for of in own if of.state == "supported"]
        for words, of in (("Where we agree", True), ("Supported", False)):
            names = [f"`{claim.name}`" for claim in shown if (theirs and claim.source.startswith(PAPER)) == of]
            said += [f"**{words}, at this size.** {', '.join(names)}."] if names else []
        return " ".join([*said, "What differs from the paper's setting:"])

    def _tried(self, study: str) -> str:
        if not study:
            return "; no study here tries it"
        found = self.studies[study]
        if not isinstance(found, Evidence):
            return f" (study `{study}`: {found})"
        told = came(self.studies, study)
        return f" (tried in [`{study}`](#study-{study})" + (f": {told})" if told else ")")

    def _section(self, section: str, finding: Finding) -> Iterator[str]:
        name = SECTIONS[section]
        found = self.studies[name]
        if section == name:  # its first section
            yield f"### Study `{name}`"
            yield ""
        elif section == finding.sections[0]:
            yield f"Of [study `{name}`](#study-{name}):"
            yield ""
        if not isinstance(found, Evidence):
            if section == finding.sections[0] or section == name:
                yield f"`{name}`: {found}. When it has: `{command(name)}`, then `make figures`."
                yield ""
            return
        if section == name:
            yield from block(found)
            yield ""
        yield from shown(self.pictures.get(section, ()))
        yield from TABLES[section](found)
        yield ""
        more = list(BEYOND[section](found)) if section in BEYOND else []
        if any(more):
            yield from (beyond.TITLE, "", *more, "")


def _by_state(of: Iterable[Judged]) -> Iterator[str]:
    """Claims by what came of them, such as "`F6-first`, `F6-head` (supported)"."""
    names: dict[str, list[str]] = {}
    for one in of:
        names.setdefault("not shown" if one.state == "undecided" else one.state, []).append(f"`{one.claim.name}`")
    return (f"{', '.join(each)} ({state})" for state, each in names.items())


def shown(pictures: Iterable[tuple[str, str]]) -> Iterator[str]:
    """Pictures, each above its words; of (words, path)."""
    for words, path in pictures:
        yield from (f"![{words}]({path})", "", f"*{words}.*", "")


def heading(finding: Finding) -> str:
    """A finding's heading, "F1: ..."."""
    return f"{finding.key[0].upper()}{finding.key[1:]}: {finding.title}"


def anchor(text: str) -> str:
    """By which Markdown links to a heading."""
    return "".join(c for c in text.lower().replace(" ", "-") if c.isalnum() or c in "-_")


def _by_part(evidence: Evidence) -> Iterator[str]:
    for part, of in zip(evidence.parts, evidence.verdicts, strict=True):
        if part.label:
            yield f"*{part.label[0].upper()}{part.label[1:]}:*"
            yield ""
        yield from recipe_table(evidence, part, of)
        yield ""
        for words in follows(evidence, part, of):
            yield f"- {words}"
        yield ""
    yield (
        f"By definition: {' · '.join(DEFINITIONS)}, over all rates. In a window are rates at which at most {100 * ALLOWED:g} % "
        f"diverge and that end within {MARGIN:g} nats/token of the recipe's own best."
    )


def _of_seeds(evidence: Evidence) -> Iterator[str]:
    for part in evidence.parts:
        for rate in part.rates:
            where = f", {part.label}" if part.label else ""
            yield f"*Learning rate {rate_words(rate)}{where}:*"
            yield ""
            yield from seed_table(evidence, part, rate)
            yield ""
            for words in divergence_words(evidence, part, evidence.verdict_at(part, rate)):
                yield f"- {words}"
            yield ""
    for part, of in zip(evidence.parts, evidence.verdicts, strict=True):
        where = f"{part.label}: " if part.label else ""
        for words in loss_words(evidence, part, of):
            yield f"- {where}{words}"
    yield ""
    yield f"By definition: {' · '.join(DEFINITIONS)}. Shares have Clopper and Pearson's interval, their difference Tango's; "
    yield "differences of means are of all runs whose loss is finite, diverged or not."


def _of_conditions(evidence: Evidence) -> Iterator[str]:
    if isinstance(evidence.comparison, str):
        yield f"No comparison: {evidence.comparison}."
        return
    yield from condition_table(evidence)
    yield ""
    yield (
        "Final validation losses, each against the baseline under the same condition; Student's intervals over pairs of "
        f"the same seed, Holm over all rows. By definition: {' · '.join(DEFINITIONS)}."
    )


def _of_roundings(evidence: Evidence) -> Iterator[str]:
    yield from _by_part(evidence)
    yield ""
    yield from rounding_table(evidence)
    yield ""
    yield "Final training losses of seeds that trained in both, each recipe at its own best rate."


def _of_sizes(evidence: Evidence) -> Iterator[str]:
    yield from size_table(evidence)
    yield ""
    for part, of in zip(evidence.parts, evidence.verdicts, strict=True):
        for words in follows(evidence, part, of):
            yield f"- {part.label or part.sample.model.label}: {words}"


def _of_signals(evidence: Evidence) -> Iterator[str]:
    if not has_signals(evidence):
        yield "What is flushed and clipped is not in the dataset: run it again with `[signals]`."
        return
    yield from signal_table(evidence)
    yield ""
    yield (
        "At the baseline's best rate, at all where it trains at none: in the layer where it is most, mean over steps (see "
        "[alarm signals](signals.md)), the median of the runs [least, most]. Not the mean over layers, since below one whose "
        "gradient is flushed altogether all is zero, and of nothing nothing is flushed."
    )


def _of_endings(evidence: Evidence) -> Iterator[str]:
    rows = list(endings_table(evidence))
    yield from rows if len(rows) > 2 else ["No run diverged."]
    yield ""
    yield "All learning rates together."


TABLES = {
    "seeds": _of_seeds, "mantissa": _by_part, "conditions": _of_conditions, "exponent": _by_part, "endings": _of_endings,
    "signals": _of_signals, "rounding": _of_roundings, "scaling": _by_part, "size": _of_sizes,
}  # fmt: skip
BEYOND = {
    "seeds": beyond.of_seeds, "mantissa": beyond.of_mantissa, "conditions": beyond.of_conditions, "signals": of_signals,
    "rounding": beyond.of_rounding, "size": beyond.of_sizes,
}  # fmt: skip
