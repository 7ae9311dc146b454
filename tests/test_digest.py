"""A digest says of a study what its packs say, in fewer bytes: nothing is rounded, judged anew or left in doubt."""

from __future__ import annotations

import shutil
import warnings
from pathlib import Path

import numpy as np
import pytest
import xarray as xr
from click.testing import CliRunner, Result

from exmy.cli import main
from tests.report_page import Page
from tests.test_lazy import Silent, study
from train import StudyError, open_study, run_study
from train.digest import DIGEST, digest_of, write_digest
from train.signals import SIGNALS
from train.status import study_status
from train.study_alarms import study_warnings

CPU = Path(__file__).parent.parent / "studies" / "results" / "first-look-cpu"
SHARPNESS = [
    f"{name} at epsilon {e:g}" for name in ("logit_sharpness", "logit_sharpness_centred") for e in (5e-4, 1e-3)
]
OWN = {"gnmr", "grad_norm_block", "gnmr_block"}


def exmy(*arguments: object) -> Result:
    return CliRunner().invoke(main, [*map(str, arguments)])


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three seeds with signals, some of whose runs end in NaN."""
    directory = tmp_path_factory.mktemp("digested")
    run_study(study(axes={"seed": 3, "layers": [2]}), directory, "cpu", Silent())
    return directory


@pytest.fixture(scope="module")
def whole(directory: Path) -> xr.DataTree:
    """The study, opened."""
    return open_study(directory)


@pytest.fixture(scope="module")
def digest(directory: Path, whole: xr.DataTree, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Its digest, every third step, signals of two seeds."""
    folder = tmp_path_factory.mktemp("digest")
    write_digest(whole, directory, folder, every=3, seeds=2)
    return folder


@pytest.fixture(scope="module")
def small(digest: Path) -> xr.DataTree:
    """The digest, opened."""
    return open_study(digest)


def test_what_is_not_thinned_is_there_to_the_bit(whole: xr.DataTree, small: xr.DataTree, digest: Path) -> None:
    assert set(small.children) == set(whole.children)
    for group in set(whole.children) - {"history", "signals"}:
        ours, theirs = small[group].to_dataset(), whole[group].to_dataset()
        xr.testing.assert_identical(ours, theirs)
        for name, of in theirs.data_vars.items():
            assert ours[name].dtype == of.dtype
            assert ours[name].values.tobytes() == of.values.tobytes(), f"{group}/{name}"
    assert small.attrs == {**whole.attrs, "digest_every": 3, "digest_signal_seeds": 2}
    assert [path.name for path in sorted(digest.iterdir())] == ["digest.nc", "digest.sha256", "study.toml"]


def test_histories_have_every_third_step_and_none_of_their_numbers_changed(
    whole: xr.DataTree, small: xr.DataTree
) -> None:
    ours, theirs = (tree["history"].to_dataset() for tree in (small, whole))
    assert bool(theirs["train_loss"].isnull().any())
    assert set(theirs.data_vars) - set(ours.data_vars) == OWN
    assert ours["step"].values.tolist() == list(range(0, theirs.sizes["step"], 3))
    for name in ("train_loss", "grad_norm"):
        assert ours[name].values.tobytes() == np.ascontiguousarray(theirs[name].values[:, ::3]).tobytes()
    xr.testing.assert_identical(ours["last_step"], theirs["last_step"])


def test_signals_are_those_of_the_first_seeds_and_say_so(whole: xr.DataTree, small: xr.DataTree) -> None:
    ours, theirs = (tree["signals"].to_dataset() for tree in (small, whole))
    kept = np.isin(theirs["seed"].values, (0, 1))
    assert ours["measured"].values.tolist() == (kept & theirs["measured"].values).tolist()
    assert 0 < kept.sum() < kept.size
    for name in set(theirs.data_vars) - {"measured"}:
        assert ours[name].values[kept].tobytes() == theirs[name].values[kept].tobytes()
        assert np.isnan(ours[name].values[~kept]).all()


