"""Measures while a pack trains: right, at their own intervals, each run's own, and without a trace in its training."""

from __future__ import annotations

import dataclasses
import logging
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import xarray as xr
from torch import Tensor

from landscape import LandscapeError, lbfgsb_logit_sharpness, validate
from tests.recipe_packs import program_for, slot
from tests.small import SHAPE, SHAPES, make_program
from tests.test_checkpoint import OF, After, assert_same
from tests.test_step import most_memory
from train import probing, taking
from train.at_point import AtPoint
from train.checkpoint import Checkpointer
from train.interruption import Interrupted
from train.measures import AFTERWARDS, MEASURES, NAMES
from train.model import ModelShape, forward
from train.pack import Pack, train_pack
from train.probe_costs import bytes_of_a_probe, gradients_of, kept_bytes
from train.program import PackResult, Probe, Program, Slot
from train.resolve import resolve_recipe
from train.schema import COORDINATES, OF_MEASURES
from train.seen import Layers
from train.taking import STARTED, TAKEN, take, ticks
from train.text import Text

CPU = torch.device("cpu")
SMALL = ModelShape(layers=1, heads=2, width=8, context=6, vocabulary=32)
STEPS = 4
ALL = Probe(every=2, measures=NAMES, quantisers="off", eigenvalues=2, samples=2, radii=(0.05, 0.1), at_once=2)


def setting(
    recipe: str = "native-fp32", rates: tuple[float, ...] = (3e-3, 1e-2, 1e6), **changes: Any
) -> tuple[Program, list[Slot]]:
    """A program in whose runs, one a rate, the last comes to NaN by its second probe."""
    meant = resolve_recipe(recipe)
    small: dict[str, Any] = {"steps": STEPS, "sequences": 2, "warmup": 1, "evaluation_sequences": 2, "probe": ALL}
    return program_for(meant, changes.pop("shape", SMALL), **small | changes), [
        slot(meant, i, rate) for i, rate in enumerate(rates)
    ]


@pytest.fixture(scope="module")
def all_measures() -> PackResult:
    from tests.conftest import make_text

    return train_pack(*setting(), make_text(), CPU)


def described(measure: str) -> xr.Dataset:
    """A measure's group as a study has it, of two runs."""
    rows = OF_MEASURES[f"probes/{measure}"]
    axes = {axis for row in rows.values() for axis in row.dims if axis != "run"}
    return xr.Dataset(
        {name: (row.dims, np.ones([2] * len(row.dims)), row.attrs()) for name, row in rows.items()},
        {axis: (axis, [0, 1], COORDINATES[axis].attrs()) for axis in axes},
    )


def test_every_measure_is_taken_described_and_costed(all_measures: PackResult) -> None:
    assert {*TAKEN, *STARTED} == set(AFTERWARDS)
    probes = 3
    for measure, row in MEASURES.items():
        assert validate(described(measure)) == []
        assert set(row.variables) | {"measured"} == set(OF_MEASURES[f"probes/{measure}"])
        assert gradients_of(measure, ALL) > 0
        for name, axes in row.variables.items():
            values = all_measures.measures[f"{measure}/{name}"]
            assert values.shape == (probes, 3, *(len(ticks(ALL, measure, axis)) for axis in axes))
            first = 1 if row.adam else 0  # before the first update there is nothing of Adam's
            assert np.isfinite(values[first:, :2]).all() or "critical" in name, name
            assert np.isnan(values[:first]).all()


def test_a_run_that_is_nan_has_nan_for_every_number(all_measures: PackResult) -> None:
    for name, values in all_measures.measures.items():
        assert np.isnan(values[-1, 2]).all(), name


def test_a_neighbour_changes_nothing_wild_or_tame_in_any_slot(all_measures: PackResult, text: Text) -> None:
    program, slots = setting()
    tame = train_pack(program, [slots[1], dataclasses.replace(slots[2], learning_rate=1e-3), slots[0]], text, CPU)
    for name, values in all_measures.measures.items():
        np.testing.assert_array_equal(values[:, [1, 0]], tame.measures[name][:, [0, 2]], err_msg=name)


@pytest.mark.parametrize("recipe", ["native-fp32", "stochastic-e5m2"])
def test_training_has_the_same_bits_whether_it_is_probed_or_not(recipe: str, text: Text) -> None:
    measures = ("gradient_curvature", "critical_sharpness", "average_sharpness", "box_sharpness", "hidden_sharpness")
    probe = Probe(every=2, measures=measures, samples=2, at_once=2)
    program, slots = setting(recipe, probe=probe)
    probed = train_pack(program, slots, text, CPU)
    plain = train_pack(dataclasses.replace(program, probe=Probe()), slots, text, CPU)
    assert len(probed.measures) > 10
    assert_same(dataclasses.replace(probed, measures={}), plain)


