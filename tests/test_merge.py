"""Studies of one design made one: every run once, with the bits that it had; and what is refused."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import tomli_w
import xarray as xr
from click.testing import CliRunner

from exmy.cli import main
from train import StudyError, merge_studies, open_study, read_study, run_study
from train.afterwards import Measured, measure_study
from train.durable import is_intact

BASE = {
    "name": "part",
    "axes": {"recipe": ["e8m7", "e4m3"], "learning_rate": [1e-3], "seed": [0, 1]},
    "model": {"layers": 1, "heads": 2, "width": 16, "context": 8},
    "training": {"steps": 4, "sequences": 2, "warmup": 1, "evaluate_every": 4},
    "probe": {"every": 0},
    "execution": {"pack_size": 1},
}


def trained(folder: Path, **axes: object) -> Path:
    path = folder.with_suffix(".toml")
    path.write_text(tomli_w.dumps(BASE | {"axes": BASE["axes"] | axes}), encoding="utf-8")  # type: ignore[operator]
    run_study(path, folder, "cpu")
    return folder


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("parts")
    return {
        "first": trained(folder / "first"),
        "more seeds": trained(folder / "more", seed=[1, 2]),
        "another rate": trained(folder / "rate", learning_rate=[1e-2]),
        "whole": trained(folder / "whole", seed=[0, 1, 2]),
    }


def test_two_parts_are_the_whole_bit_for_bit(parts: dict[str, Path], tmp_path: Path) -> None:
    """Packs of one run: whatever R is, here it is the same. Seed 1 is in both parts, and there once."""
    merged = merge_studies([parts["first"], parts["more seeds"]], tmp_path / "all")
    assert (merged.runs, merged.packs, merged.left_out) == (6, 6, 2)
    ours, whole = open_study(tmp_path / "all"), open_study(parts["whole"])
    for group in ("history", "evaluation", "summary"):
        xr.testing.assert_identical(ours[group].to_dataset().drop_attrs(), whole[group].to_dataset().drop_attrs())
    assert read_study(tmp_path / "all" / "study.toml").hash == read_study(parts["whole"] / "study.toml").hash
    copied = sorted((tmp_path / "all" / "packs").glob("*.nc"))
    assert len(copied) == 6
    assert all(is_intact(path) for path in copied)


def test_a_sweep_trains_what_the_parts_multiply_out_to_and_lack(parts: dict[str, Path], tmp_path: Path) -> None:
    """Seeds 0 and 1 at one rate, 1 and 2 at another are six runs of recipes' twelve."""
    out = tmp_path / "all"
    result = CliRunner().invoke(
        main, ["merge", str(parts["more seeds"]), str(parts["another rate"]), "--out", str(out), "--name", "both"]
    )
    assert result.exit_code == 0, result.output
    assert f"{out}: 8 of 12 runs in 8 packs; 0 packs had nothing new" in result.output
    assert f"To train the others: exmy resume {out}" in result.output
    study = read_study(out / "study.toml")
    assert study.name == "both"
    assert study.axes.seed == [1, 2, 0]
    outcome = run_study(study, out, "cpu")
    assert (outcome.trained, outcome.found) == (4, 8)


def test_weights_that_were_kept_and_measured_come_along(tmp_path: Path) -> None:
    folders = []
    for seed in (0, 1):
        path = tmp_path / f"{seed}.toml"
        probe = {"every": 4, "snapshots": [f"e4m3, seed={seed}"], "measures": ["m_sam_sharpness"]}
        path.write_text(tomli_w.dumps(BASE | {"axes": BASE["axes"] | {"seed": [seed]}, "probe": probe}))  # type: ignore[operator]
        folders.append(tmp_path / str(seed))
        run_study(path, folders[-1], "cpu")
        measure_study(folders[-1], device="cpu")
    merged = merge_studies(folders, tmp_path / "all")
    assert merged.study.probe.snapshots == ["e4m3, seed=0", "e4m3, seed=1"]
    both = open_study(tmp_path / "all")["landscape/on/m_sam_sharpness"].to_dataset()
    for folder in folders:
        one = open_study(folder)["landscape/on/m_sam_sharpness"].to_dataset()
        xr.testing.assert_equal(both.sel(run=one["run"]), one)
    assert both["measured"].sum() == 2
    assert measure_study(tmp_path / "all", device="cpu") == Measured(0, 4, 0)


def changed(part: Path, out: Path, old: str, new: str) -> Path:
    shutil.copytree(part, out)
    text = (out / "study.toml").read_text(encoding="utf-8")
    assert old in text
    (out / "study.toml").write_text(text.replace(old, new), encoding="utf-8")
    return out


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("steps = 4", "steps = 5", r"training.steps is 5, and 4 in .*first: only studies"),
        ("every = 10", "every = 5", r"signals.every is 5, and 10"),
        ('baseline = "e8m7"', 'baseline = "e4m3"', r"baseline is 'e4m3', and 'e8m7'"),
        ("seed = [", "init_seed = [", r"axes.init_seed, seed is in this study or in .*first, and not in both"),
    ],
)
def test_other_designs_are_refused(old: str, new: str, message: str, parts: dict[str, Path], tmp_path: Path) -> None:
    if "baseline" in old:
        text = (parts["first"] / "study.toml").read_text(encoding="utf-8")
        old, new = ('name = "part"', f'name = "part"\n{new}') if "baseline" not in text else (old, new)
    other = changed(parts["first"], tmp_path / "other", old, new)
    with pytest.raises(StudyError, match=message) as refused:
        merge_studies([parts["first"], other], tmp_path / "all")
    assert "\n" not in str(refused.value)
    assert not (tmp_path / "all").exists()


def test_how_a_study_was_executed_is_no_part_of_its_design(parts: dict[str, Path], tmp_path: Path) -> None:
    other = changed(parts["more seeds"], tmp_path / "other", "pack_size = 1", "pack_size = 4")
    assert merge_studies([parts["first"], other], tmp_path / "all").runs == 6


def test_a_damaged_pack_another_text_and_a_full_directory_are_refused(parts: dict[str, Path], tmp_path: Path) -> None:
    damaged = tmp_path / "damaged"
    shutil.copytree(parts["more seeds"], damaged)
    path = min((damaged / "packs").glob("*.nc"))
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(StudyError, match="a damaged pack"):
        merge_studies([parts["first"], damaged], tmp_path / "all")
    other = tmp_path / "text"
    shutil.copytree(parts["more seeds"], other)
    for path in (other / "packs").glob("*.nc"):
        with xr.open_datatree(path, engine="h5netcdf") as kept:
            tree = kept.load()
        tree.attrs["dataset_sha256"] = "0" * 64
        path.with_suffix(".sha256").unlink()
        tree.to_netcdf(path, engine="h5netcdf")
    with pytest.raises(StudyError, match=r"another text 'python' \(000000000000\)"):
        merge_studies([parts["first"], other], tmp_path / "all")
    assert not (tmp_path / "all").exists()
    with pytest.raises(StudyError, match="there already"):
        merge_studies([parts["first"]], parts["whole"])
    with pytest.raises(StudyError, match=r"no study.toml here"):
        merge_studies([parts["first"], tmp_path], tmp_path / "all")
