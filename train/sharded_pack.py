"""One run whose blocks no GPU holds whole: PyTorch's FSDP2 (`fully_shard`), around the same pieces of a step.

    at rest      of each block's parameter [D, F], its moments and gradient, rank r has the r-th part of the rows, in FP32
    forward      a block's master weights are gathered, rounded to operands, used and given back
    backward     gathered again and rounded again; the gradient's parts are summed in FP32, each rank keeps its rows of the sum
    update       each rank's rows; the norm is summed over ranks

What is gathered are the FP32 masters, not operands: a scale of a whole matrix or a tile of it then comes from all of it, and
every operand has the bits that one GPU gives it. That moves 4 bytes a weight where BF16 operands would move 2. What is outside
the blocks, embeddings, the last norm and the LM head, is whole on every rank, as in `wide_pack`: 4 % of a 7B model's weights.

FSDP2 averages gradients by default; here it sums, since losses are divided by all tokens already. It does what it does around
`Block.forward`, eagerly; inside are the compiled pieces.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor

from formats import tensor_amax
from train.model import BlockPrecision, ModelShape, Numerics, is_matrix, rotation
from train.numerics import place_of
from train.optim import Parts
from train.precision import Precision
from train.seeds import Weights, initial_weights
from train.share import largest_of_ranks
from train.shared_products import SharedWeight, round_sum
from train.step import BLOCK_MATRICES, Pieces, behind_dropout
from train.weights import head_operand, own
from train.wide_pack import WidePack


class Step(NamedTuple):
    """What a pass of the blocks takes beside the stream; scales by matrix."""

    pieces: Pieces
    shape: ModelShape
    shared: Numerics
    blocks: tuple[BlockPrecision, ...]
    scales: Mapping[str, Tensor]
    turn: Tensor | None

    def behind(self, number: int) -> Precision:
        """What the gradient of what block `number` adds meets on its way back; of the tokens' embeddings for -1."""
        return behind_dropout(self.blocks[number].mlp, self.blocks[number]) if number >= 0 else self.blocks[0].mlp


class Block(nn.Module):
    """One block's parameters without the run axis, and the pieces that they go through."""

    step: Step  # set before each pass: no argument, for FSDP looks through those

    def __init__(self, number: int, parameters: Mapping[str, Tensor]) -> None:
        super().__init__()
        self.number = number
        for name, p in parameters.items():
            self.register_parameter(_within(name), nn.Parameter(p))

    def forward(self, x: Tensor, delta: Tensor | None) -> tuple[Tensor, Tensor]:
        """The stream, and what the block adds to it, as `Pieces.hidden` passes them on."""
        step, h = self.step, f"h.{self.number}."
        p = {name: parameter[None] for name, parameter in self.named_parameters()}
        block, behind = step.blocks[self.number], step.behind(self.number - 1)
        attention, mlp = ([SharedWeight(p[_within(name)]) for name in names] for names in BLOCK_MATRICES)
        of_attention, of_mlp = ([step.scales.get(h + name) for name in names] for names in BLOCK_MATRICES)
        x, delta = step.pieces.attention_half(
            x, delta, p["ln_1"], *attention, step.shape, step.shared, block, behind, of_attention,
            p.get("attn_ln_q"), p.get("attn_ln_k"), step.turn,
        )  # fmt: skip
        behind = behind_dropout(block.attention, block)
        x, delta = step.pieces.mlp_half(x, delta, p["ln_2"], *mlp, step.shape, step.shared, block, behind, of_mlp)
        return x, delta


def _within(name: str) -> str:
    """A parameter's name as a module may have it: "attn_qkv" of "attn.qkv"."""
    return name.replace(".", "_")


