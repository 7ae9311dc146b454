"""Where the time of a step goes, beside the least that it could take: `python -m benchmarks.profile_steps gpt2-124m fp8-hybrid`.

Least times: bytes at the rate of a copy, products at that of a large BF16 product or of their own operands' bytes, whichever
takes longer, both rates measured in the same process; each tensor is read and written as often as the step's own pieces have
to. A card that is held to its power slows down in one large product after another, so a step whose passes let it rest can
beat that rate.

A recipe with scales has to know a tensor before it can round it, so each activation and gradient is read again, and written once
for each product that takes it otherwise: that is the least of its rounding, if the amaxes cost nothing.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Mapping

import torch
from rich.console import Console
from rich.table import Table
from torch.profiler import ProfilerActivity, profile

from benchmarks.test_packs import CASES, DEVICE, PACKS, Case, make_pack, median_seconds
from benchmarks.test_recipes import make
from formats import ScaledFormat
from train.determinism import deterministic
from train.precision import make_plan
from train.products import serves_both
from train.resolve import resolve_recipe
from train.weights import padded_vocabulary

KINDS = {
    "products with factors": r"_scaled_matmul|_sum_parts",
    "products": r"nvjet|gemm|cutlass|splitK",
    "operands by kernel": r"_take_kernel",
    "amaxes": r"_amax_kernel",
    "attention": r"_attention_",
    "norms, forward": r"native_layer_norm",
    "norms, backward": r"_norm_backward|reduce_kernel",
    "GELU": r"gelu",
    "head: losses and gradients": r"_cross_entropy",
    "update, operands": r"lerp",
    "gradient norms": r"pow_sum",
    "embeddings": r"_embedding_gradient|[rR]adix|index|searchsorted|unbind|arange",
    "rounding of other operands": r"triton_poi.*bitwise",
}


def kind_of(kernel: str) -> str:
    """The first kind whose pattern the kernel's name has."""
    return next((kind for kind, pattern in KINDS.items() if re.search(pattern, kernel)), "other")


def least_seconds(case: Case, recipe: str, flops: float, bytes_per_second: float) -> dict[str, float]:
    """The least time of each kind for a step of the pack, in seconds, from the card's two rates: of GPT-2's shape, in a recipe
    that rounds all blocks alike and leaves the LM head in BF16.
    """
    linear = resolve_recipe(PACKS.get(recipe, (recipe,))[0]).body
    plan = None if linear.structure.rules is None else make_plan(linear.structure.rules)
    shape, R = case.shape, case.runs
    S, D, L, V = case.sequences * shape.context, shape.width, shape.layers, padded_vocabulary(shape.vocabulary)
    E, matrices = R * S * D, R * 12 * L * D * D

    def product(inputs: int, outputs: int) -> float:
        """Forward and both backward products of a linear layer, for all runs: each as slow as its operations or its bytes."""
        elements = R * (S * inputs + S * outputs + inputs * outputs)
        return 3 * max(2 * R * S * inputs * outputs / flops, 2 * elements / bytes_per_second)

    products = L * (product(D, 3 * D) + product(D, D) + 2 * product(D, 4 * D)) + product(D, V)
    # Two products forward and five backward, the future left out.
    attention = max(7 * E * shape.context / flops, E * ((6 + 2) + (6 + 2 + 2 + 6)) / bytes_per_second)
    moved = {
        # The stream is FP32, 4 bytes an element, all else BF16, 2.
        "norms, forward": E * ((4 + 2) + (2 * L - 1) * (4 + 2 + 4 + 2) + (4 + 2 + 2)),
        "norms, backward": E * ((2 + 4 + 4 + 4) + (2 * L - 1) * (2 + 4 + 4 + 4 + 2) + (2 + 4 + 4 + 2)),
        "GELU": L * 4 * E * ((2 + 2) + (2 + 2 + 2)),
        "head: losses and gradients": R * S * V * (2 + 2),
        # Weight and two moments in and out, the gradient in, the operand out; the embedding has a second gradient, in FP32.
        "update, operands": matrices * (24 + 2 + 2) + R * V * D * (24 + 2 + 4 + 2),
        "gradient norms": matrices * 2 + R * V * D * (2 + 4),
        "embeddings": 4 * E + 4 * E + 4 * R * V * D + 4 * E,
        "rounding of other operands": L * E * ((2 + 2) + (6 + 6))
        if plan is None and linear.structure.native is None
        else 0,
    }
    if plan is not None:  # 7 E of activations and 9 E of gradients, in and out; a second operand of weights too
        written = [1 if serves_both(plan, role) else 2 for role in range(3)]
        moved["operands by kernel"] = L * E * (7 * (2 + 2 * written[0]) + 9 * (2 + 2 * written[2]))
        moved["update, operands"] += matrices * 2 * (written[1] - 1)
    least = {kind: amount / bytes_per_second for kind, amount in moved.items()}
    rules = linear.structure.rules
    with_factors = rules is not None and any(_has_factor(rule.scaled) for _, _, rule in rules.items())
    head = product(D, V)
    least["products with factors"] = products - head if with_factors else 0.0
    return {"products": head if with_factors else products, "attention": L * attention} | least


