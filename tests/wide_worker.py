"""One rank of the tests: trains every case with the others, and writes what it holds in the end.

RANK=0 WORLD_SIZE=2 MASTER_ADDR=... MASTER_PORT=... python -m tests.wide_worker OUT
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import safetensors.torch
import torch
from torch import Tensor

from tests.conftest import make_text
from tests.wide_cases import CASES, CPU, setting, trained
from train.ranks import Ranks, Spread, joined
from train.text import Text
from train.weights import parts_of
from train.wide_pack import WidePack
from train.wide_study import PACKS


def main() -> None:
    out = Path(sys.argv[1])
    torch.set_num_threads(1)
    text = make_text()
    with joined("cpu") as ranks:
        for name, case in CASES.items():
            for way in case.ways:
                program, slots = setting(name, way)
                pack = PACKS[way](ranks, program, slots, text, CPU)  # type: ignore[index]
                if case.weighed:
                    (out / f"{name}.{way}.{ranks.rank}.json").write_text(json.dumps(held(pack)))
                found = trained(pack)
                pack.check_alike()
                content = {key: t.contiguous() for key, t in found.items()}
                safetensors.torch.save_file(content, out / f"{name}.{way}.{ranks.rank}.safetensors")
                if not case.stopped:
                    continue
                again = resumed(ranks, way, name, text)
                safetensors.torch.save_file(again, out / f"{name}.{way}.{ranks.rank}.again.safetensors")


def held(pack: WidePack) -> dict[str, int]:
    """Bytes of what the pack has, by the names of `wide_memory.Memory`; work is what one forward pass leaves for its backward."""
    kept: dict[int, Tensor] = {}

    def keep(t: Tensor) -> Tensor:
        kept[t.untyped_storage().data_ptr()] = t
        return t

    tokens, targets = pack._pieces.batch(pack.text, pack.offsets[0], pack.program.shape.context)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        pack._hidden(tokens, pack._draws.at(pack.numerics, pack.counter, training=True))
    operands = [t for o in pack.operands.values() for t in parts_of(o)]
    own = {t.untyped_storage().data_ptr() for t in [*pack.parameters.values(), *operands]}
    moments = [t for state in pack.kept.values() for t in (state.first, state.second, state.lost) if t is not None]
    blocks = {id(t): t for t in kept.values() if t.untyped_storage().size()}  # what FSDP gave back is empty
    return {
        "masters": total(list(pack.parameters.values())), "moments": total(moments), "operands": total(operands),
        "gradients": total([part for parts in pack.gradients(tokens, targets)[1].values() for part in parts]),
        "work": sum(t.untyped_storage().size() for t in blocks.values() if t.untyped_storage().data_ptr() not in own),
    }  # fmt: skip


def total(tensors: list[Tensor]) -> int:
    return sum(t.nbytes for t in tensors)


def resumed(ranks: Ranks, way: str, name: str, text: Text) -> dict[str, Tensor]:
    """The same, by a pack that two steps were made of and another that goes on from what rank 0 has of its state."""
    program, slots = setting(name, way)
    first, second = (PACKS[way](ranks, program, slots, text, CPU) for _ in range(2))  # type: ignore[index]
    while first.made < program.steps // 2:
        first.measure()
        first.step()
    whole = {key: t.clone() for key, t in first.state().items()}
    second.load(Spread(ranks, whole if ranks.leads else None))
    return {key: t.contiguous() for key, t in trained(second).items()}


if __name__ == "__main__":
    main()
