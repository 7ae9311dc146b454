"""A pack: R independent runs trained as one program, one batched product at a time.

What varies along the run axis: initial weights, batches, learning rate and the formats themselves. What is fixed in a
program: shapes, R, the structure of the recipe, the optimiser's constants, the number of steps. A run's numbers depend
on its own seeds and settings only, never on its slot or its neighbours, so a diverged run is left to run: it disturbs nobody.

Nothing in a step waits for the host. The step counter, the batches' positions, the learning rates and the histories live on
the device; histories leave it every `CHUNK` steps.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from formats import quantize
from landscape import logit_sharpness
from train.compiling import compiles_steps, quantizer_for
from train.determinism import deterministic
from train.linear import pack_precision
from train.model import Attention, ModelShape, Numerics, Parameters, cross_entropy, forward
from train.optim import AdamW, learning_rates, update
from train.recipe import Recipe, Structure
from train.seeds import batch_offsets, held_out_offsets, initial_weights
from train.text import Text

CHUNK = 10  # steps between two reports to the host


@dataclass(frozen=True)
class Probe:
    """What is measured while training: every `every` steps, on `sequences` held-out sequences; 0 for never."""

    every: int = 0
    measures: tuple[str, ...] = ("logit_sharpness",)
    epsilons: tuple[float, ...] = (5e-4, 1e-3)
    positions: str = "all"


@dataclass(frozen=True)
class Program:
    """All that the runs of a pack share; two runs can be in one pack only if their programs are equal."""

    shape: ModelShape
    structure: tuple[Structure, Structure]
    dataset: str
    steps: int
    sequences: int
    warmup: int
    schedule: str
    final_fraction: float
    optimizer: AdamW
    evaluate_every: int
    evaluation_sequences: int
    probe: Probe

    @property
    def attention(self) -> Attention:
        """FP64 has no fused kernel; every other carrier uses the fused one."""
        return "math" if self.structure[0].carrier == "fp64" else "fused"

    @property
    def dtype(self) -> torch.dtype:
        """Of master weights, moments and everything between products."""
        return torch.float64 if self.structure[0].carrier == "fp64" else torch.float32

    @property
    def evaluation_steps(self) -> list[int]:
        """After how many updates the validation loss is taken: 0, every `evaluate_every`, and the end."""
        return _at_intervals(self.steps, self.evaluate_every)

    @property
    def probe_steps(self) -> list[int]:
        """After how many updates the sharpness is taken."""
        return _at_intervals(self.steps, self.probe.every) if self.probe.every and self.probe.measures else []

    def rounded_elements_per_step(self) -> int:
        """Elements that one run's quantisers round in a step: every operand of every linear, each once."""
        tokens, D = self.sequences * self.shape.context, self.shape.width
        # Activations in, D + D + D + 4D a block, and gradients in, 3D + D + 4D + D; the head takes D and V.
        return self.shape.size + tokens * (self.shape.layers * 16 * D + D + self.shape.vocabulary)

    def bytes_per_run(self) -> int:
        """An estimate of one run's device memory in bytes, from counting tensors; upper rather than lower.

        FP32 weights, gradients, two moments and clipped copies; saved activations of about 20 D a token and layer in 4
        bytes; four copies of the logits.
        """
        tokens = self.sequences * self.shape.context
        width = 8 if self.dtype == torch.float64 else 4
        activations = tokens * (self.shape.layers * 20 * self.shape.width + 4 * self.shape.vocabulary)
        return width * (5 * self.shape.size + activations)


def _at_intervals(steps: int, every: int) -> list[int]:
    return sorted({*range(0, steps, every), steps})


@dataclass(frozen=True)
class Slot:
    """What one run of a pack has to itself."""

    recipe: Recipe
    learning_rate: float
    init_seed: int
    data_seed: int


@dataclass(frozen=True)
class PackResult:
    """Histories of a pack's runs, the run axis last, in nats per token; sharpness in percent, [probes, R, epsilons]."""

    train_loss: NDArray[np.float32]
    grad_norm: NDArray[np.float32]
    validation_loss: NDArray[np.float32]
    sharpness: Mapping[str, NDArray[np.float32]]
    seconds: float
    seconds_first_step: float
    compiled: bool


