"""Point groups of maps that are symmetric by construction, turned, moved and in noise, and of some not so."""

from __future__ import annotations

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from halfmap.errors import ParameterError, ShapeError
from halfmap.ops import fourier, grids
from halfmap.ops.rotations import random_rotations
from halfmap.ops.symmetry import operators, order, symmetrise_volume
from halfmap.search.symmetry_map import spherical_average
from halfmap.search.symmetry_search import (
    LEAST_SHARE,
    correlation_of_shells,
    find_symmetry,
    to_standard_setting,
)

BOX, PIXEL = 44, 5.0
TRIED = ("C2", "C3", "C5", "C7", "D2", "D3", "D5", "T", "O", "I2")
SHIFT = torch.tensor([2.3, -1.6, 0.7])


def blobs(places: torch.Tensor, heights: torch.Tensor, seed: int, noise: float = 0.0) -> torch.Tensor:
    """Gaussian blobs of 8 Å at places in Å, turned at random, moved, in white noise."""
    generator = torch.Generator().manual_seed(seed)
    turn = random_rotations(1, generator=generator)[0]
    line = (torch.arange(BOX) - BOX // 2) * PIXEL
    x, y, z = torch.exp(
        -(line - (places @ turn.T + SHIFT * PIXEL)[..., None]).square() / (2 * 8.0**2)
    ).unbind(1)
    volume = torch.einsum("n,nz,ny,nx->zyx", heights, z, y, x)
    return volume + noise * torch.randn(volume.shape, generator=generator)


def unit(count: int, seed: int, *, least: float = 25.0) -> torch.Tensor:
    """Places without symmetry, away from the middle."""
    generator = torch.Generator().manual_seed(seed)
    places = torch.randn(count, 3, generator=generator)
    radius = least + 30 * torch.rand(count, 1, generator=generator)
    return places / places.norm(dim=1, keepdim=True) * radius


def of_group(group: str, count: int, seed: int) -> torch.Tensor:
    return (unit(count, seed) @ operators(group).float().transpose(-1, -2)).reshape(-1, 3)


@pytest.mark.parametrize(
    ("group", "count", "noise"),
    [("C1", 24, 0.3), ("C5", 5, 0.3), ("D3", 4, 0.3), ("T", 2, 0.3), ("I2", 1, 0.2)],
)
def test_the_group_is_found_in_noise_and_the_map_turned_to_its_axes(group, count, noise):
    places = of_group(group, count, seed=5)
    volume = blobs(places, torch.ones(len(places)), seed=11, noise=noise)
    found = find_symmetry(volume, pixel_size=PIXEL, groups=TRIED, null_maps=0)
    assert found.best.group == group
    if group == "C1":
        return
    # Noise explains what is lacking, within the margin that the decision leaves for it.
    assert found.share(found.best) == pytest.approx(1, abs=1 - LEAST_SHARE)
    clean = to_standard_setting(blobs(places, torch.ones(len(places)), seed=11), found.best)
    again = symmetrise_volume(clean, group)
    assert float((clean * again).sum() / (clean.norm() * again.norm())) > 0.995
    off = found.best.origin_px - SHIFT
    # Along the only axis of a cyclic group the centre is free.
    if group.startswith("C"):
        off = off - (off @ found.best.rotation[2]) * found.best.rotation[2]
    assert float(off.norm()) < 0.15


def test_nearly_a_larger_group_is_not_that_group():
    """D4 but for every other subunit, which has three tenths of the density: D2."""
    members = operators("D4").float()
    own = torch.cdist(members.flatten(1), operators("D2").float().flatten(1)).amin(dim=1) < 1e-3
    assert own.sum() == 4
    part = torch.where(own, 1.0, 0.3)
    places = (unit(4, seed=2) @ members.transpose(-1, -2)).reshape(-1, 3)
    volume = blobs(places, part.repeat_interleave(4), seed=3, noise=0.2)
    found = find_symmetry(volume, pixel_size=PIXEL, groups=("C2", "C4", "D2", "D4"), null_maps=0)
    assert found.best.group == "D2"
    scores = {score.group: score for score in found.scores}
    assert found.share(scores["D2"]) > 0.95
    assert found.share(scores["D4"]) < LEAST_SHARE


def test_a_round_shell_with_uneven_parts_has_no_symmetry():
    places = unit(24, seed=8)
    places = places / places.norm(dim=1, keepdim=True) * 45
    shell = torch.exp(-(grids.radius((BOX,) * 3, PIXEL) - 45).square() / (2 * 8.0**2))
    moved = fourier.phase_shift(fourier.rfft3(shell), shape=(BOX,) * 3, shift_px=SHIFT)
    volume = 2 * fourier.irfft3(moved, shape=(BOX,) * 3) + blobs(places, torch.ones(24), seed=4, noise=0.2)
    found = find_symmetry(volume, pixel_size=PIXEL, groups=TRIED, null_maps=0)
    assert found.best.group == "C1"


def test_maps_of_random_phases_and_half_maps():
    places = of_group("C3", 6, seed=9)
    heights = torch.ones(len(places))
    one, two = (blobs(places, heights, seed=1) for _ in range(2))
    generator = torch.Generator().manual_seed(0)
    one, two = (half + 0.3 * torch.randn(half.shape, generator=generator) for half in (one, two))
    groups = ("C2", "C3", "D3")
    around = find_symmetry((one + two) / 2, pixel_size=PIXEL, groups=groups, null_maps=4)
    halves = find_symmetry((one + two) / 2, pixel_size=PIXEL, groups=groups, halves=(one, two), null_maps=0)
    assert around.best.group == halves.best.group == "C3"
    # Both ways of telling the noise agree, and so does what is measured.
    assert around.signal == pytest.approx(halves.signal, abs=0.06)
    assert halves.share(halves.best) == pytest.approx(1, abs=1 - LEAST_SHARE)
    assert around.best.sigmas > 10
    assert abs(around.best.null_mean) < 0.35
    curve = correlation_of_shells(around, around.best)
    assert curve.shape == around.band.frequency.shape
    assert float(curve.mean()) == pytest.approx(float(around.band.signal_of_shell.mean()), abs=0.1)


def test_half_maps_tell_the_noise_of_a_map_of_any_scale_and_filter():
    """The signal is theirs; a map that was sharpened or scaled has it too."""
    places = of_group("C3", 6, seed=9)
    clean = blobs(places, torch.ones(len(places)), seed=1)
    generator = torch.Generator().manual_seed(0)
    one, two = (clean + 0.5 * torch.randn(clean.shape, generator=generator) for _ in range(2))
    spectrum = fourier.rfft3((one + two) / 2)
    sharper = 3 * (1 + 200 * grids.frequency_radius(clean.shape, PIXEL).square()) * spectrum
    maps = [(one + two) / 2, fourier.irfft3(sharper, shape=clean.shape)]
    how = {"pixel_size": PIXEL, "groups": ("C3", "C4"), "null_maps": 0, "diameter": 130.0}
    plain, other = (find_symmetry(each, halves=(one, two), **how) for each in maps)
    assert plain.signal < 0.9
    assert other.signal == pytest.approx(plain.signal, abs=0.03)
    for mine, its in zip(plain.scores, other.scores, strict=True):
        assert other.share(its) == pytest.approx(plain.share(mine), abs=0.08)


def test_spherical_average_is_made_where_the_map_is():
    with FakeTensorMode():
        assert spherical_average(torch.empty(8, 8, 8, device="cuda")).device.type == "cuda"


def test_the_same_seed_gives_the_same_scores():
    places = of_group("C2", 8, seed=4)
    volume = blobs(places, torch.ones(len(places)), seed=2, noise=0.3)
    one, two = (find_symmetry(volume, pixel_size=PIXEL, groups=("C2",), null_maps=2) for _ in range(2))
    assert one.best.null_std == two.best.null_std
    assert torch.equal(one.best.rotation, two.best.rotation)


def test_what_cannot_be_searched():
    with pytest.raises(ShapeError, match="not a cube"):
        find_symmetry(torch.zeros(8, 8, 9), pixel_size=1.0)
    noise = torch.randn((24,) * 3, generator=torch.Generator().manual_seed(0))
    with pytest.raises(ParameterError, match="no particle"):
        find_symmetry(noise, pixel_size=PIXEL)
    assert order("T") == 12
