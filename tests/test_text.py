"""The text: which files, in which order, split how; and that a cache never gives anything but what the source says."""

from __future__ import annotations

import dataclasses
import hashlib
import math
import os
import sysconfig
import warnings
from pathlib import Path

import numpy as np
import pytest

from train import standard_library
from train.cache import cache_folder
from train.documents import TextError, is_validation
from train.standard_library import source_files
from train.text import KNOWN_TEXTS, check_dataset, dataset_label, load_text, unigram_entropy

LEFT_OUT = [
    "test/a.py",
    "pkg/tests/b.py",
    "idlelib/idle_test/c.py",
    "site-packages/d.py",
    "dist-packages/e.py",
    "pkg/__pycache__/f.py",
    "config-3.11-x86_64/g.py",
    "_sysconfigdata_linux.py",
    "pkg/readme.txt",
    "pkg/h.pyc",
]


@pytest.fixture
def library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A small standard library: 40 files of 50 kB, and beside them everything that must be left out."""
    root = tmp_path / "lib"
    for i in range(40):
        path = root / ("pkg" if i % 2 else ".") / f"m{i:02d}.py"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(bytes([65 + i % 26]) * 50_000)
    for left_out in LEFT_OUT:
        (root / left_out).parent.mkdir(parents=True, exist_ok=True)
        (root / left_out).write_bytes(b"!" * 1000)
    monkeypatch.setattr(sysconfig, "get_path", lambda _: str(root))
    return root


def expected_split(root: Path) -> tuple[bytes, bytes]:
    """The definition once more, in other words: every file we made, ordered by its posix path."""
    made = sorted(p.relative_to(root).as_posix() for p in root.rglob("m[0-9][0-9].py"))
    held_out = [int(hashlib.blake2b(p.encode(), digest_size=8).hexdigest(), 16) / 2**64 < 0.1 for p in made]
    content = [(root / p).read_bytes() + b"\x00" for p in made]
    return (
        b"".join(c for c, h in zip(content, held_out, strict=True) if not h),
        b"".join(c for c, h in zip(content, held_out, strict=True) if h),
    )


def test_it_is_the_source_in_path_order_each_file_closed_by_nul_split_by_file(library: Path, tmp_path: Path) -> None:
    text = load_text("python", tmp_path / "cache")
    train, validation = expected_split(library)
    assert text.train.tobytes() == train
    assert text.validation.tobytes() == validation
    assert len(validation) > 0
    assert b"!" not in train + validation
    assert text.train.dtype == text.validation.dtype == np.uint8
    assert text.vocabulary == 256
    assert "40 files" in text.source


def test_the_installed_library_is_about_ten_megabytes_of_compilable_source(tmp_path: Path) -> None:
    text = load_text("python", tmp_path)
    total = text.train.size + text.validation.size
    assert total > 5_000_000
    # 10 % of about 730 files by a hash: the count has a standard deviation of 1 %, the bytes more, as lengths differ.
    assert 0.05 < text.validation.size / total < 0.16
    first_file = text.train.tobytes().split(b"\0", 1)[0]
    compile(first_file, "first", "exec")
    # Bytes of Python source lie between 3 and 3.5 nats a byte (3.24 measured); uniform bytes would be ln 256 = 5.55.
    assert 3.0 < text.unigram_entropy < 3.5
    assert total == sum(
        (Path(sysconfig.get_path("stdlib")) / p).stat().st_size + 1
        for p in source_files(Path(sysconfig.get_path("stdlib")))
    )


@pytest.mark.parametrize(
    ("path", "held_out"),
    # Pinned: these may never change, or studies of two versions would validate on each other's training text.
    [("abc.py", False), ("asyncio/events.py", True), ("gzip.py", True), ("json/decoder.py", False)],
)
def test_the_split_is_a_function_of_the_path_alone(path: str, held_out: bool) -> None:
    assert is_validation(path) is held_out


def test_a_tenth_of_all_paths_is_held_out() -> None:
    n = 20_000
    k = sum(is_validation(f"package/module_{i}.py") for i in range(n))
    assert abs(k / n - 0.1) < 5 * math.sqrt(0.1 * 0.9 / n)  # five standard deviations of a binomial share


@pytest.mark.parametrize(
    ("tokens", "nats"),
    [([7] * 9, 0.0), ([0, 1], math.log(2)), ([0, 0, 0, 1], 0.5623351446188083), (range(256), math.log(256))],
)
def test_unigram_entropy_by_hand(tokens: list[int], nats: float) -> None:
    # One rounding a term of at most 256 terms of size <= 1: 1e-13 is generous.
    assert unigram_entropy(np.array(tokens, np.uint8)) == pytest.approx(nats, abs=1e-13)


def test_a_second_call_reads_the_cache_and_gives_the_same(
    library: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = load_text("python", tmp_path / "cache")
    monkeypatch.setattr(standard_library, "_read", lambda *_: pytest.fail("built again"))
    second = load_text("python", tmp_path / "cache")
    assert second.sha256 == first.sha256
    assert second.source == first.source
    np.testing.assert_array_equal(second.train, first.train)
    np.testing.assert_array_equal(second.validation, first.validation)
    assert [p.suffix for p in (tmp_path / "cache").iterdir()] == [".tokens"]


def test_another_library_of_the_same_version_does_not_get_this_ones_cache(library: Path, tmp_path: Path) -> None:
    first = load_text("python", tmp_path / "cache")
    (library / "m00.py").write_bytes(b"patched" * 10)
    assert load_text("python", tmp_path / "cache").sha256 != first.sha256


@pytest.mark.parametrize("damage", ["flip a token", "cut short", "empty", "flip the header", "no hash"])
def test_a_damaged_token_file_is_built_again_with_a_warning(library: Path, tmp_path: Path, damage: str) -> None:
    first = load_text("python", tmp_path / "cache")
    (file,) = (tmp_path / "cache").iterdir()
    content = bytearray(file.read_bytes())
    position = {"flip a token": len(content) - 5, "flip the header": content.index(b"train") + 8}.get(damage)
    if position:
        content[position] ^= 1
    elif damage == "cut short":
        del content[-1000:]
    elif damage == "no hash":
        del content[: content.index(b"\n") + 1]
    else:
        content.clear()
    file.write_bytes(content)
    with pytest.warns(UserWarning, match="damaged"):
        again = load_text("python", tmp_path / "cache")
    assert again.sha256 == first.sha256
    assert again.train.tobytes() == first.train.tobytes()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        load_text("python", tmp_path / "cache")  # and it was mended on the disk


def test_a_cache_that_cannot_be_written_costs_one_line(library: Path, tmp_path: Path) -> None:
    kept = load_text("python", tmp_path / "cache")
    blocked = tmp_path / "a file"  # a folder's permissions don't bind root, a file in its place does
    blocked.touch()
    with pytest.warns(UserWarning, match="used from memory") as caught:
        text = load_text("python", blocked / "cache")
    assert len(caught) == 1
    assert "\n" not in str(caught[0].message)
    assert text.sha256 == kept.sha256


def test_a_disk_that_fills_leaves_nothing_behind(
    library: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.warns(UserWarning, match="No space left"):
        text = load_text("python", tmp_path / "cache")
    assert text.train.tobytes() == expected_split(library)[0]
    assert list((tmp_path / "cache").iterdir()) == []


def test_a_stripped_python_is_refused_with_the_reason(library: Path, tmp_path: Path) -> None:
    for path in library.rglob("m*.py"):
        path.write_bytes(b"pass")
    with pytest.raises(TextError, match=r"at least 1000000 bytes.*got 200 in 40 files.*stripped"):
        load_text("python", tmp_path / "cache")
    assert not (tmp_path / "cache").exists()


def test_an_unknown_name_is_refused_with_the_known_and_the_nearest() -> None:
    with pytest.raises(ValueError, match=r"'pyton' is unknown; there are: python, english.*; did you mean 'python'\?"):
        load_text("pyton")


@pytest.mark.parametrize("name", ["./mine", "mine.txt", "/data/mine/", "~/mine.bin"])
def test_whatever_has_a_slash_or_a_dot_is_a_path_and_is_called_by_its_last_part(name: str) -> None:
    assert check_dataset(name) == name  # whether it is there or not: results are read on other machines, too
    assert dataset_label(name).startswith("mine")
    assert "/" not in dataset_label(name)


@pytest.mark.parametrize("name", KNOWN_TEXTS)
def test_a_path_that_would_be_called_as_a_known_text_is_refused(name: str) -> None:
    with pytest.raises(ValueError, match=rf"'data/{name}' would be called '{name}'.*rename it"):
        check_dataset(f"data/{name}")


@pytest.mark.parametrize("name", [".", "..", "/", "a/.."])
def test_a_path_without_a_name_of_its_own_is_refused(name: str) -> None:
    with pytest.raises(ValueError, match="has no name of its own"):
        check_dataset(name)


def test_a_home_that_is_not_there_costs_a_warning(library: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def homeless() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(Path, "home", homeless)
    monkeypatch.delenv("EXMY_CACHE", raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    with pytest.warns(UserWarning, match="set EXMY_CACHE"):
        text = load_text("python")
    assert text.train.tobytes() == expected_split(library)[0]


def test_bytes_are_one_byte_each(library: Path, tmp_path: Path) -> None:
    text = load_text("python", tmp_path)
    assert text.bytes_per_token(text.train) == text.bytes_per_token(text.validation) == 1.0


def test_bytes_per_token_by_hand(library: Path, tmp_path: Path) -> None:
    lengths = np.array([1, 2, 7], np.uint16)
    text = dataclasses.replace(load_text("python", tmp_path), vocabulary=3, token_bytes=lengths)
    assert text.bytes_per_token(np.array([0, 1, 1, 2], np.uint8)) == (1 + 2 + 2 + 7) / 4
    assert math.isnan(dataclasses.replace(text, token_bytes=None).bytes_per_token(text.train))


def test_the_text_of_committed_results_is_still_the_same(tmp_path: Path) -> None:
    """The content of a token file, from its definition: studies are held to its hash."""
    root = Path(sysconfig.get_path("stdlib"))
    paths = source_files(root)
    parts = {
        side: b"".join((root / p).read_bytes() + b"\0" for p in paths if is_validation(p) is side)
        for side in (False, True)
    }
    header = f'{{"files": {len(paths)}, "train": {len(parts[False])}, "validation": {len(parts[True])}}}\n'
    expected = hashlib.sha256(header.encode() + parts[False] + parts[True]).hexdigest()
    assert load_text("python", tmp_path).sha256 == expected


def test_where_the_cache_lies(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/ada")
    monkeypatch.delenv("EXMY_CACHE", raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    assert cache_folder() == Path("/home/ada/.cache/exmy")
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")
    assert cache_folder() == Path("/home/ada/.cache/exmy")
    monkeypatch.setenv("XDG_CACHE_HOME", "/var/cache")
    assert cache_folder() == Path("/var/cache/exmy")
    monkeypatch.setenv("EXMY_CACHE", "/data/texts")
    assert cache_folder() == Path("/data/texts")


def test_the_arrays_are_read_only(library: Path, tmp_path: Path) -> None:
    assert not load_text("python", tmp_path).train.flags.writeable
