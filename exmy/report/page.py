"""`exmy report`: a study, or two side by side, as one HTML page that needs nothing else: no network, no server, no other file.

The page is a template (`page.html.j2`) around its style (`report.css`), its scripts and three things that they need: the studies'
content (`content`), packed into one block (`packing`), plotly, once, and the words that are there without any script: verdicts,
provenance, how to run it again. Scripts are concatenated in the order of `SCRIPTS`; nothing is built or minified.
"""

from __future__ import annotations

import datetime
import importlib.resources
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2
import xarray as xr
from markupsafe import Markup

from exmy.figure import study_figure
from exmy.rang import HEADINGS, rang_rows
from exmy.report.content import content, provenance
from exmy.report.packing import embedded
from exmy.strategies import Findings, findings_of
from exmy.version import __version__
from train import Study, StudyError, open_study
from train.directory import is_digest, pack_names, study_of
from train.durable import atomically, made
from train.rings import told

PAGE, PICTURE = "index.html", "study.png"
SCRIPTS = ("state.js", "marks.js", "plots.js", "curves.js", "drawings.js", "figures.js", "main.js")
SIDE_BY_SIDE = 2

Shown = tuple[Study, xr.DataTree | None]


def write_report(directory: Path, out: Path, tree: xr.DataTree | None = None) -> list[Path]:
    """Write a study's page, and its figure where a run is finished, into the folder `out`; the paths written, the page first.

    tree: what `open_study(directory)` gives, from a caller who has it already; None to open it. StudyError where the directory
    holds no study or `out` can't be written.
    """
    return write_page([directory], [opened(directory, tree)], out)


def write_page(directories: Sequence[Path], shown: Sequence[Shown], out: Path) -> list[Path]:
    """The same for one study or two, opened."""
    page = render(shown, [findings_of(directory) for directory in directories])
    written = [out / PAGE]
    try:
        with made(out):
            with atomically(out / PAGE) as aside:
                aside.write_text(page, encoding="utf-8")
            for _, tree in shown if len(shown) == 1 else ():
                if tree is not None:
                    with atomically(out / PICTURE) as aside:
                        study_figure(tree, aside)
                    written.append(out / PICTURE)
    except OSError as error:
        raise cannot_write(out, error) from None
    return written


def cannot_write(out: Path, error: OSError) -> StudyError:
    """What to say of a folder that can't be written to."""
    return StudyError(
        f"{out}: can't write there ({error.strerror}); make room or name another folder with --out; the results are kept"
    )


def opened(directory: Path, tree: xr.DataTree | None = None) -> Shown:
    """A study with its tree, None where no run is finished. StudyError where the directory holds no study."""
    study = study_of(directory)
    if tree is None and (pack_names(directory) or is_digest(directory)):
        tree = open_study(directory)
    return study, tree


def render(shown: Sequence[Shown], found: Sequence[Findings | None] = ()) -> str:
    """The whole page of one study or two; found: what each one's strategy found."""
    inside = content(shown)
    studies = [
        {
            **part,
            "toml": study.to_toml(),
            "provenance": provenance(tree),
            "strategy": strategy,
            "number": number,
            "alarms": rang_rows(told(tree)) if tree is not None else [],
        }
        for number, (part, (study, tree), strategy) in enumerate(
            zip(inside["studies"], shown, [*found, *[None] * (len(shown) - len(found))], strict=True)
        )
    ]
    environment = jinja2.Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
    return environment.from_string(_text("page.html.j2")).render(
        title=" and ".join(study.name for study, _ in shown),
        studies=studies,
        looks=inside["looks"],
        any_finished=any(study["finished"] for study in studies),
        facets=_facets(inside),
        alarm_headings=HEADINGS,
        content=embedded(inside),
        style=Markup(_text("report.css")),
        script=Markup("\n".join(_text(name) for name in SCRIPTS)),
        plotly=Markup(plotly_js()),  # plotly's own file: nothing a user wrote
        version=__version__,
        made=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    )


def _facets(inside: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Each facet but the recipe's with its values of all studies, in order."""
    facets = []
    for name in inside["facets"]:
        values: Iterable[str] = (
            v for study in inside["studies"] for v in study["columns"].get(name, {}).get("values", [])
        )
        if name != "recipe":
            facets.append({"name": name, "values": list(dict.fromkeys(values))})
    return [facet for facet in facets if facet["values"]]


def _text(name: str) -> str:
    return importlib.resources.files("exmy.report").joinpath(name).read_text(encoding="utf-8")


def plotly_js() -> str:
    """Plotly's minified library, as the Python package ships it."""
    return importlib.resources.files("plotly").joinpath("package_data", "plotly.min.js").read_text(encoding="utf-8")
