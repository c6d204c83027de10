"""Files of weights: what goes in comes out, and what is not right is refused."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

from halfmap.errors import FileFormatError
from halfmap.nets.denoiser import load_denoiser
from halfmap.nets.picker import Picker
from halfmap.nets.weights import load_weights, record_file, save_weights, shipped


@pytest.fixture
def saved(tmp_path):
    torch.manual_seed(3)
    network = Picker()
    network.offset.fill_(0.25)
    path = tmp_path / "model.npz"
    save_weights(path, network, {"kind": "picker", "version": 7})
    return path, network


def test_weights_survive_in_half_precision(saved):
    path, network = saved
    other = Picker()
    record = load_weights(path, other, kind="picker")
    assert record["version"] == 7
    for name, tensor in network.state_dict().items():
        read = other.state_dict()[name]
        # Half precision has 11 bits, and steps of 2^-24 where numbers are tiny.
        assert torch.allclose(read.float(), tensor.float(), rtol=2**-11, atol=2**-24), name


def test_the_same_weights_make_the_same_file(saved, tmp_path):
    path, network = saved
    again = tmp_path / "again.npz"
    save_weights(again, network, {"kind": "picker", "version": 7})
    assert again.read_bytes() == path.read_bytes()


def test_changed_weights_are_refused(saved):
    path, network = saved
    other = path.with_name("other.npz")
    network.offset.fill_(0.5)
    save_weights(other, network, {"kind": "picker"})
    path.write_bytes(other.read_bytes())
    with pytest.raises(FileFormatError, match="record"):
        load_weights(path, Picker(), kind="picker")


def test_a_missing_record_is_named(saved):
    path, _ = saved
    record_file(path).unlink()
    with pytest.raises(FileFormatError, match=r"model\.json is missing"):
        load_weights(path, Picker(), kind="picker")


def test_missing_weights_are_named(saved):
    path, _ = saved
    path.unlink()
    with pytest.raises(FileFormatError, match=r"model\.npz is missing"):
        load_weights(path, Picker(), kind="picker")


def test_another_kind_or_network_is_refused(saved):
    path, _ = saved
    with pytest.raises(FileFormatError, match="no model of the kind 'denoiser'"):
        load_weights(path, Picker(), kind="denoiser")
    with pytest.raises(FileFormatError, match="another network"):
        load_weights(path, Picker((8, 8, 8)), kind="picker")


@pytest.mark.parametrize("content", [b"", b"no archive", b"PK\x03\x04 cut short"])
def test_a_file_that_holds_no_weights_is_refused(saved, content):
    path, _ = saved
    path.write_bytes(content)
    with pytest.raises(FileFormatError, match="no weights"):
        load_weights(path, Picker(), kind="picker")


def test_shipped_weights_are_small_and_as_recorded():
    network = Picker()
    record = load_weights(shipped("picker"), network, kind="picker")
    assert shipped("picker").stat().st_size < 1_000_000
    assert record["parameters"] == sum(weight.numel() for weight in network.parameters())
    assert all(np.isfinite(tensor.numpy()).all() for tensor in network.state_dict().values())
    assert json.loads(record_file(shipped("picker")).read_text())["validation"]


def test_apoferritin_and_homologues_of_validation_were_not_trained_on():
    """The real apoferritin micrographs are a fair test, and so are the structures for validation."""
    record = load_weights(shipped("picker"), Picker(), kind="picker")
    trained = set(record["training"]["structures"])
    kept = {"6z6u", "4r8p", "3j5p", "4v5d", "4v6x", "30Srib", *record["validation"]}
    assert len(trained) > 50
    assert not trained & kept


def test_the_shipped_denoiser_is_as_recorded_and_has_not_seen_what_it_is_measured_on():
    network, record = load_denoiser(shipped("denoiser"))
    assert shipped("denoiser").stat().st_size < 1_000_000
    assert all(np.isfinite(tensor.numpy()).all() for tensor in network.state_dict().values())
    assert (record["pixel_size"], record["phase_flipped"]) == (1.5, False)
    trained = {table.removesuffix(".star") for table in record["tables"]}
    assert len(trained) >= 15
    assert not trained & {"4hhb", "t20s", "4v6x", "30Srib", "6zu5", "6z6u"}
