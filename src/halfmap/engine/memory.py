"""Memory that a job may still take, and the error that says beforehand that it is not enough."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from halfmap.engine.options import RunOptions
from halfmap.errors import ResourceError

_GROUPS = Path("/proc/self/cgroup")
_MOUNT = Path("/sys/fs/cgroup")


def available_memory() -> int:
    """Bytes that this process and its workers may take: what is free, or less where a control group says so.

    Containers and batch systems limit memory by control groups, of which the system's own figures know
    nothing. File pages count as free, since they can be given up.
    """
    import psutil

    return max(0, min([psutil.virtual_memory().available, *_left_in_groups()]))


def require_memory(need: float, *, purpose: str, hint: str) -> None:
    """Check that a computation will fit in memory.

    Parameters
    ----------
    need : float
        Bytes at its peak, in all processes.
    purpose : str
        What needs them, the subject of the sentence.
    hint : str
        What to do about it.

    Raises
    ------
    ResourceError
        If it will not.
    """
    available = available_memory()
    if need > available:
        raise ResourceError(
            f"{purpose} needs {need / 1e9:.1f} GB of memory, {available / 1e9:.1f} GB are available",
            hint=hint,
        )


def processes_of(options: RunOptions) -> int:
    """Processes that share a step's work: the workers and this one, which may be the only one."""
    return 1 if options.workers == 1 and not options.is_remote else options.workers + 1


def memory_of_each(options: RunOptions) -> float:
    """Bytes that each of these processes may take, where some may be on other machines."""
    if options.is_remote:
        return min(available_memory(), options.memory_per_worker * 1e9)
    return available_memory() / processes_of(options)


def require_memory_of_each(need: float, options: RunOptions, *, purpose: str, hint: str) -> None:
    """Check that what each process takes will fit where it runs.

    Parameters
    ----------
    need : float
        Bytes of one process at its peak.
    options : RunOptions
        How many there are, and what workers of a cluster have.
    purpose, hint : str
        As of `require_memory`.

    Raises
    ------
    ResourceError
        If it will not.
    """
    if not options.is_remote:
        return require_memory(need * processes_of(options), purpose=purpose, hint=hint)
    given = options.memory_per_worker * 1e9
    if need > given:
        raise ResourceError(
            f"{purpose} needs {need / 1e9:.1f} GB of memory in each worker, which has {given / 1e9:.1f} GB",
            hint=f"ask for more --memory-per-worker, or {hint}",
        )
    return require_memory(need, purpose=purpose, hint=hint)


def _left_in_groups() -> Iterator[int]:
    """What the limits of the control groups around this process leave, version 1 or 2."""
    try:
        lines = _GROUPS.read_text().splitlines()
    except OSError:
        return
    for line in lines:
        _, controllers, name = line.split(":", 2)
        if controllers == "":
            mount, limit, usage = _MOUNT, "memory.max", "memory.current"
        elif "memory" in controllers.split(","):
            mount, limit, usage = _MOUNT / "memory", "memory.limit_in_bytes", "memory.usage_in_bytes"
        else:
            continue
        # A container sees its own group as the root, or does not see the path that it is told.
        group = mount / name.lstrip("/")
        for folder in [group, *group.parents]:
            try:
                text = (folder / limit).read_text().strip()
                if text != "max":
                    yield int(text) - int((folder / usage).read_text()) + _file_pages(folder)
            except (OSError, ValueError, KeyError):
                pass
            if folder == mount:
                break


def _file_pages(folder: Path) -> int:
    lines = (folder / "memory.stat").read_text().splitlines()
    pages = {name: int(value) for name, value in (line.split() for line in lines)}
    # Version 1 counts the groups inside apart.
    prefix = "total_" if "total_inactive_file" in pages else ""
    return pages[f"{prefix}inactive_file"] + pages[f"{prefix}active_file"]
