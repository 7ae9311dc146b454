"""The tables of a study file: every setting with its meaning, its default and its limits.

A table is frozen and closed: an unknown key, a value out of its limits or two that contradict each other are refused with
the value, the limit and the mend. Where in the file that stands is `study_file`'s to say.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Mapping
from typing import Annotated, Any, Literal, get_args

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ModelWrapValidatorHandler,
    ValidationInfo,
    field_validator,
    model_validator,
)

from train.alarm_rules import check_alarm, rules_of
from train.corruption import Corruption
from train.measures import LOGITS, Quantisers, check_measure
from train.presets import check_preset, filled
from train.schedules import DECAY_FRACTION, MUON_RATE, Schedule, decay_steps
from train.tokenizer import check_tokenizer, vocabulary_of

PACK_SIZES = (1, 2, 4, 8, 16, 32, 64, 128)
CONTEXT_LIMIT, STEPS_LIMIT = 8192, 1_000_000
VOCABULARY_LIMIT = 2**18
RUNS_LIMIT, SETTINGS_LIMIT = (
    1_000_000,
    100_000,
)  # of a study: its runs, and what its axes make of [model], [training], [data]
SEEDS_LIMIT, NAME_LIMIT = 100_000, 100  # counted by one number; characters
EIGENVALUES_LIMIT = 16  # each is a vector of the size of the weights, kept from probe to probe

Positive = Annotated[int, Field(ge=1)]
Rate = Annotated[float, Field(gt=0, le=100, allow_inf_nan=False)]
Seed = Annotated[int, Field(ge=0, lt=2**32)]
Share = Annotated[float, Field(ge=0, le=1)]
Radii = list[Annotated[float, Field(gt=0, le=100)]]
NoDecay = Literal["gains", "embeddings", "head"]


class Table(BaseModel):
    """A table of a study file: frozen, and closed to keys that mean nothing."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class ModelSettings(Table):
    """[model]: the architecture, its sizes, and what is said to make training stable; width and context in features and tokens.

    `preset` and `architecture` say what is not written (see `presets`): an instance holds what they came to, and
    `model_fields_set` what was written.

    architecture    of the blocks: sets norm, mlp, positions and tied, each of which can be set by itself
    layers          blocks, one after the other
    heads           query heads of attention; they divide the width
    width           features of the residual stream
    context         tokens of a sequence
    tokenizer       what tokens are: bytes, gpt2's, a trained BPE's (bpe-4096, bpe-16384), or the V ids of a .bin (ids-V)
    preset          a model by name, with its sizes and tokenizer; keys that are written win over it
    norm            of the stream before each part of a block and at the end: LayerNorm without a bias, or RMSNorm
    mlp             the MLP's activation: GELU, or SwiGLU with its gate
    positions       a learned vector for each place, or rotary embeddings of queries and keys (RoPE)
    tied            whether the LM head is the token embedding, or a matrix of its own
    rope_base       the base of RoPE's wavelengths, the longest of which is about 2 pi times it, in tokens
    kv_heads        key and value heads, each shared by heads / kv_heads queries (GQA, Ainslie et al. 2305.13245) (default: heads)
    hidden          features of the MLP (default: 4 width for GELU, 8/3 width for SwiGLU)
    vocabulary      logits and embeddings; more than the tokenizer has are logits like others (default: the tokenizer's)
    qk_norm         RMSNorm of each query and key, with a learned gain (Dehghani et al. 2302.05442, Wortsman et al. 2309.14322)
    dropout         share dropped after embeddings, of attention's weights and of what blocks add, as nanoGPT does
    z_loss          c of c logsumexp(z)^2, added to what is trained on, and not to the losses that are recorded (PaLM, 2204.02311)
    logit_softcap   the logits become cap tanh(z / cap) (Gemma 2, 2408.00118)
    init_std        standard deviation of initial weights, before the factors of depth and muP
    mup_base_width  muP (Yang et al. 2203.03466), exactly the standard model at this width: see `ModelShape`
    mup_base_heads  heads of muP's base model, whose size sets the scale of attention (default: heads)
    """

    architecture: Literal["gpt2", "llama"] = "gpt2"
    layers: Annotated[int, Field(ge=1, le=200)] = 4
    heads: Annotated[int, Field(ge=1, le=256)] = 4
    width: Annotated[int, Field(ge=1, le=65536)] = 128
    context: Annotated[int, Field(ge=1, le=CONTEXT_LIMIT)] = 128
    tokenizer: Annotated[str, AfterValidator(check_tokenizer)] = "bytes"
    preset: Annotated[str | None, AfterValidator(check_preset)] = None
    norm: Literal["layernorm", "rmsnorm"] = "layernorm"
    mlp: Literal["gelu", "swiglu"] = "gelu"
    positions: Literal["learned", "rope"] = "learned"
    tied: bool = True
    kv_heads: Positive | None = None
    hidden: Annotated[int, Field(ge=1, le=4 * 65536)] | None = None
    vocabulary: Annotated[int, Field(ge=2, le=VOCABULARY_LIMIT)] | None = None
    rope_base: Annotated[float, Field(ge=1, allow_inf_nan=False)] = 10_000.0
    qk_norm: bool = False
    z_loss: Annotated[float, Field(ge=0, le=1)] = 0.0
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    logit_softcap: Annotated[float, Field(gt=0, allow_inf_nan=False)] | None = None
    init_std: Annotated[float, Field(gt=0, le=10)] = 0.02
    mup_base_width: Positive | None = None
    mup_base_heads: Positive | None = None

    @model_validator(mode="wrap")
    @classmethod
    def _filled(cls, data: Any, validate: ModelWrapValidatorHandler[ModelSettings]) -> ModelSettings:
        if not isinstance(data, Mapping):
            return validate(data)
        model = validate(filled(data))
        model.model_fields_set.intersection_update(key for key, value in data.items() if value is not None)
        return model

    @model_validator(mode="after")
    def _sizes_fit(self) -> ModelSettings:
        if self.width % self.heads:
            nearest = max(1, round(self.width / self.heads)) * self.heads
            raise ValueError(
                f"width must be a multiple of heads={self.heads}, got {self.width}; the nearest is {nearest}"
            )
        if self.kv_heads is not None and self.heads % self.kv_heads:
            possible = [k for k in range(1, self.heads + 1) if self.heads % k == 0]
            raise ValueError(
                f"kv_heads must divide heads={self.heads}, got {self.kv_heads}; take one of {', '.join(map(str, possible))}"
            )
        if self.positions == "rope" and (size := self.width // self.heads) % 2:
            raise ValueError(
                f"rope turns pairs of features, so width / heads must be even, got {self.width} / {self.heads} = {size}; "
                f"take a width of {(size + 1) * self.heads}"
            )
        if self.vocabulary is not None and self.vocabulary < (least := vocabulary_of(self.tokenizer)):
            raise ValueError(
                f"vocabulary must be at least the {least} of tokenizer {self.tokenizer!r}, got {self.vocabulary}; leave it out"
            )
        return self

    @model_validator(mode="after")
    def _mup_has_a_base(self) -> ModelSettings:
        heads, width = self.mup_base_heads, self.mup_base_width
        if heads is not None and width is None:
            raise ValueError(f"mup_base_heads={heads} needs mup_base_width, the width of muP's base model")
        if heads is not None and width is not None and width % heads:
            raise ValueError(f"mup_base_width must be a multiple of mup_base_heads={heads}, got {width}")
        return self

    @property
    def label(self) -> str:
        """The model as a word of a dataset: "gpt2-4x128"."""
        return f"{self.architecture}-{self.layers}x{self.width}"


class DataSettings(Table):
    """[data]: what is done to the training text on purpose, in shares of its tokens, and to whole documents.

    Validation is never touched. Which documents it is depends on the text alone: see `corruption`, which defines each kind. The
    three are at most 1 together.

    noise       share of training tokens in documents that become tokens drawn uniformly from the vocabulary
    shuffled    share in documents whose own tokens stand in random order
    duplicated  share in documents that become copies of others
    """

    noise: Share = 0.0
    shuffled: Share = 0.0
    duplicated: Share = 0.0

    @model_validator(mode="after")
    def _a_share_of_one(self) -> DataSettings:
        if (total := self.noise + self.shuffled + self.duplicated) > 1:
            raise ValueError(f"noise, shuffled and duplicated must be at most 1 together, got {total:g}")
        return self

    @property
    def corruption(self) -> Corruption:
        """The same as `load_text` takes it."""
        return Corruption(self.noise, self.shuffled, self.duplicated)


def _infinite(clip: object) -> object:
    """No clipping, in a word, as the number that stands for it."""
    return math.inf if clip == "none" else clip


def _listed(kinds: object) -> object:
    """Words in one, as an axis has them, "gains+head" or "none", as a list; each once, in the order in which they are defined."""
    if isinstance(kinds, str):
        kinds = [] if kinds == "none" else kinds.split("+")
    if isinstance(kinds, list | tuple) and all(kind in get_args(NoDecay) for kind in kinds):
        return [kind for kind in get_args(NoDecay) if kind in kinds]
    return kinds


class TrainingSettings(Table):
    """[training]: one run's batch, schedule and optimiser.

    steps               updates of a run
    sequences           of `context` tokens, in a run's batch
    warmup              steps at the start in which the learning rate rises evenly to its peak; fewer than all
    schedule            of the learning rate after the warm-up: see `schedules`
    final_fraction      of the peak, at which a schedule that falls ends
    decay_fraction      of all steps, over which wsd falls at the end
    optimizer           AdamW for all weights, or Muon for the blocks' matrices and AdamW for the others
    muon_rate           Muon's learning rate in units of the run's, which is AdamW's
    clip                the largest norm of a run's gradient; larger ones are scaled down to it; inf, or "none", for no clipping
    beta1               how much of the first moment a step of Adam keeps
    beta2               how much of the second moment a step of Adam keeps
    eps                 what Adam adds to the root of the second moment
    weight_decay        decoupled: a step takes learning rate times it of each weight
    no_decay            kinds of parameters without weight decay; a tied LM head is an embedding too
    evaluate_every      steps between two validation losses; there is one before the first step and at the end, too
    evaluation_batches  batches of held-out text that a validation loss is the mean over
    """

    steps: Annotated[int, Field(ge=1, le=STEPS_LIMIT)] = 300
    sequences: Positive = 8
    warmup: Annotated[int, Field(ge=0)] = 50
    schedule: Schedule = "cosine"
    final_fraction: Annotated[float, Field(ge=0, le=1)] = 0.1
    decay_fraction: Annotated[float, Field(gt=0, le=1)] = DECAY_FRACTION
    optimizer: Literal["adamw", "muon"] = "adamw"
    muon_rate: Annotated[float, Field(gt=0, le=10_000)] = MUON_RATE
    clip: Annotated[float, BeforeValidator(_infinite), Field(gt=0)] = 1.0
    beta1: Annotated[float, Field(ge=0, lt=1)] = 0.9
    beta2: Annotated[float, Field(ge=0, lt=1)] = 0.95
    eps: Annotated[float, Field(gt=0, le=1)] = 1e-8
    weight_decay: Annotated[float, Field(ge=0, le=10)] = 0.1
    no_decay: Annotated[list[NoDecay], BeforeValidator(_listed)] = ["gains"]
    evaluate_every: Positive = 50
    evaluation_batches: Positive = 2

    @model_validator(mode="after")
    def _warm_up_ends(self) -> TrainingSettings:
        if self.warmup >= self.steps:
            raise ValueError(
                f"warmup must be less than steps={self.steps}, got {self.warmup}; take {self.steps // 10}, or more steps"
            )
        return self

    @model_validator(mode="after")
    def _decay_comes_after_the_warm_up(self) -> TrainingSettings:
        room, decay = self.steps - self.warmup, decay_steps(self.steps, self.decay_fraction)
        if self.schedule == "wsd" and decay > room:
            raise ValueError(
                f"decay_fraction must leave the warm-up its {self.warmup} of {self.steps} steps, got {self.decay_fraction:g}; "
                f"at most {math.floor(1000 * room / self.steps) / 1000:g}"
            )
        return self


class ProbeSettings(Table):
    """[probe]: sharpness measured while training, every `every` steps (0 for never), on a fixed held-out batch (see `measures`).

    every           steps between two probes, 0 for never; there is one before the first step and at the end, too
    measures        of sharpness, by name: see `measures`
    epsilons        half-widths of Keskar's box for the logit sharpness, relative to each logit's |z| + 1
    intervals       steps between two probes of a measure that has its own: hessian_eigenvalue = 500
    positions       of the logit sharpness: mean over all of the probe's tokens, or over each sequence's last
    snapshots       runs whose weights are kept at every probe, each a recipe's name or as `selection` says; a run's numbers do
                    not depend on it
    quantisers      of all other measures: of the loss as the run computes it, its derivatives straight through the rounding; of
                    the loss without any rounding; or second derivatives by differences of the rounded loss's gradients
    eigenvalues     how many of the largest
    radii           of SAM's and m-SAM's ball, and of noise relative to each weight for the average case
    adaptive_radii  of ASAM's ball and the adaptive worst case
    samples         random vectors of a trace, a spectral density and the average case
    at_once         the probe's sequences of every run that are in memory at a time, with all that second derivatives need; or as
                    many in all of fewer runs
    """

    every: Annotated[int, Field(ge=0)] = 50
    measures: list[Annotated[str, AfterValidator(check_measure)]] = [LOGITS]
    epsilons: list[Annotated[float, Field(gt=0, le=1)]] = [5e-4, 1e-3]
    positions: Literal["all", "last"] = "all"
    snapshots: list[str] = []
    intervals: dict[str, Positive] = {}
    quantisers: Quantisers = "on"
    eigenvalues: Annotated[int, Field(ge=1, le=EIGENVALUES_LIMIT)] = 1
    radii: Radii = [0.05]
    adaptive_radii: Radii = [0.5]
    samples: Annotated[int, Field(ge=2, le=1000)] = 8
    at_once: Positive = 1

    @field_validator("epsilons", "radii", "adaptive_radii")
    @classmethod
    def _distinct(cls, values: list[float], info: ValidationInfo) -> list[float]:
        if not values or len(set(values)) < len(values):
            raise ValueError(f"{info.field_name} must be one or more different numbers, got {values}")
        return values

    @field_validator("measures")
    @classmethod
    def _each_once(cls, names: list[str]) -> list[str]:
        if len(set(names)) < len(names):
            raise ValueError(f"a measure is named twice: {names}")
        return names

    @model_validator(mode="after")
    def _intervals_of_measures(self) -> ProbeSettings:
        for name in self.intervals:
            if name not in self.measures:
                near = difflib.get_close_matches(name, self.measures, n=1)
                hint = (
                    f"; did you mean {near[0]!r}?"
                    if near
                    else f": add it there, or leave it out; there are {self.measures}"
                )
                raise ValueError(f"intervals names {name!r}, which is not among measures{hint}")
        return self


class SignalsTable(Table):
    """[signals]: alarm signals, recorded while training; a run's identity does not depend on it.

    every  steps between two recordings, 0 for never
    """

    every: Annotated[int, Field(ge=0)] = 10


class AlarmsTable(Table):
    """[alarms]: what a sweep reports while it trains, and /alarms says of it; a run's numbers and identity do not depend on it.

    thresholds  each an alarm: a signal's name and a threshold, "kurtosis=12" or "kurtosis>12", which rings above it, or
                "update_rms<0.2", which rings below
    """

    thresholds: list[Annotated[str, AfterValidator(check_alarm)]] = []

    @field_validator("thresholds")
    @classmethod
    def _each_once(cls, texts: list[str]) -> list[str]:
        rules_of(texts)
        return texts


class DivergenceTable(Table):
    """[divergence]: which definition the study reports, and the margins of all of them: see `stability`.

    definition       which of them counts as diverged; all are stored
    window           steps at the end whose mean loss is the final one
    progress_margin  nats/token below the text's unigram entropy that a run must reach, or it made no progress
    gap_margin       nats/token above what the baseline reaches at its own best learning rate, from which there is a gap
    sigma            standard deviations above its recent course at which a loss is a spike
    spike_window     steps of that course, to which a straight line is fitted
    recovery_margin  nats/token above the loss before its first spike within which a run has recovered
    """

    definition: Literal["non_finite", "no_progress", "spike", "gap"] = "no_progress"
    window: Positive = 20
    progress_margin: Annotated[float, Field(ge=0)] = 0.1
    gap_margin: Annotated[float, Field(ge=0)] = 0.2
    sigma: Annotated[float, Field(gt=0)] = 6.0
    spike_window: Annotated[int, Field(ge=8)] = 128
    recovery_margin: Annotated[float, Field(ge=0)] = 0.1


class ExecutionTable(Table):
    """[execution]: how runs become packs, and how often a pack's state is kept; a run's identity does not depend on it.

    pack_size           runs R that train as one program: 1, 2, 4, ... 128; "auto" for what memory holds and runs fill, and
                        less where a GPU would be idle
    checkpoint_seconds  between two checkpoints; 0 for none; "auto" for a minute, or as long as keeps their cost below 2 %
    dead_after          steps of NaN after which a run counts as dead, and a pack of nothing but dead runs ends; 0 for never
    """

    pack_size: Literal["auto"] | int = "auto"
    checkpoint_seconds: Literal["auto"] | float = "auto"
    dead_after: Annotated[int, Field(ge=0, le=STEPS_LIMIT)] = 50

    @field_validator("checkpoint_seconds")
    @classmethod
    def _not_negative(cls, seconds: Literal["auto"] | float) -> Literal["auto"] | float:
        if seconds != "auto" and not seconds >= 0:
            raise ValueError(f'checkpoint_seconds must be "auto" or at least 0, got {seconds:g}; 0 is for none')
        return seconds

    @field_validator("pack_size")
    @classmethod
    def _from_the_list(cls, size: Literal["auto"] | int) -> Literal["auto"] | int:
        if size != "auto" and size not in PACK_SIZES:
            raise ValueError(f'pack_size must be "auto" or one of {", ".join(map(str, PACK_SIZES))}, got {size}')
        return size


def check_folder_name(name: str) -> str:
    """The name, if a folder may be called so without harm; else ValueError."""
    if not 1 <= len(name) <= NAME_LIMIT or not name.isprintable() or set(name) & set("/\\") or name[0] in ".-~":
        raise ValueError(
            f"must be a folder's name: 1 to {NAME_LIMIT} characters that print, without / or \\, the first no dot, minus or ~"
        )
    return name
