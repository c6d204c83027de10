"""The defocus over a micrograph as its table states it, to be evaluated at every particle's place."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from halfmap.data.columns import format_vector, parse_vector
from halfmap.errors import TableError

N_TERMS = 6
"""Terms of the surface; see `surface_terms`."""


@dataclass(frozen=True, eq=False)
class DefocusSurface:
    """Change of the defocus over the field of a micrograph, against its mean.

    Parameters
    ----------
    coefficients : array (5,)
        Å, of the `surface_terms` after the first.
    shape : tuple of 2 int
        (y, x) of the micrograph in pixels.
    """

    coefficients: NDArray[np.float64]
    shape: tuple[int, int]

    @classmethod
    def of_row(cls, row: Mapping[str, Any]) -> DefocusSurface:
        """Take it from the row of a table of micrographs; flat where the table says nothing.

        Raises
        ------
        TableError
            If it is no vector of five numbers, or the size of the micrograph is missing.
        """
        text = row.get("hmDefocusSurface")
        if text is None:
            return cls(np.zeros(N_TERMS - 1), (1, 1))
        values = np.array(parse_vector(text, label="_hmDefocusSurface"))
        height, width = row.get("hmMicrographHeight"), row.get("hmMicrographWidth")
        if len(values) != N_TERMS - 1 or height is None or width is None:
            raise TableError(
                "_hmDefocusSurface needs five numbers, _hmMicrographHeight and _hmMicrographWidth",
                hint="estimate the CTF anew",
            )
        return cls(values, (int(height), int(width)))

    def columns(self) -> dict[str, Any]:
        """Give the columns that `of_row` reads."""
        return {
            "hmDefocusSurface": format_vector(self.coefficients.round(2)),
            "hmMicrographHeight": self.shape[0],
            "hmMicrographWidth": self.shape[1],
        }

    def at(self, x: ArrayLike, y: ArrayLike) -> NDArray[np.float64]:
        """Å to add to ``rlnDefocusU`` and ``rlnDefocusV`` at pixels x, y (``rlnCoordinateX``, ``Y``).

        Examples
        --------
        >>> surface = DefocusSurface(np.array([100.0, 0, 0, 0, 0]), (1000, 2000))
        >>> surface.at([0, 1000, 2000], 500).tolist()
        [-100.0, 0.0, 100.0]
        """
        height, width = self.shape
        u = 2 * np.asarray(x, np.float64) / width - 1
        v = 2 * np.asarray(y, np.float64) / height - 1
        return surface_terms(u, v)[..., 1:] @ self.coefficients


def surface_terms(x: ArrayLike, y: ArrayLike, n: int = N_TERMS) -> NDArray[np.float64]:
    """Terms (..., n) of the defocus at x, y from -1 to 1: 1, x, y, x² - 1/3, x y, y² - 1/3.

    All but the first have no mean over the field.
    """
    x, y = np.broadcast_arrays(np.asarray(x, np.float64), np.asarray(y, np.float64))
    return np.stack([np.ones_like(x), x, y, x * x - 1 / 3, x * y, y * y - 1 / 3][:n], axis=-1)
