"""`exmy data`: the texts that come with exmy, where each is from, and whether it is on this machine already."""

from __future__ import annotations

import platform
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from rich.table import Table

from train.artefacts import is_cached
from train.corpora import CORPORA
from train.text import Text, kept_tokens, known_source, load_text

if TYPE_CHECKING:
    import xarray as xr

TOKENS_A_STEP = 2048  # of the first look on a GPU: 8 sequences of 256


def text_table(cache: Path) -> Table:
    """Every text that comes with exmy, a row each."""
    table = Table(
        title="Texts; each is downloaded by the package manager named, under its publisher's licence, and never installed",
        caption=f"Kept in {cache}. That many steps, of {TOKENS_A_STEP:,} tokens each, read a text once (an epoch). A file or "
        "folder of your own: exmy sweep --set dataset=./mine.txt",
        show_lines=True,
    )
    for heading in ("text", "what it is, and from", "licence", "size", "SHA-256", "cached, to train on"):
        table.add_column(heading, justify="right" if heading == "size" else "left", overflow="fold")
    for name, corpus in CORPORA.items():
        file = corpus.artefact
        size = f"{_size(corpus.size)}\ndownload {_size(file.size)}"
        row = (f"{corpus.about}\n{file.origin}, by {file.manager}", file.licence, size, file.sha256[:16])
        table.add_row(name, *row, _cached(name, cache))
    about = f"Source of the standard library\nPython {platform.python_version()}, installed"
    table.add_row("python", about, "PSF-2.0", "about 12 MB", "", _cached("python", cache))
    return table


def _cached(name: str, cache: Path) -> str:
    """How much there is to train on in each token file that there is, and how many steps read it once."""
    kept = kept_tokens(known_source(name), cache)
    if not kept:
        there = name in CORPORA and is_cached(CORPORA[name].artefact, cache)
        return "the download only" if there else "no"
    facts = (
        f"{train / 1e6:.2f} M {tokenizer}, {train / TOKENS_A_STEP:,.0f} steps" for tokenizer, train in kept.items()
    )
    return "\n".join(facts)


def _size(number: int) -> str:
    return f"{number / 1e6:.1f} MB"


def fetch(name: str, tokenizer: str, cache: Path | None = None) -> str:
    """Load a text, whatever that takes, and say in a line what it is. Raises what `load_text` raises."""
    return describe(load_text(name, cache, tokenizer))


def describe(text: Text) -> str:
    """A text in a line."""
    return (
        f"{text.name}: {text.train.size:,} training and {text.validation.size:,} validation tokens ({text.tokenizer}), "
        f"{text.train_bytes_per_token:.2f} bytes a token, unigram entropy {text.unigram_entropy:.3f} nats, "
        f"SHA-256 {text.sha256}. {text.source}"
    )


def epochs_seen(tree: xr.DataTree) -> Iterator[str]:
    """A line for each text of a study: how often its runs read it."""
    summary = tree["summary"].to_dataset()
    for dataset in dict.fromkeys(summary["dataset"].values.tolist()):
        seen = summary["epochs"].values[summary["dataset"].values == dataset]
        seen = seen[np.isfinite(seen)]
        if seen.size:
            few, many = f"{seen.min():.2g}", f"{seen.max():.2g}"
            yield f"Epochs: each run read {dataset} {few if few == many else f'{few} to {many}'} times."
