"""Water around and missing from a molecule: a continuum with a hydration layer, in volts."""

from __future__ import annotations

import math
from collections.abc import Iterator

import numba
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from halfmap.io.models import AtomicModel, scattering_coefficients
from halfmap.log import report
from halfmap.ops.potential import POTENTIAL_V_A2

WATER_MOLECULES_PER_A3 = 0.94 * 0.602214076 / 18.01528
"""Of ice of 0.94 g/cm³ (Ghormley & Hochanadel 1971, DOI 10.1126/science.171.3966.62)."""

ICE_POTENTIAL_V = (
    POTENTIAL_V_A2
    * WATER_MOLECULES_PER_A3
    * float(scattering_coefficients("O")[0].sum() + 2 * scattering_coefficients("H")[0].sum())
)
"""Mean potential of ice from neutral atoms as the molecule's, 4.57 V, so that their difference is sound.

Electron holography gives 3.5 ± 1.2 V (Harscher & Lichte 1998), the same sum at another density 4.53 V
(Vulović et al. 2013, DOI 10.1016/j.jsb.2013.05.008).
"""

_SPACING_A = 0.9
_INWARD_A = 0.4
"""How much closer to the atoms than published the water begins.

Calibrated: the water that a molecule displaces, per mass, is then its partial specific volume (apoferritin
0.71, proteasome 0.74, beta-galactosidase 0.74, haemoglobin 0.75 cm³/g); without it a tenth more.
"""
_PROBE_A = 1.7
_PROBE_REACH_A = _PROBE_A + 2.5
_REACH_A = 7.5
_SLAB_BYTES = 1 << 27
"""Size of the parts in which distances are computed, without their overlap."""
_VAN_DER_WAALS_A = {1: 1.2, 6: 1.7, 7: 1.55, 8: 1.52, 15: 1.8, 16: 1.8}
_OTHER_ATOM_A = 1.8
_NONPOLAR = (1, 6)


def solvent_density(model: AtomicModel, *, box: int, pixel_size: float) -> Tensor:
    """Density of water in a box around a molecule, relative to bulk.

    The continuum of Shang and Sigworth: the density follows the distance from the van der Waals surface,
    with a step of 1 Å standard deviation, a hydration peak and a trough, other ones at carbon than at polar
    atoms. Gaps inside that a probe of 1.7 Å cannot enter from outside its own size hold no water.

    Parameters
    ----------
    model : AtomicModel
        Atoms around the origin of the box, voxel ``n // 2``; hydrogens have no part in it.
    box : int
        Voxels along an edge of the box wanted.
    pixel_size : float
        In Å.

    Returns
    -------
    Tensor (m, m, m), float32
        On the voxels of about 0.9 Å that suit the profile, over the same field; resample it to `box`.

    References
    ----------
    .. [1] Shang & Sigworth 2012, J. Struct. Biol. 180, 10-16, DOI 10.1016/j.jsb.2012.04.021
    .. [2] Jiang & Brünger 1994, J. Mol. Biol. 243, 100-115, DOI 10.1006/jmbi.1994.1633
    """
    return torch.stack(list(solvent_planes(model, box=box, pixel_size=pixel_size)))


def solvent_size(box: int, pixel_size: float) -> int:
    """Voxels along an edge of the density of water in a box."""
    return 2 * math.ceil(box * pixel_size / _SPACING_A / 2)


