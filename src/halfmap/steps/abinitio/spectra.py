"""Power of the noise around the particles, and of their signal: what is known before there is any map."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import pad

from halfmap.io.atomic import atomic_path
from halfmap.log import log
from halfmap.ops.masks import soft_circle
from halfmap.ops.threads import one_torch_thread
from halfmap.search.lens_noise import LensNoise, NoiseSums, ring_means
from halfmap.search.particles import ParticleImages
from halfmap.search.prepared import prepare
from halfmap.steps.abinitio.plan import Plan

_SAMPLED, _BATCH = 1000, 50
"""Images that spectra are estimated from, and how many at a time."""

_WIDEST = 0.38
"""Radius over the box of the circle that is left out at most: the noise is seen around it."""

_LEAST = 1e-3
"""Power of the signal over its greatest, at least."""

_NAME = "spectra.npz"


@dataclass(frozen=True, eq=False)
class Spectra:
    """Noise of each optics group, and power (rings,) of projections."""

    noise: LensNoise
    signal: Tensor

    @classmethod
    def load(cls, folder: Path, device: str) -> Spectra:
        """Read what `estimate` wrote."""
        with np.load(folder / _NAME) as file:
            parts = [torch.from_numpy(file[name]).to(device) for name in ("detector", "specimen", "signal")]
        return cls(LensNoise(*parts[:2]), parts[2])


@one_torch_thread()
def estimate(plan: Plan, images: ParticleImages, folder: Path) -> None:
    """Check the images, and write the spectra into a folder unless they are there.

    Raises
    ------
    TableError
        If images cannot be used.
    """
    if (folder / _NAME).exists():
        return
    images.check()
    folder.mkdir(exist_ok=True)
    disc, margin, mask = plan.disc, _margin(plan), plan.image_mask()
    part, inside = float(margin.square().mean()), float(mask.square().mean())
    n_groups = int(plan.groups.max()) + 1
    around = NoiseSums.empty(n_groups, disc.radius + 1)
    rows = plan.random(0, 1).permutation(len(plan.groups))[:_SAMPLED]
    each = [np.flatnonzero(plan.groups == group)[:_BATCH] for group in range(n_groups)]
    whole, transfers, numbers = [], [], []
    for some in images.batches(np.unique(np.concatenate([rows, *each])), _BATCH):
        pictures, parameters = images.get(some).to(plan.device), plan.source.ctf[torch.from_numpy(some)]
        group = torch.from_numpy(plan.groups[some])
        outer, inner = (prepare(pictures, m, parameters, disc, plan.pixel_size) for m in (margin, mask))
        transfer = ring_means(disc, outer.ctf.square())
        around.add(ring_means(disc, outer.masked.abs().square()) / part, transfer, group)
        whole.append(ring_means(disc, inner.masked.abs().square()))
        transfers.append(transfer)
        numbers.append(group)
    noise, transfer = around.fit(), torch.cat(transfers).cpu()
    level = noise.of_images(torch.cat(numbers), transfer)
    excess = (torch.cat(whole).cpu() - inside * level).mean(0) / transfer.mean(0).clamp_min(1e-6)
    signal = pad(excess[None, None], (1, 1), mode="replicate")[0, 0].unfold(0, 3, 1).mean(-1)
    if not float(signal[1:].max()) > 0:
        log.warning("the images hold no more power than their noise: are there particles in them?")
    signal = signal.clamp_min(_LEAST * max(float(signal[1:].max()), float(level.mean())))
    with atomic_path(folder / _NAME) as temporary, temporary.open("wb") as file:
        arrays = {"detector": noise.detector, "specimen": noise.specimen, "signal": signal.float()}
        np.savez(file, allow_pickle=False, **{name: value.numpy() for name, value in arrays.items()})


def _margin(plan: Plan) -> Tensor:
    """Soft mask (box, box) of what is around the particles, or of the corners where that is hardly any."""
    shape, edge = (plan.box, plan.box), 2.0
    outer = soft_circle(shape, radius=plan.box / 2 - edge, edge=edge)
    radius = min(plan.support_px, _WIDEST * plan.box)
    return (outer * (1 - soft_circle(shape, radius=radius, edge=edge))).to(plan.device)
