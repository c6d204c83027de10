"""The map that an atomic model would give, on any grid."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from halfmap.io.models import AtomicModel, scattering_coefficients
from halfmap.ops.potential import atomic_volume


def model_map(
    model: AtomicModel,
    *,
    shape: Sequence[int],
    pixel_size: float,
    origin: Sequence[float],
    blur: float = 0.0,
) -> Tensor:
    """Electrostatic potential of a model's atoms on a map's grid.

    Parameters
    ----------
    model : AtomicModel
        Its occupancies and B-factors count.
    shape : sequence of 3 int
        (d, h, w) of the map.
    pixel_size : float
        In Å.
    origin : sequence of 3 float
        (x, y, z) of the map's first voxel in the model's coordinates, Å.
    blur : float
        B-factor in Å² that all atoms get on top of their own.

    Returns
    -------
    Tensor (d, h, w), float32
        In V, to the frequencies that the voxels can hold; what lies outside the box is lost.
    """
    middle = np.array([size // 2 for size in reversed(tuple(shape))]) * pixel_size + np.array(origin)
    coefficients = _coefficients(model)
    return atomic_volume(
        torch.from_numpy(model.positions - middle),
        coefficients=torch.from_numpy(coefficients),
        shape=shape,
        pixel_size=pixel_size,
        b_factors=torch.from_numpy(model.b_factors.astype(np.float64) + blur),
    )


def _coefficients(model: AtomicModel) -> NDArray[np.float64]:
    """Gaussians (n, 5, 2) of the atoms' scattering factors, times their occupancies."""
    elements, which = np.unique(model.elements, return_inverse=True)
    table = np.stack([np.stack(scattering_coefficients(int(each)), axis=-1) for each in elements])
    found = table[which]
    found[..., 0] *= model.occupancies[:, None]
    return found
