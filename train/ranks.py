"""The processes of one torchrun that train one run together: who they are, what they tell each other, and that all are alive.

Tensors go by NCCL on GPUs, by Gloo on CPUs; words and decisions by Gloo between the hosts' processors, which waits for no GPU.
What all must decide alike (go on, write a checkpoint, stop) is decided by the largest vote. Ranks that hold the same weights stay
the same to the bit, since a sum over ranks leaves the same bits on every rank; `alike` looks.

A rank that dies would leave the others waiting for ever. Each tells a key-value store every `BEAT` seconds that it lives, in a
thread of its own; who misses another for `SILENCE` seconds, or whose collective operation breaks off, ends with a line on which
rank is gone, printed by the lowest rank that is left.
"""

from __future__ import annotations

import contextlib
import datetime
import json
import os
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from train.study import StudyError
from train.wide_recipes import Way

BEAT, SILENCE = 1.0, 60.0  # seconds between two signs of life, and without one until a rank counts as dead
PATIENCE = datetime.timedelta(hours=6)  # for texts that rank 0 fetches, and compilers; death is noticed long before
FAILED = 2  # exit status


class RankLostError(RuntimeError):
    """A rank is gone in the middle of the work."""


def launched() -> bool:
    """Whether torchrun started this process as one of several."""
    return "TORCHELASTIC_RUN_ID" in os.environ and int(os.environ.get("WORLD_SIZE", "1")) > 1


def leads() -> bool:
    """Whether this process is torchrun's rank 0, or was not started by it."""
    return not launched() or os.environ.get("RANK", "0") == "0"


def speaks() -> bool:
    """Whether this process says what all ranks of a host find alike: torchrun's first here, or one that it did not start."""
    return not launched() or os.environ.get("LOCAL_RANK", "0") == "0"


def way_of(asked: str | None) -> Way | None:
    """How this process trains a run with others: as asked, "ddp" if not told, None where torchrun started none.

    StudyError where a way is asked for and there is nobody to share with.
    """
    if launched():
        return "fsdp" if asked == "fsdp" else "ddp"
    if asked is not None:
        raise StudyError(
            f"--wide {asked} shares a run among processes, and this is one: start it by torchrun --nproc-per-node 2 -m exmy ..."
        )
    return None


class Ranks:
    """A process among `count`, number `rank`, on `device`."""

    def __init__(self, device: torch.device) -> None:
        self.rank, self.count, self.device = dist.get_rank(), dist.get_world_size(), device
        self._words = dist.group.WORLD if device.type == "cpu" else dist.new_group(backend="gloo", timeout=PATIENCE)

    @property
    def leads(self) -> bool:
        """Whether this is rank 0, which has the study directory."""
        return self.rank == 0

    def tell(self, word: Any = None) -> Any:
        """What rank 0 tells, JSON's, on every rank."""
        content = json.dumps(word).encode() if self.leads else b""
        length = torch.tensor([len(content)])
        dist.broadcast(length, 0, group=self._words)
        raw = (
            torch.frombuffer(bytearray(content), dtype=torch.uint8)
            if self.leads
            else torch.empty(int(length), dtype=torch.uint8)
        )
        dist.broadcast(raw, 0, group=self._words)
        return json.loads(bytes(raw.numpy()))

    def agree(self, votes: Sequence[int]) -> list[int]:
        """The largest of all ranks' votes, one by one."""
        found = torch.tensor(list(votes), dtype=torch.int64)
        dist.all_reduce(found, op=dist.ReduceOp.MAX, group=self._words)
        return [int(vote) for vote in found]

    def sum(self, t: Tensor) -> Tensor:
        """The sum of all ranks' tensors, in place."""
        dist.all_reduce(t)
        return t

    def spread(self, t: Tensor) -> Tensor:
        """Rank 0's tensor, in place."""
        raw = t if t.dtype != torch.bool else t.view(torch.uint8)
        dist.broadcast(raw, 0)
        return t

    def alike(self, tensors: Sequence[Tensor]) -> bool:
        """Whether all ranks hold the same bits."""
        sums = torch.stack([_checksum(t) for t in tensors])
        both = torch.cat([sums, -sums])  # a largest and a smallest
        dist.all_reduce(both, op=dist.ReduceOp.MAX)
        return bool((both[: len(sums)] == -both[len(sums) :]).all())


class Spread(Mapping[str, Tensor]):
    """Rank 0's tensors on every rank, each when it is asked for, by all ranks in one order; `like` tells shapes and dtypes."""

    def __init__(self, ranks: Ranks, tensors: Mapping[str, Tensor] | None) -> None:
        self._ranks, self._tensors = ranks, tensors or {}
        described = ranks.tell(
            {name: [list(t.shape), str(t.dtype).removeprefix("torch.")] for name, t in self._tensors.items()}
        )
        self.like = {
            name: torch.empty(shape, dtype=getattr(torch, dtype), device="meta")
            for name, (shape, dtype) in described.items()
        }

    def __getitem__(self, name: str) -> Tensor:
        like, device = self.like[name], self._ranks.device
        t = self._tensors[name].to(device) if self._ranks.leads else torch.empty_like(like, device=device)
        return self._ranks.spread(t.contiguous())

    def __iter__(self) -> Iterator[str]:
        return iter(self.like)

    def __len__(self) -> int:
        return len(self.like)