def _has_factor(f: ScaledFormat | None) -> bool:
    return f is not None and (f.scale == "fp32" or f.takes_tensor_scale)


def measured_milliseconds(case: Case, recipe: str, steps: int = 3) -> tuple[dict[str, float], float]:
    """Milliseconds of a step by kind, from the profiler's kernels, and of a replayed step as a whole."""
    pack = make_pack(case, PACKS[recipe]) if recipe in PACKS else make(recipe, case)

    def some_steps() -> None:
        for _ in range(10):
            pack.step()
        torch.cuda.synchronize()

    whole = 1e3 * median_seconds(some_steps, 10) / 10
    with deterministic(pack.tf32), profile(activities=[ProfilerActivity.CUDA]) as profiled:
        for _ in range(steps):
            pack._train()
        torch.cuda.synchronize()
    kinds: dict[str, float] = {}
    for event in profiled.events():
        if event.device_type.name == "CUDA":
            kind = kind_of(event.name)
            kinds[kind] = kinds.get(kind, 0.0) + event.self_device_time_total / 1e3 / steps
    return kinds, whole


def ceilings() -> tuple[float, float]:
    """FLOP/s of an 8192-cubed BF16 product and bytes/s of a copy, read and written; medians."""
    a, b = (torch.randn(8192, 8192, device=DEVICE, dtype=torch.bfloat16) for _ in range(2))
    x = torch.randint(0, 255, (2**30,), device=DEVICE, dtype=torch.uint8)
    y = torch.empty_like(x)

    def multiply() -> None:
        for _ in range(10):
            a @ b
        torch.cuda.synchronize()

    def copy() -> None:
        y.copy_(x)
        torch.cuda.synchronize()

    return 10 * 2 * 8192**3 / median_seconds(multiply, 20), 2 * 2**30 / median_seconds(copy, 20)


def table(title: str, measured: Mapping[str, float], least: Mapping[str, float]) -> Table:
    """Milliseconds a step: measured, least, and their difference."""
    shown = Table(title=title)
    for heading in ("kind", "ms", "least ms", "between"):
        shown.add_column(heading, justify="left" if heading == "kind" else "right")
    for kind in [*KINDS, "other"]:
        ms, floor = measured.get(kind, 0.0), 1e3 * least.get(kind, 0.0)
        shown.add_row(kind, f"{ms:.2f}", f"{floor:.2f}", f"{ms - floor:.2f}")
    total, floor = sum(measured.values()), 1e3 * sum(least.values())
    shown.add_row("all", f"{total:.2f}", f"{floor:.2f}", f"{total - floor:.2f}")
    return shown


def main() -> None:
    """The tables of one case and recipe."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("case", choices=list(CASES))
    parser.add_argument("recipe", nargs="?", default="native-bf16", help="a recipe's name, or mixed")
    arguments = parser.parse_args()
    if DEVICE.type != "cuda":
        parser.error("needs a CUDA device: the kinds are those of kernels")
    flops, rate = ceilings()
    case = CASES[arguments.case]
    measured, whole = measured_milliseconds(case, arguments.recipe)
    least = least_seconds(case, arguments.recipe, flops, rate)
    title = f"{arguments.case}, {arguments.recipe}: {whole:.2f} ms a step; {flops / 1e12:.0f} TFLOP/s, {rate / 1e12:.2f} TB/s"
    Console(width=100).print(table(title, measured, least))


if __name__ == "__main__":
    main()
