"""Refinement: what the model is estimated from, and what is kept apart."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import torch
from pose_simulation import Particle, simulate

from halfmap.io.mrc import write_mrc
from halfmap.ops.masks import soft_sphere
from halfmap.search.backprojector import Backprojection
from halfmap.search.disc import FourierDisc
from halfmap.steps.refine.model import Model, _references
from halfmap.steps.refine.plan import PARTS, dealt
from halfmap.steps.refine.solvent import solvent_mask

BOX, RADIUS, SIDE = 24, 9, 96.0
PARTICLE = Particle.random(BOX, count=30, radius_px=7.0)


def _part(seed: int) -> Backprojection:
    disc = FourierDisc(BOX, RADIUS)
    drawn = simulate(PARTICLE, disc, 20, snr=0.2, seed=seed)
    sums = Backprojection.empty(BOX, RADIUS)
    sums.add(drawn.images, drawn.rotations, drawn.shifts_px)
    return sums


def _made(parts: list[list[Backprojection]], prior: torch.Tensor) -> torch.Tensor:
    made = torch.empty(2, PARTS, BOX, BOX, BOX)

    def keep(half: int, number: int, volume: torch.Tensor) -> None:
        made[half, number] = volume

    plan = cast("Any", SimpleNamespace(side=SIDE))
    _references(plan, prior, torch.ones(BOX, BOX, BOX), cast("Any", parts), keep)
    return made


def test_parts_do_not_meet_themselves_nor_the_other_half_set():
    """Of images exchanged in a part, the reference of this part sees nothing, those of its half set do."""
    parts = [[_part(10 * half + i) for i in range(PARTS)] for half in (0, 1)]
    prior = torch.full((2, RADIUS + 1), float(parts[0][0].sums.weights.mean()))
    before = _made(parts, prior)
    parts[0][1] = _part(99)
    spectra = torch.fft.rfftn(_made(parts, prior) - before, dim=(-3, -2, -1)).abs()
    scale = float(torch.fft.rfftn(before, dim=(-3, -2, -1)).abs().max())
    frequency = torch.fft.fftfreq(BOX)
    radius = (
        BOX * (frequency[:, None, None] ** 2 + frequency[:, None] ** 2 + torch.fft.rfftfreq(BOX) ** 2).sqrt()
    )
    # What is coarser than 40 Å is shared.
    changed = spectra[..., radius >= SIDE / 40.0].amax(-1) / scale
    assert float(changed[0, 1]) < 1e-5
    assert float(changed[1].max()) < 1e-5
    assert float(changed[0, [0, 2, 3]].min()) > 1e-3


def test_parts_are_dealt_by_micrograph_at_random():
    # As sorted by grid: particles of one come one after the other.
    micrographs = np.repeat(np.arange(80), 25)
    part = dealt(micrographs, np.random.default_rng(1))
    assert np.array_equal(part, dealt(micrographs, np.random.default_rng(1)))
    assert not np.array_equal(part, dealt(micrographs, np.random.default_rng(2)))
    of_each = part.reshape(80, 25)
    assert (of_each == of_each[:, :1]).all()
    assert np.bincount(part).tolist() == [500] * PARTS
    # Of the first grid, the first quarter of the table, no part has more than two thirds.
    assert np.bincount(of_each[:20, 0], minlength=PARTS).max() < 14
    # One micrograph cannot be dealt whole.
    alone = dealt(np.zeros(102, np.intp), np.random.default_rng(1))
    assert sorted(np.bincount(alone).tolist()) == [25, 25, 26, 26]
    assert len(set(alone[:20].tolist())) == PARTS


def test_a_given_mask_is_used(tmp_path: Path):
    given = soft_sphere((BOX,) * 3, radius=4.0, edge=2.0)
    write_mrc(tmp_path / "mask.mrc", given.numpy(), pixel_size=SIDE / BOX)
    sphere = soft_sphere((BOX,) * 3, radius=9.0, edge=2.0)
    plan = cast("Any", SimpleNamespace(side=SIDE, mask=tmp_path / "mask.mrc", sphere=lambda box: sphere))
    for resolution in (10.0, 60.0):
        found = solvent_mask(plan, PARTICLE.volume(), resolution)
        assert float((found - given * sphere).abs().max()) < 1e-5
    without = solvent_mask(cast("Any", SimpleNamespace(**vars(plan) | {"mask": None})), found, 60.0)
    assert torch.equal(without, sphere)


def test_what_is_compared_with_images_is_where_they_are_and_the_rest_is_not(tmp_path: Path):
    model = Model(
        iteration=1,
        stage="everywhere",
        radius=5,
        padding=2.0,
        noise=torch.ones(2, 2, 1, 6),
        scale=torch.ones(2, 3),
        deviation_A=torch.ones(2),
        curves=torch.zeros(4, 6),
        from_shell=3,
        finest=2,
        stale=0,
        turned=1.0,
        jumped=0.1,
    )
    model.save(tmp_path / "a.npz")
    loaded = Model.load(tmp_path / "a.npz", "meta")
    there = {name for name, value in vars(loaded).items() if getattr(value, "is_meta", False)}
    assert there == {"noise", "scale"}
    assert torch.equal(loaded.curves, model.curves)
