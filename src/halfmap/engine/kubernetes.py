"""Workers that are pods of Kubernetes, kept by Dask's operator there."""

from __future__ import annotations

import inspect
import os
import shutil
import time
import uuid
from collections.abc import Set
from pathlib import Path
from typing import Any

from halfmap.engine.options import RunOptions
from halfmap.engine.progress import duration
from halfmap.engine.queues import given, run_command
from halfmap.errors import ParameterError, ResourceError
from halfmap.log import log

_SILENCE_s = 120.0
_DESERTED_s = 3600
"""Time without any work after which the operator removes pods that a killed command has left."""

_LOOK_s = 30.0
_IN_POD = Path("/var/run/secrets/kubernetes.io/serviceaccount")
_OURS = {"name", "n_workers", "resources", "env", "worker_command", "custom_cluster_spec"}
_INNER = {"self", "kwargs", "asynchronous", "loop", "quiet", "shutdown_on_close"}


def missing() -> str | None:
    """What there is not that pods need on this machine, with the remedy."""
    from importlib.util import find_spec

    if find_spec("dask_kubernetes") is None:
        return "dask-kubernetes is missing: pip install 'halfmap[kubernetes]'"
    named = os.environ.get("KUBECONFIG") or str(Path.home() / ".kube/config")
    if not any(Path(file).exists() for file in (*named.split(os.pathsep), _IN_POD)):
        return f"there is no {named}, which says how to reach it (from its administrator)"
    return None


def require(options: RunOptions) -> None:
    """Refuse pods that cannot be.

    Raises
    ------
    ResourceError, ParameterError
        If the package is missing, or options say too little or what is not known.
    """
    lacks = missing()
    if lacks is not None:
        raise ResourceError(f"--cluster kubernetes cannot be used here: {lacks}")
    values = _values(options)
    for key, what in (
        ("image", "the container in which Halfmap is installed"),
        ("volume", "CLAIM:FOLDER, the claim of a volume and the folder that it is, here and there"),
    ):
        if key not in values:
            raise ParameterError(f"--cluster kubernetes needs --cluster-option {key}={what}")
    if ":/" not in values["volume"]:
        raise ParameterError(f"--cluster-option volume takes CLAIM:FOLDER, not {values['volume']!r}")


def _values(options: RunOptions) -> dict[str, Any]:
    from dask_kubernetes.operator import KubeCluster  # pyright: ignore[reportMissingImports] - an extra

    known = set(inspect.signature(KubeCluster.__init__).parameters) - _OURS - _INNER
    return given(options, known | {"volume"})


def cluster_spec(options: RunOptions, name: str, environment: dict[str, str]) -> dict[str, Any]:
    """What Dask's operator is asked for: a scheduler, and workers that see the shared volume."""
    from dask_kubernetes.operator import make_cluster_spec  # pyright: ignore[reportMissingImports] - an extra

    values = _values(options)
    claim, _, folder = values["volume"].partition(":")
    amounts = {
        "cpu": str(options.cores_per_worker),
        "memory": f"{round(1000 * options.memory_per_worker)}M",
    }
    if options.device == "cuda":
        amounts["nvidia.com/gpu"] = "1"
    spec = make_cluster_spec(
        name=name,
        image=values["image"],
        n_workers=0,  # as many as there is work for are asked for then
        env=environment,
        idle_timeout=_DESERTED_s,
        worker_command="dask worker --nthreads 1 --memory-limit 0",
    )
    pod = spec["spec"]["worker"]["spec"]
    pod["containers"][0]["resources"] = {"limits": amounts, "requests": amounts}
    pod["containers"][0]["volumeMounts"] = [{"name": "project", "mountPath": folder}]
    pod["volumes"] = [{"name": "project", "persistentVolumeClaim": {"claimName": claim}}]
    return spec


class KubernetesWorkers:
    """Workers in pods, which the operator replaces where they are lost.

    Parameters
    ----------
    options : RunOptions
        How many, and what each needs.
    environment : mapping of str to str
        Variables that they run with.
    """

    def __init__(self, options: RunOptions, environment: dict[str, str]) -> None:
        self.options, self.environment = options, environment
        self.name = f"halfmap-{uuid.uuid4().hex[:8]}"
        self._since, self._patience = time.monotonic(), _SILENCE_s
        self._asked, self._next = 0, 0.0

    def start(self) -> Any:
        """Ask for a scheduler, and wait for it.

        Raises
        ------
        ResourceError
            If there are none to be had.
        """
        from dask_kubernetes.operator import KubeCluster  # pyright: ignore[reportMissingImports] - an extra

        values = {
            key: value for key, value in _values(self.options).items() if key not in ("image", "volume")
        }
        spec = cluster_spec(self.options, self.name, self.environment)
        try:
            self._cluster = KubeCluster(
                custom_cluster_spec=spec, quiet=True, shutdown_on_close=True, **values
            )
        except Exception as error:
            raise ResourceError(
                f"Kubernetes gives no scheduler: {type(error).__name__}: {error}",
                hint="is the operator of Dask installed there, and does kubectl reach it?",
            ) from error
        return self._cluster

    def tend(self, need: int, names: Set[str], results: int) -> None:
        """Ask for as many pods as are needed; say what there is of them while no worker is there."""
        now = time.monotonic()
        if need > self._asked and now > self._next:
            self._scale(need)
            self._next = now + _LOOK_s
        if names:
            self._since, self._patience = now, _SILENCE_s
        elif now - self._since > self._patience:
            log.warning("no worker for %s; Kubernetes says: %s", duration(now - self._since), self._pods())
            self._patience *= 2

    def dismiss(self, names: Set[str]) -> None:
        """Ask for fewer: the operator takes those that have nothing to do."""
        self._scale(self._asked - len(names))

    def _scale(self, number: int) -> None:
        try:
            self._cluster.scale(number)
        except Exception as error:
            log.warning("Kubernetes cannot be asked for workers now: %s: %s", type(error).__name__, error)
            return
        log.info("%d workers are asked of Kubernetes: %s", number, self.name)
        self._asked = number

    def _pods(self) -> str:
        if shutil.which("kubectl") is None:
            return "nothing, there is no kubectl here"
        command = ["kubectl", "get", "pods", "--no-headers", "-l", f"dask.org/cluster-name={self.name}"]
        command += ["--namespace", self._cluster.namespace or "default"]
        said = run_command(command)
        lines = (said.stdout or said.stderr).strip().splitlines()
        return "; ".join(" ".join(line.split()) for line in lines[:3]) or "nothing"

    def end(self) -> None:
        """Nothing: the cluster takes its pods with it."""
