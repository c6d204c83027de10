"""The molecules: models or maps turned into potentials against ice, whole and broken."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import gemmi
import numpy as np
import torch
from numpy.lib.format import open_memmap
from numpy.random import SeedSequence
from numpy.typing import NDArray
from scipy.ndimage import gaussian_filter
from torch import Tensor

from halfmap.errors import ParameterError, ShapeError
from halfmap.io.atomic import atomic_path
from halfmap.io.models import AtomicModel, read_model, scattering_coefficients
from halfmap.io.mrc import read_header, read_mrc, write_mrc
from halfmap.log import log
from halfmap.ops import grids, planewise
from halfmap.ops.potential import atomic_volume
from halfmap.ops.threads import one_torch_thread
from halfmap.steps.simulate.projector import Planes, fill_transform, transform_shape
from halfmap.steps.simulate.solvent import ICE_POTENTIAL_V, solvent_planes, solvent_size

_FINER = 1.125
"""Volumes are computed with pixels finer by this, so that projections are sound up to Nyquist."""

_HYDROGEN_BOND_A = 1.06
_ROOM_A = 16.0
"""Of a box beyond a molecule's outermost atoms, for their hydration layer."""

_MAP_SUFFIXES = (".mrc", ".map", ".ccp4")
_MAP_CONTRAST_V = 3.7
"""Mean potential against ice that a map of unknown scale is given inside its molecule, as proteins have."""
_SMOOTHING_A2 = 400.0
"""B-factor of the blurred copy that tells a molecule's inside from outside."""

BROKEN_VARIANTS = 3
"""Ways in which a molecule breaks in a data set."""


@dataclass(frozen=True)
class State:
    """One conformation of the molecule.

    Parameters
    ----------
    number : int
        From 0.
    sources : tuple of str
        Model or map; two for a state between two models.
    mix : float
        Part of the way from the first to the second model.
    """

    number: int
    sources: tuple[str, ...]
    mix: float = 0.0


@dataclass(frozen=True)
class Specimen:
    """Prepared states, as the workers use them.

    Parameters
    ----------
    folder : Path
        Where the padded transforms lie, ``state001.npy`` and so on.
    box : int
        Voxels of the truth maps along an edge.
    pixel_size : float
        Of the truth maps in Å.
    fractions : tuple of float
        Share of each whole state.
    n_broken : int
        Fragments, which follow the whole states.
    diameter : float
        Longest distance in a state, Å.
    sphere : float
        Diameter of the sphere about the centre that holds all states, Å.
    """

    folder: Path
    box: int
    pixel_size: float
    fractions: tuple[float, ...]
    n_broken: int
    diameter: float
    sphere: float = 0.0

    @property
    def fine_box(self) -> int:
        """Voxels along an edge of the volumes that projections are made from."""
        return _fine_box(self.box)

    @property
    def fine_pixel(self) -> float:
        """Their size in Å."""
        return self.box * self.pixel_size / self.fine_box

    def transform(self, state: int) -> NDArray[np.complex64]:
        """Padded transform of a state, counted from 0, as a memory map."""
        return np.load(state_file(self.folder, state), mmap_mode="r")


def state_file(folder: Path, state: int) -> Path:
    """File of a state's padded transform; states are counted from 0, files from 1."""
    return folder / f"state{state + 1:03d}.npy"


def truth_file(folder: Path, state: int) -> Path:
    """Potential map of a state."""
    return folder / ("truth_map.mrc" if state == 0 else f"truth_map_class{state + 1:03d}.mrc")


def plan_states(sources: Sequence[Path], *, morph_states: int) -> list[State]:
    """List the conformations to prepare: each source, or steps between two models."""
    names = [str(path) for path in sources]
    if morph_states:
        mixes = np.linspace(0, 1, morph_states).tolist()
        return [State(i, (names[0], names[1]), mix) for i, mix in enumerate(mixes)]
    return [State(i, (name,)) for i, name in enumerate(names)]


def choose_box(diameter: float, pixel_size: float) -> int:
    """Even box of 1.5 times the diameter."""
    return 2 * math.ceil(1.5 * diameter / pixel_size / 2)


@dataclass(frozen=True)
class Extent:
    """How large a molecule is: longest distance in Å; number of atoms, or longest edge of a map in voxels.

    The sphere, of a diameter in Å, is about the centre of mass.
    """

    diameter: float
    sphere: float
    n_atoms: int = 0
    map_voxels: int = 0


