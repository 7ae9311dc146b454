"""What is written by hand of the second half of the findings: FP8 as people use it, remedies, texts, schedules, warnings.

As in `text`: the paper's sentence, what would change our mind, and in what our setting differs; no result stands here.
"""

from __future__ import annotations

from exmy.findings.text import SCALE, Cause, Finding

TOKENS = Cause(
    "Tokens", "a run here sees two to twenty million tokens; what scales save, or miss, may come after billions"
)
SIMULATED = Cause("Products", "FP8 is simulated, its sums in FP32, where the paper's is a card's", "hardware")
MASKED = Cause(
    "Failures", "what fails here is masking of exponent bits, chosen since it fails often enough to be told apart"
)

SECOND = (
    Finding(
        "F4",
        "FP8 as shipped",
        "FP8 as shipped (MS-AMP) trains worse than BF16 on the same recipe, and an LM head kept out of FP8 helps (read).",
        "A difference between MS-AMP and BF16, or between its two heads, whose interval lies on the other side of zero at more "
        "seeds, or at 124M.",
        (SCALE, SIMULATED, TOKENS),
        ("fp8",),
    ),
    Finding(
        "R6",
        "Why others do train in FP8",
        "Asked by the reviewers: explain why others train in FP8 (FP8-LM; Fishman et al., whose SwiGLU makes outliers after 200 "
        "billion tokens) (read).",
        "Scaled FP8 that fails at a rate at which BF16 does not; or SwiGLU that makes delayed scales fail within so few tokens.",
        (TOKENS, SCALE),
        ("fp8",),
    ),
    Finding(
        "hardware",
        "Does simulated FP8 fail as the hardware's does?",
        "No claim of the paper's. It is by how much all that is said here of simulated FP8 may miss a card's, "
        "whose sums are short.",
        "The same seeds ending elsewhere on another card, or with sums simulated more closely.",
        (Cause("Card", "products of one kind of card; others sum otherwise"), SCALE),
        ("hardware",),
    ),
    Finding(
        "F5",
        "Sharpness before a run diverges, and R3: against other alarms",
        "Sharpness of the last token's logits rises before the loss does, and is ordered by bits over training "
        "(read). Asked by the "
        "reviewers: hold it against Keskar's own and against alarms from gradients and activations, in cost and "
        "in how early they "
        "warn (read).",
        "Another signal at the top on other runs: another size, text, optimiser, or another way to fail.",
        (MASKED, SCALE, Cause("Horizon", "a warning counts within 100 steps before the onset, which is our choice")),
        ("warning", "curvature"),
    ),
    Finding(
        "F6",
        "High precision where it matters, tested for R5",
        "Proposed and not tested: high precision in the first steps only, or in the sensitive layers only "
        "(read). The reviewers asked "
        "for the test (read).",
        "A remedy whose interval changes sides at more seeds, at another length of training, or in deeper "
        "models, of which the first "
        "and the last block are a smaller share.",
        (
            SCALE,
            Cause("Shares", "a tenth of the steps and two of four blocks are more than the few that are proposed"),
            MASKED,
        ),
        ("switch", "layers"),
    ),
    Finding(
        "F7",
        "Data and the boundary",
        "The quality of the data moves the boundary between stable and unstable (remembered).",
        "Another text, or another way of making one worse, under which the cost moves and these did not; or "
        "does not, and these did.",
        (Cause("Quality", "noise and copies are made on purpose; crawled text is bad in other ways"), MASKED, SCALE),
        ("data",),
    ),
    Finding(
        "R7",
        "More schedules, and tokens and batches",
        "Asked by the reviewers: more schedules and learning rates, with tokens and batches stated (read).",
        "A schedule that was not tried under which the order of the formats changes.",
        (SCALE, TOKENS, MASKED),
        ("schedules",),
    ),
    Finding(
        "optimizer",
        "What the optimiser has to do with it",
        "No claim of the paper's, which trains with AdamW in FP32. What is kept between steps is a format too.",
        "Moments or weights kept in fewer bits that fail after more steps, as what rounding loses adds up.",
        (
            Cause("Steps", "what is lost of a weight at each step adds up over more steps than are trained here"),
            Cause(
                "Rate",
                "0.004 is more than BF16's spacing at a weight of 0.05, which is 0.00024; where rates are a tenth of "
                "that, more of each "
                "step is rounded away",
            ),
            SCALE,
        ),
        ("optimizer",),
    ),
    Finding(
        "llama",
        "The main findings at 120 million parameters",
        "The paper's Llama-style model has 120 million parameters too, and sees far more tokens (read).",
        "Another order of the recipes, at more seeds or tokens: two seeds decide nothing, and no claim rests on them.",
        (TOKENS, Cause("Seeds", "two")),
        ("llama-120m",),
    ),
)
"""In the order of the page. Sections are studies."""
