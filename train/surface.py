"""A pack's loss as a landscape: `loss(params, batch)`, one value a run, for what `landscape` measures.

    surface(program, slots, device, "on")       the loss that the runs descend, with all that their forward pass rounds
    surface(program, slots, device, "off")      the same model in plain FP32 or FP64, nothing rounded
    surface(.., "finite-difference")            as "on"; products with its Hessian are differences of its gradients

The model is `model.forward`: there is no other. With quantisers on, what is rounded is straight through (see `smooth`), so a
Hessian-vector product is that of the smooth surrogate: the loss as it is, and derivatives in which rounding is the identity.
Rounding is not differentiable, and a difference over a step wider than its grid is what there is of a true derivative: the third
choice. What a recipe does to gradients is in none of the three, since no loss changes by it.

The random bits of stochastic rounding and the signs of rotations are those of a step, by each run's own seeds: the same at every
evaluation, so that the loss is a function. Dropout is off, as where held-out text is measured. Delayed scales are given, or each
tensor's own amax stands in for them. TF32 products, and FP8 units' short sums, are FP32's here.

The precision of everything between is that of the parameters, FP32 or FP64, on a GPU as on a CPU. Vocabulary costs no more than
`LOGITS` elements at a time, however many tokens: a batch with more is computed in chunks of which nothing is kept, and each is
computed again for its derivatives (see `again`). Everything else grows with the tokens of a piece, so give `pieces`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor

from formats import Rounding, quantize
from landscape import Batches, Problem
from landscape.evaluate import Loss
from landscape.programs import How
from train import smooth
from train.again import again
from train.head import chunks, of_runs
from train.layers import Readout, token_losses
from train.linear import operand
from train.measures import QUANTISERS, Quantisers
from train.model import BlockPrecision, Numerics, hidden
from train.numerics import Draws, make_numerics
from train.precision import Precision
from train.products import HEAD_SITE
from train.program import Program, Slot
from train.recipe import Elsewhere, Recipe, Structure
from train.rounding_seeds import run_keys
from train.seen import Layers

if TYPE_CHECKING:
    from train.pack import Pack

LOGITS = 2**27  # the most in memory at a time, in elements
# The step of finite differences where something is rounded, of the weights' length: twice the distance of BF16's numbers. A
# smaller one meets rounding above all, as outputs are BF16 in most recipes, and over a larger one the loss bends.
DIFFERENCE = 2.0**-6


@dataclass(frozen=True)
class Surface:
    """The loss of a program's runs, each at its own parameters, after `step` updates; see `surface`."""

    program: Program
    slots: tuple[Slot, ...]
    device: torch.device
    quantisers: Quantisers
    step: int
    scales: Mapping[str, Tensor] | None
    limit: int
    _made: dict[torch.dtype, Numerics] = field(default_factory=dict, repr=False, compare=False)

    def loss(self, params: Mapping[str, Tensor], batch: tuple[Tensor, Tensor]) -> Tensor:
        """What each run descends on its own part of the batch, nats per token, [R]: cross entropy, and the z-loss if any.

        params: those of `program.shape`, [R, ...] each, FP32 or FP64. batch: tokens and targets, integers [R, N, T] or [R, N·T].
        """
        x, numerics = self._hidden(params, batch)
        targets = batch[1].reshape(batch[1].shape[0], -1)
        return self._through_head(x, params[self.program.shape.head], targets, numerics.lm_head)

    def logits(
        self, params: Mapping[str, Tensor], batch: tuple[Tensor, Tensor], every: int = 1
    ) -> Iterator[tuple[slice, Tensor, Tensor]]:
        """Runs, their logits [r, s, V] and targets [r, s], at most `limit` logits at a time; of the last of `every` tokens."""
        tokens, targets = (part.reshape(part.shape[0], -1) for part in batch)
        x, numerics = self._hidden(params, batch)
        whole, precision = self._operands(x, params[self.program.shape.head], numerics.lm_head)
        count, V = tokens.shape[1] // every, self.program.shape.vocabulary
        for r, n in chunks(tokens.shape[0], count, V, limits=(self.limit, self.limit)):
            s = slice(n.start * every + every - 1, n.stop * every, every)
            z = smooth.multiply(whole.part(r, s), of_runs(precision, r))
            yield r, self.program.shape.readout.logits(z), targets[r, s]

    def _hidden(self, params: Mapping[str, Tensor], batch: tuple[Tensor, Tensor]) -> tuple[Tensor, Numerics]:
        """What meets the LM head, [R, S, D], and how it was computed."""
        tokens, shape = batch[0], self.program.shape
        numerics = self._numerics(params["wte"].dtype)
        T = min(shape.context, tokens.shape[1]) if tokens.ndim == 2 else tokens.shape[2]
        layers = Layers(params, shape.head, scales=self.scales)
        return hidden(params, tokens.reshape(tokens.shape[0], -1, T), shape, numerics, layers), numerics

    def _operands(self, x: Tensor, w: Tensor, precision: Precision) -> tuple[smooth.Operands, Precision]:
        """Of the LM head's product, and the precision that it has."""
        scales = None if self.scales is None else self.scales.get(self.program.shape.head)
        precision = precision._replace(scales=scales)
        w = w if precision.plan is not None else operand(w, precision, "weight")
        x = operand(x, precision, "activation")
        return smooth.operands(x, w, precision, HEAD_SITE, is_transposed=True), precision

    def _through_head(self, x: Tensor, w: Tensor, targets: Tensor, precision: Precision) -> Tensor:
        shape, readout, (R, S, _) = self.program.shape, self.program.shape.readout, x.shape
        whole, precision = self._operands(x, w, precision)

        parts = list(chunks(R, S, shape.vocabulary, limits=(self.limit, self.limit)))
        if len(parts) == 1:
            return _losses(whole, targets, precision, readout) / S
        sums: list[list[Tensor]] = []
        for r, s in parts:
            of, here = whole.part(r, s), of_runs(precision, r)
            tensors = [t for factored in of.parts or () for t in factored]
            there = [t is not None for t in tensors]

            def losses(
                x: Tensor, w: Tensor, targets: Tensor, *given: Tensor, there: list[bool] = there, here: Precision = here
            ) -> Tensor:
                rest = iter(given)
                found = [next(rest) if is_there else None for is_there in there]
                return _losses(smooth.operands_of(x, w, found), targets, here, readout)

            sum_of_chunk = again(losses, of.x, of.w, targets[r, s], *(t for t in tensors if t is not None))
            sums += [[]] if s.start == 0 else []
            sums[-1].append(sum_of_chunk)
        return torch.cat([torch.stack(of_runs).sum(0) for of_runs in sums]) / S

    def of_runs(self, runs: Sequence[int]) -> Surface:
        """The loss of some of the runs alone, by their numbers; one may stand several times."""
        rows = list(runs)
        scales = None if self.scales is None else {name: scale[rows] for name, scale in self.scales.items()}
        return dataclasses.replace(self, slots=tuple(self.slots[r] for r in rows), scales=scales, _made={})

    def problem(
        self,
        params: Mapping[str, Tensor],
        tokens: Tensor,
        targets: Tensor,
        *,
        sequences: int | None = None,
        dtype: torch.dtype | None = None,
        difference: float | None = None,
        program: How = "eager",
        group: int | None = None,
    ) -> Problem:
        """The loss at params as `landscape` takes it, on tokens and their targets, integers [R, N, T] or [R, N·T].

        sequences: how many of each run at a time, all if left out; only memory depends on it, but for recipes whose scales or
        random bits are of a whole tensor: each piece has its own. dtype: FP32, or FP64, which it is for a program in FP64.
        difference: the step of finite differences, a share of the parameters' length, where products are made of them. group: how
        many runs at a time, which no run's value depends on but for rounding; all if left out.
        """
        batch, sizes = pieces(tokens, targets, self.program.shape.context, sequences)
        dtype = dtype or self.program.dtype
        by_differences = self.quantisers == "finite-difference"
        if difference is None and by_differences and self._rounds(dtype):
            difference = DIFFERENCE

        def of_runs(runs: Sequence[int]) -> tuple[Loss, Batches]:
            rows = list(runs)
            return self.of_runs(rows).loss, Batches([(t[rows], of[rows]) for t, of in batch], sizes)

        return Problem(
            self.loss, params, Batches(batch, sizes), run_axis=True, dtype=dtype, difference=difference, program=program,
            quantisers=self.quantisers, products="finite-difference" if by_differences else None,
            of_runs=None if group is None else of_runs, group=group,
        )  # fmt: skip

    def _rounds(self, dtype: torch.dtype) -> bool:
        numerics = self._numerics(dtype)
        places = [numerics.lm_head, *(place for block in numerics.blocks for place in block[:2])]
        return any(p.rounds_outputs or smooth.rounds(p, True) or smooth.rounds(p, False) for p in places)

    def _numerics(self, dtype: torch.dtype) -> Numerics:
        if dtype not in self._made:
            self._made[dtype] = self._make_numerics(dtype)
        return self._made[dtype]

    def _make_numerics(self, dtype: torch.dtype) -> Numerics:
        early = self.step <= self.program.until
        recipes: list[Recipe] = [(slot.recipe.before if early else None) or slot.recipe for slot in self.slots]
        numerics = make_numerics(recipes, self.program.shape, self.device, quantize, False)
        if self.quantisers == "off":
            wide: Literal["fp32", "fp64"] = "fp64" if dtype == torch.float64 else "fp32"
            plain = Structure(wide, Rounding.NEAREST_EVEN, wide, wide)
            place = Precision(plain, dtype, None, None, None, quantize, smooth=True)
            return numerics._replace(body=place, lm_head=place, blocks=(), elsewhere=Elsewhere())

        def smoothed(place: Precision) -> Precision:
            structure = dataclasses.replace(place.structure, hardware=False)
            return place._replace(structure=structure, carrier=dtype, kernels=False, smooth=True)

        seeds = [(slot.init_seed, slot.data_seed) for slot in self.slots]
        counter = torch.full((1,), self.step, dtype=torch.int64, device=self.device)
        numerics = Draws(run_keys(seeds).to(self.device)).at(numerics, counter)
        blocks = tuple(
            BlockPrecision(
                smoothed(block.attention),
                smoothed(block.mlp),
                None if block.products is None else smoothed(block.products),
            )
            for block in numerics.blocks
        )
        return numerics._replace(body=smoothed(numerics.body), lm_head=smoothed(numerics.lm_head), blocks=blocks)


