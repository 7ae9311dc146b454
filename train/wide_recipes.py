"""Which runs several processes can share so that nothing but the order of sums changes, and why others can't.

A refusal is a line that names the value, the limit and the mend. What is refused needs, in the middle of a step, what no rank
has: a sum formed token by token in a short accumulator, a block of tokens that two ranks would share, a scale of a whole tensor
where no product is, dropout's masks. FSDP further keeps no weight whole, so what the optimiser does to whole matrices is refused
there.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Literal

from formats import ScaledFormat, get_format
from formats.scaled import Granularity
from train.head import BLOCKS_OF_TOKENS, chunks
from train.operands import Rules
from train.optim import Muon
from train.program import Program
from train.recipe import RecipeStructure
from train.weights import padded_vocabulary

Way = Literal["ddp", "fsdp"]
PRODUCTS_PLACE = 4  # of `RecipeStructure.places`


def refusal(program: Program, ranks: int, way: Way) -> str | None:
    """Why so many ranks can't share a run of the program, in a line that says the mend; None where they can."""
    if program.sequences % ranks:
        near = max(1, program.sequences // ranks) * ranks
        return f"{ranks} ranks share a batch in equal parts, and it has {program.sequences} sequences: take sequences = {near}"
    if program.shape.dropout:
        return f"dropout {program.shape.dropout:g}: its masks are drawn for whole batches; take dropout = 0, or one GPU"
    if program.measures:
        return (
            f"probe.measures {program.measures[0]!r} takes whole runs, which no rank has: leave it out, or take one GPU"
        )
    for structure in filter(None, (program.structure, program.before)):
        if why := _of_recipe(structure, program, ranks):
            return why
    return _of_fsdp(program, ranks) if way == "fsdp" else None


def _of_recipe(structure: RecipeStructure, program: Program, ranks: int) -> str | None:
    rows = program.sequences // ranks * program.shape.context
    for number, place in enumerate(structure.places):
        if place is None:
            continue
        if place.accumulate is not None:
            return (
                f"accumulate {place.accumulate.name}: a weight gradient's sum goes from token to token, which ranks can't share; "
                "take accumulate = 'fp32', or one GPU"
            )
        if place.rules is None or number == PRODUCTS_PLACE:  # whose rows never leave a sequence
            continue
        for size in _blocks_of_tokens(place.rules):
            if rows % size:
                return f"blocks of {size} tokens don't fit the {rows} tokens of a rank: take a context of a multiple of {size}"
    for what, name in structure.elsewhere.items():
        f = get_format(name)
        whole = isinstance(f, ScaledFormat) and (f.takes_tensor_scale or f.granularity is Granularity.TENSOR)
        if whole and what not in ("gains", "embedding"):
            return f"{what} = {name!r} has a scale for the whole tensor, which no rank has: take a format with blocks, or one GPU"
    head = structure.places[1]
    if head is not None and head.rules is not None and _splits_a_chunk(program, ranks):
        total, vocabulary = rows * ranks, program.shape.vocabulary
        return (
            f"the LM head is rounded in chunks of its {total} x {vocabulary} logits, and {ranks} ranks would share one: take "
            "another number of sequences or ranks, or lm_head = 'native-bf16'"
        )
    return None


def _blocks_of_tokens(rules: Rules) -> set[int]:
    """Sizes of blocks along tokens: wgrad's, its rotations', and tiles'."""
    sizes = set()
    for product, role, rule in rules.items():
        f = rule.scaled
        if f is not None and f.granularity is Granularity.TILE and role != "weight":
            sizes |= set(f.group)
        if product == "wgrad":
            sizes |= {rule.hadamard} if rule.hadamard else set()
            sizes |= set(f.group) if f is not None else set()
    return sizes


def _of_fsdp(program: Program, ranks: int) -> str | None:
    state = program.state
    for name, size in program.shape.parameters().items():
        if name.startswith("h.") and size[0] % ranks:
            rows = f"{name} has {size[0]} rows, which {ranks} ranks can't share evenly"
            return f"{rows}: take another number of ranks, or --wide ddp"
    scaled = [name for name in state.names if isinstance(get_format(name), ScaledFormat)]
    if isinstance(program.optimizer, Muon):
        return "Muon orthogonalises whole matrices, and under fsdp no rank has one: take optimizer = 'adamw', or --wide ddp"
    if scaled or state.draws:
        why = f"in {scaled[0]}" if scaled else "rounded at random"
        return f"the optimiser's state {why} needs whole matrices, and under fsdp no rank has one: take --wide ddp"
    if program.signals_every:
        return "signals look at whole weights, and under fsdp no rank has them: take [signals] every = 0, or --wide ddp"
    return None


def head_parts(tokens: int, rows: int, rank: int, ranks: int, multiple: int = 1) -> list[slice] | None:
    """The chunks of logits, as one process cuts them, that are this rank's: slices of all tokens, or None where two ranks would
    share one. tokens: of one rank. One chunk of all tokens is all ranks' together: then it is [all].
    """
    whole = [s for _, s in chunks(1, tokens * ranks, rows, multiple)]
    if len(whole) == 1:
        return whole
    first = rank * tokens
    mine = [s for s in whole if s.start < first + tokens and s.stop > first]
    fit = mine[0].start == first and mine[-1].stop == first + tokens
    return mine if fit else None


def _splits_a_chunk(program: Program, ranks: int) -> bool:
    tokens = program.sequences // ranks * program.shape.context
    rows = padded_vocabulary(program.shape.vocabulary)
    multiples = (1, BLOCKS_OF_TOKENS)
    return any(head_parts(tokens, rows, r, ranks, m) is None for r in range(ranks) for m in multiples)


def refusals(programs: Mapping[str, Program], ranks: int, way: Way) -> Iterator[str]:
    """A line for each recipe, by name, that so many ranks can't share."""
    for name, program in programs.items():
        if why := refusal(program, ranks, way):
            yield f"recipe {name!r}: {why}"
