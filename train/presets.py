"""Models by name: what an architecture's word stands for, and sizes from 0.4M to 124M parameters.

| architecture | norm | MLP | positions | LM head |
|---|---|---|---|---|
| gpt2 | LayerNorm without a bias | GELU, 4 D features | learned | the token embedding |
| llama | RMSNorm | SwiGLU, 8/3 D features | rotary (RoPE) | a matrix of its own |

GPT-2 is Radford et al. 2019 without biases, as nanoGPT trains it; Llama is Touvron et al. 2023 (2302.13971). A preset is an
architecture, sizes and a tokenizer, named after its parameters, all of them counted; it never changes, since studies name it.
In a study file, explicit keys win over `architecture`, and over `preset`:

    [model]
    preset = "llama-11m"
    qk_norm = true

Three are other people's models. `gpt2-124m` is GPT-2 small with nanoGPT's padded vocabulary. `llama-120m` is the
tiny_LLaMA_120M of TinyLlama's code, with one key and value head for all twelve of the queries; its text is one's own .bin of
Llama's 32,000 tokens.
`shakespeare-char` is nanoGPT's example, for its train.bin of 65 characters, with its dropout of 0.2.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from typing import Any

ARCHITECTURES: dict[str, dict[str, Any]] = {
    "gpt2": {"norm": "layernorm", "mlp": "gelu", "positions": "learned", "tied": True},
    "llama": {"norm": "rmsnorm", "mlp": "swiglu", "positions": "rope", "tied": False},
}


def _sizes(architecture: str, layers: int, heads: int, width: int, context: int, tokenizer: str) -> dict[str, Any]:
    return {
        "architecture": architecture, "layers": layers, "heads": heads, "width": width, "context": context,
        "tokenizer": tokenizer,
    }  # fmt: skip


PRESETS: dict[str, dict[str, Any]] = {
    "gpt2-0.4m": _sizes("gpt2", 2, 4, 128, 128, "bytes"),
    "gpt2-0.8m": _sizes("gpt2", 4, 4, 128, 128, "bytes"),
    "gpt2-3m": _sizes("gpt2", 4, 4, 256, 256, "bytes"),
    "gpt2-11m": _sizes("gpt2", 6, 6, 384, 256, "bytes"),
    "shakespeare-char": _sizes("gpt2", 6, 6, 384, 256, "ids-65") | {"dropout": 0.2},
    "gpt2-34m": _sizes("gpt2", 8, 8, 512, 512, "bpe-16384"),
    "gpt2-124m": _sizes("gpt2", 12, 12, 768, 1024, "gpt2") | {"vocabulary": 50_304},
    "llama-0.5m": _sizes("llama", 2, 4, 128, 128, "bytes"),
    "llama-0.9m": _sizes("llama", 4, 4, 128, 128, "bytes"),
    "llama-3m": _sizes("llama", 4, 4, 256, 256, "bytes"),
    "llama-11m": _sizes("llama", 6, 6, 384, 256, "bytes"),
    "llama-42m": _sizes("llama", 8, 8, 512, 512, "bpe-16384"),
    "llama-120m": _sizes("llama", 12, 12, 768, 2048, "ids-32000") | {"kv_heads": 1},
}


def check_preset(name: str | None) -> str | None:
    """The name, if there is such a preset, or None; else ValueError."""
    if name is None or name in PRESETS:
        return name
    near = difflib.get_close_matches(name, PRESETS, n=1, cutoff=0.0)[0]
    raise ValueError(f"preset must be one of {', '.join(PRESETS)}, got {name!r}; did you mean {near!r}?")


def filled(written: Mapping[str, Any]) -> dict[str, Any]:
    """The keys of [model] with what `preset` and `architecture` say of those that are not written, or are None.

    Names that don't exist fill nothing: they are for the table that these keys belong to, to refuse.
    """
    said = {key: value for key, value in written.items() if value is not None}
    preset = PRESETS.get(str(said.get("preset")), {})
    architecture = str(said.get("architecture", preset.get("architecture", "gpt2")))
    return ARCHITECTURES.get(architecture, {}) | preset | said
