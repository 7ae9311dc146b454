"""`exmy doctor`: whether all that exmy needs is here, and works on this machine.

A finding is one of three: `ok`; `note`, where exmy works without it, and the line says what it costs; `broken`, where something
that exmy needs is not there or gives wrong numbers, and the line says how to mend it. Whatever a check meets is a finding, an
import that fails too: who asks a doctor has a machine that may have anything.
"""

from __future__ import annotations

import functools
import importlib
import importlib.metadata
import importlib.resources
import json
import os
import platform
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from exmy.version import __version__

if TYPE_CHECKING:
    import torch

GIB = 2**30
LITTLE = 1 * GIB  # of disk: a study of some hundred runs with their checkpoints
# What exmy imports at once, by the name under which it is imported; what is installed but can't be loaded is no help.
LOADED = (
    "torch", "numpy", "scipy", "xarray", "pandas", "h5netcdf", "h5py", "pydantic", "rich", "tomli_w", "matplotlib", "plotly",
    "jinja2", "mpmath", "hypothesis", "tokenizers", "safetensors", "dask", "fsspec",
)  # fmt: skip
SHIPPED = (
    ("studies", "first-look-cpu.toml"), ("studies", "first-look-gpu.toml"), ("studies", "claims.toml"),
    ("exmy.report", "page.html.j2"), ("exmy.report", "report.css"), ("exmy.report", "main.js"), ("exmy", "conformance.html.j2"),
)  # fmt: skip
# By OCP's E4M3: 0.3 lies nearest to 5/16, 17 halfway between 16 and 18, where 16 is even, and 448 is the largest.
GIVEN, ROUNDED = (0.3, 17.0, 1000.0, -1e-4), (0.3125, 16.0, 448.0, -0.0)


class Finding(NamedTuple):
    """What was looked at, what came of it, and the numbers behind the words."""

    name: str
    state: Literal["ok", "note", "broken"]
    text: str
    measured: dict[str, Any] | None = None


def examine(runs: Path) -> Iterator[Finding]:
    """Everything, in the order in which one thing rests on another; a finding as soon as it is there."""
    yield from _tried("exmy", _versions)
    yield from _tried("packages", _packages)
    yield from _tried("extras", _extras)
    yield from _tried("files of exmy", _shipped)
    try:
        devices = _devices()
    except Exception as error:
        yield Finding("devices", "broken", f"torch can't be loaded ({_first_line(error)}): install it again")
        devices = []
    for device in devices:
        for what, check in (
            ("device", _device), ("rounds right", _rounds), ("compiles", _compiles), ("FP8 products", _fp8),
            ("same bits twice", _same_bits),
        ):  # fmt: skip
            yield from _tried(f"{device}: {what}", functools.partial(check, device))
    yield from _tried("cache", _cache)
    yield from _tried("runs", lambda: _runs(runs))
    yield from _tried("texts", _texts)


def is_broken(findings: Iterable[Finding]) -> bool:
    """Whether something that exmy needs is."""
    return any(finding.state == "broken" for finding in findings)


def as_json(findings: Iterable[Finding]) -> str:
    """For machines; `broken` is what the exit status says."""
    rows = [finding._asdict() for finding in findings]
    return json.dumps({"schema": 1, "broken": is_broken(findings), "findings": rows}, indent=1) + "\n"


def _tried(name: str, check: Callable[[], Finding]) -> Iterator[Finding]:
    try:
        yield check()._replace(name=name)
    except Exception as error:
        yield Finding(name, "broken", _first_line(error))


def _first_line(error: BaseException) -> str:
    return next(iter(str(error).strip().splitlines()), "") or type(error).__name__


def _versions() -> Finding:
    where = {"exmy": __version__, "python": platform.python_version(), "platform": platform.platform()}
    return Finding("", "ok", f"{__version__}, Python {where['python']}, {where['platform']}", where)


def _packages() -> Finding:
    versions, wrong = {}, []
    for name in LOADED:
        try:
            module = importlib.import_module(name)
            versions[name] = str(getattr(module, "__version__", "") or importlib.metadata.version(name))
        except Exception as error:
            wrong.append(f"{name} can't be loaded ({_first_line(error)})")
    for requirement in _requirements(None):
        try:
            version = importlib.metadata.version(requirement.name)
        except importlib.metadata.PackageNotFoundError:
            wrong.append(f"{requirement.name} is not installed")
            continue
        if not requirement.specifier.contains(version, prereleases=True):
            wrong.append(f"{requirement.name} {version} is not {requirement.specifier}")
    if wrong:
        return Finding("", "broken", f"{'; '.join(wrong)}: pip install --upgrade exmy", versions)
    told = ", ".join(f"{name} {versions[name]}" for name in ("torch", "numpy", "xarray"))
    return Finding("", "ok", f"all {len(versions)} that exmy needs are here: {told}, ...", versions)


