"""Whether a map that is known comes back out of the noise of these particles, and as far as half maps say."""

from __future__ import annotations

from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from halfmap.data.poses import Poses
from halfmap.errors import ParameterError
from halfmap.ops.filters import radial_profile_to_grid
from halfmap.ops.fourier import irfft3, rfft3
from halfmap.ops.fsc import fsc, phase_randomise
from halfmap.ops.rotations import from_rotation_vector
from halfmap.search.halfmaps import believed, radius_at
from halfmap.search.lens_noise import ring_means
from halfmap.search.prepared import PreparedImages, odd_phases, prepare
from halfmap.search.projector import SplineVolume, sample_slices
from halfmap.search.source import phase_flipped
from halfmap.steps.validate import controls
from halfmap.steps.validate.controls import SMEARED
from halfmap.steps.validate.finding import Finding, Given
from halfmap.steps.validate.overfitting import THRESHOLD, draw
from halfmap.steps.validate.sample import Sample

if TYPE_CHECKING:
    from halfmap.engine import Context

_BATCH = 32

_SEEN = 256
"""Particles of each half set by which it is known how strong the map is in the images, at most."""

_TRUE = 0.5
"""Correlation with the truth of the mean of half maps that correlate by 0.143."""

_BEYOND, _FAR = 1.1, 1.25
"""Frequency that half maps agree to over that to which they are true, that is tolerated at most."""


def check_known_map(ctx: Context, given: Given, sample: Sample) -> Finding:
    """Put a map that is known into the images' noise, refine it, and compare half maps with the truth."""
    scene = Scene.of(given, sample)
    old = sample.particles.poses
    new = exchanged(old, given.step.seed)
    begun = moved(new, given.resolution, given.diameter, given.step.seed)
    table = controls.changed(
        ctx, sample, "known_map", lambda rows, images: scene.exchange(rows, images, old, new), begun
    )
    control = controls.refine(ctx, given, table, "known_map")
    both = (control.halves[0] + control.halves[1]) / 2
    true = fsc(both * given.mask, scene.truth * given.mask).float().nan_to_num()
    agreed, reached = radius_at(control.curve, THRESHOLD), radius_at(true, _TRUE)
    ratio = agreed / max(reached, 1)
    if agreed > SMEARED + reached and ratio > _FAR:
        light, words = (
            "red",
            "refinement makes half maps of such particles agree in what is not there: report no resolution "
            "of them",
        )
    elif agreed > SMEARED + reached and ratio > _BEYOND:
        light, words = "amber", "somewhat more than is true: report the latter"
    else:
        light, words = "green", "what half maps agree in is there"
    there = f"to {given.side / reached:.2f} Å" if reached else "at no resolution"
    sentence = (
        f"Of a map whose fine detail is another, put into the noise of the particles, half maps agree to "
        f"{control.resolution:.2f} Å, and with the truth {there}: {words}."
    )
    path = ctx.folder / "known_map.png"
    curves = {"half maps": control.curve, "their mean and the truth": true}
    title = f"a known map in real noise: {control.resolution:.2f} Å"
    draw(path, given, curves, title, 1 / controls.first_detail(given))
    values = {
        "resolution_A": control.resolution,
        "true_to_A": given.side / reached if reached else None,
        "strength": scene.strength,
        "particles": len(sample.particles),
    }
    same_to = given.side / controls.substituted_from(given)
    method = (
        "What the map says of each image is taken off it. In its place comes, at the pose of another "
        f"particle, a map that is the same to {same_to:.1f} Å, and beyond has other phases within the mask. "
        "The images are refined near these poses, from which they begin half a detail at the particle's rim "
        f"away about each axis. Correlation with the truth counts at {_TRUE}, as that of half maps does at "
        "0.143. After Ramirez-Aportela et al. 2022, DOI 10.1107/S2052252522006959."
    )
    return Finding("A known map in real noise", light, sentence, values, (path.name,), method)


