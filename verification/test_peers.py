"""ml_dtypes rounds to nearest even too: the same inside the range (beyond it, it overflows to inf or NaN and we
saturate)."""

import ml_dtypes
import numpy as np
import pytest
import torch

from formats import float_format, quantize
from verification.points import decision_inputs

PEERS = {
    "bf16": ml_dtypes.bfloat16,
    "fp16": np.float16,
    "e5m2": ml_dtypes.float8_e5m2,
    "e4m3": ml_dtypes.float8_e4m3,
    "e4m3fn": ml_dtypes.float8_e4m3fn,
    "e3m4": ml_dtypes.float8_e3m4,
    "e3m2fn": ml_dtypes.float6_e3m2fn,
    "e2m3fn": ml_dtypes.float6_e2m3fn,
    "e2m1fn": ml_dtypes.float4_e2m1fn,
}


@pytest.mark.parametrize("name", PEERS)
def test_same_as_ml_dtypes_in_range(name: str) -> None:
    f = float_format(name)
    x = decision_inputs(f, torch.float32)
    x = x[x.abs() <= f.max]
    random = torch.randn(1 << 16, generator=torch.Generator().manual_seed(0)) * f.max**0.25
    for values in (x, random[random.abs() <= f.max]):
        theirs = values.numpy().astype(PEERS[name]).astype(np.float32)
        np.testing.assert_array_equal(quantize(values, f).numpy().view(np.int32), theirs.view(np.int32))


@pytest.mark.parametrize("name", [name for name, peer in PEERS.items() if np.dtype(peer).itemsize == 1])
def test_same_codes_as_ml_dtypes(name: str) -> None:
    f = float_format(name)
    codes = np.arange(2**f.bits, dtype=np.uint8)
    theirs = codes.view(PEERS[name]).astype(np.float64)
    np.testing.assert_array_equal(f.decode(codes), theirs)
    finite = np.isfinite(theirs)
    np.testing.assert_array_equal(f.encode(theirs[finite]), codes[finite])