def solvent_planes(model: AtomicModel, *, box: int, pixel_size: float) -> Iterator[Tensor]:
    """Yield the planes of `solvent_density` from z = 0 on, of which some at a time are computed."""
    size = solvent_size(box, pixel_size)
    spacing = box * pixel_size / size
    heavy = model.elements != 1
    atoms = model.positions[heavy][:, ::-1] / spacing + size // 2
    elements = model.elements[heavy]
    radii = np.array([_VAN_DER_WAALS_A.get(int(z), _OTHER_ATOM_A) for z in elements])
    carbon = np.isin(elements, _NONPOLAR)
    # Probes that reach a plane, and the planes by which they are known to lie at their region's edge.
    halo = math.ceil(_PROBE_REACH_A / spacing) + 1
    thickness = max(2 * halo, _SLAB_BYTES // (4 * size**2))
    for first in report(range(0, size, thickness), "water laid around them"):
        last = min(size, first + thickness)
        bottom, top = max(0, first - halo), min(size, last + halo)
        distance = np.full((top - bottom, size, size), _REACH_A, np.float32)
        nonpolar = np.zeros(distance.shape, np.bool_)
        _distances(distance, nonpolar, atoms - [bottom, 0, 0], radii, carbon, spacing)
        _close_gaps(distance, spacing)
        for z in range(first - bottom, last - bottom):
            yield torch.from_numpy(_profile(distance[z], nonpolar[z]))


def _profile(distance: NDArray, nonpolar: NDArray) -> NDArray:
    """Table 1 of Shang and Sigworth, looked up at every voxel."""
    grid = np.linspace(-4, _REACH_A, 2301) + _INWARD_A
    step = np.array([0.5 + 0.5 * math.erf((r - edge) / math.sqrt(2)) for edge in (0.5, 1.0) for r in grid])

    def bump(height: float, centre: float, width: float) -> NDArray:
        return height * np.exp(-0.5 * ((grid - centre) / width) ** 2)

    polar = step[: grid.size] + bump(0.2, 1.7, 1.77) + bump(-0.15, 3.0, 1.06)
    carbon = step[grid.size :] + bump(0.15, 2.2, 1.77) + bump(-0.12, 3.6, 0.85)
    # The bumps' tails would leave a fraction of a per cent inside and far outside.
    polar, carbon = (np.where(grid < -2, 0, table) for table in (polar, carbon))
    index = np.clip((distance + 4) * 200, 0, grid.size - 1).astype(np.int32)
    return np.where(nonpolar, carbon.astype(np.float32)[index], polar.astype(np.float32)[index])


@numba.njit(cache=True)
def _distances(
    distance: NDArray, nonpolar: NDArray, atoms: NDArray, radii: NDArray, carbon: NDArray, spacing: float
) -> None:
    """Distance in Å from every voxel to the nearest van der Waals surface, and the kind of that atom."""
    depth, size = distance.shape[:2]
    for i in range(atoms.shape[0]):
        reach = (radii[i] + _REACH_A) / spacing
        z0, z1 = max(0, math.ceil(atoms[i, 0] - reach)), min(depth, math.floor(atoms[i, 0] + reach) + 1)
        y0, y1 = max(0, math.ceil(atoms[i, 1] - reach)), min(size, math.floor(atoms[i, 1] + reach) + 1)
        x0, x1 = max(0, math.ceil(atoms[i, 2] - reach)), min(size, math.floor(atoms[i, 2] + reach) + 1)
        for z in range(z0, z1):
            for y in range(y0, y1):
                across = (z - atoms[i, 0]) ** 2 + (y - atoms[i, 1]) ** 2
                for x in range(x0, x1):
                    square = across + (x - atoms[i, 2]) ** 2
                    bound = (distance[z, y, x] + radii[i]) / spacing
                    if bound > 0 and square < bound * bound:
                        distance[z, y, x] = math.sqrt(square) * spacing - radii[i]
                        nonpolar[z, y, x] = carbon[i]


@numba.njit(cache=True)
def _close_gaps(distance: NDArray, spacing: float) -> None:
    """Make voxels that no probe outside covers as deep as they are under the solvent-excluded surface."""
    depth, size = distance.shape[:2]
    reach = _PROBE_REACH_A / spacing
    radius = math.ceil(reach)
    to_probe = np.full(distance.shape, np.float32(reach * spacing))
    for z in range(1, depth - 1):
        for y in range(1, size - 1):
            for x in range(1, size - 1):
                if distance[z, y, x] < _PROBE_A:
                    continue
                at_edge = (
                    min(distance[z - 1, y, x], distance[z + 1, y, x]) < _PROBE_A
                    or min(distance[z, y - 1, x], distance[z, y + 1, x]) < _PROBE_A
                    or min(distance[z, y, x - 1], distance[z, y, x + 1]) < _PROBE_A
                )
                if not at_edge:
                    continue
                # The probe's region begins a little before this voxel: distances are good below a voxel.
                ahead = distance[z, y, x] - _PROBE_A
                for dz in range(max(-radius, -z), min(radius, depth - 1 - z) + 1):
                    for dy in range(max(-radius, -y), min(radius, size - 1 - y) + 1):
                        for dx in range(max(-radius, -x), min(radius, size - 1 - x) + 1):
                            away = math.sqrt(dz * dz + dy * dy + dx * dx) * spacing - ahead
                            if away < to_probe[z + dz, y + dy, x + dx]:
                                to_probe[z + dz, y + dy, x + dx] = away
    for z in range(depth):
        for y in range(size):
            for x in range(size):
                if distance[z, y, x] < _PROBE_A:
                    distance[z, y, x] = min(distance[z, y, x], _PROBE_A - to_probe[z, y, x])
