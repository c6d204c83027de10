"""Refinement: what the model is estimated from, and what is kept apart."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
import torch
from pose_simulation import Particle, Simulation, simulate

from halfmap.io.mrc import write_mrc
from halfmap.ops.masks import soft_sphere
from halfmap.ops.rotations import random_rotations
from halfmap.search.backprojector import Backprojection
from halfmap.search.disc import DiscImages, FourierDisc
from halfmap.search.halfmaps import HalfSums
from halfmap.search.local import LocalPoses, PosePrior
from halfmap.search.maxima import Maxima
from halfmap.search.regularise import Evidence
from halfmap.search.regularise.named import Named
from halfmap.search.shared_map import added
from halfmap.steps.refine.expectation import _Work
from halfmap.steps.refine.extent import Extent
from halfmap.steps.refine.model import Model, _references, _scheduled
from halfmap.steps.refine.plan import PARTS
from halfmap.steps.refine.solvent import reach, solvent_mask

BOX, RADIUS, SIDE = 24, 9, 96.0
PARTICLE = Particle.random(BOX, count=30, radius_px=7.0)


def _part(seed: int) -> Backprojection:
    disc = FourierDisc(BOX, RADIUS)
    drawn = simulate(PARTICLE, disc, 20, snr=0.2, seed=seed)
    sums = Backprojection.empty(BOX, RADIUS)
    sums.add(drawn.images, drawn.rotations, drawn.shifts_px)
    return sums


def _evidence(parts: list[list[Backprojection]]) -> Evidence:
    first, second = (added(own) for own in parts)
    halves = HalfSums.of((first, second))
    agreed = torch.linspace(1, 0.2, RADIUS + 1)
    return Evidence(
        maps=halves.unfiltered(),
        mask=soft_sphere((BOX,) * 3, radius=8.0, edge=2.0),
        correlation=agreed,
        prior=halves.prior(agreed),
        least=halves.least * (1 - 1 / PARTS),
        pixel_size=SIDE / BOX,
        box=BOX,
        iteration=1,
        stage="near",
    )


def _made(parts: list[list[Backprojection]], name: str, evidence: Evidence) -> torch.Tensor:
    made = torch.empty(2, PARTS, BOX, BOX, BOX)

    def keep(half: int, number: int, volume: torch.Tensor) -> None:
        made[half, number] = volume

    plan = cast("Any", SimpleNamespace(side=SIDE))
    _references(plan, Named(name), evidence, cast("Any", parts), keep)
    return made


@pytest.mark.parametrize("name", ["fsc", "nonuniform", "sidesplitter"])
def test_parts_do_not_meet_themselves_nor_the_other_half_set(name: str):
    """Of images exchanged in a part, the reference of this part sees nothing, those of its half set do."""
    parts = [[_part(10 * half + i) for i in range(PARTS)] for half in (0, 1)]
    evidence = _evidence(parts)
    before = _made(parts, name, evidence)
    parts[0][1] = _part(99)
    spectra = torch.fft.rfftn(_made(parts, name, evidence) - before, dim=(-3, -2, -1)).abs()
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


def test_a_given_mask_is_used(tmp_path: Path):
    given = soft_sphere((BOX,) * 3, radius=4.0, edge=2.0)
    write_mrc(tmp_path / "mask.mrc", given.numpy(), pixel_size=SIDE / BOX)
    sphere = soft_sphere((BOX,) * 3, radius=9.0, edge=2.0)
    plan = cast(
        "Any", SimpleNamespace(side=SIDE, mask=tmp_path / "mask.mrc", sphere=lambda box, edge: sphere)
    )
    for resolution in (10.0, 60.0):
        found = solvent_mask(plan, PARTICLE.volume(), resolution)
        assert float((found - given * sphere).abs().max()) < 1e-5
    without = solvent_mask(cast("Any", SimpleNamespace(**vars(plan) | {"mask": None})), found, 60.0)
    assert torch.equal(without, sphere)


def test_a_map_is_as_wide_as_its_density_whatever_its_sphere():
    n, pixel = 64, 4.0
    plan = cast("Any", SimpleNamespace(side=n * pixel))
    place = (torch.arange(n) - n // 2) * pixel
    z, y, x = place[:, None, None], place[:, None], place
    rod = ((x**2 + y**2 < 35.0**2) & (z.abs() < 80.0)).float()
    noisy = rod + 0.5 * torch.randn(n, n, n, generator=torch.Generator().manual_seed(1))
    assert reach(plan, noisy, 12.0) == pytest.approx(2 * math.hypot(35, 80), rel=0.06)
    # A speck apart from it is not of it.
    speck = rod + ((x - 100) ** 2 + (y - 40) ** 2 + z**2 < 12.0**2)
    assert reach(plan, speck, 12.0) == pytest.approx(2 * math.hypot(35, 80), rel=0.06)
    assert reach(plan, noisy, 30.0) is None
    assert reach(plan, noisy - rod, 12.0) is None


def _model(**changes: Any) -> Model:
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
        apart=torch.zeros(2, 3),
    )
    return replace(model, **changes)


@pytest.mark.parametrize(
    ("before", "found", "stage"),
    [
        # Resolution grows, or few poses leave their basins, or most do and it has just stopped to grow.
        ({"stage": "everywhere"}, {"ring": 12, "jumped": 0.5}, "everywhere"),
        ({"stage": "everywhere"}, {"ring": 12, "jumped": 0.01}, "near"),
        ({"stage": "everywhere"}, {"ring": 10, "jumped": 0.5}, "everywhere"),
        ({"stage": "near"}, {"ring": 10, "turned": 0.4}, "near"),
        ({"stage": "near", "stale": 1}, {"ring": 10, "turned": 0.4}, "last"),
        ({"stage": "near", "stale": 1}, {"ring": 10, "turned": 0.6}, "near"),
        ({"stage": "near", "stale": 1}, {"ring": 11, "turned": 0.4}, "near"),
        # With all frequencies compared there is no detail left to gain, and nothing left to put back.
        ({"stage": "near", "radius": 19, "finest": 17}, {"ring": 17, "turned": 0.4}, "done"),
        ({"stage": "near", "radius": 19, "finest": 17}, {"ring": 17, "turned": 0.6}, "near"),
        ({"stage": "near", "radius": 18, "finest": 17}, {"ring": 17, "turned": 0.4}, "near"),
        ({"stage": "near", "radius": 18, "finest": 17, "stale": 1}, {"ring": 17, "turned": 0.4}, "done"),
        ({"stage": "last"}, {"ring": 10}, "done"),
        ({"stage": "near", "iteration": 28}, {"ring": 12}, "last"),
    ],
)
def test_what_comes_next(before: dict[str, Any], found: dict[str, Any], stage: str):
    """Of poses that turn, in the median, by parts of their errors of 1°."""
    model = _model(**{"finest": 10, "turned": 0.9} | before)
    curve = (torch.arange(21) <= found.get("ring", 10)).float()
    new = replace(
        model,
        iteration=model.iteration + 1,
        turned=found.get("turned", 0.8),
        jumped=found.get("jumped", 0.0),
        curves=curve.expand(4, -1),
    )
    step = SimpleNamespace(most_iterations=30, initial_lowpass=40.0)
    plan: Any = SimpleNamespace(step=step, nyquist=19, ring=lambda resolution: 5)
    plan.disc = lambda radius: SimpleNamespace(radius=min(19, radius + 6))
    assert _scheduled(plan, model, new, box=40, error=1.0).stage == stage


def test_what_is_compared_with_images_is_where_they_are_and_the_rest_is_not(tmp_path: Path):
    model = _model()
    model.save(tmp_path / "a.npz")
    loaded = Model.load(tmp_path / "a.npz", "meta")
    there = {name for name, value in vars(loaded).items() if getattr(value, "is_meta", False)}
    assert there == {"noise", "scale", "searched", "transfer"}
    assert torch.equal(loaded.curves, model.curves)


def test_images_count_by_what_the_errors_of_their_poses_leave():
    """An error s of shifts leaves exp(-2 (pi s k)^2); where nothing is known, images count alike."""
    drawn = simulate(PARTICLE, FourierDisc(BOX, RADIUS), 3, snr=0.2)
    precision = torch.diag(torch.tensor([1e8, 1e8, 1e8, 1.0, 1.0], dtype=torch.float64)).repeat(3, 1, 1)
    precision[1, 3:, 3:] *= 16.0
    precision[2] = 0.0
    poses = LocalPoses(drawn.rotations, drawn.shifts_px, torch.zeros(3), precision)
    left, found = _left(drawn, poses, Extent.of_sphere(60.0))
    waves = drawn.images.disc.points.double().norm(dim=1) / BOX
    for image, deviation in ((0, 1.0), (1, 0.25)):
        expected = torch.exp(-2 * (math.pi * deviation * waves) ** 2).clamp_min(0.01)
        torch.testing.assert_close(left[image].double(), expected, rtol=1e-3, atol=1e-4)
    assert left[2].unique().tolist() == pytest.approx([0.01, 1.0])
    torch.testing.assert_close(found.linear, drawn.images.linear * left)


def test_images_count_by_how_far_turns_move_what_is_compared():
    """Of points drawn in a ball off the centre of the box, under poses drawn of the posterior."""
    radius, place = 12.0, torch.tensor([30.0, 0.0, 10.0], dtype=torch.float64)
    pixel_size = SIDE / BOX
    drawn = simulate(PARTICLE, FourierDisc(BOX, RADIUS), 3, snr=0.2)
    how = {"turn_deg": 5.0, "shift_px": 0.2, "fulcrum_px": place / pixel_size}
    prior = PosePrior.about(drawn.rotations, drawn.shifts_px, **how)
    poses = LocalPoses(drawn.rotations, drawn.shifts_px, torch.zeros(3), prior.precision)
    left, _ = _left(drawn, poses, Extent(place, radius / math.sqrt(5)))
    generator = torch.Generator().manual_seed(1)
    points = torch.randn(20000, 3, generator=generator, dtype=torch.float64)
    points *= radius * torch.rand(20000, 1, generator=generator) ** (1 / 3) / points.norm(dim=1, keepdim=True)
    squared = (drawn.images.disc.points.double() / BOX).square().sum(1)
    for image, rotation in enumerate(drawn.rotations.double()):
        factor = torch.linalg.cholesky(poses.covariance[image])
        step = torch.randn(20000, 5, generator=generator, dtype=torch.float64) @ factor.T
        placed = (place + points) / pixel_size @ rotation.T
        moved = torch.cross(step[:, :3], placed, dim=1)[:, :2] - step[:, 3:]
        expected = torch.exp(-2 * math.pi**2 * float(moved.square().mean()) * squared).clamp_min(0.01)
        torch.testing.assert_close(left[image].double(), expected, rtol=0.05, atol=0.01)
        assert 0.02 < float(expected.min()) < 0.9


def test_extent_of_a_mask_is_its_place_and_size():
    mask = soft_sphere((48,) * 3, radius=15.0, edge=0.5, pixel_size=2.0, centre=(12.0, -6.0, 3.0))
    found = Extent.of_mask(mask, 96.0)
    assert found.centre_A.tolist() == pytest.approx([12.0, -6.0, 3.0], abs=0.2)
    assert found.spread_A == pytest.approx(Extent.of_sphere(30.0).spread_A, rel=0.05)


def _left(drawn: Simulation, poses: LocalPoses, extent: Extent) -> tuple[torch.Tensor, DiscImages]:
    """What is left of the weight of images that have poses, and these images."""
    plan = SimpleNamespace(extent=extent)
    work = cast("Any", SimpleNamespace(plan=plan, pixel_size=SIDE / BOX, disc=drawn.images.disc))
    found = _Work.trusted(work, drawn.images, poses, torch.arange(len(poses.rotations)))
    return found.squared / drawn.images.squared, found


def test_both_half_sets_are_put_back_in_one_frame():
    """The pose of an image against the one half map, and that against the other, become the same."""
    apart = torch.tensor([[0.4, -0.3, 0.2], [0.5, 1.0, -0.8]], dtype=torch.float64)
    model = _model(apart=apart)
    pixel_size = SIDE / BOX
    drawn = simulate(PARTICLE, FourierDisc(BOX, RADIUS), 5, snr=0.2)
    first = drawn.rotations, drawn.shifts_px
    second = model.motion(pixel_size).of_poses(*first, 1.0)
    found = []
    for half, (rotations, shifts) in enumerate((first, second)):
        local = LocalPoses(rotations, shifts, torch.zeros(5), torch.eye(5).expand(5, 5, 5))
        maxima = Maxima(local, torch.arange(5), torch.ones(5), torch.zeros(5))
        work = cast("Any", SimpleNamespace(half=half, model=model, pixel_size=pixel_size))
        found.append(_Work.in_one_frame(work, maxima).poses)
    # But for what half a move is turned by half a turn.
    assert float((found[0].rotations - found[1].rotations).abs().max()) < 1e-9
    assert float((found[0].shifts_px - found[1].shifts_px).abs().max()) < 0.02 * float(apart[1].norm())
    assert float((found[0].shifts_px - first[1]).abs().max()) > 0.1 * float(apart[1].norm()) / pixel_size


@pytest.mark.parametrize("local", [False, True])
def test_poses_are_less_sure_by_the_noise_of_the_map_and_not_of_their_prior(local: bool):
    """Of changes that maps show, eight tenths are the particle's; priors of local refinements stay."""
    rotations, shifts = random_rotations(4, dtype=torch.float64), torch.zeros(4, 2, dtype=torch.float64)
    generator = torch.Generator().manual_seed(3)
    factor = torch.randn(4, 5, 5, generator=generator, dtype=torch.float64)
    of_data = factor @ factor.transpose(1, 2) + torch.eye(5, dtype=torch.float64)
    known = PosePrior.of_shifts(rotations, 0.5).precision if local else torch.zeros_like(of_data)
    given = SimpleNamespace(prior=lambda rows, turns, pixel: SimpleNamespace(precision=known[rows]))
    work = cast("Any", SimpleNamespace(plan=SimpleNamespace(given=given if local else None), pixel_size=2.0))
    whole = torch.eye(6, dtype=torch.float64)
    work.model = SimpleNamespace(information=torch.stack([whole, 0.8 * whole]))
    owner = torch.arange(4)
    poses = LocalPoses(rotations, shifts, torch.zeros(4), of_data + known)
    found = _Work.as_sure(work, np.arange(4), Maxima(poses, owner, torch.ones(4), torch.zeros(4)))
    torch.testing.assert_close(found.poses.precision, 0.64 * of_data + known)
