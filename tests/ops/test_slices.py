"""Slices against loops written out, adjointness, phantoms with known projections, and RELION's projector."""

from __future__ import annotations

import math
import subprocess

import mrcfile
import numpy as np
import pytest
import torch

from halfmap.errors import ParameterError, ShapeError
from halfmap.ops import slices as sl
from halfmap.ops.fourier import fft_centred, ifft_centred
from halfmap.ops.grids import radius, ring_index
from halfmap.ops.rotations import from_euler, random_rotations

F64 = torch.float64


def noise(*shape: int, dtype: torch.dtype = F64) -> torch.Tensor:
    return torch.randn(*shape, dtype=dtype, generator=torch.Generator().manual_seed(sum(shape)))


def rotations(n: int, dtype: torch.dtype = F64) -> torch.Tensor:
    return random_rotations(n, generator=torch.Generator().manual_seed(n), dtype=dtype)


def plain_extract(
    volume: np.ndarray, rotation: np.ndarray, padding: float, size: int, radius_px: float
) -> np.ndarray:
    """A slice by definition: the full spectrum of the padded box by its sum, eight neighbours a sample."""
    box = volume.shape[0]
    padded = round(box * padding)
    scale, reach = padded / box, padded // 2
    k = np.arange(-reach, reach + 2)
    waves = np.exp(-2j * np.pi * np.outer(k, np.arange(box) - box // 2) / padded)
    spectrum = np.einsum("Zz,Yy,Xx,zyx->ZYX", waves, waves, waves, volume, optimize=True)
    slice_ = np.zeros((size, size // 2 + 1), complex)
    for i in range(size):
        ky = i if i < (size + 1) // 2 else i - size
        for kx in range(size // 2 + 1):
            position = rotation.T @ np.array([kx, ky, 0.0]) * scale
            if math.hypot(kx, ky) > radius_px or np.abs(position).max() > reach + 1e-3:
                continue
            for corner in np.ndindex(2, 2, 2):
                at = np.floor(position).astype(int) + corner
                weight = np.prod(1 - np.abs(position - at))
                # Frequencies past the last one of the padded box count as zero.
                if np.abs(at).max() <= reach:
                    slice_[i, kx] += weight * spectrum[tuple(at[::-1] + reach)]
    return slice_


CASES = [
    (8, 1.0, None, None),
    (8, 2.0, None, None),
    (9, 1.0, None, None),
    (7, 2.0, None, None),
    (8, 1.5, None, None),
    (8, 2.0, 6, None),
    (8, 2.0, None, 2.5),
    (8, 1.0, None, 8.0),
    (9, 2.0, 9, 9.0),
]


@pytest.mark.parametrize("backend", ["numba", "torch"])
@pytest.mark.parametrize("box, padding, size, radius_px", CASES)
def test_extraction_is_the_plain_loop(box, padding, size, radius_px, backend):
    volume, turns = (
        noise(box, box, box),
        torch.cat([rotations(4), from_euler(torch.tensor([[90.0, 90, 0]], dtype=F64))]),
    )
    prepared = sl.prepare_volume(volume, padding=padding, correct_gridding=False)
    found = sl.extract_slices(prepared, turns, size=size, radius_px=radius_px, backend=backend)
    n = size or box
    limit = (
        min(n / 2, round(box * padding) // 2 / (round(box * padding) / box))
        if radius_px is None
        else radius_px
    )
    for slice_, turn in zip(found.numpy(), turns.numpy(), strict=True):
        expected = plain_extract(volume.numpy(), turn, padding, n, limit)
        np.testing.assert_allclose(slice_, expected, atol=1e-10)


@pytest.mark.parametrize("gradients", [False, True])
@pytest.mark.parametrize("box, padding, radius_px", [(8, 1.0, None), (7, 2.0, None), (8, 1.5, 2.5)])
def test_bricks_hold_the_transform(box, padding, radius_px, gradients):
    volume = noise(box, box, box).requires_grad_(gradients)
    prepared = sl.prepare_volume(volume, padding=padding, radius_px=radius_px, correct_gridding=False)
    padded, m = prepared.padded_box, prepared.limit
    k, r = np.arange(-m, m + 1), np.arange(box) - box // 2
    waves = np.exp(-2j * np.pi * np.outer(k, r) / padded)
    expected = np.einsum("Zz,Yy,Xx,zyx->ZYX", waves, waves, waves[m:], volume.detach(), optimize=True)
    expected = np.pad(expected, ((1, 1), (1, 1), (0, 1)))
    bricks, values = prepared.bricks.detach().numpy(), prepared.values.detach().numpy()
    np.testing.assert_allclose(values, expected, atol=1e-12)
    for z, y, x in np.ndindex(*expected.shape):
        assert bricks[z // 2, y // 2, x, z % 2, y % 2] == values[z, y, x]
    # One brick, one cache line.
    assert prepared.bricks.data_ptr() % 64 == 0


def plain_insert(
    slices: np.ndarray,
    weights: np.ndarray,
    turns: np.ndarray,
    shape: tuple[int, ...],
    scale: float,
    radius_px: float,
) -> np.ndarray:
    """Sums (z, y, x, 4) voxel by voxel, in the layout of an accumulator."""
    sums, size, origin = np.zeros(shape), slices.shape[1], shape[0] // 2
    for slice_, weight, turn in zip(slices, weights, turns, strict=True):
        for i in range(size):
            ky = i if i < (size + 1) // 2 else i - size
            for kx in range(size // 2 + 1):
                position = turn.T @ np.array([kx, ky, 0.0]) * scale
                value = slice_[i, kx]
                if math.hypot(kx, ky) > radius_px:
                    continue
                if position[0] < 0:
                    position, value = -position, np.conj(value)
                for corner in np.ndindex(2, 2, 2):
                    x, y, z = np.floor(position).astype(int) + corner
                    share = np.prod(1 - np.abs(position - (x, y, z)))
                    sample = np.array([value.real, value.imag, weight[i, kx], 0])
                    sums[z + origin, y + origin, x] += share * sample
    return sums


@pytest.mark.parametrize("backend", ["numba", "torch"])
@pytest.mark.parametrize(
    "box, padding, radius_px", [(8, 1.0, 4.0), (8, 2.0, 4.0), (7, 2.0, 3.0), (8, 1.5, 2.5)]
)
def test_insertion_is_the_plain_loop(box, padding, radius_px, backend):
    turns = rotations(5)
    slices = torch.view_as_complex(noise(5, box, box // 2 + 1, 2))
    weights = noise(5, box, box // 2 + 1) ** 2
    sums = sl.SliceAccumulator.empty(box, padding=padding, dtype=F64)
    given = slices.clone(), weights.clone(), turns.clone()
    out = sl.insert_slices(slices, turns, out=sums, weights=weights, radius_px=radius_px, backend=backend)
    assert out is sums
    assert torch.equal(slices, given[0]) and torch.equal(weights, given[1]) and torch.equal(turns, given[2])
    expected = plain_insert(
        slices.numpy(),
        weights.numpy(),
        turns.numpy(),
        tuple(sums.data.shape),
        sums.voxels_per_pixel,
        radius_px,
    )
    np.testing.assert_allclose(sums.data.numpy(), expected, atol=1e-12)
    # A second call adds; without weights each sample weighs one.
    sl.insert_slices(slices, turns, out=sums, radius_px=radius_px, backend=backend)
    np.testing.assert_allclose(
        sums.values.numpy(), 2 * (expected[..., 0] + 1j * expected[..., 1]), atol=1e-12
    )
    inside = sum(
        math.hypot(kx, ky) <= radius_px
        for kx in range(box // 2 + 1)
        for ky in range(-(box // 2), (box + 1) // 2)
    )
    assert (sums.weights.sum() - expected[..., 2].sum()).item() == pytest.approx(5 * inside)


@pytest.mark.parametrize("backend", ["numba", "torch"])
@pytest.mark.parametrize("dtype, tolerance", [(F64, 1e-13), (torch.float32, 1e-5)])
@pytest.mark.parametrize("padding, radius_px", [(1.0, None), (2.0, None), (2.0, 7.3), (1.0, 16.0)])
def test_insertion_is_adjoint_to_extraction(padding, radius_px, dtype, tolerance, backend):
    box, turns = 16, rotations(20, dtype)
    prepared = sl.prepare_volume(noise(box, box, box, dtype=dtype), padding=padding)
    cut = sl.extract_slices(prepared, turns, radius_px=radius_px, backend=backend)
    slices = torch.view_as_complex(noise(20, box, box // 2 + 1, 2, dtype=dtype))
    sums = sl.SliceAccumulator.empty(box, padding=padding, dtype=dtype)
    sl.insert_slices(slices, turns, out=sums, radius_px=radius_px, backend=backend)
    left = (cut.conj() * slices).real.double().sum()
    right = (prepared.values.conj() * sums.values).real.double().sum()
    # Relative to the size that the sums would have if nothing cancelled.
    assert abs(left - right) < tolerance * cut.norm() * slices.norm()


@pytest.mark.parametrize("radius_px", [None, 5.0, 24.0])
def test_bodies_agree_in_single_precision(radius_px):
    box, turns = 24, rotations(30, torch.float32).reshape(5, 6, 3, 3)
    prepared = sl.prepare_volume(noise(box, box, box, dtype=torch.float32))
    a, b = (
        sl.extract_slices(prepared, turns, radius_px=radius_px, backend=name) for name in ("numba", "torch")
    )
    assert a.shape == (5, 6, box, box // 2 + 1) and a.dtype == torch.complex64
    # Positions up to 24 voxels are rounded to 2e-6, and so are interpolation weights.
    assert (a - b).norm() < 1e-5 * a.norm()
    sums = [sl.SliceAccumulator.empty(box) for _ in range(2)]
    for name, out in zip(("numba", "torch"), sums, strict=True):
        sl.insert_slices(a, turns, out=out, weights=a.abs(), radius_px=radius_px, backend=name)
    assert (sums[0].data - sums[1].data).norm() < 1e-5 * sums[1].data.norm()


def test_single_precision_is_double_to_rounding():
    volume, turns = noise(24, 24, 24), rotations(10)
    double = sl.extract_slices(sl.prepare_volume(volume), turns)
    single = sl.extract_slices(sl.prepare_volume(volume.float()), turns.float())
    assert (double - single).norm() < 1e-5 * double.norm()


@pytest.mark.parametrize("backend", ["numba", "torch"])
def test_what_is_not_a_number_stays_so(backend):
    volume = noise(8, 8, 8)
    volume[3, 2, 5] = math.nan
    slices = sl.extract_slices(sl.prepare_volume(volume), rotations(3), backend=backend)
    assert torch.isnan(slices[:, ring_radius(8) <= 4].abs()).all()
    assert (slices[:, ring_radius(8) > 4] == 0).all()


def test_sums_do_not_depend_on_threads():
    # Large enough that the work is divided: 32768 samples a thread.
    box, n = 48, 120
    turns = rotations(n, torch.float32)
    slices = torch.view_as_complex(noise(n, box, box // 2 + 1, 2, dtype=torch.float32))
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 4):
            torch.set_num_threads(threads)
            sums = sl.SliceAccumulator.empty(box)
            sl.insert_slices(slices, turns, out=sums)
            results.append(
                (sums.data, sl.extract_slices(sl.prepare_volume(sums.data[1:49, 1:49, :48, 0]), turns))
            )
    finally:
        torch.set_num_threads(before)
    for data, cut in results[1:]:
        assert torch.equal(data, results[0][0]) and torch.equal(cut, results[0][1])


def test_extraction_has_gradients():
    turns = rotations(2)
    volume = noise(6, 6, 6)

    def cut(box: torch.Tensor, angles: torch.Tensor) -> torch.Tensor:
        slices = sl.extract_slices(sl.prepare_volume(box, padding=1.5), from_euler(angles))
        return torch.view_as_real(slices)

    angles = torch.tensor([[11.0, 47.0, 93.0], [200.0, 120.0, -33.0]], dtype=F64)
    assert torch.autograd.gradcheck(
        cut, (volume.requires_grad_(), angles.requires_grad_()), eps=1e-5, atol=1e-4
    )
    with pytest.raises(ParameterError, match="gradients"):
        sl.extract_slices(sl.prepare_volume(volume), turns, backend="numba")


def gaussians(
    box: int, points: torch.Tensor, width: float, signs: torch.Tensor | None = None
) -> torch.Tensor:
    """Sum over Gaussians of a product of one factor an axis: images for points (n, 2), volumes for (n, 3)."""
    axis = torch.arange(box, dtype=points.dtype) - box // 2
    x, *others = (torch.exp(-((axis - c[:, None]) ** 2) / (2 * width**2)) for c in points.unbind(1))
    x = x if signs is None else x * signs[:, None]
    return torch.einsum("ny,nx->yx" if len(others) == 1 else "ny,nz,nx->zyx", *others, x)


def phantom_points(n: int, reach: float) -> torch.Tensor:
    points = noise(4 * n, 3)
    return reach * points[points.norm(dim=1) < 2][:n] / 2


def interpolation_error(points: torch.Tensor, padded: int) -> float:
    """Relative error that linear interpolation makes of points, with the envelope divided out.

    Sampling the transform and joining samples by lines adds to a point at x its aliases at x + m D, damped by
    the triangle's transform sinc²; each of three axes adds its own.
    """
    m = torch.tensor([i for i in range(-50, 51) if i], dtype=F64)
    x = points[..., None] / padded
    aliases = torch.sinc(x + m).pow(4).sum(dim=-1).sqrt() / torch.sinc(x[..., 0]).square()
    return aliases.square().sum(dim=-1).mean().sqrt().item()


@pytest.mark.parametrize("box, padding", [(48, 1.0), (48, 1.5), (48, 2.0), (47, 2.0), (48, 3.0)])
def test_projections_of_gaussians_are_gaussians(box, padding):
    points, width, turns = phantom_points(40, 15), 1.3, rotations(40)
    # Of either sign, or else the errors of blobs that overlap would add up.
    signs = noise(len(points)).sign()
    images = sl.project_volume(gaussians(box, points, width, signs), turns, padding=padding, batch=7)
    expected = torch.stack([gaussians(box, (points @ turn.T)[:, :2], width, signs) for turn in turns])
    expected *= width * math.sqrt(2 * math.pi)
    padded = round(box * padding)
    ratio = ((images - expected).norm() / expected.norm()).item() / interpolation_error(points, padded)
    # Interpolation is all that is wrong; a little above 1, since a blob reaches farther out than its centre.
    assert 0.9 < ratio < 1.2
    # Without the gridding correction they would be too weak by this much.
    weakness = 1 - torch.sinc(points.norm(dim=1) / padded).square().mean()
    assert abs((images * expected).sum() / expected.square().sum() - 1) < 0.3 * weakness


def test_the_sum_along_z_is_the_unrotated_projection():
    volume = gaussians(32, phantom_points(20, 8), 1.5)
    prepared = sl.prepare_volume(volume, correct_gridding=False)
    # On the grid itself nothing is interpolated, so nothing is to be corrected either.
    image = sl.project_volume(prepared, torch.eye(3, dtype=F64))
    assert (image - volume.sum(dim=0)).norm() < 1e-3 * image.norm()


def test_small_slices_are_the_centre_of_large_ones():
    prepared = sl.prepare_volume(noise(16, 16, 16))
    turns = rotations(3)
    large, small = (
        sl.extract_slices(prepared, turns),
        sl.extract_slices(prepared, turns, size=10, radius_px=4),
    )
    np.testing.assert_allclose(small[:, :5, :5].numpy(), (large * (ring_radius(16) <= 4))[:, :5, :5].numpy())
    cropped = sl.prepare_volume(noise(16, 16, 16), radius_px=4)
    assert cropped.values.shape == (19, 19, 10)
    np.testing.assert_allclose(sl.extract_slices(cropped, turns, size=10, radius_px=4).numpy(), small.numpy())


def ring_radius(size: int) -> torch.Tensor:
    k = torch.fft.fftfreq(size, 1 / size, dtype=F64)
    return torch.hypot(k[:, None], torch.arange(size // 2 + 1, dtype=F64))


def shells(a: torch.Tensor, b: torch.Tensor, box: int) -> torch.Tensor:
    """Fourier shell correlation up to Nyquist, by its definition."""
    index = ring_index((box, box, box)).flatten()
    x, y = (fft_centred(volume.double(), ndim=3).flatten() for volume in (a, b))

    def total(values: torch.Tensor) -> torch.Tensor:
        return torch.zeros(int(index.max()) + 1, dtype=F64).index_add(0, index, values)

    product = total((x * y.conj()).real)
    return (product / (total(x.abs() ** 2) * total(y.abs() ** 2)).sqrt())[: box // 2 + 1]


@pytest.mark.parametrize("with_ctf", [False, True])
def test_reconstruction_of_projections(with_ctf):
    box, n = 64, 500
    phantom = gaussians(box, phantom_points(60, 20), 1.1).float()
    turns = rotations(n, torch.float32)
    images_ft = fft_centred(sl.project_volume(phantom, turns), ndim=2)
    ctf = None
    if with_ctf:
        # Rings that differ between images, so that each fills the other's zeros.
        defocus = torch.linspace(20, 40, n)[:, None, None]
        ctf = torch.sin(defocus * ring_radius(box).float() ** 2 / box**2 * 10)
        images_ft = images_ft * ctf
    volume = sl.reconstruct(images_ft, turns, ctf=ctf, batch=150)
    correlation = shells(volume, phantom, box)
    assert correlation[: int(0.8 * box / 2) + 1].min() > 0.99
    # Not a scaled or mirrored copy. A little of the phantom's power lies beyond Nyquist's sphere.
    low = sl.reconstruct(images_ft, turns, ctf=ctf, radius_px=16)
    assert (volume - phantom).norm() < (0.1 if with_ctf else 0.05) * phantom.norm()
    # Nothing beyond the radius, but for what dividing by the envelope in real space spreads.
    beyond = ring_index((box, box, box)) > 19
    spectra = [fft_centred(each, ndim=3)[beyond].norm() for each in (low, phantom)]
    assert spectra[0] < 0.1 * spectra[1]


def test_multiplicity_makes_half_spectra_count_as_whole_ones():
    image = noise(12, 12)
    half = fft_centred(image, ndim=2)
    whole = 2 * (half.abs() ** 2 * sl.sample_multiplicity(12))[:, :-1].sum() + (half[:, -1].abs() ** 2).sum()
    assert whole.item() == pytest.approx(144 * image.square().sum().item())


def test_stretched_rotations_stay_inside():
    prepared = sl.prepare_volume(noise(12, 12, 12))
    stretched = rotations(20) * torch.tensor([1.3, 1.2, 1.0], dtype=F64)[:, None]
    a, b = (sl.extract_slices(prepared, stretched, radius_px=12, backend=name) for name in ("numba", "torch"))
    np.testing.assert_allclose(a.numpy(), b.numpy(), atol=1e-10)
    sheared = rotations(20) + 0.4 * noise(20, 3, 3)
    a, b = (sl.extract_slices(prepared, sheared, backend=name) for name in ("numba", "torch"))
    np.testing.assert_allclose(a.numpy(), b.numpy(), atol=1e-10)


def test_empty_batches_and_single_rotations():
    prepared = sl.prepare_volume(noise(8, 8, 8))
    for backend in ("numba", "torch"):
        assert sl.extract_slices(prepared, torch.zeros(0, 3, 3), backend=backend).shape == (0, 8, 5)
    assert sl.extract_slices(prepared, torch.eye(3)).shape == (8, 5)
    assert sl.project_volume(prepared, torch.zeros(2, 0, 3, 3)).shape == (2, 0, 8, 8)
    sums = sl.SliceAccumulator.empty(8)
    sl.insert_slices(torch.zeros(0, 8, 5, dtype=torch.complex64), torch.zeros(0, 3, 3), out=sums)
    assert sums.data.abs().max() == 0
    assert sl.finish_reconstruction(sums).abs().max() == 0


def test_regularisation_is_wieners_constant():
    sums = sl.SliceAccumulator.empty(8, padding=1.0, dtype=F64)
    sums.data[..., 0], sums.data[..., 2] = 6.0, 2.0
    # The plane x = 0 collects both Friedel mates, hence 12 and 4 there and 6 and 2 elsewhere.
    mean = (4 + 5 * 2) / 6
    for constant, added in ((0.5, 0.5 * mean), (torch.full_like(sums.weights, 7.0), 7.0)):
        volume = sl.finish_reconstruction(sums, regularisation=constant, correct_gridding=False)
        spectrum = fft_centred(volume, ndim=3)
        assert spectrum[0, 0, 0].real.item() == pytest.approx(12 / (4 + added))
        assert spectrum[3, 2, 1].real.item() == pytest.approx(6 / (2 + added))
        assert spectrum[4].abs().max() < 1e-12


def test_refuses_what_does_not_fit():
    prepared = sl.prepare_volume(noise(8, 8, 8))
    sums = sl.SliceAccumulator.empty(8)
    slices = torch.zeros(2, 8, 5, dtype=torch.complex64)
    with pytest.raises(ShapeError, match="cube"):
        sl.prepare_volume(torch.zeros(8, 8, 7))
    with pytest.raises(ParameterError, match="padding"):
        sl.prepare_volume(torch.zeros(8, 8, 8), padding=0.5)
    with pytest.raises(ParameterError, match="radius"):
        sl.prepare_volume(torch.zeros(8, 8, 8), radius_px=0)
    with pytest.raises(ShapeError, match="3, 3"):
        sl.extract_slices(prepared, torch.zeros(2, 3))
    with pytest.raises(ParameterError, match="finite"):
        sl.extract_slices(prepared, torch.full((3, 3), float("nan")))
    with pytest.raises(ParameterError, match="backend"):
        sl.extract_slices(prepared, torch.eye(3), backend="cuda")  # pyright: ignore
    with pytest.raises(ShapeError, match="fit"):
        sl.insert_slices(slices, torch.zeros(3, 3, 3), out=sums)
    with pytest.raises(ShapeError, match="weights"):
        sl.insert_slices(slices, rotations(2), out=sums, weights=torch.zeros(2, 8, 8))


@pytest.mark.relion
@pytest.mark.parametrize("padding", [1, 2])
@pytest.mark.parametrize("box", [32, 48])
def test_projections_are_relions(box, padding, tmp_path):
    volume = noise(box, box, box).float() * (radius((box, box, box)) < 0.4 * box)
    angles = torch.rand(12, 3, dtype=F64, generator=torch.Generator().manual_seed(1))
    angles = (angles * torch.tensor([360.0, 180.0, 360.0], dtype=F64)).round(decimals=4)
    with mrcfile.new(tmp_path / "map.mrc", volume.numpy()) as file:
        file.voxel_size = 1.5
    optics = ["OpticsGroup", "OpticsGroupName", "ImagePixelSize", "ImageSize", "ImageDimensionality"]
    optics += ["Voltage", "SphericalAberration", "AmplitudeContrast"]
    columns = ["ImageName", "AngleRot", "AngleTilt", "AnglePsi", "OpticsGroup"]
    rows = [f"{i + 1}@x.mrcs {a:.4f} {b:.4f} {c:.4f} 1" for i, (a, b, c) in enumerate(angles.tolist())]
    text = ""
    for name, labels, lines in (
        ("optics", optics, [f"1 one 1.5 {box} 2 300 2.7 0.1"]),
        ("particles", columns, rows),
    ):
        text += f"\n# version 30001\n\ndata_{name}\n\nloop_\n"
        text += "\n".join([f"_rln{label} #{i + 1}" for i, label in enumerate(labels)] + lines) + "\n"
    (tmp_path / "angles.star").write_text(text)
    command = [
        "relion_project",
        "--i",
        "map.mrc",
        "--ang",
        "angles.star",
        "--o",
        "out",
        "--pad",
        str(padding),
    ]
    subprocess.run(command, cwd=tmp_path, check=True, capture_output=True)
    with mrcfile.open(tmp_path / "out.mrcs") as file:
        theirs = torch.from_numpy(file.data.astype(np.float64))
    ours = sl.project_volume(volume.double(), from_euler(angles), padding=padding)
    a, b = fft_centred(ours, ndim=2), fft_centred(theirs, ndim=2)
    index = ring_index((box, box))
    for shell in range(int(0.8 * box / 2) + 1):
        ring = index == shell
        # RELION writes single precision: 24 bits of the strongest pixel. Nothing is left for interpolation.
        assert (a - b)[:, ring].norm() < 1e-6 * b[:, ring].norm()
    assert torch.equal(ifft_centred(a, shape=(box, box)).round(decimals=6), ours.round(decimals=6))
