"""Every command says how it is used, by examples that its own parser takes; and ends in one line where it can't go on."""

from __future__ import annotations

import re
import shlex
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import click
import pytest
from click.shell_completion import BashComplete
from click.testing import CliRunner, Result

from exmy import completing
from exmy.cli import main
from exmy.doctor import Finding, examine, is_broken
from tests.test_start_up import commands

ROOT = Path(__file__).parent.parent
STUDY = ROOT / "studies" / "results" / "first-look-cpu"
EXAMPLE = re.compile(r"^\s*Example: (.*)$", re.MULTILINE)
TORCHRUN = "torchrun --nproc-per-node 2 -m "
ALL = [(" ".join(words), command) for words, command in commands(main)]


def invoke(*arguments: object) -> Result:
    return CliRunner().invoke(main, [str(a) for a in arguments])


def parsed(arguments: list[str]) -> str:
    """The words of the command that takes them; raises what click raises where it does not."""
    group: click.Command = main
    context = main.make_context("exmy", list(arguments), resilient_parsing=False)
    words = []
    rest = [*context._protected_args, *context.args]
    while isinstance(group, click.Group):
        name, found, rest = group.resolve_command(context, rest)
        assert name is not None
        assert found is not None
        words.append(name)
        context = found.make_context(name, list(rest), parent=context)
        group, rest = found, [*context._protected_args, *context.args]
    return " ".join(words)