def _checksum(t: Tensor) -> Tensor:
    """A number of the tensor's bits, each word by its place, int64."""
    words = (
        t.detach()
        .contiguous()
        .view(torch.int32 if t.element_size() % 4 == 0 else torch.uint8)
        .flatten()
        .to(torch.int64)
    )
    return (words * (torch.arange(words.numel(), device=t.device) % 8191 + 1)).sum()


@contextlib.contextmanager
def joined(device: str = "auto") -> Iterator[Ranks]:
    """The ranks of this torchrun, each with a device of its own: "auto" (CUDA where there is one), "cpu" or "cuda".

    StudyError where a rank has no GPU to itself. Whatever breaks a collective operation ends this process: see `lost`.
    """
    local, gpus = int(os.environ.get("LOCAL_RANK", "0")), torch.cuda.device_count()
    on_gpu = device == "cuda" or (device == "auto" and gpus > 0)
    if on_gpu and local >= gpus:
        raise StudyError(
            f"rank {local} of this host has no GPU: it has {gpus}; start torchrun with --nproc-per-node {gpus}"
        )
    where = torch.device("cuda", local) if on_gpu else torch.device("cpu")
    if on_gpu:
        torch.cuda.set_device(where)
    dist.init_process_group("nccl" if on_gpu else "gloo", timeout=PATIENCE, device_id=where if on_gpu else None)
    watch = Watch(dist.get_rank(), dist.get_world_size())
    try:
        ranks = Ranks(where)
        with watch:
            yield ranks
    except (RuntimeError, RankLostError) as error:
        if not _is_of_ranks(error):
            raise
        watch.lost(f"an operation among ranks broke off ({_first_line(error)})")
    finally:
        with contextlib.suppress(RuntimeError):
            dist.destroy_process_group()


def _is_of_ranks(error: BaseException) -> bool:
    """Whether an error is torch.distributed's: Gloo raises plain RuntimeErrors that say where they come from."""
    words = str(error)
    return isinstance(error, dist.DistError | RankLostError) or any(
        word in words for word in ("gloo", "NCCL", "Connection")
    )


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return (lines[0] if lines else type(error).__name__).rpartition("] ")[2][:120]


class Watch:
    """Tells the others that this rank lives, and notices who does not; a context."""

    def __init__(self, rank: int, count: int) -> None:
        self._rank, self._count = rank, count
        self._store = dist.TCPStore(  # type: ignore[attr-defined]
            os.environ["MASTER_ADDR"],
            int(os.environ["MASTER_PORT"]),
            is_master=False,
            timeout=datetime.timedelta(seconds=SILENCE),
        )
        self._key = (
            f"exmy/{os.environ.get('TORCHELASTIC_RUN_ID', '')}/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}"
        )
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._look, name="exmy-ranks", daemon=True)
        self._seen: dict[int, tuple[bytes, float]] = {}

    def __enter__(self) -> Watch:
        self._beat()
        dist.barrier()
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()

    def _beat(self) -> None:
        self._store.set(f"{self._key}/{self._rank}", str(time.time_ns()))

    def silent(self) -> list[int]:
        """The ranks that have not been heard of for `SILENCE` seconds."""
        now = time.monotonic()
        for rank in set(range(self._count)) - {self._rank}:
            word = self._store.get(f"{self._key}/{rank}")
            if rank not in self._seen or self._seen[rank][0] != word:
                self._seen[rank] = (word, now)
        return [rank for rank, (_, since) in sorted(self._seen.items()) if now - since > SILENCE]

    def _look(self) -> None:
        while not self._stop.wait(BEAT):
            try:
                self._beat()
                if silent := self.silent():
                    self._end(silent, f"no sign of life for {SILENCE:.0f} s")
            except (RuntimeError, dist.DistError):
                if not self._stop.is_set():
                    self.lost("the store that all ranks share is gone")

    def lost(self, why: str) -> None:
        """End this process, with a line on who is gone; for who finds that something among ranks no longer works."""
        self._stop.set()
        self._end(self._gone(), why)

    def _gone(self) -> list[int]:
        """Who gives no sign of life in a few beats; without the store, rank 0, which has it, or torchrun is gone."""
        try:
            before = {rank: self._store.get(f"{self._key}/{rank}") for rank in range(self._count) if rank != self._rank}
            time.sleep(3 * BEAT)
            return [rank for rank, word in before.items() if self._store.get(f"{self._key}/{rank}") == word]
        except (RuntimeError, dist.DistError):
            return [0] if self._rank else []

    def _end(self, gone: Sequence[int], why: str) -> None:
        left = [rank for rank in range(self._count) if rank not in gone]
        if self._rank == left[0]:
            who = f"rank {', '.join(map(str, gone))} of {self._count} is gone" if gone else "a rank is gone"
            print(f"exmy: {who}: {why}. Start again to go on from the last checkpoint", file=sys.stderr, flush=True)
        os._exit(FAILED)
