"""One look at a run in the middle of training: the pass that `signals` are computed from, and their histories on the device.

The pass takes the first sequence of a step's batch, the weights before its update, and the step's own precision. Gradients are
those of the loss as training has it, mean over *all* tokens of the batch and times the loss scale, so that they are as large as
training's. What a scale is made from is the one sequence: delayed scales are training's, others those of a smaller tensor.

An operand that its two products take differently (`operands`) counts as the first of them takes it that gives it scales, or as
the first does where neither gives any. Native BF16 and FP16 products round their operands too; TF32's, FP32's and FP64's are left
as they are here, and NaN says so.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from formats import ScaledFormat, scales_of
from formats.factored import Factored
from formats.scaled import Granularity
from train.hadamard import rotate
from train.linear import on_grid
from train.model import ModelShape, Numerics, Parameters, forward, is_matrix, objective
from train.numerics import place_of
from train.operands import ROLES, Role, described
from train.precision import OperandPlan, Precision, WeightOperand
from train.products import HEAD_SITE, factor_of_elements, take_alone, whole
from train.seen import LM_HEAD, Layers, Seen
from train.signals import OF_OPERANDS, OF_PASS, SIGNALS, Look, Rounded, statistics
from train.weights import site_of

Statistics = Callable[[Tensor, Tensor, Tensor, Tensor | None, Tensor], Tensor]


def tensor_names(shape: ModelShape) -> list[str]:
    """The linear layers, as `tensor` names them."""
    return [*filter(is_matrix, shape.parameters()), LM_HEAD]


class Choice(NamedTuple):
    """The rule by which an operand is looked at, the axis that its product contracts, and the chunks of that product's sum."""

    rule: OperandPlan
    axis: int
    chunk: int
    forward: bool


def chosen(precision: Precision, role: Role) -> Choice:
    """Of the role's two products the first that gives it scales, or the first."""
    assert precision.plan is not None
    axes = {
        ("forward", 0): -1,
        ("forward", 1): -2,
        ("dgrad", 0): -1,
        ("dgrad", 1): -1,
        ("wgrad", 0): -2,
        ("wgrad", 1): -2,
    }
    choices = []
    for (product, place), axis in axes.items():
        plan = getattr(precision.plan, product)
        rule = (plan.first, plan.second)[place]
        if rule.role == ROLES.index(role):
            choices.append(Choice(rule, axis, plan.chunk, product == "forward"))
    return next((choice for choice in choices if choice.rule.kind == "scaled"), choices[0])


def _limit_alone(precision: Precision, role: Role, x: Tensor) -> Tensor | None:
    """The largest magnitude of what is rounded as it is made, without rules, [R or 1, 1, 1]; None where nothing is."""
    parameters = precision.formats(role)
    if parameters is not None:
        return parameters.max_bits.view(torch.float32)
    native = precision.native_dtype
    return None if native is None else x.new_full((1, 1, 1), torch.finfo(native).max, dtype=torch.float32)


def rounded(x: Tensor, precision: Precision, role: Role, site: int) -> Rounded | None:
    """An activation or a gradient [R, S, D] before and after rounding; None where nothing rounds it."""
    if precision.plan is None:
        limit = _limit_alone(precision, role, x)
        return None if limit is None else _symmetric(x.float(), on_grid(x, precision, role).float(), limit)
    rule, axis, chunk, _ = chosen(precision, role)
    x = precision.to_output(x.detach())
    taken = take_alone(x, rule, axis, chunk, precision, site)
    delayed = rule.delayed and precision.scales is not None
    given = precision.scales[:, rule.role] if delayed and precision.scales is not None else None
    return _rounded_by(x, taken, rule, chunk, axis, given, precision)


def rounded_weight(w: Tensor, operand: Tensor | WeightOperand, precision: Precision, head: bool) -> Rounded | None:
    """A master weight and the operand that was made of it, [R, D, F], or as the LM head lies, [R, V, D]."""
    rows = w.shape[1]
    if isinstance(operand, Tensor):
        limit = _limit_alone(precision, "weight", w)
        return None if limit is None else _symmetric(w.float(), operand[:, :rows].float(), limit)
    rule, axis, chunk, forward_ = chosen(precision, "weight")
    axis = -3 - axis if head else axis
    taken = operand.first if forward_ else operand.second
    padded = F.pad(w, (0, 0, 0, max(0, taken.values.shape[1] - rows)))  # as the head's operand is
    # What it was rounded with: the present scale already has the weight's new amax.
    given = taken.factor.flatten(1)[:, 0] if rule.delayed and taken.factor is not None else None
    r = _rounded_by(padded, taken, rule, chunk, axis, given, precision)
    if rule.hadamard:
        return r
    scale = None if r.scale is None else _rows(r.scale, rows)
    return Rounded(r.x[:, :rows], r.q[:, :rows], _rows(r.limit, rows), scale, _rows(r.edge, rows))


def _symmetric(x: Tensor, q: Tensor, limit: Tensor) -> Rounded:
    return Rounded(x, q, limit, None, limit)


def _rows(t: Tensor, rows: int) -> Tensor:
    return t if t.shape[1] == 1 else t[:, :rows]


