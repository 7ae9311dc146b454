"""FP8 tensor cores against the same products simulated: relative error against K (`python -m benchmarks.tensor_cores`).

Operands are random normal numbers on FP8 grids; the error is ||y - y_exact|| / ||y_exact||, y_exact the FP64 product of the same
operands (of e4m3fn twice it is exact). Compared are `torch._scaled_mm` with scales of one, with and without fast accumulation
(CUDA alone), a BF16 product with FP32 sums, which is what simulating the operands leaves, and simulated sums, `train.accumulate`.
The prefixes of one pair of operands serve all K. Beside the errors: which simulated sums follow the hardware's curve best, how
many outputs they share bit for bit, and what `tensor_core_probes` finds out about the hardware's sums directly.

Libraries cut K in parts where the output has few tiles, and add the parts in FP32. So the hardware's product is made twice, of
M x N alone and as the corner of a larger one padded with zeros, which fills the card; the second is what is simulated.
"""

from __future__ import annotations

import argparse
import json
import platform
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from benchmarks.tensor_core_page import draw, write_page
from benchmarks.tensor_core_probes import Product, probe
from formats import float_format, quantize
from train.accumulate import NAMED, accumulated_product, parse_accumulation
from train.determinism import deterministic
from train.provenance import _git_commit, device_name

OPERANDS = {"e4m3fn x e4m3fn": ("e4m3fn", "e4m3fn"), "e5m2 x e4m3fn": ("e5m2", "e4m3fn")}
DTYPES = {"e4m3fn": torch.float8_e4m3fn, "e5m2": torch.float8_e5m2}
FP32_SUMS = "fp32"
FAST, PROMOTED = "fast accumulation", "no fast accumulation"
ALONE = ", M x N alone"
SMALLEST_K = 32
KEPT = 5  # of the simulated sums, those nearest to a hardware's curve

Run = dict[str, Any]
Outputs = dict[int, Tensor]  # K and its [seeds, M, N]
Way = Callable[[Tensor, Tensor], Tensor]  # of multiplying [seeds, M, K] and [seeds, K, N]


def swept() -> list[str]:
    """The words that are tried: exact chunks of some lengths, widths and roundings, and aligned ones about Hopper's."""
    exact = [
        f"k{k}p{p}:{rounding}"
        for k in (16, 32, 64, 128) for p in range(11, 17) for rounding in ("toward_zero", "nearest_even")
    ]  # fmt: skip
    promoted = [f"k32p{p}f128:toward_zero" for p in (13, 14, 15)]
    aligned = [
        f"k{k}p{p}a{a}{f}:toward_zero"
        for k, p, a in ((16, 14, 13), (64, 14, 13), (32, 13, 12), (32, 15, 14), (32, 24, 13)) for f in ("", "f128")
    ]  # fmt: skip
    return [*NAMED, *exact, *promoted, *aligned]


def operands(
    names: tuple[str, str], seeds: list[int], size: int, K: int, device: torch.device
) -> tuple[Tensor, Tensor]:
    """[seeds, M, K] and [seeds, K, N], FP32 on the grids; drawn on the CPU, so that every device has the same."""
    drawn: list[list[Tensor]] = [[], []]
    for seed in seeds:
        generator = torch.Generator().manual_seed(seed)
        drawn[0].append(torch.randn(size, K, generator=generator))
        drawn[1].append(torch.randn(K, size, generator=generator))
    x, w = (quantize(torch.stack(made), name).to(device) for made, name in zip(drawn, names, strict=True))
    return x, w


class TensorCores(NamedTuple):
    """Where `_scaled_mm` runs, in what its outputs come, and to how many rows and columns products are padded."""

    device: torch.device
    output: torch.dtype
    padded: int


def scaled_mm(x: Tensor, w: Tensor, names: tuple[str, str], fast: bool, cores: TensorCores) -> Tensor:
    """[M, N] in FP32 of x [M, K] and w [K, N] on their grids, as the corner of a product of zeros where that is larger."""
    (M, K), N, device = x.shape, w.shape[1], cores.device
    a = torch.zeros(max(cores.padded, M), K, dtype=DTYPES[names[0]], device=device)
    b = torch.zeros(max(cores.padded, N), K, dtype=DTYPES[names[1]], device=device)
    a[:M], b[:N] = x.to(device).to(a.dtype), w.to(device).T.to(b.dtype)
    one = torch.ones((), device=device)
    y = torch._scaled_mm(a, b.T, scale_a=one, scale_b=one, out_dtype=cores.output, use_fast_accum=fast)
    return y[:M, :N].float()