def _requirements(extra: str | None) -> Iterator[Any]:
    """What the installed distribution asks for, for itself or for an extra; nothing of a checkout that was never installed."""
    from packaging.requirements import Requirement

    try:
        lines = importlib.metadata.requires("exmy") or []
    except importlib.metadata.PackageNotFoundError:
        return
    for requirement in map(Requirement, lines):
        ours = "extra" in str(requirement.marker or "")
        if ours == (extra is not None) and (
            requirement.marker is None or requirement.marker.evaluate({"extra": extra or ""})
        ):
            yield requirement


def _extras() -> Finding:
    """Which options have what they need."""
    try:
        names = importlib.metadata.metadata("exmy").get_all("Provides-Extra") or []
    except importlib.metadata.PackageNotFoundError:
        return Finding("", "note", "exmy runs from a folder that was never installed: pip install -e . there")
    lacks = {name: [r.name for r in _requirements(name) if not _is_installed(r)] for name in names}
    here = [name for name, missing in lacks.items() if not missing]
    away = [f"{name} (no {', '.join(missing)})" for name, missing in lacks.items() if missing]
    text = f"here: {', '.join(here) or 'none'}" + (f"; not here: {', '.join(away)}" if away else "")
    return Finding("", "ok", text, {"lacks": lacks})


def _is_installed(requirement: Any) -> bool:
    try:
        return bool(requirement.specifier.contains(importlib.metadata.version(requirement.name), prereleases=True))
    except importlib.metadata.PackageNotFoundError:
        return False


def _shipped() -> Finding:
    missing = [
        f"{package}/{name}"
        for package, name in SHIPPED
        if not importlib.resources.files(package).joinpath(name).is_file()
    ]
    if missing:
        return Finding("", "broken", f"{', '.join(missing)} should be here: install exmy again", {"missing": missing})
    return Finding("", "ok", "the first look's studies, the claims and the pages' templates")


def _devices() -> list[torch.device]:
    import torch

    return [torch.device("cpu"), *(torch.device("cuda", i) for i in range(torch.cuda.device_count()))]


def _device(device: torch.device) -> Finding:
    import torch

    from train.plan import free_memory
    from train.provenance import device_name

    free = free_memory(device)
    measured: dict[str, Any] = {"name": device_name(device), "free_bytes": free}
    if device.type == "cuda":
        total = torch.cuda.mem_get_info(device)[1]
        measured |= {
            "total_bytes": total,
            "capability": list(torch.cuda.get_device_capability(device)),
            "cuda": torch.version.cuda,
        }
        major, minor = measured["capability"]
        text = f"{measured['name']} (capability {major}.{minor}, CUDA {torch.version.cuda}), {_gib(free)} of {_gib(total)} free"
        return Finding("", "ok", text, measured)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    measured |= {"cores": cores, "threads": torch.get_num_threads()}
    text = f"{measured['name']}, {cores} cores, {measured['threads']} threads, {_gib(free)} free"
    if torch.cuda.is_available():
        return Finding("", "ok", text, measured)
    built = (
        f"torch is built for CUDA {torch.version.cuda} and finds no GPU"
        if torch.version.cuda
        else "torch is built without CUDA"
    )
    return Finding("", "note", f"{text}; {built}: studies train here", measured)


def _rounds(device: torch.device) -> Finding:
    import torch

    from formats import quantize

    got = quantize(torch.tensor(GIVEN, device=device), "e4m3fn").cpu()
    if not torch.equal(got.view(torch.int32), torch.tensor(ROUNDED).view(torch.int32)):
        return Finding(
            "", "broken", f"{list(GIVEN)} to e4m3fn gave {got.tolist()}, not {list(ROUNDED)}: exmy verify says more"
        )
    return Finding("", "ok", "four numbers to e4m3fn; exmy verify exmy proves it")


def _compiles(device: torch.device) -> Finding:
    """A GPU's steps and a CPU's quantisers are compiled, where there is what that takes."""
    import torch

    from train.compiling import compiles_steps, has_cpp_compiler

    if device.type == "cpu" and not has_cpp_compiler():
        return Finding(
            "", "note", "no C++ compiler (g++ or clang++): quantisers run eagerly, and a study at about half its speed"
        )
    if device.type == "cuda" and not compiles_steps("cuda"):
        return Finding(
            "", "note", "no Triton, or no C compiler (cc, gcc or clang): steps run eagerly, several times slower"
        )
    x = torch.arange(64, dtype=torch.float32, device=device)
    try:
        got = torch.compile(_tiny, fullgraph=True)(x)
    except Exception as error:
        return Finding(
            "", "broken", f"torch.compile failed ({_first_line(error)}): a study would too; mend the compiler it names"
        )
    if not torch.equal(got, _tiny(x)):
        return Finding("", "broken", "torch.compile gives other numbers than it should: try another version of torch")
    return Finding("", "ok", "a small function, with the same bits as without")


