"""Rotations of particles: Euler angles, matrices, quaternions, rotation vectors, distances and uniform grids.

A rotation matrix ``R`` takes volume coordinates (x, y, z) to image coordinates, by multiplication from the
left on columns. The direction that an image looks along is the third row of ``R``, in volume coordinates.
Euler angles are RELION's (rot, tilt, psi); rotation vectors and quaternions describe the same active matrix
``R``.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from halfmap.errors import ParameterError, ShapeError
from halfmap.ops._healpix import pixel_centres, pixel_count

__all__ = [
    "angular_distance",
    "compose",
    "from_euler",
    "from_quaternion",
    "from_rotation_vector",
    "grid_rotations",
    "healpix_grid",
    "mean_rotation",
    "psi_count",
    "random_rotations",
    "subdivide",
    "to_euler",
    "to_quaternion",
    "to_rotation_vector",
    "view_direction",
]


def from_euler(angles: Tensor) -> Tensor:
    """Turn Euler angles into rotation matrices.

    Parameters
    ----------
    angles : Tensor (..., 3)
        rot, tilt, psi in degrees.

    Returns
    -------
    Tensor (..., 3, 3)
        ``R = Z(psi) Y(tilt) Z(rot)`` where each factor turns the axes rather than the vector, so that
        ``Z(a) = [[cos a, sin a, 0], [-sin a, cos a, 0], [0, 0, 1]]``.

    References
    ----------
    Heymann, Chagoyen & Belnap 2005, 10.1016/j.jsb.2005.06.001 (the ZYZ convention shared by the field).

    Examples
    --------
    >>> from_euler(torch.tensor([90.0, 0.0, 0.0])).round() + 0.0
    tensor([[ 0.,  1.,  0.],
            [-1.,  0.,  0.],
            [ 0.,  0.,  1.]])
    """
    _check_last(angles, (3,), "Euler angles")
    radians = torch.deg2rad(angles)
    (sa, sb, sg), (ca, cb, cg) = radians.sin().unbind(-1), radians.cos().unbind(-1)
    rows = [
        torch.stack([cg * cb * ca - sg * sa, cg * cb * sa + sg * ca, -cg * sb], dim=-1),
        torch.stack([-sg * cb * ca - cg * sa, -sg * cb * sa + cg * ca, sg * sb], dim=-1),
        torch.stack([sb * ca, sb * sa, cb], dim=-1),
    ]
    return torch.stack(rows, dim=-2)


def to_euler(rotations: Tensor) -> Tensor:
    """Turn rotation matrices into Euler angles.

    Parameters
    ----------
    rotations : Tensor (..., 3, 3)

    Returns
    -------
    Tensor (..., 3)
        rot, tilt, psi in degrees: rot and psi in [-180, 180], tilt in [0, 180]. Where tilt is 0 or 180 only
        one of rot and psi is determined, and rot is 0.

    Notes
    -----
    psi is read off ``R Z(rot)⁻¹``, whose entries are the sine and cosine of psi at every tilt, so that near
    the poles an ill-determined rot is made good by psi and the matrix survives a round trip.
    """
    _check_last(rotations, (3, 3), "rotations")
    x, y, z = rotations[..., 2, :].unbind(-1)
    sine = torch.hypot(x, y)
    determined = sine > 4 * torch.finfo(rotations.dtype).eps
    rot = torch.where(determined, torch.atan2(y, x), torch.zeros_like(x))
    upper = rotations[..., :2, 1] * rot.cos()[..., None] - rotations[..., :2, 0] * rot.sin()[..., None]
    angles = torch.stack([rot, torch.atan2(sine, z), torch.atan2(upper[..., 0], upper[..., 1])], dim=-1)
    return torch.rad2deg(angles)


def view_direction(rotations: Tensor) -> Tensor:
    """Direction that each image looks along, in volume coordinates: (..., 3, 3) -> unit vectors (..., 3)."""
    _check_last(rotations, (3, 3), "rotations")
    return rotations[..., 2, :]


def from_quaternion(quaternions: Tensor) -> Tensor:
    """Turn quaternions (w, x, y, z) of any length but 0 into rotation matrices: (..., 4) -> (..., 3, 3)."""
    _check_last(quaternions, (4,), "quaternions")
    w, x, y, z = (quaternions / quaternions.norm(dim=-1, keepdim=True)).unbind(-1)
    rows = [
        torch.stack([1 - 2 * (y * y + z * z), 2 * (x * y - w * z), 2 * (x * z + w * y)], dim=-1),
        torch.stack([2 * (x * y + w * z), 1 - 2 * (x * x + z * z), 2 * (y * z - w * x)], dim=-1),
        torch.stack([2 * (x * z - w * y), 2 * (y * z + w * x), 1 - 2 * (x * x + y * y)], dim=-1),
    ]
    return torch.stack(rows, dim=-2)


def to_quaternion(rotations: Tensor) -> Tensor:
    """Turn rotation matrices into unit quaternions (w, x, y, z) with w >= 0: (..., 3, 3) -> (..., 4).

    Notes
    -----
    The ten products of the quaternion's components are linear in the matrix; each of the four rows of that
    symmetric 4 x 4 matrix is the quaternion times one component. The row of the largest component is taken,
    so nothing is divided by a small number (Shepperd 1978, 10.2514/3.55767b).
    """
    _check_last(rotations, (3, 3), "rotations")
    (a, b, c), (d, e, f), (g, h, i) = (row.unbind(-1) for row in rotations.unbind(-2))
    rows = torch.stack(
        [
            torch.stack([1 + a + e + i, h - f, c - g, d - b], dim=-1),
            torch.stack([h - f, 1 + a - e - i, b + d, c + g], dim=-1),
            torch.stack([c - g, b + d, 1 - a + e - i, f + h], dim=-1),
            torch.stack([d - b, c + g, f + h, 1 - a - e + i], dim=-1),
        ],
        dim=-2,
    )
    largest = rows.diagonal(dim1=-2, dim2=-1).argmax(dim=-1)
    chosen = rows.gather(-2, largest[..., None, None].expand(*largest.shape, 1, 4)).squeeze(-2)
    chosen = chosen / chosen.norm(dim=-1, keepdim=True)
    return torch.where(chosen[..., :1] < 0, -chosen, chosen)


def from_rotation_vector(vectors: Tensor) -> Tensor:
    """Turn rotation vectors (axis times angle in degrees) into rotation matrices: (..., 3) -> (..., 3, 3).

    Notes
    -----
    The matrix turns vectors about the axis by the right-hand rule. It goes through the quaternion
    (cos θ/2, sinc(θ/2) θ/2), smooth at the zero vector.
    """
    _check_last(vectors, (3,), "rotation vectors")
    half = torch.deg2rad(vectors) / 2
    # The norm has no gradient at zero; its square has.
    square = (half * half).sum(dim=-1, keepdim=True)
    tiny = square < torch.finfo(vectors.dtype).eps
    angle = torch.where(tiny, torch.ones_like(square), square).sqrt()
    sinc = torch.where(tiny, 1 - square / 6, angle.sin() / angle)
    cosine = torch.where(tiny, 1 - square / 2, angle.cos())
    return from_quaternion(torch.cat([cosine, sinc * half], dim=-1))


def to_rotation_vector(rotations: Tensor) -> Tensor:
    """Turn rotation matrices into rotation vectors in degrees, of length 0 to 180: (..., 3, 3) -> (..., 3).

    Notes
    -----
    At 180° an axis and its opposite describe the same rotation; either may come back.
    """
    w, vector = to_quaternion(rotations).split([1, 3], dim=-1)
    sine = vector.norm(dim=-1, keepdim=True)
    tiny = sine < torch.finfo(rotations.dtype).eps
    safe = torch.where(tiny, torch.ones_like(sine), sine)
    scale = torch.where(tiny, 2 / w.clamp_min(0.5), 2 * torch.atan2(sine, w) / safe)
    return torch.rad2deg(vector * scale)


def compose(*rotations: Tensor) -> Tensor:
    """Multiply rotations, as in ``A B C``: the last acts on a vector first. Batches broadcast."""
    if not rotations:
        raise ParameterError("nothing to compose: give at least one rotation")
    product = rotations[0]
    for rotation in rotations:
        _check_last(rotation, (3, 3), "rotations")
    for rotation in rotations[1:]:
        product = product @ rotation
    return product


def angular_distance(a: Tensor, b: Tensor) -> Tensor:
    """Angle in degrees, 0 to 180, of the rotation from `a` to `b`: (..., 3, 3) twice, broadcast -> (...).

    Notes
    -----
    Twice the arctangent of the quaternion's parts of ``aᵀ b``, accurate at both ends, unlike the arccosine of
    the trace.
    """
    _check_last(b, (3, 3), "rotations")
    quaternion = to_quaternion(a.transpose(-1, -2) @ b)
    return torch.rad2deg(2 * torch.atan2(quaternion[..., 1:].norm(dim=-1), quaternion[..., 0]))


def mean_rotation(rotations: Tensor, *, weights: Tensor | None = None) -> Tensor:
    """Average rotations in the chordal sense: (n, 3, 3) -> (3, 3).

    Parameters
    ----------
    rotations : Tensor (n, 3, 3)
    weights : Tensor (n,), optional
        Non-negative weights; all equal by default.

    Notes
    -----
    The rotation nearest to the weighted mean matrix, by its singular value decomposition
    (Hartley et al. 2013, 10.1007/s11263-012-0601-0).
    """
    _check_last(rotations, (3, 3), "rotations")
    if weights is not None:
        rotations = rotations * weights.to(rotations)[:, None, None]
    u, _, vh = torch.linalg.svd(rotations.sum(dim=0))
    sign = torch.ones(3, dtype=u.dtype, device=u.device)
    sign[2] = torch.linalg.det(u @ vh).sign()
    return (u * sign) @ vh


def random_rotations(
    n: int,
    *,
    generator: torch.Generator | None = None,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
) -> Tensor:
    """Draw `n` rotations uniformly over SO(3), as normalised Gaussian quaternions: (n, 3, 3).

    References
    ----------
    Shoemake 1992, 10.1016/B978-0-08-050755-2.50036-1 (why a uniform quaternion is a uniform rotation).
    """
    # Drawn in float64 on the generator's device, so that a seed means the same rotations in every precision.
    source = generator.device if generator is not None else torch.device("cpu")
    quaternions = torch.randn(n, 4, generator=generator, dtype=torch.float64, device=source)
    return from_quaternion(quaternions).to(device=device, dtype=dtype)


def psi_count(order: int, psi_step: float | None = None) -> int:
    """Count the in-plane angles of a grid: 360° in steps of at most `psi_step` degrees.

    The default step is 60° / 2^order, near the spacing of the directions.
    """
    pixel_count(order)
    if psi_step is None:
        return 6 * 2**order
    if not 0 < psi_step <= 360:
        raise ParameterError(f"an in-plane step of {psi_step}° is not between 0° and 360°")
    return math.ceil(360.0 / psi_step - 1e-9)


def healpix_grid(
    order: int,
    *,
    psi_step: float | None = None,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
) -> Tensor:
    """Make a uniform grid over SO(3): every HEALPix direction with every in-plane angle.

    Parameters
    ----------
    order : int
        HEALPix order: 12 · 4^order directions, spaced about 58.6° / 2^order.
    psi_step : float, optional
        Largest in-plane step in degrees; by default 60° / 2^order.
    dtype, device
        Of the result.

    Returns
    -------
    Tensor (12 · 4^order · n_psi, 3, 3)
        Row ``pixel * n_psi + k`` looks along nested pixel `pixel`, turned in-plane by (k + 1/2) · 360° /
        n_psi.

    Notes
    -----
    Directions and steps are RELION's, the in-plane angles are not: they are the centres of equal arcs, so
    that the grid of one order is divided exactly by the next (`subdivide`), and they are counted from an
    origin that keeps neighbouring directions alike where psi = 0 does not, near the poles. Without the
    latter a child could lie a whole grid step from its parent; with it they are within 0.7 steps at every
    order.

    References
    ----------
    Górski et al. 2005, 10.1086/427976. Scheres 2012, 10.1016/j.jsb.2012.09.006 (its use in searches).

    Examples
    --------
    >>> healpix_grid(0).shape
    torch.Size([72, 3, 3])
    """
    count = pixel_count(order) * psi_count(order, psi_step)
    return grid_rotations(torch.arange(count), order=order, psi_step=psi_step).to(device=device, dtype=dtype)


def grid_rotations(index: Tensor, *, order: int, psi_step: float | None = None) -> Tensor:
    """Rotations at some rows of `healpix_grid`, without making the rest: (...) -> (..., 3, 3) float64."""
    n_psi = psi_count(order, psi_step)
    rot, tilt, origin = pixel_centres(index // n_psi, order=order).unbind(-1)
    psi = origin + (index % n_psi + 0.5).to(origin) * (360.0 / n_psi)
    return from_euler(torch.stack([rot, tilt, psi], dim=-1))


def subdivide(index: Tensor, *, order: int, psi_step: float | None = None) -> Tensor:
    """Rows of the next finer grid that divide the cells of these rows: (...) -> (..., 8).

    Parameters
    ----------
    index : Tensor (...) of integers
        Rows of ``healpix_grid(order, psi_step=psi_step)``.
    order : int
        Order of that grid; the children belong to ``order + 1`` and half the in-plane step.
    psi_step : float, optional
        As for that grid. For a grandchild pass half the true step, ``180 / psi_count(order, psi_step)``.

    Returns
    -------
    Tensor (..., 8) of int64
        Four nested pixels times two in-plane angles. Each row of the finer grid has exactly one parent.
    """
    n_psi = psi_count(order, psi_step)
    child = torch.arange(8, device=index.device)
    pixel = 4 * (index // n_psi)[..., None] + child // 2
    return pixel * 2 * n_psi + 2 * (index % n_psi)[..., None] + child % 2


def _check_last(array: Tensor, shape: tuple[int, ...], name: str) -> None:
    """Refuse arrays whose last axes are not of this shape."""
    if tuple(array.shape[-len(shape) :]) != shape:
        wanted = ", ".join(str(n) for n in shape)
        raise ShapeError(f"{name} of shape {tuple(array.shape)} are not (..., {wanted})")
