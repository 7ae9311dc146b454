"""A loss at a point and around it: what every measure of `boxes`, `balls` and `slices` evaluates.

A loss is any callable `loss(params, batch)` with params a dict of tensors: a scalar, or one value a run, [R], where every
parameter has a leading run axis. Runs don't touch each other, so the gradient of the sum is all runs' gradients at once.

Parameters are never written to: a perturbed point is a new dict. Random numbers that the loss draws (dropout) are the same in
every evaluation, so that a difference of two losses is the landscape's and not the noise's: the loss is evaluated twice before
anything else, and refused where the bits differ. The generators, and what `state` names (buffers that the loss writes to), are
before every evaluation as they were at first, and afterwards too, also after an exception.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils._pytree import tree_map

from landscape.errors import LandscapeError

Params = dict[str, Tensor]
Loss = Callable[[Params, Any], Tensor]
State = nn.Module | Iterable[Tensor]
"""What a loss may write to, and finds as it was: a module's parameters and buffers, or tensors."""


class Batches:
    """A batch in parts: its loss is the parts' mean, weighted by their sizes, and only one part's graph is held at a time.

    sizes: the parts' numbers of tokens or examples, or a function that tells a part's. LandscapeError unless each part has one.
    """

    def __init__(self, parts: Iterable[Any], sizes: Sequence[float] | Callable[[Any], float]) -> None:
        self.parts = list(parts)
        self.sizes = [float(size) for size in (map(sizes, self.parts) if callable(sizes) else sizes)]
        if not self.parts or len(self.sizes) != len(self.parts):
            raise LandscapeError(
                f"each part of a batch needs its size, got {len(self.parts)} parts and {len(self.sizes)} sizes"
            )
        if not all(0 < size < math.inf for size in self.sizes):
            raise LandscapeError(f"sizes must be positive numbers of tokens or examples, got {self.sizes}")

    @property
    def shares(self) -> list[float]:
        """The weight of each part's loss in the batch's, 1 in sum."""
        whole = math.fsum(self.sizes)
        return [size / whole for size in self.sizes]

    @classmethod
    def of(cls, batch: Any) -> Batches:
        """A batch that may be in parts; in one, where it is not."""
        return batch if isinstance(batch, cls) else cls([batch], [1.0])


@dataclass(frozen=True)
class Bracket:
    """A maximum, from below by a point that was found and, where a proof exists, from above. Percent or the loss's units."""

    lower: Tensor
    upper: Tensor | None
    """None: nothing is known from above."""
    converged: Tensor
    """Whether lower is the maximum: enumerated, or equal to upper within 1e-9; without upper, whether the ascent came to rest."""
    n_forward: Tensor
    """Evaluations of the loss."""


@dataclass(frozen=True)
class Estimate:
    """A value, its standard error where chance takes part in it (else None), and the number of evaluations of the loss."""

    value: Tensor
    stderr: Tensor | None
    n_forward: int


def module_loss(module: nn.Module, compute: Callable[[nn.Module, Any], Tensor]) -> tuple[Loss, Params]:
    """`loss(params, batch)` and params of an ordinary module; compute(module, batch) is the loss as one writes it.

    Evaluations work on copies of the buffers, so that running means and counters stay what they were, in the parameters' dtype.
    """
    params = {name: value.detach() for name, value in module.named_parameters()}

    class Computed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = module

        def forward(self, batch: Any) -> Tensor:
            return compute(self.inner, batch)

    computed = Computed()

    def loss(at: Params, batch: Any) -> Tensor:
        dtype = next(iter(at.values())).dtype
        copies = {name: value.detach().clone() for name, value in module.named_buffers()}
        buffers = {f"inner.{n}": v.to(dtype) if v.is_floating_point() else v for n, v in copies.items()}
        swapped = {f"inner.{name}": value for name, value in at.items()}
        result: Tensor = functional_call(computed, {**swapped, **buffers}, (batch,))
        return result

    return loss, params