@dataclass(frozen=True)
class Progress:
    """A report from a pack under way: updates done, each slot's training loss of the last of them, [R], and the text's
    unigram entropy, where a run that learns nothing from context stays; nats per token.
    """

    step: int
    loss: NDArray[np.float32]
    unigram_entropy: float = float("nan")

    def runs_not_finite(self, runs: int) -> int:
        """How many of the first `runs` slots, padding left out, have lost their way to inf or NaN."""
        return int(runs - np.isfinite(self.loss[:runs]).sum())


_compiled_for: list[object] = []


def _one_program_at_a_time(key: object) -> None:
    """Forget the code compiled for another program; packs of one program share theirs, and compile it once."""
    if _compiled_for != [key]:
        torch._dynamo.reset()
        _compiled_for[:] = [key]


def _losses(
    p: Parameters, text: Tensor, offsets: Tensor, counter: Tensor, shape: ModelShape, numerics: Numerics
) -> Tensor:
    """Each run's mean training loss on its batch of step `counter`, [R]."""
    tokens, targets = _batch(text, offsets.index_select(0, counter)[0], shape.context)
    return cross_entropy(forward(p, tokens, shape, numerics), targets)


def _batch(text: Tensor, offsets_RN: Tensor, T: int) -> tuple[Tensor, Tensor]:
    """Tokens [R, N, T] and their successors [R, N·T], from where each sequence starts."""
    positions = offsets_RN[..., None] + torch.arange(T + 1, device=text.device)
    window = text[positions].to(torch.int64)
    return window[..., :-1], window[..., 1:].flatten(1)


def _update(
    parameters: list[Tensor],
    grads: list[Tensor],
    first: list[Tensor],
    second: list[Tensor],
    rates: Tensor,
    counter: Tensor,
    losses_R: Tensor,
    train_loss: Tensor,
    grad_norm: Tensor,
    config: AdamW,
) -> None:
    """The optimiser's step and this step's row of the histories; the counter moves on."""
    norm_R = update(parameters, grads, first, second, rates.index_select(0, counter)[0], counter + 1, config)
    train_loss.index_copy_(0, counter, losses_R[None].to(train_loss.dtype))
    grad_norm.index_copy_(0, counter, norm_R[None].to(grad_norm.dtype))
    counter.add_(1)


