"""A derivative as a program of its own: recorded once from what autograd does, without what its result does not need.

A Hessian-vector product is the tangent of a gradient. Computed as one goes it takes nine products of matrices where a gradient
takes three, since the gradient comes along; two thirds of one are for nothing, and the graph of what was recorded shows which. A
recorded program is the same operations on the same numbers, one by one; a compiled one is that fused by torch.compile, which
takes minutes for a large model, and rounds its own way. Each new program is held against the function at other numbers, so that
one in which a decision or a value was frozen is refused.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._pytree import tree_flatten, tree_unflatten

from landscape.errors import LandscapeError

How = Literal["eager", "recorded", "compiled"]
AWAY, SHARE = 1.25, 0.02


class Programs:
    """The programs of one function of tensors and of a batch's piece: one for each shape that a piece has.

    Whatever else the function reads is a constant of its programs, and so is each decision that it takes.
    """

    def __init__(self, function: Callable[..., Tensor], how: How) -> None:
        self._function, self._how = function, how
        self._made: dict[Any, Callable[..., Tensor]] = {}

    def __call__(self, tensors: Sequence[Tensor], piece: Any) -> Tensor:
        """The function of the tensors and the piece."""
        if self._how == "eager":
            return self._function(*tensors, piece)
        leaves, spec = tree_flatten(piece)
        at = [i for i, leaf in enumerate(leaves) if isinstance(leaf, Tensor)]
        key = (
            spec,
            *(
                (leaf.shape, leaf.dtype) if i in at else id(leaf) if callable(leaf) else leaf
                for i, leaf in enumerate(leaves)
            ),
        )
        if key not in self._made:
            count, others = len(tensors), list(leaves)

            def of_tensors(*given: Tensor) -> Tensor:
                for i, leaf in zip(at, given[count:], strict=True):
                    others[i] = leaf
                return self._function(*given[:count], tree_unflatten(others, spec))

            arguments = [leaves[i] for i in at]
            elsewhere = [*(AWAY * t for t in tensors), *arguments]
            want = of_tensors(*elsewhere)  # which also says whether the function has that derivative at all
            try:
                program = _program(of_tensors, [*tensors, *arguments], self._how)
                same = _alike(program(*elsewhere), want)
            except torch.OutOfMemoryError:
                raise
            except RuntimeError as error:
                raise LandscapeError(_refusal(self._how, str(error).strip().split("\n")[0])) from error
            if not same:
                raise LandscapeError(_refusal(self._how, "at other parameters its program gives other numbers"))
            self._made[key] = program
        return self._made[key](*tensors, *(leaves[i] for i in at))


def _refusal(how: How, why: str) -> str:
    return f"the loss can't be {how}, as when its course depends on values: {why}; take program='eager'"


def _alike(got: Tensor, want: Tensor) -> bool:
    """Whether two results are one but for rounding, with room for what rounds to a format otherwise."""
    size = want.nan_to_num(0.0, 0.0, 0.0).abs().amax()
    apart = (got - want).abs().nan_to_num(0.0, torch.inf, torch.inf).amax()
    return bool((apart <= SHARE * size) & torch.equal(got.isnan(), want.isnan()))


def _program(function: Callable[..., Tensor], arguments: list[Tensor], how: How) -> Callable[..., Tensor]:
    module = make_fx(function)(*arguments)
    module.graph.eliminate_dead_code()
    module.recompile()
    if how != "compiled":
        return module
    # The compiler hears of PyTorch's switch by this call alone, and may not have been imported when it was turned.
    torch.use_deterministic_algorithms(
        torch.are_deterministic_algorithms_enabled(), warn_only=torch.is_deterministic_algorithms_warn_only_enabled()
    )
    program: Callable[..., Tensor] = torch.compile(module, fullgraph=True)
    return program