class Point:
    """A loss at parameters, to be evaluated at perturbations of them; a context that leaves generators as they were.

    Values are FP64 [R]; without a run axis R is 1, and parameters are used as they are.
    """

    def __init__(self, loss: Loss, params: Mapping[str, Tensor], batch: Any, run_axis: bool, state: State = ()) -> None:
        with torch.inference_mode(False):
            self.params = {name: differentiable(value.detach()) for name, value in params.items()}
            batches = Batches.of(batch)
            self._parts, self._shares = tree_map(differentiable, batches.parts), batches.shares
        self.runs = check_params(self.params, run_axis)
        self.run_axis = run_axis
        self.n_forward = 0
        self._checked = False
        self._loss = loss
        self._state = tensors_of(state)
        self._cuda = sorted({v.device.index for v in self.params.values() if v.device.type == "cuda"})

    def __enter__(self) -> Self:
        self._rng = torch.get_rng_state()
        self._cuda_rng = [torch.cuda.get_rng_state(i) for i in self._cuda]
        self._kept = [tensor.detach().clone() for tensor in self._state]
        self._inference = torch.inference_mode(False)  # what is made in it can't be differentiated
        self._inference.__enter__()
        return self

    def __exit__(self, *_: object) -> None:
        self._inference.__exit__(None, None, None)
        self._rewind()

    def _rewind(self) -> None:
        torch.set_rng_state(self._rng)
        for i, state in zip(self._cuda, self._cuda_rng, strict=True):
            torch.cuda.set_rng_state(state, i)
        with torch.no_grad():
            for tensor, before in zip(self._state, self._kept, strict=True):
                tensor.copy_(before)

    def value(self, delta: Mapping[str, Tensor] | None = None) -> Tensor:
        """The loss at params + delta, [R]; names that delta lacks stay."""
        return self.value_at(self._moved(delta))

    def value_at(self, params: Params) -> Tensor:
        """The loss at other parameters of the same shapes, [R]."""
        with torch.no_grad():
            return self._sum(params, backward=None)

    def slope(
        self, delta: Mapping[str, Tensor] | None = None, names: Sequence[str] | None = None
    ) -> tuple[Tensor, Params]:
        """The loss at params + delta, [R], and its gradient in the named parameters (all), shaped as they are."""
        at = self._moved(delta)
        wanted = list(self.params) if names is None else list(names)
        leaves = {name: at[name].detach().requires_grad_(True) for name in wanted}
        gradient = {name: torch.zeros_like(leaf) for name, leaf in leaves.items()}

        def backward(share: Tensor) -> None:
            found = torch.autograd.grad(share.sum(), list(leaves.values()), allow_unused=True)
            for name, part in zip(wanted, found, strict=True):
                if part is not None:
                    gradient[name] += part

        with torch.enable_grad():
            return self._sum({**at, **leaves}, backward), gradient

    def _moved(self, delta: Mapping[str, Tensor] | None) -> Params:
        return {name: value + delta[name] if delta and name in delta else value for name, value in self.params.items()}

    def _sum(self, at: Params, backward: Callable[[Tensor], None] | None) -> Tensor:
        """The mean over the parts, each by its size; before the first, whether the loss is one function."""
        if not self._checked:
            self._checked = True
            with torch.no_grad():
                check_same(*(self._sum(self.params, None) for _ in range(2)))
            self.n_forward = 0
        self._rewind()
        self.n_forward += 1
        total = torch.zeros(self.runs, dtype=torch.float64, device=next(iter(at.values())).device)
        for part, weight in zip(self._parts, self._shares, strict=True):
            loss = self._loss(at, part)
            if loss.shape != ((self.runs,) if self.run_axis else ()):
                wanted = f"one value a run, ({self.runs},)" if self.run_axis else "a scalar"
                raise ValueError(f"loss(params, batch) must return {wanted}, got shape {tuple(loss.shape)}")
            share = loss * weight
            if backward is not None:
                backward(share)
            total += share.detach().double()
        return total

    def finish(self, values: Tensor) -> Tensor:
        """[R, ...] as the caller is to see it: without the run axis where there was none."""
        return values if self.run_axis else values.squeeze(0)

    def norm(self, delta: Mapping[str, Tensor]) -> Tensor:
        """The Euclidean norm over all tensors, [R]."""
        return torch.stack([self.flat(d).double().square().sum(1) for d in delta.values()]).sum(0).sqrt()

    def flat(self, value: Tensor) -> Tensor:
        """[R, n]."""
        return value.reshape(self.runs, -1)

    def spread(self, per_run: Tensor, like: Tensor) -> Tensor:
        """A number a run, [R], shaped to multiply a parameter, in its dtype."""
        return (
            per_run.to(like.dtype).reshape([-1] + [1] * (like.ndim - 1)) if self.run_axis else per_run[0].to(like.dtype)
        )


