"""One run on several GPUs at once, data parallel: every rank has all weights and a share of each batch's sequences.

A step is one process's step with its sums over tokens cut into the ranks' parts:

    rank r   sequences r B/n to (r + 1) B/n of the batch, forward and backward; losses and gradients divided by all B T tokens
    sums     each matrix's gradient, as soon as its part is there, while the backward pass goes on; FP32, before it is rounded
    update   the same on every rank, from the same sums: weights, moments, operands stay the same to the bit

So everything that a step decides by whole tensors is decided alike everywhere: amaxes and scales (`share`), delayed scales'
histories, overflow under a loss scale, the gradient's norm and clipping. Signals look at the batch's first sequence, on every
rank. What one process does otherwise is the order in which FP32 sums over tokens are formed, and nothing else.

Steps are launched piece by piece, not recorded as a CUDA graph: the pieces are compiled as ever, and a graph would tie the ranks'
collective operations to addresses and streams.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from train.dropout import EMBEDDING, dropped
from train.head import BLOCKS_OF_TOKENS, chunks, of_runs
from train.layers import embedding_gradient
from train.model import Numerics, is_matrix
from train.numerics import place_of, with_share
from train.optim import Parts
from train.pack import Pack
from train.precision import Precision
from train.program import Program, Slot
from train.ranks import Ranks, Spread
from train.recipe import Recipe
from train.seeds import Weights
from train.share import Share, largest_of_ranks
from train.shared_products import SharedWeight, round_sum
from train.step import batch
from train.text import Text
from train.weights import detached, parts_of
from train.wide_recipes import head_parts

TOKENS, POSITIONS, HEAD = "tokens", "positions", "head"


class Arriving:
    """Gradients on their way: each is summed over ranks as soon as it is there, while others are still computed."""

    def __init__(self) -> None:
        self._sums: dict[str, tuple[Tensor, dist.Work | None]] = {}
        self.wanted = False

    def add(self, name: str, part: Tensor) -> None:
        """A gradient's part of this rank; it must not be used until `take`."""
        whole = part.contiguous()
        self._sums[name] = (whole, dist.all_reduce(whole, async_op=True))

    def hook(self, name: str) -> Callable[[Tensor], None]:
        """For `Tensor.register_hook`."""

        def arrived(part: Tensor) -> None:
            if self.wanted:
                self.add(name, part)

        return arrived

    def take(self) -> dict[str, Tensor]:
        """All sums, by name."""
        for _, work in self._sums.values():
            if work is not None:
                work.wait()
        sums = {name: whole for name, (whole, _) in self._sums.items()}
        self._sums = {}
        return sums


