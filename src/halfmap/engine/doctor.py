"""Examine an installation: versions, devices, memory, disk, and what optional parts are missing."""

from __future__ import annotations

import platform
import shutil
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING

import halfmap
from halfmap.engine import kubernetes
from halfmap.engine.memory import available_memory
from halfmap.engine.queues import QUEUES
from halfmap.ops.cores import usable_cores

if TYPE_CHECKING:
    from rich.console import Group

REQUIRED = (
    "torch", "numpy", "scipy", "numba", "polars", "pydantic", "tyro", "mrcfile", "tifffile", "imagecodecs",
    "gemmi", "matplotlib", "dask", "distributed", "psutil", "rich",
)  # fmt: skip
"""Packages that the installer brings along."""

OPTIONAL = {
    "relion_refine": "RELION, to compare with and to exchange projects with (Debian: apt install relion)",
    "nvidia-smi": "an NVIDIA driver, for GPUs (from your system's administrator)",
}
"""Programs that Halfmap works without."""

LOW_MEMORY_GB, LOW_DISK_GB = 8, 50


def examine(folder: Path) -> Group:
    """What ``halfmap doctor`` shows, with a remedy beside everything that is missing.

    Parameters
    ----------
    folder : path
        Where projects are to lie; its disk is measured.
    """
    from rich.console import Group
    from rich.table import Table

    table = Table(box=None, show_header=False, padding=(0, 2))
    advice: list[str] = []
    table.add_row("Halfmap", halfmap.__version__, f"in {Path(halfmap.__file__).parent}")
    table.add_row("Python", platform.python_version(), platform.platform())
    table.add_section()
    for name in REQUIRED:
        version = _version(name)
        table.add_row(name, version or "[red]missing[/]", "")
        if version is None:
            advice.append(f"{name} is missing: pip install --upgrade --force-reinstall halfmap")
    table.add_section()
    for label, value, note in (*_devices(advice), *_memory(folder, advice)):
        table.add_row(label, value, note)
    table.add_section()
    for program, purpose in OPTIONAL.items():
        found = shutil.which(program)
        table.add_row(program, "found" if found else "not found", found or f"optional: {purpose}")
    table.add_section()
    for label, value, note in _clusters():
        table.add_row(label, value, note)
    verdict = (
        "[green]All that Halfmap needs is here.[/]"
        if not advice
        else "\n".join(f"[yellow]![/] {line}" for line in advice)
    )
    return Group(table, "", verdict)


def _clusters() -> list[tuple[str, str, str]]:
    """Which clusters workers can be asked of from this machine."""
    lacks = {name: queue.missing() for name, queue in QUEUES.items()} | {"kubernetes": kubernetes.missing()}
    return [
        (f"--cluster {name}", "can be used" if why is None else "cannot", why or "")
        for name, why in lacks.items()
    ]


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _devices(advice: list[str]) -> list[tuple[str, str, str]]:
    import psutil

    cores = usable_cores()
    rows = [("CPU", f"{cores} cores", f"{psutil.cpu_count(logical=False) or cores} physical in the machine")]
    if _version("torch") is None:
        return rows
    import torch

    for index in range(torch.cuda.device_count()):
        card = torch.cuda.get_device_properties(index)
        rows.append((f"cuda:{index}", card.name, f"{card.total_memory / 2**30:.0f} GB"))
    if not torch.cuda.is_available():
        rows.append(("GPU", "none", "everything runs on the CPU"))
        if shutil.which("nvidia-smi"):
            advice.append(
                f"an NVIDIA driver is here, but torch {torch.__version__} cannot use it: "
                "install a CUDA build of torch"
            )
    return rows


def _memory(folder: Path, advice: list[str]) -> list[tuple[str, str, str]]:
    import psutil

    memory = psutil.virtual_memory()
    disk = shutil.disk_usage(folder)
    if memory.total / 2**30 < LOW_MEMORY_GB:
        advice.append(f"less than {LOW_MEMORY_GB} GB of memory: large movies and boxes will not fit")
    if disk.free / 2**30 < LOW_DISK_GB:
        advice.append(
            f"less than {LOW_DISK_GB} GB of disk are free in {folder.absolute()}: a data set needs more"
        )
    return [
        ("Memory", f"{memory.total / 2**30:.0f} GB", f"{available_memory() / 2**30:.0f} GB available"),
        ("Disk", f"{disk.free / 2**30:.0f} GB free", f"in {folder.absolute()}"),
    ]
