"""What a pack trains and what it gives back: the program that its runs share, a slot for each, results and reports under way."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray

from train.head import CHUNK_OF_ONE_RUN
from train.loss_scale import DynamicLossScale, check_scale
from train.measures import LOGITS, MEASURES, Quantisers
from train.model import ModelShape
from train.operands import ROLES
from train.optim import AdamW, Muon
from train.probe_costs import LANCZOS_STEPS, bytes_of_a_probe, kept_bytes
from train.recipe import Recipe, RecipeStructure
from train.schedules import DECAY_FRACTION
from train.signals import SIGNALS
from train.state_formats import StateFormats


@dataclass(frozen=True)
class Probe:
    """What is measured while training: every `every` steps, on `sequences` held-out sequences; 0 for never.

    intervals: of measures that have their own. The rest is as `settings.ProbeSettings` has it.
    """

    every: int = 0
    measures: tuple[str, ...] = (LOGITS,)
    epsilons: tuple[float, ...] = (5e-4, 1e-3)
    positions: str = "all"
    intervals: tuple[tuple[str, int], ...] = ()
    quantisers: Quantisers = "on"
    eigenvalues: int = 1
    radii: tuple[float, ...] = (0.05,)
    adaptive_radii: tuple[float, ...] = (0.5,)
    samples: int = 8
    at_once: int = 1

    def interval(self, measure: str) -> int:
        """Steps between two probes of a measure, 0 for none."""
        return dict(self.intervals).get(measure, self.every) if measure in self.measures else 0


@dataclass(frozen=True)
class Program:
    """All that the runs of a pack share; two runs can be in one pack only if their programs are equal."""

    shape: ModelShape
    structure: RecipeStructure
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
    decay_fraction: float = DECAY_FRACTION
    state: StateFormats = field(default_factory=StateFormats)
    dynamic_loss_scale: DynamicLossScale | None = None
    scales_loss: bool = False
    before: RecipeStructure | None = None
    until: int = 0
    signals_every: int = 0

    def __post_init__(self) -> None:
        self.state.check_dtype(self.dtype)

    @property
    def dtype(self) -> torch.dtype:
        """Of master weights, moments and everything between products."""
        return torch.float64 if self.structure.body.carrier == "fp64" else torch.float32

    @property
    def evaluation_steps(self) -> list[int]:
        """After how many updates the validation loss is taken: 0, every `evaluate_every`, and the end."""
        return _at_intervals(self.steps, self.evaluate_every)

    def steps_of(self, measure: str) -> list[int]:
        """After how many updates a measure is taken."""
        return _at_intervals(self.steps, every) if (every := self.probe.interval(measure)) else []

    @property
    def probe_steps(self) -> list[int]:
        """After how many updates the logit sharpness is taken."""
        return self.steps_of(LOGITS)

    @property
    def measures(self) -> list[str]:
        """What is taken beside the logit sharpness, of all that an optimiser of this kind leaves."""
        muon = isinstance(self.optimizer, Muon)
        return [
            m
            for m in self.probe.measures
            if m in MEASURES and self.probe.interval(m) and not (MEASURES[m].adam and muon)
        ]

    @property
    def snapshot_steps(self) -> list[int]:
        """After how many updates weights are kept, where a study asks for it: at every probe."""
        own = _at_intervals(self.steps, self.probe.every) if self.probe.every else []
        return sorted({*own, *(step for measure in self.probe.measures for step in self.steps_of(measure))})

    @property
    def signal_steps(self) -> list[int]:
        """The steps that are looked at for alarm signals, each before its update."""
        return list(range(0, self.steps, self.signals_every)) if self.signals_every else []

    def rounded_elements_per_step(self) -> int:
        """Elements that one run's quantisers round in a step: every operand of every linear, each once."""
        shape, tokens, D = self.shape, self.sequences * self.shape.context, self.shape.width
        # Activations in, D + D + D + F a block, and gradients in, those of qkv + D + of fc + D; the head takes D and V.
        a_block = 5 * D + shape.features + self._produced
        weights = shape.size - (0 if shape.tied else shape.vocabulary * D)
        return weights + tokens * (shape.layers * a_block + D + shape.vocabulary)

    @property
    def _produced(self) -> int:
        """Elements of a token that the first products of a block's halves make: 7 D in a GPT-2."""
        return sum(self.shape.attention_features) + (2 if self.shape.mlp == "swiglu" else 1) * self.shape.features

    def bytes_per_run(self, compiled: bool) -> int:
        """An estimate of one run's device memory in bytes, from counting tensors; upper rather than lower.

        Master weights, two moments and Kahan's buffer, if any, in FP32, operands and gradients in the carrier; 38 D bytes a token
        and layer of a GPT-2's saved activations in a BF16 carrier; a chunk of logits, at most, for a run that needs one to
        itself. Compiled, that is the logits and their gradient; an eager step, or probe, makes up to nine tensors of them, and
        its carriers are a CPU's. A look at the signals comes before the step, in the same memory; histories are beside it.
        """
        shape, tokens, D = self.shape, self.sequences * self.shape.context, self.shape.width
        wide = {"bf16": 1, "fp16": 1, "tf32": 2, "fp32": 2, "fp64": 4}[self.structure.body.carrier]
        wide = wide if compiled else max(wide, 2)
        a_layer = 22 * D + 2 * (self._produced + shape.features)
        if shape.mlp == "swiglu":  # its gate
            a_layer += 2 * shape.features
        if shape.qk_norm or shape.positions == "rope" or shape.kv_heads not in (None, shape.heads):  # packed once more
            a_layer += 6 * D
        if shape.qk_norm:  # and normalised, in FP32
            a_layer += 8 * D
        activations = tokens * (a_layer * shape.layers + 40 * D) * wide
        a_logit = 8 * wide if compiled else 44
        # Of sums that the recipe forms: FP64 operands, exponents, accumulators.
        if any(place is not None and place.accumulate for place in self.structure.places):
            head = self.structure.places[1]
            a_logit += 64 if head is not None and head.accumulate else 0
            activations += 256 * tokens * D
        logits = a_logit * min(tokens * self.shape.vocabulary, CHUNK_OF_ONE_RUN)
        activations += self._bytes_of_rules(wide, compiled) + self._bytes_of_written_attention(compiled)
        state = (20 + 4 * self.state.kahan) * self.shape.size * wide
        look = self._bytes_of_a_look(compiled) if self.signals_every else 0
        return state + kept_bytes(self) + max(activations + logits, look, bytes_of_a_probe(self)) + self.history_bytes

    def _bytes_of_a_look(self, compiled: bool) -> int:
        """What the signals of one sequence take at most: an eager pass with all that it leaves, one block's attention scores, and
        the statistics of the largest matrix.
        """
        shape, T, D = self.shape, self.shape.context, self.shape.width
        a_token = shape.layers * (16 * D + 3 * (self._produced + shape.features)) + 12 * D + 10 * shape.vocabulary
        largest = max(math.prod(sizes) for sizes in shape.parameters().values())
        numbers = T * a_token + 3 * shape.heads * T * T + (3 if compiled else 12) * largest
        return numbers * self.dtype.itemsize

    @property
    def history_bytes(self) -> int:
        """Of one run's histories and signals, on the device, and in its file before it is compressed."""
        blocks, tensors = 1 + self.shape.layers, 1 + 4 * self.shape.layers
        sizes = {"block": blocks, "tensor": tensors, "role": len(ROLES)}
        a_look = sum(math.prod(sizes[d] for d in signal.dims) for signal in SIGNALS.values())
        a_step = (4 if self.dynamic_loss_scale else 2) + blocks
        return 4 * (self.steps * a_step + len(self.signal_steps) * a_look) + self._bytes_of_values

    @property
    def _bytes_of_values(self) -> int:
        """What measures leave: mostly a few numbers, of a spectral density some hundred."""
        numbers = {"spectral_density": 2 * LANCZOS_STEPS * self.probe.samples}
        most = 4 * max(
            self.probe.eigenvalues, len(self.probe.epsilons), len(self.probe.radii), len(self.probe.adaptive_radii)
        )
        return 4 * sum(len(self.steps_of(measure)) * (numbers.get(measure, 0) + most + 6) for measure in self.measures)

    def _bytes_of_rules(self, wide: int, compiled: bool) -> int:
        """What rounding by rules adds: each linear's input again, as wgrad takes it, weights twice, and what it makes
        on the way of the largest operand: eager code a dozen tensors of it, in FP64 where it is stochastic or rotated.
        """
        places = [place for place in self.structure.places if place is not None and place.rules is not None]
        if not places:
            return 0
        shape, tokens = self.shape, self.sequences * self.shape.context
        inputs = 2 * (3 * shape.width + shape.features) * shape.layers * wide * (1 if compiled else 2)
        head = self.structure.places[1]
        by_rules = head is not None and head.rules is not None
        logits = min(tokens * shape.vocabulary, CHUNK_OF_ONE_RUN) if by_rules else 0
        gated = 2 if shape.mlp == "swiglu" else 1
        widest = max(tokens * max(sum(shape.attention_features), gated * shape.features), logits)
        drawn = any(place.rules is not None and (place.rules.is_stochastic or place.rules.hadamard) for place in places)
        return tokens * inputs + 2 * wide * shape.size + widest * (24 if compiled else 96 if drawn else 35)

    def _bytes_of_written_attention(self, compiled: bool) -> int:
        """Scores of attention that is written out: three tensors of them a layer, five and roundings where they are rounded."""
        if self.structure.attention_form == "fused" and not self.shape.dropout:
            return 0
        scores = self.sequences * self.shape.heads * self.shape.context**2
        rounded = self.structure.places[4] is not None
        return 4 * scores * self.shape.layers * (5 if rounded else 3) + (0 if compiled else 60 * scores * rounded)


