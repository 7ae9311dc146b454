"""The studies that come with exmy: each trains in miniature, with its claims; heads, of pilots too, say what they take."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import train.estimate
from exmy.claims import grids_of, own_claims
from tests.miniatures import PEERS, in_small, miniature
from train import open_study, read_study, run_study
from train import plan as plan_module
from train.claims import Claim, Claims, by_study, judge, read_claims
from train.estimate import Estimate, Rates, estimate, total
from train.signals import SIGNALS
from train.study import Run
from train.study_alarms import study_signals

STUDIES = Path(__file__).parent.parent / "studies"
FIRST = ("seeds", "mantissa", "conditions", "exponent", "rounding", "scaling", "size")
SECOND = ("fp8", "hardware", "switch", "layers", "data", "schedules", "optimizer")
ALARMS = ("warning", "warning-english", "warning-6x256", "curvature")
UNCLAIMED = (*ALARMS, "llama-120m")  # a ranking, and a confirmation that has two seeds
NAMES = (*FIRST, *SECOND, *UNCLAIMED)
FILES = [STUDIES / f"{name}.toml" for name in NAMES]
PILOTS = sorted((STUDIES / "pilots").glob("*.toml"))
BY_FILE = dict(
    zip((FIRST, SECOND), map(read_claims, own_claims()), strict=True)
)  # of the studies that each file is about
CLAIMS = [claim for claims in BY_FILE.values() for claim in claims.claims]
H100 = Rates(700e12, 2.9e12)  # as benchmarks/results/h100-packs.json has them
MINUTES = {FIRST: 60, (*SECOND, *UNCLAIMED): 100}  # on one H100, of all together
LONGEST = {"llama-120m": 40}  # minutes, where that is more than any other may take
RECORDED = {"train_loss", "grad_norm", "gnmr", *SIGNALS} | {
    f"{name} at epsilon 0.001" for name in ("logit_sharpness", "logit_sharpness_centred")
}
MEASURED = {  # Keskar's own, curvature, critical sharpness, balls: once, beside the others
    "box_sharpness at epsilon 0.001", "hidden_sharpness at epsilon 0.001", "hessian_eigenvalue at rank 0",
    "preconditioned_eigenvalue at rank 0", "critical_sharpness", "gradient_curvature", "sam_sharpness at rho 0.05",
    "asam_sharpness at rho 0.5", "logit_sharpness_lbfgsb at epsilon 0.001",
}  # fmt: skip
MEGABYTES = dict.fromkeys(ALARMS, 10)  # of results, where that is more than 4


@pytest.fixture
def h100(monkeypatch: pytest.MonkeyPatch) -> torch.device:
    """A card of 80 GiB on which steps are compiled, as far as plans can tell."""
    monkeypatch.setattr(plan_module, "free_memory", lambda _: 80 * 2**30)
    for module in (plan_module, train.estimate):
        monkeypatch.setattr(module, "compiles_steps", lambda _: True)
    return torch.device("cuda")


def taken(path: Path, device: torch.device) -> tuple[int, int, Estimate]:
    """Runs, programs, and what they take."""
    packs = plan_module.plan(read_study(path), device)
    found = total(packs, [estimate(pack, "cuda", H100) for pack in packs])
    return sum(len(pack.runs) for pack in packs), len({pack.program for pack in packs}), found


@pytest.mark.parametrize("path", [*FILES, *PILOTS], ids=lambda path: f"{path.parent.name}-{path.stem}")
def test_a_studys_head_says_what_it_takes(path: Path, h100: torch.device) -> None:
    runs, programs, found = taken(path, h100)
    line = (
        f"# {runs:,} runs, {programs} programs; on an H100 about {found.seconds / 60:.1f} minutes of training and "
        f"{found.compiling / 60:.1f} of compiling (train/estimate.py).\n"
    )
    assert line in path.read_text(encoding="utf-8"), f"it takes what this line says: {line}"


@pytest.mark.parametrize("names", MINUTES, ids=lambda names: f"{len(names)}")
def test_no_study_takes_longer_than_twenty_minutes_and_all_of_them_fit_an_hour_or_two(
    names: tuple[str, ...], h100: torch.device
) -> None:
    each = {name: taken(STUDIES / f"{name}.toml", h100)[2] for name in names}
    minutes = {name: (of.seconds + of.compiling) / 60 for name, of in each.items()}
    assert {name: m for name, m in minutes.items() if m > LONGEST.get(name, 20)} == {}
    assert sum(minutes.values()) < MINUTES[names]


def test_no_pilot_has_a_seed_of_a_study_or_a_claim() -> None:
    pilots, studies = [read_study(path) for path in PILOTS], [read_study(path) for path in FILES]
    assert pilots
    theirs, ours = ({seed for of in each for axes in of.blocks for seed in axes.seed} for each in (pilots, studies))
    assert not theirs & ours
    assert not {study.name for study in pilots} & {claim.study for claim in CLAIMS}


def test_every_study_has_claims_and_every_claim_has_the_runs_that_its_looks_need() -> None:
    for names, claims in BY_FILE.items():
        assert {claim.study for claim in claims.claims} == set(names)
    assert len({claim.name for claim in CLAIMS}) == len(CLAIMS), "a name in two files"
    runs = {name: list(read_study(STUDIES / f"{name}.toml").runs()) for name in (*FIRST, *SECOND)}
    for claim in CLAIMS:
        for of in (claim, *([claim.elsewhere] if claim.elsewhere else [])):
            assert seeds_of(of, runs[claim.study]) >= claim.looks[-1], claim.name


def seeds_of(claim: Claim, runs: list[Run]) -> int:
    """How many seeds both of its recipes share where it looks: at its rate; else at the rate of the most; of one group alone."""
    meant = [run for run in runs if claim.where.items() <= words(run).items()]
    assert len({tuple(words(run).items()) for run in meant}) == 1, f"{claim.name}: where names no one group"
    rates = {run.learning_rate for run in meant}
    assert claim.learning_rate is None or claim.learning_rate in rates, claim.name
    shared = []
    for rate in [claim.learning_rate] if claim.learning_rate else rates:
        seeds = [
            {run.seed for run in meant if (run.recipe.name, run.learning_rate) == (recipe, rate)}
            for recipe in (claim.recipe, claim.baseline)
        ]
        shared.append(len(set.intersection(*seeds)))
    # A window or a sensitivity looks at all rates, and a mean at those of both; a rate that is the best may be any of them.
    return min(shared)


def words(run: Run) -> dict[str, str]:
    """What groups runs, as a claim has it."""
    return {"dataset": run.dataset} | {axis: str(value).removesuffix(".0") for axis, value in run.extra_axes}


# --- in miniature


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Small texts in the places of the studies'."""
    folder = tmp_path_factory.mktemp("texts")
    sentences = {
        "python": "def f(x):\n    return x + {}\n",
        "english": "It is the {}th time.\n",
        "maths": "$( {} is in NN0. $)\n",
    }
    for name, sentence in sentences.items():
        own = folder / in_small("dataset", name)
        own.mkdir()
        for part in range(20):
            lines = [sentence.format(number) for number in range(part, 400 + part)]
            (own / f"{part}.txt").write_text("".join(lines), encoding="utf-8")
    return folder


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_a_study_trains_in_miniature_and_its_claims_are_undecided(
    path: Path, texts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("EXMY_CACHE", str(tmp_path / "cache"))
    about = [claim for claim in CLAIMS if claim.study == read_study(path).name]
    study, replaced = miniature(path, texts, {claim.learning_rate for claim in about if claim.learning_rate})
    assert replaced == ({"native-tf32"} if path.stem == "seeds" else set()), "what has a simulated peer in its place"
    out = run_study(study, tmp_path / "out", "cpu").directory
    tree = open_study(out)
    assert tree.attrs["runs_finished"] == tree.attrs["runs_planned"] > 0
    full = read_study(path)
    assert {PEERS.get(name, name) for name in full.recipes_named} == set(
        tree["summary"].to_dataset()["recipe"].values.tolist()
    )
    if path.stem in ALARMS:
        wanted = RECORDED | (MEASURED if path.stem == "curvature" else set())
        assert wanted - {name for name, _ in study_signals(tree)} == set()
    if path.stem in UNCLAIMED:
        assert not about
        return
    monkeypatch.setattr("exmy.verdict.open_study", lambda _: tree)  # reading it again takes as long as training
    grids = by_study({study.name: grids_of([out])})
    for found in judge(Claims(claims=tuple(map(with_peers, about))), grids):
        assert (found.state, found.looks, found.n) == ("undecided", 0, 2), found.claim.name
    for found in judge(Claims(claims=tuple(looked_at(with_peers(claim)) for claim in about)), grids):
        assert (found.looks, found.n) == (1, 2), found.claim.name
        # A CPU's FP8 products sum in FP32, to the bits of the simulated ones.
        assert 0 < found.p <= 1 or (path.stem == "hardware" and found.p == found.effect == 0), found.claim.name


def with_peers(claim: Claim) -> Claim:
    """The claim about the recipes that a miniature has."""
    names = {name: PEERS.get(getattr(claim, name), getattr(claim, name)) for name in ("recipe", "baseline")}
    small = {axis: in_small(axis, value) for axis, value in claim.where.items()}
    beyond = claim.beyond and {axis: in_small(axis, value) for axis, value in claim.beyond.items()}
    return claim.model_copy(update={**names, "where": small, "beyond": beyond})


def looked_at(claim: Claim) -> Claim:
    """The claim looked at with two seeds, so that its statistic is worked out."""
    return claim.model_copy(update={"looks": (2,), "smallest_n": 2})


# --- on the datasets that are committed: digests, made by `make study` (see `train.digest`)


def test_committed_datasets_are_small() -> None:
    """In bytes: of each study 4 MB, of one with every alarm signal more, and 40 MB of all that is in studies/results."""
    folder = STUDIES / "results"
    each = {of.name: sum(path.stat().st_size for path in of.rglob("*") if path.is_file()) for of in folder.iterdir()}
    assert {name: size for name, size in each.items() if size > 1e6 * MEGABYTES.get(name, 4)} == {}
    assert 0 < sum(each.values()) < 40e6


@pytest.mark.parametrize("name", [*FIRST, *SECOND])
def test_claims_are_evaluated_on_the_committed_dataset(name: str) -> None:
    folder = STUDIES / "results" / name
    if not folder.is_dir():
        pytest.skip(f"no results of {name} in studies/results yet")
    claims = next(claims for names, claims in BY_FILE.items() if name in names)
    found = judge(claims, by_study({name: grids_of([folder])}))
    about = [of for of in found if of.claim.study == name]
    assert about
    assert all(of.looks == len(of.claim.looks) for of in about), "a look that was planned was not taken"
