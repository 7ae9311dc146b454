"""How early an alarm rings, at a stated rate of false alarms, and what a signal adds to what is known without it.

An alarm rings at the first step at which the signal is above a threshold. The threshold is set on runs that did not diverge, of
the same recipe and learning rate (or of whatever `within` says), of other seeds: with m such runs it is the ceil((1 - r)(m +
1))-th smallest of their largest values. A further run of the kind then rings falsely with a chance of at most r, whatever the
signal's distribution is (conformal prediction's argument: Vovk, Gammerman and Shafer 2005). Where that number is beyond m, as
with fewer than 9 runs at r = 10 %, there is no threshold, and the runs are not judged: `judged` says how many were. Equal for
all rates, a threshold would mostly find the rates that diverge.

Who acts on an alarm acts on its first ring. With a horizon, a first ring that comes more than so many steps before the onset is
no warning of it, as the rows of `alarm_rows` there are negative: it is counted apart, as `early`, and not among those detected.

Train and test are split by seed, since runs of one seed share weights and batches: seeds are dealt into folds, and each fold's
runs are judged by thresholds (or models) of the others. `incremental` fits logistic regressions so: of learning rate, step,
loss and gradient norm, and of those and the signal; what the signal adds is the difference of the two scores' AUROC within
recipe, rate and step.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt
import xarray as xr
from scipy import optimize
from scipy.special import expit

from train.alarms import alarm_rows, kinds, numbered, of_its_runs, steps_of
from train.early_warning import concordance
from train.resample import DRAWS, expanded_interval, seed_draws
from train.seed_cube import seed_labels

Floats = npt.NDArray[np.float64]
Bools = npt.NDArray[np.bool_]

FOLDS = 5
# Of the squared coefficients, for each row: classes that a plane parts have a likelihood without a maximum.
RIDGE = 1e-3
CAP = 8.0  # standard deviations at which a feature is cut off


def lead_time(
    signal: xr.DataArray,
    onset: xr.DataArray,
    false_alarms: float = 0.1,
    last_step: xr.DataArray | None = None,
    within: Sequence[str] | None = None,
    folds: int = FOLDS,
    key: int = 0,
    horizon: float = math.inf,
) -> xr.Dataset:
    """When each run's alarm rings: threshold, alarm_step (NaN: silent), judged, diverged, lead (steps; NaN), all (run).

    signal, onset, last_step: as `alarm_rows`; only steps before the onset count. within: coordinates of runs alike, `kinds` if
    None. false_alarms: the rate per run that did not diverge. lead = onset - alarm_step of diverged runs that rang. attrs: the
    shares of judged runs that rang, diverged (`detected`, at most `horizon` steps before the onset; `early`, before that) or not
    (`false_alarm_rate`), the median lead of those detected, and the counts. ValueError unless 0 < false_alarms < 1, folds >= 2
    and horizon > 0.
    """
    if not horizon > 0:
        raise ValueError(f"the horizon must be above 0 steps, got {horizon}")
    if not 0 < false_alarms < 1:
        raise ValueError(f"false_alarms must be a rate per run between 0 and 1, got {false_alarms}")
    axis = steps_of(signal)
    values = signal.transpose("run", axis).values.astype(np.float64)
    steps = signal[axis].values.astype(np.float64)
    start = of_its_runs(onset, signal, "onset").values.astype(np.float64)
    last = (
        np.full(start.shape, np.inf)
        if last_step is None
        else of_its_runs(last_step, signal, "last_step").values.astype(np.float64)
    )
    fails = np.isfinite(start)
    counts = (
        (steps[None] < np.where(fails, start, np.inf)[:, None]) & (steps[None] <= last[:, None]) & ~np.isnan(values)
    )
    heard = np.where(counts, values, -np.inf)
    alike_by = kinds(signal) if within is None else within
    kind = numbered([signal[name].values.tolist() for name in alike_by] or [[0] * start.size])
    fold = _folds(seed_labels(signal.to_dataset(name="signal")), folds, key)
    largest, healthy = heard.max(axis=1, initial=-np.inf), ~fails & counts.any(axis=1)
    threshold = np.full(start.size, np.nan)
    for one, apart in {*zip(kind.tolist(), fold.tolist(), strict=True)}:
        of_others = healthy & (kind == one) & (fold != apart)
        threshold[(kind == one) & (fold == apart)] = conformal_threshold(largest[of_others], false_alarms)
    judged = np.isfinite(threshold) & counts.any(axis=1)
    rings = judged[:, None] & (heard > np.where(judged, threshold, np.inf)[:, None])
    rang = rings.any(axis=1)
    alarm = np.where(rang, steps[rings.argmax(axis=1)], np.nan)
    lead = np.where(fails, start - alarm, np.nan)
    result = xr.Dataset(
        {
            "threshold": ("run", threshold, {"units": "1", "long_name": "the signal above which the alarm rings"}),
            "alarm_step": ("run", alarm, {"units": "step", "long_name": "first step at which it rings"}),
            "judged": ("run", judged, {"units": "1", "long_name": "whether runs enough of its kind set a threshold"}),
            "diverged": ("run", fails, {"units": "1", "long_name": "whether the run diverged"}),
            "lead": ("run", lead, {"units": "steps", "long_name": "onset - alarm_step"}),
        },
        {name: of for name, of in signal.coords.items() if of.dims == ("run",)},
    )
    bad, good = judged & fails, judged & ~fails
    in_time = rang & (lead <= horizon)
    result.attrs = {
        "false_alarms_allowed": false_alarms, "diverged_judged": int(bad.sum()), "healthy_judged": int(good.sum()),
        "not_judged": int((~judged).sum()),
        "detected": float(in_time[bad].mean()) if bad.any() else math.nan,
        "early": float((rang & ~in_time)[bad].mean()) if bad.any() else math.nan,
        "false_alarm_rate": float(rang[good].mean()) if good.any() else math.nan,
        "median_lead": float(np.median(lead[bad & in_time])) if (bad & in_time).any() else math.nan,
    }  # fmt: skip
    return result


def conformal_threshold(largest: npt.ArrayLike, false_alarms: float) -> float:
    """The threshold that a further run's largest value exceeds with a chance of at most false_alarms; inf where runs are too few.

    largest: [m], the largest value of each run that did not diverge.
    """
    values = np.sort(np.asarray(largest, np.float64))
    # The product is exact in decimals, and 9.000000000000002 must not become 10.
    place = math.ceil(round((1 - false_alarms) * (values.size + 1), 9))
    return float(values[place - 1]) if 1 <= place <= values.size else math.inf


def _folds(seed: Sequence[object], folds: int, key: int) -> npt.NDArray[np.int64]:
    """Each run's fold: seeds are shuffled and dealt out."""
    if folds < 2:
        raise ValueError(f"folds must be at least 2, so that seeds are judged by others, got {folds}")
    labels = sorted(set(map(str, seed)))
    order = np.random.Generator(np.random.Philox(key=key)).permutation(len(labels))
    dealt = {label: int(order[i]) % folds for i, label in enumerate(labels)}
    return np.array([dealt[str(label)] for label in seed], np.int64)


