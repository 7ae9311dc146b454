"""Where the groups of a scaled format lie in a tensor: which axes are split, and over which a group's amax is taken.

x [.., d, ..] with blocks of n along that axis is padded with zeros to a multiple of n and viewed as [.., d / n, n, ..]; tiles do
so twice. Reductions then run over the axes of size n, and broadcasting brings a scale back to its elements, so that a compiler
sees one loop.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from formats.scaled import Granularity


class Layout(NamedTuple):
    """How a tensor is cut into groups: padded with zeros, viewed with split axes, and reduced over `dims`."""

    pad: tuple[int, ...]
    padded: tuple[int, ...]
    view: tuple[int, ...]
    dims: tuple[int, ...]
    reduced: tuple[int, ...]
    group_shape: tuple[int, ...]
    batch_dims: int

    def split(self, x: Tensor) -> Tensor:
        """The tensor, padded, in the view in which groups have axes of their own."""
        if any(self.pad):
            x = torch.nn.functional.pad(x, self.pad)
        return x.reshape(self.view)

    def join(self, x: Tensor, shape: Sequence[int]) -> Tensor:
        """Back from the view to the tensor's own shape."""
        if not any(self.pad):
            # Not self.padded, though it is the same: of one group and many sizes Inductor (torch 2.11) sees no loop in that.
            return x.reshape(tuple(shape))
        x = x.reshape(self.padded)
        for axis, size in enumerate(shape):
            x = x.narrow(axis, 0, size)
        return x

    def check_whole(self, name: str) -> None:
        """ValueError if x had to be padded."""
        for axis, size in enumerate(self.padded):
            extra = self.pad[2 * (len(self.padded) - 1 - axis) + 1]
            if extra:
                raise ValueError(
                    f"{name} is stored in whole groups, and axis {axis} has {size - extra} elements; "
                    f"pad it with zeros to {size}"
                )


def lay_out(shape: Sequence[int], granularity: str, group: tuple[int, ...], axis: int, batch_dims: int) -> Layout:
    """The layout of groups in a tensor of that shape, the first batch_dims axes being separate tensors.

    ValueError for an axis that is not there, batch_dims that are more than the axes, and groups that would cross the batch.
    """
    ndim = len(shape)
    if not 0 <= batch_dims <= ndim:
        raise ValueError(f"batch_dims must be 0..{ndim} for a tensor of {ndim} axes, got {batch_dims}")
    if not -ndim <= axis < ndim:
        raise ValueError(f"axis must be {-ndim}..{ndim - 1} for a tensor of {ndim} axes, got {axis}")
    axis %= ndim
    tiled = granularity == Granularity.TILE
    if tiled and (axis != ndim - 1 or ndim - batch_dims < 2):
        raise ValueError(
            f"tiles lie in the last two axes after the {batch_dims} of the batch; got axis {axis} of {ndim}"
        )
    if granularity in (Granularity.ROW, Granularity.BLOCK, Granularity.TILE) and axis < batch_dims:
        raise ValueError(f"axis {axis} is one of the {batch_dims} batch_dims; groups must lie within a tensor")
    sizes = {ndim - 2: group[0], ndim - 1: group[1]} if tiled else {axis: group[0]} if group else {}
    padded: list[int] = []
    view: list[int] = []
    dims: list[int] = []
    groups: list[int] = []
    for i, size in enumerate(shape):
        if i in sizes:
            # Where no group is short a compiler of many sizes has to see that count * n is the size again.
            count = -(-size // sizes[i]) if size % sizes[i] else size // sizes[i]
            padded.append(count * sizes[i])
            dims.append(len(view) + 1)
            view += [count, sizes[i]]
            groups.append(count)
            continue
        padded.append(size)
        whole = (granularity == Granularity.TENSOR and i >= batch_dims) or (
            granularity == Granularity.ROW and i == axis
        )
        if whole:
            dims.append(len(view))
        view.append(size)
        groups.append(1 if whole else size)
    pad = [amount for i in reversed(range(ndim)) for amount in (0, padded[i] - shape[i])]
    reduced = [1 if i in dims else size for i, size in enumerate(view)]
    return Layout(tuple(pad), tuple(padded), tuple(view), tuple(dims), tuple(reduced), tuple(groups), batch_dims)


def against(tensor: Tensor, batch_dims: int, ndim: int) -> Tensor:
    """A value a tensor, as it broadcasts against what has the batch's axes and others, ndim in all."""
    return tensor.reshape(tuple(tensor.shape) + (1,) * (ndim - batch_dims)) if tensor.ndim else tensor