def measure(source: Path, *, assembly: str | None) -> Extent:
    """Longest distance in a model and the sphere that holds it, or three quarters of a map's edge for both.

    Raises
    ------
    FileFormatError
        If the file cannot be read as what its suffix says.
    """
    if is_map(source):
        edge = max(read_header(source).shape)
        diameter = 0.75 * edge * _voxel(source)
        return Extent(diameter, diameter, map_voxels=edge)
    model = read_model(source, assembly=assembly)
    reach = float(np.linalg.norm(model.positions - model.centre, axis=1).max())
    return Extent(model.diameter, 2 * reach, n_atoms=len(model))


def _voxel(path: Path) -> float:
    """Voxel size of a map in Å."""
    size = read_header(path).pixel_size
    if not size:
        raise ParameterError("states no pixel size", path=path, hint="set it in the header")
    return size


def is_map(path: str | Path) -> bool:
    """Whether a file is a map by its name; models have any other name."""
    return Path(path).name.removesuffix(".gz").endswith(_MAP_SUFFIXES)


@one_torch_thread()
def prepare_state(
    state: State,
    *,
    specimen: Specimen,
    truth_folder: Path,
    truth_box: int,
    assembly: str | None,
    b_factor: float | None,
    seed: int,
) -> dict[str, Any]:
    """Compute a conformation's potential; write its padded transform and its truth map.

    Fragments come with the first conformation: it, less what lies beyond a random plane.

    Parameters
    ----------
    state : State
        Which.
    specimen : Specimen
        Says where the transforms go, the box and pixel size of the images, and how many fragments there are.
    truth_folder : Path
        Where truth maps go.
    truth_box : int
        Voxels of the truth maps over the same field; fewer than the specimen's in super-resolution.
    assembly, b_factor
        As for `halfmap.io.models.read_model`.
    seed : int
        Decides where molecules break.

    Returns
    -------
    dict
        ``state``, ``mass_kDa`` (0 for a map) and ``contrast_V``, the mean potential inside the molecule
        against ice.
    """
    edge_A = specimen.box * specimen.pixel_size
    volume, mass = potential(
        state, box=specimen.fine_box, pixel_size=specimen.fine_pixel, assembly=assembly, b_factor=b_factor
    )
    write_mrc(
        truth_file(truth_folder, state.number),
        _truth(volume, truth_box).numpy(),
        pixel_size=edge_A / truth_box,
    )
    contrast = _mean_inside(volume, edge_A)
    _store(volume, state_file(specimen.folder, state.number))
    if state.number == 0:
        for i in range(specimen.n_broken):
            fragment = _Fragment(volume, np.random.default_rng(SeedSequence(seed, spawn_key=(1, i))))
            _store(fragment, state_file(specimen.folder, len(specimen.fractions) + i))
    return {"state": state.number, "mass_kDa": mass, "contrast_V": contrast}


def _truth(volume: Tensor, box: int) -> Tensor:
    """The potential at the images' pixel size, and nothing from Nyquist on, as they have nothing there."""
    shape = (box,) * 3
    spectrum = planewise.spectrum_of_planes(iter(volume), shape=tuple(volume.shape), new_shape=shape)
    flat = grids.frequency_radius(shape[1:]).square()
    for z, along_z in enumerate(torch.fft.fftfreq(box).square()):
        spectrum[z] *= (flat + along_z < 0.25).numpy()
    return planewise.volume_of_spectrum(spectrum, shape=shape)


def _store(planes: Planes, path: Path) -> None:
    """Write a padded transform, which need not fit in memory."""
    with atomic_path(path) as temporary:
        grid = open_memmap(temporary, "w+", np.complex64, transform_shape(len(planes)))
        fill_transform(grid, planes)
        grid.flush()


