"""Other people's quantisers, each called in the few lines that its users write: what `verification.adapters` lists.

Every function here makes a quantiser: of a format, by our name, and a rounding, by ours too, from a tensor or array of values to
one of values, or to codes. A library is imported when one is made, never before; ValueError, in one line, where it can't be. None
of them mends what a library does, or chooses other than its users' defaults: the harness finds out what they do.

An element quantiser is given one axis. A block quantiser is given [B, n], each row a block, and gives values of that shape, or
codes: (elements [B, n], one uint8 each, scales [B, 1] as uint8 codes or FP32 values, and for NVFP4 the tensor's FP32 scale).
"""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

import torch

from formats import element_format, encode_scaled, numpy_dtype, quantize, quantize_scaled, torch_dtype
from formats.bits import encode
from formats.scaled import is_scaled_name

Quantizer = Callable[[Any], Any]
EVEN = "nearest_even"


def library(module: str, mend: str) -> Any:
    """The module. ValueError, with the mend, where it can't be imported, whatever the reason."""
    try:
        return import_module(module)
    except Exception as error:  # a library that builds itself while it is imported fails in many ways
        reason = (str(error).splitlines() or [""])[0]
        raise ValueError(f"{module} can't be imported ({type(error).__name__}: {reason}); {mend}") from None


# Ours.
def of_exmy(name: str, rounding: str = EVEN) -> Quantizer:
    """To values."""
    if is_scaled_name(name):
        return lambda x: quantize_scaled(x, name, rounding=rounding)
    return lambda x: quantize(x, name, rounding)


def of_exmy_compiled(name: str, rounding: str = EVEN) -> Quantizer:
    """The same through Inductor."""
    torch._dynamo.reset()
    return torch.compile(of_exmy(name, rounding), dynamic=True)


def codes_of_exmy(name: str, rounding: str = EVEN) -> Quantizer:
    """To codes."""

    def encode_blocks(x: Any) -> Any:
        found = encode_scaled(x, name, rounding=rounding)
        scales = found.scales.expand(len(x), 1)
        return (found.elements, scales) if found.tensor_scale is None else (found.elements, scales, found.tensor_scale)

    return encode_blocks if is_scaled_name(name) else lambda x: encode(x, name, rounding)


# torch and ml_dtypes.
def of_torch(name: str, rounding: str = EVEN) -> Quantizer:  # noqa: ARG001
    """Its cast, on whatever device the tensor is."""
    dtype = torch_dtype(name)
    return lambda x: x.to(dtype).to(x.dtype)


def of_torch_compiled(name: str, rounding: str = EVEN) -> Quantizer:
    """The same through Inductor."""
    torch._dynamo.reset()
    return torch.compile(of_torch(name, rounding), dynamic=True)


def of_ml_dtypes(name: str, rounding: str = EVEN) -> Quantizer:  # noqa: ARG001
    """Its cast."""
    dtype = numpy_dtype(name)
    return lambda x: x.astype(dtype).astype(x.dtype)


# gfloat.
OF_GFLOAT = {
    "e4m3fn": "ocp_e4m3", "e5m2": "ocp_e5m2", "e2m1fn": "ocp_e2m1", "e2m3fn": "ocp_e2m3", "e3m2fn": "ocp_e3m2",
    "e8m0fnu": "ocp_e8m0", "int8q6": "ocp_int8", "fp16": "binary16", "bf16": "bfloat16",
}  # fmt: skip
MX_OF_GFLOAT = {
    "mxfp8_e4m3fn": "mxfp8_e4m3", "mxfp8_e5m2": "mxfp8_e5m2", "mxfp6_e3m2fn": "mxfp6_e3m2", "mxfp6_e2m3fn": "mxfp6_e2m3",
    "mxfp4": "mxfp4_e2m1", "mxint8": "mxint8",
}  # fmt: skip
GFLOAT_MODES = {
    "nearest_even": "TiesToEven", "nearest_away": "TiesToAway", "toward_zero": "TowardZero",
    "toward_positive": "TowardPositive", "toward_negative": "TowardNegative",
}  # fmt: skip
P3109 = re.compile(r"binary(?P<k>\d+)p(?P<p>\d+)(?P<sign>[su])(?P<domain>[ef])")
P3109_FORMATS = (
    *(f"binary8p{p}se" for p in range(1, 8)), "binary8p3sf", "binary8p4sf", "binary8p3ue", "binary8p4ue", "binary8p3uf",
    "binary6p3se", "binary6p3sf", "binary4p2sf",
)  # fmt: skip


