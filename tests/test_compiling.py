"""The compiler's cache: what one process has compiled is found by every other."""

from __future__ import annotations

import copy
import pickle
import sys
import types
import warnings
from typing import Any

import pytest
import torch

from train.compiling import compiler

FORMATS = (torch.contiguous_format, torch.channels_last, torch.channels_last_3d, torch.preserve_format)


@pytest.mark.parametrize("memory_format", FORMATS, ids=str)
@pytest.mark.parametrize("protocol", [2, 4, 5])
def test_keys_do_not_tell_which_module_imported_torch_first(
    monkeypatch: pytest.MonkeyPatch, memory_format: torch.memory_format, protocol: int
) -> None:
    """A key of the cache is a hash of pickles, of memory formats among others; pickle searches `sys.modules` in order."""
    compiler()
    here = pickle.dumps(memory_format, protocol)
    script = types.ModuleType("a_script")
    script.torch = torch  # type: ignore[attr-defined]
    monkeypatch.setattr(sys, "modules", {"a_script": script, **sys.modules})
    assert pickle.dumps(memory_format, protocol) == here
    assert pickle.loads(here) is memory_format


def test_memory_formats_are_copied_as_before() -> None:
    compiler()
    assert copy.deepcopy({"order": FORMATS}) == {"order": FORMATS}


def test_advice_on_tf32_is_not_passed_on(recwarn: pytest.WarningsRecorder) -> None:
    """A recipe says which products run in TF32; other warnings, of whoever, still come."""
    compiler()
    where: dict[str, Any] = {"category": UserWarning, "filename": "compile_fx.py", "lineno": 322}
    text = "TensorFloat32 tensor cores for float32 matrix multiplication available but not enabled."
    warnings.warn_explicit(text, module="torch._inductor.compile_fx", **where)
    warnings.warn_explicit("something else", module="torch._inductor.compile_fx", **where)
    warnings.warn_explicit(text, module="elsewhere", **where)
    assert [str(told.message) for told in recwarn] == ["something else", text]
