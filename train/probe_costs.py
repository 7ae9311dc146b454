"""What the measures of a pack cost, before it trains: time in gradients of a training batch, and memory of one run.

Costs are those of `taking`'s table, with a Hessian-vector product at three gradients and a forward pass at a third. Probes run
eagerly and in FP32: where training's steps are compiled, or in BF16, a gradient of a probe takes several times as long as one of
training (`STEPS_A_GRADIENT`). What SciPy takes is the host's time, a token after the other.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from train.head import CHUNK_OF_ONE_RUN
from train.measures import MEASURES

if TYPE_CHECKING:
    from train.program import Probe, Program

BASIS, MAX_HVP = 12, 60  # of eigenvalues: vectors held, and products at most
LANCZOS_STEPS = 12  # of a spectral density
ASCENT = 10  # steps of an ascent in a ball or a box
TYPICAL_HVP, TYPICAL_FORWARD = (
    20,
    15,
)  # of eigenvalues that start from the last probe's vectors, and of critical sharpness
HVP, FORWARD = 3.0, 1 / 3
LBFGSB_SECONDS = 1.7e-3  # of the host, measured on one core: ten iterations at the 256 logits of a token
# Training steps that a probe's gradient takes as long as: on a GPU measured for 128 runs of 4 x 128, in FP32 and eager beside
# compiled steps in BF16; on a CPU both are eager and in FP32.
STEPS_A_GRADIENT = {"cuda": 9.0, "cpu": 1.0}


def gradients_of(measure: str, probe: Probe) -> float:
    """What one probe costs, in gradients of its batch."""
    radii, adaptive = len(probe.radii), len(probe.adaptive_radii)
    costs = {
        "hessian_eigenvalue": HVP * (TYPICAL_HVP + probe.eigenvalues),
        "smallest_eigenvalue": HVP * (TYPICAL_HVP + probe.eigenvalues),
        "preconditioned_eigenvalue": HVP * (TYPICAL_HVP + probe.eigenvalues),
        "hessian_trace": HVP * probe.samples,
        "spectral_density": HVP * probe.samples * LANCZOS_STEPS,
        "gradient_curvature": 1 + HVP,
        "critical_sharpness": FORWARD * TYPICAL_FORWARD,
        "sam_sharpness": 1 + FORWARD * radii,
        "m_sam_sharpness": 1 + FORWARD * radii,
        "asam_sharpness": 1 + FORWARD * adaptive,
        "adaptive_sharpness": 1 + ASCENT * adaptive,
        "average_sharpness": FORWARD * (1 + probe.samples * radii),
        "box_sharpness": 1.0 + ASCENT * len(probe.epsilons),
        "embedding_sharpness": 1.0 + ASCENT * len(probe.epsilons),
        "hidden_sharpness": FORWARD + 1,
        "logit_sharpness_lbfgsb": FORWARD,  # and what SciPy takes on the CPU, which is no matter of the device
    }
    return costs[measure]


def gradients(program: Program) -> float:
    """Of all probes of a pack's training, in gradients."""
    return sum(len(program.steps_of(measure)) * gradients_of(measure, program.probe) for measure in program.measures)


def host_seconds(program: Program) -> float:
    """Of all probes of one run: what the device waits for."""
    token = LBFGSB_SECONDS * len(program.probe.epsilons)
    return token * program.sequences * len(program.steps_of("logit_sharpness_lbfgsb"))


def kept_bytes(program: Program) -> int:
    """Of one run, from probe to probe: the vectors that eigenvalues start from."""
    started = sum(measure.endswith("_eigenvalue") for measure in program.measures)
    return started * program.probe.eigenvalues * program.shape.size * program.dtype.itemsize


def bytes_of_a_probe(program: Program) -> int:
    """Of one run while it is measured, at most, beside what training keeps: vectors of the parameters' size, and what the
    sequences that are in memory leave for their derivatives.
    """
    if not program.measures:
        return 0
    probe, shape = program.probe, program.shape
    vectors = max(_vectors(measure, probe) for measure in program.measures)
    tokens = min(probe.at_once, program.sequences) * shape.context
    second = any(MEASURES[measure].second for measure in program.measures)
    of_layers = (
        shape.layers * (16 * shape.width + 3 * (sum(shape.attention_features) + 2 * shape.features)) + 12 * shape.width
    )
    scores = shape.layers * shape.heads * shape.context
    numbers = tokens * (of_layers + 3 * scores) * (3 if second else 2)
    numbers += 12 * min(tokens * shape.vocabulary, CHUNK_OF_ONE_RUN)
    return (vectors * shape.size + numbers) * program.dtype.itemsize


def _vectors(measure: str, probe: Probe) -> int:
    """Tensors of the parameters' size: bases, random vectors, and what is around them."""
    basis, k = max(BASIS, probe.eigenvalues + 2), probe.eigenvalues
    several = {
        "hessian_eigenvalue": basis + 13 + 2 * k,
        "smallest_eigenvalue": basis + 13 + 2 * k,
        "preconditioned_eigenvalue": basis + 15 + 2 * k,
        "hessian_trace": 10 + 2 * probe.samples,
        "spectral_density": LANCZOS_STEPS + 13 + 2 * probe.samples,
        "box_sharpness": 24,
        "embedding_sharpness": 24,
    }
    return several.get(measure, 12)
