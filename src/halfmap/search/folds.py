"""How particles are dealt to half sets and folds: none meets itself, nor one that was picked twice."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from halfmap.data import ParticleSet
from halfmap.errors import TableError

SUBSET = "rlnRandomSubset"

_UNEVEN = 0.2
"""Difference of the parts' sizes, over the mean, from which on particles are dealt one by one."""

_MANY = 8
"""Micrographs from which on whole ones are dealt to half sets. Of fewer, those of one half set have other
defoci than those of the other, and another detail is missing in its map."""


def same_images(particles: ParticleSet) -> NDArray[np.intp]:
    """Number of each particle's image (n,), from 0; rows that a symmetry was expanded to share one."""
    names = particles.rows["rlnImageName"].to_numpy()
    _, first, image = np.unique(names, return_index=True, return_inverse=True)
    return np.argsort(np.argsort(first))[image]


def dealt(
    micrographs: NDArray[np.intp],
    parts: int,
    rng: np.random.Generator,
    *,
    images: NDArray[np.intp] | None = None,
) -> NDArray[np.intp]:
    """Deal particles at random to parts of about one size, micrograph by micrograph.

    Parameters
    ----------
    micrographs : array (n,)
        Of each particle. Whole ones are dealt, so that a particle that was picked twice, and the noise that
        overlapping boxes share, are in one part; unless they are so few or so different that parts would
        differ by more than a fifth.
    parts : int
    rng : Generator
    images : array (n,), optional
        Image of each particle; where particles are dealt one by one, those of one image stay together.

    Returns
    -------
    array (n,) of int
    """
    counts = np.bincount(micrographs)
    part, sizes = np.zeros(len(counts), np.intp), np.zeros(parts, np.intp)
    order = rng.permutation(len(counts))
    for micrograph in order[np.argsort(-counts[order], kind="stable")]:
        part[micrograph] = sizes.argmin()
        sizes[part[micrograph]] += counts[micrograph]
    if np.ptp(sizes) <= _UNEVEN * len(micrographs) / parts:
        return part[micrographs]
    unit = np.arange(len(micrographs)) if images is None else np.unique(images, return_inverse=True)[1]
    return rng.permutation(np.arange(unit.max(initial=-1) + 1) % parts)[unit]


def half_sets(
    particles: ParticleSet, micrographs: NDArray[np.intp], *, seed: int, fewest: int
) -> NDArray[np.intp]:
    """Half set (n,) of each particle, 0 or 1: that of the table, or one drawn.

    Parameters
    ----------
    particles : ParticleSet
    micrographs : array (n,)
        Of each particle; see `dealt`. Few are not dealt whole.
    seed : int
    fewest : int
        Particles that each must have.

    Raises
    ------
    TableError
        If the table has half sets other than 1 and 2, one image in both, or too few particles in one.
    """
    told = SUBSET in particles.rows.columns
    if not told:
        images = same_images(particles)
        whole = micrographs if len(np.unique(micrographs)) >= _MANY else images
        halves = dealt(whole, 2, np.random.default_rng(seed), images=images)
    else:
        given = particles.rows[SUBSET].to_numpy()
        wrong = ~np.isin(given, (1, 2))
        if wrong.any():
            raise TableError(
                f"_{SUBSET} is {given[wrong][0]}, not 1 or 2",
                path=particles.path,
                row=int(wrong.argmax()) + 1,
                hint=f"remove the column _{SUBSET}, and half sets are drawn",
            )
        halves = given.astype(np.intp) - 1
        images = same_images(particles)
        torn = halves != halves[np.unique(images, return_index=True)[1]][images]
        if torn.any():
            raise TableError(
                f"the image {particles.rows['rlnImageName'][int(torn.argmax())]} is in both half sets",
                path=particles.path,
                row=int(torn.argmax()) + 1,
                hint=f"remove the column _{SUBSET}, and half sets are drawn that keep its rows together",
            )
    counts = np.bincount(halves, minlength=2)
    if counts.min() < fewest:
        raise TableError(
            f"{counts.min()} particles in half set {int(counts.argmin()) + 1}: at least {fewest} are needed",
            path=particles.path,
            hint=f"remove the column _{SUBSET}, and half sets are drawn" if told else "give more particles",
        )
    return halves