def potential(
    state: State, *, box: int, pixel_size: float, assembly: str | None, b_factor: float | None
) -> tuple[Tensor, float]:
    """Potential of a state against ice in V, (box, box, box), and the molecule's mass in kDa.

    Raises
    ------
    ParameterError
        If two models to morph between do not have the same atoms, or the box is too small.
    """
    if is_map(state.sources[0]):
        return _potential_of_map(Path(state.sources[0]), box, pixel_size), 0.0
    models = [read_model(path, assembly=assembly, b_factor=b_factor) for path in state.sources]
    model = models[0] if len(models) == 1 else _between(models[0], models[1], state.mix)
    model = replace(model, positions=model.positions - models[0].centre)
    reach = float(np.abs(model.positions).max())
    if 2 * reach + _ROOM_A > box * pixel_size:
        raise ParameterError(
            f"the molecule reaches {reach:.0f} Å from its centre, its box {box * pixel_size / 2:.0f} Å",
            path=state.sources[0],
            hint=f"give a --box-size of {2 * reach + _ROOM_A:.0f} Å over the pixel size, or more",
        )
    return _potential_of_atoms(model, box, pixel_size)


def _potential_of_atoms(model: AtomicModel, fine: int, voxel: float) -> tuple[Tensor, float]:
    hydrogens = _hydrogens_per_atom(model)
    volume = atomic_volume(
        torch.from_numpy(model.positions),
        coefficients=torch.from_numpy(_coefficients(model, hydrogens)),
        shape=(fine,) * 3,
        pixel_size=voxel,
        b_factors=torch.from_numpy(model.b_factors.astype(np.float64)),
    )
    displaced = solvent_planes(model, box=fine, pixel_size=voxel)
    size = solvent_size(fine, voxel)
    spectrum = planewise.spectrum_of_planes(displaced, shape=(size,) * 3, new_shape=(fine,) * 3)
    water = planewise.volume_of_spectrum(spectrum, shape=(fine,) * 3)
    del spectrum
    volume += water.sub_(1).mul_(ICE_POTENTIAL_V)
    mass = model.mass_kDa + 1.008e-3 * float((hydrogens * model.occupancies).sum())
    return volume, mass


def _coefficients(model: AtomicModel, hydrogens: NDArray) -> NDArray:
    """Ten Gaussians per atom: its own five, and those of the hydrogens bound to it, spread over a shell."""
    table = np.zeros((119, 5, 2))
    for element in np.unique(model.elements):
        table[element] = np.stack(scattering_coefficients(int(element)), axis=-1)
    heavy = table[model.elements]
    light = np.tile(np.stack(scattering_coefficients("H"), axis=-1), (len(model), 1, 1))
    # sinc(2 pi k r), the transform of a shell of radius r, is exp(-(2 pi k r)² / 6) where it matters.
    light[..., 1] += 4 * (2 * math.pi * _HYDROGEN_BOND_A) ** 2 / 6
    light[..., 0] *= hydrogens[:, None]
    both = np.concatenate([heavy, light], axis=1)
    both[..., 0] *= model.occupancies[:, None]
    return both


def _hydrogens_per_atom(model: AtomicModel) -> NDArray:
    """Hydrogens bound to each atom: those of its residue, shared evenly by its carbons and nitrogens."""
    labels = np.char.add(np.char.add(model.chains, "/"), model.residue_numbers.astype(str))
    labels = np.char.add(labels, model.residue_names)
    _, residue = np.unique(labels, return_inverse=True)
    carriers = np.isin(model.elements, (6, 7)).astype(float)
    n_carriers = np.bincount(residue, carriers)
    names, which = np.unique(model.residue_names, return_inverse=True)
    counts = np.array([_hydrogen_count(str(name)) for name in names])[which]
    # Residues that are not tabulated have as many as proteins have per carbon and nitrogen.
    per_atom = counts / np.maximum(n_carriers[residue], 1)
    return carriers * np.where(counts < 0, 1.2, per_atom)


@lru_cache(maxsize=512)
def _hydrogen_count(residue: str) -> int:
    """Hydrogens of a residue inside its chain; -1 if it is not known."""
    known = gemmi.find_tabulated_residue(residue)
    if known is None or known.hydrogen_count <= 0:
        return -1 if known is None or not known.found() else 0
    in_chain = known.is_amino_acid() or known.is_nucleic_acid()
    return known.hydrogen_count - (2 if in_chain else 0)


def _between(first: AtomicModel, second: AtomicModel, mix: float) -> AtomicModel:
    if len(first) != len(second) or not np.array_equal(first.elements, second.elements):
        raise ParameterError(
            f"{first.name} has {len(first)} atoms and {second.name} {len(second)}, or other ones",
            hint="a morph needs two models of the same atoms in the same order",
        )
    positions = (1 - mix) * first.positions + mix * second.positions
    b_factors = (1 - mix) * first.b_factors + mix * second.b_factors
    return replace(first, positions=positions, b_factors=b_factors.astype(np.float32))


