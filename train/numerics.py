"""What a pack's precision needs while it runs: each block's formats, the random bits of a step, and the histories of scales.

    make_numerics    the recipes of a pack's runs as tensors and constants
    Draws            a step's seeds and signs: functions of each run's own seeds, the step and the place, and of nothing else
    Histories        amaxes of the last steps, for tensors whose scales are delayed

Weights of a step are rounded when the step before updates them, with the seeds and signs of the step that they serve, so that
both operands of a product are rotated alike.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from formats import AmaxHistory, tensor_amax
from train.compiling import Quantizer
from train.hadamard import random_signs
from train.model import BlockPrecision, ModelShape, Numerics, is_matrix
from train.operands import ROLES, OperandRule, Rules
from train.precision import Precision, pack_precision
from train.recipe import LinearPrecision, Recipe
from train.rounding_seeds import purpose_words, rounding_seeds
from train.share import Share


def make_numerics(
    recipes: Sequence[Recipe], shape: ModelShape, device: torch.device, quantizer: Quantizer, compiled: bool
) -> Numerics:
    """The precision of every place, for runs of one structure; ValueError for several structures."""
    different, places = _once(recipes)  # runs share most of theirs, and each question is asked of each recipe once
    structures = {recipe.structure for recipe in different}
    if len(structures) != 1:
        raise ValueError(f"runs of {len(structures)} structures can't share a program: {sorted(map(str, structures))}")
    made: dict[tuple[LinearPrecision, ...], Precision] = {}
    by_hand = compiled and device.type == "cuda"

    def stacked(linears: Sequence[LinearPrecision]) -> Precision:
        key = tuple(linears)
        if key not in made:
            of_runs = [linears[place] for place in places]
            precision = pack_precision(of_runs, device, quantizer)
            made[key] = precision._replace(kernels=by_hand and precision.carrier == torch.bfloat16)
        return made[key]

    blocks = []
    for i in range(shape.layers):
        of = [recipe.block(i, shape.layers) for recipe in different]
        products = [block.products for block in of if block.products is not None]
        blocks.append(
            BlockPrecision(
                stacked([block.attention for block in of]),
                stacked([block.mlp for block in of]),
                stacked(products) if products else None,
            )
        )
    body, head = stacked([recipe.body for recipe in different]), stacked([recipe.lm_head for recipe in different])
    carriers = {place.carrier for block in blocks for place in (block.attention, block.mlp)}
    structure = structures.pop()
    form = "math" if body.carrier == torch.float64 or shape.dropout else structure.attention_form
    kernels = by_hand and carriers == {torch.bfloat16} and not shape.dropout
    return Numerics(body, head, form, kernels, tuple(blocks), structure.elsewhere)


def _once(recipes: Sequence[Recipe]) -> tuple[list[Recipe], list[int]]:
    """Each object once, since comparing two recipes takes as long as asking them, and which of them is each run's."""
    number: dict[int, int] = {}
    places = [number.setdefault(id(recipe), len(number)) for recipe in recipes]
    return list({id(recipe): recipe for recipe in recipes}.values()), places


def with_quantizer(numerics: Numerics, quantizer: Quantizer) -> Numerics:
    """The same with that quantiser in every place."""
    blocks = tuple(
        block._replace(
            attention=block.attention._replace(quantizer=quantizer),
            mlp=block.mlp._replace(quantizer=quantizer),
            products=None if block.products is None else block.products._replace(quantizer=quantizer),
        )
        for block in numerics.blocks
    )
    body, head = (place._replace(quantizer=quantizer) for place in (numerics.body, numerics.lm_head))
    return numerics._replace(body=body, lm_head=head, blocks=blocks)


def with_share(numerics: Numerics, share: Share | None = None) -> Numerics:
    """The same with that share of the run's tokens in every place: in attention's products, with no weight among the operands."""

    def placed(place: Precision) -> Precision:
        drawn = place.structure.rules is not None and place.structure.rules.is_stochastic
        return place._replace(share=share if share is None or drawn else share._replace(rank=0))

    def of_products(place: Precision | None) -> Precision | None:
        if place is None:
            return None
        of = placed(place)
        return of if of.share is None else of._replace(share=of.share._replace(weights=False))

    blocks = tuple(
        block._replace(attention=placed(block.attention), mlp=placed(block.mlp), products=of_products(block.products))
        for block in numerics.blocks
    )
    return numerics._replace(body=placed(numerics.body), lm_head=placed(numerics.lm_head), blocks=blocks)