class Pack:
    """R runs under way: parameters, moments, histories and the step that advances them all.

    `compiled` None lets the device decide (see `compiling`). Parameters are `parameters[name]`, [R, ...].
    """

    def __init__(
        self, program: Program, slots: Sequence[Slot], text: Text, device: torch.device, compiled: bool | None = None
    ) -> None:
        self.program, self.slots, self.device = program, tuple(slots), device
        self.compiled = compiles_steps(device.type) if compiled is None else compiled
        work = len(slots) * program.steps * program.rounded_elements_per_step()
        quantizer = quantize if self.compiled else quantizer_for(device.type, work)
        self.numerics = Numerics(
            pack_precision([slot.recipe.body for slot in slots], device, quantizer),
            pack_precision([slot.recipe.lm_head for slot in slots], device, quantizer),
            program.attention,
        )
        self.tf32 = any(s.carrier == "tf32" for s in program.structure)
        weights = [initial_weights(program.shape, slot.init_seed) for slot in slots]
        self.parameters = {
            name: torch.from_numpy(np.stack([w[name] for w in weights])).to(device, program.dtype).requires_grad_()
            for name in program.shape.parameters()
        }
        self.first = [torch.zeros_like(p) for p in self.parameters.values()]
        self.second = [torch.zeros_like(p) for p in self.parameters.values()]
        self.counter = torch.zeros(1, dtype=torch.int64, device=device)
        self._load_text(text)
        peaks = [slot.learning_rate for slot in slots]
        rates = learning_rates(peaks, program.steps, program.warmup, program.schedule, program.final_fraction)
        self.rates = torch.tensor(rates, dtype=program.dtype, device=device)
        self.train_loss = torch.full_like(self.rates, torch.nan, dtype=torch.float32)
        self.grad_norm = torch.full_like(self.train_loss, torch.nan)
        self._losses: Callable[..., Tensor] = _losses
        self._forward: Callable[..., Tensor] = forward
        self._update: Callable[..., None] = _update
        if self.compiled:
            _one_program_at_a_time((program, len(slots), device))
            self._losses = torch.compile(_losses, dynamic=False, fullgraph=True)
            self._forward = torch.compile(forward, dynamic=False, fullgraph=True)
            self._update = torch.compile(_update, dynamic=False, fullgraph=True)

    def _load_text(self, text: Text) -> None:
        program, T = self.program, self.program.shape.context
        for part, tokens in (("training", text.train), ("validation", text.validation)):
            if tokens.size <= T:
                raise ValueError(
                    f"{text.name}'s {part} text has {tokens.size} tokens, no more than a context of {T}: take a shorter one"
                )
        offsets = [
            batch_offsets(slot.data_seed, program.steps, program.sequences, text.train.size - T) for slot in self.slots
        ]
        self.offsets = torch.from_numpy(np.stack(offsets, 1)).to(self.device)
        self.text = torch.tensor(text.train, device=self.device)
        starts = torch.from_numpy(held_out_offsets(program.evaluation_sequences, text.validation.size - T))
        rows = starts.view(-1, 1, program.sequences).expand(-1, len(self.slots), -1)
        validation = torch.tensor(text.validation)
        self.held_out = [tuple(t.to(self.device) for t in _batch(validation, row, T)) for row in rows]

    def step(self) -> None:
        """One training step of every run: batch, forward, backward, clipping, update, histories."""
        parameters = list(self.parameters.values())
        with deterministic(self.tf32):
            losses_R = self._losses(
                self.parameters, self.text, self.offsets, self.counter, self.program.shape, self.numerics
            )
            grads = list(torch.autograd.grad(losses_R.sum(), parameters))
            with torch.no_grad():
                self._update(
                    parameters, grads, self.first, self.second, self.rates, self.counter,
                    losses_R.detach(), self.train_loss, self.grad_norm, self.program.optimizer,
                )  # fmt: skip

    @torch.no_grad()
    def logits(self, batch: int = 0) -> Tensor:
        """Logits on a held-out batch, [R, S, V]."""
        with deterministic(self.tf32):
            return self._forward(self.parameters, self.held_out[batch][0], self.program.shape, self.numerics)

    @torch.no_grad()
    def validation_loss(self) -> Tensor:
        """Mean loss of each run over the held-out batches, nats per token, [R]."""
        losses = [cross_entropy(self.logits(i), targets) for i, (_, targets) in enumerate(self.held_out)]
        return torch.stack(losses).mean(0)

    @torch.no_grad()
    def sharpness(self) -> dict[str, Tensor]:
        """Mean logit sharpness of each run on the first held-out batch, percent, [R, epsilons] by measure."""
        probe, shape = self.program.probe, self.program.shape
        R, N = len(self.slots), self.program.sequences
        logits = self.logits().view(R, N, shape.context, shape.vocabulary)
        targets = self.held_out[0][1].view(R, N, shape.context)
        if probe.positions == "last":
            logits, targets = logits[:, :, -1:], targets[:, :, -1:]
        return {
            name: logit_sharpness(logits, targets, probe.epsilons, centred=centred).mean((1, 2))
            for name, centred in (("logit_sharpness", False), ("logit_sharpness_centred", True))
        }


def train_pack(
    program: Program,
    slots: Sequence[Slot],
    text: Text,
    device: torch.device,
    compiled: bool | None = None,
    on_progress: Callable[[Progress], None] | None = None,
) -> PackResult:
    """Train a pack to its end; `on_progress` hears every `CHUNK` steps."""
    started = time.perf_counter()
    pack = Pack(program, slots, text, device, compiled)
    evaluations: list[Tensor] = []
    probes: list[dict[str, Tensor]] = []
    evaluate_at, probe_at = set(program.evaluation_steps), set(program.probe_steps)
    first = 0.0
    for step in range(program.steps + 1):
        if step in evaluate_at:
            evaluations.append(pack.validation_loss())
        if step in probe_at:
            probes.append(pack.sharpness())
        if step == program.steps:
            break
        pack.step()
        if step == 0:
            pack.train_loss[0].cpu()  # wait, so that compiling is told apart from training
            first = time.perf_counter() - started
        if on_progress and ((step + 1) % CHUNK == 0 or step + 1 == program.steps):
            on_progress(Progress(step + 1, pack.train_loss[step].cpu().numpy(), text.unigram_entropy))
    sharpness = {
        name: torch.stack([p[name] for p in probes]).cpu().float().numpy() for name in (probes[0] if probes else ())
    }
    return PackResult(
        pack.train_loss.cpu().numpy(),
        pack.grad_norm.cpu().numpy(),
        torch.stack(evaluations).cpu().float().numpy(),
        sharpness,
        time.perf_counter() - started,
        first,
        pack.compiled,
    )
