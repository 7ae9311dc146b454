"""Every adapter can be made and called, for each of its formats and roundings, and gives what its fields say.

The inputs are values that any right quantiser keeps: powers of two on the grid; blocks whose amax is the largest element, so that
their scale is a power of two by every rule. What libraries do to anything else, the harness is there to find out.
"""

import subprocess
import sys
from typing import Any

import numpy as np
import pytest
import torch

from formats import FloatFormat, element_format, scaled_format
from formats.bits import decode
from formats.scaled import ScaledFormat, is_scaled_name
from verification import peers
from verification.adapters import Adapter, adapters, known

HERE = adapters()
LIBRARIES = ("ml_dtypes", "gfloat", "pychop", "qtorch", "torchao", "mx", "transformer_engine")


def exact_elements(name: str) -> torch.Tensor:
    f = element_format(name)
    x = np.array([1.0, 0.5, 2.0, -1.0, 0.0])
    x = x if f.signed else x[x > 0]
    return torch.from_numpy(x[f.decode(f.encode(x)) == x])


def exact_blocks(f: ScaledFormat) -> torch.Tensor:
    unit = element_format(f.scale).max if f.has_tensor_scale else 1.0
    x = torch.zeros(2, f.elements_per_scale or 32)
    x[0, :3] = unit * torch.tensor([f.element.max, 1.0, -1.0])
    return torch.stack([x[0], -x[0]])


def called(adapter: Adapter, name: str, rounding: str, x: torch.Tensor) -> Any:
    given = x.numpy() if adapter.takes == "array" else x.to(adapter.device)
    return adapter.make(name, rounding)(given)


def values_of_blocks(answer: Any, f: ScaledFormat, x: torch.Tensor) -> torch.Tensor:
    """The codes, which must have the shapes and dtypes that peers says, as values."""
    elements, scales, *of_tensor = (part.cpu() for part in answer)
    assert elements.shape == x.shape
    assert scales.shape == (len(x), 1)
    assert elements.dtype == torch.uint8
    assert scales.dtype == (torch.float32 if f.scale == "fp32" else torch.uint8)
    assert len(of_tensor) == f.has_tensor_scale
    s = scales if f.scale == "fp32" else decode(scales, f.scale, torch.float32)
    values: torch.Tensor = decode(elements, f.element, torch.float32) * s * (of_tensor[0] if of_tensor else 1.0)
    return values


def is_on_grid(values: torch.Tensor, name: str) -> bool:
    f = element_format(name)
    x = values.double().numpy()
    return bool(np.isfinite(x).all() and (f.decode(f.encode(x)) == x).all())


@pytest.mark.parametrize("name", [adapter.name for adapter in known()])
def test_an_adapter_gives_what_it_says(name: str) -> None:
    if name not in HERE:
        pytest.skip(f"{name}: its library or its device is not here")
    adapter = HERE[name]
    assert adapter.version
    some = (
        adapter.formats[:1] if adapter.make is peers.of_torch_compiled else adapter.formats
    )  # one compilation says it
    for described in some:
        blocks = scaled_format(described) if is_scaled_name(described) else None
        for rounding in adapter.roundings:
            x = exact_blocks(blocks) if blocks else exact_elements(described).float()
            answer = called(adapter, described, rounding, x.clone())
            if adapter.gives == "values":
                got = torch.as_tensor(answer).cpu()
                assert got.shape == x.shape, described
            elif blocks:
                got = values_of_blocks(answer, blocks, x)
            else:
                assert not answer.dtype.is_floating_point, described
                got = decode(answer.cpu(), element_format(described), torch.float32)
            if blocks or rounding == adapter.roundings[0]:
                assert torch.equal(got.float(), x), (described, rounding, got)
            else:
                assert is_on_grid(got, described), (described, rounding, got)


@pytest.mark.parametrize("name", sorted(HERE))
def test_an_adapter_takes_the_dtypes_that_it_lists(name: str) -> None:
    adapter = HERE[name]
    for is_block, dtypes in ((False, adapter.dtypes), (True, adapter.block_dtypes)):
        formats = [found for found in adapter.formats if is_scaled_name(found) == is_block]
        if not formats or adapter.make is peers.of_torch_compiled:
            continue
        described = formats[0]
        for dtype in dtypes:
            x = exact_blocks(scaled_format(described)) if is_block else exact_elements(described)
            answer = called(adapter, described, adapter.roundings[0], x.to(getattr(torch, dtype)))
            first = answer[0] if isinstance(answer, tuple) else answer
            assert tuple(first.shape) == tuple(x.shape), dtype


def test_formats_and_names_are_ones_that_there_are() -> None:
    assert len({adapter.name for adapter in known()}) == len(known())
    for adapter in known():
        assert len(set(adapter.formats)) == len(adapter.formats)
        for described in adapter.formats:
            f = scaled_format(described) if is_scaled_name(described) else element_format(described)
            assert f.name == described or isinstance(f, FloatFormat)


def test_listing_adapters_imports_no_library() -> None:
    asks = "import sys; from verification.adapters import adapters; adapters(); print(*sys.modules)"
    asked = subprocess.run([sys.executable, "-c", asks], capture_output=True, text=True, check=True)
    assert not set(asked.stdout.split()) & set(LIBRARIES)


def test_a_library_that_cannot_be_imported_says_in_one_line_how_to_mend_it(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(module: str) -> None:
        raise RuntimeError(f"{module} is broken\nin many lines")

    monkeypatch.setattr(peers, "import_module", broken)
    for adapter in known():
        if adapter.package not in ("exmy", "torch", "ml_dtypes"):
            with pytest.raises(ValueError, match=r"can't be imported .*; (pip install|set MICROXCALING)") as caught:
                adapter.make(adapter.formats[0])
            assert "\n" not in str(caught.value)
