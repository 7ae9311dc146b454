"""Two processes that share a run against one that has it to itself: the same bits, where both form sums in the same order.

One process forms a sum over 64 tokens in one order, two ranks form two sums over 32 and add them. So the one process here is
watched by `HalvedSums`, which cuts every operation over its tokens in the middle, below all that knows of ranks: products by
rows and by sums, reductions, the embedding's gradient. The engine is untouched. What is left then must be equal to the bit:
scales of whole tensors, histories, random bits, clipping, loss scales, the update.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from tests.wide_cases import CASES, CPU, SHAPE, setting, trained
from train.pack import Pack
from train.program import Program
from train.step import position_gradient
from train.text import Text
from train.wide_memory import memory, parameters_in_blocks

ROOT = Path(__file__).parent.parent
SEQUENCES = 4
TOKENS = SEQUENCES * SHAPE.context
HALVES = (slice(0, TOKENS // 2), slice(TOKENS // 2, TOKENS))
aten = torch.ops.aten


class HalvedSums(TorchDispatchMode):
    """Operations over an axis of all tokens of a step, each half by itself; a product's factors, too, meet each half's sum."""

    def __init__(self) -> None:
        super().__init__()
        self._product, self._halves = torch.empty(0), [torch.empty(0)]

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if function is aten.bmm.default:
            a, b = args
            if a.shape[2] == TOKENS:
                self._halves = [function(a[:, :, half], b[:, half]) for half in HALVES]
                self._product = self._halves[0] + self._halves[1]
                return self._product
            if a.shape[1] == TOKENS:
                return torch.cat([function(a[:, half], b) for half in HALVES], 1)
        if function is aten.mul.Tensor and args[0].data_ptr() == self._product.data_ptr():
            first, second = (function(half.view(args[0].shape), args[1]) for half in self._halves)
            return first + second
        if function is aten.sum.dim_IntList and 1 in args[1] and args[0].shape[1] in (TOKENS, SEQUENCES):
            first, second = (function(half, *args[1:], **kwargs) for half in args[0].chunk(2, 1))
            return first + second
        if function is aten.embedding_dense_backward.default:
            dx, rows, *others = args
            first, second = (function(dx[:, half], rows[:, half], *others) for half in HALVES)
            return first + second
        return function(*args, **kwargs)


def halved_positions(dx: Tensor, T: int) -> Tensor:
    first, second = (position_gradient(dx[:, half], T) for half in HALVES)
    return first + second


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What two ranks left of every case."""
    out = tmp_path_factory.mktemp("ranks")
    ranks = launch(2, [sys.executable, "-m", "tests.wide_worker", str(out)])
    said = [rank.communicate(timeout=300)[0] for rank in ranks]
    assert [rank.returncode for rank in ranks] == [0, 0], "\n".join(said)
    return out


def launch(count: int, command: list[str], **environment: str) -> list[subprocess.Popen[str]]:
    """The command once a rank, as torchrun would start it."""
    variables = os.environ | {
        "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "WORLD_SIZE": str(count), "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(free_port()), "TORCHELASTIC_RUN_ID": "test", **environment,
    }  # fmt: skip
    return [
        subprocess.Popen(
            command, cwd=ROOT, env=variables | {"RANK": str(rank), "LOCAL_RANK": str(rank)}, text=True,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        )
        for rank in range(count)
    ]  # fmt: skip


def free_port() -> int:
    import socket

    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return int(s.getsockname()[1])


def alone(name: str, way: str, text: Text) -> dict[str, Tensor]:
    """A case in one process, sums over its tokens cut in the middle."""
    program, slots = setting(name, way)
    pack = Pack(program, slots, text, CPU)
    pack._pieces.position_gradient = halved_positions
    with HalvedSums():
        return trained(pack)


def left(shared: Path, name: str, way: str, rank: int, again: str = "") -> dict[str, Tensor]:
    return safetensors.torch.load_file(shared / f"{name}.{way}.{rank}{again}.safetensors")


def different(mine: Mapping[str, Tensor], theirs: Mapping[str, Tensor]) -> list[str]:
    names = sorted((mine.keys() | theirs.keys()) - {"tokens"})
    return [
        name
        for name in names
        if name not in mine
        or name not in theirs
        or not torch.equal(mine[name].nan_to_num(-1), theirs[name].nan_to_num(-1))
    ]


@pytest.mark.parametrize("name", [name for name, case in CASES.items() if "ddp" in case.ways])
def test_two_ranks_that_hold_all_weights_have_the_bits_of_one_process(name: str, shared: Path, text: Text) -> None:
    one = alone(name, "ddp", text)
    assert different(left(shared, name, "ddp", 0), one) == []
    assert different(left(shared, name, "ddp", 1), one) == []
    assert one["train_loss"].isfinite().any()


@pytest.mark.parametrize("name", [name for name, case in CASES.items() if "fsdp" in case.ways])
def test_two_ranks_that_hold_half_of_each_block_have_the_bits_of_one_process(
    name: str, shared: Path, text: Text
) -> None:
    one = alone(name, "fsdp", text)
    two = left(shared, name, "fsdp", 0)
    assert [n for n in different(two, one) if "grad_norm" not in n] == []
    torch.testing.assert_close(two["grad_norm"], one["grad_norm"], rtol=1e-6, atol=0, equal_nan=True)


@pytest.mark.parametrize(
    ("name", "way"), [(name, way) for name, case in CASES.items() if case.stopped for way in case.ways]
)
def test_ranks_go_on_from_the_state_that_rank_0_kept(name: str, way: str, shared: Path) -> None:
    for rank in (0, 1):
        assert different(left(shared, name, way, rank, ".again"), left(shared, name, way, rank)) == []


@pytest.mark.parametrize(
    ("name", "way"), [(name, way) for name, case in CASES.items() if case.weighed for way in case.ways]
)
def test_what_a_rank_has_is_what_the_memory_was_worked_out_to_be(name: str, way: Any, shared: Path) -> None:
    """Counted are tensors: masters and moments to the byte, operands but for scales, gradients once they are rounded. What waits
    for the backward pass is within the planner's estimate, and no less than a tenth: that counts an eager step's logits too.
    """
    program, _ = setting(name, way)
    planned = memory(program, 2, way, compiled=False)
    one_gathered = 0 if way == "ddp" else operands_of_a_block(program)
    for rank in (0, 1):
        found = json.loads((shared / f"{name}.{way}.{rank}.json").read_text())
        assert found["masters"] == planned.masters
        assert found["moments"] == planned.moments
        assert 0 <= found["operands"] - (planned.operands - one_gathered) < planned.operands / 64  # scales
        assert planned.gradients / 2 <= found["gradients"] <= planned.gradients
        assert planned.work / 10 < found["work"] < planned.work


def operands_of_a_block(program: Program) -> int:
    """In FP32, an eager step's carrier, gains counted as the estimate does; of recipes that round a weight once."""
    return 4 * parameters_in_blocks(program) // program.shape.layers
