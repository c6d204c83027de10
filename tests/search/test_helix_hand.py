"""Helices put into a map on purpose, and into its mirror image."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.stats import t

from halfmap.io.models import scattering_coefficients
from halfmap.ops.filters import low_pass
from halfmap.ops.fourier import irfft3, rfft3
from halfmap.ops.helix import ELEMENTS, ideal_helix
from halfmap.ops.potential import atomic_volume
from halfmap.ops.rotations import from_rotation_vector
from halfmap.ops.symmetry import operators
from halfmap.search.helix_hand import HelixHand, fit_helices

BOX, PIXEL, DETAIL = 36, 1.5, 4.3
SHAPE = (BOX,) * 3
PLACES = torch.tensor([[-9.0, -8.0, 3.0], [10.0, 6.0, -4.0]], dtype=torch.float64)
TURNS = from_rotation_vector(torch.tensor([[70.0, 10.0, 30.0], [-20.0, 150.0, 40.0]], dtype=torch.float64))


def helices() -> tuple[torch.Tensor, torch.Tensor]:
    """Map of two helices with some noise, and a mask about their centres."""
    atoms = torch.cat(
        [ideal_helix(11).flatten(0, 1) @ turn.T + at for turn, at in zip(TURNS, PLACES, strict=True)]
    )
    gaussians = [np.stack(scattering_coefficients(each), -1) for each in ELEMENTS * 22]
    density = atomic_volume(
        atoms,
        coefficients=torch.from_numpy(np.stack(gaussians)),
        shape=SHAPE,
        pixel_size=PIXEL,
        b_factors=torch.full((len(atoms),), 20.0),
    )
    noise = torch.randn(SHAPE, generator=torch.Generator().manual_seed(1))
    passed = low_pass(SHAPE, pixel_size=PIXEL, resolution=DETAIL)
    volume = irfft3(rfft3(density + 0.3 * density.std() * noise) * passed, shape=SHAPE)
    mask = torch.zeros(SHAPE)
    for x, y, z in (PLACES / PIXEL + BOX // 2).round().long().tolist():
        mask[z - 2 : z + 3, y - 2 : y + 3, x - 2 : x + 3] = 1
    return volume, mask


@pytest.mark.parametrize("mirrored", [False, True])
def test_helices_are_found_with_their_hand(mirrored):
    volume, mask = helices()
    if mirrored:
        volume, mask = (each.flip(0).roll(1, 0) for each in (volume, mask))
    found = fit_helices(volume, pixel_size=PIXEL, resolution=DETAIL, mask=mask).above(0.8)
    assert len(found.right) == 2
    right, left = (found.left, found.right) if mirrored else (found.right, found.left)
    assert float(right.min()) > 0.9
    assert float(left.max()) < 0.8
    z_sign = -1.0 if mirrored else 1.0
    for place, axis in zip(found.places_px, found.axes, strict=True):
        at = (place.double() - BOX // 2) * PIXEL * torch.tensor([1.0, 1.0, z_sign])
        apart = (PLACES - at).norm(dim=1)
        nearest = int(apart.argmin())
        assert float(apart[nearest]) < 3.5
        true = TURNS[nearest][:, 2] * torch.tensor([1.0, 1.0, z_sign])
        # Directions that are tried are 15° apart.
        assert abs(float(axis.double() @ true)) > 0.966


@pytest.mark.parametrize("group", ["C1", "O"])
def test_copies_of_a_place_are_one(group):
    """One left-handed helix, and its copies by the symmetry, about a point that is not the box's middle."""
    box, detail = 48, 4.5
    turns, shift = operators("O"), torch.tensor([1.0, -2.0, 0.0], dtype=torch.float64)
    one = ideal_helix(11).flatten(0, 1) * torch.tensor([1.0, 1.0, -1.0])
    one = one @ TURNS[0].T + torch.tensor([22.0, 12.0, 5.0], dtype=torch.float64)
    atoms = (one @ turns.mT).flatten(0, 1) + shift * PIXEL
    gaussians = [np.stack(scattering_coefficients(each), -1) for each in ELEMENTS * 11 * len(turns)]
    density = atomic_volume(
        atoms,
        coefficients=torch.from_numpy(np.stack(gaussians)),
        shape=(box,) * 3,
        pixel_size=PIXEL,
        b_factors=torch.full((len(atoms),), 20.0),
    )
    volume = irfft3(
        rfft3(density) * low_pass((box,) * 3, pixel_size=PIXEL, resolution=detail), shape=(box,) * 3
    )
    found = fit_helices(
        volume,
        pixel_size=PIXEL,
        resolution=detail,
        mask=(volume > 0.3 * volume.max()).float(),
        group=group,
        origin_px=shift + box // 2,
    ).above(0.8)
    assert bool((found.left > found.right).all())
    assert len(found.left) >= 20 if group == "C1" else len(found.left) == 1


def test_a_mask_bounds_where_is_looked():
    volume, _ = helices()
    assert not len(fit_helices(volume, pixel_size=PIXEL, resolution=DETAIL, mask=torch.zeros(SHAPE)).right)


def test_preference_has_its_errors():
    right, left = torch.full((20,), 0.8), torch.full((20,), 0.7)
    right[:4] = 0.65
    found = HelixHand(right, left, torch.zeros(20, 3), torch.zeros(20, 3))
    assert found.difference == pytest.approx(0.07)
    assert found.sigmas == pytest.approx(0.07 / (float((right - left).std()) / 10**0.5))
    # As of ten places: Student's t with nine degrees of freedom.
    assert found.probability == pytest.approx(2 * t.cdf(-found.sigmas, 9))
    # 4 or fewer of 20, either way: 2 · (1 + 20 + 190 + 1140 + 4845) / 2²⁰.
    assert found.sign_probability == pytest.approx(2 * 6196 / 2**20)
    assert len(found.above(0.75).right) == 16
