"""Search learning rate and loss scale, of one recipe or several, with Optuna's ask-and-tell: a pack of trials at a time.

    pip install 'exmy[optuna]'
    python scripts/optuna_search.py STUDY.toml --out runs/search --trials 64 --batch 16 --rungs 100,300

Optuna is asked for a whole batch before any of it is trained, so that a batch is a pack: learning rate, loss scale and format
vary inside one, what is another program (widths, optimisers, schedules) would not. Its sampler takes a batch's other trials into
account ("constant liar"). What is not promising is pruned by successive halving (Jamieson and Talwalkar 2016, 1502.07943): a
batch is trained with the steps of the first rung, and those of it that are among the best of all trials there, one in `--keep`,
with those of the next. That is a run of its own, with its own schedule: a run that was cut short says little about one whose
learning rate had come down.

The study file says the rest: recipes, seeds, model, and the range of learning rates, its least to its greatest. A trial's value
is the mean over seeds of the final training loss, where a loss counts as at most that of guessing, ln V, so that runs without a
finite loss have one.

    OUT/optuna.journal   Optuna's own record, to be opened with optuna.load_study and JournalStorage
    OUT/study.toml       an ordinary study directory, with every trial's runs as [[more]] blocks

Started again, or killed at any point, it goes on: trials under way are asked for again, and their finished runs are found.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click
import numpy as np
import optuna
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend
from optuna.trial import FrozenTrial, Trial, TrialState

from train import Study, open_study, read_study, run_study

SCALES = (1, 16)  # of the loss, as powers of two; 2^0 would be another program
BATCH, JOURNAL = "batch", "optuna.journal"


def search(
    base: Study,
    out: Path,
    trials: int,
    batch: int,
    rungs: list[int],
    keep: int = 3,
    device: str = "auto",
    seed: int = 0,
) -> optuna.Study:
    """Train until `trials` have ended, complete or pruned; the Optuna study.

    rungs: steps, rising; keep: one in so many goes on to the next.
    """
    out.mkdir(parents=True, exist_ok=True)
    storage = JournalStorage(JournalFileBackend(str(out / JOURNAL)))
    study = optuna.create_study(storage=storage, study_name=base.name, load_if_exists=True)
    for lost in study.get_trials(states=[TrialState.RUNNING]):  # of a process that was killed
        study.enqueue_trial(lost.params)
        study.tell(lost.number, state=TrialState.FAIL)
    while (ended := len(study.get_trials(states=[TrialState.COMPLETE, TrialState.PRUNED]))) < trials:
        number = len(study.trials)
        # A sampler that began at the same seed again would ask for the same trials again.
        study.sampler = optuna.samplers.TPESampler(seed=seed + number, constant_liar=True)
        asked = [study.ask(space(base)) for _ in range(min(batch, trials - ended))]
        for trial in asked:
            trial.set_user_attr(BATCH, number)
        climb(study, base, out, asked, rungs, keep, device)
    return study


def space(base: Study) -> dict[str, BaseDistribution]:
    """What is searched."""
    rates = base.axes.learning_rate
    return {
        "recipe": CategoricalDistribution(base.axes.recipe),
        "learning_rate": FloatDistribution(min(rates), max(rates), log=True),
        "loss_scale_bits": IntDistribution(*SCALES),
    }


def climb(
    study: optuna.Study, base: Study, out: Path, asked: list[Trial], rungs: list[int], keep: int, device: str
) -> None:
    """A batch, rung by rung, until each of its trials has ended."""
    for steps in rungs:
        values = train(study, base, out, asked, steps, device)
        for trial in asked:
            trial.report(values[trial.number], steps)
        if steps == rungs[-1]:
            for trial in asked:
                study.tell(trial, values[trial.number])
            return
        # Optuna's pruner judges trials one by one, the first against nobody; here the whole batch stands on the rung.
        known = sorted(
            trial.intermediate_values[steps]
            for trial in study.get_trials(deepcopy=False)
            if steps in trial.intermediate_values and trial.state is not TrialState.FAIL
        )
        least = known[max(1, len(known) // keep) - 1]
        for trial in asked:
            if values[trial.number] > least:
                study.tell(trial, state=TrialState.PRUNED)
        asked = [trial for trial in asked if values[trial.number] <= least]
        if not asked:
            return


def train(study: optuna.Study, base: Study, out: Path, asked: list[Trial], steps: int, device: str) -> dict[int, float]:
    """Each trial's value at so many steps, by its number."""
    now = {trial.number for trial in asked}
    tables = [
        block(trial, rung)
        for trial in study.get_trials(deepcopy=False)
        for rung in (*trial.intermediate_values, *([steps] if trial.number in now else []))
    ]
    run_study(with_blocks(base, tables), out, device)
    tree = open_study(out)
    summary = tree["summary"].to_dataset()
    loss = np.fmin(summary["final_loss"].values, np.log(tree.attrs["vocabulary"]))
    columns = [summary[name].values for name in ("recipe", "learning_rate", "loss_scale", "steps")]
    values = {}
    for trial in asked:
        own = block(study.trials[trial.number], steps)
        wanted = [own[key][0] for key in ("recipe", "learning_rate", "loss_scale", "steps")]
        chosen = np.all([column == value for column, value in zip(columns, wanted, strict=True)], axis=0)
        values[trial.number] = float(loss[chosen].mean())
    return values


def block(trial: FrozenTrial, steps: int) -> dict[str, Any]:
    """A trial at a rung, as a block of the study; its batch is a round, so that R is chosen for each batch alone."""
    batch = trial.user_attrs.get(BATCH, 0)
    return {
        **({"round": batch + 2} if batch else {}),
        "recipe": [trial.params["recipe"]],
        "learning_rate": [trial.params["learning_rate"]],
        "loss_scale": [2.0 ** trial.params["loss_scale_bits"]],
        "steps": [steps],
    }


def with_blocks(base: Study, tables: list[dict[str, Any]]) -> Study:
    """The study whose runs are these blocks', with all seeds: the first is [axes], the others [[more]]."""
    content = base.model_dump(mode="json", exclude_none=True, exclude_unset=True)
    first = {key: value for key, value in tables[0].items() if key != "round"}
    return Study.model_validate(content | {"baseline": None, "axes": content["axes"] | first, "more": tables[1:]})


@click.command()
@click.argument("study_file", metavar="STUDY.toml", type=click.Path(path_type=Path))
@click.option("--out", required=True, type=click.Path(path_type=Path))
@click.option("--trials", default=64, show_default=True, type=click.IntRange(1))
@click.option("--batch", default=16, show_default=True, type=click.IntRange(1), help="Trials of a pack.")
@click.option("--rungs", default="100,300", show_default=True, help="Steps, rising.")
@click.option(
    "--keep", default=3, show_default=True, type=click.IntRange(2), help="One in so many goes on to the next rung."
)
@click.option("--device", type=click.Choice(["auto", "cpu", "cuda"]), default="auto", show_default=True)
def main(study_file: Path, out: Path, trials: int, batch: int, rungs: str, keep: int, device: str) -> None:
    """Search, and print the best trials."""
    try:
        steps = sorted({int(rung) for rung in rungs.split(",")})
        found = search(read_study(study_file), out, trials, batch, steps, keep, device)
    except ValueError as error:  # a study that can't be run says so in a line
        raise click.UsageError(" ".join(str(error).split())) from None
    for trial in sorted(found.get_trials(states=[TrialState.COMPLETE]), key=lambda trial: trial.value or 0.0)[:5]:
        click.echo(f"trial {trial.number}: {trial.value:.4f} nats/token, {trial.params}")


if __name__ == "__main__":
    main()
