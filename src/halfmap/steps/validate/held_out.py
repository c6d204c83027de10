"""How well a map predicts particles that had no share in it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from halfmap.pictures import INK, MARGIN, QUIET, add_panel, add_text, new_figure, resolution_axis, save
from halfmap.search.lens_noise import ring_means
from halfmap.search.prepared import prepare
from halfmap.search.projector import SplineVolume, sample_slices
from halfmap.search.source import phase_flipped
from halfmap.steps.validate.controls import SMEARED, Control, first_detail
from halfmap.steps.validate.finding import Finding, Given, Light
from halfmap.steps.validate.sample import Sample

_MOST = 1000
"""Particles of each half set, at most."""

_BATCH = 32

_SURE = 3.0
"""Standard errors of the gain of a band of rings from which on it counts."""

_BAND = 3
"""Rings of a band."""

_CLOSE = 1.3
"""Resolution of what is predicted over that of the half maps, up to which it may be coarser."""

_FINER = 0.95
"""The same, below which the difference is explained."""


def check_held_out(given: Given, sample: Sample, honest: Control, folder: Path) -> Finding:
    """Predict particles of each half set by the map of the other one, at poses that it had no share in."""
    gains = held_out(given, sample, honest)
    mean, error = gains.mean(0), gains.std(0) / len(gains) ** 0.5
    begun = first_detail(given)
    # Any image, of noise too, was aligned to what both half maps began with.
    first = (round(given.side / begun) + SMEARED + _BAND - 1) // _BAND + 1
    last = first - 1 + int((mean > _SURE * error)[first:].int().cumprod(0).sum())
    reached = given.side / max(last * _BAND, 1)
    total = float(mean[first:].sum())
    if last < first or total <= 0:
        light, words = (
            "red",
            "the map does not predict its own particles: they are noise, or their poses are",
        )
    else:
        there = honest.curve[_BAND * (last - 1) + 1 : _BAND * last + 1]
        light, words = judge(reached, honest.resolution, float(there.mean()))
    how_far = f"to {reached:.1f} Å" if last >= first else "no further"
    sentence = (
        f"Beyond the {begun:.0f} Å that both halves began with, particles that had no share in a half map "
        f"are predicted by it {how_far}, {total:.1f} in log-likelihood each: {words}."
    )
    path = folder / "held_out.png"
    _draw(path, given, mean, error)
    values = {
        "predicted_to_A": reached if last >= first else None,
        "begun_with_A": begun,
        "log_likelihood_gain": total,
        "gain_of_bands": [float(each) for each in mean],
        "error_of_bands": [float(each) for each in error],
        "band_rings": _BAND,
        "particles": len(gains),
    }
    method = (
        "Log-likelihood that each particle gains over noise alone by the projection of the other half set's "
        "map, ring by ring; how strong the projection is counts by what other particles say. It ends where "
        f"the mean of {_BAND} rings is less than {_SURE:g} standard errors above 0. That tells signal from "
        "none, and the more particles there are the weaker a signal: it is no resolution."
    )
    return Finding("Prediction of held-out particles", light, sentence, values, (path.name,), method)


def judge(reached: float, resolution: float, correlation: float) -> tuple[Light, str]:
    """Light, and what it means how far particles are predicted.

    Parameters
    ----------
    reached : float
        Detail to which they are, Å.
    resolution : float
        Of the half maps, Å.
    correlation : float
        Of the half maps at the detail reached.
    """
    if reached > _CLOSE * resolution:
        return "amber", f"less far than half maps agree, {resolution:.2f} Å; few particles, or bad ones"
    if reached < _FINER * resolution:
        return (
            "green",
            f"some signal is left there, but weak, as half maps correlate by {correlation:.2f}; at 0.143, by "
            f"which resolution is counted, they agree to {resolution:.2f} Å",
        )
    return "green", f"as far as half maps agree, {resolution:.2f} Å"


def held_out(given: Given, sample: Sample, honest: Control) -> Tensor:
    """Gains in log-likelihood (particles, bands) of particles by the other half set's map.

    Notes
    -----
    With an amplitude a of the projections in a ring, the gain is ``a m - a² n / 2`` where m is what images
    and projections have in common over the noise's power, and n the projections' own power over it. The
    amplitude that is best for particles of one half set is used for those of the other.
    """
    rng = np.random.default_rng(given.step.seed)
    match, norm = [], []
    for half in (0, 1):
        own = np.flatnonzero(sample.halves == half)
        rows = np.sort(rng.permutation(own)[:_MOST])
        found = _matches(given, sample, honest, rows, honest.halves[1 - half])
        match.append(found[0])
        norm.append(found[1])
    gains = []
    for half in (0, 1):
        level = match[1 - half].sum(0) / norm[1 - half].sum(0).clamp_min(1e-12)
        level = level.clamp_min(0)
        gains.append(level * match[half] - level.square() * norm[half] / 2)
    return torch.cat(gains)


def _matches(
    given: Given, sample: Sample, honest: Control, rows: np.ndarray, volume: Tensor
) -> tuple[Tensor, Tensor]:
    """Products of images with projections, and of these with themselves (n, bands), over the noise."""
    disc = sample.disc()
    masked = SplineVolume.of(
        (volume * given.mask).to(sample.device), radius_px=disc.radius, padding=sample.padding
    )
    flipped, poses = phase_flipped(sample.particles), honest.particles.poses
    band = torch.div(disc.rings + _BAND - 1, _BAND, rounding_mode="floor").to(sample.device)
    bands = int(band.max()) + 1
    both: list[list[Tensor]] = [[], []]
    for first in range(0, len(rows), _BATCH):
        some = rows[first : first + _BATCH]
        index = torch.from_numpy(some)
        ready = prepare(
            sample.source.images.get(some).to(sample.device),
            torch.ones(disc.box, disc.box, device=sample.device),
            sample.source.ctf[index],
            disc,
            sample.pixel_size,
            phase_flipped=torch.from_numpy(flipped[some]),
        )
        transfer = ring_means(disc, ready.ctf.square())
        noise = sample.noise.of_images(torch.from_numpy(sample.groups[some]).to(transfer.device), transfer)
        own = poses[index]
        moved = ready.whole * disc.shifts((own.shifts_A / sample.pixel_size).to(sample.device))
        expected = ready.ctf * sample_slices(masked, own.rotations.to(sample.device), disc.points)
        weight = disc.multiplicity / noise[:, disc.rings]
        for kept, values in zip(both, ((moved.conj() * expected).real, expected.abs().square()), strict=True):
            sums = torch.zeros(len(some), bands, dtype=torch.float64, device=sample.device)
            kept.append(sums.index_add_(1, band, (values * weight).double()).cpu())
    return torch.cat(both[0]), torch.cat(both[1])


def _draw(path: Path, given: Given, mean: Tensor, error: Tensor) -> None:
    figure = new_figure(640, 380)
    add_text(figure, MARGIN, 380 - 30, "what the other half's map says of a particle", size=13, weight="bold")
    detail = f"gain in log-likelihood of {_BAND} rings, ± {_SURE:g} standard errors"
    add_text(figure, MARGIN, 380 - 50, detail, size=10, color=QUIET)
    axes = add_panel(figure, 70, 60, 640 - 70 - MARGIN, 250)
    frequency = (np.arange(len(mean)) * _BAND - (_BAND - 1) / 2) / given.side
    axes.errorbar(
        frequency[1:],
        mean[1:].numpy(),
        yerr=_SURE * error[1:].numpy(),
        color=INK,
        lw=1.2,
        marker=".",
        capsize=2,
    )
    axes.axhline(0, color=QUIET, lw=0.8)
    axes.set_yscale("symlog", linthresh=max(1e-4, float(error[1:].median()) * _SURE))
    resolution_axis(axes, (len(given.fsc.corrected) - 1) / given.side)
    save(figure, path)