def _tiny(x: torch.Tensor) -> torch.Tensor:
    return x * 2 + 1  # exact, however it is fused


def _fp8(device: torch.device) -> Finding:
    """Whether this device multiplies E4M3 itself, which recipe native-fp8 asks for; all other recipes are simulated."""
    import torch

    n = 32
    a = torch.eye(n, device=device).to(torch.float8_e4m3fn)
    b = torch.arange(n * n, device=device).reshape(n, n).remainder(17).float()
    one = torch.ones((), device=device)
    try:
        got = torch._scaled_mm(a, b.to(torch.float8_e4m3fn).t(), one, one, out_dtype=torch.bfloat16)
    except (RuntimeError, NotImplementedError, AttributeError) as error:
        why = _first_line(error)
        if device.type == "cuda" and (capability := torch.cuda.get_device_capability(device)) < (8, 9):
            why = f"capability {capability[0]}.{capability[1]} is below 8.9, which FP8 units begin with"
        return Finding(
            "",
            "note",
            f"no: {why}. FP8 is simulated, exactly; recipe native-fp8 needs such a device",
            {"native": False},
        )
    if not torch.equal(got.float(), b.t()):
        return Finding(
            "",
            "broken",
            "torch._scaled_mm gives wrong products of E4M3: try another version of torch",
            {"native": None},
        )
    return Finding("", "ok", "yes: torch._scaled_mm multiplies E4M3 here", {"native": True})


def _same_bits(device: torch.device) -> Finding:
    """A product and a sum into shared rows, forwards and backwards, twice, as studies have them."""
    import torch

    from train.determinism import deterministic

    def once() -> list[torch.Tensor]:
        made = torch.Generator().manual_seed(1)
        table = torch.randn(64, 32, generator=made).to(device).requires_grad_()
        weight = torch.randn(32, 32, generator=made).to(device).requires_grad_()
        picked = torch.randint(64, (4096,), generator=made).to(device)
        ((table[picked] @ weight).tanh()).sum().backward()
        assert table.grad is not None
        assert weight.grad is not None
        return [table.grad, weight.grad]

    with deterministic(tf32=False):
        alike = all(torch.equal(a, b) for a, b in zip(once(), once(), strict=True))
    if not alike:
        return Finding(
            "", "broken", "a product's gradients differ from one time to the next: results can't be repeated here"
        )
    return Finding("", "ok", "a product's gradients, under deterministic algorithms")


def _cache() -> Finding:
    from train.cache import cache_folder

    try:
        folder = cache_folder()
    except RuntimeError as error:
        return Finding("", "note", f"none ({error}): texts are made anew each time; set EXMY_CACHE to a folder")
    return _folder(folder, "note", "texts are made anew each time; set EXMY_CACHE to a folder that can be written to")


def _runs(folder: Path) -> Finding:
    return _folder(folder, "broken", "give sweeps another with --out DIR")


def _folder(folder: Path, state: Literal["note", "broken"], mend: str) -> Finding:
    """Whether files can be made in a folder, or where it would be made, and how much room there is; nothing is left there."""
    there = folder.absolute()
    while not there.exists() and there != there.parent:
        there = there.parent
    try:
        with tempfile.TemporaryFile(dir=there):
            pass
    except OSError as error:
        return Finding("", state, f"{folder}: can't be written to ({error.strerror}): {mend}", {"folder": str(folder)})
    free = shutil.disk_usage(there).free
    measured = {"folder": str(folder), "free_bytes": free}
    if free < LITTLE:
        return Finding(
            "",
            "note",
            f"{folder}: only {_gib(free)} free on the disk; a study of some hundred runs wants 1 GiB",
            measured,
        )
    return Finding("", "ok", f"{folder}: {_gib(free)} free on the disk", measured)


def _texts() -> Finding:
    from train.cache import cache_folder
    from train.text import KNOWN_TEXTS, kept_tokens, known_source

    kept = {name: kept_tokens(known_source(name), cache_folder()) for name in KNOWN_TEXTS}
    here = [f"{name} ({', '.join(found)})" for name, found in kept.items() if found]
    away = [name for name, found in kept.items() if not found]
    text = f"in the cache: {', '.join(here) or 'none'}"
    text += f"; to get the others before the network goes: exmy data fetch {' '.join(away)}" if away else ""
    return Finding("", "ok", text, {"training_tokens": kept})


def _gib(number: int) -> str:
    return f"{number / GIB:.1f} GiB"