def tensor_cores(device: torch.device, padded: int) -> TensorCores | None:
    """Those of a CUDA device, with outputs in FP32 where `_scaled_mm` has them, else in BF16."""
    if device.type != "cuda":
        return None
    cores, x = TensorCores(device, torch.float32, padded), torch.ones(16, 32)
    try:
        scaled_mm(x, x.T, ("e4m3fn", "e4m3fn"), True, cores)
    except RuntimeError:
        return cores._replace(output=torch.bfloat16)
    return cores


def ways_of(cores: TensorCores, names: tuple[str, str]) -> dict[str, Way]:
    """The ways of asking the tensor cores."""

    def way(fast: bool, cores: TensorCores) -> Way:
        return lambda x, w: torch.stack([scaled_mm(a, b, names, fast, cores) for a, b in zip(x, w, strict=True)])

    alone = cores._replace(padded=0)
    return {
        FAST: way(True, cores), PROMOTED: way(False, cores), FAST + ALONE: way(True, alone), PROMOTED + ALONE: way(False, alone)
    }  # fmt: skip


def fp32_sums(x: Tensor, w: Tensor) -> Tensor:
    """A BF16 product of operands that BF16 holds, its FP32 sums given out as they are; on a CPU an FP32 product."""
    if x.device.type == "cuda":
        return torch.bmm(x.bfloat16(), w.bfloat16(), out_dtype=torch.float32)
    return torch.bmm(x, w)


def simulated(x: Tensor, w: Tensor, names: tuple[str, str], word: str, Ks: list[int]) -> Iterator[tuple[int, Tensor]]:
    """K and its output for rising K, each going on from the one before where sums may be interrupted there."""
    accumulation = parse_accumulation(word)
    assert accumulation is not None
    x_smallest, w_smallest = (torch.tensor(2.0 ** float_format(name).emin, device=x.device) for name in names)
    done, y = 0, None
    for K in Ks:
        if y is None or done % accumulation.step:
            done, y = 0, None
        y = accumulated_product(x[..., done:K], w[:, done:K], accumulation, x_smallest, w_smallest, y)
        done = K
        yield K, y


def relative_errors(y: Tensor, exact: Tensor) -> list[float]:
    """||y - y_exact|| / ||y_exact|| of each seed, Frobenius norms."""
    errors: list[float] = ((y.double() - exact).flatten(1).norm(dim=1) / exact.flatten(1).norm(dim=1)).tolist()
    return errors


def summary(errors: list[list[float]]) -> dict[str, list[float]]:
    """Median, least and greatest over seeds, for each K."""
    table = torch.tensor(errors, dtype=torch.float64)
    found = {"median": table.quantile(0.5, 1), "min": table.amin(1), "max": table.amax(1)}
    return {name: [float(f"{value:.6g}") for value in values.tolist()] for name, values in found.items()}


def distance(a: list[float], b: list[float]) -> float:
    """The largest |log2| of the ratio of two curves; what is 0 counts as 2^-60."""
    pairs = torch.tensor([a, b], dtype=torch.float64).clamp_min(2.0**-60).log2()
    return float((pairs[0] - pairs[1]).abs().max())


def measure(names: tuple[str, str], words: list[str], options: argparse.Namespace, cores: TensorCores | None) -> Run:
    """The curves of one pair of formats, and for each of the hardware's the simulated sums nearest to it."""
    Ks = [2**n for n in range(SMALLEST_K.bit_length() - 1, options.largest.bit_length()) if 2**n <= options.largest]
    device = torch.device(options.device)
    x, w = operands(names, list(range(options.seeds)), options.size, Ks[-1], device)
    exact = {K: torch.bmm(x[..., :K].double(), w[:, :K].double()) for K in Ks}
    curves = {FP32_SUMS: summary([relative_errors(fp32_sums(x[..., :K], w[:, :K]), exact[K]) for K in Ks])}
    real: dict[str, Outputs] = {}
    failed: dict[str, str] = {}
    for name, way in (ways_of(cores, names) if cores else {}).items():
        try:
            real[name] = {K: way(x[..., :K], w[:, :K]) for K in Ks}
        except RuntimeError as error:  # one way that a library refuses must not cost the others
            failed[name] = str(error).splitlines()[0]
            continue
        curves[name] = summary([relative_errors(real[name][K], exact[K]) for K in Ks])
    shared: dict[str, dict[str, list[float]]] = {name: {} for name in real}
    for word in words:
        made = {K: y.to(cores.output).float() if cores else y for K, y in simulated(x, w, names, word, Ks)}
        curves[word] = summary([relative_errors(made[K], exact[K]) for K in Ks])
        for name, outputs in real.items():
            shared[name][word] = [same_bits(outputs[K], made[K]) for K in Ks]
    return {
        "K": Ks,
        "curves": curves,
        "nearest": {name: nearest(name, curves, words, shared[name]) for name in real},
        "alone_same_bits": {
            name: [same_bits(real[name][K], real[name + ALONE][K]) for K in Ks]
            for name in (FAST, PROMOTED)
            if {name, name + ALONE} <= real.keys()
        },
        "failed": failed,
    }


