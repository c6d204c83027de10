"""Local resolution: each voxel is followed from coarse to fine detail until it is lost."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from halfmap.errors import ParameterError
from halfmap.io.half_maps import HalfMaps
from halfmap.log import log
from halfmap.ops.fourier import rfft3
from halfmap.ops.local_correlation import Band, bands, shells, smoothed, upsampled
from halfmap.ops.monogenic import monogenic_power

if TYPE_CHECKING:
    from halfmap.steps.localres.step import LocalResStep

_GRID = 160
"""Side of the grid that voxels are followed on, at most: windows are wider than its voxels."""

_FEWEST_SHELLS = 3.0
"""Shell of the first band at least."""

_OVERLAP = 2
"""Of bands: closer than they are wide."""

_INSIDE = 0.5
"""Of the mask, where figures are taken."""


@dataclass(eq=False)
class Followed:
    """Shell at which each voxel is lost: where a value falls below a threshold for the first time.

    Attributes
    ----------
    grid : int
        Side of the grid.
    shell : Tensor (grid, grid, grid)
        Found so far.
    lost : Tensor (grid, grid, grid) of bool
    """

    grid: int
    shell: Tensor = field(init=False)
    lost: Tensor = field(init=False)
    _before: Tensor | None = field(init=False, default=None)
    _last: float = field(init=False, default=0.0)

    def __post_init__(self) -> None:
        self.shell = torch.zeros((self.grid,) * 3)
        self.lost = torch.zeros((self.grid,) * 3, dtype=torch.bool)

    def follow(self, shell: float, above: Tensor) -> bool:
        """Take the next band: its shell, and by how much each voxel (m, m, m) is above the threshold.

        Says whether any voxel is left.
        """
        above = upsampled(above, self.grid)
        falls = ~self.lost & (above < 0)
        if self._before is None:
            at = torch.full_like(above, shell)
        else:
            part = self._before / (self._before - above).clamp_min(torch.finfo(above.dtype).tiny)
            at = self._last + part.clamp(0, 1) * (shell - self._last)
        self.shell = torch.where(falls, at, torch.where(self.lost, self.shell, shell))
        self.lost |= falls
        self._before, self._last = above, shell
        return not bool(self.lost.all())


@dataclass(frozen=True, eq=False)
class LocalResolution:
    """Local resolutions in Å, (n, n, n), and where they count.

    Attributes
    ----------
    correlation, monogenic : Tensor
        By the local correlation, and by signal over noise.
    best, worst : Tensor or None
        By the correlation in cones, the finest and the coarsest of the axes.
    axes : Tensor (axes, 3) or None
    medians : array (axes,) or None
        Of each axis, Å.
    inside, masked : Tensor of bool
        Where the mask is above one half, and above nothing.
    finest, coarsest : float
        Å; what voxels have that are never lost, and those that are lost in the first band.
    """

    correlation: Tensor
    monogenic: Tensor
    best: Tensor | None
    worst: Tensor | None
    axes: Tensor | None
    medians: NDArray[np.float64] | None
    inside: Tensor
    masked: Tensor
    finest: float
    coarsest: float


def measure(step: LocalResStep, halves: HalfMaps, mask: Tensor) -> LocalResolution:
    """Measure the local resolution, in all directions together and in cones.

    Raises
    ------
    ParameterError
        If the box holds no bands, or the mask no voxels.
    """
    side = halves.box * halves.pixel_size
    middles = shells(halves.box, max(_FEWEST_SHELLS, side / step.coarsest), overlap=_OVERLAP)
    if len(middles) < 3:
        raise ParameterError(
            f"a box of {halves.box} px has no resolutions between {step.coarsest:g} Å and its last shell",
            path=halves.paths[0],
            hint="give a larger --coarsest",
        )
    inside = mask > _INSIDE
    if not bool(inside.any()):
        raise ParameterError(f"the mask is nowhere above {_INSIDE:g}", hint="give one that is 1 inside")

    last = halves.last_shell

    def resolutions(followed: Followed) -> Tensor:
        # The last band's middle may lie before or beyond the last shell.
        shell = followed.shell.where(followed.lost, float(last))
        return side / upsampled(shell, halves.box).clamp(middles[0], last)

    grid = min(halves.box, _GRID)
    correlation, monogenic = Followed(grid), Followed(grid)
    for band in bands(halves.first, halves.second, mask=mask, middles=middles, overlap=_OVERLAP):
        if band.shell > last:
            break
        left = correlation.follow(band.shell, band.correlation - step.threshold)
        left |= monogenic.follow(band.shell, _over_noise(band, step.confidence / 100))
        if not left:
            break
    by_axis = None
    axes = icosahedral_axes() if step.directions else None
    if axes is not None:
        by_axis = [_along(step, halves, mask, middles, axis, grid, resolutions) for axis in axes]
    found = LocalResolution(
        resolutions(correlation),
        resolutions(monogenic),
        None if by_axis is None else torch.stack(by_axis).amin(0),
        None if by_axis is None else torch.stack(by_axis).amax(0),
        axes,
        None if by_axis is None else np.array([float(each[inside].median()) for each in by_axis]),
        inside,
        mask > 0,
        side / last,
        side / middles[0],
    )
    _tell(found)
    return found


def icosahedral_axes() -> Tensor:
    """Six axes, evenly apart: those through the corners of an icosahedron, (6, 3)."""
    golden = (1 + 5**0.5) / 2
    axes = [(0, 1, golden), (0, -1, golden), (1, golden, 0), (-1, golden, 0), (golden, 0, 1), (golden, 0, -1)]
    return torch.nn.functional.normalize(torch.tensor(axes, dtype=torch.float64), dim=1)


def _along(
    step: LocalResStep,
    halves: HalfMaps,
    mask: Tensor,
    middles: list[float],
    axis: Tensor,
    grid: int,
    resolutions: Callable[[Followed], Tensor],
) -> Tensor:
    followed = Followed(grid)
    for band in bands(halves.first, halves.second, mask=mask, middles=middles, overlap=_OVERLAP, axis=axis):
        if band.shell > halves.last_shell or not followed.follow(
            band.shell, band.correlation - step.threshold
        ):
            break
    return resolutions(followed)


def _over_noise(band: Band, part: float) -> Tensor:
    """Mean power about each voxel over the power that single voxels of noise keep below, less one."""
    power, noise = (monogenic_power(rfft3(each), box=len(each)) for each in (band.mean, band.apart))
    inside = band.inside > _INSIDE
    values = noise[inside] if bool(inside.any()) else noise.flatten()
    # The limit is of single voxels. Means of noise scatter so little that a map would pass theirs by what its
    # band lets in of coarser detail, or its window of stronger surroundings.
    limit = float(np.quantile(values.numpy(), part))
    mean = smoothed(power, width=band.width * len(power) / band.box, over=band.inside)
    return mean / max(limit, torch.finfo(mean.dtype).tiny) - 1


def _tell(found: LocalResolution) -> None:
    for name, volume in (("correlation", found.correlation), ("signal over noise", found.monogenic)):
        values = volume[found.inside].numpy()
        log.info(
            "local resolution by %s: median %.2f Å, %.2f to %.2f Å for the middle 90 %%",
            *(name, *np.quantile(values, (0.5, 0.05, 0.95))),
        )
    if found.medians is not None:
        log.info("medians along six axes: %s Å", ", ".join(f"{each:.2f}" for each in found.medians))