class Draws:
    """The random numbers of rules and of dropout, for keys of the runs, int64 [R].

    All places' are drawn at once: a model has dozens, and a seed by itself is a score of operations on R numbers.
    """

    def __init__(self, keys: Tensor, dropout: bool = False) -> None:
        self.keys, self.dropout = keys, dropout
        self._even = F.pad(keys, (0, keys.shape[0] % 2))  # so that each place's seeds lie at a multiple of 16 bytes
        self._never = torch.zeros(1, dtype=torch.int64, device=keys.device)
        self._words: dict[tuple[str, ...], Tensor] = {}

    def at(self, numerics: Numerics, step: Tensor, training: bool = False) -> Numerics:
        """The same with every place's seeds and signs of a step, int64 [1], where it takes any; with dropout's while training."""
        drops = training and self.dropout
        blocks = {f"h.{i}": block for i, block in enumerate(numerics.blocks)}
        places = [(name, p) for name, block in blocks.items() for p in block[:3] if p is not None]
        ruled = [(name, p.structure.rules) for name, p in (*places, ("lm_head", numerics.lm_head)) if p.structure.rules]
        asked = [name for name, rules in ruled if rules.is_stochastic]
        asked += ["dropout", *(f"{name}.dropout" for name in blocks)] if drops else []
        seeds, signs = self._seeds(asked, step), self._signs(ruled, step)

        def place(name: str, precision: Precision) -> Precision:
            rules = precision.structure.rules
            if rules is None:
                return precision
            seed = seeds[name] if rules.is_stochastic else precision.seed
            turned = signs[name, rules.hadamard, _changes(rules)] if rules.hadamard else precision.signs
            return precision._replace(seed=seed, signs=turned)

        made = tuple(
            BlockPrecision(
                place(name, block.attention),
                place(name, block.mlp),
                None if block.products is None else place(name, block.products),
                seeds[f"{name}.dropout"] if drops else None,
            )
            for name, block in blocks.items()
        )
        drop = seeds["dropout"] if drops else None
        return numerics._replace(lm_head=place("lm_head", numerics.lm_head), blocks=made, drop=drop)

    def _seeds(self, purposes: Iterable[str], step: Tensor) -> dict[str, Tensor]:
        """`rounding_seeds` of each purpose, int64 [R]."""
        purposes = tuple(dict.fromkeys(purposes))
        if not purposes:
            return {}
        if purposes not in self._words:
            self._words[purposes] = purpose_words(purposes).to(self.keys.device)[:, None]
        drawn = rounding_seeds(self._even, step, self._words[purposes])
        return {purpose: row[: self.keys.shape[0]] for purpose, row in zip(purposes, drawn.unbind(0), strict=True)}

    def _signs(self, ruled: Iterable[tuple[str, Rules]], step: Tensor) -> dict[tuple[str, int, bool], Tensor]:
        """`random_signs` by place, how many a run has and whether each step has its own, [R, size]."""
        wanted: dict[tuple[int, bool], dict[str, None]] = {}
        for name, rules in ruled:
            if rules.hadamard:
                wanted.setdefault((rules.hadamard, _changes(rules)), {})[name] = None
        found = {}
        for (size, changes), names in wanted.items():
            seeds = self._seeds([f"{name}.signs" for name in names], step if changes else self._never)
            signs = random_signs(torch.cat(list(seeds.values())), size).view(len(names), -1, size)
            found.update({(name, size, changes): of for name, of in zip(names, signs.unbind(0), strict=True)})
        return found


def _changes(rules: Rules) -> bool:
    """Whether a rotation's signs are other ones every step."""
    return any(rule.signs == "step" for _, _, rule in rules.items())


