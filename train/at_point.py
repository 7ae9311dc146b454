"""A pack's loss at the weights that it has, as `landscape` takes it: all runs at once, on the first held-out batch.

The batch comes in parts of a few sequences, so that no more of it is in memory at a time, with their sizes as weights. Runs whose
weights or loss are not finite are told apart first: they have no landscape, and in their slots stand the weights of one that has,
so that nothing of theirs costs time or gets into a loop that waits for all. `landscape`'s numbers of a run don't depend on its
neighbours, so this changes nobody's.

Everything here reads the pack, and leaves weights, moments, histories and generators as they are.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from landscape import Batches, Problem, adam_preconditioner
from train.determinism import deterministic
from train.model import ModelShape
from train.program import Probe

if TYPE_CHECKING:
    from train.pack import Pack

Params = dict[str, Tensor]
Loss = Callable[[Mapping[str, Tensor], Any], Tensor]


class AtPoint:
    """A pack's loss around its present weights. `finite`, [R]: which runs have one there."""

    def __init__(self, pack: Pack, probe: Probe) -> None:
        self.pack, self.probe = pack, probe
        self.runs, self.shape = len(pack.slots), pack.program.shape
        self.loss = loss_of(pack, probe)
        self.batches = batches_of(*pack.held_out[0], self.runs, self.shape, probe.at_once)
        weights = {name: p.detach() for name, p in pack.parameters.items()}
        self.finite = _all_finite(weights.values()) & self._loss(weights).isfinite()
        self.params = self.in_place(weights, self.finite)

    def _loss(self, params: Params) -> Tensor:
        """[R]."""
        shares = torch.tensor(self.batches.sizes, dtype=torch.float64)
        with torch.no_grad(), deterministic(False):
            losses = torch.stack([self.loss(params, part).double() for part in self.batches.parts])
        return (losses * (shares / shares.sum()).to(losses.device)[:, None]).sum(0)

    def in_place(self, tensors: Mapping[str, Tensor], good: Tensor) -> Params:
        """Copies of tensors [R, ...], with a good run's in place of those of runs that are not, [R]."""
        first = int(good.nonzero()[0]) if good.any() else 0
        own = torch.arange(self.runs, device=good.device)
        slots = torch.where(good, own, first)
        return {name: t.detach()[slots] for name, t in tensors.items()}

    @functools.cached_property
    def problem(self) -> Problem:
        """For what takes a `Problem`; LandscapeError where the loss is not deterministic."""
        return Problem(
            self.loss, self.params, self.batches.parts, weights=self.batches.sizes, runs=True, dtype=self.pack.program.dtype
        )

    def around(self, measure: Callable[..., Any], *arguments: Any, whole: bool = False, **how: Any) -> Any:
        """A measure that takes loss, parameters and batch; whole: the batch in one part, for what parts it by itself."""
        batch = torch.utils._pytree.tree_map(lambda *t: torch.cat(t, 1), *self.batches.parts) if whole else self.batches
        return measure(self.loss, self.params, batch, *arguments, run_axis=True, **how)

    @property
    def updates(self) -> Tensor:
        """How many updates each run has made, [R], on the CPU."""
        if self.pack.program.dynamic_loss_scale:
            return self.pack.updates.cpu()
        return torch.full((self.runs,), self.pack.made)

    @functools.cached_property
    def preconditioner(self) -> Params:
        """Adam's P of each run, without the learning rate, that parameters' own multiples are a part of.

        Infinite where no gradient ever came, such as at tokens that the text does not have: there Adam makes no step. Meaningless
        for a run that is not `stepped`.
        """
        pack, adam = self.pack, self.pack.program.optimizer
        made: dict[str, list[Tensor]] = {name: [] for name in pack.parameters}
        for r, t in enumerate(self.updates.tolist()):
            second = {name: kept.second[r : r + 1] for name, kept in pack.kept.items() if kept.second is not None}
            p = adam_preconditioner(second, max(t, 1), beta1=adam.beta1, beta2=adam.beta2, epsilon=adam.eps)
            for name, v in second.items():
                made[name].append(torch.where(v == 0, torch.inf, p[name] / pack.rules[name].factor))
        return {name: torch.cat(parts) for name, parts in made.items()}

    @functools.cached_property
    def stepped(self) -> Tensor:
        """Which finite runs have made an update, and keep finite moments, [R]."""
        kept = [t for kept in self.pack.kept.values() for t in (kept.first, kept.second) if t is not None]
        return self.finite & (self.updates > 0).to(self.finite.device) & _all_finite(kept)

    @property
    def update(self) -> Params:
        """D of Adam's last update theta - lr d, weight decay included."""
        pack, decay = self.pack, self.pack.program.optimizer.weight_decay
        return {
            name: kept.first / self.preconditioner[name] + decay * pack.rules[name].decays * pack.parameters[name].detach()
            for name, kept in pack.kept.items()
        }


def batches_of(tokens: Tensor, targets: Tensor, runs: int, shape: ModelShape, at_once: int) -> Batches:
    """Tokens and targets [R, S] in parts [R, n, T] of at most so many sequences, by their numbers of tokens."""
    by_sequence = [t.view(runs, -1, shape.context) for t in (tokens, targets)]
    parts = list(zip(*(t.split(at_once, 1) for t in by_sequence), strict=True))
    return Batches(parts, [float(part[0].shape[1] * shape.context) for part in parts])


def loss_of(pack: Pack, probe: Probe) -> Loss:
    """Each run's mean cross entropy on tokens and targets [R, n, T], as a function of the weights, [R]."""
    from train.model import cross_entropy, forward
    from train.numerics import make_numerics
    from train.recipe import Recipe
    from train.resolve import resolve_recipe
    from formats import quantize

    if probe.quantisers == "off":
        plain: Recipe = resolve_recipe("native-fp32")
        numerics = make_numerics([plain] * len(pack.slots), pack.program.shape, pack.device, quantize, False)
        scales = None
    else:
        numerics = pack._draws.at(pack.numerics, pack.counter)
        scales = pack.histories.scales()
    numerics = numerics._replace(attention="math", kernels=False)
    from train.seen import Layers

    def loss(params: Mapping[str, Tensor], batch: Any) -> Tensor:
        tokens, targets = batch
        layers = Layers(params, pack.program.shape.head, scales=scales)
        logits = forward(params, tokens, pack.program.shape, numerics, layers)
        return cross_entropy(logits, targets.flatten(1))

    return loss


def _all_finite(tensors: Any) -> Tensor:
    """Which runs have nothing but finite numbers in tensors [R, ...], [R]."""
    return torch.stack([t.isfinite().flatten(1).all(1) for t in tensors]).all(0)
