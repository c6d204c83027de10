"""Two half maps from the sums of two half sets: unfiltered ones, filtered ones, their correlation."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Generic, TypeVar

import numpy as np
import torch
from torch import Tensor

from halfmap.errors import FileFormatError, ParameterError, ShapeError
from halfmap.io.atomic import atomic_path
from halfmap.ops._slice_volume import _envelope
from halfmap.ops.fourier import ifft1, irfft2, irfft3, rfft3
from halfmap.ops.grids import frequency_radius
from halfmap.ops.slices import SliceAccumulator
from halfmap.ops.threads import in_threads
from halfmap.search import _sums_kernels as kernels
from halfmap.search.backprojector import Backprojection
from halfmap.search.stored_sums import StoredSums, folded_planes, slabs

_LEAST, _MOST = 1e-3, 0.999
"""Range of the correlation that is believed: next to none beyond the signal, short of one within."""

_FLOOR = 0.5
"""Weight over the mean of its shell that a voxel counts for at least, in maps that are not filtered."""

_ROWS = 16
"""Planes y of a map that are made at a time."""


Sums = Backprojection | StoredSums
AnySums = TypeVar("AnySums", Backprojection, StoredSums)
"""In memory or in files, with all symmetry applied."""


@dataclass(frozen=True, eq=False)
class HalfSums(Generic[AnySums]):
    """Sums of both half sets, to be solved in more than one way.

    Attributes
    ----------
    halves : pair of Backprojection or StoredSums
        With all symmetry applied.
    least : Tensor (2, shells), float64
        Weight that a voxel of an unfiltered map counts for at least.
    noise : Tensor (2, shells), float64
        Power of the noise in unfiltered maps.
    evenness : Tensor (2, shells), float64
        What the fainter voxels of unfiltered maps leave of their correlation with what is there, squared.
    """

    halves: tuple[AnySums, AnySums]
    least: Tensor
    noise: Tensor
    evenness: Tensor

    @classmethod
    def of(cls, halves: tuple[AnySums, AnySums]) -> HalfSums[AnySums]:
        """From sums of one radius, symmetrised."""
        least = torch.stack([least_weights(half) for half in halves])
        total = torch.stack([_shell_sums(half, own) for half, own in zip(halves, least, strict=True)], dim=1)
        count, noise, first, second = total
        evenness = first.square() / (count * second).clamp_min(torch.finfo(torch.float32).tiny)
        return cls(halves, least, noise / count, evenness)

    def unfiltered(self) -> tuple[Tensor, Tensor]:
        """Maps (box, box, box) without any prior but where little was seen.

        Notes
        -----
        Weights of voxels may differ by a factor of a hundred. An average with hardly any weight is hardly
        more than noise, but what is done to the map afterwards, a mask above all, mixes it with its
        neighbours as an equal. So voxels count for half the mean weight of their shell at least: the others
        are averages as they are, these are shrunk towards nothing.
        """
        first, second = self.halves
        return solved(first, least=self.least[0]), solved(second, least=self.least[1])

    def prior(self, correlation: Tensor) -> Tensor:
        """Reciprocals of the signal's power (2, shells) by the correlation of the halves, for `solved`.

        Parameters
        ----------
        correlation : Tensor (shells or more,)
            Of the unfiltered half maps as they are to be used: of masked ones where they will be masked.

        Notes
        -----
        In a shell with noise of power s the correlation f makes the signal's power ``s f / (1 - f)``, which
        counts the signal relative to the noise that is left after masking. Weights of voxels scatter, and s
        is the mean of their reciprocals, which may be several times the reciprocal of their mean.
        """
        n = self.noise.shape[1]
        if len(correlation) < n:
            raise ParameterError(f"a correlation of {len(correlation)} shells for maps of {n}")
        snr = correlation[:n].double().to(self.noise).clamp(_LEAST, _MOST)
        return (1 - snr) / snr / self.noise.clamp_min(torch.finfo(torch.float32).tiny)


def least_weights(sums: Sums) -> Tensor:
    """Weight (shells,) that a voxel of an unfiltered map counts for at least; see `HalfSums.unfiltered`."""
    weight, count = _shell_sums(sums)
    return _FLOOR * (weight / count).clamp_min(torch.finfo(torch.float32).tiny)


def _shell_sums(sums: Sums, least: Tensor | None = None) -> Tensor:
    """Sums over shells, float64, of what `_sums_kernels.add_shells` adds up."""
    limit, box, padded_box = _sizes(sums)
    shape = 2 if least is None else 4, _shells(sums)

    def of(z: range) -> Tensor:
        planes = _planes(sums, z)
        if planes.device.type != "cpu":
            return _shell_sums_torch(sums, planes, z, shape[1], least)
        out = torch.zeros(shape, dtype=torch.float64)
        known = np.empty(0) if least is None else least.numpy()
        kernels.add_shells(planes.numpy(), z.start, box / padded_box, known, out.numpy())
        return out

    return torch.stack(in_threads(of, slabs(limit))).sum(0)


def _shell_sums_torch(sums: Sums, planes: Tensor, z: range, n: int, least: Tensor | None) -> Tensor:
    """The same of some planes on any device."""
    shells = _shells_of_planes(sums, z)
    held = shells < n
    shells, weights = shells[held], planes[..., 2][held].double()
    if least is None:
        each = weights, torch.ones_like(weights)
    else:
        counted = weights.maximum(least[shells])
        part = weights / counted
        each = torch.ones_like(part), part / counted, part, part.square()
    return torch.stack([torch.bincount(shells, values, n) for values in each])


def solved(
    whole: Sums, prior: Tensor | None = None, *, least: Tensor | None = None, without: Sums | None = None
) -> Tensor:
    """Map that images add up to: in each voxel the sum over its weight, transformed back.

    Parameters
    ----------
    whole : Backprojection or StoredSums
        With all symmetry applied.
    prior : Tensor (shells,), optional
        Added to the weights: reciprocal of the signal's power.
    least : Tensor (shells,), optional
        Weight that each voxel counts for at least.
    without : Backprojection or StoredSums, optional
        Sums of some of the images, which are to have no share.

    Returns
    -------
    Tensor (box, box, box)

    Notes
    -----
    Few planes are worked on at a time, and transformed along y at once and cut to the box: what is held is a
    quarter of the padded transform.
    """
    if without is not None and _sizes(whole) != _sizes(without):
        raise ShapeError("sums of different radii cannot be subtracted")
    spectrum = _along_y(whole, prior, least, without)
    volume = _along_z_and_x(spectrum, _sizes(whole)[2])
    del spectrum
    return volume.div_(_envelope(len(volume), _sizes(whole)[2], volume))


def solved_towards(whole: Sums, prior: Tensor, expected: Tensor) -> Tensor:
    """Map of greatest posterior where the signal is expected to be a given one, and not nothing.

    Parameters
    ----------
    whole : Backprojection or StoredSums
        With all symmetry applied.
    prior : Tensor (shells,)
        Reciprocal of the power of what may be wrong in the expected map.
    expected : Tensor (box, box, box // 2 + 1), complex
        Half-spectrum of the expected map.

    Returns
    -------
    Tensor (box, box, box)

    Notes
    -----
    With sums s of weight w, ``(s + p m) / (w + p)`` in each voxel: the map without expectation, and of the
    expected one the part ``p / (w + p)``, which is smooth enough to be taken on the box's own voxels.
    """
    limit, box, padded_box = _sizes(whole)
    half = box // 2
    places = torch.arange(-half, half + 1)
    nearest = (places * (padded_box / box)).round().long()
    reach = int((nearest.abs() <= limit).sum()) // 2
    prior = _extended(prior.float(), box).to(expected.real)
    index = (frequency_radius((box,) * 3) * box).round().long().to(expected.device)
    added = prior[index.clamp_max(len(prior) - 1)]
    weights = torch.zeros_like(added)
    columns = nearest[half : half + reach + 1]
    rows = torch.arange(-reach, reach + 1)
    for z in rows.tolist():
        at = round(z * padded_box / box)
        plane = _planes(whole, range(at, at + 1))[0, :, :, 2]
        weights[z % box, rows % box, : reach + 1] = plane[(nearest[half - reach : half + reach + 1] + limit)][
            :, columns
        ].clamp_min(0)
    total = weights + added
    # Where nothing was seen and nothing is known, there is nothing.
    part = torch.where(total > 0, added / total.clamp_min(torch.finfo(total.dtype).tiny), 0)
    return solved(whole, prior) + irfft3(expected * part, shape=(box,) * 3)


def _along_y(whole: Sums, prior: Tensor | None, least: Tensor | None, without: Sums | None) -> Tensor:
    """Quotients transformed along y and cut to the box: (y, z, x), z and x yet in Fourier space."""
    limit, box, n = _sizes(whole)
    reach = min(limit, (n - 1) // 2)
    near = torch.arange(-reach, reach + 1)
    inner = (torch.arange(box) - box // 2) % n
    like = _planes(whole, range(1))
    out = torch.zeros(box, len(near), reach + 1, dtype=like.dtype.to_complex(), device=like.device)

    def transform(z: range) -> None:
        quotient = _quotient(whole, z, prior, least, without)[:, near + limit, : reach + 1]
        rows = quotient.new_zeros(len(z), reach + 1, n)
        rows[..., near % n] = quotient.transpose(1, 2)
        out[:, z.start + reach : z.stop + reach] = ifft1(rows)[..., inner].permute(2, 0, 1)

    in_threads(transform, slabs(limit, reach))
    return out


def _along_z_and_x(spectrum: Tensor, n: int) -> Tensor:
    """Map (z, y, x) of what `_along_y` gives, transformed along the other axes and cut to the box."""
    box, reach = len(spectrum), spectrum.shape[2] - 1
    near = torch.arange(-reach, reach + 1)
    inner = (torch.arange(box) - box // 2) % n
    out = spectrum.real.new_zeros(box, box, box)

    def transform(y: Tensor) -> None:
        padded = spectrum.new_zeros(len(y), n, n // 2 + 1)
        padded[:, near % n, : reach + 1] = spectrum[y]
        out[:, y] = irfft2(padded, shape=(n, n))[:, inner][:, :, inner].transpose(0, 1)

    in_threads(transform, torch.arange(box).split(_ROWS))
    return out


def _quotient(
    whole: Sums, z: range, prior: Tensor | None, least: Tensor | None, without: Sums | None
) -> Tensor:
    """Planes (z, y, x), complex, of the sums over their weights."""
    planes = _planes(whole, z)
    if without is not None:
        planes = planes - _planes(without, z)
    if planes.device.type == "cpu":
        _, box, padded_box = _sizes(whole)
        none = torch.zeros(1)
        lowest, added = _of_one_length(
            *(none if each is None else each.to(planes) for each in (least, prior))
        )
        out = planes.new_zeros(*planes.shape[:3], 2)
        kernels.divide(planes.numpy(), z.start, box / padded_box, lowest, added, out.numpy())
        return torch.view_as_complex(out)
    shells = _shells_of_planes(whole, z)
    # Rounding leaves less than nothing where all weight was the part's.
    weights = planes[..., 2].clamp_min(0)
    if least is not None:
        weights = weights.maximum(least.to(weights)[shells.clamp_max(len(least) - 1)])
    if prior is not None:
        weights = weights + prior.to(weights)[shells.clamp_max(len(prior) - 1)]
    values = torch.view_as_complex(planes[..., :2].contiguous())
    return torch.where(weights > 0, values / weights.clamp_min(torch.finfo(weights.dtype).tiny), 0)


def _of_one_length(*values: Tensor) -> list[np.ndarray]:
    """Values of shells, the last one of each going on."""
    longest = max(map(len, values))
    return [_extended(each, longest).numpy() for each in values]


def _extended(values: Tensor, n: int) -> Tensor:
    return torch.cat([values, values[-1:].expand(n - len(values))])


def _sizes(sums: Sums) -> tuple[int, int, int]:
    """Limit, box and padded box."""
    held = sums if isinstance(sums, StoredSums) else sums.sums
    return held.limit, held.box, held.padded_box


def _shells(sums: Sums) -> int:
    """Shells that sums reach, the first included."""
    limit, box, padded_box = _sizes(sums)
    return int(limit * box / padded_box + 0.5) + 1


def _planes(sums: Sums, z: range) -> Tensor:
    """Planes (z, y, x, 3) of sums."""
    return sums.planes(z) if isinstance(sums, StoredSums) else folded_planes(sums.sums, z)


def _shells_of_planes(sums: Sums, z: range) -> Tensor:
    """Shell (z, y, x), int64, of the voxels of planes."""
    limit, box, padded_box = _sizes(sums)
    device = sums.device if isinstance(sums, StoredSums) else sums.sums.data.device
    planes, axis = (
        torch.arange(z.start, z.stop, device=device),
        torch.arange(-limit, limit + 1, device=device),
    )
    square = planes.square()[:, None, None] + axis.square()[:, None] + axis[limit:].square()
    return (square.sqrt() * (box / padded_box)).round().long()


def save_sums(path: Path, sums: Backprojection) -> None:
    """Write symmetrised sums as one array, which `load_sums` maps into memory instead of reading it."""
    with atomic_path(path, durable=False) as temporary, temporary.open("wb") as file:
        np.save(file, sums.sums.data.cpu().numpy())


def load_sums(path: Path, box: int, padded_box: int, *, device: str = "cpu") -> Backprojection:
    """Sums that `save_sums` wrote, of images of `box` pixels; not to be added to in place.

    Raises
    ------
    FileFormatError
        If the file holds none.
    """
    try:
        data = np.load(path, mmap_mode="c")
    except (OSError, ValueError) as error:
        raise FileFormatError("holds no sums of slices", path=path) from error
    return Backprojection(SliceAccumulator(torch.from_numpy(data).to(device), box, padded_box))


def joined(own: Tensor, other: Tensor, *, radius: float) -> Tensor:
    """Map (d, d, d) of one half set with low frequencies, below a radius in Fourier pixels, of both.

    What is that coarse is common to both half sets anyhow; sharing it keeps them in one orientation.
    """
    shape = own.shape
    low = frequency_radius(tuple(shape), dtype=torch.float64).to(own.device) * shape[0] < radius
    spectrum = rfft3(own)
    return irfft3(torch.where(low, (spectrum + rfft3(other)) / 2, spectrum), shape=shape)


def believed(correlation: Tensor, *, least: float = 0.03) -> Tensor:
    """Correlation (shells,) up to where it first falls to nothing, and zero from there on."""
    seen = (correlation[1:] > least).int().cumprod(0)
    return torch.cat([correlation[:1].clamp_min(least), correlation[1:] * seen]).clamp(0, 1)


def radius_at(correlation: Tensor, threshold: float) -> int:
    """Last shell before a correlation (shells,) first falls below a threshold, 0 if it does at once."""
    return int((correlation[1:] >= threshold).int().cumprod(0).sum())