def same_bits(a: Tensor, b: Tensor) -> float:
    """The share of outputs that are equal."""
    return round(float((a == b).double().mean()), 6)


def nearest(name: str, curves: Run, words: list[str], shared: dict[str, list[float]]) -> list[Run]:
    """The simulated sums whose medians follow a curve best, the best first, each with its share of equal outputs for each K."""
    away = {word: round(distance(curves[word]["median"], curves[name]["median"]), 4) for word in words}
    chosen = sorted(words, key=away.__getitem__)[:KEPT]
    return [{"accumulate": word, "max_log2_ratio": away[word], "same_bits": shared[word]} for word in chosen]


def probed(cores: TensorCores) -> Run:
    """What the tensor cores do to their sums, with and without fast accumulation; a probe that fails says how."""

    def unit(fast: bool) -> Product:
        return lambda a, b: scaled_mm(a, b, ("e4m3fn", "e4m3fn"), fast, cores).cpu()

    found: Run = {}
    for name, fast in ((FAST, True), (PROMOTED, False)):
        try:
            found[name] = probe(unit(fast))
        except Exception as error:  # a card that answers otherwise than thought must not cost the curves
            found[name] = {"accumulate": None, "error": f"{type(error).__name__}: {error}"}
        print(name, json.dumps(found[name]), flush=True)
    return found


def run(options: argparse.Namespace, cores: TensorCores | None) -> Run:
    """Everything, as it is written."""
    began = time.monotonic()
    probes = {} if cores is None else probed(cores)
    found = {answers["accumulate"] for answers in probes.values()} - {None}
    known = {accumulation.name for accumulation in NAMED.values()}
    words = [*swept(), *sorted(found - known - set(swept()))]
    operands_: Run = {}
    for title, names in OPERANDS.items():
        operands_[title] = measure(names, words, options, cores)
        print(f"{title}: {time.monotonic() - began:.0f} s", flush=True)
    return {
        "command": "python -m benchmarks.tensor_cores " + " ".join(Path(word).name for word in sys.argv[1:]),
        "commit": options.commit or _git_commit(),
        "device": device_name(torch.device(options.device)),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "python": platform.python_version(),
        "seconds": round(time.monotonic() - began, 1),
        "seeds": options.seeds,
        "M": options.size,
        "N": options.size,
        "padded": options.padded,
        "output": str(cores.output).removeprefix("torch.") if cores else None,
        "probes": probes,
        "operands": operands_,
    }


def read_options(arguments: list[str]) -> argparse.Namespace:
    """What is asked on the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="the JSON with the results")
    parser.add_argument("--read", action="store_true", help="measure nothing: take --out as it is")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--largest", type=int, default=32768, help="the largest K, from 32 in powers of two")
    parser.add_argument("--size", type=int, default=256, help="M and N")
    parser.add_argument("--padded", type=int, default=2048, help="rows and columns of the larger product")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--commit", help="where the tree has no .git")
    parser.add_argument("--plot", type=Path, help="a PNG")
    parser.add_argument("--page", type=Path, help="a page whose tables are written anew")
    options = parser.parse_args(arguments)
    if options.largest < SMALLEST_K:
        parser.error(f"--largest must be at least {SMALLEST_K}, got {options.largest}")
    return options


def main() -> None:
    """Measure and write, or with --read only read, and draw and tell what was asked."""
    options = read_options(sys.argv[1:])
    if not options.read:
        with deterministic(tf32=False):
            content = run(options, tensor_cores(torch.device(options.device), options.padded))
        options.out.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    content = json.loads(options.out.read_text(encoding="utf-8"))
    if options.plot:
        draw(content, options.plot)
    if options.page:
        write_page(content, options.page)


if __name__ == "__main__":
    main()
