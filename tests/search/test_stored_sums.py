"""Sums in files: the same maps as from those in memory."""

from pathlib import Path

import numpy as np
import pytest
import torch
from pose_simulation import Particle, simulate

from halfmap.errors import FileFormatError, ShapeError
from halfmap.search.backprojector import Backprojection
from halfmap.search.disc import FourierDisc
from halfmap.search.halfmaps import HalfSums, solved
from halfmap.search.stored_sums import StoredSums, store

BOX, RADIUS = 32, 12
PARTICLE = Particle.random(BOX, count=40, radius_px=9.0)
DISC = FourierDisc(BOX, RADIUS)


def _sums(seed: int, group: str = "C1") -> Backprojection:
    truth = simulate(PARTICLE, DISC, 20, snr=0.2, seed=seed)
    sums = Backprojection.empty(BOX, RADIUS, group=group)
    sums.add(truth.images, truth.rotations, truth.shifts_px)
    return sums if group == "C1" else sums.symmetrised()


@pytest.mark.parametrize("group", ["C1", "D2"])
def test_maps_of_files_are_those_of_what_was_written(tmp_path: Path, group: str):
    parts = [_sums(seed, group) for seed in range(3)]
    paths = [tmp_path / f"{i}.npy" for i in range(3)]
    sizes = [store(path, part) for path, part in zip(paths, parts, strict=True)]
    stored = StoredSums.open(paths[:2], sizes[0]), StoredSums.open(paths[2:], sizes[2])
    held = parts[0] + parts[1], parts[2]
    found, expected = HalfSums.of(stored), HalfSums.of(held)
    assert torch.allclose(found.noise, expected.noise)
    for own, other in zip(found.unfiltered(), expected.unfiltered(), strict=True):
        # Beyond the disc's radius files hold what is within one voxel.
        assert float((own - other).abs().max()) < 0.01 * float(other.abs().max())
    prior = torch.full((RADIUS + 1,), float(held[0].sums.weights.mean()))
    whole = solved(stored[0] + stored[1], prior)
    assert torch.allclose(whole, solved(StoredSums.open(paths, sizes[0]), prior))
    assert torch.allclose(
        solved(stored[0] + stored[1], prior, without=stored[1]), solved(stored[0], prior), atol=1e-4
    )


def test_planes_are_those_of_the_sums(tmp_path: Path):
    sums = _sums(1)
    stored = StoredSums.open([tmp_path / "a.npy"], store(tmp_path / "a.npy", sums))
    m = stored.limit
    whole = stored.planes(range(-m, m + 1)).numpy()
    assert np.array_equal(stored.planes(range(-2, 3)).numpy(), whole[m - 2 : m + 3])
    data = sums.sums.data[1:-1, 1:-1, :-1, :3].numpy()
    axis = np.arange(-m, m + 1)
    inside = axis[:, None, None] ** 2 + axis[:, None] ** 2 + axis[m:] ** 2 <= (m + 1) ** 2
    assert np.array_equal(whole[:, :, 1:], np.where(inside[..., None], data, 0)[:, :, 1:])
    # At x = 0 a voxel and its mate hold one value between them.
    mates = data[:, :, 0] + data[::-1, ::-1, 0] * np.array([1, -1, 1])
    assert np.allclose(whole[:, :, 0][inside[:, :, 0]], mates[inside[:, :, 0]])
    room = (tmp_path / "a.npy").stat().st_size / sums.sums.data.numpy().nbytes
    assert room < 0.42


def test_other_files_are_refused(tmp_path: Path):
    sizes = store(tmp_path / "a.npy", _sums(1))
    (tmp_path / "b.npy").write_bytes(b"nothing")
    with pytest.raises(FileFormatError, match="no sums"):
        StoredSums.open([tmp_path / "b.npy"], sizes)
    small = Backprojection.empty(BOX, RADIUS - 4)
    other = store(tmp_path / "c.npy", small)
    with pytest.raises(FileFormatError, match="another size"):
        StoredSums.open([tmp_path / "c.npy"], sizes)
    with pytest.raises(ShapeError):
        _ = StoredSums.open([tmp_path / "a.npy"], sizes) + StoredSums.open([tmp_path / "c.npy"], other)
