"""Choose the device that a step computes on, and say so when the one asked for is not there."""

from __future__ import annotations

import os
import socket
from collections.abc import Sequence
from typing import TYPE_CHECKING

from halfmap.errors import ParameterError, ResourceError

if TYPE_CHECKING:
    from halfmap.engine.options import RunOptions

_VISIBLE = "CUDA_VISIBLE_DEVICES"


class GpuOfWorker(str):
    """Device of this process, in the place of which a worker on another machine has its own GPU."""

    __slots__ = ()

    def __reduce__(self):
        return _own_gpu, ()


def _own_gpu() -> str:
    import torch

    if not torch.cuda.is_available():
        raise ResourceError(
            f"a GPU was asked for each worker, but the one on {socket.gethostname()} has none",
            hint="ask for another --queue, or leave out --device cuda",
        )
    return "cuda:0"


def device_for(options: RunOptions) -> str:
    """Device of a job: that of this process, or what stands for each worker's own on a cluster.

    Raises
    ------
    ResourceError, ParameterError
        If it is not there, or names one GPU where each worker is to have its own.
    """
    if not options.is_remote:
        return choose_device(options.device)
    if options.device in ("auto", "cpu"):
        return "cpu"
    if options.device != "cuda":
        hint = f"--device cuda asks --cluster {options.cluster} for one for each worker"
        raise ParameterError(f"{options.device!r} is no GPU that workers can be given", hint=hint)
    import torch

    # What workers find is added up here, on a CPU where there is no GPU.
    return GpuOfWorker("cuda:0" if torch.cuda.is_available() else "cpu")


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


def gpus_to_share(options: RunOptions) -> tuple[str, ...]:
    """Names of the GPUs from which workers on this machine take one each; none where all use the same."""
    if options.device not in ("auto", "cuda") or options.workers == 1:
        return ()
    import torch

    count = torch.cuda.device_count()
    names = os.environ.get(_VISIBLE, "").split(",") if os.environ.get(_VISIBLE) else map(str, range(count))
    return tuple(names)[:count] if count > 1 else ()


def take_gpu(gpus: Sequence[str], number: int) -> None:
    """Let this process see one GPU alone; before CUDA begins, which looks once."""
    os.environ[_VISIBLE] = gpus[number % len(gpus)]