class Blocks(nn.Module):
    """All blocks in a row."""

    def __init__(self, blocks: Sequence[Block]) -> None:
        super().__init__()
        self.row, self._blocks = nn.ModuleList(blocks), tuple(blocks)

    def step(self, step: Step) -> None:
        """What the next pass takes."""
        for block in self._blocks:
            block.step = step

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """The stream before the last norm, in two terms."""
        delta: Tensor | None = None
        for block in self.row:
            x, delta = block(x, delta)
        return x, delta


class ShardedPack(WidePack):
    """A pack of one run whose blocks are in parts; `parameters[name]` of a block are this rank's rows, [1, D / n, ...]."""

    def _make_parameters(self, weights: Weights | None) -> None:  # noqa: ARG002
        """Block by block, so that no more than one of them is ever whole here."""
        shape, count = self.program.shape, self.ranks.count
        mesh = init_device_mesh(self.device.type, (count,))
        blocks, self._parts = [], dict[str, nn.Parameter]()
        for i in range(shape.layers):
            h = f"h.{i}."
            block = Block(i, {name.removeprefix(h): p for name, p in self._drawn(h).items()})
            fully_shard(block, mesh=mesh, reshard_after_forward=True)
            self._parts |= {name: getattr(block, _within(name.removeprefix(h))) for name in self._names(h)}
            blocks.append(block)
        self._model = Blocks(blocks)
        fully_shard(self._model, mesh=mesh)  # in place
        for module in self._model.modules():
            if isinstance(module, FSDPModule):
                module.set_gradient_divide_factor(1.0)
                module.set_force_sum_reduction_for_comms(True)
        outside = {name: p[None].requires_grad_() for name, p in self._drawn("").items()}
        self.parameters = {
            name: _local(self._parts[name])[None] if name in self._parts else outside[name]
            for name in shape.parameters()
        }
        self._keep_all()

    def _names(self, prefix: str) -> list[str]:
        """Of a block's parameters, or for "" of those outside the blocks."""
        return [
            name
            for name in self.program.shape.parameters()
            if (name.startswith(prefix) if prefix else not name.startswith("h."))
        ]

    def _drawn(self, prefix: str) -> dict[str, Tensor]:
        weights = initial_weights(self.program.shape, self.slots[0].init_seed, self._names(prefix))
        return {name: torch.from_numpy(w).to(self.device, self.program.dtype) for name, w in weights.items()}

    def _make_operands(self, numerics: Numerics, scales: Mapping[str, Tensor]) -> None:
        """The LM head's alone: the blocks' are made when they are gathered, with these scales."""
        head = self.program.shape.head
        precision = place_of(head, numerics)._replace(scales=scales.get(head))
        self.operands[head] = own(head_operand(self.parameters[head].detach(), precision))
        self._weight_scales = {name: scale.clone() for name, scale in scales.items()}

    def _weights(self) -> Mapping[str, Tensor]:
        """Each weight's amax, [1, 1], which is what is taken of weights: of all ranks' rows."""
        names = self.histories.names
        if not names:
            return {}
        whole = largest_of_ranks(torch.stack([tensor_amax(self.parameters[name], 1) for name in names]))
        return dict(zip(names, whole[..., None].unbind(0), strict=True))

    def _scales(self) -> dict[str, Tensor]:
        """The present ones for activations and gradients; for weights those of their last update, when one GPU rounds them."""
        return {
            name: torch.stack([scale[:, 0], self._weight_scales[name][:, 1], scale[:, 2]], 1)
            for name, scale in self.histories.scales().items()
        }

    def _through_blocks(self, x: Tensor, numerics: Numerics, scales: Mapping[str, Tensor]) -> Tensor:
        shape, shared = self.program.shape, numerics._replace(blocks=(), drop=None)
        step = Step(self._pieces, shape, shared, numerics.blocks, scales, rotation(shape.context, shape, x))
        self._model.step(step)
        x, delta = self._model(x)
        behind = step.behind(shape.layers - 1)
        hidden: Tensor = self._pieces.finish(x, delta, self.parameters["ln_f"], shape, shared, behind)
        return hidden

    def _held_out_hidden(self, tokens: Tensor) -> tuple[Tensor, Precision]:
        """Without gradients: FSDP counts forward passes that no backward pass follows."""
        numerics = self._draws.at(self.numerics, self.counter)
        scales = self._scales()
        head = numerics.lm_head._replace(scales=scales.get(self.program.shape.head))
        with torch.no_grad():
            return self._hidden(tokens, numerics, scales)[1], head

    def _backward(
        self, x: Tensor, hidden: Tensor, dx: Tensor, scales: Mapping[str, Tensor]
    ) -> tuple[Tensor, dict[str, Tensor]]:
        self._arriving.wanted = True
        torch.autograd.backward(hidden, dx)
        self._arriving.wanted = False
        self.parameters["ln_f"].grad = None  # it is on its way to the others
        found = {name: _taken(scale) for name, scale in scales.items()}
        return _taken(x), found

    def _rounded(self, sums: Mapping[str, Tensor], numerics: Numerics) -> dict[str, Parts]:
        grads = super()._rounded(sums, numerics)
        for name, part in self._parts.items():
            whole = _local(_taken(part))[None]
            grads[name] = (round_sum(whole, place_of(name, numerics)) if is_matrix(name) else whole,)
        return grads

    def _squares(self, grads: dict[str, Parts], unscale_R: Tensor | None) -> list[Tensor]:
        *blocks, outside = super()._squares(grads, unscale_R)
        return [*self.ranks.sum(torch.stack(blocks)).unbind(0), outside]

    def _update(self, losses_R: Tensor, grads: dict[str, Parts], found: dict[str, Tensor] | None = None) -> None:
        super()._update(losses_R, grads, found)
        for name, scale in self.histories.scales().items():
            self._weight_scales[name].copy_(scale)

    def state(self) -> dict[str, Tensor]:
        """`Pack.state` with blocks' tensors whole, on rank 0's CPU; for all ranks at once."""
        return {name: self._whole(name, t) for name, t in self.own_state().items()}

    def own_state(self) -> dict[str, Tensor]:
        """With the scales of weights' last update, which stand for operands that are not kept."""
        return super().own_state() | {f"weight_scales {name}": scale for name, scale in self._weight_scales.items()}

    def _whole(self, name: str, mine: Tensor) -> Tensor:
        if not self._in_parts(name):
            return mine
        rows = mine[0].contiguous()
        everyone = [torch.empty_like(rows) for _ in range(self.ranks.count)]
        dist.all_gather(everyone, rows)
        return torch.cat(everyone)[None].cpu() if self.ranks.leads else mine

    def _in_parts(self, name: str) -> bool:
        """Whether a tensor of the state is of a block's parameter, by its name: "first h.0.ln_1"."""
        return name.rpartition(" ")[2] in self._parts

    def _is_whole(self, name: str, mine: Tensor, whole: Tensor) -> bool:
        if not self._in_parts(name):
            return super()._is_whole(name, mine, whole)
        wanted = (1, self.ranks.count * mine.shape[1], *mine.shape[2:])
        return whole.shape == wanted and whole.dtype == mine.dtype

    def _put(self, name: str, mine: Tensor, whole: Tensor) -> None:
        if self._in_parts(name):
            rows = mine.shape[1]
            whole = whole[:, self.ranks.rank * rows : (self.ranks.rank + 1) * rows]
        mine.copy_(whole)

    def _on_all(self) -> list[Tensor]:
        return [p.detach() for name, p in self.parameters.items() if name not in self._parts]


def _local(part: Tensor) -> Tensor:
    """The rows of this rank, in the memory that FSDP gathers from."""
    assert isinstance(part, DTensor)
    rows: Tensor = part.to_local()
    return rows.detach()


def _taken(t: Tensor) -> Tensor:
    """The gradient that has arrived, which goes with it."""
    grad, t.grad = t.grad, None
    assert grad is not None
    return grad