def _at_intervals(steps: int, every: int) -> list[int]:
    return sorted({*range(0, steps, every), steps})


@dataclass(frozen=True)
class Slot:
    """What one run of a pack has to itself."""

    recipe: Recipe
    learning_rate: float
    init_seed: int
    data_seed: int
    loss_scale: float = 1.0

    def __post_init__(self) -> None:
        check_scale(self.loss_scale)


@dataclass(frozen=True)
class PackResult:
    """Histories of a pack's runs, the run axis last, in nats per token; sharpness in percent, [probes, R, epsilons].

    loss_scale and skipped are there only where the program's loss scale is dynamic. grad_norm_block: [steps, R, 1 + L], what is
    outside the blocks first; signals, by the names of `signals`: [signal steps, R, ...]. steps_made: fewer than the program's if
    the pack ended early (see `dead`), None where nobody counted; peak_bytes: the most memory that tensors took on a GPU at once.
    measures: by "measure/variable", as `measures` names them: [probes of the measure, R, ...].
    """

    train_loss: NDArray[np.float32]
    grad_norm: NDArray[np.float32]
    validation_loss: NDArray[np.float32]
    sharpness: Mapping[str, NDArray[np.float32]]
    seconds: float
    seconds_first_step: float
    compiled: bool
    loss_scale: NDArray[np.float32] | None = None
    skipped: NDArray[np.bool_] | None = None
    grad_norm_block: NDArray[np.float32] | None = None
    signals: Mapping[str, NDArray[np.float32]] = field(default_factory=dict)
    steps_made: int | None = None
    peak_bytes: int | None = None
    measures: Mapping[str, NDArray[np.float32]] = field(default_factory=dict)

    def times_alone(self) -> PackResult:
        """The same without its histories, for who has the pack's file and wants no more than how long it took."""
        none = np.empty(0, np.float32)
        return PackResult(
            none,
            none,
            none,
            {},
            self.seconds,
            self.seconds_first_step,
            self.compiled,
            steps_made=self.steps_made,
            peak_bytes=self.peak_bytes,
        )


@dataclass(frozen=True)
class Progress:
    """A report from a pack under way: updates done, each slot's training loss of the last of them, [R], and the text's
    unigram entropy, where a run that learns nothing from context stays; nats per token. memory: in bytes, of the process that
    trains it, where that is another. dead: which runs are, [R], see `dead`. rang: for which runs an alarm of the study's rang.
    """

    step: int
    loss: NDArray[np.float32]
    unigram_entropy: float = float("nan")
    dead: NDArray[np.bool_] | None = None
    memory: int | None = None
    rang: NDArray[np.bool_] | None = None
