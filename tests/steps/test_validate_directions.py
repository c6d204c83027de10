"""Directions of half maps that are the same in all of them, and of some that are not."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from validate_given import given

from halfmap.io.half_maps import HalfMaps
from halfmap.ops.fourier import irfft3, rfft3
from halfmap.ops.fsc import corrected_fsc
from halfmap.ops.fsc_interval import noise_scatter
from halfmap.ops.grids import frequencies
from halfmap.ops.masks import soft_sphere
from halfmap.ops.symmetry import symmetrise_volume
from halfmap.steps.validate.directions import check_directions
from halfmap.steps.validate.finding import Finding
from halfmap.steps.validate.step import ValidateStep

BOX = 40
SHAPE = (BOX,) * 3
MASK = soft_sphere(SHAPE, radius=0.35 * BOX, edge=4.0)
K = frequencies(SHAPE)
RADIUS = K.norm(dim=-1).clamp_min(1e-9)
SIGNAL = 12 * torch.exp(-((RADIUS * BOX / 8) ** 2))
ONE = torch.ones_like(RADIUS)


def found(
    folder: Path,
    seed: int,
    *,
    group: str = "C1",
    signal: torch.Tensor = ONE,
    noise: torch.Tensor = ONE,
    last: int = BOX // 2,
) -> Finding:
    """Look at half maps with such spectra, symmetrised as a reconstruction is."""
    generator = torch.Generator().manual_seed(seed)

    def random(spectrum: torch.Tensor, mask: torch.Tensor | float = 1.0) -> torch.Tensor:
        return irfft3(rfft3(torch.randn(SHAPE, generator=generator) * mask) * spectrum, shape=SHAPE)

    truth = random(SIGNAL * signal, MASK)
    halves = [symmetrise_volume(truth + random(noise), group) for _ in range(2)]
    filtered = last + 0.5 > RADIUS * BOX
    a, b = (irfft3(rfft3(half) * filtered, shape=SHAPE) for half in halves)
    paths = Path("half1.mrc"), Path("half2.mrc")
    what = {
        "step": ValidateStep(half1=paths[0], symmetry=group),
        "halves": HalfMaps(a, b, 1.0, (0.0, 0.0, 0.0), paths, last),
        "mask": MASK,
        "fsc": corrected_fsc(a, b, mask=MASK, draws=3, generator=generator),
        "scatter": noise_scatter(MASK, generator=generator),
    }
    return check_directions(given(**what), folder)


@pytest.mark.parametrize("group", ["C1", "D7", "O"])
def test_what_is_the_same_in_all_directions_is_green(tmp_path, group):
    """Each of two measures is beyond chance in one map of a hundred."""
    all_found = [found(tmp_path, seed, group=group) for seed in range(4)]
    assert sum(each.values["beyond_chance"] for each in all_found) <= 1
    assert [each.light for each in all_found].count("green") >= 3


def test_octahedral_maps_that_lack_directions_are_flagged(tmp_path):
    """Directions away from the planes across the axes have noise six times as strong; the scatter is even."""
    near = ((K / RADIUS[..., None]).abs().amin(-1) <= math.sin(math.radians(15))).float()
    noise = near + 6 * (1 - near)
    worse = found(tmp_path, 1, group="O", noise=noise)
    assert worse.light == "red"
    assert worse.values["bingham_greatest"] < worse.values["bingham_limit"]
    direction = np.abs(worse.values["worst_direction_xyz"])
    assert direction.min() > math.sin(math.radians(15))


def test_a_missing_cone_is_flagged(tmp_path):
    kept = (K[..., 2].abs() / RADIUS < math.cos(math.radians(45))) | (RADIUS * BOX < 2.5)
    lacking = found(tmp_path, 2, signal=kept.float())
    assert lacking.light == "red"
    assert abs(lacking.values["worst_direction_xyz"][2]) > math.cos(math.radians(30))


def test_resolution_ends_where_a_filter_has_ended_the_noise(tmp_path):
    """Without noise, maps agree by what the mask has spread."""
    last = 10
    cut = found(tmp_path, 3, last=last)
    assert cut.light == "green"
    assert cut.values["resolution_best_A"] > BOX / (last + 1)


def test_the_mask_is_taken_off(tmp_path, monkeypatch):
    """Along the worst direction nothing agrees but what the mask has spread there."""
    whole = found(tmp_path, 4).values
    monkeypatch.setattr("halfmap.steps.validate.directions._corrected", lambda masked, _: masked)
    assert found(tmp_path, 4).values["resolution_worst_A"] < whole["resolution_worst_A"]
