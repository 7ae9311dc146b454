"""The recipes that have a name: what people really train with, each with what its source says.

Sources were read as papers (2310.18313, 2412.19437 v1, 2509.25149 v1; of 2506.08027 and 2502.20586 the abstracts and the
authors' code) and as the code that is shipped: NVIDIA's Transformer Engine 2.20, torchao 0.19, MS-AMP 0.4, microxcaling,
mxfp4-llm, bitsandbytes. Where ours departs from the source, `departs` says so. All of them leave what they don't name to BF16
products: the LM head among it where the source does.
"""

from __future__ import annotations

from dataclasses import dataclass

from train.recipe_table import ProductTable, RecipeTable


@dataclass(frozen=True)
class Named:
    """A recipe, the sentence that it follows with its source, and what it does otherwise."""

    table: RecipeTable
    follows: str
    departs: str = ""


BF16 = "native-bf16"
HYBRID = RecipeTable("e4m3fn@tensor", "e4m3fn@tensor", "e5m2@tensor", lm_head=BF16)
# Powers of two: amax / largest rounded up, which is MS-AMP's and torchao's multiplier rounded down.
POWER = "e8m0fnu:rceil"
MS_AMP = RecipeTable(
    f"e4m3fn@tensor:{POWER}", f"e4m3fn@tensor:{POWER}", f"e5m2@tensor:{POWER}", weight_gradient=f"e4m3fn@tensor:{POWER}",
    master=f"e5m10@tensor:{POWER}", state_of="linears",
)  # fmt: skip
MXFP4 = "e2m1fn@block32:e8m0fnu:rceil"
NVFP4_WEIGHT = "e2m1fn@tile16x16:e4m3fn"

