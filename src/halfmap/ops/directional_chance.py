"""What chance makes of the correlation in cones of maps that are the same in every direction."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import torch
from torch import Tensor

from halfmap.ops.directional_fsc import DirectionalFSC, even_directions, widened, windows
from halfmap.ops.fsc_interval import Scatter
from halfmap.ops.symmetry import operators

_PROBES = 3000
"""Directions by which the overlap of cones is measured."""

_SURE = 0.9999
"""Correlation that is believed at most: Fisher's z of one has no end."""

_FREE = 3.0
"""Fisher's z of n independent coefficients has the variance 1 / (n - 3)."""


def isotropic_draws(
    found: DirectionalFSC, scatter: Scatter, *, group: str = "C1", draws: int = 300, seed: int = 1
) -> Iterator[DirectionalFSC]:
    """Draw what the correlation in cones could have been, were it the same in all directions.

    Parameters
    ----------
    found : DirectionalFSC
        Of which directions, numbers and the curve of the whole are taken, neither corrected nor cut.
    scatter : Scatter
        Of noise within the mask.
    group : str
        Point group that the maps have.
    draws : int
    seed : int

    Yields
    ------
    DirectionalFSC
        With drawn curves.

    Notes
    -----
    Fisher's z of each cone is that of the whole shell, with Gaussian noise. Cones share noise as far as they,
    or their equivalents by the group, overlap, and shells as those of masked noise do. A cone holds as many
    independent coefficients as it has, by the mask's share, over the number of times that it covers itself by
    the group: 1 off the axes, n on one of order n.
    """
    shared, copies = _shared(found, group)
    cones, shells = _root(shared), _root(_near(scatter, len(found.whole)))
    numbers, within = found.numbers, windows(found.numbers)
    total = widened(numbers, within).clamp_min(1)
    mean = widened(numbers * found.whole, within) / total
    z = mean.clamp(-_SURE, _SURE).atanh()
    independent = total * scatter.share / copies[:, None]
    deviation, scale = ((independent - _FREE).clamp_min(1) * total).rsqrt(), numbers.sqrt()
    generator = torch.Generator().manual_seed(seed)
    for _ in range(draws):
        white = torch.randn(numbers.shape, dtype=torch.float64, generator=generator)
        noise = widened(scale * (cones @ white @ shells.T), within)
        yield replace(found, curves=(z + noise * deviation).tanh())


def _shared(found: DirectionalFSC, group: str) -> tuple[Tensor, Tensor]:
    """Correlation (d, d) of noise between cones, and how many times each (d,) covers itself."""
    probes = even_directions(_PROBES)
    least = torch.deg2rad(torch.tensor(found.half_angle)).cos()
    turns = operators(group)
    covered = torch.zeros(len(found.directions), _PROBES, dtype=torch.float64)
    for turn in turns:
        covered += (found.directions @ turn @ probes.T).abs() >= least
    common = covered @ covered.T
    own = common.diagonal()
    return common / (own[:, None] * own).sqrt(), own / covered.sum(1)


def _near(scatter: Scatter, shells: int) -> Tensor:
    """Correlation (shells, shells) of noise between shells."""
    near = torch.nn.functional.pad(scatter.neighbours, (0, shells))
    lags = torch.arange(shells)
    return near[(lags[:, None] - lags).abs()]


def _root(matrix: Tensor) -> Tensor:
    """Square root of a correlation, as far as it is one."""
    values, vectors = torch.linalg.eigh(matrix)
    root = vectors * values.clamp_min(0).sqrt()
    return root / root.norm(dim=1, keepdim=True)
