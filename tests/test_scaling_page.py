"""The page on many machines: its Slurm script is run, with programs of the same names that write down what they were asked."""

from __future__ import annotations

import os
import re
import subprocess
from pathlib import Path

import pytest
from click.testing import CliRunner

from exmy.cli import main
from tests.test_docs import blocks
from tests.test_execute import ROOT

PAGE = ROOT / "docs" / "scaling.md"
# A cluster of three nodes. `ray start` blocks; the sweep does too, until a signal comes, and ends as a stopped one does.
STUBS = {
    "scontrol": '[ "$1" = show ] && printf "%s\\n" n1 n2 n3',
    "srun": 'while [ "${1#-}" != "$1" ]; do shift; done; exec "$@"',
    "hostname": "echo 10.0.0.1 10.0.0.2",
    "sleep": "",
    "ray": '[ "$1" = get-auth-token ] && echo secret; [ "$1" = status ] && [ ! -e $LOG.started ]',
    "exmy": 'trap "exit 143" TERM; while [ -n "$STOP" ]; do kill -TERM $PPID; done',
}


def script() -> str:
    [text] = [text for language, text, _ in blocks(PAGE) if language == "bash"]
    return text


def test_the_slurm_script_is_one() -> None:
    checked = subprocess.run(["bash", "-n"], input=script(), text=True, capture_output=True, check=False)
    assert (checked.returncode, checked.stderr) == (0, "")
    asked = dict(re.findall(r"^#SBATCH --([\w-]+)=(\S+)$", script(), re.MULTILINE))
    assert asked["ntasks-per-node"] == "1"
    assert asked["signal"] == "B:TERM@120", "to the script, which tells the sweep"


@pytest.mark.parametrize("stop", ["", "yes"])
def test_the_slurm_script_starts_ray_on_every_node_and_is_queued_again_when_its_time_is_up(
    stop: str, tmp_path: Path
) -> None:
    (tmp_path / "bin").mkdir()
    for name, does in STUBS.items():
        stub = tmp_path / "bin" / name
        line = f'echo "{name} $* token=$RAY_AUTH_TOKEN" >> "$LOG"'
        stub.write_text(
            f"#!/bin/bash\n{line}\n{does}\nexit 0\n" if name != "exmy" else f"#!/bin/bash\n{line}\n{does}\n"
        )
        stub.chmod(0o755)
    activate = tmp_path / "exmy" / ".venv" / "bin" / "activate"
    activate.parent.mkdir(parents=True)
    activate.touch()
    log = tmp_path / "log"
    environment = {
        "PATH": f"{tmp_path}/bin:{os.environ['PATH']}", "HOME": str(tmp_path), "LOG": str(log), "STOP": stop,
        "SLURM_JOB_NODELIST": "n[1-3]", "SLURM_JOB_ID": "77", "SLURM_CPUS_PER_TASK": "64", "SLURM_GPUS_ON_NODE": "8",
    }  # fmt: skip
    done = subprocess.run(["bash"], input=script(), env=environment, text=True, capture_output=True, check=False)
    assert (done.returncode, done.stderr) == (143 if stop else 0, "")
    lines = log.read_text(encoding="utf-8").splitlines()
    starts = sorted(line.removesuffix(" token=secret") for line in lines if line.startswith("ray start"))
    own = "--num-cpus=64 --num-gpus=8 --block"
    assert starts == [
        *[f"ray start --address=10.0.0.1:20077 {own}"] * 2,
        f"ray start --head --node-ip-address=10.0.0.1 --port=20077 --include-dashboard=false {own}",
    ]
    nodes = sorted(re.findall(r"^srun .*--nodelist=(\S+) ray start", "\n".join(lines), re.MULTILINE))
    assert nodes == ["n1", "n2", "n3"]
    [sweep] = [line.removesuffix(" token=secret").split() for line in lines if line.startswith("exmy")]
    assert sweep[-4:] == ["--executor", "ray", "--ray-address", "10.0.0.1:20077"]
    assert any(line.startswith("scontrol requeue 77") for line in lines) is bool(stop)
    help_of = CliRunner().invoke(main, ["sweep", "--help"]).output
    assert all(word in help_of for word in sweep if word.startswith("--"))


def test_every_command_of_the_page_has_options_that_there_are() -> None:
    page = PAGE.read_text(encoding="utf-8")
    for command, options in re.findall(r"^exmy (\w+) ([^#\n]*)", page, re.MULTILINE):
        help_of = CliRunner().invoke(main, [command, "--help"]).output
        assert all(option in help_of for option in re.findall(r"--[\w-]+", options)), command
