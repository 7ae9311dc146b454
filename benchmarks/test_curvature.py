"""Second derivatives of a pack's loss, peers beside them in the same run: the cases of `curvature`, or tiny ones on a CPU.

Run it by `make bench`. In extra_info: `hvp_over_gradient`, medians in turns; how many times as long as a pack each peer takes for
a run's lambda_max, by how much their eigenvalues differ at most and what residuals they leave; bytes that a product of GPT-2 124M
takes. curvlinops is among the peers where it is installed. Peers take two runs; `python -m benchmarks.curvature` takes as many as
asked for, and keeps a JSON file of its own. What a probe of logit sharpness takes of training is in `test_packs`.
"""

from __future__ import annotations

import argparse
import importlib.util
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from benchmarks.curvature import (
    H100,
    LOOSE,
    SMALL,
    Case,
    differs,
    make_problem,
    make_weights,
    memory,
    ours,
    product_against_gradient,
    run_by_run,
    tidy,
    trained,
)
from benchmarks.curvature_peers import TOLERANCE, Method, by_curvlinops, by_power_iteration, by_pyhessian
from benchmarks.sweep_sizes import synchronize
from benchmarks.test_packs import CUDA, note_device
from landscape.programs import How
from train.determinism import deterministic

SIZE = H100 if CUDA else SMALL
PEER_RUNS = 2
PEERS: dict[str, Method] = {"pyhessian_style": by_pyhessian, "power_iteration": by_power_iteration}
if importlib.util.find_spec("curvlinops") is not None:
    PEERS["curvlinops"] = by_curvlinops


@pytest.fixture(autouse=True)
def alike() -> Iterator[None]:
    """In the mode that everything of ours runs in; peers have what has no deterministic form."""
    tidy()
    with deterministic(tf32=False):
        torch.use_deterministic_algorithms(True, warn_only=True)
        yield


@pytest.mark.parametrize("how", ["eager", "recorded"])
@pytest.mark.parametrize("case", SIZE.hvp.values(), ids=SIZE.hvp)
def test_a_product_against_a_gradient(benchmark: Any, case: Case, how: How) -> None:
    problem = make_problem(case, make_weights(case), how)
    found = product_against_gradient(problem, SIZE.rounds)
    v = torch.randn_like(problem.point)

    def timed() -> None:
        problem.hvp(v)
        synchronize()

    benchmark.group = "hvp"
    benchmark.pedantic(timed, rounds=SIZE.rounds, warmup_rounds=1)
    benchmark.extra_info["hvp_over_gradient"] = found["hvp_over_gradient"]
    benchmark.extra_info["second_derivatives"] = found["second_derivatives"]
    note_device(benchmark)
    assert found["second_derivatives"] == "forward-over-reverse"


@pytest.mark.parametrize("case", SIZE.lambda_max.values(), ids=SIZE.lambda_max)
def test_lambda_max_of_a_pack_against_run_by_run(benchmark: Any, case: Case) -> None:
    params = trained(case, SIZE.steps)
    problem = make_problem(case, params, "recorded")
    found: list[dict[str, Any]] = []
    benchmark.group = "lambda_max"
    benchmark.pedantic(lambda: found.append(ours(problem, SIZE.basis, TOLERANCE)), rounds=1)
    [own], by_value = found, ours(problem, SIZE.basis, LOOSE)
    benchmark.extra_info["seconds_a_run"] = own["seconds_a_run"]["median"]
    benchmark.extra_info["seconds_a_run_by_value"] = by_value["seconds_a_run"]["median"]
    benchmark.extra_info["by_value_differs_at_most"] = differs(by_value, own)
    for name, method in PEERS.items():
        tidy()
        peer = run_by_run(method, case, params, min(PEER_RUNS, case.runs))
        over = [a / b - 1 for a, b in zip(peer["eigenvalue"], own["eigenvalue"], strict=False)]
        times = peer["seconds_a_run"]["median"] / own["seconds_a_run"]["median"]
        benchmark.extra_info[f"{name}_times_as_long"] = times
        benchmark.extra_info[f"{name}_differs_at_most"] = max(map(abs, over))
        benchmark.extra_info[f"{name}_relative_residual"] = peer["relative_residual"]["most"]
        assert max(over) < 1e-2, "what a peer finds is no more than the largest eigenvalue"
    note_device(benchmark)
    assert own["converged"] == case.runs


def test_memory_of_a_product(benchmark: Any) -> None:
    if not CUDA:
        pytest.skip("no CUDA device")
    found: dict[str, dict[str, Any]] = {}
    benchmark.group = "hvp memory"
    asked = argparse.Namespace(programs="eager,recorded")
    benchmark.pedantic(lambda: memory(SIZE, asked, found.__setitem__), rounds=1)
    benchmark.extra_info |= {name: of.get("first_bytes", of.get("failed")) for name, of in found.items()}
    note_device(benchmark)
