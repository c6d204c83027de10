"""Tables of ``model.star`` that all searches of poses write alike: noise, and scales of micrographs."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import polars as pl
from numpy.typing import NDArray


def spectrum_table(side: float, **columns: NDArray) -> pl.DataFrame:
    """Columns over Fourier rings, from 0, of a box of `side` Å, with their numbers and frequencies."""
    rings = np.arange(len(next(iter(columns.values()))))
    return pl.DataFrame({"rlnSpectralIndex": rings, "rlnResolution": rings / side, **columns})


def noise_tables(power: NDArray[np.float64], *, box: int, side: float) -> dict[str, pl.DataFrame]:
    """Spectra of the noise, by name of their table.

    Parameters
    ----------
    power : array (groups, rings)
        Of the noise of each optics group, of unscaled transforms of images.
    box : int
        Side of these images in pixels.
    side : float
        Side of the box in Å.
    """
    # Of real and imaginary part each, of a transform divided by the number of pixels: RELION's.
    variance = power / (2 * box**4)
    return {
        f"model_optics_group_{i + 1}": spectrum_table(side, rlnSigma2Noise=row)
        for i, row in enumerate(variance)
    }


def scale_table(
    names: Sequence[str], micrographs: NDArray[np.intp], scale: NDArray[np.float64]
) -> pl.DataFrame:
    """Particles and scale of each micrograph.

    Parameters
    ----------
    names : sequence of str
        Of the micrographs.
    micrographs : array (n,)
        Which of them each particle is of.
    scale : array (micrographs,)
        Strength of the particles' signal.
    """
    return pl.DataFrame(
        {
            "rlnGroupNumber": np.arange(len(names)) + 1,
            "rlnGroupName": names,
            "rlnGroupNrParticles": np.bincount(micrographs, minlength=len(names)),
            "rlnGroupScaleCorrection": scale,
        }
    )
