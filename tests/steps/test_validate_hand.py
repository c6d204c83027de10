"""The hand of simulated maps of a protein of helices, and of maps that do not tell it."""

from __future__ import annotations

import pytest
import torch
from hand_maps import PIXEL, maps

from halfmap.search.hand import prepare
from halfmap.steps.validate.hand import check_hand


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


def test_coarse_maps_do_not_tell(tmp_path, shared_data):
    found = check_hand(maps(shared_data, "4hhb.cif.gz", "A", detail=9.0), tmp_path)
    assert found.light == "grey"
    assert "the turns of a helix do not show" in found.sentence
    assert not found.pictures


def test_a_map_is_cut_to_the_particle(shared_data):
    what = maps(shared_data, "4hhb.cif.gz", "A")
    cut, mask, pixel_size, origin = prepare(what.halves, what.mask, fsc=what.fsc.corrected, detail=4.5)
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