def of_gfloat(name: str, rounding: str = EVEN) -> Quantizer:
    """round_ndarray, in FP64 as its own examples; a row at a time with quantize_block."""
    gfloat = library("gfloat", "pip install gfloat")
    known, types = import_module("gfloat.formats"), import_module("gfloat.types")
    mode = gfloat.RoundMode[GFLOAT_MODES[rounding]]
    if name in MX_OF_GFLOAT:
        block = import_module("gfloat.block")
        info = getattr(known, f"format_info_{MX_OF_GFLOAT[name]}")

        def quantize_rows(x: Any) -> Any:
            rows = [block.quantize_block(info, row, block.compute_scale_amax, mode) for row in x]
            return import_module("numpy").stack(rows).astype(x.dtype)

        return quantize_rows
    match = P3109.fullmatch(name)
    if match:
        signedness = types.Signedness.Signed if match["sign"] == "s" else types.Signedness.Unsigned
        domain = types.Domain.Extended if match["domain"] == "e" else types.Domain.Finite
        info = known.format_info_p3109(int(match["k"]), int(match["p"]), signedness, domain)
    else:
        info = getattr(known, f"format_info_{OF_GFLOAT[name]}")
    f = element_format(name)
    saturates = not (f.has_inf or f.has_nan)  # it raises where an infinity has nowhere to go
    return lambda x: gfloat.round_ndarray(info, x.astype("float64"), mode, saturates).astype(x.dtype)


# pychop.
OF_PYCHOP = {"e5m2": (5, 2), "e4m3": (4, 3), "e3m4": (3, 4), "bf16": (8, 7), "fp16": (5, 10), "tf32": (8, 10)}
PYCHOP_MODES = {
    "nearest_even": 1, "toward_positive": 2, "toward_negative": 3, "toward_zero": 4, "nearest_away": 8, "to_odd": 9,
}  # fmt: skip
OF_FAULTCHOP = {"e4m3": "fp8-e4m3", "e5m2": "fp8-e5m2", "fp16": "half", "bf16": "bfloat16"}
MX_OF_PYCHOP = MX_OF_GFLOAT
P3109_MODES = (EVEN, "nearest_away", "toward_zero", "toward_positive", "toward_negative", "to_odd")


def of_pychop(name: str, rounding: str = EVEN) -> Quantizer:
    """Chop(exponent bits, fraction bits), and mx_quantize; they go by what they are given, tensor or array."""
    pychop = library("pychop", "pip install pychop")
    if name in MX_OF_PYCHOP:
        return lambda x: pychop.mx_quantize(x, format=MX_OF_PYCHOP[name])
    chop: Quantizer = pychop.Chop(*OF_PYCHOP[name], rmode=PYCHOP_MODES[rounding])
    return chop


def of_faultchop(name: str, rounding: str = EVEN) -> Quantizer:
    """FaultChop, its other class, without faults."""
    pychop = library("pychop", "pip install pychop")
    chop: Quantizer = pychop.FaultChop(OF_FAULTCHOP[name], rmode=PYCHOP_MODES[rounding])
    return chop


def of_pychops_p3109(name: str, rounding: str = EVEN) -> Quantizer:
    """p3109_quantize, which does not saturate unless it is asked to."""
    pychop = library("pychop", "pip install pychop")
    match = P3109.fullmatch(name)
    if match is None:
        raise ValueError(f"{name} is no P3109 format; binary8p4se is one")
    domain = "extended" if match["domain"] == "e" else "finite"
    f = pychop.P3109Format(int(match["k"]), int(match["p"]), match["sign"] == "s", domain)
    return lambda x: pychop.p3109_quantize(x, f, rounding=rounding)


# qtorch (QPyTorch). It keeps no exponent for infinity and NaN, and has one nearest rounding, "nearest".
OF_QTORCH = {
    "e5m2f": (5, 2), "e4m3f": (4, 3), "e3m4f": (3, 4), "e3m2fn": (3, 2), "e2m3fn": (2, 3), "e2m1fn": (2, 1), "e5m10f": (5, 10),
    "bf16": (8, 7),
}  # fmt: skip
INTEGERS_OF_QTORCH = {"int8": (8, 0), "int4": (4, 0), "int8q6": (8, 6)}
BLOCKS_OF_QTORCH = {"int8q6@row:e8m0fnu": 8, "int4q2@row:e8m0fnu": 4}


