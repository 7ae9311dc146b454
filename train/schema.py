"""What each variable of a study means: its dimensions, units and sentence, in one table.

If a variable of a study directory has one of these names, it means this, so that other people's tools can read it. Sharpness
variables are `landscape`'s and described there; `summary`'s are described where they are computed, in `stability`.
"""

from __future__ import annotations

from landscape import CURVATURE, SHARPNESS, Variable
from landscape.schema import LANDSCAPE, QUANTISERS, describe
from train.measures import AFTERWARDS, group_of
from train.operands import ROLES
from train.signals import SIGNALS
from train.stability import VARIABLES

RUN_COORDINATES = {
    "recipe": "name of the recipe",
    "format": "formats of activation, weight and gradient, as one word where they are equal",
    "learning_rate": "peak learning rate",
    "init_seed": "seed of the initial weights",
    "data_seed": "seed of the batches",
    "seed": "the run's seed",
    "dataset": "training text",
    "model": "architecture, layers and width",
    "pack_size": "number of runs R that trained as one program, padding included",
}

HISTORY = {
    "train_loss": Variable(
        ("run", "step"), "nats/token", "training loss of the step's batch, before its update",
        "mean negative log likelihood of the next token",
    ),
    "grad_norm": Variable(
        ("run", "step"), "1", "gradient norm of all parameters, before clipping", "Euclidean norm, one per run"
    ),
    "grad_norm_block": Variable(
        ("run", "step", "block"), "1", "gradient norm of a block's parameters, before clipping",
        "Euclidean norm, one per run and block; without the loss scale, as grad_norm",
    ),
    "gnmr": Variable(
        ("run", "step"), "1", "gradient norm over the mean of the run's norms before it",
        "Kong et al. 2026 (2606.00539); the mean is over all steps before whose norm is finite, and the first step has none",
    ),
    "gnmr_block": Variable(
        ("run", "step", "block"), "1", "gradient norm of a block's parameters over the mean of the block's norms before it",
        "as gnmr, from grad_norm_block",
    ),
    "loss_scale": Variable(
        ("run", "step"), "1", "loss scale of the step's gradients, where it is dynamic",
        "Micikevicius et al. 2018 (1710.03740), adapted as torch.amp.GradScaler does; grad_norm is without it",
    ),
    "skipped": Variable(
        ("run", "step"), "1", "whether the step was skipped, 1 or 0, where the loss scale is dynamic",
        "1 where the gradient was not finite: weights and moments stayed as they were",
    ),
    "last_step": Variable(("run",), "step", "last step that the run took, counted from 0", "what follows it is padding"),
}  # fmt: skip

EVALUATION = {
    "validation_loss": Variable(
        ("run", "eval_step"), "nats/token", "loss on fixed held-out sequences",
        "mean negative log likelihood of the next token",
    ),
    "bits_per_byte": Variable(
        ("run", "eval_step"), "bits/byte", "loss on fixed held-out sequences, for each byte of their text",
        "validation_loss / (ln 2 * mean bytes of the tokens predicted), a document's end counted as one byte",
    ),
}  # fmt: skip

SUMMARY = {name: Variable(("run",), *row) for name, row in VARIABLES.items()} | {
    "unigram_entropy": Variable(
        ("run",), "nats/token", "unigram entropy of the training tokens",
        "-sum p ln p over token frequencies, ln V for a token of noise: the loss of a model that has learnt nothing from context",
    ),
    "final_bits_per_byte": Variable(
        ("run",), "bits/byte", "final smoothed training loss, for each byte of text",
        "final_loss / (ln 2 * mean bytes of a training token), a document's end counted as one byte",
    ),
    "epochs": Variable(
        ("run",), "1", "how often the run has read each training token, on average",
        "(last_step + 1) * sequences * context / training tokens",
    ),
}  # fmt: skip


MEASURED = SHARPNESS["measured"]


def _of_measure(name: str, axes: tuple[str, ...]) -> Variable:
    """A measure's variable as `landscape` describes it, along runs and probes; the loss is in nats a token."""
    row = CURVATURE.get(name) or describe(name)
    assert row is not None
    units = {"loss": "nats/token", "as the loss": "nats/token"}.get(row.units, row.units)
    return Variable(("run", "probe_step", *axes), units, row.long_name, row.source)


GROUPS = {
    "history": HISTORY,
    "evaluation": EVALUATION,
    "sharpness": {name: row for name, row in SHARPNESS.items() if name not in row.dims},
    "signals": {
        "measured": Variable(
            ("run",), "1", "whether signals were recorded for the run", "where False, the run's values are padding"
        ),
        **{name: signal.variable for name, signal in SIGNALS.items()},
    },
    "summary": SUMMARY,
}
OF_MEASURES = {
    group_of(measure): {name: _of_measure(name, axes) for name, axes in row.variables.items()} | {"measured": MEASURED}
    for measure, row in AFTERWARDS.items()
}
"""The groups of measures, which a study has where it asks for them."""
OF_ALARMS = {
    "alarms": {
        "rang_step": Variable(
            ("run", "alarm"),
            "step",
            "the first step at which the alarm rang",
            "the first step at which the signal was beyond the threshold; NaN where it never was",
        ),
        "rang_value": Variable(("run", "alarm"), "1", "the signal at that step", "in the signal's own unit"),
        "threshold": Variable(
            ("alarm",), "1", "the threshold", "as [alarms] of the study says; in the signal's own unit"
        ),
        "below": Variable(("alarm",), "1", "whether the alarm rings below its threshold", "above it, where False"),
    },
}
"""The group of a study that has alarms to listen to."""
TAKEN = LANDSCAPE["taken"]
"""Of /landscape, where `exmy landscape` may have measured some steps of some runs alone."""
OPTIONAL = frozenset({"loss_scale", "skipped"})
"""Variables of runs with a dynamic loss scale alone."""
COORDINATES = {
    "step": Variable(("step",), "step", "training step", "counted from 0"),
    "eval_step": Variable(
        ("eval_step",), "step", "training step before which the evaluation was made", "counted from 0"
    ),
    "probe_step": SHARPNESS["probe_step"],
    "epsilon": SHARPNESS["epsilon"],
    "rho": LANDSCAPE["rho"],
    **QUANTISERS,
    "rank": Variable(("rank",), "1", "eigenvalue", "counted from 0, the outermost: the largest, or the smallest"),
    "sample": Variable(("sample",), "1", "random vector", "counted from 0; the same for every run and probe"),
    "lanczos_step": Variable(
        ("lanczos_step",), "1", "node of a random vector's quadrature", "counted from 0, ascending"
    ),
    "alarm": Variable(("alarm",), "1", "alarm", "the signal's name, > or <, and the threshold"),
    "signal_step": Variable(
        ("signal_step",), "step", "training step that was looked at, its weights before the update", "counted from 0"
    ),
    "block": Variable(("block",), "1", "block of the model", "counted from 0; -1: the parameters outside the blocks"),
    "tensor": Variable(
        ("tensor",), "1", "linear layer", "the name of its matrix, or lm_head for the LM head, tied or not"
    ),
    "role": Variable(("role",), "1", "operand of the layer", f"{', '.join(ROLES)}: x, W and dy of y = x W"),
}
