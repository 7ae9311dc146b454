"""`.exmy` on xarray's Datasets and DataTrees: `tree.exmy.plot.against("logit_sharpness")`, `tree.exmy.validate()`.

Thin: each method forwards to the function of the same name in `plot` or `schema`. On a tree, a picture is of the one group that
has the variable, the node's own first. matplotlib is not imported before something is drawn.
"""

from __future__ import annotations

from collections.abc import Hashable
from typing import TYPE_CHECKING, Any

import xarray as xr

from landscape.errors import LandscapeError
from landscape.schema import validate

if TYPE_CHECKING:
    from matplotlib.axes import Axes


class Plots:
    """The functions of `landscape.plot`, of a dataset or of a tree's group; keywords as there."""

    def __init__(self, of: xr.Dataset | xr.DataTree) -> None:
        self._of = of

    def against(self, name: str, along: Hashable | None = None, **how: Any) -> Axes:
        """A measure against one of its dimensions: `plot.against`."""
        from landscape import plot

        return plot.against(group_with(self._of, name), name, along, **how)

    def eigenvalues(self, **how: Any) -> Axes:
        """Eigenvalues by rank with their residuals: `plot.eigenvalues`."""
        from landscape import plot

        names = ("hessian_eigenvalue", "smallest_eigenvalue", "preconditioned_eigenvalue")
        return plot.eigenvalues(group_with(self._of, *names), **how)

    def spectral_density(self, **how: Any) -> Axes:
        """The density of the eigenvalues: `plot.spectral_density`."""
        from landscape import plot

        return plot.spectral_density(group_with(self._of, "node", "density"), **how)

    def loss_slice(self, **how: Any) -> Axes:
        """The loss along a direction: `plot.loss_slice`."""
        from landscape import plot

        return plot.loss_slice(group_with(self._of, "loss_slice"), **how)

    def loss_plane(self, **how: Any) -> Axes:
        """The loss over a plane: `plot.loss_plane`."""
        from landscape import plot

        return plot.loss_plane(group_with(self._of, "loss_plane"), **how)


@xr.register_dataset_accessor("exmy")
@xr.register_datatree_accessor("exmy")
class Accessor:
    """What exmy does with a dataset or a tree."""

    def __init__(self, of: xr.Dataset | xr.DataTree) -> None:
        self._of = of

    @property
    def plot(self) -> Plots:
        """Pictures, matplotlib Axes."""
        return Plots(self._of)

    def validate(self) -> list[str]:
        """What is wrong by the schema, one line each: `landscape.validate`."""
        return validate(self._of)


def group_with(of: xr.Dataset | xr.DataTree, *names: str) -> xr.Dataset:
    """The dataset itself; of a tree the one group that has one of the variables, or its bounds, the node's own first."""
    if isinstance(of, xr.Dataset):
        return of
    wanted = {n + ending for n in names for ending in ("", "_lower")}
    having = [node for node in of.subtree if wanted & set(map(str, node.data_vars))]
    if having and having[0] is of:
        having = having[:1]
    if len(having) != 1:
        found = ", ".join(node.path for node in having) or "none"
        raise LandscapeError(
            f"one group of the tree must have {' or '.join(names)}, got {found}; choose a node, as tree[PATH].exmy"
        )
    return having[0].to_dataset()