def incremental(
    signal: xr.DataArray,
    known: Mapping[str, xr.DataArray],
    onset: xr.DataArray,
    horizon: float,
    last_step: xr.DataArray | None = None,
    confidence: float = 0.95,
    folds: int = 2,
    draws: int = DRAWS,
    key: int = 0,
    centred: bool = False,
) -> xr.Dataset:
    """What a signal adds: baseline_auroc, with_signal_auroc, gain with its limits; no dimensions.

    known: what is known anyway, such as loss and gradient norm, each (run, same steps); learning rate and step are always
    known. Rows are those at which signal and all that is known are measured. Scores of a fold's seeds are by a model of the
    other folds'; where those have one kind of rows alone there is no model, and the fold's rows are not judged, which leaves NaN
    where no fold's are. Limits: bootstrap over seeds, models as they are.

    centred: everything is taken less its mean over the rows of the stratum. One plane over all recipes and rates turns a signal
    round that rises from rate to rate and falls within each; this one asks of other runs beside it, at the same step.
    """
    axis = steps_of(signal)
    signal = signal.transpose("run", axis)
    measured = np.ones(signal.shape, np.bool_)
    sheets = [
        signal,
        *(_at_steps(of_its_runs(of, signal, name), axis, signal[axis].values) for name, of in known.items()),
    ]
    for sheet in sheets:
        measured &= ~np.isnan(sheet.values.astype(np.float64))
    each = [alarm_rows(sheet, onset, horizon, last_step, measured) for sheet in sheets]
    rows = each[0]
    rate = (
        np.log2(signal["learning_rate"].values.astype(np.float64))[rows.run]
        if "learning_rate" in signal.coords
        else 0.0 * rows.step
    )
    base = np.stack([rate, rows.step, *(of.signal for of in each[1:])], axis=1) if rows.step.size else np.zeros((0, 2))
    own = rows.signal
    if centred and rows.step.size:
        base, own = _less_mean(base, rows.stratum), _less_mean(own[:, None], rows.stratum)[:, 0]
    fold = _folds(list(map(str, range(rows.seeds))), folds, key)[rows.seed] if rows.seeds else np.zeros(0, np.int64)
    # Scores of two models are not held against each other: the one not fitted to a failing run expects fewer of them, and of
    # scores that say nothing the failing runs' would be the lower.
    apart = replace(rows, stratum=rows.stratum * folds + fold)
    scores = [cross_fitted(of, rows.positive, fold) for of in (base, np.column_stack([base, own]))]
    judged = np.isfinite(scores[0])
    pairs = [concordance(apart.with_signal(of).where(judged)) for of in scores]
    weights = seed_draws(rows.seeds, draws)
    low, high = expanded_interval(pairs[1].auroc(weights) - pairs[0].auroc(weights), rows.seeds, confidence)
    before, after = (float(of.auroc()) for of in pairs)
    found = {
        "baseline_auroc": (before, "AUROC of learning rate, step and what else is known"),
        "with_signal_auroc": (after, "AUROC of the same and the signal"),
        "gain": (after - before, "what the signal adds to the AUROC"),
        "gain_low": (float(low), "lower limit of the gain, bootstrap over seeds"),
        "gain_high": (float(high), "upper limit of the gain, bootstrap over seeds"),
        "rows": (int(rows.signal.size), "rows with everything measured"),
        "rows_judged": (int(judged.sum()), "of them those whose other folds made a model"),
    }
    variables = {name: ((), value, {"units": "1", "long_name": words}) for name, (value, words) in found.items()}
    return xr.Dataset(
        variables, attrs={"confidence": confidence, "known": ", ".join(["learning_rate", "step", *known])}
    )


