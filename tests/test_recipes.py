"""What a recipe's words mean: named recipes and their sources, tables and bases, places, axes, and what is refused."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner

from exmy.cli import main
from formats import FloatFormat
from train.loss_scale import DynamicLossScale
from train.named_recipes import BF16, NAMED, PREFIXES, named_table
from train.numerics import power_of_two_above
from train.operands import Delayed, OperandRule
from train.plan import plan
from train.recipe import LinearPrecision, Recipe
from train.recipe_table import AXES as RECIPE_AXES
from train.recipe_table import ProductTable, RecipeTable
from train.resolve import resolve_recipe
from train.state import StateFormats
from train.study import StudyError
from train.study_file import read_study

NAMES = [*NAMED, *(prefix + "e4m3" for prefix in PREFIXES)]
SIX = ("forward.activation", "forward.weight", "dgrad.gradient", "dgrad.weight", "wgrad.activation", "wgrad.gradient")


def six(linear: LinearPrecision) -> list[str]:
    """The formats of the six operands, in the order of `SIX`."""
    rules = linear.structure.rules
    assert rules is not None
    return [rule.format or getattr(linear, role).name for _, role, rule in rules.items()]


@pytest.mark.parametrize("name", NAMES)
def test_a_named_recipe_says_what_it_follows_and_means_something(name: str) -> None:
    recipe = resolve_recipe(name)
    assert recipe.name == name
    assert recipe.body.label.removeprefix("native-").upper() in recipe.description.upper()
    if name in NAMED:
        assert len(NAMED[name].follows) > 40, "a sentence with its source"


def test_every_recipe_names_a_source_or_the_recipe_that_it_varies() -> None:
    source = re.compile(r"\b2[0-9]{3}\.[0-9]{5}\b|Transformer Engine|torchao|torch\.|autocast|OCP MX v1\.0")
    for name, named in NAMED.items():
        varies = re.match(r"as ([a-z0-9-]+),", named.follows)
        assert source.search(named.follows) or (varies and varies[1] in NAMED and varies[1] != name), name


def test_a_description_says_each_operand_once_and_apart_where_its_products_differ() -> None:
    text = resolve_recipe("nvfp4").description
    assert "activation forward nvfp4:nearest_even, wgrad nvfp4:nearest_even:hadamard16fixed; " in text
    assert (
        "weight e2m1fn@tile16x16:e4m3fn:nearest_even; gradient dgrad nvfp4:stochastic, wgrad nvfp4:stochastic:" in text
    )
    assert "activation e5m2:stochastic; weight e5m2:stochastic" in resolve_recipe("stochastic-e5m2").description


def test_hybrid_fp8_takes_e5m2_for_gradients_alone_and_keeps_the_head() -> None:
    recipe = resolve_recipe("fp8-hybrid")
    e4m3, e5m2 = "e4m3fn@tensor", "e5m2@tensor"
    assert six(recipe.body) == [e4m3, e4m3, e5m2, e4m3, e4m3, e5m2]
    assert recipe.lm_head.structure.native == "bf16"


def test_delayed_scales_are_of_every_operand_that_is_scaled_by_the_tensor() -> None:
    rules = resolve_recipe("fp8-hybrid-delayed").body.structure.rules
    assert rules is not None
    assert {rule.delayed for _, _, rule in rules.items()} == {Delayed(1024)}


def test_delayed_powers_of_two_are_of_the_roles_that_are_named() -> None:
    table = RecipeTable(base="ms-amp-o1", delayed=16, delayed_roles=("activation", "gradient"))
    rules = resolve_recipe("mine", {"mine": table}).body.structure.rules
    assert rules is not None
    marks = {role: (rule.format, rule.delayed) for _, role, rule in rules.items()}
    assert marks == {
        "activation": ("e4m3fn@tensor", Delayed(16, power_of_two=True)),
        "weight": ("e4m3fn@tensor:e8m0fnu:rceil", None),
        "gradient": ("e5m2@tensor", Delayed(16, power_of_two=True)),
    }
    scales = torch.tensor([1.0, 1.0000001, 0.75, 2.0**-20, 1.5 * 2.0**-20])
    assert power_of_two_above(scales).tolist() == [1.0, 2.0, 1.0, 2.0**-20, 2.0**-19]


def test_nvfp4_rounds_gradients_alone_by_chance_and_rotates_for_wgrad_alone() -> None:
    recipe = resolve_recipe("nvfp4")
    rules = recipe.body.structure.rules
    assert rules is not None
    marks = {f"{product}.{role}": (rule.rounding.value, rule.hadamard) for product, role, rule in rules.items()}
    assert marks == {
        "forward.activation": ("nearest_even", 0), "forward.weight": ("nearest_even", 0),
        "dgrad.gradient": ("stochastic", 0), "dgrad.weight": ("nearest_even", 0),
        "wgrad.activation": ("nearest_even", 16), "wgrad.gradient": ("stochastic", 16),
    }  # fmt: skip
    kept = [recipe.block(i, 4).mlp.structure.native for i in range(4)]
    assert kept == [None, None, None, "bf16"]


def test_mxfp4_takes_bf16_forward_and_rotated_mxfp4_by_chance_backward() -> None:
    linear = resolve_recipe("mxfp4").body
    mx = "e2m1fn@block32:e8m0fnu:rceil"
    assert six(linear) == ["bf16", "bf16", mx, mx, mx, mx]
    rules = linear.structure.rules
    assert rules is not None
    assert [rule.rounding.value for rule in rules.dgrad] == ["stochastic"] * 2
    assert [rule.signs for rule in rules.wgrad] == ["step"] * 2


def test_masked_formats_share_a_program_whatever_their_bits() -> None:
    names = ["masked-e8m7", "masked-e8m1", "masked-e3m7", "masked-e5m2"]
    assert len({resolve_recipe(name).structure for name in names}) == 1
    assert len({resolve_recipe(f"stochastic-{f}").structure for f in ("e8m3", "e5m2", "e8m1")}) == 1
    assert resolve_recipe("masked-e8m3").body.structure.rounding == "toward_zero"


def test_a_table_starts_from_its_base_and_changes_what_it_says() -> None:
    tables = {
        "mine": RecipeTable(base="nvfp4", hadamard_size=32, last_blocks=0),
        "more": RecipeTable(base="mine", wgrad=ProductTable(activation="bf16", gradient="bf16"), hadamard=()),
    }
    mine, more = (resolve_recipe(name, tables) for name in ("mine", "more"))
    assert mine.body.structure.rules is not None
    assert {rule.hadamard for rule in mine.body.structure.rules.wgrad} == {32}
    assert mine.kept is None
    assert six(more.body)[4:] == ["bf16", "bf16"]
    assert six(more.body)[:4] == six(mine.body)[:4]


def test_places_have_recipes_of_their_own() -> None:
    tables = {
        "mine": RecipeTable(
            "e4m3", "e4m3", "e4m3", attention="e5m4", mlp="mxfp8", lm_head="body", first_blocks=1, kept="e8m7"
        )
    }
    recipe = resolve_recipe("mine", tables)
    first, second = (recipe.block(i, 2) for i in range(2))
    assert (first.attention.label, first.mlp.label) == ("e8m7", "e8m7")
    assert (second.attention.label, second.mlp.label) == ("e5m4", "mxfp8_e4m3fn:rceil")
    assert recipe.lm_head.label == "e4m3"


def test_formats_that_runs_have_of_their_own_are_no_part_of_the_program() -> None:
    one, other = (
        resolve_recipe("mine", {"mine": RecipeTable(f, "int8@row", f, rounding="stochastic")}) for f in ("e5m2", "e4m3")
    )
    assert one.structure == other.structure
    assert one.body.activation is not None
    assert one.body.weight is None
    assert one.arithmetic != other.arithmetic


def test_all_products_takes_activations_rules_for_both_operands_of_attention() -> None:
    recipe = resolve_recipe("mine", {"mine": RecipeTable(base="fp8-hybrid", products="all")})
    assert recipe.products is not None
    assert six(recipe.products) == ["e4m3fn@tensor"] * 2 + [
        "e5m2@tensor",
        "e4m3fn@tensor",
        "e4m3fn@tensor",
        "e5m2@tensor",
    ]
    assert recipe.attention_form == "math"
    plain = resolve_recipe("mine", {"mine": RecipeTable("e4m3", "e5m3", "e5m2", products="all")})
    assert plain.products is not None
    assert isinstance(plain.products.weight, FloatFormat)
    assert plain.products.weight.name == "e4m3"
    rules = plain.products.structure.rules
    assert rules is not None
    assert {rule for _, _, rule in rules.items()} == {OperandRule(None)}


@pytest.mark.parametrize("role", ["activation", "weight", "gradient"])
@pytest.mark.parametrize("rounding", ["stochastic", "toward_zero"])
def test_a_roles_rounding_acts_on_bf16_as_on_e8m7_which_is_the_same(role: str, rounding: str) -> None:
    changes = {f"{role}_rounding": rounding}
    bf16, e8m7 = (resolve_recipe(name, None, changes).body.structure for name in ("bf16", "e8m7"))
    assert bf16 == e8m7
    assert bf16.rules is not None
    by_role = {of: {rule.rounding.value for rule in rules} for of, rules in bf16.rules.by_role().items()}
    assert by_role == {of: {rounding if of == role else "nearest_even"} for of in by_role}


def test_a_product_that_takes_bf16_for_a_narrower_format_rounds_it_to_nearest_even() -> None:
    """What a role's rounding is a remedy for; a product's own rounding says otherwise."""
    for given, expected in ((None, "nearest_even"), ("stochastic", "stochastic")):
        table = RecipeTable(base="nvfp4", wgrad=ProductTable(activation="bf16", gradient="bf16", rounding=given))
        rules = resolve_recipe("mine", {"mine": table}).body.structure.rules
        assert rules is not None
        assert [rule.rounding.value for rule in rules.wgrad] == [expected] * 2
        assert rules.dgrad.first.rounding == "stochastic"


@pytest.mark.parametrize(
    ("table", "form"),
    [
        (RecipeTable(base="native-bf16", softmax="e4m3"), "math"),
        (RecipeTable(base="e4m3", products="all"), "math"),
        (RecipeTable(base="e4m3", products="all", softmax="e4m3", attention_form="math"), "math"),
        (RecipeTable(base="native-bf16", softmax="none", attention_form="fused"), "fused"),
        (RecipeTable(base="native-bf16", gelu="e4m3"), "fused"),
    ],
)
def test_attention_is_written_out_where_something_inside_it_is_rounded(table: RecipeTable, form: str) -> None:
    assert resolve_recipe("mine", {"mine": table}).attention_form == form


def test_what_attention_rounds_in_fp64_has_the_identity_that_it_had() -> None:
    """FP64 has no fused kernel, so softmax acted there from the first."""
    recipe = resolve_recipe("mine", {"mine": RecipeTable(base="native-fp64", softmax="e4m3")})
    assert recipe.arithmetic == ["native-fp64:nearest_even:fp64"] * 2 + ["softmax=e4m3"]


# Words that do nothing.

SIMULATED = "does nothing beside native-bf16, the hardware's own products: name formats for the operands"
HADAMARD = "does nothing without hadamard: name the products whose operands are rotated"
KEEPS = "does nothing to what the optimiser keeps, which is FP32 here: name a format for master, first_moment"
IDLE: list[tuple[str, dict[str, Any], str]] = [
    ("native-bf16", {"rounding": "stochastic"}, f"rounding = 'stochastic' {SIMULATED}"),
    ("native-bf16", {"weight_rounding": "toward_zero"}, SIMULATED),
    ("native-bf16", {"hadamard": ("wgrad",)}, f"hadamard = ['wgrad'] {SIMULATED}"),
    ("native-bf16", {"hadamard": ("wgrad",), "hadamard_size": 64}, SIMULATED),
    ("native-bf16", {"delayed": 16}, SIMULATED),
    ("native-bf16", {"multiply": "fp8"}, SIMULATED),
    ("native-bf16", {"products": "all"}, SIMULATED),
    ("native-bf16", {"overflow": "nonsaturating"}, SIMULATED),
    ("native-bf16", {"dgrad": ProductTable(rounding="stochastic")}, f"dgrad.rounding = 'stochastic' {SIMULATED}"),
    ("native-fp16", {"output": "fp32"}, "output = 'fp32' does nothing beside native-fp16, the hardware's own products"),
    ("native-fp64", {"output": "bf16"}, "output = 'bf16' does nothing beside native-fp64"),
    ("e4m3", {"products": "all", "attention": "native-bf16"}, "does nothing where attention's linears are native"),
    ("e4m3", {"kept": "native-fp32"}, "kept = 'native-fp32' does nothing without first_blocks or last_blocks: say how many"),
    ("nvfp4-all", {"kept": "e8m7"}, "does nothing without first_blocks or last_blocks"),
    ("e4m3", {"hadamard_size": 64}, f"hadamard_size = 64 {HADAMARD}"),
    ("e4m3", {"hadamard_signs": "step"}, HADAMARD),
    ("fp8-hybrid", {"delayed_margin": 3}, "delayed_margin = 3 does nothing without delayed: say of how many steps"),
    ("fp8-hybrid", {"delayed_rule": "most_recent"}, "does nothing without delayed"),
    ("fp8-hybrid", {"delayed_roles": ("weight",)}, "delayed_roles = ['weight'] does nothing without delayed"),
    ("fp8-hybrid", {"delayed_roles": (), "delayed": 16}, "delayed_roles = [] names no operand: name some, or leave it out"),
    ("e4m3", {"state_rounding": "stochastic"}, f"{KEEPS} or second_moment"),
    ("e4m3", {"state_rounding": "stochastic", "weight_gradient": "e5m2"}, f"{KEEPS} or second_moment"),
    ("e4m3", {"state_of": "linears", "master": "fp32"}, f"{KEEPS}, second_moment or weight_gradient"),
    ("mxfp4", {"gradient_rounding": "toward_zero"}, "where every product that takes them has a rounding of its own, or BF16"),
    (
        "e4m3",
        {"rounding": "stochastic", **{f"{role}_rounding": "toward_zero" for role in ("activation", "weight", "gradient")}},
        "does nothing where all operands have roundings of their own: leave it out",
    ),
]  # fmt: skip


@pytest.mark.parametrize(("base", "words", "message"), IDLE)
def test_a_word_that_does_nothing_is_refused_with_what_it_needs(base: str, words: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)) as refusal:
        resolve_recipe("mine", {"mine": RecipeTable(base=base, **words)})
    assert str(refusal.value).startswith("recipe 'mine': ")
    assert "\n" not in str(refusal.value)


OTHERS: dict[str, list[Any]] = {
    "rounding": ["stochastic", "toward_zero"], "activation_rounding": ["stochastic"], "weight_rounding": ["stochastic"],
    "gradient_rounding": ["toward_zero"], "overflow": ["nonsaturating"], "output": ["bf16", "fp16", "fp32"],
    "accumulate": ["hopper-fp8"], "multiply": ["fp8"], "delayed": [7], "delayed_margin": [-2], "delayed_rule": ["most_recent"],
    "delayed_roles": [("activation",), ("weight", "gradient")], "hadamard": [("forward",), ("dgrad", "wgrad")],
    "hadamard_size": [128], "hadamard_signs": ["step"], "lm_head": ["e3m2"], "attention": ["e3m2"], "mlp": ["e3m2"],
    "first_blocks": [3], "last_blocks": [3], "kept": ["e3m2"], "products": ["all"], "attention_form": ["math"], "gains": ["e3m2"],
    "residual": ["e3m2"], "softmax": ["e3m2"], "gelu": ["e3m2"], "embedding": ["e3m2"], "loss_scale": [3.0, "dynamic"],
    "master": ["e6m9"], "first_moment": ["e6m9"], "second_moment": ["e6m9"], "weight_gradient": ["e6m9"],
    "state_rounding": ["toward_zero", "stochastic"], "state_of": ["linears"], "kahan": [True], "before": ["e3m2"], "until": [5],
    "forward": [ProductTable(rounding="toward_zero")], "dgrad": [ProductTable(rounding="toward_zero")],
    "wgrad": [ProductTable(rounding="toward_zero")],
}  # fmt: skip


@pytest.mark.parametrize("base", [*NAMED, "bf16", "e4m3", "e4m3fn@tensor", "native-fp16", "native-tf32", "native-fp64"])
def test_each_word_of_a_table_acts_or_is_refused(base: str) -> None:
    """Whatever a table says that its base does not is in the identity of its runs."""
    plain, has, name = resolve_recipe(base), dict[str, Any](), base
    while found := named_table(name):
        has, name = found.given() | has, found.base or ""
    for word, values in OTHERS.items():
        for value in values:
            try:
                recipe = resolve_recipe("mine", {"mine": RecipeTable(base=base, **{word: value})})
            except ValueError:
                continue
            if recipe.arithmetic == plain.arithmetic:  # it says what is so already
                assert has.get(word) == value or (word, value) == ("output", plain.body.structure.output), (word, value)


def test_words_that_a_base_brings_along_or_that_ask_for_nothing_are_not_refused() -> None:
    tables = {
        "idle": RecipeTable(base="native-bf16", hadamard=("wgrad",), hadamard_size=64),
        "native": RecipeTable(BF16, BF16, BF16, base="nvfp4", products="linears", overflow="saturate", hadamard=(), delayed=0),
        "whole": RecipeTable(base="ms-amp-o1", master="none", weight_gradient="none", state_of="all"),
        "heir": RecipeTable(base="idle"),
        "now": RecipeTable(base="fp8-hybrid-delayed", delayed=0),
        "plain": RecipeTable(base="nvfp4", hadamard=(), last_blocks=0),
    }  # fmt: skip
    meant = {name: resolve_recipe(name, tables).arithmetic for name in tables if name != "idle"}
    assert meant["heir"] == resolve_recipe("native-bf16").arithmetic
    assert meant["now"] == resolve_recipe("fp8-hybrid").arithmetic
    with pytest.raises(ValueError, match="hadamard = \\['wgrad'\\] does nothing"):
        resolve_recipe("idle", tables)


@pytest.mark.parametrize(
    ("words", "axes"),
    [
        ({"kept": "e8m7"}, {"first_blocks": 0}),
        ({"kept": "e8m7"}, {"last_blocks": 2}),
        ({"delayed_margin": 1, "delayed_roles": ("weight",)}, {"delayed": 0}),
        ({"state_rounding": "stochastic", "state_of": "linears"}, {"master": "none"}),
        ({"state_of": "linears"}, {"weight_gradient": "none"}),
        ({"rounding": "stochastic"}, {"rounding": "stochastic"}),
    ],
)
def test_what_a_word_needs_may_come_from_an_axis(words: dict[str, Any], axes: dict[str, Any]) -> None:
    assert resolve_recipe("mine", {"mine": RecipeTable(base="fp8-hybrid", **words)}, axes).name == "mine"


@pytest.mark.parametrize(
    ("base", "axes"),
    [
        (
            "native-bf16",
            {"products": "all", "gradient_rounding": "stochastic", "overflow": "nonsaturating", "delayed": 16},
        ),
        ("e4m3", {"kept": "e5m2", "hadamard_size": 64, "delayed_margin": 3, "delayed_rule": "most_recent"}),
        ("e4m3", {"state_rounding": "stochastic", "state_of": "linears"}),
        ("native-fp16", {"output": "fp32"}),
    ],
)
def test_an_axis_of_no_concern_to_a_recipe_changes_nothing_and_is_not_told(base: str, axes: dict[str, Any]) -> None:
    plain, other = resolve_recipe(base), resolve_recipe(base, None, axes)
    assert (other.description, other.arithmetic) == (plain.description, plain.arithmetic)
    assert other.state == plain.state


def test_masked_and_stochastic_are_of_formats() -> None:
    with pytest.raises(ValueError, match="rounding = 'toward_zero' does nothing beside native-fp32"):
        resolve_recipe("masked-native-fp32")


# As axes of a study.

AXES = """
[axes]
recipe = ["fp8-hybrid", "native-bf16", "mine"]
learning_rate = [1e-3]
{axes}
[training]
steps = 30
warmup = 5
[recipes.mine]
base = "mxfp8"
gains = "mxfp8_e4m3fn"
wgrad = {{ activation = "bf16", gradient = "bf16" }}
"""


def read(tmp_path: Path, axes: str) -> list[Recipe]:
    path = tmp_path / "study.toml"
    path.write_text(AXES.format(axes=axes))
    study = read_study(path)
    again = tmp_path / "again.toml"
    again.write_text(study.to_toml())
    assert [run.identity for run in read_study(again).runs()] == [run.identity for run in study.runs()]
    assert len({run.identity for run in study.runs()}) == len(list(study.runs()))
    return [run.recipe for run in study.runs()]


def test_words_of_recipes_are_axes_of_a_study(tmp_path: Path) -> None:
    recipes = read(
        tmp_path, 'lm_head = ["body", "native-bf16"]\nfirst_blocks = [0, 1]\nloss_scale = [1, 1024, "dynamic"]'
    )
    assert len(recipes) == 3 * 2 * 2 * 3
    mine = [r for r in recipes if r.name == "mine"]
    assert {r.lm_head.label for r in mine} == {mine[0].body.label, "native-bf16"}
    assert {(r.first_blocks, r.kept is None) for r in mine} == {(0, True), (1, False)}
    assert {r.loss_scale for r in mine} == {1.0, 1024.0, None}


def test_a_word_on_an_axis_is_what_a_table_reads_it_as(tmp_path: Path) -> None:
    (off,) = {r.state.kahan for r in read(tmp_path, 'kahan = ["false"]\nmaster = ["bf16"]')}
    assert off is False
    assert {r.loss_scale for r in read(tmp_path, 'loss_scale = ["64"]')} == {64.0}
    assert {r.first_blocks for r in read(tmp_path, 'first_blocks = ["1"]')} == {1}


def test_a_plan_has_what_recipes_say_beyond_their_products(tmp_path: Path) -> None:
    path = tmp_path / "study.toml"
    axes = 'loss_scale = [1, 1024, "dynamic"]\nbefore = ["native-bf16"]\nuntil = [7]\nmaster = ["bf16"]\nkahan = [true]'
    path.write_text(AXES.format(axes=axes))
    packs = plan(read_study(path), torch.device("cpu"))
    seen = {
        (p.program.scales_loss, p.program.dynamic_loss_scale, tuple({s.loss_scale for s in p.slots})) for p in packs
    }
    assert seen == {(False, None, (1.0,)), (True, None, (1024.0,)), (False, DynamicLossScale(), (1.0,))}
    for pack in packs:
        assert pack.program.until == 7
        assert pack.program.before == resolve_recipe("native-bf16").structure
        assert pack.program.state == StateFormats("bf16", kahan=True)
        assert "master in bf16, Kahan's compensation" in pack.runs[0].recipe.description


@pytest.mark.parametrize(
    ("axes", "message"),
    [
        ("first_blocks = [3]\nlast_blocks = [2]", "keep 5 blocks, and the model has 4: keep fewer"),
        ('before = ["native-bf16"]\nuntil = [30]', "until must be less than steps=30, got 30"),
    ],
)
def test_a_plan_refuses_what_could_never_be(tmp_path: Path, axes: str, message: str) -> None:
    path = tmp_path / "study.toml"
    path.write_text(AXES.format(axes=axes))
    with pytest.raises(StudyError, match=message):
        plan(read_study(path), torch.device("cpu"))


def test_a_schedule_of_precision_goes_both_ways(tmp_path: Path) -> None:
    recipes = read(tmp_path, 'before = ["native-bf16"]\nuntil = [10, 20]')
    assert {(r.name, r.until, r.before.name if r.before else "") for r in recipes if r.name == "mine"} == {
        ("mine", 10, "native-bf16"), ("mine", 20, "native-bf16"),
    }  # fmt: skip
    back = resolve_recipe("mine", {"mine": RecipeTable(base="native-bf16", before="fp8-hybrid", until=5)})
    assert back.before is not None
    assert back.before.body.label.startswith("e4m3fn@tensor")
    assert "the first 5 steps in e4m3fn@tensor" in back.description


@pytest.mark.parametrize(
    ("table", "state", "scale"),
    [
        (RecipeTable(base="ms-amp-o2", before="ms-amp-o2", until=5), resolve_recipe("ms-amp-o2").state, 1.0),
        (RecipeTable(base="ms-amp-o2", before="native-bf16", until=5), resolve_recipe("ms-amp-o2").state, 1.0),
        (RecipeTable(base="e4m3", before="native-fp16-scaled", until=5, loss_scale="dynamic"), StateFormats(), None),
        (RecipeTable(base="native-fp16-scaled", before="native-bf16", until=5), StateFormats(), None),
    ],
)
def test_loss_scale_and_state_are_of_a_whole_run(table: RecipeTable, state: StateFormats, scale: float | None) -> None:
    recipe = resolve_recipe("mine", {"mine": table})
    assert recipe.before is not None
    assert (recipe.state, recipe.loss_scale, recipe.before.loss_scale) == (state, scale, scale)


@pytest.mark.parametrize(
    ("table", "message"),
    [
        (RecipeTable("e4m3", "e4m3"), "says no format for gradient"),
        (RecipeTable(base="mine"), "rests on itself, by way of mine -> mine"),
        (
            RecipeTable("e4m3", "e4m3", "e4m3", forward=ProductTable(gradient="e5m2")),
            "forward takes activation and weight, not",
        ),
        (RecipeTable("e8m0fnu", "e4m3", "e4m3"), "e8m0fnu has no sign"),
        (RecipeTable("e4m3", "e4m3fn@tile128x64", "e4m3"), "tiles serve two products, and must be square"),
        (RecipeTable(base="mxfp8", accumulate="hopper-fp8"), "MX and NVFP4 sum in FP32 here"),
        (RecipeTable(base="mxfp8", multiply="fp8"), "multiply = 'fp8' takes e4m3fn and e5m2"),
        (RecipeTable("e5m2", "e5m2", "e5m2", multiply="fp8"), "no product of e5m2 with e5m2"),
        (RecipeTable(base="fp8-hybrid-delayed", products="all"), "products must be 'linears'"),
        (RecipeTable(base="mxfp8", delayed=16), "delayed = 16 and no operand has a tensor's scale"),
        (RecipeTable("e4m3fn@tensor:e8m0fnu", "e4m3", "e4m3", delayed=16), "so the rule must be rceil, got floor"),
        (RecipeTable("nf4", "nf4", "nf4", overflow="nonsaturating"), "nf4"),
        (RecipeTable(base="deepseek-hopper", products="all"), "products must be 'linears' beside accumulate"),
        (RecipeTable("e4m3", "e4m3", "e4m3", before="e8m7"), "has before and no until"),
        (RecipeTable("e4m3", "e4m3", "e4m3", until=5), "has until and no before"),
        (RecipeTable(base="native-fp64", before="e8m7", until=5), "FP64 is for a whole run"),
        (
            RecipeTable(base="native-bf16", before="native-fp16-scaled", until=5),
            "sets loss_scale, and loss scale and state are of a whole run: say them in 'mine' itself, alike",
        ),
        (
            RecipeTable(base="native-bf16", before="native-fp16-scaled", until=5, loss_scale=1024.0),
            "'native-fp16-scaled', which comes before it, sets loss_scale",
        ),
        (RecipeTable(base="native-bf16", before="ms-amp-o2", until=5), "sets the optimiser's formats, and loss scale"),
        (RecipeTable(base="ms-amp-o1", before="ms-amp-o2", until=5), "say them in 'mine' itself, alike"),
        (RecipeTable(base="native-bf16", output="fp16"), "native-bf16 leaves its products in BF16"),
        (RecipeTable("e4m3", "e4m3", "e4m3", kahan=True), "name a format for master"),
        (RecipeTable(base="native-tf32", mlp="e8m12"), "switch is one for both"),
        (
            RecipeTable(base="native-bf16", softmax="e4m3", attention_form="fused"),
            "softmax = 'e4m3' rounds inside attention, which one fused kernel can't: take attention_form = 'math'",
        ),
        (RecipeTable(base="e4m3", products="all", attention_form="fused"), "products = 'all' rounds inside attention"),
    ],
)
def test_what_cannot_be_is_refused_in_a_line(table: RecipeTable, message: str) -> None:
    with pytest.raises(ValueError, match=message) as refusal:
        resolve_recipe("mine", {"mine": table})
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ('gains = "mxfp8_e4m3fn"', 'gains = "mxfp9"', "recipes.mine.gains: .*mxfp9"),
        ('gains = "mxfp8_e4m3fn"', 'gain = "bf16"', r"recipes.mine.gain: unknown key; did you mean 'gains'\?"),
        ('activation = "bf16", ', 'activations = "bf16", ', r"wgrad.activations: unknown key; did you mean 'activation'\?"),
        ('base = "mxfp8"', 'base = "mxfp"', "recipes.mine: .*mxfp"),
        ('base = "mxfp8"', 'base = "mxfp8"\nrounding = "up"', "recipes.mine.rounding: .*nearest_even.*got 'up'"),
        ('base = "mxfp8"', 'base = "mxfp8"\ndelayed = -1', "recipes.mine.delayed: .*greater than or equal to 0, got -1"),
        ('base = "mxfp8"', 'base = "mxfp8"\nhadamard = ["forwards"]', "recipes.mine.hadamard.*forward"),
        ("{axes}", 'first_block = [1]', r"axes.first_block is no axis; did you mean 'first_blocks'\?"),
        ("{axes}", 'products = ["some"]', "products"),
    ],
)  # fmt: skip
def test_a_bad_table_is_refused_with_its_place_and_the_mend(tmp_path: Path, old: str, new: str, message: str) -> None:
    path = tmp_path / "study.toml"
    assert old in AXES
    path.write_text(AXES.replace(old, new).replace("{axes}", "").replace("{{", "{").replace("}}", "}"))
    with pytest.raises(StudyError, match=message) as refusal:
        read_study(path)
    assert "\n" not in str(refusal.value)


# The page and the command.

PAGE = Path(__file__).parent.parent / "docs" / "recipes.md"


def test_the_page_lists_every_named_recipe_as_it_is() -> None:
    page = PAGE.read_text(encoding="utf-8")
    for name, named in NAMED.items():
        assert f"| `{name}` | {named.follows} | {named.departs} |" in page
    listed = re.findall(r"^\| `([a-z0-9-]+)` \| .* \| .* \|$", page.split("## What is computed")[0], re.MULTILINE)
    assert listed == list(NAMED)


def test_the_pages_words_are_the_tables(tmp_path: Path) -> None:
    page = PAGE.read_text(encoding="utf-8")
    words = page.split("## The words of a table")[1].split("Axes may be")[0]
    named = {
        word
        for line in words.splitlines()
        for word in re.findall(r"`(\w+)`", line.split("|")[1] if "|" in line else "")
    }
    assert named == {f.name for f in dataclasses.fields(RecipeTable)}
    axes = named - {
        "base",
        "activation",
        "weight",
        "gradient",
        "forward",
        "dgrad",
        "wgrad",
        "attention",
        "mlp",
        "multiply",
    }
    assert set(RECIPE_AXES) == axes - {
        "hadamard",
        "hadamard_signs",
        "activation_rounding",
        "weight_rounding",
        "delayed_roles",
    }
    (study,) = re.findall(r"```toml\n(.*?)```", page, re.DOTALL)
    path = tmp_path / "mine.toml"
    path.write_text(study)
    assert len(list(read_study(path).runs())) == 4 * 2 * 8 * 2 * 3


@pytest.mark.parametrize("name", NAMES)
def test_the_command_shows_each_operand(name: str) -> None:
    shown = CliRunner().invoke(main, ["recipes", "show", name])
    assert shown.exit_code == 0, shown.output
    recipe = resolve_recipe(name)
    rules = recipe.body.structure.rules
    rows = shown.output.count("│ blocks' linears")
    assert rows == (6 if rules else 1 if recipe.body.structure.native else 3)
    for _, role, rule in rules.items() if rules else ():
        assert (rule.format or getattr(recipe.body, role).name) in shown.output


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("mxfp", "; near it: mxfp8, mxfp6, mxfp4)"), ("fp8-hybrd", "; near it: fp8-hybrid, "), ("e9m3", "; near it: e8m3, "),
        ("xyz", "; near it: mxfp4, "), ("fp8", "; near it: e5m2, e4m3fn, "), ("native-bf17", "; there are native-bf16, "),
        ("e4m3fn@rwo", "; for example e4m3fn@block128)"),
    ],
)  # fmt: skip
def test_an_unknown_name_has_one_hint(name: str, hint: str) -> None:
    with pytest.raises(ValueError, match="is neither a \\[recipes\\] table") as refused:
        resolve_recipe(name)
    said = str(refused.value)
    assert hint in said
    assert sum(said.count(words) for words in ("near it", "nearest", "there are", "for example")) == 1


def test_the_command_lists_them_and_refuses_others(tmp_path: Path) -> None:
    listed = CliRunner().invoke(main, ["recipes", "list"])
    assert listed.exit_code == 0
    assert all(name in listed.output for name in NAMED)
    refused = CliRunner().invoke(main, ["recipes", "show", "nvfp5"])
    assert refused.exit_code == 2
    assert "near it: nvfp4" in refused.output
    assert len(refused.output.splitlines()) == 1
    path = tmp_path / "study.toml"
    path.write_text(AXES.format(axes=""))
    own = CliRunner().invoke(main, ["recipes", "show", "mine", "--study", str(path)])
    assert own.exit_code == 0
    assert "Gains rounded to mxfp8_e4m3fn" in own.output
