"""The tokens of a study's runs: loaded once for each text, tokenizer and corruption, and held against what the runs will read.

Texts that fit a package are small. A run that reads n tokens of a text that has m sees it n / m times, its epochs, and
beyond the first it trains on what it has seen. Up to about four epochs that is nearly as good as new text (Muennighoff et
al., arXiv 2305.16264); far beyond, a training loss measures memory.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping
from pathlib import Path

import numpy as np

from train.documents import TextError
from train.program import Program
from train.seeds import held_out_offsets
from train.study import Study, StudyError
from train.text import Text, load_text

log = logging.getLogger(__name__)


def load_texts(study: Study, cache: Path | None = None) -> dict[str, Text]:
    """Every text that the study's runs read, by `TokenStream.key`; StudyError where one can't be had or is too short.

    What is not in the cache is fetched and tokenised, which may take a minute and shows itself on a terminal.
    """
    texts: dict[str, Text] = {}
    checked: set[tuple[str, int]] = set()
    for run in study.runs():
        key, context = run.stream.key, run.model.context
        if key not in texts:
            try:
                texts[key] = load_text(run.stream.dataset, cache, run.stream.tokenizer, run.stream.corruption)
            except (TextError, ValueError) as error:
                raise StudyError(str(error)) from None
        if (key, context) not in checked:
            checked.add((key, context))
            _long_enough(key, texts[key], context)
    return texts


def _long_enough(key: str, text: Text, context: int) -> None:
    for part, tokens in (("training", text.train), ("validation", text.validation)):
        if tokens.size <= context:
            raise StudyError(
                f"{key}: its {part} part has {tokens.size} tokens, and a context of {context} needs more: take a longer text, or "
                f"a model.context below {tokens.size}"
            )


def epochs(program: Program, text: Text) -> float:
    """How often a run of this program reads each training token, on average."""
    return program.steps * program.sequences * program.shape.context / text.train.size


def report_epochs(programs: Iterable[Program], texts: Mapping[str, Text]) -> None:
    """A line in the log for each text that a run reads more than once."""
    most: dict[str, float] = {}
    for program in programs:
        most[program.dataset] = max(most.get(program.dataset, 0.0), epochs(program, texts[program.dataset]))
    for key, times in most.items():
        if times > 1:
            size = texts[key].train.size
            log.warning(
                f"{key}: {size:,} training tokens, so a run reads them {times:.1f} times (epochs): losses repeat data"
            )


def evaluation_bytes_per_token(program: Program, text: Text) -> float:
    """Mean bytes of the tokens that the validation loss is a mean over: those predicted in the held-out sequences."""
    T = program.shape.context
    starts = held_out_offsets(program.evaluation_sequences, text.validation.size - T)
    return text.bytes_per_token(text.validation[starts[:, None] + np.arange(1, T + 1)].ravel())