def _losses(of: smooth.Operands, targets: Tensor, precision: Precision, readout: Readout) -> Tensor:
    """The losses of some runs' tokens, summed, [r]."""
    log_sum, _, losses = token_losses(readout.logits(smooth.multiply(of, precision)), targets)
    return (losses + readout.z_loss * log_sum[..., 0].square() if readout.z_loss else losses).sum(1)


def surface(
    program: Program,
    slots: Sequence[Slot],
    device: torch.device | str = "cpu",
    quantisers: Quantisers = "on",
    *,
    step: int = 0,
    scales: Mapping[str, Tensor] | None = None,
    limit: int = LOGITS,
) -> Surface:
    """The loss of these runs as a function of their parameters.

    quantisers: see this module. step: after how many updates, by which random bits are drawn, and which of a run's two recipes
    counts where it has two. scales: delayed ones, [R, 3] by matrix (`Pack.histories.scales()`). limit: the most logits in memory
    at a time, in elements. Raises ValueError for a word that is none of the three.
    """
    if quantisers not in QUANTISERS:
        raise ValueError(f"quantisers must be one of {', '.join(QUANTISERS)}, got {quantisers!r}")
    given = None if scales is None else {name: scale.detach() for name, scale in scales.items()}
    return Surface(program, tuple(slots), torch.device(device), quantisers, step, given, limit)


def surface_of(pack: Pack, quantisers: Quantisers = "on", *, limit: int = LOGITS) -> Surface:
    """The loss of a pack under way, with its next step's random bits and delayed scales; measure at `pack.parameters`."""
    scales = pack.histories.scales()
    return surface(pack.program, pack.slots, pack.device, quantisers, step=pack.made, scales=scales, limit=limit)


def pieces(
    tokens: Tensor, targets: Tensor, context: int, sequences: int | None = None
) -> tuple[list[tuple[Tensor, Tensor]], list[float]]:
    """A batch [R, N, T] or [R, N·T] in parts of so many sequences of each run, [R, n, T] both, and the tokens of each part."""
    if sequences is not None and sequences < 1:
        raise ValueError(f"sequences must be at least 1, got {sequences}")
    T = tokens.shape[2] if tokens.ndim == 3 else min(context, tokens.shape[1])
    both = [part.reshape(part.shape[0], -1, T) for part in (tokens, targets)]
    parts = list(zip(*(part.split(sequences or part.shape[1], 1) for part in both), strict=True))
    return parts, [float(part[0].shape[1] * T) for part in parts]