def of_qtorch(name: str, rounding: str = EVEN) -> Quantizer:  # noqa: ARG001
    """float_quantize, fixed_point_quantize, and block_quantize with an exponent for each row."""
    mend = "pip install qtorch ninja; it compiles itself while it is imported: put ninja, g++ and, for CUDA, nvcc on the PATH"
    path = os.environ.get("PATH", "")
    os.environ["PATH"] = (
        f"{Path(sys.executable).parent}{os.pathsep}{path}"  # ninja is beside the Python that it came with
    )
    try:
        quant = library("qtorch.quant", mend)
    finally:
        os.environ["PATH"] = path
    if name in BLOCKS_OF_QTORCH:
        return lambda x: quant.block_quantize(x, BLOCKS_OF_QTORCH[name], dim=0, rounding="nearest")
    if name in INTEGERS_OF_QTORCH:
        return lambda x: quant.fixed_point_quantize(x, *INTEGERS_OF_QTORCH[name], rounding="nearest")
    return lambda x: quant.float_quantize(x, *OF_QTORCH[name], rounding="nearest")


# torchao.
TORCHAO_MEND = "pip install torchao"
MX_OF_TORCHAO = {
    "mxfp8_e4m3fn": torch.float8_e4m3fn, "mxfp8_e5m2": torch.float8_e5m2, "mxfp6_e2m3fn": "fp6_e2m3", "mxfp6_e3m2fn": "fp6_e3m2",
    "mxfp4": torch.float4_e2m1fn_x2,
}  # fmt: skip
KERNELS_OF_TORCHAO = {"e2m1fn": "f4", "e2m3fn": "f6_e2m3", "e3m2fn": "f6_e3m2"}
FP8_OF_TORCHAO = ("e4m3fn@row", "e5m2@row", "e4m3fn@tensor", "e5m2@tensor")


def codes_of_torchao(name: str, rounding: str = EVEN) -> Quantizer:  # noqa: ARG001
    """to_mx with the rule that the format's name ends in, nvfp4_quantize, Float8Tensor; and its kernels for FP4 and FP6."""
    base, _, rule = name.partition(":")
    kernels = library("torchao.prototype.mx_formats.kernels", TORCHAO_MEND)
    if name in KERNELS_OF_TORCHAO:
        kernel: Quantizer = getattr(kernels, f"f32_to_{KERNELS_OF_TORCHAO[name]}_unpacked")
        return kernel
    if base in MX_OF_TORCHAO:
        mx = import_module("torchao.prototype.mx_formats.mx_tensor")

        def mx_codes(x: Any) -> Any:
            scales, elements = mx.to_mx(x, MX_OF_TORCHAO[base], 32, mx.ScaleCalculationMode(rule or "floor"))
            elements = kernels.unpack_uint4(elements) if base == "mxfp4" else elements
            return elements.view(torch.uint8).reshape(x.shape), scales.view(torch.uint8)

        return mx_codes
    if name == "nvfp4":
        nvfp4 = import_module("torchao.prototype.mx_formats.nvfp4_tensor")

        def nvfp4_codes(x: Any) -> Any:
            of_tensor = nvfp4.per_tensor_amax_to_scale(x.abs().max())
            scales, elements = nvfp4.nvfp4_quantize(x, 16, of_tensor)
            return kernels.unpack_uint4(elements).reshape(x.shape), scales.view(torch.uint8), of_tensor

        return nvfp4_codes

    def fp8_codes(x: Any) -> Any:
        found = _float8(name, x)
        return found.qdata.view(torch.uint8), found.scale.expand(len(x), 1)

    return fp8_codes


def of_torchao(name: str, rounding: str = EVEN) -> Quantizer:  # noqa: ARG001
    """Its tensors, and back to values."""
    if name in MX_OF_TORCHAO:
        mx = library("torchao.prototype.mx_formats.mx_tensor", TORCHAO_MEND)
        return lambda x: mx.MXTensor.to_mx(x, MX_OF_TORCHAO[name], 32).dequantize(x.dtype)
    if name == "nvfp4":
        nvfp4 = library("torchao.prototype.mx_formats.nvfp4_tensor", TORCHAO_MEND)
        scale: Quantizer = nvfp4.per_tensor_amax_to_scale
        return lambda x: nvfp4.NVFP4Tensor.to_nvfp4(x, per_tensor_scale=scale(x.abs().max())).dequantize(x.dtype)
    library("torchao", TORCHAO_MEND)
    return lambda x: _float8(name, x).dequantize(x.dtype)