def test_alarms_judge_a_digest_for_them_as_they_do_the_packs(tmp_path: Path, directory: Path) -> None:
    """Of each signal and sharpness, at its own steps; but for what is known beside it, loss and gradient norm of every third."""
    shutil.copytree(directory, tmp_path / "study")
    path = tmp_path / "study" / "study.toml"
    path.write_text(
        path.read_text().replace('definition = "no_progress"', 'definition = "gap"')
    )  # in short runs all make none
    whole = open_study(tmp_path / "study")
    (tmp_path / "small").mkdir()
    write_digest(whole, tmp_path / "study", tmp_path / "small", every=3, alarms=True)
    small = open_study(tmp_path / "small")
    theirs = study_warnings(whole, 2, 0.5)
    assert set(theirs["signal"].values) == {"train_loss", "grad_norm", "gnmr", *SIGNALS, *SHARPNESS}
    ours = study_warnings(small, 2, 0.5)
    assert ours.attrs == theirs.attrs
    assert 0 < ours.attrs["diverged"] < ours.attrs["runs"]
    beside = [name for name in theirs.data_vars if str(name).startswith("gain")]
    recorded = [name for name in theirs["signal"].values if name not in ("train_loss", "grad_norm", "gnmr")]
    xr.testing.assert_identical(*(of.drop_vars(beside).sel(signal=recorded) for of in (ours, theirs)))
    assert small["signals"].to_dataset()["kurtosis"].dims == ("run", "signal_step")
    kept, all_of_it = (tree["history"].to_dataset()["gnmr"].values for tree in (small, whole))
    assert np.array_equal(kept, all_of_it[:, ::3], equal_nan=True)
    assert small.attrs["digest_signals"] == "loudest"


def test_a_digest_for_alarms_is_one(tmp_path: Path, directory: Path) -> None:
    refused = exmy("export", directory, "--zarr", tmp_path / "z", "--alarms")
    assert (refused.exit_code, "none is written" in refused.output) == (2, True)
    for name, more in (("all", []), ("alarms", ["--alarms"])):
        assert exmy("export", directory, "--digest", tmp_path / name, *more).exit_code == 0
    assert "onset" in open_study(tmp_path / "alarms")["summary"]
    assert "onset" not in open_study(tmp_path / "all")["summary"]


def test_in_chunks_it_is_the_same(small: xr.DataTree, digest: Path) -> None:
    lazy = open_study(digest, chunks=2)
    assert lazy["history"].to_dataset().chunks["run"][0] == 2
    for group in small.children:
        xr.testing.assert_identical(lazy[group].to_dataset().load(), small[group].to_dataset())


def test_a_verdict_on_a_digest_is_the_studys(tmp_path: Path) -> None:
    made = exmy("export", CPU, "--digest", tmp_path / "small")
    assert (made.exit_code, made.output) == (0, f"{tmp_path / 'small'}\n")
    for command in ("verdict e4m3 {}", "compare {}", "alarms {} --horizon 100"):
        ours, theirs = (exmy(*command.format(place).split()) for place in (tmp_path / "small", CPU))
        assert ours.exit_code == theirs.exit_code
        if "alarms" not in command:  # which looks at steps, and has a tenth of them
            assert ours.output == theirs.output
    bytes_of = [sum(path.stat().st_size for path in place.rglob("*.nc")) for place in (tmp_path / "small", CPU)]
    assert bytes_of[0] < bytes_of[1] / 2  # labels and attributes weigh; of more steps less


def test_a_digest_is_told_of_and_shown_as_what_it_is(tmp_path: Path) -> None:
    """What the committed packs are told to be, but for the files that are not there; the page judges alike."""
    small = tmp_path / "small"
    assert exmy("export", CPU, "--digest", small).exit_code == 0
    ours, theirs = study_status(small), study_status(CPU)
    assert ours["runs"] == theirs["runs"]
    assert (ours["state"], ours["digest"], theirs["digest"]) == ("finished", True, False)
    said = exmy("status", small).output
    assert f"digest of all {theirs['runs']['planned']} runs" in said.replace("\n", " ")
    assert "exmy resume" not in said
    pages = []
    for place, name in ((small, "small"), (CPU, "whole")):
        assert exmy("report", place, "--out", tmp_path / name / "page").exit_code == 0
        pages.append(Page((tmp_path / name / "page" / "index.html").read_text(encoding="utf-8")))
    digested, whole = (page.content["studies"][0] for page in pages)
    assert digested["groups"][0]["verdicts"] == whole["groups"][0]["verdicts"]
    assert digested["run"]["final"] == whole["run"]["final"]
    assert "digest" in digested["digest"]
    assert not whole["digest"]
    assert (digested["curves"]["over"], whole["curves"]["over"]) == ("1 step of 10", "3 steps")


