"""A study file is read whole, multiplied out, and refused in one line that says where and what."""

from __future__ import annotations

import dataclasses
import hashlib
import math
import tomllib
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import torch

from train.optim import AdamW, Muon
from train.plan import plan, program_of
from train.settings import DataSettings, ModelSettings, ProbeSettings, TrainingSettings
from train.study import Study, StudyError
from train.study_file import read_study

SMALL = """
name = "small"
baseline = "e8m7"

[axes]
recipe = ["e8m7", "mine"]
learning_rate = [1e-3, 2e-3]
seed = 3

[model]
layers = 1
heads = 2
width = 16
context = 16

[training]
steps = 30
warmup = 5

[recipes.mine]
activation = "e4m3fn"
weight = "e4m3fn"
gradient = "e5m2"
lm_head = "native-bf16"
"""


def write(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "study.toml"
    path.write_text(text)
    return path


def test_axes_are_multiplied_out(tmp_path: Path) -> None:
    runs = list(read_study(write(tmp_path, SMALL)).runs())
    assert [(r.recipe.name, r.learning_rate, r.seed) for r in runs[:4]] == [
        ("e8m7", 1e-3, 0), ("e8m7", 1e-3, 1), ("e8m7", 1e-3, 2), ("e8m7", 2e-3, 0),
    ]  # fmt: skip
    assert len(runs) == 2 * 2 * 3 == len({r.identity for r in runs})
    assert runs[-1].recipe.lm_head.structure.native == "bf16"


def test_any_field_of_model_or_training_may_be_an_axis(tmp_path: Path) -> None:
    text = SMALL.replace("seed = 3", "seed = [7]\nwidth = [16, 32]\nclip = [0.5, 1.0]")
    runs = list(read_study(write(tmp_path, text)).runs())
    assert {(r.model.width, r.training.clip) for r in runs} == {(16, 0.5), (16, 1.0), (32, 0.5), (32, 1.0)}
    assert dict(runs[0].extra_axes) == {"width": 16, "clip": 0.5}
    assert {r.init_seed for r in runs} == {7}


def test_init_and_data_seeds_may_differ(tmp_path: Path) -> None:
    text = SMALL.replace("seed = 3", "init_seed = 2\ndata_seed = [5, 9]")
    runs = list(read_study(write(tmp_path, text)).runs())
    assert {(r.init_seed, r.data_seed) for r in runs} == {(0, 5), (0, 9), (1, 5), (1, 9)}


def test_the_resolved_file_means_the_same_study(tmp_path: Path) -> None:
    for text in (SMALL, SMALL.replace("seed = 3", "init_seed = 2\ndata_seed = [5, 9]\nclip = [0.5, 1.0]")):
        study = read_study(write(tmp_path, text))
        again = read_study(write(tmp_path, study.to_toml()))
        assert [r.identity for r in again.runs()] == [r.identity for r in study.runs()]
        assert again.hash == study.hash
        assert tomllib.loads(study.to_toml())["training"]["weight_decay"] == 0.1


def test_a_runs_identity_is_what_decides_its_numbers() -> None:
    axes = {"recipe": ["e8m7"], "learning_rate": [1e-3]}
    first = next(iter(Study(axes=axes).runs())).identity  # type: ignore[arg-type]
    assert next(iter(Study(name="other", axes=axes, execution={"pack_size": 4}).runs())).identity == first  # type: ignore[arg-type]
    assert next(iter(Study(axes=axes, execution={"checkpoint_seconds": 5}).runs())).identity == first  # type: ignore[arg-type]
    for change in ({"training": {"steps": 301}}, {"model": {"layers": 5}}, {"probe": {"every": 7}}):
        assert next(iter(Study(axes=axes, **change).runs())).identity != first  # type: ignore[arg-type]


def test_identities_do_not_change_from_version_to_version() -> None:
    """They name finished runs on other people's disks: where this fails, raise IDENTITY_VERSION or mend what moved them."""
    axes = {"recipe": ["e8m7", "native-bf16"], "learning_rate": [1e-3], "seed": [3]}
    study = Study(axes=axes, training={"steps": 77}, model={"width": 64})  # type: ignore[arg-type]
    assert [run.identity for run in study.runs()] == ["77097b0a4e797ee5b053adda", "88a2d219fd09d499c85df77c"]
    defaults = [str(table().model_dump()) for table in (ModelSettings, TrainingSettings, DataSettings, ProbeSettings)]
    assert hashlib.sha256("".join(defaults).encode()).hexdigest()[:16] == "945a63663b9b6023", (
        "a default changed, or a setting is new"
    )


MANY: dict[str, Any] = {
    "axes": {
        "recipe": ["e8m7", "fp8-hybrid", "native-bf16"], "learning_rate": [1e-3, 2.5e-3, 0.1], "init_seed": [0, 7],
        "data_seed": [3, 2**31], "width": [16, 32], "rounding": ["nearest_even", "stochastic"], "clip": [1, "none"],
        "noise": [0.0, 0.25],
    },
    "model": {"layers": 1, "heads": 2, "context": 16}, "training": {"steps": 20, "warmup": 3},
    "execution": {"pack_size": 4},
}  # fmt: skip


def test_plans_do_not_change_from_version_to_version() -> None:
    """Identities and packs' hashes of 576 runs, as they were when every run's was worked out by itself."""

    def digest(words: Iterable[str]) -> str:
        return hashlib.sha256(" ".join(words).encode()).hexdigest()[:16]

    study, cpu = Study.model_validate(MANY), torch.device("cpu")
    identities = [run.identity for run in study.runs()]
    packs = plan(study, cpu)
    assert (len(identities), len(packs)) == (576, 144)
    assert digest(identities) == "a3da567116e650ec"
    assert digest(pack.hash for pack in packs) == "022db788977070bd"
    assert digest(pack.hash for pack in plan(study, cpu, set(identities[::3]))) == "89878c3b1096f9e3"


def test_identities_without_runs_are_those_of_the_runs() -> None:
    for axes in (MANY["axes"], {"recipe": ["e4m3"], "learning_rate": [1e-5, 1, 1e-3], "seed": 3}):
        study = Study.model_validate(MANY | {"axes": axes})
        assert list(study.identities()) == [run.identity for run in study.runs()]


def test_a_design_has_the_runs_of_the_study_and_no_others() -> None:
    study = Study.model_validate(MANY)
    design, runs = study.design(), list(study.runs())
    assert len(design) == len(runs) == 576
    assert all(run in design for run in runs)
    other = Study.model_validate(MANY | {"axes": {**MANY["axes"], "clip": [1, "none", 0.5], "data_seed": [3, 4]}})
    assert sum(run in design for run in other.runs()) == 576 / 2
    rates = Study.model_validate(MANY | {"axes": {**MANY["axes"], "learning_rate": [1e-3, 0.2]}})
    assert sum(run in design for run in rates.runs()) == 576 / 3
    assert other.design().hash != design.hash == Study.model_validate({**MANY, "name": "x"}).design().hash


def test_a_run_that_is_changed_has_an_identity_of_its_own() -> None:
    """Words that are shared serve only those that share what they are made of."""
    study = Study.model_validate(MANY)
    run, *_, other = study.runs()
    for changes in (
        {"learning_rate": 0.5}, {"init_seed": 9}, {"recipe": other.recipe}, {"model": other.model}, {"dataset": "x"},
        {"training": other.training}, {"data": other.data}, {"extra_axes": ()},
    ):  # fmt: skip
        changed = dataclasses.replace(run, **changes)
        alone = dataclasses.replace(changed, words=None)
        assert changed.identity == alone.identity != run.identity


@pytest.mark.parametrize(
    ("axes", "message"),
    [
        (
            {key: list(range(1, 9)) for key in ("layers", "steps", "warmup", "delayed", "first_blocks", "last_blocks")},
            "axes of settings multiply to 262144 combinations, more than 100000: split the study",
        ),
        (
            {"seed": 100_000, "learning_rate": [i / 10 for i in range(1, 12)]},
            "axes multiply to 1100000 runs, more than 1000000: split the study",
        ),
    ],
)
def test_more_than_can_be_looked_at_is_refused_before_it_is(axes: dict[str, Any], message: str) -> None:
    """A table of settings takes a hundred times as long as a run."""
    with pytest.raises(ValueError, match=message):
        Study.model_validate({"axes": {"recipe": ["e8m7"], "learning_rate": [1e-3], **axes}})


def test_no_clipping_is_infinity_however_it_is_written(tmp_path: Path) -> None:
    """A number in the resolved file and on an axis, and no other run's identity."""
    identities = []
    for clip in ("inf", '"none"'):
        study = read_study(write(tmp_path, SMALL.replace("warmup = 5", f"warmup = 5\nclip = {clip}")))
        assert study.training.clip == math.inf
        assert tomllib.loads(study.to_toml())["training"]["clip"] == math.inf
        again = read_study(write(tmp_path, study.to_toml()))
        identities += [[r.identity for r in s.runs()] for s in (study, again)]
    assert identities[1:] == identities[:-1]
    assert set(identities[0]).isdisjoint(r.identity for r in read_study(write(tmp_path, SMALL)).runs())
    axis = read_study(write(tmp_path, SMALL.replace("seed = 3", 'seed = 1\nclip = [1, "none"]')))
    assert [dict(run.extra_axes)["clip"] for run in axis.runs()][:4] == [1.0, 1.0, math.inf, math.inf]
    assert [run.training.clip for run in axis.runs()][:4] == [1.0, 1.0, math.inf, math.inf]


def test_presets_on_an_axis_that_come_to_one_model_are_refused() -> None:
    """A preset is no part of an identity, and all that these two say is written otherwise."""
    study = {"axes": {"recipe": ["e8m7"], "learning_rate": [1e-3], "preset": ["gpt2-3m", "gpt2-11m"], "clip": [1, 2]}}
    sizes = {"layers": 1, "heads": 2, "width": 16}
    with pytest.raises(ValueError, match=r"axes\.preset: 'gpt2-3m' and 'gpt2-11m' mean the same: leave one out"):
        Study.model_validate(study | {"model": sizes})
    assert len(set(Study.model_validate(study | {"model": {"layers": 1, "heads": 2}}).identities())) == 4


def test_kinds_without_decay_are_a_list_or_one_word_on_an_axis(tmp_path: Path) -> None:
    listed = SMALL.replace("warmup = 5", 'warmup = 5\nno_decay = ["head", "gains", "head"]')
    assert read_study(write(tmp_path, listed)).training.no_decay == ["gains", "head"]
    axis = SMALL.replace("seed = 3", 'seed = 1\nno_decay = ["gains", "head+gains", "none"]')
    runs = list(read_study(write(tmp_path, axis)).runs())
    assert [run.training.no_decay for run in runs][:6:2] == [["gains"], ["gains", "head"], []]
    assert [dict(run.extra_axes)["no_decay"] for run in runs][:6:2] == ["gains", "gains+head", "none"]
    default = {run.identity for run in read_study(write(tmp_path, SMALL.replace("seed = 3", "seed = 1"))).runs()}
    assert {run.identity for run in runs} & default == default


def test_a_runs_optimiser_is_what_its_settings_say(tmp_path: Path) -> None:
    text = SMALL.replace("warmup = 5", 'warmup = 5\noptimizer = "muon"\nmuon_rate = 5.0\nno_decay = []\nclip = inf')
    run = next(iter(read_study(write(tmp_path, text)).runs()))
    assert program_of(run).optimizer == Muon(clip=math.inf, no_decay=(), muon_rate=5.0)
    plain = next(iter(read_study(write(tmp_path, SMALL)).runs()))
    assert program_of(plain).optimizer == AdamW()
    wsd = SMALL.replace("warmup = 5", 'warmup = 5\nschedule = "wsd"\ndecay_fraction = 0.5')
    program = program_of(next(iter(read_study(write(tmp_path, wsd)).runs())))
    assert (program.schedule, program.decay_fraction) == ("wsd", 0.5)


@pytest.mark.parametrize(
    ("override", "field", "value"),
    [
        ("training.steps=77", ("training", "steps"), 77),
        ("steps=77", ("training", "steps"), 77),
        ("width=32", ("model", "width"), 32),
        ("probe.every=0", ("probe", "every"), 0),
        ("schedule=constant", ("training", "schedule"), "constant"),
        ("name=other", ("name",), "other"),
    ],
)
def test_set_changes_one_value(tmp_path: Path, override: str, field: tuple[str, ...], value: object) -> None:
    thing: object = read_study(write(tmp_path, SMALL), [override])
    for part in field:
        thing = getattr(thing, part)
    assert thing == value


def test_set_changes_axes(tmp_path: Path) -> None:
    study = read_study(write(tmp_path, SMALL), ["seed=5", "axes.recipe=['e8m7']", "learning_rate=0.01"])
    assert (study.axes.seed, study.axes.recipe, study.axes.learning_rate) == ([0, 1, 2, 3, 4], ["e8m7"], [0.01])


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("steps = 30", "stepz = 30", r"study.toml:17: training.stepz: unknown key; did you mean 'steps'\?"),
        ("[training]", "[trainning]", r"study.toml:16: trainning: unknown key; did you mean 'training'\?"),
        ("steps = 30", "steps = 0", r"study.toml:17: training.steps: .*greater than or equal to 1, got 0"),
        ("steps = 30", 'steps = "many"', r"study.toml:17: training.steps: .*integer.*got 'many'"),
        ("warmup = 5", "warmup = 30", r"study.toml:18: training: warmup must be less than steps=30, got 30"),
        (
            "width = 16",
            "width = 15",
            r"study.toml:13: model: width must be a multiple of heads=2, got 15; the nearest is 16",
        ),
        ("[1e-3, 2e-3]", "[1e-3, -2e-3]", r"study.toml:7: axes.learning_rate: .*greater than 0, got -0.002"),
        ("[1e-3, 2e-3]", "[1e-3, nan]", r"study.toml:7: axes.learning_rate: .*got nan"),
        ("[1e-3, 2e-3]", "[1e-3, 1e-3]", r"study.toml:7: axes: learning_rate names a value twice"),
        ("[1e-3, 2e-3]", "[]", r"study.toml:7: axes.learning_rate: .*at least 1 item"),
        (
            '["e8m7", "mine"]',
            '["e8m7", "e9m3"]',
            r"study.toml.*recipe 'e9m3' is neither .*exponent_bits must be 1..8, got 9",
        ),
        ('baseline = "e8m7"', 'baseline = "bf16"', r"baseline 'bf16' is not among axes.recipe: e8m7, mine"),
        (
            "seed = 3",
            "seed = 0",
            r"study.toml:8: axes: seed counts seeds from 0, so it must be from 1 to 100000, got 0",
        ),
        ("seed = 3", "seed = 3\nstepps = [10]", r"axes.stepps is no axis; did you mean 'steps'\?"),
        ("seed = 3", "seed = 3\ndata_seed = 2", r"seed sets init_seed and data_seed both"),
        ("seed = 3", 'dataset = ["rust"]', r"dataset 'rust' is unknown; there are: python"),
        ('weight = "e4m3fn"', "", r"study.toml:20: recipes.mine: .*no format for weight: name one, or a base"),
        ('weight = "e4m3fn"', 'weight = "e4m3fx"', r"recipe 'mine'|e4m3fx"),
        ("warmup = 5", "warmup = 5\nclip = nan", r"study.toml:19: training.clip: .*got nan"),
        ("warmup = 5", 'warmup = 5\nno_decay = ["biases"]', r"training.no_decay.*'gains', 'embeddings' or 'head'"),
        (
            "warmup = 5",
            'warmup = 5\nschedule = "wsd"\ndecay_fraction = 1.0',
            r"decay_fraction must leave .* at most 0.833",
        ),
        (
            "[training]",
            "[execution]\ncheckpoint_seconds = -1\n[training]",
            r'execution.checkpoint_seconds: checkpoint_seconds must be "auto" or at least 0, got -1; 0 is for none',
        ),
        ("[training]", "[execution]\ncheckpoint_seconds = nan\n[training]", r"checkpoint_seconds must be .* got nan"),
        ("[training]", "[execution]\ncheckpoint_seconds = 'never'\n[training]", r"checkpoint_seconds.*'auto'.*'never'"),
        ("seed = 3", "seed = 3\nwidth = [16, 17]", r"width must be a multiple of heads=2, got 17"),
        ("seed = 3", 'seed = 3\nclip = ["none", inf]', r"axes.clip: 'none' and inf mean the same: leave one out"),
        ("seed = 3", "seed = 3\nsteps = [100, 1e2]", r"axes.steps: 100 and 100.0 mean the same"),
        ("seed = 3", "seed = 3\nlayers = [2, 1, 2.0]", r"axes.layers: 2 and 2.0 mean the same"),
        (
            "seed = 3",
            'seed = 3\nno_decay = ["gains+head", "head+gains"]',
            r"axes.no_decay: 'gains\+head' and 'head\+gains'",
        ),
        ("seed = 3", 'seed = 3\ntied = [true, "true"]\nlayers = [1, 2]', r"axes.tied: True and 'true' mean the same"),
        (
            "seed = 3",
            'seed = 3\nmaster = "bf16"\nkahan = [false, "false"]',
            r"axes.kahan: False and 'false' mean the same",
        ),
        ("seed = 3", "seed = 3\nloss_scale = [1, 1.0]", r"axes.loss_scale: 1 and 1.0 mean the same"),
        ("seed = 3", "seed = 3\nnoise = [0, 2]", r"study.toml:9: axes.noise: .*less than or equal to 1, got 2"),
        ("[axes]", "[axes", r"study.toml: not a TOML file"),
    ],
)
def test_a_bad_study_is_refused_with_the_line_and_the_mend(tmp_path: Path, old: str, new: str, message: str) -> None:
    assert SMALL.count(old) >= 1
    with pytest.raises(StudyError, match=message) as refusal:
        read_study(write(tmp_path, SMALL.replace(old, new, 1)))
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("steps", "needs key=value"),
        ("stepps=3", r"no table of a study has this key; did you mean 'steps'\?"),
        ("training.steps=-3", r"--set: training.steps: .*got -3"),
        ("training.stepz=3", r"--set: training.stepz: unknown key; did you mean 'steps'\?"),
        ("name.x=3", "name is no table"),
        ("dataset=rust", r"^--set: axes: dataset 'rust' is unknown"),
        ("width=15", r"^--set: model: width must be a multiple of heads=2, got 15"),
        ("steps=5", r"^--set: training: warmup must be less than steps=5, got 5; take 0, or more steps"),
        ("axes.noise=[0, 2]", r"^--set: axes.noise: .*less than or equal to 1, got 2"),
    ],
)
def test_a_bad_override_is_refused(tmp_path: Path, override: str, message: str) -> None:
    with pytest.raises(StudyError, match=message):
        read_study(write(tmp_path, SMALL), [override])