class WidePack(Pack):
    """A pack of one run that `ranks` train together; every rank makes one, of the same program, slot and text."""

    recordable = False

    def __init__(
        self, ranks: Ranks, program: Program, slots: Sequence[Slot], text: Text, device: torch.device,
        compiled: bool | None = None, weights: Weights | None = None,
    ) -> None:  # fmt: skip
        if len(slots) != 1:
            raise ValueError(f"a pack that ranks share has one run, got {len(slots)}")
        self.ranks, self._arriving = ranks, Arriving()
        super().__init__(program, slots, text, device, compiled, weights)
        self._watch_gradients()

    def _watch_gradients(self) -> None:
        for name, p in self.parameters.items():
            if p.requires_grad and name not in ("wte", "wpe", "lm_head"):
                p.register_hook(self._arriving.hook(name))

    @property
    def _tokens(self) -> int:
        """Of all ranks' shares of a batch."""
        return self.program.sequences * self.program.shape.context

    def _numerics_of(self, recipes: Sequence[Recipe]) -> Numerics:
        return with_share(super()._numerics_of(recipes), Share(self.ranks.count, self.ranks.rank))

    def _load_text(self, text: Text) -> None:
        super()._load_text(text)
        n, T = self.program.sequences // self.ranks.count, self.program.shape.context
        first = self.ranks.rank * n
        self._first_offsets = self.offsets[:, :, :1].contiguous()
        self.offsets = self.offsets[:, :, first : first + n].contiguous()
        mine = slice(first * T, (first + n) * T)
        self.held_out = [tuple(t[:, mine].contiguous() for t in part) for part in self.held_out]

    def _look(self, tokens: Tensor, targets: Tensor) -> dict[str, Tensor]:  # noqa: ARG002
        offsets = self._first_offsets.index_select(0, self.counter)[0]
        return super()._look(*batch(self.text, offsets, self.program.shape.context))

    def _through_blocks(self, x: Tensor, numerics: Numerics, scales: Mapping[str, Tensor]) -> Tensor:
        shared = {
            name: SharedWeight(self.parameters[name], detached(operand)) if is_matrix(name) else operand
            for name, operand in self.operands.items()
        }
        return self._pieces.hidden(x, self.parameters, shared, self.program.shape, numerics, scales)

    def gradients(self, tokens: Tensor, targets: Tensor) -> tuple[Tensor, dict[str, Parts]]:
        """`Pack.gradients` for this rank's tokens [1, S / n], of all ranks' tokens."""
        shape = self.program.shape
        numerics = self._draws.at(self.numerics, self.counter, training=True)
        scales = {name: scale.requires_grad_() for name, scale in self._scales().items()}
        x, hidden = self._hidden(tokens, numerics, scales)
        head = numerics.lm_head._replace(scales=scales.get(shape.head))
        losses, dx, d_head, of_head = self._head(hidden.detach(), targets, numerics._replace(lm_head=head))
        self._arriving.add(HEAD, d_head)
        blocks = {name: scale for name, scale in scales.items() if name != shape.head}
        d_embedded, amaxes = self._backward(x, hidden, dx, blocks)
        self._amaxes = self._largest(amaxes, of_head)
        d_embedded = dropped(d_embedded, numerics.drop, shape.dropout, EMBEDDING)
        self._arriving.add(TOKENS, embedding_gradient(d_embedded, tokens, shape.vocabulary, numerics.kernels))
        if "wpe" in self.parameters:
            self._arriving.add(POSITIONS, self._pieces.position_gradient(d_embedded, shape.context))
        losses_R = self.ranks.sum(losses) / self._tokens
        return losses_R, self._rounded(self._arriving.take(), numerics)

    def _scales(self) -> dict[str, Tensor]:
        """Delayed scales by matrix, as this step's operands take them, [1, 3]."""
        return self.histories.scales()

    def _backward(
        self, x: Tensor, hidden: Tensor, dx: Tensor, scales: Mapping[str, Tensor]
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The gradient of x, and this rank's amaxes; weights' gradients go to `_arriving`."""
        names = [name for name in self.parameters if name not in ("wte", "wpe", "lm_head")]
        leaves = [self.parameters[name] for name in names]
        self._arriving.wanted = True
        d_embedded, *rest = torch.autograd.grad(hidden, [x, *leaves, *scales.values()], dx)
        self._arriving.wanted = False
        return d_embedded, dict(zip(scales, rest[len(names) :], strict=True))

    def _largest(self, amaxes: Mapping[str, Tensor], of_head: Tensor | None) -> dict[str, Tensor]:
        """Every matrix's amaxes [1, 3], of all ranks' parts."""
        all_of_them = dict(amaxes)
        if of_head is not None:
            all_of_them[self.program.shape.head] = torch.stack(
                [of_head[:, 0], torch.zeros_like(of_head[:, 0]), of_head[:, 1]], 1
            )
        if not all_of_them:
            return {}
        whole = largest_of_ranks(torch.stack(list(all_of_them.values())))
        return dict(zip(all_of_them, whole.unbind(0), strict=True))

    def _rounded(self, sums: Mapping[str, Tensor], numerics: Numerics) -> dict[str, Parts]:
        """Each parameter's gradient as one process leaves it, in parts."""
        shape = self.program.shape
        grads: dict[str, Parts] = {
            name: (round_sum(whole, place_of(name, numerics)) if is_matrix(name) else whole,)
            for name, whole in sums.items()
            if name not in (TOKENS, POSITIONS, HEAD)
        }
        grads["wte"] = (sums[TOKENS],)
        d_head = round_sum(sums[HEAD], numerics.lm_head)
        grads[shape.head] = (d_head[:, : shape.vocabulary], *grads.get(shape.head, ()))
        if "wpe" in self.parameters:
            grads["wpe"] = (sums[POSITIONS],)
        return grads

    def _head_parts(
        self, tokens: int, rows: int, head: Precision, multiple: int
    ) -> Iterator[tuple[slice, Precision, int]]:
        """(tokens of this rank, the LM head's precision, where a chunk begins among all tokens) of each chunk of logits."""
        if head.plan is None:  # nothing depends on where they are cut
            for _, s in chunks(1, tokens, rows):
                yield s, of_runs(head, slice(0, 1)), 0
            return
        parts = head_parts(tokens, rows, self.ranks.rank, self.ranks.count, multiple)
        assert parts is not None
        of = of_runs(head, slice(0, 1))
        if parts == [slice(0, tokens * self.ranks.count)]:
            yield slice(0, tokens), of, 0
            return
        first = self.ranks.rank * tokens
        for s in parts:  # a tensor of its own, all of it here
            yield slice(s.start - first, s.stop - first), of._replace(share=Share(1)), s.start

    def _head(self, x: Tensor, targets: Tensor, numerics: Numerics) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        """`head_over_chunks` with all tokens' divisor: sums of losses [1], dx, this rank's part of dW in FP32, amaxes [1, 2]."""
        shape, w, head = self.program.shape, self.operands[self.program.shape.head], numerics.lm_head
        dx, losses = torch.empty_like(x), x.new_zeros(1, dtype=torch.promote_types(x.dtype, torch.float32))
        dw: Tensor | None = None
        amaxes = None if head.scales is None else x.new_zeros(1, 2, dtype=torch.float32)
        for s, precision, start in self._head_parts(x.shape[1], parts_of(w)[0].shape[1], head, BLOCKS_OF_TOKENS):
            of = precision if precision.seed is None else precision._replace(seed=precision.seed + start)
            loss, dx_part, part, amax = self._pieces.head(
                x[:, s],
                w,
                targets[:, s],
                of,
                shape.vocabulary,
                self._tokens,
                False,
                numerics.kernels,
                None,
                shape.readout,
                self.scale,
            )
            losses += loss
            dx[:, s] = dx_part
            dw = part if dw is None else dw.add_(part)
            if amaxes is not None and amax is not None:
                amaxes = torch.maximum(amaxes, amax)
        assert dw is not None
        return losses, dx, dw, amaxes

    def _head_chunks(self, tokens: int, rows: int, head: Precision) -> Iterator[tuple[slice, slice, Precision]]:
        for s, precision, _ in self._head_parts(tokens, rows, head, 1):
            yield slice(0, 1), s, precision

    def _summed(self, sums: Tensor, tokens: int) -> int:
        self.ranks.sum(sums)
        return tokens * self.ranks.count

    def _all_small(self, small: Tensor) -> Tensor:
        wild = (~small).to(torch.int32)
        return self.ranks.sum(wild) == 0

    def load(self, saved: Mapping[str, Tensor]) -> None:
        """`Pack.load` on every rank at once: what `saved` has is asked for name by name, in one order."""
        names = sorted(saved)
        made = int(saved["counter"]) if "counter" in saved else -1
        recipes = self._recipes_at(made)
        if recipes != self._recipes_at(self.made):
            self._begin(recipes)
        state = self.own_state()
        like = saved.like if isinstance(saved, Spread) else saved
        wrong = sorted(set(state) ^ set(names))
        wrong += [name for name in names if name in state and not self._is_whole(name, state[name], like[name])]
        if wrong or not 0 <= made <= self.program.steps:
            self._begin(self._recipes_at(self.made))
            raise ValueError(f"not a state of this program: {', '.join(wrong[:3]) or f'{made} steps'}")
        for name in names:
            self._put(name, state[name], saved[name])
        self.made = made

    def own_state(self) -> dict[str, Tensor]:
        """What this rank has of `state`, by the same names."""
        return Pack.state(self)

    def _is_whole(self, name: str, mine: Tensor, whole: Tensor) -> bool:  # noqa: ARG002
        """Whether a tensor of a state is that of which this rank has `mine`."""
        return mine.shape == whole.shape and mine.dtype == whole.dtype

    def _put(self, name: str, mine: Tensor, whole: Tensor) -> None:  # noqa: ARG002
        mine.copy_(whole)

    def _on_all(self) -> list[Tensor]:
        """The weights that every rank has."""
        return [p.detach() for p in self.parameters.values()]

    def check_alike(self) -> None:
        """RuntimeError where ranks no longer hold the same weights, which all of their steps keep the same."""
        if not self.ranks.alike(self._on_all()):
            raise RuntimeError(
                f"after step {self.made} the ranks hold different weights: a sum over ranks was not the same on all"
            )