@pytest.mark.cuda
def test_on_a_gpu_recorded_steps_have_the_same_bits_beside_probes_and_values_are_a_cpus(
    text: Text, cuda: torch.device
) -> None:
    shape = dataclasses.replace(SMALL, width=64, context=32)
    measures = tuple(name for name in NAMES if name not in ("spectral_density", "critical_sharpness"))
    probe = dataclasses.replace(ALL, measures=measures, eigenvalues=1)
    for recipe, changes in (("native-bf16", {}), ("e4m3", {}), ("native-fp32", {"steps": 0})):
        program, slots = setting(recipe, (1e-3, 4e-3), shape=shape, probe=probe, **({"steps": 12} | changes))
        if not program.steps:  # before the first step both devices have the same weights
            found = [
                take(m, AtPoint(Pack(program, slots, text, d), probe))[0] for d in (CPU, cuda) for m in measures[1:]
            ]
            for mine, theirs in zip(found[: len(found) // 2], found[len(found) // 2 :], strict=True):
                for name, values in mine.items():
                    if "n_" not in name and name not in ("residual", "converged"):  # which hang on when it was enough
                        np.testing.assert_allclose(theirs[name], values, rtol=3e-2, atol=1e-4, err_msg=name)
            continue
        probed = train_pack(program, slots, text, cuda)
        plain = train_pack(dataclasses.replace(program, probe=Probe()), slots, text, cuda)
        assert_same(dataclasses.replace(probed, measures={}, sharpness={}), plain)
        assert np.isfinite(probed.measures["hessian_eigenvalue/hessian_eigenvalue"]).all()


def test_ten_iterations_at_the_last_tokens_stay_below_the_exact_maximum_there(text: Text) -> None:
    program, slots = setting("native-fp32", (3e-3, 1e-2))
    pack = Pack(program, slots, text, CPU)
    with torch.no_grad():
        pack.parameters["wte"].mul_(100)  # logits that are far apart, at which ten iterations are too few
    probe = dataclasses.replace(ALL, positions="last", epsilons=(0.02, 0.3))
    at = AtPoint(pack, probe)
    found, exact = (take(m, at)[0] for m in ("logit_sharpness_lbfgsb", "logit_sharpness"))
    reached, upper = (found[f"logit_sharpness_lbfgsb_{end}"] for end in ("lower", "upper"))
    np.testing.assert_allclose(upper, exact["logit_sharpness"], rtol=1e-4)
    hidden, head, targets = at.last_states()
    by_hand = lbfgsb_logit_sharpness(hidden @ head.mT, targets, probe.epsilons)
    np.testing.assert_allclose(reached, by_hand.lower.mean(1), rtol=1e-2)
    assert (reached < upper * (1 + 1e-9)).all()
    assert (reached < (1 - 1e-6) * upper).all()
    assert (found["logit_sharpness_lbfgsb_n_forward"] > 1).all()


def test_a_probe_leaves_weights_moments_generators_and_switches_as_they_were(text: Text) -> None:
    measures = tuple(name for name in NAMES if name != "spectral_density")
    probe = dataclasses.replace(ALL, measures=measures, every=1, eigenvalues=1)
    program, slots = setting("e4m3", probe=probe)
    pack = Pack(program, slots, text, CPU)
    pack.step()
    before = {name: t.clone() for name, t in pack.state().items()}
    torch.manual_seed(5)
    rng, switches = torch.get_rng_state(), torch.are_deterministic_algorithms_enabled()
    pack.probes.measure(pack)
    assert torch.equal(torch.get_rng_state(), rng)
    assert torch.are_deterministic_algorithms_enabled() == switches
    changed = {
        name for name, t in pack.state().items() if not torch.equal(t.nan_to_num(-1), before[name].nan_to_num(-1))
    }
    assert {name.split(" ")[0] for name in changed} == {"probe", "vectors"}


def test_a_pack_that_goes_on_from_a_checkpoint_has_the_values_that_it_would_have_had(
    text: Text, tmp_path: Path
) -> None:
    """Stopped between probes and at one; the eigenvalues of the next start from the vectors of the one before."""
    probe = dataclasses.replace(ALL, measures=("hessian_eigenvalue", "m_sam_sharpness"), eigenvalues=1)
    program, slots = setting(probe=probe)
    whole = train_pack(program, slots, text, CPU)
    for stop in (1, 1):
        with pytest.raises(Interrupted):
            train_pack(program, slots, text, CPU, checkpointer=Checkpointer(tmp_path / "c", OF, 1e9, After(stop)))
    assert_same(train_pack(program, slots, text, CPU, checkpointer=Checkpointer(tmp_path / "c", OF, 1e9)), whole)


def dense(pack: Pack, run: int) -> tuple[Tensor, Tensor, Tensor]:
    """A run's Hessian [P, P], gradient and weights on the probe's batch: plain cross entropy, reverse over reverse, FP64."""
    shape, names = pack.program.shape, list(pack.parameters)
    tokens, targets = (t[run : run + 1] for t in pack.held_out[0])
    flat = torch.cat([pack.parameters[name][run].detach().double().flatten() for name in names])

    def loss(point: Tensor) -> Tensor:
        parts = point.split([pack.parameters[name][run].numel() for name in names])
        p = {name: part.view(1, *pack.parameters[name].shape[1:]) for name, part in zip(names, parts, strict=True)}
        numerics = pack.numerics._replace(attention="math")
        z = forward(p, tokens.view(1, -1, shape.context), shape, numerics, Layers(p, shape.head))
        return F.cross_entropy(z[0], targets[0])

    return torch.autograd.functional.hessian(loss, flat), torch.autograd.functional.jacobian(loss, flat), flat


def test_values_are_those_of_the_dense_hessian(text: Text) -> None:
    shape = ModelShape(layers=1, heads=1, width=4, context=4, vocabulary=32)
    probe = Probe(at_once=1, measures=tuple(MEASURES), quantisers="off", samples=64, radii=(1e-4,), eigenvalues=1)
    program, slots = setting("native-fp64", (3e-3, 1e-2), shape=shape, probe=probe, evaluation_sequences=4)
    pack = Pack(program, slots, text, CPU)
    assert len(pack.held_out) == 2, "the first of these is the probe's"
    for _ in range(4):
        pack.step()
    at = AtPoint(pack, probe)
    plain = (
        "hessian_eigenvalue",
        "smallest_eigenvalue",
        "preconditioned_eigenvalue",
        "hessian_trace",
        "gradient_curvature",
        "sam_sharpness",
    )
    found = {measure: take(measure, at)[0] for measure in plain}
    noisy = dataclasses.replace(probe, samples=200, radii=(0.01,))
    found["average_sharpness"] = take("average_sharpness", AtPoint(pack, noisy))[0]
    tiny = dataclasses.replace(probe, epsilons=(1e-6,))
    boxes = {m: take(m, AtPoint(pack, tiny))[0] for m in ("box_sharpness", "embedding_sharpness")}
    adam = program.optimizer
    for run in range(2):
        h, g, w = dense(pack, run)
        bottom, top = torch.linalg.eigvalsh(h)[[0, -1]].tolist()
        np.testing.assert_allclose(found["hessian_eigenvalue"]["hessian_eigenvalue"][run, 0], top, rtol=2e-3)
        assert bottom < -0.01 * top, "far enough from zero to tell the ends apart"
        smallest = found["smallest_eigenvalue"]["smallest_eigenvalue"][run, 0]
        np.testing.assert_allclose(smallest, bottom, atol=1e-2 * top)
        v = torch.cat([pack.kept[name].second[run].double().flatten() for name in pack.parameters])  # type: ignore[index]
        p = (1 - adam.beta1**4) * ((v / (1 - adam.beta2**4)).sqrt() + adam.eps)
        scale = torch.where(v > 0, p.rsqrt(), 0.0)
        edge = torch.linalg.eigvalsh(scale[:, None] * h * scale)[-1].item()
        np.testing.assert_allclose(
            found["preconditioned_eigenvalue"]["preconditioned_eigenvalue"][run, 0], edge, rtol=2e-3
        )
        trace, error = (found["hessian_trace"][f"hessian_trace{ending}"][run] for ending in ("", "_stderr"))
        assert abs(trace - h.trace().item()) < 5 * error
        np.testing.assert_allclose(found["gradient_curvature"]["gradient_norm"][run], g.norm().item(), rtol=1e-6)
        np.testing.assert_allclose(
            found["gradient_curvature"]["gradient_curvature"][run], (g @ h @ g / (g @ g)).item(), rtol=1e-5
        )
        rho = probe.radii[0]  # so small that the second order is the last that counts
        rise = rho * g.norm() + rho**2 / 2 * (g @ h @ g) / (g @ g)
        np.testing.assert_allclose(found["sam_sharpness"]["sam_sharpness"][run, 0], rise.item(), rtol=1e-4)
        # In a box so small the rise is along the gradient's signs.
        f, along = (
            found["gradient_curvature"]["loss"][run],
            (g.abs() * (w.abs() + 1)).split([pack.parameters[name][run].numel() for name in pack.parameters]),
        )
        embedding = along[list(pack.parameters).index("wte")].sum()
        for measure, of in (("box_sharpness", torch.cat(along).sum()), ("embedding_sharpness", embedding)):
            lower = boxes[measure][f"{measure}_lower"][run, 0]
            np.testing.assert_allclose(lower, 100 * 1e-6 * of.item() / (1 + f), rtol=1e-3, err_msg=measure)
        # Noise of 1 % of each weight tells of the slope: 200 samples know its spread to 5 %.
        spread = found["average_sharpness"]["average_sharpness_stderr"][run, 0] * 200**0.5
        np.testing.assert_allclose(spread, 0.01 * (g * w).norm().item(), rtol=0.25)


@pytest.mark.parametrize("option", ["mup", "untied"])
def test_the_update_is_the_step_that_training_has_just_made(option: str, text: Text) -> None:
    program, slots = setting(
        rates=(1e-4, 1e-4), shape=dataclasses.replace(SHAPES[option], layers=1), schedule="constant"
    )
    pack = Pack(program, slots, text, CPU)
    for _ in range(3):
        before = {name: p.detach().clone() for name, p in pack.parameters.items()}
        pack.step()
    rate = pack.rates[2]
    for name, d in AtPoint(pack, ALL).update.items():
        made = (before[name] - pack.parameters[name].detach()) / rate.view(-1, *(1,) * (d.ndim - 1))
        # Of weights of about 0.3 a step of 1e-4 is known to their rounding, 2^-25 / 1e-4.
        torch.testing.assert_close(d, made, rtol=1e-3, atol=2e-3)


def test_differences_of_gradients_agree_with_derivatives_where_nothing_is_rounded(text: Text) -> None:
    program, slots = setting("native-fp64", (3e-3, 1e-2))
    pack = Pack(program, slots, text, CPU)
    found = [
        take("gradient_curvature", AtPoint(pack, dataclasses.replace(ALL, quantisers=word)))[0]["gradient_curvature"]
        for word in ("off", "finite-difference")
    ]
    np.testing.assert_allclose(found[1], found[0], rtol=1e-4)


def test_whether_sequences_come_one_by_one_changes_rounding_alone(text: Text) -> None:
    program, slots = setting(rates=(3e-3, 1e-2))
    pack = Pack(program, slots, text, CPU)
    for measure in ("gradient_curvature", "sam_sharpness", "m_sam_sharpness", "hidden_sharpness"):
        one, other = (take(measure, AtPoint(pack, dataclasses.replace(ALL, at_once=n)))[0] for n in (1, 2))
        for name, values in one.items():
            np.testing.assert_allclose(values, other[name], rtol=2e-4, atol=1e-6, err_msg=name)


def test_a_question_without_an_answer_costs_its_values_and_not_the_training(
    text: Text, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refused(measure: str, *_: Any) -> Any:
        if measure == "hessian_trace":
            raise LandscapeError("no")
        return take(measure, *_)

    monkeypatch.setattr(probing, "take", refused)
    probe = dataclasses.replace(ALL, measures=("hessian_trace", "sam_sharpness"))
    program, slots = setting(probe=probe)
    with caplog.at_level(logging.WARNING):
        result = train_pack(program, slots, text, CPU)
    assert "hessian_trace after step 2 can't be taken: no" in caplog.text
    assert np.isnan(result.measures["hessian_trace/hessian_trace"]).all()
    assert np.isfinite(result.measures["sam_sharpness/sam_sharpness"][:, :2]).all()


@pytest.mark.parametrize(
    ("measure", "at_once", "context"),
    [
        ("gradient_curvature", 1, 32),
        ("gradient_curvature", 4, 32),
        ("hessian_eigenvalue", 1, 4),
    ],
)
def test_the_memory_of_a_probe_is_estimated_from_above_and_not_far(
    measure: str, at_once: int, context: int, text: Text, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of activations, and of the vectors of a basis; on a CPU."""
    monkeypatch.setattr(taking, "MAX_HVP", 14)  # restarts once, and is looked at operation by operation
    probe = Probe(every=1, measures=(measure,), at_once=at_once, samples=2, quantisers="off")
    shape = dataclasses.replace(SHAPE, context=context, width=16 if context > 4 else 64)
    program, slots = setting("native-fp32", (1e-3, 1e-3), shape=shape, probe=probe)
    pack = Pack(program, slots, text, CPU)
    measured = most_memory(lambda: take(measure, AtPoint(pack, probe))) / 2
    assert measured <= bytes_of_a_probe(program) <= 4 * measured
    assert program.bytes_per_run(False) >= bytes_of_a_probe(program)
    assert kept_bytes(make_program(probe=ALL)) == 3 * 2 * 4 * SHAPE.size