@pytest.mark.parametrize(
    ("overrides", "options", "message"),
    [
        ([], {"--alarm": 'alarms.thresholds=["gradnorm=3"]'}, r"^--alarm: the study records no signal 'gradnorm'"),
        ([], {"--alarm": 'alarms.thresholds=["grad_norm"]'}, r"^--alarm: 'grad_norm' is no alarm"),
        ([], {"--strategy": 'strategy.kind="guess"'}, r"^--strategy: "),
        (["seed=-1"], {"--strategy": 'strategy.kind="seeds"'}, r"^--set: axes: seed counts seeds"),
        (["alarms.thresholds=['gradnorm=3']"], {}, r"^--set: alarms.thresholds: the study records no signal"),
    ],
)
def test_what_an_option_sets_is_refused_by_the_options_name(
    tmp_path: Path, overrides: list[str], options: dict[str, str], message: str
) -> None:
    with pytest.raises(StudyError, match=message) as refusal:
        read_study(write(tmp_path, SMALL), overrides, options)
    assert options == {} or overrides or "alarms.thresholds" not in str(refusal.value)


def test_a_file_that_is_wrong_already_is_blamed_before_the_override(tmp_path: Path) -> None:
    with pytest.raises(StudyError, match=r"study.toml:13: model: width must be a multiple"):
        read_study(write(tmp_path, SMALL.replace("width = 16", "width = 15")), ["seed=2"])


def test_a_missing_file_is_one_line() -> None:
    with pytest.raises(StudyError, match=r"nowhere\.toml: No such file"):
        read_study("nowhere.toml")
