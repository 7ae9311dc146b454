"""A pack: R independent runs trained as one program, one batched product at a time.

What varies along the run axis: initial weights, batches, learning rate and the formats themselves. What is fixed in a
program: shapes, R, the structure of the recipe, the optimiser's constants, the number of steps. A run's numbers depend
on its own seeds and settings only, never on its slot or its neighbours, so a diverged run is left to run: it disturbs nobody.

Nothing in a step waits for the host. The step counter, the batches' positions, the learning rates and the histories live on
the device, loss scales too; histories leave it every `CHUNK` steps.

What steps leave behind is `state`, in place from the first step to the last; all else follows from the program, the slots and the
text. A pack of the same into which it is loaded goes on with the same bits (see `checkpoint`).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from formats import quantize
from train.capture import Recorded
from train.checkpoint import Keeper, Times
from train.compiling import compiled_quantizer, compiler, compiles_steps, quantizer_for
from train.dead import Vigil, with_one_nan
from train.determinism import deterministic
from train.dropout import EMBEDDING, dropped
from train.head import chunks, head_over_chunks, of_runs
from train.layers import embedding_gradient
from train.loss_scale import inverse
from train.losses import Losses
from train.model import Numerics, forward, is_matrix
from train.numerics import Draws, Histories, make_numerics, place_of, with_quantizer, with_share
from train.optim import Factors, Parts, parameter_rules
from train.precision import Precision, WeightOperand
from train.probing import Probes
from train.program import PackResult, Program, Progress, Slot
from train.recipe import Recipe
from train.rounding_seeds import run_keys
from train.schedules import learning_rates
from train.seeds import Weights, batch_offsets, different, held_out_offsets, stacked_weights
from train.signal_pass import SignalHistories, signal_pass
from train.signals import statistics
from train.snapshots import state_of
from train.state import Chance, Kept, parameter_words, stored
from train.step import OF_HEAD, Pieces, batch
from train.text import Text
from train.text_on_device import tokens_on
from train.weights import as_operand, detached, head_operand, own, parts_of, site_of, weight_of_runs

SHARPNESS = ("logit_sharpness", "logit_sharpness_centred")
CHUNK = 10  # steps between two reports to the host


_compiled_for: list[object] = []


def _one_program_at_a_time(key: object) -> None:
    """Forget the code compiled for another program; packs of one program share theirs, and compile it once."""
    if _compiled_for != [key]:
        torch._dynamo.reset()
        _compiled_for[:] = [key]


class Pack:
    """R runs under way: parameters, moments, histories and the step that advances them all.

    `compiled` None lets the device decide (see `compiling`). `parameters[name]`, [R, ...], are the master weights;
    `operands[name]` are the matrices among them as products take them, the LM head's, `wte` where it is tied, among them;
    `kept[name]` is what the optimiser keeps of each. `scale`, [R], are the runs' loss scales, None where no run has one.
    `made` is how many steps were. weights: `stacked_weights` of the slots' different seeds, drawn here if not given.
    """

    recordable = True  # whether a GPU's steps may be recorded and replayed

    def __init__(
        self, program: Program, slots: Sequence[Slot], text: Text, device: torch.device, compiled: bool | None = None,
        weights: Weights | None = None,
    ) -> None:  # fmt: skip
        self.program, self.slots, self.device = program, tuple(slots), device
        self.compiled = compiles_steps(device.type) if compiled is None else compiled
        self._make_parameters(weights)
        self._load_text(text)
        self.counter = torch.zeros(1, dtype=torch.int64, device=device)
        peaks = [slot.learning_rate for slot in slots]
        rates = learning_rates(
            peaks, program.steps, program.warmup, program.schedule, program.final_fraction, program.decay_fraction
        )
        self.rates = torch.from_numpy(rates).to(program.dtype).to(device)
        self.train_loss = torch.full_like(self.rates, torch.nan, dtype=torch.float32)
        self.grad_norm = torch.full_like(self.train_loss, torch.nan)
        self.grad_norm_block = torch.full((*self.grad_norm.shape, 1 + program.shape.layers), torch.nan, device=device)
        self.signals = SignalHistories(program.shape, len(program.signal_steps), len(slots), device)
        self._make_loss_scale()
        self._make_measurements()
        self._evaluated = torch.empty(len(slots), dtype=program.dtype, device=device)
        self._sharpness = torch.empty(2, len(slots), len(program.probe.epsilons), dtype=program.dtype, device=device)
        self._small = torch.ones(len(slots), dtype=torch.bool, device=device)
        if self.compiled:
            _one_program_at_a_time((program, len(slots), device))
        self._pieces = Pieces(compiler() if self.compiled else None)
        self._statistics = compiler(dynamic=True)(statistics) if self.compiled else statistics
        keys = run_keys([(slot.init_seed, slot.data_seed) for slot in self.slots])
        self._draws = Draws(keys.to(device), bool(program.shape.dropout))
        self.made = 0
        self._begin(self._recipes_at(0))

    def _recipes_at(self, made: int) -> list[Recipe]:
        """The recipes in which a pack stands after so many steps: the switch at `until` belongs to the step after it."""
        early = made <= self.program.until
        return [(slot.recipe.before if early else None) or slot.recipe for slot in self.slots]

    def _numerics_of(self, recipes: Sequence[Recipe]) -> Numerics:
        program, device = self.program, self.device
        work = len(recipes) * program.steps * program.rounded_elements_per_step()
        quantizer = quantize if self.compiled else quantizer_for(device.type, work)
        return make_numerics(recipes, program.shape, device, quantizer, self.compiled)

    def _begin(self, recipes: Sequence[Recipe]) -> None:
        """Set out in the precision of these recipes: operands anew, nothing recorded yet."""
        self.numerics = self._numerics_of(recipes)
        shape, R = self.program.shape, len(self.slots)
        self.histories = Histories(self.numerics, shape, R, self.device)
        self.tf32 = "tf32" in recipes[0].structure.carriers
        self.operands: dict[str, Tensor | WeightOperand] = {}
        self._make_operands(self._draws.at(self.numerics, self.counter), self.histories.scales())
        self.histories.record(
            {name: torch.zeros(R, 3, device=self.device) for name in self.histories.names}, self._weights()
        )
        recorded = self.compiled and self.device.type == "cuda" and self.recordable
        self._step = Recorded(recorded)
        beside = (Recorded(recorded, self._step) for _ in range(4))
        self._watched_step, self._evaluation, self._probe, self._probe_of_any = beside

    def _make_operands(self, numerics: Numerics, scales: Mapping[str, Tensor]) -> None:
        for name in (*filter(is_matrix, self.parameters), self.program.shape.head):
            p, precision = self.parameters[name].detach(), place_of(name, numerics)._replace(scales=scales.get(name))
            made = as_operand(p, precision, site_of(name)) if is_matrix(name) else head_operand(p, precision)
            self.operands[name] = own(made)
        for name, operand in self.operands.items():
            if is_matrix(name):
                parts_of(operand)[0].requires_grad_()

    def _weights(self) -> Mapping[str, Tensor]:
        """What weights' own amaxes are taken of, [R, ...]."""
        return self.parameters

    def _make_parameters(self, weights: Weights | None) -> None:
        seeds, places = self._distinct([slot.init_seed for slot in self.slots])
        self.parameters = {
            name: torch.from_numpy(stack).to(self.device, self.program.dtype)[places].requires_grad_()
            for name, stack in (weights or stacked_weights(self.program.shape, seeds)).items()
        }
        self._keep_all()

    def _distinct(self, seeds: Sequence[int]) -> tuple[list[int], Tensor]:
        """Each seed once, and where among them each run's is, [R], on the device: runs of a grid share most of theirs."""
        once = {seed: place for place, seed in enumerate(different(seeds))}
        return list(once), torch.tensor([once[seed] for seed in seeds], device=self.device)

    def _keep_all(self) -> None:
        """What the optimiser keeps of every parameter, and does with it."""
        shape = self.program.shape
        self.rules = parameter_rules(shape, self.program.optimizer, self.program.state)
        self.kept = {name: self._keep(name) for name in self.parameters}
        self._groups = [
            [name for name in self.parameters if name.startswith(f"h.{i}.")] for i in range(shape.layers)
        ] + [[name for name in self.parameters if not name.startswith("h.")]]

    def _keep(self, name: str) -> Kept:
        """Zeros where the optimiser will keep what it does of a parameter."""
        p, state = self.parameters[name].detach(), self.program.state
        if self.rules[name].narrow:
            p.copy_(stored(p, state.master))
        muon = bool(self.rules[name].parts)
        return Kept(
            first=torch.zeros_like(p),
            second=None if muon else torch.zeros_like(p),
            lost=torch.zeros_like(p) if state.kahan else None,
            words=parameter_words(name).to(self.device) if state.draws else None,
        )

    def _make_loss_scale(self) -> None:
        dynamic, scales = self.program.dynamic_loss_scale, [slot.loss_scale for slot in self.slots]
        static = self.program.scales_loss or any(scale != 1.0 for scale in scales)
        if dynamic and static:
            raise ValueError(
                f"a loss scale is static or dynamic, got {max(scales):g} for a run of a program that has a dynamic one; give "
                "DynamicLossScale its initial instead"
            )
        if dynamic:
            scales = [dynamic.initial] * len(scales)
        self.scale = torch.tensor(scales, dtype=self.program.dtype, device=self.device) if dynamic or static else None
        if dynamic:
            self.good_steps = torch.zeros(len(scales), dtype=torch.int64, device=self.device)
            self.updates = torch.zeros_like(self.good_steps)
            self.loss_scale = torch.full_like(self.train_loss, torch.nan)
            self.skipped = torch.zeros_like(self.train_loss, dtype=torch.bool)

    def _make_measurements(self) -> None:
        """NaN where held-out text will be measured, [evaluations, R], and its sharpness, [probes, measures, R, epsilons]."""
        program, R = self.program, len(self.slots)
        sizes = (len(program.probe_steps), len(SHARPNESS), R, len(program.probe.epsilons))
        self.validation = torch.full(
            (len(program.evaluation_steps), R), torch.nan, dtype=program.dtype, device=self.device
        )
        self.probed = torch.full(sizes, torch.nan, dtype=program.dtype, device=self.device)
        self.probes = Probes(program, R, self.device)

    def _load_text(self, text: Text) -> None:
        program, T = self.program, self.program.shape.context
        for part, tokens in (("training", text.train), ("validation", text.validation)):
            if tokens.size <= T:
                raise ValueError(
                    f"{text.name}'s {part} text has {tokens.size} tokens, no more than a context of {T}: take a shorter one"
                )
        windows = text.train.size - T
        seeds, places = self._distinct([slot.data_seed for slot in self.slots])
        offsets = [batch_offsets(seed, program.steps, program.sequences, windows) for seed in seeds]
        self.offsets = torch.from_numpy(np.stack(offsets, 1)).to(self.device)[:, places]
        self.text, validation = tokens_on(self.device, text)
        starts = torch.from_numpy(held_out_offsets(program.evaluation_sequences, text.validation.size - T))
        rows = starts.to(self.device).view(-1, 1, program.sequences).expand(-1, len(self.slots), -1)
        self.held_out: list[tuple[Tensor, ...]] = [batch(validation, row, T) for row in rows]

    def state(self) -> dict[str, Tensor]:
        """What steps leave for those after them and for the results, by name: the tensors themselves, detached."""
        whole = (
            "counter train_loss grad_norm grad_norm_block validation probed scale good_steps updates loss_scale skipped"
        )
        state: dict[str, Tensor | None] = {name: getattr(self, name, None) for name in whole.split()}
        for name, p in self.parameters.items():
            kept = self.kept[name]
            state |= {f"parameter {name}": p, f"first {name}": kept.first, f"second {name}": kept.second}
            state[f"lost {name}"] = kept.lost
        for name, operand in self.operands.items():
            state |= {f"operand {name} {i}": part for i, part in enumerate(parts_of(operand))}
        state |= {f"amaxes {name}": amaxes for name, amaxes in self.histories.state().items()}
        state |= {f"signal {name}": values for name, values in self.signals.state().items()}
        state |= self.probes.state()
        return {name: t.detach() for name, t in state.items() if t is not None}

    def load(self, saved: Mapping[str, Tensor]) -> None:
        """Go on from the `state` of a pack of the same program, slots and text, which is copied in place.

        For a pack that has made no step. ValueError, and nothing changed, where the state is of another program.
        """
        made = int(saved["counter"]) if "counter" in saved else -1
        recipes = self._recipes_at(made)
        if recipes != self._recipes_at(self.made):
            self._begin(recipes)
        state = self.state()
        wrong = sorted(
            {name for name in state.keys() & saved.keys() if not _alike(state[name], saved[name])}
            | (state.keys() ^ saved.keys())
        )
        if wrong or not 0 <= made <= self.program.steps:
            self._begin(self._recipes_at(self.made))
            raise ValueError(f"not a state of this program: {', '.join(wrong[:3]) or f'{made} steps'}")
        for name, tensor in state.items():
            tensor.copy_(saved[name])
        self.made = made

    def put(self, step: int, saved: Sequence[Mapping[str, Tensor]]) -> None:
        """Stand after so many steps, each run with what a snapshot has of it (`snapshots.state_of`), to be measured.

        Operands that a snapshot lacks are rounded anew, from the same weights. ValueError where one is of another program.
        """
        self.made = step
        self._begin(self._recipes_at(step))
        state = self.state()
        for slot, one in enumerate(saved):
            wanted = state_of(state, slot, delayed=bool(self.histories.names))
            wrong = sorted(wanted.keys() ^ one.keys()) or [name for name in one if not _alike(one[name], wanted[name])]
            if wrong:
                raise ValueError(f"not a state of this program: {', '.join(wrong[:3])}")
            for name, tensor in one.items():
                wanted[name].copy_(tensor)
        self.counter.fill_(step)
        if not self.histories.names:
            self._make_operands(self._draws.at(self.numerics, self.counter), {})

    def step(self) -> None:
        """One training step of every run: batch, forward, backward, clipping, update, histories."""
        if self.made and self.made == self.program.until:
            self._begin([slot.recipe for slot in self.slots])
        every = self.program.signals_every
        watched = bool(every) and self.made % every == 0
        self.made += 1
        with deterministic(self.tf32):
            if watched:
                self._watched_step(lambda: self._train(watched=True))
            else:
                self._step(self._train)

    def _train(self, watched: bool = False) -> None:
        offsets = self.offsets.index_select(0, self.counter)[0]
        tokens, targets = self._pieces.batch(self.text, offsets, self.program.shape.context)
        found = self._look(tokens, targets) if watched else None
        losses_R, grads = self.gradients(tokens, targets)
        self._update(losses_R, grads, found)
        self.histories.record(self._amaxes, self._weights())

    def _look(self, tokens: Tensor, targets: Tensor) -> dict[str, Tensor]:
        """The signals of the batch's first sequences, before the update."""
        shape = self.program.shape
        numerics = self._draws.at(with_share(self.numerics), self.counter, training=True)  # of one sequence alone
        if self.compiled:  # outside the pieces, quantisers have to be compiled by themselves
            numerics = with_quantizer(numerics, compiled_quantizer)
        first = slice(0, shape.context)
        operands = {name: detached(operand) for name, operand in self.operands.items()}
        return signal_pass(
            self.parameters, operands, tokens[:, first], targets[:, first], shape, numerics, self.histories.scales(),
            self.program.sequences, self.scale, self._statistics,
        )  # fmt: skip

    def gradients(self, tokens: Tensor, targets: Tensor) -> tuple[Tensor, dict[str, Parts]]:
        """Each run's mean loss on tokens [R, S] and targets [R, S], [R], and the gradient of each parameter, in parts.

        With loss scales, gradients are multiplied by them.
        """
        shape, pieces = self.program.shape, self._pieces
        numerics = self._draws.at(self.numerics, self.counter, training=True)
        scales = {name: scale.requires_grad_() for name, scale in self.histories.scales().items()}
        x, hidden = self._hidden(tokens, numerics, scales)
        head = numerics._replace(lm_head=numerics.lm_head._replace(scales=scales.pop(shape.head, None)))
        losses_R, dx, d_head, of_head = head_over_chunks(
            pieces,
            hidden.detach(),
            self.operands[shape.head],
            targets,
            head,
            shape.vocabulary,
            shape.readout,
            self.scale,
        )
        names = [name for name in self.parameters if name not in ("wte", "wpe", "lm_head")]
        leaves = [parts_of(self.operands[name])[0] if is_matrix(name) else self.parameters[name] for name in names]
        d_embedded, *rest = torch.autograd.grad(hidden, [x, *leaves, *scales.values()], dx)
        d_embedded = dropped(d_embedded, numerics.drop, shape.dropout, EMBEDDING)
        # What arrives at scales are amaxes (`products`).
        self._amaxes = dict(zip(scales, rest[len(names) :], strict=True))
        if of_head is not None:
            self._amaxes[shape.head] = torch.stack([of_head[:, 0], torch.zeros_like(of_head[:, 0]), of_head[:, 1]], 1)
        grads: dict[str, Parts] = {name: (grad,) for name, grad in zip(names, rest[: len(names)], strict=True)}
        d_tokens = embedding_gradient(d_embedded, tokens, shape.vocabulary, numerics.kernels)
        grads["wte"] = (d_tokens,)
        # A tied embedding has a gradient from either end.
        grads[shape.head] = (d_head[:, : shape.vocabulary], *grads.get(shape.head, ()))
        if "wpe" in self.parameters:
            grads["wpe"] = (pieces.position_gradient(d_embedded, shape.context),)
        return losses_R, grads

    def _hidden(
        self, tokens: Tensor, numerics: Numerics | None = None, scales: Mapping[str, Tensor] | None = None
    ) -> tuple[Tensor, Tensor]:
        """The embedded tokens, a leaf, and the LM head's operand, [R, S, D] each; by the present seeds and scales if not told."""
        numerics = self._draws.at(self.numerics, self.counter) if numerics is None else numerics
        scales = self.histories.scales() if scales is None else scales
        p = self.parameters
        positions = p["wpe"].detach() if "wpe" in p else None
        rate = self.program.shape.dropout
        x = self._pieces.start(p["wte"].detach(), positions, tokens, numerics.elsewhere, numerics.drop, rate)
        x = x.requires_grad_()
        return x, self._through_blocks(x, numerics, scales)

    def _through_blocks(self, x: Tensor, numerics: Numerics, scales: Mapping[str, Tensor]) -> Tensor:
        return self._pieces.hidden(x, self.parameters, self.operands, self.program.shape, numerics, scales)

    def _held_out_hidden(self, tokens: Tensor) -> tuple[Tensor, Precision]:
        """The LM head's operand for text that is not trained on, and its precision. Compiled code is training's own, gradients
        and all, so that nothing is compiled twice; an eager pass needs none.
        """
        numerics = self._draws.at(self.numerics, self.counter)
        scales = self.histories.scales()
        head = numerics.lm_head._replace(scales=scales.get(self.program.shape.head))
        with torch.set_grad_enabled(self.compiled):
            scales = {name: scale.requires_grad_(self.compiled) for name, scale in scales.items()}
            return self._hidden(tokens, numerics, scales)[1].detach(), head

    @torch.no_grad()
    def _update(self, losses_R: Tensor, grads: dict[str, Parts], found: dict[str, Tensor] | None = None) -> None:
        """The update, and the histories' rows; with `found`, the signals so far of a step that is looked at."""
        pieces, config, formats = self._pieces, self.program.optimizer, self.program.state
        dynamic = self.program.dynamic_loss_scale
        unscale_R = None if self.scale is None else inverse(self.scale)
        updates_R = self.updates if dynamic else None
        chance = Chance(self._draws.keys, self.counter) if formats.draws else None
        sums = self._squares(grads, unscale_R)
        norm_R, f = pieces.factors(sums, self.rates, self.counter, config, unscale_R, updates_R)
        next_step, scales = self._draws.at(self.numerics, self.counter + 1), self.histories.scales()
        for group in self._groups:
            operands = [detached(self.operands[name]) if name in self.operands else None for name in group]
            places = [place_of(name, next_step)._replace(scales=scales.get(name)) for name in group]
            sites = [site_of(name) if is_matrix(name) else OF_HEAD for name in group]
            pieces.update_group(
                [self.parameters[name].detach() for name in group], [grads[name] for name in group],
                [self.kept[name] for name in group], f, config, [self.rules[name] for name in group], formats, chance,
                operands, places, sites,
            )  # fmt: skip
        if dynamic:
            pieces.advance_scale(
                self.scale, self.good_steps, self.updates, f.made, self.loss_scale, self.skipped, self.counter, dynamic
            )
        if found is not None:
            self.signals.record(found | self._of_update(grads, f))
        pieces.record(losses_R, norm_R, sums, self.train_loss, self.grad_norm, self.grad_norm_block, self.counter)

    def _squares(self, grads: dict[str, Parts], unscale_R: Tensor | None) -> list[Tensor]:
        """Each group's sum of the gradient's squares, [R]."""
        name_of = self.program.state.gradient
        return [
            self._pieces.squares(
                [grads[name] for name in group],
                [name_of if self.rules[name].narrow else None for name in group],
                unscale_R,
            )
            for group in self._groups
        ]

    def _of_update(self, grads: dict[str, Parts], f: Factors) -> dict[str, Tensor]:
        """The signals of the update that was just made, [R, block]."""
        groups = [self._groups[-1], *self._groups[:-1]]
        return {
            name: torch.stack(
                [
                    signal(
                        [grads[name] for name in group], [self.kept[name] for name in group], f, self.program.optimizer,
                        [self.rules[name] for name in group], self.program.state,
                    )
                    for group in groups
                ],
                1,
            )
            for name, signal in self._pieces.update_signals.items()
        }  # fmt: skip

    @torch.no_grad()
    def logits(self, part: int = 0) -> Tensor:
        """Logits on a held-out batch, all at once, [R, S, V]; FP32, or FP64 for native-fp64."""
        with deterministic(self.tf32):
            tokens = self.held_out[part][0].view(len(self.slots), -1, self.program.shape.context)
            return forward(self.parameters, tokens, self.program.shape, self._draws.at(self.numerics, self.counter))

    def measure(self) -> None:
        """The validation loss, the sharpness and other measures, where they are due after so many steps."""
        evaluations, probes = self.program.evaluation_steps, self.program.probe_steps
        if self.made in evaluations:
            self.validation[evaluations.index(self.made)] = self.validation_loss()
        if self.made in probes:
            self.probed[probes.index(self.made)] = torch.stack(list(self.sharpness().values()))
        self.probes.measure(self)

    def validation_loss(self) -> Tensor:
        """Mean loss of each run over the held-out batches, nats per token, [R]."""
        with deterministic(self.tf32):
            self._evaluation(self._evaluate)
        return self._evaluated.clone()

    def _evaluate(self) -> None:
        self._evaluated.zero_()
        shape, S = self.program.shape, self.held_out[0][0].shape[1]
        for tokens, targets in self.held_out:
            (x, precision), w = self._held_out_hidden(tokens), self.operands[shape.head]
            for r, s, of in self._head_chunks(S, parts_of(w)[0].shape[1], precision):
                self._evaluated[r] += self._pieces.head_loss(
                    x[r, s], weight_of_runs(w, r), targets[r, s], of, shape.vocabulary, shape.readout
                )
        self._evaluated /= self._summed(self._evaluated, S) * len(self.held_out)

    def _head_chunks(self, tokens: int, rows: int, head: Precision) -> Iterator[tuple[slice, slice, Precision]]:
        """(runs, tokens) of each chunk of logits that are not trained on, and the LM head's precision there."""
        for r, s in chunks(len(self.slots), tokens, rows):
            yield r, s, of_runs(head, r)

    def _summed(self, sums: Tensor, tokens: int) -> int:  # noqa: ARG002
        """Over how many tokens a run's sums go, once they have been summed over all that have some, in place."""
        return tokens

    def _all_small(self, small: Tensor) -> Tensor:
        """Whether a run's boxes are small in all of its tokens, [R]."""
        return small

    def sharpness(self) -> dict[str, Tensor]:
        """Mean logit sharpness of each run on the first held-out batch, percent, [R, epsilons] by measure."""
        with deterministic(self.tf32):
            self._probe(lambda: self._measure(boxes_are_small=True))
            if not self._small.all():  # a run with wild logits, which is measured again; the others keep their values
                self._probe_of_any(lambda: self._measure(boxes_are_small=False))
        return dict(zip(SHARPNESS, self._sharpness.clone(), strict=True))

    def _measure(self, boxes_are_small: bool) -> None:
        probe, shape, R = self.program.probe, self.program.shape, len(self.slots)
        tokens, targets = self.held_out[0]
        (x, of_head), w = self._held_out_hidden(tokens), self.operands[shape.head]
        if probe.positions == "last":
            x = x.view(R, -1, shape.context, shape.width)[:, :, -1]
            targets = targets.view(R, -1, shape.context)[:, :, -1]
        sums = torch.zeros_like(self._sharpness)
        small = torch.ones_like(self._small)
        for r, s, precision in self._head_chunks(x.shape[1], parts_of(w)[0].shape[1], of_head):
            chunk = (
                x[r, s],
                weight_of_runs(w, r),
                targets[r, s],
                precision,
                shape.vocabulary,
                probe.epsilons,
                shape.readout,
            )
            if boxes_are_small:
                part, small_part = self._pieces.head_sharpness(*chunk)
                small[r] &= small_part
            else:
                part = self._pieces.head_sharpness_of_any(*chunk)
            sums[:, r] += part
        means = sums / self._summed(sums, x.shape[1])
        if boxes_are_small:
            self._sharpness.copy_(means)
            self._small.copy_(self._all_small(small))
        else:
            self._sharpness.copy_(torch.where(self._small[:, None], self._sharpness, means))


