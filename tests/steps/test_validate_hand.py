"""The hand of simulated maps of a protein of helices, and of maps that do not tell it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from validate_given import given

from halfmap.io.half_maps import HalfMaps
from halfmap.io.models import read_model, scattering_coefficients
from halfmap.ops.filters import low_pass
from halfmap.ops.fourier import irfft3, rfft3
from halfmap.ops.fsc import corrected_fsc, resolution
from halfmap.ops.masks import around_points, soft_edge
from halfmap.ops.potential import atomic_volume
from halfmap.steps.validate.hand import check_hand, prepare

PIXEL, DETAIL, NOISE = 1.6, 4.3, 0.6


def maps(shared_data: Path, name: str, chain: str | None, *, detail: float = DETAIL, flip: bool = False):
    """Half maps of a model with noise beyond a detail, and its mask."""
    model = read_model(shared_data / "models" / name)
    if chain is not None:
        model = model.select(model.chains == chain)
    model = model.centred()
    positions = torch.from_numpy(model.positions)
    box = 2 * int((float(positions.abs().max()) + 10) / PIXEL)
    shape = (box,) * 3
    gaussians = [np.stack(scattering_coefficients(int(each)), -1) for each in model.elements]
    clean = atomic_volume(
        positions,
        coefficients=torch.from_numpy(np.stack(gaussians)),
        shape=shape,
        pixel_size=PIXEL,
        b_factors=torch.full((len(model),), 80.0),
    )
    clean = irfft3(rfft3(clean) * low_pass(shape, pixel_size=PIXEL, resolution=detail), shape=shape)
    inside = around_points(shape, model.positions / PIXEL + box // 2, radius_px=4.0 / PIXEL)
    mask = soft_edge(torch.from_numpy(inside), extend=0.0, width=5.0, pixel_size=PIXEL)
    if flip:
        clean, mask = (each.flip(0).roll(1, 0) for each in (clean, mask))
    deviation = NOISE * float(clean[mask > 0.5].std())
    g = torch.Generator().manual_seed(1)
    noisy = [clean + deviation * torch.randn(shape, generator=g) for _ in range(2)]
    halves = HalfMaps(noisy[0], noisy[1], PIXEL, (0.0, 0.0, 0.0), (Path("a"), Path("b")), box // 2)
    curves = corrected_fsc(noisy[0], noisy[1], mask=mask, generator=g)
    reached = resolution(curves.corrected, pixel_size=PIXEL, box=box)
    return given(halves=halves, mask=mask, fsc=curves, resolution=reached)


@pytest.mark.parametrize("flip", [False, True])
def test_the_hand_is_told(tmp_path, shared_data, flip):
    what = maps(shared_data, "4hhb.cif.gz", "A", flip=flip)
    assert 4.0 < what.resolution < 4.6
    found = check_hand(what, tmp_path)
    assert found.light == ("red" if flip else "green")
    assert abs(found.values["difference"]) > 0.05
    assert (found.values["difference"] < 0) == flip
    assert (tmp_path / found.pictures[0]).stat().st_size > 5000


def test_a_protein_without_helices_does_not_tell(tmp_path, shared_data):
    """A light chain: two domains of beta sheets."""
    found = check_hand(maps(shared_data, "1igt.cif.gz", "A"), tmp_path)
    assert found.light == "grey"
    assert "look like an alpha helix" in found.sentence


def test_coarse_maps_do_not_tell(tmp_path):
    found = check_hand(given(resolution=7.0), tmp_path)
    assert found.light == "grey"
    assert "at 7.0 Å" in found.sentence
    assert not found.pictures


def test_a_map_is_cut_to_the_particle(shared_data):
    what = maps(shared_data, "4hhb.cif.gz", "A")
    cut, mask, pixel_size, origin = prepare(what, 4.5)
    assert pixel_size == pytest.approx(1.5, abs=0.05)
    assert cut.shape == mask.shape
    assert len(cut) % 2 == 0
    volumes = float(mask.sum()) * pixel_size**3, float(what.mask.sum()) * PIXEL**3
    assert volumes[0] == pytest.approx(volumes[1], rel=0.01)
    # The middle of the box is where it was: masks' centres of mass are as far from it.
    centres = []
    for each, middle, voxel in (
        (what.mask, torch.full((3,), len(what.mask) // 2), PIXEL),
        (mask, origin, pixel_size),
    ):
        places = each.nonzero().double().flip(1)
        weights = each[each != 0].double()[:, None]
        centres.append(((places * weights).sum(0) / weights.sum() - middle) * voxel)
    torch.testing.assert_close(centres[0], centres[1], atol=0.05, rtol=0)