def test_a_digest_of_some_runs_says_so(tmp_path: Path) -> None:
    shutil.copytree(CPU, tmp_path / "study")
    next((tmp_path / "study" / "packs").glob("*.nc")).unlink()
    assert exmy("export", tmp_path / "study", "--digest", tmp_path / "small").exit_code == 0
    status = study_status(tmp_path / "small")
    runs = status["runs"]
    assert status["state"] == "incomplete"
    assert 0 < runs["finished"] < runs["planned"]
    assert f"{runs['finished']} of {runs['planned']} runs" in status["message"]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["resume"], "can be looked at and not be gone on with: name another directory with --out"),
        (["sweep", "STUDY", "--out"], "can be looked at and not be gone on with"),
        (["sweep", "STUDY", "--dry-run", "--out"], "can be looked at and not be gone on with"),
        (["merge", "--out", "NEW"], "without packs to copy"),
        (["landscape"], "no weights are kept there"),
    ],
)
def test_what_a_digest_is_too_little_for_is_refused_in_a_line(
    arguments: list[str], said: str, digest: Path, tmp_path: Path
) -> None:
    places = {"STUDY": digest / "study.toml", "NEW": tmp_path / "new"}
    refused = exmy(*[places.get(word, word) for word in arguments], digest)
    assert refused.exit_code == 2
    assert said in refused.output
    assert refused.output.count("\n") == 1
    assert [path.name for path in sorted(digest.iterdir())] == ["digest.nc", "digest.sha256", "study.toml"]
    assert not (tmp_path / "new").exists()


def test_a_digest_is_exported_without_a_warning(digest: Path, tmp_path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert exmy("export", digest, "--zarr", tmp_path / "z").exit_code == 0
    with xr.open_datatree(tmp_path / "z", engine="zarr") as stored:
        whole, kept = (tree["summary"].to_dataset()["recipe"].values for tree in (open_study(digest), stored))
        assert kept.tolist() == whole.tolist()


def test_packs_come_before_a_digest_of_them(tmp_path: Path, digest: Path) -> None:
    shutil.copytree(CPU, tmp_path / "both")
    shutil.copy(digest / DIGEST, tmp_path / "both" / DIGEST)
    assert open_study(tmp_path / "both").attrs["name"] == "first-look-cpu"


def test_a_damaged_digest_is_refused_in_a_line(tmp_path: Path, digest: Path) -> None:
    shutil.copytree(digest, tmp_path / "small")
    content = bytearray((tmp_path / "small" / DIGEST).read_bytes())
    content[len(content) // 2] ^= 1
    (tmp_path / "small" / DIGEST).write_bytes(content)
    with pytest.raises(StudyError, match=r"digest\.nc: damaged") as refused:
        open_study(tmp_path / "small")
    assert "\n" not in str(refused.value)


def test_what_is_there_is_replaced_by_force_alone_and_never_what_is_no_digest(tmp_path: Path, digest: Path) -> None:
    shutil.copytree(digest, tmp_path / "small")
    again = exmy("export", CPU, "--digest", tmp_path / "small")
    assert (again.exit_code, "there already" in again.output) == (2, True)
    assert exmy("export", CPU, "--digest", tmp_path / "small", "--force").exit_code == 0
    assert open_study(tmp_path / "small").attrs["name"] == "first-look-cpu"
    shutil.copytree(CPU, tmp_path / "study")
    for place in (tmp_path / "study", tmp_path):
        refused = exmy("export", CPU, "--digest", place, "--force")
        assert (refused.exit_code, "no digest of a study" in refused.output) == (2, True)
    nested = exmy("export", tmp_path / "small", "--digest", tmp_path / "smaller")
    assert (nested.exit_code, "a digest itself" in nested.output) == (2, True)
    assert exmy("export", CPU).exit_code == 2


@pytest.mark.parametrize("numbers", [(0, 1), (1, 0)])
def test_numbers_that_are_none_are_refused(whole: xr.DataTree, numbers: tuple[int, int]) -> None:
    with pytest.raises(ValueError, match="at least 1, got"):
        digest_of(whole, *numbers)
