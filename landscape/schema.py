"""What each variable of a sharpness dataset means: if it has this name, it has these dimensions, this unit, this
definition.

Whoever writes a dataset takes the attributes from here, and whoever reads one can hold it against this table.
"""

from __future__ import annotations

from typing import NamedTuple


class Variable(NamedTuple):
    """One variable or coordinate: its dimensions in order, its units, a long name, and the sentence or source that defines it."""

    dims: tuple[str, ...]
    units: str
    long_name: str
    source: str

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
