"""A loss as a function of its parameters, and its gradients and Hessian-vector products (HVPs), for a pack of runs at once.

Any torch callable `loss(params, batch)` will do, params a dict of tensors (nested, if need be). With `run_axis` every
parameter has a leading run axis R, and the loss is [R], run r's from run r's parameters alone. The Hessian of the runs' sum
is block diagonal, so one product with it is every run's own:

    H v = d/dt grad f(theta + t v) at t = 0,      f = sum_r f_r     (Pearlmutter 1994)

computed forward over reverse: the gradient's program, pushed forward along v. Where an operation has no forward-mode derivative,
as the gradient of <grad f, v>: twice in reverse. `Problem.mode` says which, `Problem.why` for what reason. A loss with rounding
in it has no derivative that tells of the rounding; of such a one the third way is a difference of gradients,

    H v ~ (grad f(theta + h v) - grad f(theta - h v)) / 2 h,       h ||v|| = difference ||theta||,

over a step that has to be wider than what the loss can tell apart: where both ends give the same bits it is refused, or NaN for
a run of several.

With `of_runs`, the loss of some runs alone, a pack is evaluated `group` runs at a time, and what is asked of some runs costs no
more than these: a search that most runs have ended goes on with the others. A group is always as large, filled up by repeating
its last run, so that a run's bits do not depend on who else is in it, or is not any more.

A batch may come in pieces, as `Batches` with their numbers of tokens or examples. Then everything is of the weighted mean

    f = sum_b w_b f_b / sum_b w_b,      f_b the mean over piece b,

which is the loss of the whole batch: neither a sum that grows with the number of pieces, nor a mean that counts a short last
piece as a long one.

Nothing of the caller's is touched. Parameters are copied in the precision asked for, the random state is put back, and so is all
that `state` names: buffers that the loss writes to. Products run in true FP32 or FP64 (TF32 off), and attention by
`scaled_dot_product_attention` takes its mathematical form, since the fused ones have no second derivative; datasets and, once,
the log say so.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_flatten, tree_map, tree_unflatten

from landscape.errors import LandscapeError
from landscape.evaluate import Batches, State, check_same, tensors_of
from landscape.programs import How, Programs

OfRuns = Callable[[Sequence[int]], tuple[Callable[[Any, Any], Tensor], Any]]
"""Of some runs, by their numbers, the last maybe several times: their loss, and their batch as `Problem` takes it."""
Piece = tuple[Callable[[Any, Any], Tensor], Any]  # of a batch, with the loss that takes it
Mode = Literal["forward-over-reverse", "double-backward", "finite-difference"]
# Of central differences, as a share of the parameters' length: eps^(1/3) balances rounding with what a difference leaves out, and
# in FP32 it is less, as losses bend within it; in BF16's grid a step of 2^-10 still moves every fourth weight.
DIFFERENCE = {torch.float32: 2.0**-10, torch.float64: 2.0**-17}
SWITCHED = "scaled_dot_product_attention takes its mathematical form: the fused ones have no second derivative"

logger = logging.getLogger(__name__)


class Problem:
    """A loss at a point: values, gradients and Hessian-vector products in parameter space, flat, in one precision.

    loss: `loss(params, batch)` -> a scalar, or [R] with `run_axis`. params: a dict, nested if need be, of floating tensors.
    batch: what the loss takes, or `Batches` of it. dtype: FP32 or FP64, to which parameters and the batch's floating tensors are
    cast. state: a module, or tensors, that the loss may write to, put back after every evaluation. units: of the loss, for what
    is labelled, such as "nats". products: how H v is made, tried in order if left out. difference: the step of finite
    differences, a share of the parameters' length. program: whether gradients and their tangents are recorded once and run
    again, or compiled (see `programs`); what a loss decides in Python is then decided once. quantisers: a word for what the
    loss does about number formats, which becomes a coordinate of every dataset. of_runs: the same loss for some of the runs, each
    with its own part of the batch, of which so many as `group` says are evaluated at a time (all, without it); only for programs
    that are run as they come, "eager".

    Vectors are [R, P], P the parameters of a run, R = 1 without `run_axis`; `tree` gives them back their names. The loss is
    evaluated twice before anything else: LandscapeError where its bits differ, or shapes don't fit.
    """

    def __init__(
        self,
        loss: Callable[[Any, Any], Tensor],
        params: Mapping[str, Any],
        batch: Any,
        *,
        run_axis: bool = False,
        dtype: torch.dtype = torch.float32,
        state: State = (),
        units: str = "loss",
        products: Mode | None = None,
        difference: float | None = None,
        program: How = "eager",
        quantisers: str | None = None,
        of_runs: OfRuns | None = None,
        group: int | None = None,
    ) -> None:
        if dtype not in (torch.float32, torch.float64):
            raise LandscapeError(f"dtype must be torch.float32 or torch.float64, got {dtype}")
        self.loss, self.run_axis, self.dtype = loss, run_axis, dtype
        self.units = units
        self._state = tensors_of(state)
        leaves, self._spec = tree_flatten(dict(params))
        self.R = _check_leaves(leaves, run_axis)
        self.shapes = [tuple(leaf.shape) for leaf in leaves]
        self.device: torch.device = leaves[0].device
        with _no_inference():
            self.point = self._flat([leaf.detach().to(dtype, copy=True) for leaf in leaves])
        self.P = self.point.shape[1]
        self.group = _check_group(self.R, of_runs, group, run_axis=run_axis, program=program)
        self._of_runs, self._some = of_runs, dict[tuple[int, ...], list[Piece]]()
        self._pieces, self._shares = self._cast(loss, Batches.of(batch))
        self.mode: Mode = products or "forward-over-reverse"
        self.why = "" if products is None else "asked for"
        self._settled, self._asked, self._keeps_graph = False, products is not None, False
        self.difference = _check_difference(self.mode, difference, dtype)
        self.quantisers, self.program = quantisers, program
        self._tangents = Programs(self._forward_over_reverse, program)
        self._gradients = Programs(self._loss_and_gradient, program)
        self.attention_why = ""
        self._check_loss()

    def tree(self, vector: Tensor) -> Any:
        """A vector [R, P] as parameters: the caller's dict, names and shapes."""
        return tree_unflatten(self._leaves(vector), self._spec)

    def vector(self, tree: Mapping[str, Any]) -> Tensor:
        """The vector [R, P] of tensors that are named and shaped as the parameters are, in the problem's dtype."""
        leaves, spec = tree_flatten(dict(tree))
        if spec != self._spec or [tuple(leaf.shape) for leaf in leaves] != self.shapes:
            raise LandscapeError(
                f"a vector must be named, ordered and shaped as the parameters are, {list(self.tree(self.point))}"
            )
        with _no_inference():
            return self._flat([leaf.detach().to(self.point, copy=True) for leaf in leaves])

    def value(self, at: Tensor | None = None, runs: Sequence[int] | None = None) -> Tensor:
        """The loss [R] at a point [R, P], or at the parameters; one forward pass. With runs, of these: [n], at [n, P]."""
        with self._undisturbed(), torch.no_grad():
            return self._mean(lambda point, piece: self._losses(self._leaves(point), piece), runs, self._at(at, runs))

    def gradient(self, at: Tensor | None = None, runs: Sequence[int] | None = None) -> tuple[Tensor, Tensor]:
        """The loss [R] and its gradient [R, P] at a point [R, P], or at the parameters; with runs, of these."""
        with self._undisturbed():
            parts = self._mean(lambda point, piece: self._gradients((point,), piece), runs, self._at(at, runs))
            return parts[:, 0], parts[:, 1:]

    def hvp(self, v: Tensor, runs: Sequence[int] | None = None) -> Tensor:
        """H v of every run, [R, P] -> [R, P], at the parameters: forward over reverse, twice in reverse, or by differences.

        runs: whose v [n, P] these are, where they are not all.
        """
        count = self.R if runs is None else len(runs)
        if v.shape != (count, self.P):
            raise LandscapeError(
                f"a vector must be [{count}, {self.P}], runs and parameters of a run, got {list(v.shape)}"
            )
        v = v.detach().to(self.point)
        if self.attention_why:
            _say_once(self.attention_why)
        if self.mode == "finite-difference":
            return self._by_differences(v, runs)
        with self._undisturbed():
            return self._mean(self._product, runs, self._at(None, runs), v)

    def _at(self, point: Tensor | None, runs: Sequence[int] | None) -> Tensor:
        """A point of these runs, or where their parameters are."""
        if point is not None or runs is None:
            return self.point if point is None else point
        in_a_row = list(runs) == list(range(runs[0], runs[0] + len(runs)))
        return self.point[runs[0] : runs[0] + len(runs)] if in_a_row else self.point[list(runs)]

    def _product(self, point: Tensor, v: Tensor, piece: Piece) -> Tensor:
        """H v of one piece; the first one settles how it is made."""
        while self.mode == "forward-over-reverse":
            try:
                product = self._tangents((point, v), piece)
            except torch.OutOfMemoryError:
                raise
            except RuntimeError as error:
                if self._settled:
                    raise
                if not self._keeps_graph:
                    self._keeps_graph = True
                    continue
                if self._asked:
                    raise
                self.mode, self.why = "double-backward", str(error).strip().split("\n")[0]
            else:
                self._settled = True
                return product
        return self._double_backward(point, v, piece)

    def _forward_over_reverse(self, point: Tensor, v: Tensor, piece: Piece) -> Tensor:
        # Dual numbers through plain autograd, and not torch.func.jvp of torch.func.grad: that keeps the graph of the backward
        # pass, which a third derivative would need. Some operations, silu among them, have a forward mode with that graph only.
        with forward_ad.dual_level():
            leaves = [
                forward_ad.make_dual(leaf.clone().requires_grad_(), tangent)
                for leaf, tangent in zip(self._leaves(point), self._leaves(v), strict=True)
            ]
            gradient = _gradient(self._losses(leaves, piece).sum(), leaves, create_graph=self._keeps_graph)
            pairs = [forward_ad.unpack_dual(g) for g in gradient]
            return self._flat([torch.zeros_like(g) if t is None else t for g, t in pairs])

    def _double_backward(self, point: Tensor, v: Tensor, piece: Piece) -> Tensor:
        leaves = [leaf.clone().requires_grad_() for leaf in self._leaves(point)]
        first = _gradient(self._losses(leaves, piece).sum(), leaves, create_graph=True)
        slope = torch.stack([(g * a).sum() for g, a in zip(first, self._leaves(v), strict=True)]).sum()
        return self._flat(_gradient(slope, leaves))

    def _by_differences(self, v: Tensor, runs: Sequence[int] | None) -> Tensor:
        point = self._at(None, runs)
        length = v.norm(dim=1, keepdim=True)
        moves = length > 0
        size = point.norm(dim=1, keepdim=True)
        h = self.difference * torch.where(size > 0, size, 1.0) / torch.where(moves, length, 1.0)
        (up, after), (down, before) = (self.gradient(point + sign * h * v, runs) for sign in (1, -1))
        same = (up == down) & (after == before).all(1) & moves[:, 0]
        product = torch.where(moves, (after - before) / (2 * h), torch.zeros_like(v))
        if not same.any():
            return product
        vanished = same & (self.value(point + h * v / self.difference, runs) != up)
        if vanished.any():
            why = (
                f"a step of {self.difference:.2g} of the parameters' length vanishes, as narrow formats round: the loss and its "
                "gradient have the same bits at both ends; make difference larger"
            )
            if vanished.all() and len(v) == self.R:
                raise LandscapeError(why)
            _say_once(f"{why}; NaN for runs where it does")
        return torch.where(vanished[:, None], torch.nan, product)

    def _loss_and_gradient(self, point: Tensor, piece: Piece) -> Tensor:
        """[R, 1 + P]."""
        leaves = [leaf.clone().requires_grad_() for leaf in self._leaves(point)]
        losses = self._losses(leaves, piece)
        return self._flat([losses.detach(), *_gradient(losses.sum(), leaves)])

    def _mean(self, of: Callable[..., Tensor], runs: Sequence[int] | None, *tensors: Tensor) -> Tensor:
        """The weighted mean over the pieces of `of(*tensors, piece)`, tensors [n, P] of these runs or all, a group at a time."""
        if self._of_runs is None and runs is not None:
            spread = [self.point.clone(), *(torch.zeros_like(self.point) for _ in tensors[1:])]
            for whole, some in zip(spread, tensors, strict=True):
                whole[list(runs)] = some
            return self._of_pieces(of, self._pieces, *spread)[list(runs)]
        if runs is None and self.group == self.R:
            return self._of_pieces(of, self._pieces, *tensors)
        numbers, found = list(range(self.R) if runs is None else runs), []
        for first in range(0, len(numbers), self.group):
            own = numbers[first : first + self.group]
            missing = self.group - len(own)
            parts = [t[first : first + self.group] for t in tensors]
            if missing:
                parts = [torch.cat([part, part[-1:].expand(missing, -1)]) for part in parts]
            pieces = self._pieces_of((*own, *[own[-1]] * missing))
            found.append(self._of_pieces(of, pieces, *parts)[: len(own)])
        return found[0] if len(found) == 1 else torch.cat(found)

    def _of_pieces(self, of: Callable[..., Tensor], pieces: list[Piece], *tensors: Tensor) -> Tensor:
        total = of(*tensors, pieces[0]).detach() * self._shares[0]
        for piece, share in zip(pieces[1:], self._shares[1:], strict=True):
            total += of(*tensors, piece).detach() * share
        return total

    def _pieces_of(self, runs: tuple[int, ...]) -> list[Piece]:
        """The pieces of some runs, made once as long as they are asked for."""
        assert self._of_runs is not None
        pieces = self._some.pop(runs, None)
        if pieces is None:
            loss, batch = self._of_runs(runs)
            pieces, shares = self._cast(loss, Batches.of(batch))
            if shares != self._shares:
                raise LandscapeError(f"of_runs must part the batch as it is for all runs, {self._shares}, got {shares}")
        self._some[runs] = pieces
        while len(self._some) > 2 * -(-self.R // self.group):
            del self._some[next(iter(self._some))]
        return pieces

    def _losses(self, leaves: list[Tensor], piece: Piece) -> Tensor:
        """The losses of a piece's runs, [n]."""
        of, batch = piece
        loss: Tensor = of(tree_unflatten(leaves, self._spec), batch)
        count = len(leaves[0]) if self.run_axis else 1
        wanted = (count,) if self.run_axis else ()
        if not isinstance(loss, Tensor) or tuple(loss.shape) != wanted:
            shape = list(loss.shape) if isinstance(loss, Tensor) else type(loss).__name__
            raise LandscapeError(
                f"loss must return {f'[{count}], one a run' if self.run_axis else 'a scalar'}, got {shape}"
            )
        return loss.reshape(count)

    def _check_loss(self) -> None:
        # In one go, so that a loss that draws from the global random state, which is put back afterwards, draws twice.
        watch = _Watch()
        with self._undisturbed(), torch.no_grad(), watch:
            first, second = (
                self._mean(lambda point, piece: self._losses(self._leaves(point), piece), None, self.point)
                for _ in range(2)
            )
        self.attention_why = SWITCHED if watch.seen else ""
        check_same(first, second)

    def _cast(self, loss: Callable[[Any, Any], Tensor], batch: Batches) -> tuple[list[Piece], list[float]]:
        """The pieces of a batch, their floating tensors in the problem's dtype, with their loss; and their shares."""

        def cast(x: Any) -> Any:
            if not isinstance(x, Tensor):
                return x
            return (x.clone() if x.is_inference() else x).to(self.dtype if x.is_floating_point() else x.dtype)

        with _no_inference():
            return [(loss, tree_map(cast, piece)) for piece in batch.parts], batch.shares

    def _flat(self, leaves: Sequence[Tensor]) -> Tensor:
        return torch.cat([leaf.reshape(len(leaf) if self.run_axis else 1, -1) for leaf in leaves], 1)

    def _leaves(self, vector: Tensor) -> list[Tensor]:
        sizes = [torch.Size(shape).numel() // self.R for shape in self.shapes]
        parts, lead = vector.split(sizes, 1), (len(vector),) if self.run_axis else ()
        return [part.reshape((*lead, *shape[len(lead) :])) for part, shape in zip(parts, self.shapes, strict=True)]

    @contextmanager
    def _undisturbed(self) -> Iterator[None]:
        """Evaluate in the mathematical form and in full precision, and leave everything as it was, also after an exception."""
        kept = [tensor.detach().clone() for tensor in self._state]
        matmul = torch.backends.cuda.matmul
        tf32 = matmul.allow_tf32
        devices = list(range(torch.cuda.device_count())) if torch.cuda.is_initialized() else []
        try:
            matmul.allow_tf32 = False
            with torch.random.fork_rng(devices), _no_inference(), torch.enable_grad(), sdpa_kernel(SDPBackend.MATH):
                yield
        finally:
            matmul.allow_tf32 = tf32
            with torch.no_grad():
                for tensor, before in zip(self._state, kept, strict=True):
                    tensor.copy_(before)


class _Watch(TorchFunctionMode):
    """Whether attention was asked for by name, in whatever form."""

    seen = False

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.seen = self.seen or func is scaled_dot_product_attention
        return func(*args, **(kwargs or {}))


@functools.cache
def _say_once(line: str) -> None:
    logger.warning(line)


def _check_difference(mode: Mode, difference: float | None, dtype: torch.dtype) -> float:
    """The step of finite differences, a share of the parameters' length."""
    if difference is None:
        return DIFFERENCE[dtype]
    if mode != "finite-difference":
        raise LandscapeError(f"difference is a step of finite differences, got {difference} for products by {mode}")
    if not 0 < difference < float("inf"):
        raise LandscapeError(f"difference must be positive, a share of the parameters' length, got {difference}")
    return difference


def _gradient(of: Tensor, leaves: list[Tensor], create_graph: bool = False) -> list[Tensor]:
    """The gradient of a scalar; zero in what it does not depend on."""
    if not of.requires_grad:
        return [torch.zeros_like(leaf) for leaf in leaves]
    found = torch.autograd.grad(of, leaves, create_graph=create_graph, allow_unused=True, materialize_grads=True)
    return list(found)


def _check_group(R: int, of_runs: OfRuns | None, group: int | None, *, run_axis: bool, program: How) -> int:
    """How many runs are evaluated at a time, at most R."""
    if of_runs is None:
        if group is not None:
            raise LandscapeError(f"group={group} needs of_runs, the loss of some runs alone")
        return R
    if not run_axis or program != "eager":
        raise LandscapeError(
            f'of_runs needs run_axis=True and program="eager", got run_axis={run_axis} and program={program!r}'
        )
    if group is not None and group < 1:
        raise LandscapeError(f"group must be at least 1, got {group}")
    return min(group or R, R)


def _check_leaves(leaves: list[Any], run_axis: bool) -> int:
    """Runs of the parameters, 1 without a run axis."""
    for leaf in leaves:
        if not isinstance(leaf, Tensor) or not leaf.is_floating_point():
            found = leaf.dtype if isinstance(leaf, Tensor) else type(leaf).__name__
            raise LandscapeError(f"params must be floating tensors, got {found}; leave what is not trained to the loss")
    if not leaves:
        raise LandscapeError("params must hold at least one tensor, got none")
    if not run_axis:
        return 1
    axes = {leaf.shape[0] if leaf.ndim else 0 for leaf in leaves}
    if len(axes) != 1 or 0 in axes:
        raise LandscapeError(
            f"with run_axis=True every parameter leads with the run axis, got {sorted(axes)} as its lengths"
        )
    return int(axes.pop())


@contextmanager
def _no_inference() -> Iterator[None]:
    """What is made in inference mode can't be differentiated, so copies are made outside of it."""
    with torch.inference_mode(False):
        yield