def of_torchaos_training(name: str, rounding: str = EVEN) -> Quantizer:  # noqa: ARG001
    """hp_tensor_to_float8_dynamic, as Float8Linear has it, which multiplies by the largest value over amax."""
    element, _, group = name.partition("@")
    scaling = library("torchao.float8.float8_scaling_utils", TORCHAO_MEND)
    granularity, axis = ("TENSORWISE", None) if group == "tensor" else ("AXISWISE", -1)

    def quantize_fp8(x: Any) -> Any:
        found = scaling.hp_tensor_to_float8_dynamic(
            x, torch_dtype(element), scaling.LinearMMConfig(),
            scaling_granularity=scaling.ScalingGranularity[granularity], axiswise_dim=axis,
        )  # fmt: skip
        return found.to_original_precision()

    return quantize_fp8


def _float8(name: str, x: Any) -> Any:
    element, _, group = name.partition("@")
    known = import_module("torchao.quantization")
    granularity = known.PerTensor() if group == "tensor" else known.PerRow()
    return known.Float8Tensor.from_hp(x, torch_dtype(element), granularity)


# microxcaling, which is no package: its folder `mx` lies in a checkout that the environment variable MICROXCALING names.
OF_MICROXCALING = {
    "e4m3fn": "fp8_e4m3", "e5m2": "fp8_e5m2", "e3m2fn": "fp6_e3m2", "e2m3fn": "fp6_e2m3", "e2m1fn": "fp4_e2m1",
    "fp16": "float16", "bf16": "bfloat16", "int8q6": "int8", "int4q2": "int4",
}  # fmt: skip
MX_OF_MICROXCALING = {
    "mxfp8_e4m3fn": "fp8_e4m3", "mxfp8_e5m2": "fp8_e5m2", "mxfp6_e3m2fn": "fp6_e3m2", "mxfp6_e2m3fn": "fp6_e2m3",
    "mxfp4": "fp4_e2m1", "mxint8": "int8",
}  # fmt: skip
MICROXCALING_MODES = {"nearest_away": "nearest", "nearest_even": "even", "toward_zero": "floor"}


def of_microxcaling(name: str, rounding: str = EVEN) -> Quantizer:
    """_quantize_mx and _quantize_elemwise, in PyTorch and not by its own CUDA; "nearest" is its users' default."""
    mode = MICROXCALING_MODES[rounding]
    if name in MX_OF_MICROXCALING:
        quantize_mx = _of_checkout("mx.mx_ops")._quantize_mx
        return lambda x: quantize_mx(x, 8, MX_OF_MICROXCALING[name], axes=[-1], block_size=32, round=mode)
    quantize_element = _of_checkout("mx.elemwise_ops")._quantize_elemwise
    return lambda x: quantize_element(x, OF_MICROXCALING[name], round=mode)


def _of_checkout(module: str) -> Any:
    place = os.environ.get("MICROXCALING", "")
    sys.path.insert(0, place)
    try:
        return library(module, "set MICROXCALING to a checkout of https://github.com/microsoft/microxcaling")
    finally:
        sys.path.remove(place)


# Transformer Engine. Written after its own tests, and never run: there is no build of it here.
OF_TRANSFORMER_ENGINE = {
    "e4m3fn@tensor": "Float8CurrentScalingQuantizer", "e5m2@tensor": "Float8CurrentScalingQuantizer",
    "mxfp8_e4m3fn:rceil": "MXFP8Quantizer", "mxfp8_e5m2:rceil": "MXFP8Quantizer", "nvfp4": "NVFP4Quantizer",
}  # fmt: skip


def of_transformer_engine(name: str, rounding: str = EVEN) -> Quantizer:  # noqa: ARG001
    """Its quantizers and their tensors' dequantize(); blocks are padded with rows of zeros to the 32 that its kernels ask for."""
    engine = library("transformer_engine.pytorch", "pip install transformer_engine[pytorch], on a machine with CUDA")
    dtypes = import_module("transformer_engine.pytorch.constants").TE_DType
    element = dtypes[torch.float8_e5m2 if "e5m2" in name else torch.float8_e4m3fn]
    kind = getattr(engine, OF_TRANSFORMER_ENGINE[name])
    settings = {} if name == "nvfp4" else {"fp8_dtype": element}
    quantizer = kind(**settings, **({"device": "cuda"} if name.endswith("@tensor") else {}))

    def quantize_padded(x: Any) -> Any:
        padded = torch.nn.functional.pad(x, (0, -x.shape[-1] % 32, 0, -len(x) % 32))
        return quantizer(padded).dequantize(dtype=x.dtype)[: len(x), : x.shape[-1]]

    return quantize_padded