def _at_steps(of: xr.DataArray, axis: Hashable, steps: npt.NDArray[Any]) -> xr.DataArray:
    """A sheet of the same runs at those steps, by their labels, with the dimension so named; NaN at steps that it lacks."""
    (own,) = [dim for dim in of.dims if dim != "run"]
    return of.transpose("run", own).rename({own: axis}).reindex({axis: steps})


def cross_fitted(features: Floats, positive: Bools, fold: npt.NDArray[np.int64]) -> Floats:
    """Each row's score by the logistic regression of the other folds, NaN where they have one kind; features [rows, features]."""
    score = np.full(positive.size, np.nan)
    for test in np.unique(fold):
        train = fold != test
        if 0 < positive[train].sum() < train.sum():
            middle, scale = _scale(features[train])
            x, y = (np.clip((_tame(of) - middle) / scale, -CAP, CAP) for of in (features[train], features[~train]))
            weight = logistic(x, positive[train])
            score[~train] = weight[0] + y @ weight[1:]
    return score


def _tame(features: Floats) -> Floats:
    """sign(x) ln(1 + |x|): norms and losses of failing runs are orders of magnitude apart."""
    large = np.clip(features, -np.finfo(np.float64).max, np.finfo(np.float64).max)
    return np.asarray(np.sign(large) * np.log1p(np.abs(large)), np.float64)


def _less_mean(features: Floats, stratum: npt.NDArray[np.int64]) -> Floats:
    """Each feature, tamed, less its mean over the stratum's rows; [rows, features]."""
    tame = _tame(features)
    count = np.bincount(stratum)
    means = [np.bincount(stratum, column) / np.maximum(count, 1) for column in tame.T]
    return tame - np.stack(means, axis=1)[stratum]


def _scale(features: Floats) -> tuple[Floats, Floats]:
    tame = _tame(features)
    deviation = tame.std(axis=0)
    return tame.mean(axis=0), np.where(deviation > 0, deviation, 1.0)


def logistic(x: Floats, positive: Bools) -> Floats:
    """Coefficients of the logistic regression, the constant first, with RIDGE on all but it; x [rows, features]."""
    design = np.column_stack([np.ones(positive.size), x])
    penalty = np.full(design.shape[1], RIDGE * positive.size)
    penalty[0] = 0.0

    def loss(weight: Floats) -> tuple[float, Floats]:
        z = design @ weight
        value = np.logaddexp(0.0, z).sum() - z[positive].sum() + 0.5 * penalty @ weight**2
        return float(value), design.T @ (expit(z) - positive) + penalty * weight

    return np.asarray(
        optimize.minimize(loss, np.zeros(design.shape[1]), jac=True, method="L-BFGS-B", tol=1e-10).x, np.float64
    )
