"""What a benchmark's JSON says of the machine: what decides speed and nothing that names the machine."""

from __future__ import annotations

import platform
from typing import Any

import torch

from train.provenance import device_name


def pytest_benchmark_update_machine_info(config: Any, machine_info: dict[str, Any]) -> None:  # noqa: ARG001
    """Device, cores and versions, in place of host names and paths."""
    brand = device_name(torch.device("cpu"))
    machine_info.clear()
    machine_info |= {
        "cpu": brand,
        "cpu_threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else "none",
        "cuda": torch.version.cuda or "none",
        "python": platform.python_version(),
        "torch": torch.__version__,
    }


def pytest_benchmark_update_json(config: Any, benchmarks: Any, output_json: dict[str, Any]) -> None:  # noqa: ARG001
    """Medians and spreads stay, single timings go: they are many and nobody reads them."""
    for entry in output_json["benchmarks"]:
        entry["stats"].pop("data", None)
        for key in ("options", "fullname", "param", "params"):
            entry.pop(key, None)