def _potential_of_map(path: Path, fine: int, voxel: float) -> Tensor:
    """Resample a map by exact band-limited interpolation; its solvent becomes 0 V, its molecule 3 V."""
    old_voxel = _voxel(path)
    volume = torch.from_numpy(np.ascontiguousarray(read_mrc(path), np.float32))
    if volume.ndim != 3 or min(volume.shape) < 8:
        raise ShapeError("is not a volume", path=path, hint="give a map of three dimensions")
    border = torch.cat(
        [face.flatten() for axis in range(3) for face in (volume.select(axis, 0), volume.select(axis, -1))]
    )
    volume = volume - border.median()
    for axis in range(3):
        n = volume.shape[axis]
        old = (torch.arange(n, dtype=torch.float64) - n // 2) * old_voxel
        new = (torch.arange(fine, dtype=torch.float64) - fine // 2) * voxel
        band = min(1.0, old_voxel / voxel)
        kernel = band * torch.sinc(band * (new[:, None] - old) / old_voxel)
        volume = torch.tensordot(kernel.float(), volume.movedim(axis, 0), dims=1).movedim(0, axis)
    log.info("%s: scaled so that the molecule has %.1f V against ice on average", path.name, _MAP_CONTRAST_V)
    return volume.contiguous() * (_MAP_CONTRAST_V / _mean_inside(volume, fine * voxel))


def _mean_inside(volume: Tensor, edge_A: float) -> float:
    """Mean over the voxels where a blurred copy says that the molecule is."""
    # exp(-B k² / 4) is a Gaussian whose variance is B / (8 pi²).
    sigma = math.sqrt(_SMOOTHING_A2 / 8) / math.pi * volume.shape[0] / edge_A
    blurred = torch.from_numpy(gaussian_filter(volume.numpy(), sigma, mode="wrap"))
    threshold = _otsu(blurred)
    inside = [plane[smooth > threshold].double() for plane, smooth in zip(volume, blurred, strict=True)]
    return float(sum(float(values.sum()) for values in inside) / sum(map(len, inside)))


def _otsu(volume: Tensor) -> float:
    """Threshold that divides the values into the two classes of least variance (Otsu 1979)."""
    values = volume.flatten()[:: max(1, volume.numel() // 2_000_000)].numpy()
    counts, edges = np.histogram(values, 512)
    centres = (edges[1:] + edges[:-1]) / 2
    below = np.cumsum(counts)[:-1]
    above = below[-1] + counts[-1] - below
    sums = np.cumsum(counts * centres)
    means = sums[:-1] / np.maximum(below, 1), (sums[-1] - sums[:-1]) / np.maximum(above, 1)
    return float(edges[1:-1][np.argmax(below * above * (means[0] - means[1]) ** 2)])


class _Fragment:
    """Planes of a molecule without a third to two thirds of it, which lie beyond a random plane."""

    def __init__(self, volume: Tensor, rng: np.random.Generator) -> None:
        self._volume = volume
        normal = rng.normal(size=3)
        self._normal = (normal / np.linalg.norm(normal)).astype(np.float32).tolist()
        n = len(volume)
        counts = np.zeros(8 * n)
        for z in range(n):
            # The farthest corner is sqrt(3) / 2 boxes away.
            bins = ((self._height(z) / (1.75 * n) + 0.5) * len(counts)).long()
            counts += np.bincount(bins.flatten(), volume[z].clamp(min=0).flatten(), len(counts))
        kept = rng.uniform(1 / 3, 2 / 3)
        share = np.cumsum(counts) / counts.sum()
        self._cut = float((np.searchsorted(share, kept) / len(counts) - 0.5) * 1.75 * n)

    def __len__(self) -> int:
        return len(self._volume)

    def __getitem__(self, z: int) -> Tensor:
        return self._volume[z] * torch.sigmoid((self._cut - self._height(z)) / 0.7)

    def _height(self, z: int) -> Tensor:
        """Of the voxels of plane z along the normal."""
        along = torch.arange(len(self), dtype=torch.float32) - len(self) // 2
        x, y, up = self._normal
        return x * along + (y * along[:, None] + up * float(along[z]))


def _fine_box(box: int) -> int:
    return 2 * math.ceil(_FINER * box / 2)
