"""One rank of the tests: trains every case with the others, and writes what it holds in the end.

    RANK=0 WORLD_SIZE=2 MASTER_ADDR=... MASTER_PORT=... python -m tests.wide_worker OUT
"""

from __future__ import annotations

import sys
from pathlib import Path

import safetensors.torch
import torch
from torch import Tensor

from tests.conftest import make_text
from tests.wide_cases import CASES, CPU, setting, trained
from train.ranks import Ranks, Spread, joined
from train.text import Text
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
                found = trained(pack)
                pack.check_alike()
                content = {key: t.contiguous() for key, t in found.items()}
                safetensors.torch.save_file(content, out / f"{name}.{way}.{ranks.rank}.safetensors")
                if not case.stopped:
                    continue
                again = resumed(ranks, way, name, text)
                safetensors.torch.save_file(again, out / f"{name}.{way}.{ranks.rank}.again.safetensors")


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
