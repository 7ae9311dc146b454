"""What is loaded to answer a small question: seen in `sys.modules` of a process of its own, never by a clock."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import click
import pytest
import torch

from exmy.cli import main
from formats.compile_time import assume_constant_result

ROOT = Path(__file__).parent.parent
HEAVY = {
    "torch",
    "xarray",
    "pandas",
    "scipy",
    "matplotlib",
    "plotly",
    "dask",
    "h5py",
    "h5netcdf",
    "mpmath",
    "hypothesis",
}
RUN = """
import json, sys
from exmy.__main__ import run
loaded = {}
for arguments in json.loads(sys.argv[1]):
    sys.argv = ["exmy", *arguments]
    try:
        run()
    except SystemExit as end:
        assert not end.code, (arguments, end.code)
    loaded[" ".join(arguments)] = [name for name in sys.modules if "." not in name]
print(json.dumps(loaded), file=sys.stderr)
"""


def loaded(*commands: list[str], **environment: str) -> dict[str, set[str]]:
    """What is loaded after each command, one after another in one process."""
    done = subprocess.run(
        [sys.executable, "-c", RUN, json.dumps(commands)],
        cwd=ROOT, env=os.environ | {"PYTHONPATH": str(ROOT)} | environment, capture_output=True, text=True, check=True,
    )  # fmt: skip
    return {command: set(names) for command, names in json.loads(done.stderr.splitlines()[-1]).items()}


def commands(group: click.Group, words: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], click.Command]]:
    """Every command there is, groups too, by the words that call it."""
    yield words, group
    for name, command in group.commands.items():
        if isinstance(command, click.Group):
            yield from commands(command, (*words, name))
        else:
            yield (*words, name), command


def test_help_of_every_command_and_the_version_load_click_and_nothing_heavy() -> None:
    asked = [["--version"], *([*words, "--help"] for words, _ in commands(main))]
    assert len(asked) > 20
    after = loaded(*asked)
    everything = after[" ".join(asked[-1])]
    assert not everything & (HEAVY | {"numpy", "pydantic", "rich"})
    assert {"click", "exmy"} <= everything


@pytest.mark.parametrize(
    ("command", "light"),
    [
        (["formats", "show", "e4m3fn"], HEAVY | {"pydantic"}),
        (["formats", "show", "nvfp4", "posit8"], HEAVY | {"pydantic"}),
        (["formats", "list"], HEAVY | {"pydantic"}),
        (["formats", "list", "--all"], HEAVY | {"pydantic"}),
        (["data", "list"], HEAVY | {"pydantic"}),
        (["recipes", "list"], HEAVY),
        (["recipes", "show", "mxfp8"], HEAVY),
        (["completion", "fish"], HEAVY | {"numpy", "pydantic"}),
    ],
)  # fmt: skip
def test_looking_something_up_loads_nothing_heavy(command: list[str], light: set[str]) -> None:
    assert not loaded(command)[" ".join(command)] & light


def test_a_name_that_needs_torch_loads_it_when_it_is_asked_for() -> None:
    code = (
        "import sys, formats; assert set(formats.__all__) >= {'quantize', 'datasheet'}; assert 'torch' not in sys.modules;"
        "formats.quantize; assert 'torch' in sys.modules; import exmy; assert exmy.__version__"
    )
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=os.environ | {"PYTHONPATH": str(ROOT)}, check=True)


def test_what_a_sweep_imports_does_not_wait_for_the_compiler() -> None:
    """Who plans and shows, and who trains eagerly, needs none; importing it is half of the start."""
    code = (
        "import sys, exmy.sweep, formats.delayed, formats.scaling, formats.torch_codes; assert 'torch' in sys.modules;"
        "assert not {'torch._dynamo', 'torch._inductor', 'sympy'} & sys.modules.keys()"
    )
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=os.environ | {"PYTHONPATH": str(ROOT)}, check=True)


def test_the_compiler_is_told_of_constants_as_torch_would_tell_it() -> None:
    def ours() -> int:
        return 1

    def torchs() -> int:
        return 1

    assert assume_constant_result(ours) is ours
    torch.compiler.assume_constant_result(torchs)
    assert vars(ours) == vars(torchs) != {}


@pytest.mark.parametrize(("ends", "status"), [("sys.exit(3)", 3), ("sys.exit('no')", 1), ("pass", 0)])
def test_a_command_ends_without_taking_its_modules_apart_and_loses_nothing(ends: str, status: int) -> None:
    code = f"""
import atexit, concurrent.futures, sys, threading, time
import exmy.cli, exmy.__main__
class Part:
    def __del__(self):
        print("taken apart")
part, pool = Part(), concurrent.futures.ThreadPoolExecutor(1)
def main():
    atexit.register(print, "asked for")
    threading.Thread(target=lambda: (time.sleep(0.2), print("waited for"))).start()
    pool.submit(time.sleep, 0.1)
    print("said", end=" ")
    {ends}
exmy.cli.main = main
exmy.__main__.program()
"""
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True,
        check=False,
    )  # fmt: skip
    assert (done.stdout, done.returncode) == ("said waited for\nasked for\n", status)
    assert done.stderr == ("no\n" if status == 1 else "")


@pytest.mark.parametrize("package", ["formats", "landscape", "train", "verification", "exmy"])
def test_every_public_name_is_there(package: str) -> None:
    module = __import__(package)
    for name in module.__all__:
        assert getattr(module, name) is not None
    with pytest.raises(AttributeError, match="nothing_of_the_kind"):
        _ = module.nothing_of_the_kind
