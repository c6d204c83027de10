"""Particle images for the search: checked before any work, read in file order, kept in half precision."""

from __future__ import annotations

import copy
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from halfmap.data import ParticleSet
from halfmap.errors import FileFormatError, ParameterError, ResourceError, ShapeError, TableError
from halfmap.io.images import ImageStack
from halfmap.log import log, report
from halfmap.ops import grids

Item = TypeVar("Item")
Index = NDArray[np.intp]
Transform = Callable[[Tensor], Tensor]

IMAGE, BOX = "rlnImageName", "rlnImageSize"

_SMALLEST_BOX = 16
_CHECKED_BYTES = 1 << 26
"""Of the images that `ParticleImages.check` holds at a time."""

_NAMED_ROWS = 10
"""How many faulty rows an error lists."""

_OUTLIER = 10.0
"""Strength of an image over the median that no particle has: one in a thousand adds a tenth to the noise."""

_HEADER_TOLERANCE = 1e-3
"""Relative difference of pixel sizes that rounding in a header explains."""


class ParticleImages:
    """Images of a table of particles, read in the order of their stacks and kept in half precision.

    Parameters
    ----------
    particles : ParticleSet
        Extracted particles; the images are numbered as its rows, from 0.
    project : path
        Folder that the names of the stacks are relative to.
    memory : int
        Bytes that images may be kept in. The first ones asked for are kept, as many as fit, and the others
        are read from disk each time.
    transform : callable, optional
        What is made of images (b, box, box), float32: a tensor (b, ...), float32 or complex64, on the CPU.
        It treats every image alone. Half precision keeps 11 bits of each number of its result, so a strong
        background is for it to take away. Without one, the images are kept as they are.

    Attributes
    ----------
    box : int
        Side of the images in pixels, even.
    pixel_size : float
        Å.

    Raises
    ------
    TableError
        If image names, CTF columns or values are missing or not finite, optics groups differ in box or
        pixel size, a stack is missing, broken, of another box or shorter than a row asks for, or the boxes
        are not square, odd or smaller than 16 pixels.
    ParameterError
        If the memory is negative.

    Notes
    -----
    Making one reads the table and the header of every stack. `check` reads the images themselves once,
    which is the only way to say before any work that none of them is broken; as it goes it fills the memory,
    so that only what does not fit there is read a second time. A job that resumes need not check again.

    `get` rounds to half precision also what it has just read: its result does not depend on what is kept, nor
    on the order of the calls. Each image is first multiplied by a power of two that brings its largest number
    just below 2**15, so that any scale fits, and what is 2**29 times weaker still keeps its 11 bits.

    A copy in another process (by pickle) begins with nothing kept. Several threads may read at a time.
    """

    def __init__(
        self, particles: ParticleSet, project: Path, *, memory: int, transform: Transform | None = None
    ) -> None:
        if memory < 0:
            raise ParameterError(f"{memory} bytes of memory for images cannot be", hint="give 0 or more")
        self._table = particles.path
        self.pixel_size = _check_table(particles)
        self._stacks = _open_stacks(particles, project)
        self.box = self._check_box(particles)
        self._memory = memory
        self._transform = transform
        self._kept = _Kept(len(particles), memory)

    def __len__(self) -> int:
        """Count the particles."""
        return len(self._stacks)

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_kept": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._kept = _Kept(len(self), self._memory)

    def transformed_by(self, transform: Transform | None) -> Self:
        """Give the same images under another transform, which get the memory: this object keeps none now."""
        other = copy.copy(self)
        other._transform = transform
        self._kept = _Kept(len(self), 0)
        return other

    def check(self) -> None:
        """Read every image once, look for broken ones, and keep as many as fit.

        Raises
        ------
        TableError
            If images are not finite, blank, or 10 times as strong as others; the first is named with its row
            and stack.

        Warns
        -----
        In the log, if backgrounds, taken outside the circle inscribed in the box, are far from mean 0 and
        standard deviation 1, or if headers state other pixel sizes than the table.
        """
        self._compare_pixel_sizes()
        size = max(1, _CHECKED_BYTES // (4 * self.box**2))
        outside = (grids.radius((self.box, self.box)).flatten() > self.box / 2).nonzero().squeeze(1)
        faulty: list[NDArray[np.intp]] = []
        background, whole = np.empty((len(self), 2), np.float32), np.empty((len(self), 2), np.float32)
        batches = list(self.batches(np.arange(len(self)), size))
        loaded = prefetched(map(self._load, batches))
        for index, images in zip(report(batches, "checking particle images"), loaded, strict=True):
            faulty.append(index[_faults(images)])
            pixels = images.flatten(1).index_select(1, outside)
            mean = pixels.mean(dim=1, keepdim=True)
            spread = torch.linalg.vector_norm(pixels - mean, dim=1, keepdim=True) / pixels.shape[1] ** 0.5
            background[index] = torch.cat([mean, spread], dim=1)
            whole[index] = torch.stack(torch.var_mean(images, dim=(1, 2)), dim=1)
            if self._kept.room and not len(faulty[-1]):
                self._prepare(index, images)
        self._refuse(np.sort(np.concatenate(faulty)))
        self._refuse_outliers(*whole.T)
        self._warn_of_backgrounds(*background.T)

    def read(self, index: Index) -> Tensor:
        """Images as they are in the files.

        Parameters
        ----------
        index : array (b,) of int
            Particles, in any order.

        Returns
        -------
        Tensor (b, box, box)
            float32 on the CPU.

        Raises
        ------
        TableError
            If an image is blank or not finite.
        FileFormatError
            If a stack has become shorter or cannot be read any more.
        """
        images = self._load(index)
        self._refuse(index[_faults(images)])
        return images

    def get(self, index: Index) -> Tensor:
        """Transformed images, rounded to half precision, from memory where they are kept.

        Parameters
        ----------
        index : array (b,) of int
            Particles, in any order.

        Returns
        -------
        Tensor (b, ...)
            float32 or complex64 on the CPU, as the transform gives.

        Raises
        ------
        TableError, FileFormatError
            As `read`, and if what the transform gives is not finite.
        """
        places = self._kept.find(index)
        missing = places < 0
        if len(index) and not missing.any():
            return self._kept.take(places).whole()
        fresh = self._prepare(index[missing], self.read(index[missing])).whole()
        if missing.all():
            return fresh
        result = fresh.new_empty((len(index), *fresh.shape[1:]))
        result[torch.from_numpy(missing)] = fresh
        result[torch.from_numpy(~missing)] = self._kept.take(places[~missing]).whole()
        return result

    def batches(self, index: Index, size: int) -> Iterator[Index]:
        """Particles in the order of the files, `size` at a time, so that disks read from front to back."""
        ordered = self._stacks.in_file_order(index)
        for first in range(0, len(ordered), size):
            yield ordered[first : first + size]

    def stream(self, index: Index, size: int) -> Iterator[tuple[Index, Tensor]]:
        """Go through `batches` with their transformed images, the next ones being read while one is used."""
        return prefetched((batch, self.get(batch)) for batch in self.batches(index, size))

    def _load(self, index: Index) -> Tensor:
        return torch.from_numpy(self._stacks.read(index))

    def _prepare(self, index: Index, images: Tensor) -> _Halves:
        """Transform and round images, and keep what there is room for."""
        halves = _Halves.of(images if self._transform is None else self._transform(images))
        large = np.flatnonzero(~np.isfinite(halves.scales.numpy()))
        if len(large):
            row = int(index[large[0]])
            message = f"{self._stacks.name(row)} holds numbers too large to compute with"
            raise TableError(message, path=self._table, row=row + 1, hint="extract it again, normalised")
        self._kept.keep(index, halves)
        return halves

    def _check_box(self, particles: ParticleSet) -> int:
        height, width = self._stacks.shape
        hint = "extract the particles again"
        if height != width:
            message = f"the images are {width} x {height} px, not square"
            raise TableError(message, path=self._table, hint=hint)
        if width % 2 or width < _SMALLEST_BOX:
            message = f"the box of {width} px is odd" if width % 2 else f"the box of {width} px is too small"
            even = f"{hint} in an even box of at least {_SMALLEST_BOX} px"
            raise TableError(message, path=self._table, hint=even)
        if BOX in particles.optics.columns and (stated := particles.box_size) != width:
            message = f"states a box of {stated} px, but the stacks have {width} px"
            raise TableError(message, path=self._table, hint="is it the table of other stacks?")
        return width

    def _compare_pixel_sizes(self) -> None:
        sizes = [(path, size) for path, size in self._stacks.pixel_sizes() if size is not None]
        others = [
            (path, size)
            for path, size in sizes
            if abs(size - self.pixel_size) > _HEADER_TOLERANCE * self.pixel_size
        ]
        if others:
            message = (
                "%s: its header states %.5g Å/px, the table %.5g, which is used (%d of %d stacks differ)"
            )
            log.warning(message, *others[0], self.pixel_size, len(others), len(sizes))

    def _refuse(self, faulty: Index) -> None:
        """Raise the error of images that are blank or not finite, if there are any."""
        if not len(faulty):
            return
        row = int(faulty[0])
        finite = bool(self._load(faulty[:1]).isfinite().all())
        what = "is blank (all its pixels are equal)" if finite else "holds NaN or infinity"
        message = f"{self._stacks.name(row)} {what}"
        hint = "extract it again, or leave the row out"
        if len(faulty) > 1:
            rows = ", ".join(str(other + 1) for other in faulty[1 : _NAMED_ROWS + 1])
            more = len(faulty) - 1 - _NAMED_ROWS
            message += f", and rows {rows}{f' and {more} more' if more > 0 else ''} are bad as well"
            hint = "extract them again, or leave these rows out"
        raise TableError(message, path=self._table, row=row + 1, hint=hint)

    def _refuse_outliers(self, variance: NDArray[np.float32], mean: NDArray[np.float32]) -> None:
        """Raise the error of images that are far stronger than all others, if there are any."""
        strength = np.sqrt(variance + (mean - np.median(mean)) ** 2)
        times = strength / np.median(strength)
        off = np.flatnonzero(times > _OUTLIER)
        if len(off):
            raise TableError(
                f"{self._stacks.name(int(off[0]))} is {times[off[0]]:.0f} times as strong as others"
                + (f", and {len(off) - 1} more are too strong" if len(off) > 1 else ""),
                path=self._table,
                row=int(off[0]) + 1,
                hint="normalise as `halfmap extract` does, or leave such rows out",
            )

    def _warn_of_backgrounds(self, mean: NDArray[np.float32], spread: NDArray[np.float32]) -> None:
        # Neighbours and the edges of carbon change a background by less than this.
        off = np.flatnonzero((np.abs(mean) > 1) | (spread < 1 / 3) | (spread > 3))
        if not len(off):
            return
        log.warning(
            "the background of %d of %d particles is not normalised to mean 0 and standard deviation 1: "
            "the medians are %.3g and %.3g, row %d has %.3g and %.3g; halfmap extract normalises",
            *(len(off), len(mean), np.median(mean), np.median(spread)),
            *(off[0] + 1, mean[off[0]], spread[off[0]]),
        )


def prefetched(items: Iterable[Item], *, ahead: int = 2) -> Iterator[Item]:
    """Go through items that a background thread makes, at most `ahead` more than were asked for.

    An error comes where its item would have come. The thread has ended when the generator is exhausted or
    closed; what is being made then is finished first.
    """
    iterator, end = iter(items), object()
    with ThreadPoolExecutor(1, thread_name_prefix="prefetch") as pool:
        coming = deque(pool.submit(next, iterator, end) for _ in range(ahead))
        try:
            while (item := coming.popleft().result()) is not end:
                coming.append(pool.submit(next, iterator, end))
                yield item  # type: ignore[misc] - what is not the end is an item
        finally:
            for call in coming:
                call.cancel()


@dataclass(frozen=True, eq=False)
class _Halves:
    """Tensors in half precision, each with its own power of two.

    Attributes
    ----------
    values : Tensor (n, ...) float16
        Numbers over the scale; of complex tensors real and imaginary part along a last axis.
    scales : Tensor (n,) float32
        NaN where a number was not finite.
    complex : bool
        Whether the tensors are complex.
    """

    values: Tensor
    scales: Tensor
    complex: bool

    @classmethod
    def of(cls, tensors: Tensor) -> _Halves:
        """Round float32 or complex64 tensors (n, ...)."""
        real = torch.view_as_real(tensors) if tensors.is_complex() else tensors
        low, high = _extremes(real)
        largest = torch.maximum(-low, high).numpy()
        # Scales of denormal numbers would overflow; those are zero to us.
        exponent = np.maximum(np.frexp(largest)[1], -100) - 15
        scales = np.where(np.isfinite(largest), np.ldexp(np.float32(1), exponent), np.float32(np.nan))
        scale = torch.from_numpy(scales)
        values = (real.flatten(1) * (1 / scale)[:, None]).half().reshape(real.shape)
        return cls(values, scale, tensors.is_complex())

    def whole(self) -> Tensor:
        """Tensors in single precision."""
        values = self.values.float()
        values.flatten(1).mul_(self.scales[:, None])
        return torch.view_as_complex(values) if self.complex else values


class _Kept:
    """Halves of the particles that were kept first, as many as fit."""

    def __init__(self, n: int, memory: int) -> None:
        self._places = np.full(n, -1, np.int32)
        self._memory = max(0, memory - self._places.nbytes)
        self._halves: _Halves | None = None
        self._used = 0
        self._lock = threading.Lock()

    @property
    def room(self) -> bool:
        """Whether more may fit."""
        return self._memory > 0 and (self._halves is None or self._used < len(self._halves.scales))

    def find(self, index: Index) -> NDArray[np.int32]:
        """Where particles are kept, -1 where they are not."""
        return self._places[index]

    def take(self, places: NDArray[np.int32]) -> _Halves:
        """Halves at some places."""
        assert self._halves is not None
        where = torch.from_numpy(places.astype(np.int64))
        values, scales = (part.index_select(0, where) for part in (self._halves.values, self._halves.scales))
        return _Halves(values, scales, self._halves.complex)

    def keep(self, index: Index, halves: _Halves) -> None:
        """Keep particles for which there is room and that are not kept yet."""
        if not self.room or not len(index):
            return
        with self._lock:
            if self._halves is None:
                self._halves = self._allocate(halves)
            distinct, first = np.unique(index, return_index=True)
            first = first[self._places[distinct] < 0][: len(self._halves.scales) - self._used]
            stop = self._used + len(first)
            where, place = torch.from_numpy(first), slice(self._used, stop)
            torch.index_select(halves.values, 0, where, out=self._halves.values[place])
            torch.index_select(halves.scales, 0, where, out=self._halves.scales[place])
            # Last, so that other threads find only what is there.
            self._places[index[first]] = np.arange(self._used, stop, dtype=np.int32)
            self._used = stop

    def _allocate(self, halves: _Halves) -> _Halves:
        """Room for as many like these as fit; the system gives the memory as it is written."""
        each = 2 * halves.values[0].numel() + 4
        n = min(len(self._places), self._memory // each)
        if n < len(self._places):
            log.info("%d of %d particle images fit in %.2g GB", n, len(self._places), self._memory / 1e9)
        try:
            values = torch.empty((n, *halves.values.shape[1:]), dtype=torch.float16)
        except RuntimeError as error:
            message = f"the system does not give {n * each / 1e9:.1f} GB of memory for particle images"
            raise ResourceError(message, hint="keep fewer in memory") from error
        return _Halves(values, torch.empty(n), halves.complex)


class _Stacks(ImageStack):
    """An `ImageStack` that also says how its images lie in the files."""

    def in_file_order(self, rows: Index) -> Index:
        return rows[np.lexsort((self._numbers[rows], self._files[rows]))]

    def name(self, row: int) -> str:
        return f"image {self._numbers[row] + 1} of {self._headers[self._files[row]].path}"

    def pixel_sizes(self) -> list[tuple[Path, float | None]]:
        return [(header.path, header.pixel_size) for header in self._headers]


def _check_table(particles: ParticleSet) -> float:
    """Check what needs no files, and give the pixel size."""
    if IMAGE not in particles.rows.columns:
        message = f"the particles have no images (_{IMAGE})"
        raise TableError(message, path=particles.path, hint="extract them first: halfmap extract")
    pixel_size = particles.pixel_size
    if BOX in particles.optics.columns:
        _ = particles.box_size
    _ = particles.ctf
    return pixel_size


def _open_stacks(particles: ParticleSet, project: Path) -> _Stacks:
    """Read all headers; an error of a stack names the first row that asks for it."""
    names = particles.rows[IMAGE]
    try:
        return _Stacks(names, root=project, table=particles.path)
    except (FileFormatError, ShapeError) as error:
        files = names.str.split("@").list.last()
        row = next((i for i, file in enumerate(files) if project / file == error.path), None)
        if row is None:
            raise
        missing = not (project / files[row]).exists()
        message = f"its image stack {error.path} {'is not there' if missing else error.message}"
        hint = "extract the particles again, or copy the stack to that place" if missing else error.hint
        raise TableError(message, path=particles.path, row=row + 1, hint=hint) from error


def _faults(images: Tensor) -> NDArray[np.bool_]:
    """Which images are blank or not finite."""
    if not len(images):
        return np.zeros(0, bool)
    low, high = _extremes(images)
    return ~(low.isfinite() & high.isfinite() & (high > low)).numpy()


def _extremes(tensors: Tensor) -> tuple[Tensor, Tensor]:
    """Smallest and largest number of each of (n, ...) tensors."""
    flat = tensors.flatten(1)
    # Along an axis torch's aminmax is five times slower than the two one by one.
    return flat.amin(dim=1), flat.amax(dim=1)
