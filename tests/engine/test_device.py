"""Devices of jobs and of their workers, on this machine and on others."""

from __future__ import annotations

import functools
import pickle

import pytest
import toy_step as toy

from halfmap.engine import Context, RunOptions, cluster, executor
from halfmap.engine.device import GpuOfWorker, device_for, gpus_to_share
from halfmap.errors import ParameterError, ResourceError


@pytest.mark.parametrize("options", [{"executor": "processes"}, {"cluster": "local"}], ids=str)
def test_workers_of_a_machine_take_a_gpu_each(tmp_path, monkeypatch, options):
    module = cluster if "cluster" in options else executor
    monkeypatch.setattr(module, "gpus_to_share", lambda _: ("3", "5"))
    ctx = Context(tmp_path, tmp_path, RunOptions(workers=2, **options))
    found = ctx.map(functools.partial(toy.variable, "CUDA_VISIBLE_DEVICES"), list(range(6)))
    assert set(found) == {"3", "5"}


def test_which_gpus_are_shared(monkeypatch):
    import torch

    monkeypatch.setattr(torch.cuda, "device_count", lambda: 3)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert gpus_to_share(RunOptions(workers=2)) == ("0", "1", "2")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "GPU-a,GPU-b,GPU-c")
    assert gpus_to_share(RunOptions(workers=2, device="cuda")) == ("GPU-a", "GPU-b", "GPU-c")
    assert gpus_to_share(RunOptions(workers=2, device="cuda:1")) == ()
    assert gpus_to_share(RunOptions(workers=1)) == ()
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    assert gpus_to_share(RunOptions(workers=2)) == ()


def test_a_device_becomes_the_workers_own_on_another_machine(monkeypatch):
    import torch

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    device = device_for(RunOptions(cluster="slurm", device="cuda"))
    assert device == "cpu"
    assert isinstance(device, GpuOfWorker)
    sent = pickle.dumps({"device": device})
    with pytest.raises(ResourceError, match=r"a GPU was asked for each worker, but the one on .* has none"):
        pickle.loads(sent)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert pickle.loads(sent) == {"device": "cuda:0"}
    assert device_for(RunOptions(cluster="slurm")) == "cpu"
    with pytest.raises(ParameterError, match="'cuda:2' is no GPU that workers can be given"):
        device_for(RunOptions(cluster="slurm", device="cuda:2"))
