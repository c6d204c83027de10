"""Models come back from their files as they were."""

from dataclasses import dataclass

import pytest
import torch

from halfmap.errors import FileFormatError
from halfmap.search.checkpoint import Checkpoint


@dataclass(frozen=True, eq=False)
class _One(Checkpoint):
    on_device = ("values",)
    number: int
    stage: str
    values: torch.Tensor
    read: torch.Tensor


@dataclass(frozen=True, eq=False)
class _Other(Checkpoint):
    number: int


def test_saved_and_loaded(tmp_path):
    made = _One(3, "near", torch.rand(2, 3), torch.arange(4))
    made.save(tmp_path / "model.npz")
    found = _One.load(tmp_path / "model.npz", "cpu")
    assert (found.number, found.stage) == (3, "near")
    assert torch.equal(found.values, made.values)
    assert torch.equal(found.read, made.read)
    away = _One.load(tmp_path / "model.npz", "meta")
    assert (away.values.device.type, away.read.device.type) == ("meta", "cpu")


def test_of_another_version(tmp_path):
    _Other(3).save(tmp_path / "model.npz")
    with pytest.raises(FileFormatError, match="another version"):
        _One.load(tmp_path / "model.npz", "cpu")