NAMED: dict[str, Named] = {
    "fp8-hybrid-unscaled": Named(
        RecipeTable("e4m3fn", "e4m3fn", "e5m2", lm_head=BF16),
        "activations and weights in E4M3, gradients in E5M2 (2209.05433, section 4), without any scale",
    ),
    "fp8-hybrid": Named(
        HYBRID,
        "activations and weights cast to E4M3 and gradients to E5M2, each by amax / largest of the tensor being cast "
        "(Transformer Engine, Float8CurrentScaling)",
        "its forward products sum short on Hopper; take accumulate = 'hopper-fp8' for that",
    ),
    "fp8-hybrid-delayed": Named(
        RecipeTable(base="fp8-hybrid", delayed=1024, delayed_rule="max"),
        "as fp8-hybrid, with scales from the largest amax of the last 1,024 steps, margin 0 (Transformer Engine, DelayedScaling)",
        "a weight's scale, too, comes from the steps before",
    ),
    "fp8-hybrid-row": Named(
        RecipeTable("e4m3fn@row", "e4m3fn@row", "e5m2@row", lm_head=BF16),
        "as fp8-hybrid, with a scale for each row of an operand along the axis that its product contracts",
    ),
    "fp8-row": Named(
        RecipeTable(*(f"e4m3fn@row:{POWER}",) * 3, lm_head=BF16),
        "all three operands in E4M3 with a scale a row, rounded to a power of two (torchao float8, rowwise)",
    ),
    "ms-amp-o1": Named(
        MS_AMP,
        "every linear, the LM head too, takes E4M3 activations and weights and E5M2 gradients by power-of-two tensor scales; "
        "weight gradients are kept in E4M3 and weights in FP16 with a scale (2310.18313, section 2; MS-AMP, level O1)",
        "scales are the tensor's own amax, where MS-AMP takes 16 steps' for activations and gradients: set delayed = 16 and "
        "delayed_roles for that",
    ),
    "ms-amp-o2": Named(
        RecipeTable(base="ms-amp-o1", first_moment=f"e4m3fn@tensor:{POWER}", second_moment=f"e5m10@tensor:{POWER}"),
        "as ms-amp-o1, and Adam's first moment in E4M3 and second in FP16, with tensor scales (2310.18313, section 2.2; O2)",
        "as ms-amp-o1",
    ),
    "deepseek": Named(
        RecipeTable(
            "e4m3fn@block128", "e4m3fn@tile128x128", "e4m3fn@block128", lm_head=BF16, first_moment="bf16", second_moment="bf16"
        ),
        "E4M3 everywhere: activations and gradients scaled by 1 x 128 tiles, along tokens for wgrad, weights by 128 x 128; "
        "partial sums scaled and added in FP32 every 128; BF16 moments; embedding, head, norms, attention wider "
        "(2412.19437, sections 3.3.1-3.3.3)",
        "no E5M6 for the input of the projection after attention; sums of 128 in FP32: see deepseek-hopper",
    ),
    "deepseek-hopper": Named(
        RecipeTable(base="deepseek", accumulate="hopper-fp8-promoted"),
        "as deepseek, the sums of 128 formed as Hopper's FP8 units do, 14 bits (2412.19437, section 3.3.2)",
        "no E5M6 for the input of the projection after attention",
    ),
    "mxfp8": Named(
        RecipeTable(*("mxfp8_e4m3fn:rceil",) * 3, lm_head=BF16),
        "all operands of the blocks' linears in MXFP8 E4M3, scales 2^ceil(log2(amax / 448)); attention, embedding and output "
        "projection wider (2506.08027; Transformer Engine, MXFP8BlockScaling)",
    ),
    "mxfp8-floor": Named(
        RecipeTable(*("mxfp8_e4m3fn",) * 3, gains="mxfp8_e4m3fn"),
        "MX by OCP's rule, floor, in every linear and in the norms' gains, which clip as whole blocks: what 2506.20752 blames",
        "the released code of 2506.20752 rounds gains to BF16; here they are rounded as the paper argues",
    ),
    "mxfp6": Named(
        RecipeTable(*("mxfp6_e3m2fn",) * 3, lm_head=BF16),
        "weights, activations and gradients in MXFP6 (2310.10537, abstract), E3M2, scales by OCP MX v1.0's floor",
    ),
    "mxfp4": Named(
        RecipeTable(
            "bf16", "bf16", "bf16",
            dgrad=ProductTable(gradient=MXFP4, weight=MXFP4, rounding="stochastic"),
            wgrad=ProductTable(activation=MXFP4, gradient=MXFP4, rounding="stochastic"),
            hadamard=("dgrad", "wgrad"), hadamard_size=64, hadamard_signs="step", lm_head=BF16,
        ),
        "forward in BF16; both backward products take MXFP4 operands, rotated by a random Hadamard matrix of 64 with new signs "
        "each time and rounded stochastically (2502.20586; mxfp4-llm)",
        "the scale is rounded up, so that nothing clips, where the source shrinks by 3/4 under floor's scale: both are unbiased",
    ),
    "mxfp4-all": Named(
        RecipeTable(*(MXFP4,) * 3, lm_head=BF16),
        "all operands of the blocks' linears in MXFP4 (OCP MX v1.0), to nearest even, without any remedy",
        "scales are rounded up, as for mxfp4",
    ),
    "nvfp4": Named(
        RecipeTable(
            "nvfp4", NVFP4_WEIGHT, "nvfp4", gradient_rounding="stochastic", hadamard=("wgrad",), hadamard_size=16,
            hadamard_signs="fixed", last_blocks=1, kept=BF16, lm_head=BF16,
        ),
        "E2M1 with E4M3 scales for 1 x 16 (weights 16 x 16) under an FP32 tensor scale; gradients rounded stochastically; "
        "wgrad's operands rotated by a Hadamard matrix of 16 with fixed signs; some last layers in BF16 (2509.25149, section 4)",
        "the last block is kept, whatever the depth (the 12B model: 10 of 62); signs are fixed a run, not in the code",
    ),
    "nvfp4-all": Named(
        RecipeTable(base="nvfp4", last_blocks=0),
        "as nvfp4, with every block in NVFP4, which did not converge in 2509.25149's ablations (section 4.1)",
    ),
    "nvfp4-nearest": Named(
        RecipeTable("nvfp4", "nvfp4", "nvfp4", lm_head=BF16),
        "as nvfp4-all, without its remedies: 1 x 16 for weights too, nearest even, no rotation",
    ),
    "int8": Named(
        RecipeTable(*("int8@row",) * 3, lm_head=BF16),
        "all three products on INT8, a scale for each row of the first operand and each column of the second "
        "(torchao, quantized_training, int8_mixed_precision)",
        "scales in FP32, where torchao holds them in the tensor's dtype",
    ),
    "int8-switchback": Named(
        RecipeTable(
            "int8@row", "int8@tensor", "int8@row", wgrad=ProductTable(activation="bf16", gradient="bf16"), lm_head=BF16
        ),
        "forward and dgrad on INT8, rows of activations and gradients and whole weights scaled; wgrad in 16 bits "
        "(SwitchBack, 2304.13013; bitsandbytes)",
    ),
    "native-fp8": Named(
        RecipeTable(base="fp8-hybrid", multiply="fp8"),
        "as fp8-hybrid, by the hardware's own FP8 products (torch._scaled_mm)",
    ),
    "native-fp16-scaled": Named(
        RecipeTable(*("native-fp16",) * 3, output="fp16", loss_scale="dynamic"),
        "FP16 products with a dynamic loss scale, 2^16 at first, halved on overflow, doubled after 2,000 steps "
        "(torch.amp.GradScaler)",
    ),
    "native-bf16-math": Named(
        RecipeTable(*(BF16,) * 3, attention_form="math"),
        "BF16 products, attention written out: scores and weights in BF16, softmax in FP32 (autocast without a fused kernel)",
    ),
}  # fmt: skip

PREFIXES = {
    "masked-": (
        "toward_zero",
        "operands masked: mantissa bits cut off, exponents clipped, no scale, the LM head too (2405.18710; which products it "
        "masks could not be read)",
    ),
    "stochastic-": ("stochastic", "as masked, rounded stochastically: up with the probability of what is cut off"),
}
"""masked-FORMAT and stochastic-FORMAT: every operand in that format, by that rounding; FORMAT alone rounds to nearest even."""


def named_table(name: str) -> RecipeTable | None:
    """The table of a named recipe; None where the name is none."""
    if name in NAMED:
        return NAMED[name].table
    for prefix, (rounding, _) in PREFIXES.items():
        if name.startswith(prefix):
            return RecipeTable(*(name.removeprefix(prefix),) * 3, rounding=rounding)
    return None
