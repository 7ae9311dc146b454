"""The compiler's cache: what one process has compiled is found by every other."""

from __future__ import annotations

import copy
import pickle
import sys
import types

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
