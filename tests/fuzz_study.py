"""The study file under a fuzzer that sees which code its bytes reach: `python -m tests.fuzz_study`, or `make fuzz`.

Beside `test_stranger`, whose Hypothesis makes tables of every kind but follows no coverage. Here libFuzzer (by atheris) changes
the bytes of studies that work, with the words of a study file at hand; every file is read, or refused by StudyError in one line
that prints, soon, and nothing is written. A study that is read and has few runs is planned too. The input of a failure is kept as
crash-*.

    make fuzz ARGS="-max_total_time=300"        options are libFuzzer's
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

import atheris

with atheris.instrument_imports(include=["train", "formats", "tomllib"]):
    import tomllib  # noqa: F401

    from tests.test_stranger import CPU, TABLES, WORKING, assert_is_a_line
    from train import Study, StudyError
    from train.named_recipes import NAMED
    from train.plan import plan
    from train.study_file import read_study

import tomli_w

PLANNED = 200  # runs that a study may have to be planned, so that most of the time goes into reading
STUDIES = Path(__file__).parent.parent / "studies"


def judge(content: bytes, path: Path) -> Study | None:
    """Read these bytes as a study file; the study, None where they are refused as they should be, AssertionError else."""
    path.write_bytes(content)
    study = None
    try:
        study = read_study(path)
        if sum(1 for _, _ in zip(study.runs(), range(PLANNED + 1), strict=False)) <= PLANNED:
            plan(study, CPU)
    except StudyError as error:
        assert_is_a_line(str(error))
    assert [entry.name for entry in path.parent.iterdir()] == [path.name]
    return study


def corpus(folder: Path) -> None:
    """Studies that work, to begin with."""
    (folder / "working").write_bytes(tomli_w.dumps(WORKING).encode())
    for study in STUDIES.glob("*.toml"):
        (folder / study.stem).write_bytes(study.read_bytes())


def dictionary(path: Path) -> None:
    """The words of a study file, as libFuzzer takes them."""
    words = {
        *TABLES,
        *(word for keys in TABLES.values() for word in keys),
        *NAMED,
        "[axes]\n",
        "nan",
        "inf",
        "1e309",
        "'''",
    }
    escaped = (word.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\x0a") for word in sorted(words))
    path.write_text("".join(f'"{word}"\n' for word in escaped if word.isascii()), encoding="utf-8")


def main() -> None:
    """Until libFuzzer ends the process, at its limit or a failure."""
    with tempfile.TemporaryDirectory(dir="/dev/shm" if Path("/dev/shm").is_dir() else None) as scratch:
        folder = Path(scratch)
        for name in ("corpus", "file"):
            (folder / name).mkdir()
        corpus(folder / "corpus")
        dictionary(folder / "words")
        path = folder / "file" / "study.toml"
        limits = ["-max_len=4096", "-timeout=20", "-rss_limit_mb=6000", f"-dict={folder / 'words'}"]
        atheris.Setup(
            [sys.argv[0], str(folder / "corpus"), *limits, *sys.argv[1:]], lambda content: judge(content, path)
        )
        atheris.Fuzz()


if __name__ == "__main__":
    main()