def _alike(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and a.dtype == b.dtype


def train_pack(
    program: Program,
    slots: Sequence[Slot],
    text: Text,
    device: torch.device,
    compiled: bool | None = None,
    on_progress: Callable[[Progress], None] | None = None,
    checkpointer: Keeper | None = None,
    dead_after: int = 0,
    make: Callable[..., Pack] | None = None,
    weights: Weights | None = None,
    on_measured: Callable[[Pack], None] | None = None,
) -> PackResult:
    """Train a pack to its end, from its checkpoint if there is one; `on_progress` hears every `CHUNK` steps,
    of a GPU one report later.

    dead_after: how many steps of NaN a run has to have to be called dead (see `dead`), 0 for never. make: what of, for a pack
    that several processes share. weights: as `Pack` takes them. on_measured: is shown the pack after each step, once that was
    measured. `Interrupted` where the checkpointer hears a signal.
    """
    started = time.perf_counter()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    pack = (make or Pack)(program, slots, text, device, compiled, weights)
    before = checkpointer.restore(pack.load) if checkpointer else Times()
    first, vigil, reports = before.first_step, Vigil(pack, dead_after), Losses(device)

    def hear(losses: Iterator[tuple[int, NDArray[np.float32]]]) -> None:
        for step, losses_R in losses:
            vigil.hear(losses_R)
            if on_progress:
                on_progress(Progress(step, losses_R, text.unigram_entropy, vigil.dead.copy()))

    def times() -> Times:
        return Times(before.total + time.perf_counter() - started, first)

    while True:
        if checkpointer:
            checkpointer.after_step(pack.made, pack.state, times)
        pack.measure()
        if on_measured:
            on_measured(pack)
        if pack.made == program.steps:
            break
        pack.step()
        if pack.made == 1:
            pack.train_loss[0].cpu()  # wait, so that compiling is told apart from training
            first = time.perf_counter() - started
        if (on_progress or vigil.watches) and (pack.made % CHUNK == 0 or pack.made == program.steps):
            hear(
                reports.report(pack.made, pack.train_loss[pack.made - 1])
            )  # the one place where the host waits for the device
            if vigil.ends():
                break
    hear(reports.rest())
    probed = _numbers(pack.probed.swapaxes(0, 1))
    dynamic = bool(program.dynamic_loss_scale)
    return PackResult(
        _numbers(pack.train_loss),
        _numbers(pack.grad_norm),
        _numbers(pack.validation),
        dict(zip(SHARPNESS, probed, strict=True)) if program.probe_steps else {},
        times().total,
        first,
        pack.compiled,
        _numbers(pack.loss_scale) if dynamic else None,
        pack.skipped.cpu().numpy() if dynamic else None,
        _numbers(pack.grad_norm_block),
        {name: _numbers(values) for name, values in pack.signals.values.items()} if program.signal_steps else {},
        pack.made,
        torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None,
        pack.probes.results(),
    )


def _numbers(history: Tensor) -> NDArray[np.float32]:
    """On the host, in FP32."""
    return with_one_nan(history.detach().to("cpu", torch.float32, copy=True).numpy())
