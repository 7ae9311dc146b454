"""A pack's loss at the weights that it has, as `landscape` takes it: all runs at once, on the first held-out batch.

The batch comes in parts of a few sequences, so that no more of it is in memory at a time, with their sizes as weights. Runs whose
weights or loss are not finite are told apart first: they have no landscape, and in their slots stand the weights of one that has,
so that nothing of theirs costs time or gets into a loop that waits for all. `landscape`'s numbers of a run don't depend on its
neighbours, so this changes nobody's.

Everything here reads the pack, and leaves weights, moments, histories and generators as they are.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from landscape import Batches, Problem, adam_preconditioner
from train.determinism import deterministic
from train.measured_together import in_groups, together
from train.model import hidden
from train.program import Probe
from train.seen import Layers
from train.surface import pieces, surface_of

if TYPE_CHECKING:
    from train.pack import Pack

Params = dict[str, Tensor]


class AtPoint:
    """A pack's loss around its present weights. `finite`, [R]: which runs have one there."""

    def __init__(self, pack: Pack, probe: Probe) -> None:
        self.pack, self.probe = pack, probe
        self.runs, self.shape = len(pack.slots), pack.program.shape
        self.surface = surface_of(pack, probe.quantisers)
        self.together = together(pack.program, probe, self.runs, pack.device.type)
        tokens, targets = pack.held_out[0]
        parts, sizes = pieces(tokens, targets, self.shape.context, probe.at_once)
        self.batches = Batches(parts, sizes)
        weights = {name: p.detach() for name, p in pack.parameters.items()}
        self.finite = _all_finite(weights.values()) & self._loss(weights).isfinite()
        self.params = self.in_place(weights, self.finite)

    def _loss(self, params: Params) -> Tensor:
        """[R]."""
        shares = torch.tensor(self.batches.sizes, dtype=torch.float64)
        with torch.no_grad(), deterministic(False):
            losses = torch.stack([self.surface.loss(params, part).double() for part in self.batches.parts])
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
        how = self.together
        return self.surface.problem(self.params, *self.pack.held_out[0], sequences=how.sequences, group=how.runs)

    def around(self, measure: Callable[..., Any], *arguments: Any, whole: bool = False, **how: Any) -> Any:
        """A measure that takes loss, parameters and batch; whole: the batch in one part, for what parts it by itself."""
        if whole:
            batch = tuple(torch.cat(of, 1) for of in zip(*self.batches.parts, strict=True))
            return measure(self.surface.loss, self.params, batch, *arguments, run_axis=True, **how)
        tokens, targets = self.pack.held_out[0]
        parts, sizes = pieces(tokens, targets, self.shape.context, self.together.sequences)
        loss = in_groups(self.surface, self.together.runs)
        return measure(loss, self.params, Batches(parts, sizes), *arguments, run_axis=True, **how)

    def last_states(self) -> tuple[Tensor, Tensor, Tensor]:
        """At the last token of each sequence, the hidden states that meet the LM head [R, N, D], its matrix [R, V, D] with what
        muP divides by, and the targets [R, N]; neither side rounded for their product.
        """
        head = self.shape.head
        layers = Layers(self.params, head, scales=self.surface.scales)
        numerics = self.surface._numerics(self.params[head].dtype)
        found = []
        with torch.no_grad(), deterministic(False):
            for tokens, _ in self.batches.parts:
                x = hidden(self.params, tokens, self.shape, numerics, layers)
                found.append(x.view(self.runs, -1, self.shape.context, self.shape.width)[:, :, -1])
        targets = torch.cat([of[:, :, -1] for _, of in self.batches.parts], 1)
        return torch.cat(found, 1), self.params[head] * self.shape.readout.multiplier, targets

    def logits(self) -> Iterator[tuple[slice, Tensor, Tensor]]:
        """Runs, their logits [r, s, V] and targets [r, s], a chunk of tokens at a time: of all, or of each sequence's last."""
        every = self.shape.context if self.probe.positions == "last" else 1
        for batch in self.batches.parts:
            yield from self.surface.logits(self.params, batch, every)

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
        second = {name: kept.second for name, kept in pack.kept.items() if kept.second is not None}
        made = {name: torch.empty_like(v) for name, v in second.items()}
        for t in self.updates.unique().tolist():  # mostly one number for all, and launches for each run would take long
            rows = (self.updates == t).nonzero().flatten().to(pack.device)
            own = {name: v[rows] for name, v in second.items()}
            p = adam_preconditioner(own, max(t, 1), beta1=adam.beta1, beta2=adam.beta2, epsilon=adam.eps)
            for name, v in own.items():
                made[name][rows] = torch.where(v == 0, torch.inf, p[name] / pack.rules[name].factor)
        return made

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
            name: kept.first / self.preconditioner[name]
            + decay * pack.rules[name].decays * pack.parameters[name].detach()
            for name, kept in pack.kept.items()
        }


def _all_finite(tensors: Any) -> Tensor:
    """Which runs have nothing but finite numbers in tensors [R, ...], [R]."""
    return torch.stack([t.isfinite().flatten(1).all(1) for t in tensors]).all(0)