@dataclass(frozen=True)
class _Alike:
    """Matrices of equal rules: their names, each role's delayed rule, and its amaxes [M, R, H], None where nothing is delayed."""

    names: list[str]
    rules: tuple[OperandRule | None, ...]
    amaxes: tuple[Tensor | None, ...]

    def scales(self, runs: int, device: torch.device) -> Tensor:
        """[M, R, 3], 1 where nothing is delayed."""
        ones = torch.ones(len(self.names), runs, dtype=torch.float32, device=device)
        return torch.stack(
            [self._scale(role) if self.amaxes[role] is not None else ones for role in range(len(ROLES))], 2
        )

    def _scale(self, role: int) -> Tensor:
        rule, amaxes = self.rules[role], self.amaxes[role]
        assert rule is not None
        assert rule.format is not None
        assert rule.delayed is not None
        assert amaxes is not None
        scale = AmaxHistory(amaxes.flatten(0, 1)).scale(rule.format, rule.delayed.rule, rule.delayed.margin)
        return (power_of_two_above(scale) if rule.delayed.power_of_two else scale).view(amaxes.shape[:2])

    def record(self, of_step: Tensor) -> None:
        """A step's amaxes [M, R, 3], in place."""
        for role, kept in enumerate(self.amaxes):
            if kept is not None:
                history = AmaxHistory(kept.flatten(0, 1)).record(of_step[..., role].flatten())
                kept.copy_(history.amaxes.view_as(kept))


class Histories:
    """The amaxes of each matrix's activation, weight and gradient where scales are delayed."""

    def __init__(self, numerics: Numerics, shape: ModelShape, runs: int, device: torch.device) -> None:
        self._runs, self._device = runs, device
        groups: dict[tuple[OperandRule | None, ...], list[str]] = {}
        for name in (*filter(is_matrix, shape.parameters()), shape.head):
            rules = place_of(name, numerics).structure.rules
            if rules is not None and rules.is_delayed:
                by_role = rules.by_role()
                delayed = (next((rule for rule in by_role[role] if rule.delayed), None) for role in ROLES)
                groups.setdefault(tuple(delayed), []).append(name)
        self._groups = [_Alike(names, rules, self._empty(rules, len(names))) for rules, names in groups.items()]

    def _empty(self, rules: tuple[OperandRule | None, ...], matrices: int) -> tuple[Tensor | None, ...]:
        def of(rule: OperandRule | None) -> Tensor | None:
            if rule is None or rule.delayed is None:
                return None
            length = rule.delayed.length
            return AmaxHistory.empty(length, matrices * self._runs, self._device).amaxes.view(
                matrices, self._runs, length
            )

        return tuple(of(rule) for rule in rules)

    @property
    def names(self) -> list[str]:
        """The matrices that have any."""
        return [name for group in self._groups for name in group.names]

    def state(self) -> dict[str, Tensor]:
        """All amaxes [M, R, H], by the first matrix of those that share rules, and role; the tensors themselves."""
        return {
            f"{group.names[0]} {role}": kept
            for group in self._groups
            for role, kept in zip(ROLES, group.amaxes, strict=True)
            if kept is not None
        }

    def amaxes_of(self, name: str) -> list[Tensor]:
        """A matrix's amaxes [R, H], of the roles whose scales are delayed, the newest first."""
        return [
            kept[group.names.index(name)]
            for group in self._groups
            if name in group.names
            for kept in group.amaxes
            if kept is not None
        ]

    def scales(self) -> dict[str, Tensor]:
        """The scales of the next step by matrix, FP32 [R, 3] of activation, weight and gradient, 1 where none is delayed."""
        return {
            name: scale
            for group in self._groups
            for name, scale in zip(group.names, group.scales(self._runs, self._device), strict=True)
        }

    def record(self, amaxes: Mapping[str, Tensor], weights: Mapping[str, Tensor]) -> None:
        """A step's amaxes [R, 3] by matrix, in place; the weights' own are taken here, of the master weights."""
        for group in self._groups:
            of_step = torch.stack([amaxes[name] for name in group.names])
            if group.amaxes[1] is not None:
                own = torch.stack([tensor_amax(weights[name], 1) for name in group.names])
                of_step = torch.stack([of_step[..., 0], own, of_step[..., 2]], 2)
            group.record(of_step)


def power_of_two_above(scale: Tensor) -> Tensor:
    """The smallest power of two that is no smaller; of positive normal FP32 numbers, whose carry goes to the exponent."""
    mantissa = (1 << 23) - 1
    return ((scale.view(torch.int32) + mantissa) & ~mantissa).view(torch.float32)


def place_of(name: str, numerics: Numerics) -> Precision:
    """The precision of a matrix, by its name."""
    if not name.startswith("h."):
        return numerics.lm_head
    block = numerics.block(int(name.split(".")[1]))
    return block.attention if ".attn." in name else block.mlp
