"""Choose the device that a step computes on, and say so when the one asked for is not there."""

from __future__ import annotations

from halfmap.errors import ResourceError


def choose_device(wanted: str) -> str:
    """Resolve ``auto``, ``cpu``, ``cuda`` or ``cuda:N`` to a device that exists.

    Raises
    ------
    ResourceError
        If a GPU is asked for by name and is missing; only ``auto`` may fall back to the CPU.
    """
    if wanted == "cpu":
        return wanted
    import torch

    available = [f"cuda:{index}" for index in range(torch.cuda.device_count())]
    if wanted == "auto":
        return available[0] if available else "cpu"
    name = "cuda:0" if wanted == "cuda" else wanted
    if name not in available:
        has = ", ".join(["cpu", *available])
        raise ResourceError(f"device {wanted!r} is not on this machine", hint=f"choose one of: auto, {has}")
    return name