@pytest.mark.parametrize(("words", "command"), ALL, ids=[words or "exmy" for words, _ in ALL])
def test_help_has_examples_that_the_parser_takes(
    words: str, command: click.Command, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    shown = invoke(*words.split(), "--help")
    assert shown.exit_code == 0
    examples = EXAMPLE.findall(command.help or "")
    assert examples, f"exmy {words}: no example"
    monkeypatch.chdir(tmp_path)
    for example in examples:
        assert example in " ".join(shown.output.split()), "an example must not be wrapped: put \\b before it"
        program, *arguments = shlex.split(example.removeprefix(TORCHRUN).split(" > ")[0])
        assert program == "exmy", example
        assert parsed(arguments).startswith(words), example


def test_an_example_that_does_not_parse_is_caught() -> None:
    for arguments in (
        ["sweep", "mine.toml", "--sett", "seed=1"],
        ["formats", "compare", "e4m3fn"],
        ["claim", "runs/a"],
    ):
        with pytest.raises(click.ClickException):
            parsed(arguments)


NOWHERE = "can't be written (No such file or directory); name another place"
A_FOLDER = "can't be written (Is a directory); name another place"


@pytest.mark.parametrize(
    ("words", "line"),
    [
        ("sweeep", "exmy has no command 'sweeep'; did you mean 'sweep'?"),
        (
            "bench --only x",
            "No such option '--only'; there are --device, --rounds, --json, --help; exmy bench --help has examples",
        ),
        ("sweep --dryrun", "No such option '--dryrun'. Did you mean '--dry-run'?; exmy sweep --help has examples"),
        ("formats shwo", "exmy formats has no command 'shwo'; did you mean 'show'?"),
        ("formats xyz", "exmy formats has no command 'xyz'; there are compare, list, plot, show"),
        ("--nonsense", "No such option '--nonsense'; there are --version, --help; exmy --help has examples"),
        (
            "sweep --workers 0",
            "Invalid value for '--workers': 0 is not in the range x>=1; exmy sweep --help has examples",
        ),
        ("export a --zarr", "Option '--zarr' requires an argument; exmy export --help has examples"),
        ("formats plot e4m3fn --out", "Option '--out' requires an argument; exmy formats plot --help has examples"),
        (
            "resume nowhere",
            "nowhere: there is no such directory; a study directory is what `exmy sweep --out DIR` writes",
        ),
        (
            "merge STUDY STUDY --out nowhere --name a/b",
            "the studies together are none: name: must be a folder's name: 1 to 100 characters that print, without / or \\, the "
            "first no dot, minus or ~, got 'a/b'",
        ),
        (
            "stability TABLE",
            "TABLE: is no CSV table (Error tokenizing data. C error: Expected 1 fields in line 3, saw 2); give one with a head, "
            "and a row a logged step",
        ),
        ("merge a", "Missing option '--out'; exmy merge --help has examples"),
        ("export a", "name what to write: --zarr OUT, --netcdf OUT.nc, --digest OUT; exmy export --help has examples"),
        (
            "completion",
            "Missing argument '{bash|zsh|fish}'. Choose from: bash, zsh, fish; exmy completion --help has examples",
        ),
        ("verdict e4m3 a --json nowhere/x.json", f"nowhere/x.json: {NOWHERE}"),
        ("compare a --page FOLDER", f"FOLDER: {A_FOLDER}"),
        ("doctor --json FOLDER", f"FOLDER: {A_FOLDER}"),
        ("formats plot e4m3fn --out nowhere/x.png", f"nowhere/x.png: {NOWHERE}"),
        (
            "verify exmy e4m3fn --seconds -1",
            "Invalid value for '--seconds': -1.0 is not in the range x>0; exmy verify --help has examples",
        ),
        ("export STUDY --netcdf FOLDER --force", "FOLDER: a folder, and --netcdf writes a file; name another place"),
        (
            "stability nowhere.csv",
            "nowhere.csv: can't be read (No such file or directory); name a CSV table, a row a logged step",
        ),
    ],
)
def test_what_is_wrong_is_one_line(words: str, line: str, tmp_path: Path) -> None:
    """Before any work: a file that can't be written, too."""
    places = {"FOLDER": str(tmp_path), "STUDY": str(STUDY), "TABLE": str(tmp_path / "table")}
    (tmp_path / "table").write_text("[a]\nb\nc, d\n")
    refused = invoke(*(places.get(word, word) for word in words.split()))
    assert refused.exit_code == 2
    for name, place in places.items():
        line = line.replace(name, place)
    assert refused.output == f"exmy: {line}\n"


def test_a_folder_of_someone_else_is_refused_before_work(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """By the answer of the system, which root never gets."""
    monkeypatch.setattr("os.access", lambda path, _: Path(path) != tmp_path)
    refused = invoke("verdict", "e4m3", "nowhere", "--json", tmp_path / "x.json")
    assert refused.output == f"exmy: {tmp_path / 'x.json'}: can't be written (Permission denied); name another place\n"


def denied(method: Any, folder: Path) -> Any:
    """The method, for files elsewhere: what is imported meanwhile may be read."""

    def asked(path: Path, *args: Any, **options: Any) -> Any:
        if path.is_relative_to(folder):
            raise PermissionError(13, "Permission denied", str(path))
        return method(path, *args, **options)

    return asked


def test_a_study_that_may_not_be_read_is_one_line(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "study.toml").write_text("")

    for name in ("read_text", "open"):
        monkeypatch.setattr(Path, name, denied(getattr(Path, name), tmp_path))
    for command in ("status", "report", "compare", "resume"):
        refused = invoke(command, tmp_path)
        assert refused.exit_code == 2, command
        assert refused.output.startswith("exmy: "), refused.output
        assert "study.toml" in refused.output
        assert "Permission denied" in refused.output
        assert refused.output.count("\n") == 1


def test_a_group_alone_shows_its_help() -> None:
    assert "Commands:" in invoke("formats").output


def test_a_file_that_nobody_expected_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: Any, **__: Any) -> None:
        raise PermissionError(13, "Permission denied", "/somewhere/secret")

    monkeypatch.setattr("exmy.verdict.run_verdict", broken)
    refused = invoke("verdict", "e4m3", STUDY)
    assert refused.exit_code == 2
    assert refused.output == "exmy: /somewhere/secret: Permission denied; mend that, or name another place\n"


def test_a_disk_without_room_is_told_before_an_export(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    import shutil

    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(0, 0, 2**16))
    for option, name in (("--netcdf", "x.nc"), ("--zarr", "x.zarr")):
        refused = invoke("export", STUDY, option, tmp_path / name)
        assert refused.exit_code == 2
        assert re.search(rf"{name}: takes up to [\d.]+ MiB and 0\.1 MiB are free there; make room", refused.output)
    assert not list(tmp_path.iterdir())


def test_a_picture_is_written_whole_or_not_at_all(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from matplotlib.figure import Figure

    def full(_: Figure, path: Path, **__: Any) -> None:
        path.write_bytes(b"half of it")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Figure, "savefig", full)
    refused = invoke("formats", "plot", "e2m1fn", "--out", tmp_path / "x.png")
    assert (refused.exit_code, list(tmp_path.iterdir())) == (2, [])
    assert f"exmy: {tmp_path / 'x.png'}: can't be written (No space left on device)" in refused.output


WORK: dict[str, tuple[list[Any], str]] = {
    "report": (["report", STUDY, "--out", "{out}/r"], "exmy.report.command.write_page"),
    "compare": (["compare", STUDY], "exmy.compare.compare"),
    "alarms": (["alarms", STUDY, "--horizon", 5], "exmy.alarms.study_warnings"),
    "verdict": (["verdict", "e4m3", STUDY], "exmy.verdict.verdict"),
    "export": (["export", STUDY, "--netcdf", "{out}/x.nc"], "xarray.DataTree.to_netcdf"),
    "zarr": (["export", STUDY, "--zarr", "{out}/x.zarr"], "exmy.export._parts"),
    "merge": (["merge", STUDY, "--out", "{out}/m"], "train.merge.record"),
    "vectors": (["vectors", "e2m1fn", "--out", "{out}/v.csv"], "exmy.vectors.as_csv"),
    "data": (["data", "fetch", "python"], "exmy.data.load_text"),
}


@pytest.mark.parametrize("name", WORK)
def test_control_c_leaves_nothing_half_done_and_says_how_to_go_on(
    name: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """In the middle of the work, where the least is written whole."""
    arguments, place = WORK[name]
    command = [str(a).format(out=tmp_path) for a in arguments]

    def stopped(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(sys, "argv", ["exmy", *command])
    with monkeypatch.context() as patched:
        patched.setattr(place, stopped)
        ended = invoke(*command)
    assert ended.exit_code == 130
    assert re.search(
        rf"^exmy: stopped; .*\. To start again: {re.escape(shlex.join(['exmy', *command]))}$", ended.output, re.M
    )
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]
    if name == "merge":  # what was begun is not in the way
        assert invoke(*command).exit_code == 0


def test_control_c_in_the_middle_of_python_is_status_130() -> None:
    """From the first import of exmy's own: before there is a command, and in one."""
    code = (
        "import sys, builtins\nreal = builtins.__import__\n"
        "def stop(name, *rest):\n    if name == {module!r}: raise KeyboardInterrupt\n    return real(name, *rest)\n"
        "builtins.__import__ = stop\nsys.argv = ['exmy', 'status', 'x']\n"
        "from exmy.__main__ import run\nrun()"
    )
    for module in ("exmy.cli", "exmy.status"):
        done = subprocess.run(
            [sys.executable, "-c", code.format(module=module)], cwd=ROOT, capture_output=True, text=True, check=False
        )
        assert done.returncode == 128 + signal.SIGINT
        assert "Traceback" not in done.stderr


def test_control_c_in_a_finaliser_is_not_lost() -> None:
    """Python prints what is raised in one, and goes on; exmy reads hundreds of files, each of which has one."""
    code = (
        "import signal, time, exmy.cli\n"
        "class File:\n    def __del__(self): signal.raise_signal(signal.SIGINT)\n"
        "def main():\n    File()\n    for _ in range(1000): time.sleep(0.01)\n    print('went on')\n"
        "exmy.cli.main = main\nfrom exmy.__main__ import run\nrun()"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (128 + signal.SIGINT, "", "")


def test_control_c_in_an_import_waits_for_its_end(tmp_path: Path) -> None:
    """NumPy's and matplotlib's parts in C take any exception of an import for something of their own, as this module does."""
    (tmp_path / "greedy.py").write_text(
        "import signal\ntry:\n    signal.raise_signal(signal.SIGINT)\n    print('whole')\n"
        "except KeyboardInterrupt:\n    print('half')\n"
    )
    code = (
        f"import sys, time, exmy.cli\nsys.path.insert(0, {str(tmp_path)!r})\n"
        "def main():\n    import greedy\n    for _ in range(1000): time.sleep(0.01)\n    print('went on')\n"
        "exmy.cli.main = main\nfrom exmy.__main__ import run\nrun()"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (128 + signal.SIGINT, "whole\n", "")


def test_an_import_that_hangs_does_not_keep_control_c_away(monkeypatch: pytest.MonkeyPatch) -> None:
    from exmy import __main__ as module

    clock = iter((100.0, 104.9, 105.0))
    monkeypatch.setattr(module, "time", SimpleNamespace(monotonic=lambda: next(clock)))
    again: list[None] = []
    monkeypatch.setattr(module, "_again", lambda: again.append(None))
    importing: Any = SimpleNamespace(
        f_code=SimpleNamespace(co_filename="kernels.py"),
        f_back=SimpleNamespace(f_code=SimpleNamespace(co_filename="<frozen importlib._bootstrap>"), f_back=None),
    )
    module._between_imports(signal.SIGINT, importing)
    module._between_imports(signal.SIGINT, importing)
    assert len(again) == 2
    with pytest.raises(KeyboardInterrupt):
        module._between_imports(signal.SIGINT, importing)


HALF_OPEN = (
    "h5netcdf.core._open_h5py = lambda *_, **__: signal.raise_signal(signal.SIGINT)\n    h5netcdf.File('x.nc', 'w')"
)
HALF_CLOSED = (
    "class Backend(h5py.File):\n        def close(self):\n            super().close()\n"
    "            signal.raise_signal(signal.SIGINT)\n    h5py.File = Backend\n    h5netcdf.File('x.nc', 'w').close()"
)
NEVER_STOPPED = "h5netcdf.File.__new__(h5netcdf.File)\n    signal.raise_signal(signal.SIGINT)"


@pytest.mark.parametrize(
    ("work", "told"),
    [(HALF_OPEN, False), (HALF_CLOSED, False), (NEVER_STOPPED, True)],
    ids=["open", "closed", "before"],
)
def test_a_file_that_control_c_left_half_done_says_nothing(work: str, told: bool, tmp_path: Path) -> None:
    """h5netcdf's finaliser misses what such a file never got; of one that no Ctrl-C cut off its errors are told."""
    code = (
        f"import sys\nsys.path.insert(0, {str(ROOT)!r})\nimport signal, h5py, h5netcdf.core, exmy.cli\n"
        f"def main():\n    {work}\n    print('went on')\n"
        "exmy.cli.main = main\nfrom exmy.__main__ import program\nprogram()"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (128 + signal.SIGINT, "")
    assert ("Exception ignored in" in done.stderr) is told, done.stderr
    assert told or done.stderr == ""


@pytest.mark.parametrize("late", ["os.kill(os.getpid(), signal.SIGINT)", "m._again()"])
def test_control_c_after_the_last_line_leaves_no_other(late: str) -> None:
    """While Python waits for a thread; a new one, and one that was to come again once a finaliser was through."""
    code = (
        "import os, signal, sys, threading, time, exmy.cli\nfrom exmy import __main__ as m\n"
        "def work():\n    time.sleep(0.3)\n    {thread}\n    time.sleep(0.3)\n"
        "def main():\n    print('the last line')\n    threading.Thread(target=work).start()\n    {main}\n    sys.exit(130)\n"
        "exmy.cli.main = main\nm.program()"
    )
    code = code.format(**({"thread": late, "main": "pass"} if "kill" in late else {"thread": "pass", "main": late}))
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (128 + signal.SIGINT, "the last line\n", "")


def test_what_else_is_lost_in_a_finaliser_is_told() -> None:
    code = (
        "import exmy.cli\nclass File:\n    def __del__(self): 1 / 0\n"
        "exmy.cli.main = File\nfrom exmy.__main__ import run\nrun()"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0
    assert "ZeroDivisionError" in done.stderr


def test_a_call_that_hangs_does_not_keep_python_from_ending() -> None:
    """Its thread is left to the system; Python's own end of a thread within C++ is an abort."""
    code = (
        "import sys, threading, time\nfrom exmy import __main__ as start\n"
        "import exmy.cli\n"
        "def hung():\n    threading.Thread(target=time.sleep, args=(60,), name='exmy-call').start()\n"
        "    print('said'); sys.exit(1)\n"
        "exmy.cli.main = hung\nstart.run()"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=50, check=False
    )
    assert (done.returncode, done.stdout) == (1, "said\n")
    from verification.calls import THREAD

    assert THREAD == "exmy-call"


def test_a_matrix_that_was_stopped_goes_on(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from exmy import verify

    def few(asked: verify.Asked) -> list[verify.Job]:
        return verify.jobs("torch", ("e5m2", "e4m3fn"), asked)

    judged: list[str] = []
    real = verify.Job.run

    def run(job: verify.Job, progress: Any) -> Any:
        if stop and job.format == "e4m3fn":
            raise KeyboardInterrupt
        judged.append(job.format)
        return real(job, progress)

    monkeypatch.setattr(verify, "everything", few)
    monkeypatch.setattr(verify.Job, "run", run)
    stop = True
    ended = invoke("verify", "--matrix", tmp_path, "--level", "quick")
    assert ended.exit_code == 130
    (kept,) = tmp_path.iterdir()
    assert f"exmy: stopped; what 1 judgements said is in {kept}, and is not asked again. To go on: exmy" in ended.output
    stop = False
    assert invoke("verify", "--matrix", tmp_path, "--level", "quick").exit_code == 0
    assert judged == ["e5m2", "e4m3fn"]
    assert not kept.exists()
    assert len(list(tmp_path.iterdir())) > 2


def completed(*words: str) -> list[str]:
    *before, typed = words
    found = BashComplete(main, {}, "exmy", "_EXMY_COMPLETE").get_completions(before, typed)
    return [item.value for item in found]


def test_a_shell_is_offered_studies_formats_recipes_and_texts(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for place in ("runs/mine", "runs/group/other", "runs/no-study", ".hidden/mine"):
        (tmp_path / place).mkdir(parents=True)
        if place != "runs/no-study":
            (tmp_path / place / "study.toml").write_text('name = "mine"\n[axes]\nrecipe = ["e4m3fn"]\n')
    (tmp_path / "mine.toml").write_text("[axes]\n")
    (tmp_path / "pyproject.toml").write_text("[project]\n")
    (tmp_path / "no\xe9.toml").write_bytes(b"\xff\xfe")
    monkeypatch.chdir(tmp_path)
    assert completed("status", "") == ["runs/mine", "runs/group/other"]
    assert completed("report", "runs/m") == ["runs/mine"]
    assert completed("resume", f"{tmp_path}/runs/") == [f"{tmp_path}/runs/mine", f"{tmp_path}/runs/group/other"]
    assert completed("merge", "runs/mine", "runs/g") == ["runs/group/other"]
    assert completed("sweep", "") == ["mine.toml"]
    assert completed("sweep", "runs/mine/") == ["runs/mine/study.toml"]
    assert completed("formats", "show", "e4m3fnu") == ["e4m3fnuz"]
    assert "nvfp4" in completed("formats", "show", "")
    assert completed("verify", "torch", "--format", "e5m2f") == ["e5m2fnuz", "e5m2f", "e5m2fn"]
    assert completed("recipes", "show", "deep") == ["deepseek", "deepseek-hopper"]
    assert "mxfp8" in completed("verdict", "mxfp")
    assert completed("data", "fetch", "he") == ["hebrew"]
    assert completed("doc") == ["doctor"]
    assert "--strategy" in completed("sweep", "--str")


def test_where_there_is_nothing_to_offer_the_shell_offers_files(tmp_path: Path) -> None:
    context, parameter = click.Context(main), click.Argument(["x"])
    nowhere = str(tmp_path / "nowhere" / "x")
    for offers, kind in (
        (completing.study_directories, "dir"), (completing.study_files, "file"), (completing.texts, "file"),
    ):  # fmt: skip
        (item,) = offers(context, parameter, nowhere)
        assert (item.type, item.value) == (kind, nowhere)
    assert completing.formats(context, parameter, "nothing") == []


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_a_shell_is_given_its_script(shell: str) -> None:
    script = invoke("completion", shell)
    assert script.exit_code == 0
    assert f"_EXMY_COMPLETE={shell}_complete" in script.output


def test_doctor_finds_what_is_well_and_what_is_not(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    import json

    import torch

    # Compiling takes seconds, and other tests do it: here it is what it is held against.
    monkeypatch.setattr(torch, "compile", lambda f, **_: f)
    file = tmp_path / "doctor.json"
    asked = invoke("doctor", "--runs", tmp_path / "runs", "--json", file)
    assert asked.exit_code == 0, asked.output
    told = json.loads(file.read_text())
    rows = {row["name"]: row for row in told["findings"]}
    assert told["broken"] is False
    assert {"exmy", "packages", "extras", "files of exmy", "cache", "runs", "texts"} <= rows.keys()
    assert {"device", "rounds right", "compiles", "FP8 products", "same bits twice"} <= {
        name.removeprefix("cpu: ") for name in rows if name.startswith("cpu: ")
    }
    assert rows["packages"]["measured"]["torch"] == torch.__version__
    assert rows["cpu: device"]["measured"]["free_bytes"] > 0
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    ("place", "breakage", "name", "says"),
    [
        ("formats.quantize", lambda x, *_: x, "cpu: rounds right", "0.3"),
        ("torch.compile", lambda f, **_: lambda x: f(x) + 1, "cpu: compiles", "other numbers"),
        ("torch._scaled_mm", lambda a, *_, **__: a.float(), "cpu: FP8 products", "wrong products"),
        ("torch.equal", lambda *_: False, "cpu: same bits twice", "differ"),
        ("exmy.doctor._shipped", lambda: 1 / 0, "files of exmy", "division by zero"),
        ("exmy.doctor.SHIPPED", (("studies", "none.toml"),), "files of exmy", "studies/none.toml should be here"),
        ("exmy.doctor.LOADED", ("no_such_package",), "packages", "no_such_package can't be loaded"),
        ("exmy.doctor._devices", lambda: 1 / 0, "devices", "torch can't be loaded"),
    ],
)  # fmt: skip
def test_doctor_sees_each_thing_that_is_broken(
    place: str, breakage: Any, name: str, says: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    import torch

    monkeypatch.setattr(torch, "compile", lambda f, **_: f)
    monkeypatch.setattr(place, breakage)
    found = {finding.name: finding for finding in examine(tmp_path)}
    assert found[name].state == "broken", found[name]
    assert says in found[name].text
    assert is_broken(found.values())


def test_doctor_sees_a_place_that_can_not_be_written_to(monkeypatch: pytest.MonkeyPatch) -> None:
    from exmy import doctor

    monkeypatch.setenv("EXMY_CACHE", "/proc/nowhere")
    assert doctor._runs(Path("/proc/nowhere")).state == "broken"
    assert doctor._cache().state == "note"
    assert not is_broken([Finding("x", "note", ""), Finding("y", "ok", "")])
    assert is_broken([Finding("y", "ok", ""), Finding("x", "broken", "")])