class Scene:
    """What the images show, and what they are made to show.

    Attributes
    ----------
    map, truth : Tensor (n, n, n)
        Mean of the half maps within the mask, filtered so that it is nearest to what is there; and what is
        put in its place, whose fine detail is another: what a refinement believes of the map, or a prior of
        all maps, is not true of it.
    strength : float
        Of both in the images.
    """

    def __init__(self, sample: Sample, volume: Tensor, truth: Tensor, strength: float) -> None:
        self.map, self.truth, self.strength = volume, truth, strength
        self._sample = sample
        self._disc = sample.disc()
        self._flipped = phase_flipped(sample.particles)

    @classmethod
    def of(cls, given: Given, sample: Sample) -> Scene:
        """By what the half maps agree in, and as strong as it is in the images.

        Raises
        ------
        ParameterError
            If it is not in them.
        """
        shape = tuple(given.halves.first.shape)
        agreed = believed(given.fsc.corrected).float()

        def filtered(volume: Tensor, weight: Tensor) -> Tensor:
            passed = rfft3(volume) * radial_profile_to_grid(weight, shape=shape)
            return irfft3(passed, shape=shape) * given.mask

        volume = filtered(given.halves.mean, 2 * agreed / (1 + agreed))
        generator = torch.Generator().manual_seed(given.step.seed)
        shell = controls.substituted_from(given)
        truth = phase_randomise(volume, from_shell=shell, generator=generator) * given.mask
        scene = cls(sample, volume, truth, 1.0)
        # By the other half set's map: in its own, images would find their noise again.
        others = [
            scene.projected(filtered(each, agreed)) for each in (given.halves.second, given.halves.first)
        ]
        rng = np.random.default_rng(given.step.seed)
        match = norm = 0.0
        for half, other in enumerate(others):
            own = np.flatnonzero(sample.halves == half)
            rows = np.sort(rng.permutation(own)[:_SEEN])
            for some in np.split(rows, range(_BATCH, len(rows), _BATCH)):
                ready = scene.prepared(some, sample.source.images.get(some))
                expected = scene.expected(other, ready, some, sample.particles.poses)
                transfer = ring_means(scene._disc, ready.ctf.square())
                groups = torch.from_numpy(sample.groups[some]).to(transfer.device)
                noise = sample.noise.of_images(groups, transfer)[:, scene._disc.rings]
                weight = scene._disc.multiplicity / noise
                match += float(((ready.whole.conj() * expected).real * weight).sum())
                norm += float((expected.abs().square() * weight).sum())
        if match <= 0 or norm <= 0:
            raise ParameterError("the map is not in the images at the poses of the table")
        scene.strength = match / norm
        return scene

    def exchange(self, rows: NDArray[np.intp], images: Tensor, old: Poses, new: Poses) -> Tensor:
        """Images (b, n, n) with the truth at new poses (of all particles), and not the map at old ones."""
        parts = [slice(at, at + _BATCH) for at in range(0, len(rows), _BATCH)]
        return torch.cat([self._exchange(rows[part], images[part], old, new) for part in parts])

    @cached_property
    def _both(self) -> tuple[SplineVolume, SplineVolume]:
        return self.projected(self.map), self.projected(self.truth)

    def _exchange(self, rows: NDArray[np.intp], images: Tensor, old: Poses, new: Poses) -> Tensor:
        ready = self.prepared(rows, images)
        before, after = (
            self.expected(volume, ready, rows, poses)
            for volume, poses in zip(self._both, (old, new), strict=True)
        )
        change = (after - before) * self.strength
        phases = odd_phases(self._sample.source.ctf[torch.from_numpy(rows)], self._disc)
        if phases is not None:
            change = change * phases
        return images + self._disc.images(change).to(images)

    def prepared(self, rows: NDArray[np.intp], images: Tensor) -> PreparedImages:
        """Coefficients and CTFs of images (b, n, n)."""
        sample, disc = self._sample, self._disc
        return prepare(
            images.to(sample.device),
            torch.ones(disc.box, disc.box, device=sample.device),
            sample.source.ctf[torch.from_numpy(rows)],
            disc,
            sample.pixel_size,
            phase_flipped=torch.from_numpy(self._flipped[rows]),
        )

    def projected(self, volume: Tensor) -> SplineVolume:
        """A map (n, n, n) as projections are taken of it."""
        sample = self._sample
        return SplineVolume.of(volume.to(sample.device), radius_px=self._disc.radius, padding=sample.padding)

    def expected(
        self, volume: SplineVolume, ready: PreparedImages, rows: NDArray[np.intp], poses: Poses
    ) -> Tensor:
        """Coefficients (b, p) of a map's projections."""
        own, sample = poses[torch.from_numpy(rows)], self._sample
        back = self._disc.shifts((-own.shifts_A / sample.pixel_size).to(sample.device))
        slices = sample_slices(volume, own.rotations.float().to(sample.device), self._disc.points)
        return ready.ctf * slices * back


def exchanged(poses: Poses, seed: int) -> Poses:
    """Orientations of other particles, so that all views stay as frequent; shifts stay.

    Turned in the plane of the image as well: neighbours in a table may be alike.
    """
    generator = torch.Generator().manual_seed(seed)
    n = len(poses)
    others = torch.randperm(n, generator=generator)
    vectors = torch.zeros(n, 3, dtype=torch.float64)
    vectors[:, 2] = 2 * torch.pi * torch.rand(n, generator=generator, dtype=torch.float64)
    turns = from_rotation_vector(vectors)
    return Poses(turns @ poses.rotations[others].double(), poses.shifts_A.double())


def moved(poses: Poses, detail: float, diameter: float, seed: int) -> Poses:
    """Poses off about each axis by as much as moves the rim of a particle by half a detail, both in Å."""
    generator = torch.Generator().manual_seed(seed + 1)
    n = len(poses)
    vectors = torch.randn(n, 3, generator=generator, dtype=torch.float64) * (detail / diameter)
    shifts = torch.randn(n, 2, generator=generator, dtype=torch.float64) * (detail / 4)
    return Poses(from_rotation_vector(vectors) @ poses.rotations.double(), poses.shifts_A + shifts)
