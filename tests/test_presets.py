"""[model]: what architectures and presets say, what is said over them, and what is refused.

Parameters are counted by formulas that are written here from the papers, not by the model.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from train.plan import shape_of
from train.presets import ARCHITECTURES, PRESETS
from train.settings import ModelSettings
from train.study import Study, StudyError
from train.study_file import read_study

MODELS_PAGE = Path(__file__).parent.parent / "docs" / "models.md"


def gpt2(L: int, D: int, T: int, V: int) -> int:
    """Embeddings of tokens and positions; qkv, proj and 4 D features there and back a block; gains."""
    return V * D + T * D + L * (3 * D**2 + D**2 + 8 * D**2) + (2 * L + 1) * D


def llama(L: int, D: int, V: int, F: int, kv_share: float = 1.0) -> int:
    """Embedding and LM head; queries and proj, keys and values, and three matrices of F features a block; gains."""
    return 2 * V * D + int(L * (2 * D**2 + 2 * kv_share * D**2 + 3 * D * F)) + (2 * L + 1) * D


COUNTS = {
    "gpt2-0.4m": gpt2(2, 128, 128, 256),
    "gpt2-0.8m": gpt2(4, 128, 128, 256),
    "gpt2-3m": gpt2(4, 256, 256, 256),
    "gpt2-11m": gpt2(6, 384, 256, 256),
    "shakespeare-char": gpt2(6, 384, 256, 65),
    "gpt2-34m": gpt2(8, 512, 512, 16384),
    "gpt2-124m": gpt2(12, 768, 1024, 50304),
    "llama-0.5m": llama(2, 128, 256, 352),
    "llama-0.9m": llama(4, 128, 256, 352),
    "llama-3m": llama(4, 256, 256, 704),
    "llama-11m": llama(6, 384, 256, 1024),
    "llama-42m": llama(8, 512, 16384, 1408),
    "llama-120m": llama(12, 768, 32000, 2048, 1 / 12),
}


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_has_the_parameters_that_its_name_says(name: str) -> None:
    size = shape_of(ModelSettings(preset=name)).size
    assert size == COUNTS[name]
    if name.endswith("m"):
        said = float(name.split("-")[1].removesuffix("m"))
        assert size / 1e6 == pytest.approx(said, rel=0.12)


def test_the_page_on_models_lists_every_preset_as_it_is() -> None:
    rows = [
        line.strip("| ").split(" | ") for line in MODELS_PAGE.read_text("utf-8").splitlines() if line.startswith("| `")
    ]
    listed = {row[0].strip("`"): row[1:] for row in rows if row[0].strip("`") in PRESETS}
    assert list(listed) == list(PRESETS)
    for name, (sizes, context, tokenizer, count) in listed.items():
        model = ModelSettings(preset=name)
        assert sizes.split(",")[0] == f"{model.layers} × {model.heads} × {model.width}"
        assert (context, tokenizer.split(",")[0], count) == (f"{model.context:,}", model.tokenizer, f"{COUNTS[name]:,}")


def test_other_peoples_models_have_their_own_numbers() -> None:
    """nanoGPT prints 123.59M for GPT-2 and 10.65M for its characters, positions left out."""
    assert COUNTS["gpt2-124m"] == 124_373_760
    assert COUNTS["gpt2-124m"] - 1024 * 768 == 123_587_328
    assert COUNTS["shakespeare-char"] - 256 * 384 == 10_646_784
    assert COUNTS["llama-120m"] == 121_129_728


def test_an_architecture_says_what_is_not_written_and_explicit_keys_win() -> None:
    assert ModelSettings() == ModelSettings(
        architecture="gpt2", norm="layernorm", mlp="gelu", positions="learned", tied=True
    )
    plain = ModelSettings(architecture="llama")
    assert (plain.norm, plain.mlp, plain.positions, plain.tied) == ("rmsnorm", "swiglu", "rope", False)
    mixed = ModelSettings(architecture="llama", norm="layernorm", tied=True)
    assert (mixed.norm, mixed.mlp, mixed.positions, mixed.tied) == ("layernorm", "swiglu", "rope", True)
    assert plain.label == "llama-4x128"


def test_explicit_keys_win_over_a_preset_and_the_architecture_among_them() -> None:
    chosen = ModelSettings(preset="gpt2-124m", layers=2, architecture="llama")
    assert (chosen.layers, chosen.heads, chosen.width, chosen.context) == (2, 12, 768, 1024)
    assert (chosen.norm, chosen.tied, chosen.vocabulary, chosen.tokenizer) == ("rmsnorm", False, 50304, "gpt2")
    assert chosen.model_fields_set == {"preset", "layers", "architecture"}
    assert chosen.label == "llama-2x768"


def test_the_models_shape_is_what_the_settings_say() -> None:
    said: dict[str, Any] = {
        "layers": 3, "heads": 4, "width": 32, "context": 24, "kv_heads": 2, "hidden": 40, "rope_base": 5e5, "qk_norm": True,
        "z_loss": 1e-4, "logit_softcap": 30.0, "init_std": 0.1, "mup_base_width": 16, "mup_base_heads": 2, "vocabulary": 300,
    }  # fmt: skip
    shape = shape_of(ModelSettings(architecture="llama", **said))
    for key, value in (said | ARCHITECTURES["llama"]).items():
        assert getattr(shape, key) == value, key
    assert shape_of(ModelSettings()).vocabulary == 256


AXES: dict[str, Any] = {"recipe": ["e8m7"], "learning_rate": [1e-3]}


def identities(**tables: Any) -> list[str]:
    return [run.identity for run in Study.model_validate({"axes": AXES, **tables}).runs()]


def test_a_preset_counts_by_what_it_came_to() -> None:
    written = {"layers": 2, "heads": 4, "width": 128, "context": 128}
    assert identities(model={"preset": "gpt2-0.4m"}) == identities(model=written)
    assert identities(model={"preset": "llama-0.5m"}) == identities(model=written | {"architecture": "llama"})
    assert identities(model=ARCHITECTURES["gpt2"]) == identities()
    assert identities(model={"architecture": "llama"}) != identities()


@pytest.mark.parametrize(
    ("axes", "table"),
    [
        ({"preset": ["gpt2-0.4m", "llama-0.5m"]}, {"context": 64}),
        ({"architecture": ["gpt2", "llama"]}, {"preset": "llama-0.9m", "qk_norm": True}),
        ({"architecture": ["gpt2", "llama"]}, {"layers": 1, "tied": False}),
        ({"mlp": ["gelu", "swiglu"]}, {"architecture": "llama"}),
        ({"z_loss": [0.0, 1e-4]}, {"preset": "gpt2-3m", "kv_heads": 2}),
    ],
)
def test_axes_say_more_than_the_table_and_a_resolved_file_says_the_same(
    tmp_path: Path, axes: dict[str, Any], table: dict[str, Any]
) -> None:
    study = Study.model_validate({"axes": AXES | axes, "model": table})
    (key, values), runs = next(iter(axes.items())), list(study.runs())
    assert [getattr(run.model, key) for run in runs] == values
    for run in runs:
        assert run.model == ModelSettings(**table | {key: getattr(run.model, key)})
    path = tmp_path / "study.toml"
    path.write_text(study.to_toml())
    again = read_study(path)
    assert again.hash == study.hash
    assert [run.identity for run in again.runs()] == [run.identity for run in runs]


def test_a_resolved_study_can_be_given_another_architecture(tmp_path: Path) -> None:
    """What the first one said is not written out, where it would win."""
    path = tmp_path / "study.toml"
    path.write_text(Study.model_validate({"axes": AXES}).to_toml())
    run = next(iter(read_study(path, ["architecture=llama"]).runs()))
    assert run.model == ModelSettings(architecture="llama")


@pytest.mark.parametrize(
    ("table", "message"),
    [
        ("heads = 6\nwidth = 96\nkv_heads = 4", "kv_heads must divide heads=6, got 4; take one of 1, 2, 3, 6"),
        (
            'architecture = "llama"\nheads = 4\nwidth = 60',
            "rope turns pairs of features, so width / heads must be even, got 60 / 4 = 15; take a width of 64",
        ),
        ("vocabulary = 255", "vocabulary must be at least the 256 of tokenizer 'bytes', got 255; leave it out"),
        (
            'preset = "gpt2-124m"\nvocabulary = 50256',
            "vocabulary must be at least the 50257 of tokenizer 'gpt2', got 50256",
        ),
        ('preset = "gpt2-124"', r"model.preset: preset must be one of .*, got 'gpt2-124'; did you mean 'gpt2-124m'\?"),
        ('architecture = "gemma"', "model.architecture: Input should be 'gpt2' or 'llama', got 'gemma'"),
        ("mup_base_heads = 4", "mup_base_heads=4 needs mup_base_width"),
        ("mup_base_width = 34\nmup_base_heads = 4", "mup_base_width must be a multiple of mup_base_heads=4, got 34"),
        ("logit_softcap = -1", "model.logit_softcap: .*greater than 0, got -1"),
        ("z_loss = -1e-4", "model.z_loss: .*greater than or equal to 0, got -0.0001"),
        ("init_std = 0.0", "model.init_std: .*greater than 0, got 0.0"),
        ("qk_nrom = true", r"model.qk_nrom: unknown key; did you mean 'qk_norm'\?"),
    ],
)
def test_what_does_not_fit_is_refused_in_one_line(tmp_path: Path, table: str, message: str) -> None:
    path = tmp_path / "study.toml"
    path.write_text(f'[axes]\nrecipe = ["e8m7"]\nlearning_rate = [1e-3]\n\n[model]\n{table}\n')
    with pytest.raises(StudyError, match=message) as refusal:
        read_study(path)
    assert "\n" not in str(refusal.value)


def test_z_loss_and_a_cap_go_together() -> None:
    assert shape_of(ModelSettings(z_loss=1e-4, logit_softcap=30.0)).readout == (1.0, 30.0, 1e-4)