def _rounded_by(
    x: Tensor, taken: Factored, rule: OperandPlan, chunk: int, axis: int, given: Tensor | None, precision: Precision
) -> Rounded:
    x, q = x.detach().to(torch.float32), whole(taken, chunk, axis)
    if rule.hadamard:
        assert precision.signs is not None
        x = rotate(x, axis, precision.signs)
    if rule.kind == "run":
        parameters = (precision.activation, precision.weight, precision.gradient)[rule.role]
        assert parameters is not None
        return _symmetric(x, q, parameters.max_bits.view(torch.float32))
    f = described(rule.name)  # of a cast, too: BF16
    element = f.element if isinstance(f, ScaledFormat) else f
    largest, lowest = float(element.largest), float(-element.lowest)
    limit = x.new_full((1, 1, 1), largest)
    edge = limit if largest == lowest else torch.where(x < 0, lowest, limit)
    if not isinstance(f, ScaledFormat):
        return Rounded(x, q, limit, None, edge)
    if f.scale == "fp32":  # then the factor is the scale
        scale = factor_of_elements(taken, chunk, axis)
        assert scale is not None
        return Rounded(x, q, limit * scale, scale, edge * scale)
    group, tensor = scales_of(x, f, -1 if rule.tile else axis, tensor_scale=given, batch_dims=1)
    scale = _to_elements(group, f, axis, x.shape)
    limit, edge = limit * scale, edge * scale
    if tensor is not None:
        scale, limit, edge = (t * tensor[:, None, None] for t in (scale, limit, edge))
    return Rounded(x, q, limit, scale, edge)


def _to_elements(group: Tensor, f: ScaledFormat, axis: int, shape: Sequence[int]) -> Tensor:
    """A scale a group as it broadcasts against the elements."""
    sizes = {Granularity.BLOCK: {axis: f.group[:1]}, Granularity.TILE: {-2: f.group[:1], -1: f.group[1:]}}
    for along, (size,) in sizes.get(f.granularity, {}).items():
        group = group.repeat_interleave(size, along).narrow(along, 0, shape[along])
    return group


def signal_pass(
    p: Parameters, operands: Mapping[str, Tensor | WeightOperand], tokens_RT: Tensor, targets_RT: Tensor, shape: ModelShape,
    numerics: Numerics, scales: Mapping[str, Tensor], sequences: int, loss_scale_R: Tensor | None = None,
    of_operand: Statistics = statistics,
) -> dict[str, Tensor]:  # fmt: skip
    """Every signal of `OF_PASS` and `OF_OPERANDS` for one sequence a run, [R, *dims], block 0 first; nothing is changed.

    operands: weights as products take them in this step, without gradients. sequences: of the whole batch, which the loss is the
    mean over.
    """
    seen = Seen()
    layers = Layers(p, shape.head, operands, scales, seen)
    with torch.enable_grad():
        logits = forward(p, tokens_RT[:, None], shape, numerics, layers)
        loss_R = objective(logits, targets_RT, shape) / sequences
        weights_R = torch.ones_like(loss_R) if loss_scale_R is None else loss_scale_R.to(loss_R.dtype)
        gradients = torch.autograd.grad(loss_R, list(seen.outputs.values()), weights_R)
    with torch.no_grad():
        look = Look(seen, logits.detach(), shape.attention_scale)
        found = {name: signal.of(look) for name, signal in OF_PASS.items()}
        columns = []
        for name, dy in zip(seen.outputs, gradients, strict=True):
            columns.append(_of_layer(p, operands, name, seen.inputs[name], dy, shape, numerics, scales, of_operand))
        table = torch.stack(columns).permute(2, 3, 0, 1)  # signals, R, tensor, role
        return found | dict(zip(OF_OPERANDS, table, strict=True))


def _of_layer(
    p: Parameters, operands: Mapping[str, Tensor | WeightOperand], name: str, x: Tensor, dy: Tensor, shape: ModelShape,
    numerics: Numerics, scales: Mapping[str, Tensor], of_operand: Statistics,
) -> Tensor:  # fmt: skip
    """[role, signals, R] of one layer."""
    head = name == LM_HEAD
    matrix, site = (shape.head, HEAD_SITE) if head else (name, site_of(name))
    precision = place_of(matrix, numerics)._replace(scales=scales.get(matrix))
    of_roles = [
        rounded(x, precision, "activation", site),
        rounded_weight(p[matrix].detach(), operands[matrix], precision, head),
        rounded(dy, precision, "gradient", site),
    ]
    nothing = x.new_full((len(OF_OPERANDS), x.shape[0]), torch.nan, dtype=torch.float32)
    return torch.stack([nothing if r is None else of_operand(*r) for r in of_roles])


class SignalHistories:
    """Every signal of a pack, FP32 [signal steps, R, *dims], filled in place; NaN where nothing has been recorded.

    Along `block` the parameters outside the blocks come first, then the blocks: `blocks` are their numbers.
    """

    def __init__(self, shape: ModelShape, steps: int, runs: int, device: torch.device) -> None:
        self.blocks = [-1, *range(shape.layers)]
        sizes = {"block": len(self.blocks), "tensor": len(tensor_names(shape)), "role": len(ROLES)}
        self.values = {
            name: torch.full((steps, runs, *(sizes[d] for d in signal.dims)), torch.nan, device=device)
            for name, signal in SIGNALS.items()
        }
        self._counter = torch.zeros(1, dtype=torch.int64, device=device)

    def state(self) -> dict[str, Tensor]:
        """The signals by name, and "counter", the row that comes next; the tensors themselves."""
        return {**self.values, "counter": self._counter}

    def record(self, found: Mapping[str, Tensor]) -> None:
        """A signal step's row, [R, *dims] by name; of what only blocks have, [R, L]."""
        for name, value in found.items():
            kept = self.values[name]
            if "block" in SIGNALS[name].dims and value.shape[1] < len(self.blocks):
                value = F.pad(value, (1, 0), value=torch.nan)
            kept.index_copy_(0, self._counter, value[None].to(kept.dtype))
        self._counter.add_(1)