def differentiable(x: Any) -> Any:
    """A tensor that was made in inference mode as one that can be differentiated, a copy; anything else as it is."""
    return x.clone() if isinstance(x, Tensor) and x.is_inference() else x


def tensors_of(state: State) -> list[Tensor]:
    """The tensors of a state."""
    return [*state.parameters(), *state.buffers()] if isinstance(state, nn.Module) else list(state)


def check_same(first: Tensor, second: Tensor) -> None:
    """LandscapeError unless two evaluations of a loss, [R], gave the same bits, NaN for NaN."""
    if not torch.equal(first.nan_to_num(), second.nan_to_num()) or not torch.equal(first.isnan(), second.isnan()):
        worst = (first - second).abs().max().item()
        raise LandscapeError(
            f"the loss is not deterministic: the same parameters and batch gave values {worst:.2g} apart; turn dropout off "
            "(module.eval()), draw random numbers from a seed, and use deterministic algorithms"
        )


def draw(params: Mapping[str, Tensor], seed: int, word: str, run_axis: bool) -> Params:
    """Standard normal numbers, shaped as the parameters: the same for every run and on every device.

    Each tensor has a generator of its own, keyed by the seed, the word and its name, so that a slot in a pack, another pack
    or a parameter beside it changes nothing.
    """
    drawn = {}
    for name, value in params.items():
        key = hashlib.sha256(f"{seed}/{word}/{name}".encode()).digest()[:8]
        generator = torch.Generator().manual_seed(int.from_bytes(key, "little") >> 1)
        shape = value.shape[1:] if run_axis else value.shape
        noise = torch.randn(shape, generator=generator, dtype=torch.float64).to(value)
        drawn[name] = noise.expand_as(value)
    return drawn


def check_params(params: Mapping[str, Tensor], run_axis: bool) -> int:
    """The number of runs, or ValueError."""
    if not params:
        raise ValueError("params must have at least one tensor, got none; pass dict(model.named_parameters())")
    for name, value in params.items():
        if value.dtype not in (torch.float32, torch.float64):
            raise ValueError(
                f"parameter {name!r} must be float32 or float64, got {value.dtype}; a small step would round away: use .float()"
            )
    if not run_axis:
        return 1
    runs = {value.shape[0] if value.ndim else 0 for value in params.values()}
    if len(runs) != 1 or 0 in runs:
        raise ValueError(f"with run_axis every parameter must be [R, ...] of one R >= 1, got R of {sorted(runs)}")
    return runs.pop()


def grid_of(name: str, values: float | Sequence[float]) -> list[float]:
    """A number or a sequence of them as a list, or ValueError where one is not positive and finite."""
    listed = [float(v) for v in values] if isinstance(values, Sequence) else [float(values)]
    if not listed or not all(0 < v < math.inf for v in listed):
        raise ValueError(f"{name} must be positive and finite, or a sequence of such, got {values}")
    return listed


def count_of(name: str, value: int, least: int = 1) -> int:
    """A whole number from `least` on, or ValueError."""
    if value < least:
        raise ValueError(f"{name} must be at least {least}, got {value}")
    return value
