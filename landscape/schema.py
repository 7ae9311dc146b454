"""What each variable of a sharpness dataset means: if it has this name, it has these dimensions, this unit, this
definition.

Whoever writes a dataset takes the attributes from here (`labelled`), and whoever reads one can hold it against this table
(`validate`). A variable may carry what is known of its error, under its name and one of these endings: `_lower` and `_upper`,
bounds of a maximum, in place of the name by itself; `_stderr`; `_converged`; `_n_forward`, evaluations of the loss.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import xarray as xr
from torch import Tensor

from landscape.evaluate import Bracket, Estimate


class Variable(NamedTuple):
    """One variable or coordinate: its dimensions in order, its units, a long name, and the sentence or source that defines it.

    Dimensions in `optional` may be absent: a run alone, a single epsilon. Units of "loss" are the loss's own, whatever they are.
    """

    dims: tuple[str, ...]
    units: str
    long_name: str
    source: str
    optional: tuple[str, ...] = ()

    def attrs(self) -> dict[str, str]:
        """Units, long name and source as xarray attributes."""
        return {"units": self.units, "long_name": self.long_name, "source": self.source}


_KESKAR = "Keskar et al. 2017 (1609.04836), metric 2.1, at a token's logits z as Lee et al. 2024 (2405.18710), exact; "

SHARPNESS: dict[str, Variable] = {
    "logit_sharpness": Variable(
        ("run", "probe_step", "epsilon"),
        "percent",
        "sharpness at the logits, mean over the probed tokens",
        _KESKAR + "box epsilon (|z| + 1); tokens are perturbed separately, and this is the mean of their sharpnesses",
    ),
    "logit_sharpness_centred": Variable(
        ("run", "probe_step", "epsilon"),
        "percent",
        "sharpness at the centred logits, mean over the probed tokens",
        _KESKAR + "box epsilon (|z - mean z| + 1), unchanged by a shift of all logits; mean of the tokens' sharpnesses",
    ),
    "measured": Variable(("run",), "1", "whether the run was probed", "where False, the run's values are padding"),
    "probe_step": Variable(("probe_step",), "steps", "updates made before the probe", "0 is before the first update"),
    "epsilon": Variable(
        ("epsilon",), "1", "relative half-width of the box", "epsilon of Keskar's box epsilon (|z| + 1)"
    ),
}

QUANTISERS: dict[str, Variable] = {
    "quantisers": Variable(
        ("run", "probe_step"), "1", "what the measured loss does about the run's number formats",
        "'on': rounds as the run's forward pass does, straight through, so that derivatives are the smooth surrogate's; 'off': "
        "the same model in plain FP32 or FP64; 'finite-difference': as on, but H v is a difference of gradients",
        ("run", "probe_step"),
    ),
}  # fmt: skip


_RUN = ("run", "probe_step")
_TOKEN = (*_RUN, "position")
_BOX = "box epsilon (|x| + 1), metric 2.1 of Keskar et al. 2017 (1609.04836); "


def _measure(
    axis: str, units: str, long_name: str, source: str, where: tuple[str, ...] = _TOKEN, *, always: bool = False
) -> Variable:
    """A measure at a place and along an axis; every dimension may be absent, but the axis where it is `always` there."""
    return Variable((*where, axis), units, long_name, source, where if always else (*where, axis))


LANDSCAPE: dict[str, Variable] = {
    **SHARPNESS,
    "token_logit_sharpness": _measure(
        "epsilon", "percent", "sharpness at a token's logits", _KESKAR + "box epsilon (|z| + 1), or (|z - mean z| + 1) if centred"
    ),
    **QUANTISERS,
    "taken": Variable(
        ("run", "probe_step"), "1", "whether the run was measured there", "where False, its values are padding"
    ),
    "logit_sharpness_lbfgsb": _measure(
        "epsilon", "percent", "sharpness at a token's logits, by ten iterations of L-BFGS-B",
        _BOX + "for replication: it under-reports",
    ),
    "logit_sharpness_smoothed": _measure(
        "epsilon", "percent", "sharpness at a token's logits, of the loss with label smoothing and z-loss",
        _BOX + "a corner, and a certified bound",
    ),
    "hidden_sharpness": _measure(
        "epsilon", "percent", "sharpness at a token's final hidden state",
        _BOX + "corners found by sign ascent, and a certified bound",
    ),
    "box_sharpness": _measure(
        "epsilon", "percent", "sharpness in a box around some or all parameters", _BOX + "sought by ascent", _RUN
    ),
    "embedding_sharpness": _measure(
        "epsilon", "percent", "sharpness in a box around the token embeddings", _BOX + "sought by ascent", _RUN
    ),
    "sam_sharpness": _measure(
        "rho", "loss", "rise of the loss at SAM's perturbation",
        "f(w + rho g / ||g||) - f(w), Foret et al. 2021 (2010.01412)", _RUN,
    ),
    "m_sam_sharpness": _measure(
        "rho", "loss", "rise of the loss at SAM's perturbation, mean over sub-batches of m examples",
        "m-SAM, Foret et al. 2021 (2010.01412)", _RUN,
    ),
    "asam_sharpness": _measure(
        "rho", "loss", "rise of the loss at ASAM's perturbation",
        "f(w + rho s^2 g / ||s g||) - f(w), s = |w| + eta, Kwon et al. 2021 (2102.11600)", _RUN,
    ),
    "adaptive_sharpness": _measure(
        "rho", "loss", "adaptive worst-case sharpness",
        "max over ||d / |w||| <= rho of f(w + d) - f(w), Andriushchenko et al. 2023 (2302.07011), from below", _RUN,
    ),
    "average_sharpness": _measure(
        "rho", "loss", "average-case sharpness",
        "mean of f(w + d) - f(w), d ~ N(0, rho^2 s^2), s = |w| or 1, Andriushchenko et al. 2023 (2302.07011)", _RUN,
    ),
    "loss_slice": _measure(
        "alpha", "loss", "loss along a direction", "f(w + alpha d), or f((1 - alpha) w + alpha v)", _RUN, always=True
    ),
    "loss_plane": Variable(
        ("run", "probe_step", "alpha", "beta"), "loss", "loss over a plane",
        "f(w + alpha d + beta e); Li et al. 2018 (1712.09913)", _RUN,
    ),
    "direction_norm": Variable(_RUN, "1", "length of the direction", "Euclidean norm over all parameters", _RUN),
    "direction_cosine": Variable(_RUN, "1", "cosine of the two directions", "inner product over both norms", _RUN),
    "rho": Variable(("rho",), "1", "radius of the ball", "of d / s in the measure's norm"),
    "alpha": Variable(("alpha",), "1", "step along the direction", "in lengths of the direction"),
    "beta": Variable(("beta",), "1", "step along the second direction", "in lengths of the direction"),
    "position": Variable(("position",), "1", "token", "counted from 0"),
}  # fmt: skip

# Names that stand beside a measure, and beside other people's too: by themselves they are no sign of one.
BESIDE = {"measured", "taken", "loss", "residual", "converged", "n_hvp", "n_gradient", "n_forward", "weight", "density"}

# What an ending adds to the long name, and the units where they are not the measure's.
ENDINGS: dict[str, tuple[str, str | None]] = {
    "_lower": ("from below", None),
    "_upper": ("from above", None),
    "_stderr": ("standard error", None),
    "_converged": ("whether it is settled", "1"),
    "_n_forward": ("evaluations of the loss", "1"),
}


def describe(name: str, table: Mapping[str, Variable] = LANDSCAPE) -> Variable | None:
    """The row of a name, with or without an ending; None where the table has none."""
    if name in table:
        return table[name]
    for ending, (words, units) in ENDINGS.items():
        row = table.get(name.removesuffix(ending)) if name.endswith(ending) else None
        if row is not None:
            # A number of evaluations may be one for all.
            optional = row.dims if ending == "_n_forward" else row.optional
            return row._replace(units=units or row.units, long_name=f"{row.long_name}: {words}", optional=optional)
    return None


def labelled(
    name: str,
    result: Bracket | Estimate | Tensor,
    dims: Sequence[str] = (),
    coords: Mapping[str, Sequence[Any] | np.ndarray] | None = None,
    *,
    units: str | None = None,
) -> xr.Dataset:
    """A measure's result as a Dataset: its values, bounds and errors under the table's names, with units, and what it cost.

    A tensor is a value without an error, as the exact ones are. dims name the result's axes. units stand in for "loss"
    where the measure has the loss's. Raises ValueError for a name that the table doesn't have or dims that don't fit.
    """
    if name not in LANDSCAPE:
        raise ValueError(f"{name!r} is not in the schema; its names are {', '.join(sorted(LANDSCAPE))}")
    parts: dict[str, Tensor | int | None]
    if isinstance(result, Tensor):
        parts = {"": result}
    elif isinstance(result, Bracket):
        parts = {
            "_lower": result.lower,
            "_upper": result.upper,
            "_converged": result.converged,
            "_n_forward": result.n_forward,
        }
    else:
        parts = {"": result.value, "_stderr": result.stderr, "_n_forward": result.n_forward}
    data = {}
    for ending, value in parts.items():
        if value is None:
            continue
        row = describe(name + ending)
        assert row is not None
        attrs = row.attrs() | ({"units": units} if units and row.units == "loss" else {})
        array = np.asarray(value) if isinstance(value, int) else value.detach().cpu().numpy()
        if array.ndim not in (0, len(dims)):
            raise ValueError(f"{name} has {array.ndim} axes, got dims {tuple(dims)}; name each of them")
        data[name + ending] = xr.Variable(tuple(dims) if array.ndim else (), array, attrs)
    named = {
        c: xr.Variable((c,), np.asarray(v), LANDSCAPE[c].attrs() if c in LANDSCAPE else {})
        for c, v in (coords or {}).items()
    }
    return xr.Dataset(data, named)


def validate(tree: xr.Dataset | xr.DataTree, also: Mapping[str, Variable] | None = None) -> list[str]:
    """What is wrong with a dataset, or with every group of a tree, by the table: one line each, none if all is well.

    The table is `LANDSCAPE` with `CURVATURE`; `also` has further rows. Looks at names, dimensions, units and long names, not at
    values, so that nothing is loaded. Groups without a measure of the table are another's; beside one, a variable that is not in
    the table is reported.
    """
    from landscape.curvature import CURVATURE  # which is made of this module's Variables

    table = LANDSCAPE | CURVATURE | dict(also or {})
    if isinstance(tree, xr.Dataset):
        return list(_faults("", tree, table))
    nodes = ((node.path.rstrip("/") + "/", node.to_dataset(inherit=True)) for node in tree.subtree)
    return [line for where, data in nodes for line in _faults(where, data, table)]


def _faults(where: str, data: xr.Dataset, table: Mapping[str, Variable]) -> Iterator[str]:
    """The lines of one group."""
    names = sorted(map(str, data.data_vars))
    measures = {name: row for name in names if name not in BESIDE and (row := describe(name, table))}
    if not measures:
        return
    for name in names:
        row = describe(name, table)
        if row is None:
            yield f"{where}{name}: not in the schema"
            continue
        has = tuple(map(str, data[name].dims))
        if has != tuple(d for d in row.dims if d in has or d not in row.optional):
            wanted = ", ".join(f"[{d}]" if d in row.optional else d for d in row.dims)
            yield f"{where}{name}: dims are ({', '.join(has)}), must be ({wanted}), those in brackets where there are such"
        yield from _attributes(where, name, data[name], row)
        for ending, beside in (("_upper", "_lower"), ("_stderr", "")):
            if name.endswith(ending) and (other := name.removesuffix(ending) + beside) not in data:
                yield f"{where}{other}: missing beside {name}"
    if measures.keys() & SHARPNESS.keys() and "measured" not in data:
        yield f"{where}measured: missing; it tells runs that were measured from padding"
    used = {str(d) for name in measures for d in data[name].dims}
    for axis in sorted(used & (table.keys() - {"position"})):
        if axis not in data.coords:
            yield f"{where}{axis}: missing coordinate of a dimension"
        else:
            yield from _attributes(where, axis, data[axis], table[axis])


def _attributes(where: str, name: str, variable: xr.DataArray, row: Variable) -> Iterator[str]:
    """The lines on one variable's units and long name."""
    units = variable.attrs.get("units")
    if units is None:
        yield f"{where}{name}: units are missing, must be {row.units!r}"
    elif not row.units.endswith("loss") and units != row.units:
        yield f"{where}{name}: units are {units!r}, must be {row.units!r}"
    if "long_name" not in variable.attrs:
        yield f"{where}{name}: long_name is missing"
