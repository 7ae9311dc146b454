"""`make figures`: the page of findings and its figures, made anew from the datasets that are committed.

    python -m exmy.findings [--results studies/results] [--claims studies/claims.toml] [--page docs/findings.md]

Each file of claims is judged by itself, with its own alpha; the second's part of the page is `second`'s.

What the paper said and what would change our mind is `text`'s; claims and their rules are those of the claims' file, and
every number is made from a study. Figures lie beside the page, in a folder of its name; those that are no longer drawn are taken
away. A second time nothing changes.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import click
import xarray as xr

from exmy.busy import busy
from exmy.claims import own_claims
from exmy.findings.canvas import Drawing
from exmy.findings.figures import drawings
from exmy.findings.page import Findings, Pictures
from exmy.findings.second import SecondHalf, rankings, second_drawings, second_studies
from exmy.findings.studies import Available, Evidence, load, load_all
from exmy.outputs import write_whole
from train import StudyError
from train.claims import Claim, Claims, Judged, by_study, judge, read_claims

RESULTS, PAGE = Path("studies/results"), Path("docs/findings.md")


def judged(claims: Claims, studies: Available) -> tuple[list[Judged], dict[str, str]]:
    """What came of every claim, and of those that can't be judged yet, by name, why, although there is their study."""
    there = {name: of for name, of in studies.items() if isinstance(of, Evidence)}
    grids = {name: {tuple(part.where.items()): part.grid for part in of.parts} for name, of in there.items()}
    find, reasons = by_study(grids), dict[str, str]()

    def grid_of(claim: Claim) -> xr.Dataset | None:
        absent = studies.get(claim.study)
        if isinstance(absent, str) and absent != "not yet run":
            reasons[claim.name] = f"`{claim.study}` is {absent}"
        try:
            grid = find(claim)
        except StudyError as error:
            reasons[claim.name] = str(error).removeprefix(f"claim {claim.name}: ")
            return None
        lacking = [
            name for name in (claim.recipe, claim.baseline) if grid is not None and name not in grid["recipe"].values
        ]
        if grid is None or lacking:
            if lacking:
                reasons[claim.name] = f"`{lacking[0]}` has no finished run in `{claim.study}`"
            return None
        return grid

    try:
        return judge(claims, grid_of), reasons
    except ValueError:  # such as no run of the baseline at a claim's rate: that claim's alone to say
        pass

    def guarded(claim: Claim) -> xr.Dataset | None:
        grid = grid_of(claim)
        try:
            judge(Claims(alpha=claims.alpha, claims=(claim,)), grid_of)
        except ValueError as error:
            reasons[claim.name] = str(error).removeprefix(f"claim {claim.name}: ")
            return None
        return grid

    return judge(claims, guarded), reasons


def studies_of(results: Path, claims: Claims) -> dict[str, Evidence | str]:
    """The findings' studies, and whatever else claims are about."""
    with busy("reading studies") as told:
        found = load_all(results, told)
        return found | {c.study: load(results, c.study) for c in claims.claims if c.study not in found}


def make(results: Path, claims_file: Path, page: Path, second_file: Path | None = None) -> str:
    """Write the figures beside the page; gives back its text. StudyError, in a line, where something can't be read or written.

    second_file: the claims of the second half; without it that half is left out.
    """
    claims = read_claims(claims_file)
    studies = studies_of(results, claims)
    with busy("judging claims"):
        found, reasons = judged(claims, studies)
    second = _second(results, second_file, studies) if second_file else None
    folder = page.with_suffix("")
    pictures: dict[str, list[tuple[str, str]]] = {}
    written = set()
    with busy("drawing"):
        for drawing in [*drawings(studies), *(second.drawings if second else ())]:
            path = folder / f"{drawing.name}.png"
            write_whole(_in_folder(path), drawing.save)
            written.add(path)
            pictures.setdefault(drawing.section, []).append((drawing.words, f"{folder.name}/{path.name}"))
    for old in set(folder.glob("*.png")) - written:
        old.unlink()
    with busy("writing"):
        rest = list(second.half(pictures).part()) if second else []
        return Findings(studies, claims, found, reasons, pictures).page(rest)


class _Second(NamedTuple):
    """The second half, but for where its pictures are."""

    drawings: list[Drawing]
    half: Callable[[Pictures], SecondHalf]


def _second(results: Path, file: Path, first: Available) -> _Second:
    claims, studies = read_claims(file), second_studies(results)
    with busy("judging the second half's claims"):
        found, reasons = judged(claims, studies)
    alarms = rankings(studies)
    return _Second(
        list(second_drawings(studies, claims, alarms)),
        lambda pictures: SecondHalf({**first, **studies}, claims, found, reasons, pictures, alarms),
    )


def _in_folder(path: Path) -> Path:
    """The path, its folder made; StudyError where it can't be."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise StudyError(f"{path.parent}: can't be made ({error.strerror}); name another place") from None
    return path


@click.command()
@click.option(
    "--results",
    type=click.Path(path_type=Path),
    default=RESULTS,
    show_default=True,
    help="Folder of study directories.",
)
@click.option(
    "--claims", type=click.Path(path_type=Path), default=None, help="File of claims; exmy's own two if not given."
)
@click.option("--page", type=click.Path(path_type=Path), default=PAGE, show_default=True, help="Page to write.")
def main(results: Path, claims: Path | None, page: Path) -> None:
    """Make the page of findings, and its figures, anew."""
    try:
        first, *more = [claims] if claims else own_claims()
        text = make(results, first, page, *more)
        write_whole(_in_folder(page), lambda aside: aside.write_text(text, encoding="utf-8"))
    except StudyError as error:
        raise click.UsageError(str(error)) from None
