"""What is written by hand on the findings' page, finding by finding: the paper's sentence, what would change our mind, and in
what our setting differs. No result stands here: those are made from the datasets.

The paper is Lee et al., "To FP8 and Back Again", arXiv 2405.18710; R1 to R7 are what its reviewers asked. "Read" is what was read
at the source, "remembered" what was not, and is a target to test.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Cause:
    """Why a result may differ from the paper's: in a word, in a sentence, and the study that tries it; "" where none does."""

    word: str
    sentence: str
    study: str = ""


@dataclass(frozen=True)
class Finding:
    """One finding. key: by which claims name it, F2 for "F2" and "F2-window"; also: claims of other names that are about it.

    sections: what is shown of which studies.
    """

    key: str
    title: str
    paper: str
    mind: str
    causes: tuple[Cause, ...]
    sections: tuple[str, ...]
    also: tuple[str, ...] = ()


SCALE = Cause(
    "Scale",
    "the paper's models have 120 million parameters and more; what ours have, and how much they read, is in each study's block",
    "size",
)
TRUNCATION = Cause("Truncation", "the paper cuts bits off, which pulls every operand toward zero", "rounding")
NO_SCALES = Cause("Lack of scaling", "the paper clips to the smaller range and scales nothing", "scaling")
DIVISOR = Cause(
    "Divisor",
    "gradients are as large as the loss's divisor leaves them: nanoGPT's, over 491,520 tokens, are about 2^8 smaller than "
    "a pack's over 2,048, and what is smaller is flushed sooner",
    "exponent",
)
STEPS = Cause(
    "Remedies",
    "clipping, warm-up and short runs of shallow models may hide what longer, deeper ones show",
    "conditions",
)

FINDINGS = (
    Finding(
        "F1",
        "How often BF16 fails, over seeds",
        "With nanoGPT's own recipe about one seed in ten does not converge in BF16 (read); in TF32 none fails (remembered).",
        "For the paper: seeds that fail in BF16 and not in TF32, the same seeds, more than McNemar's exact test leaves to "
        "chance; here or at 124M. Against it: a bound alone, since no number of seeds without a failure shows that there is "
        "none.",
        (
            SCALE,
            Cause("Recipe", "the rate here is the largest that mostly trains at this size, theirs is one for 124M"),
            Cause(
                "Definition",
                "a run that does not converge is not defined there; here four definitions are counted, one by several margins",
                "seeds",
            ),
        ),
        ("seeds",),
        also=("simulated",),
    ),
    Finding(
        "F2",
        "Mantissa bits and the range of learning rates",
        "Taking mantissa bits away narrows the range of learning rates that train: what looks sound at the recipe's rate "
        "spikes or diverges at ten times it, with five bits sooner than with seven (read).",
        "A window or a sensitivity whose interval, at more seeds or a finer grid of rates, lies on the other side of zero; "
        "or a condition that a practitioner meets, and that we did not try, under which three to six bits fall behind.",
        (SCALE, STEPS, TRUNCATION),
        ("mantissa", "conditions"),
    ),
    Finding(
        "F3",
        "Exponent bits against mantissa bits",
        "Taking exponent bits away does far more harm than taking mantissa bits away: one or two fewer, unscaled, and "
        "training fails outright (read).",
        "Formats with fewer exponent bits that train unscaled at either divisor, on seeds and rates at which as many "
        "mantissa bits fewer fail.",
        (DIVISOR, NO_SCALES, SCALE),
        ("exponent",),
    ),
    Finding(
        "R1",
        "Truncation against other roundings",
        "Asked by the reviewers: masking is biased, so compare it with rounding to nearest even and stochastic rounding (read).",
        "Differences between roundings of the same format, pair by pair, whose intervals change sides at more seeds, "
        "larger models or longer runs: a bias adds up over steps, noise does not.",
        (SCALE, Cause("Steps", "a bias of every operand adds up over more steps than are trained here", "conditions")),
        ("rounding",),
    ),
    Finding(
        "R2",
        "Fewer exponent bits, with scales",
        "Asked by the reviewers: no scaling was used when exponent bits went, so repeat that with scales of a tensor and "
        "of blocks (read).",
        "A format that trains with scales here and fails with the same scales in a larger model, whose outliers are "
        "larger; or one that a better scale would save.",
        (
            SCALE,
            Cause("Outliers", "scales are there for outlying features, and those of larger models are not seen here"),
        ),
        ("scaling",),
    ),
    Finding(
        "R4",
        "How runs with fewer exponent bits fail",
        "Asked by the reviewers: show the runs that fail with fewer exponent bits, and try more bits (read). More than "
        "eight do not fit FP32, which carries all of it; what eight leave to clip and to flush says whether more could help.",
        "Runs that fail although hardly anything is flushed or clipped, or train although much is: then range is not the cause.",
        (DIVISOR, NO_SCALES),
        ("endings", "signals"),
    ),
    Finding(
        "size",
        "Where the boundary moves with size",
        "No claim of the paper's, whose models have 120 million parameters and 7 billion. This is by how much F2 and F3 may "
        "depend on ours.",
        "A trend over these sizes that larger ones do not continue.",
        (Cause("Extrapolation", "beyond the largest model here a trend is a guess"),),
        ("size",),
    ),
)

OPEN = {
    "F4": "FP8 as shipped trains worse than BF16; an LM head kept out of FP8 helps.",
    "F5": "Sharpness of the last token's logits rises before the loss does, in the order of the bits.",
    "F6": "Proposed there, not tried: high precision in the first steps only, or in the sensitive layers only.",
    "F7": "The quality of the data moves the boundary between stable and unstable.",
    "R3": "That sharpness against Keskar's own and against alarms from gradients and activations: cost, and how early they warn.",
    "R5": "F6, tried.",
    "R6": "Why others do train in FP8.",
    "R7": "More schedules and learning rates, with tokens and batches stated.",
}
