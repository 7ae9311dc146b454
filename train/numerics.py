"""What a pack's precision needs while it runs: each block's formats, the random bits of a step, and the histories of scales.

    make_numerics    the recipes of a pack's runs as tensors and constants
    Draws            a step's seeds and signs: functions of each run's own seeds, the step and the place, and of nothing else
    Histories        amaxes of the last steps, for tensors whose scales are delayed

Weights of a step are rounded when the step before updates them, with the seeds and signs of the step that they serve, so that
both operands of a product are rotated alike.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from formats import AmaxHistory, tensor_amax
from train.compiling import Quantizer
from train.hadamard import random_signs
from train.model import BlockPrecision, ModelShape, Numerics, is_matrix
from train.operands import ROLES, Delayed, OperandRule
from train.precision import Precision, pack_precision
from train.recipe import LinearPrecision, Recipe
from train.rounding_seeds import rounding_seeds


def make_numerics(
    recipes: Sequence[Recipe], shape: ModelShape, device: torch.device, quantizer: Quantizer, compiled: bool
) -> Numerics:
    """The precision of every place, for runs of one structure; ValueError for several structures."""
    structures = {recipe.structure for recipe in recipes}
    if len(structures) != 1:
        raise ValueError(f"runs of {len(structures)} structures can't share a program: {sorted(map(str, structures))}")
    made: dict[tuple[LinearPrecision, ...], Precision] = {}

    def stacked(linears: Sequence[LinearPrecision]) -> Precision:
        key = tuple(linears)
        if key not in made:
            made[key] = pack_precision(linears, device, quantizer)
        return made[key]

    blocks = []
    for i in range(shape.layers):
        of = [recipe.block(i, shape.layers) for recipe in recipes]
        products = [block.products for block in of if block.products is not None]
        blocks.append(
            BlockPrecision(
                stacked([block.attention for block in of]),
                stacked([block.mlp for block in of]),
                stacked(products) if products else None,
            )
        )
    body, head = stacked([recipe.body for recipe in recipes]), stacked([recipe.lm_head for recipe in recipes])
    carriers = {place.carrier for block in blocks for place in (block.attention, block.mlp)}
    structure = structures.pop()
    form = "math" if body.carrier == torch.float64 else structure.attention_form
    kernels = compiled and device.type == "cuda" and carriers == {torch.bfloat16}
    return Numerics(body, head, form, kernels, tuple(blocks), structure.elsewhere)


def with_quantizer(numerics: Numerics, quantizer: Quantizer) -> Numerics:
    """The same with that quantiser in every place."""
    blocks = tuple(
        BlockPrecision(*(None if place is None else place._replace(quantizer=quantizer) for place in block))  # type: ignore[arg-type]
        for block in numerics.blocks
    )
    body, head = (place._replace(quantizer=quantizer) for place in (numerics.body, numerics.lm_head))
    return numerics._replace(body=body, lm_head=head, blocks=blocks)


class Draws:
    """The random numbers of rules, for keys of the runs, int64 [R]."""

    def __init__(self, keys: Tensor) -> None:
        self.keys = keys
        self._never = torch.zeros(1, dtype=torch.int64, device=keys.device)

    def at(self, numerics: Numerics, step: Tensor) -> Numerics:
        """The same with every place's seeds and signs of a step, int64 [1], where it takes any."""
        blocks = tuple(
            BlockPrecision(*(None if place is None else self._place(place, f"h.{i}", step) for place in block))  # type: ignore[arg-type]
            for i, block in enumerate(numerics.blocks)
        )
        return numerics._replace(lm_head=self._place(numerics.lm_head, "lm_head", step), blocks=blocks)

    def _place(self, precision: Precision, name: str, step: Tensor) -> Precision:
        rules = precision.structure.rules
        if rules is None:
            return precision
        if rules.is_stochastic:
            precision = precision._replace(seed=rounding_seeds(self.keys, step, name))
        if rules.hadamard:
            when = step if any(rule.signs == "step" for _, _, rule in rules.items()) else self._never
            signs = random_signs(rounding_seeds(self.keys, when, f"{name}.signs"), rules.hadamard)
            precision = precision._replace(signs=signs)
        return precision


class Histories:
    """The amaxes of each matrix's activation, weight and gradient where scales are delayed: one `AmaxHistory` a role, [R, H]."""

    def __init__(self, numerics: Numerics, shape: ModelShape, runs: int, device: torch.device) -> None:
        self._rules: dict[str, list[OperandRule | None]] = {}
        self._amaxes: dict[str, list[Tensor]] = {}
        self._runs, self._device = runs, device
        for name in (*filter(is_matrix, shape.parameters()), shape.head):
            rules = place_of(name, numerics).structure.rules
            if rules is None or not rules.is_delayed:
                continue
            by_role = rules.by_role()
            delayed = [next((rule for rule in by_role[role] if rule.delayed), None) for role in ROLES]
            self._rules[name] = delayed
            lengths = [1 if rule is None or rule.delayed is None else rule.delayed.length for rule in delayed]
            self._amaxes[name] = [AmaxHistory.empty(length, runs, device).amaxes for length in lengths]

    @property
    def names(self) -> list[str]:
        """The matrices that have any."""
        return list(self._rules)

    def scales(self) -> dict[str, Tensor]:
        """The scales of the next step by matrix, FP32 [R, 3] of activation, weight and gradient, 1 where none is delayed."""
        return {name: torch.stack([self._scale(name, role) for role in range(len(ROLES))], 1) for name in self._rules}

    def _scale(self, name: str, role: int) -> Tensor:
        rule = self._rules[name][role]
        if rule is None or rule.format is None:
            return torch.ones(self._runs, dtype=torch.float32, device=self._device)
        delayed: Delayed | None = rule.delayed
        assert delayed is not None
        return AmaxHistory(self._amaxes[name][role]).scale(rule.format, delayed.rule, delayed.margin)

    def record(self, amaxes: Mapping[str, Tensor], weights: Mapping[str, Tensor]) -> None:
        """A step's amaxes [R, 3] by matrix, in place; the weights' own are taken here, of the master weights."""
        for name, of_step in amaxes.items():
            columns = [of_step[:, 0], tensor_amax(weights[name], 1), of_step[:, 2]]
            for kept, amax in zip(self._amaxes[name], columns, strict=True):
                kept.copy_(AmaxHistory(kept).record(amax).amaxes)


def place_of(name: str, numerics: Numerics) -> Precision:
    """The precision of a matrix, by its name."""
    if not name.startswith("h."):
        return numerics.lm_head
    block = numerics.block(int(name.split(".")[1]))
    return block.attention if ".attn." in name else block.mlp
