"""Workers in pods: how the operator is asked for them."""

from __future__ import annotations

import subprocess
from types import SimpleNamespace

import pytest

from halfmap.engine import RunOptions
from halfmap.engine.executor import prepare_workers
from halfmap.engine.kubernetes import KubernetesWorkers, cluster_spec
from halfmap.errors import ParameterError, ResourceError


def test_pods_are_worded_for_the_operator(tmp_path, monkeypatch):
    pytest.importorskip("dask_kubernetes", reason="dask-kubernetes (halfmap[kubernetes]) is not installed")
    monkeypatch.setenv("KUBECONFIG", str(tmp_path / "config"))
    with pytest.raises(ResourceError, match=r"there is no .*config, which says how to reach it"):
        prepare_workers(RunOptions(cluster="kubernetes"))
    (tmp_path / "config").touch()
    options = RunOptions(
        cluster="kubernetes",
        workers=7,
        device="cuda",
        cores_per_worker=3,
        cluster_option=("image=me/halfmap:1", "volume=lab:/data", "namespace=em"),
    )
    prepare_workers(options)
    spec = cluster_spec(options, "halfmap-1", {"OMP_NUM_THREADS": "3"})
    group = spec["spec"]["worker"]
    pod = group["spec"]["containers"][0]
    assert group["replicas"] == 0  # as many as there is work for are asked for then
    assert spec["spec"]["idleTimeout"] == 3600
    assert pod["image"] == "me/halfmap:1"
    assert pod["resources"]["limits"] == {"cpu": "3", "memory": "16000M", "nvidia.com/gpu": "1"}
    assert pod["volumeMounts"] == [{"name": "project", "mountPath": "/data"}]
    assert group["spec"]["volumes"][0]["persistentVolumeClaim"] == {"claimName": "lab"}
    assert {"name": "OMP_NUM_THREADS", "value": "3"} in pod["env"]
    assert (
        "resources" not in spec["spec"]["scheduler"]["spec"]["containers"][0]
        or not (spec["spec"]["scheduler"]["spec"]["containers"][0]["resources"])
    )
    wrong = (((), "image="), (("image=a",), "volume="), (("image=a", "volume=b"), "CLAIM:FOLDER"))
    for wanting, problem in wrong:
        with pytest.raises(ParameterError, match=problem):
            prepare_workers(RunOptions(cluster="kubernetes", cluster_option=wanting))


def test_pods_are_asked_for_as_there_is_work_whatever_hangs(monkeypatch, caplog):
    pods = KubernetesWorkers(RunOptions(cluster="kubernetes", workers=9), {})
    scaled: list[int] = []
    pods._cluster = SimpleNamespace(scale=scaled.append, namespace="em")
    pods.tend(2, set(), 0)
    pods.tend(2, {"a", "b"}, 0)
    pods._next = 0.0
    pods.tend(9, {"a", "b"}, 0)
    pods.dismiss({"a", "b", "c"})
    assert scaled == [2, 9, 6]

    def hang(command, **_):
        raise subprocess.TimeoutExpired(command, 60)

    monkeypatch.setattr("shutil.which", lambda _: "/bin/kubectl")
    monkeypatch.setattr("subprocess.run", hang)
    pods._since = -1e6
    pods.tend(6, set(), 0)
    assert "timed out after 60 seconds" in caplog.text
