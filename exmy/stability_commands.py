"""Commands about stability: `exmy verdict`, `stability`, `claims` and `alarms`. Heavy imports wait inside, as in `cli`."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import click

from exmy import completing
from exmy.places import FileToWrite, study_directories, study_directory
from exmy.refused import Refused


@click.command("verdict")
@click.argument("recipe", metavar="FORMAT", shell_complete=completing.recipes_and_formats)
@study_directories()
@click.option("--baseline", metavar="RECIPE", help="What it is held against; the studies' own by default.")
@click.option(
    "--margin", default=0.1, show_default=True, help="As stable: shares of diverged runs differ by less than this."
)
@click.option("--alpha", default=0.05, show_default=True, help="Chance of a false verdict; intervals are at 1 - alpha.")
@click.option(
    "--learning-rate", type=float, metavar="RATE", help="Where divergence is compared; the baseline's best by default."
)
@click.option("--allowed", default=0.1, show_default=True, help="Stable window: the share that may diverge,")
@click.option("--loss-margin", default=0.1, show_default=True, help="and nats/token above the recipe's own best.")
@click.option(
    "--search-cost", default=0.1, show_default=True, help="Break-even: runs that a trial of a learning rate costs."
)
@click.option("--json", "json_file", metavar="FILE.json", type=FileToWrite(), help="Every number, for machines.")
def give_verdict(
    recipe: str, directories: tuple[Path, ...], baseline: str | None, json_file: Path | None, **numbers: Any
) -> None:
    """Is FORMAT (a recipe of the studies) as stable as the baseline? A sentence, and a table with intervals.

    Several studies of one design, of other seeds say, are taken together; docs/stability.md has every formula. Exit status 0:
    it is shown to be as stable within the margin, or more stable. 1: it is not, less stable or undecided. 2: bad input.

    \b
    Example: exmy verdict e4m3fn runs/mine
    Example: exmy verdict e8m3 runs/seeds-0-63 runs/seeds-64-127 --margin 0.05
    """  # noqa: D301
    from exmy.verdict import run_verdict
    from train import StudyError
    from train.verdicts import VerdictSettings

    try:
        holds = run_verdict(recipe, directories, baseline, VerdictSettings(**numbers), json_file)
    except (StudyError, ValueError) as error:
        raise Refused(str(error)) from None
    sys.exit(0 if holds else 1)


@click.command("stability")
@click.argument("path", metavar="LOSSES.csv", type=click.Path(path_type=Path))
@click.option("--run", metavar="COL", default="run", show_default=True, help="Column that tells runs apart.")
@click.option("--step", metavar="COL", default="step", show_default=True, help="Column of the training step.")
@click.option("--loss", metavar="COL", default="loss", show_default=True, help="Column of the loss, nats/token.")
@click.option("--group", metavar="COL", help="Column of what is compared, a format say.")
@click.option("--learning-rate", metavar="COL", help="Column of the learning rate, within which runs are compared.")
@click.option("--seed", metavar="COL", help="Column of the seed: runs that share one are pairs.")
@click.option("--grad-norm", metavar="COL", help="Column of the gradient norm, for non_finite.")
@click.option("--baseline", metavar="GROUP", help="What the others are held against; the first group by default.")
@click.option(
    "--definition",
    type=click.Choice(["non_finite", "no_progress", "spike", "gap"]),
    help="What diverged means; no_progress with --entropy, else spike.",
)
@click.option("--entropy", type=float, help="Unigram entropy of the training tokens, nats/token, for no_progress.")
@click.option("--window", type=int, default=20, show_default=True, help="Logged steps whose mean is the final loss.")
@click.option(
    "--spike-window", type=int, default=128, show_default=True, help="Logged steps whose trend a spike leaves,"
)
@click.option("--sigma", type=float, default=6.0, show_default=True, help="by how many standard deviations.")
@click.option(
    "--margin", default=0.1, show_default=True, help="As stable: shares of diverged runs differ by less than this."
)
@click.option("--at", type=float, metavar="RATE", help="Learning rate of the verdict; the baseline's best by default.")
@click.option(
    "--gap-margin", type=float, default=0.2, show_default=True, help="Nats/token above the baseline's best, for gap."
)
@click.option("--json", "json_file", metavar="FILE.json", type=FileToWrite(), help="Every number, for machines.")
def own_losses(
    path: Path, baseline: str | None, definition: str | None, entropy: float | None, window: int, spike_window: int, sigma: float,
    gap_margin: float, margin: float, at: float | None, json_file: Path | None, **columns: str | None,
) -> None:  # fmt: skip
    """Which of your own runs diverged, how often, and whether groups of them differ: from a table, a row a logged step.

    Runs may be of unequal length. An empty loss was not logged; "nan" and "inf" are losses that are not finite. With learning
    rates and seeds, each group's verdict as well, as `exmy verdict` has it.

    \b
    Example: exmy stability losses.csv --run name --step step --loss train_loss --group format
    Example: exmy stability losses.csv --group format --learning-rate lr --seed seed --entropy 3.24
    """  # noqa: D301
    from exmy.own_losses import run_stability
    from train import DivergenceSettings, StudyError, VerdictSettings

    word: Any = definition or ("spike" if entropy is None else "no_progress")
    try:
        asked = VerdictSettings(margin=margin, learning_rate=at)
        settings = DivergenceSettings(
            word, window=window, spike_window=spike_window, sigma=sigma, gap_margin=gap_margin
        )
        run_stability(path, columns, settings, entropy, baseline, json_file, asked)
    except (StudyError, ValueError) as error:
        raise Refused(str(error)) from None


@click.command("claims")
@study_directories()
@click.option(
    "--claims",
    "file",
    metavar="CLAIMS.toml",
    type=click.Path(path_type=Path),
    help="Those that come with exmy by default.",
)
@click.option("--json", "json_file", metavar="FILE.json", type=FileToWrite(), help="Every number, for machines.")
def test_claims(directories: tuple[Path, ...], file: Path | None, json_file: Path | None) -> None:
    """Hold claims against studies: supported, refuted or undecided, by rules that were fixed before the runs.

    A claim names its study, statistic, smallest number of seeds and looks; docs/stability.md says how they are judged. Exit
    status 0: none that is expected is refuted. 1: one is. 2: bad input.

    \b
    Example: exmy claims runs/masking runs/first-look-gpu
    Example: exmy claims runs/mine --claims mine-claims.toml
    """  # noqa: D301
    from exmy.claims import own_claims, run_claims
    from train import StudyError

    try:
        holds = run_claims(directories, [file] if file else own_claims(), json_file)
    except StudyError as error:
        raise Refused(str(error)) from None
    sys.exit(0 if holds else 1)


@click.command("alarms")
@study_directory
@click.option(
    "--horizon",
    type=float,
    required=True,
    metavar="STEPS",
    help="A warning counts so long before the onset; fix it first.",
)
@click.option(
    "--false-alarms", default=0.1, show_default=True, help="Share of runs that do not diverge in which one may ring."
)
@click.option("--json", "json_file", metavar="FILE.json", type=FileToWrite(), help="Every number, for machines.")
def judge_alarms(directory: Path, horizon: float, false_alarms: float, json_file: Path | None) -> None:
    """Which of a study's signals warned before its runs diverged, and how early: gradient norms, sharpness, what was recorded.

    Scored within recipe, learning rate and step, since a signal that knows the rate alone looks like an alarm otherwise;
    docs/stability.md says how. Exit status 0, whatever they are worth; 2: bad input.

    \b
    Example: exmy alarms runs/mine --horizon 100
    """  # noqa: D301
    from exmy.alarms import run_alarms
    from train import StudyError

    try:
        run_alarms(directory, horizon, false_alarms, json_file)
    except StudyError as error:
        raise Refused(str(error)) from None


COMMANDS = (give_verdict, own_losses, test_claims, judge_alarms)
