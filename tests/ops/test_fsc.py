"""Shell correlations against plain sums, known signal-to-noise ratios, and RELION's postprocessing."""

from __future__ import annotations

import shutil
import subprocess

import mrcfile
import numpy as np
import pytest
import torch

from halfmap.errors import ParameterError, ShapeError
from halfmap.ops import fourier, fsc, grids, masks


def noise(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def full_spectrum_correlation(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    fa, fb = np.fft.fftn(a), np.fft.fftn(b)
    n = max(a.shape)
    mesh = np.meshgrid(*[np.fft.fftfreq(size) * n for size in a.shape], indexing="ij")
    rings = np.round(np.sqrt(sum(m**2 for m in mesh))).astype(int)
    curve = []
    for ring in range(n // 2 + 1):
        inside = rings == ring
        norm = np.sqrt((np.abs(fa[inside]) ** 2).sum() * (np.abs(fb[inside]) ** 2).sum())
        curve.append((fa[inside] * fb[inside].conj()).sum().real / norm)
    return np.array(curve)


@pytest.mark.parametrize("shape", [(8, 8, 8), (7, 9, 9), (10, 8, 6), (12, 12), (9, 14)])
def test_correlation_is_that_of_the_full_spectrum(shape):
    a, b = noise(*shape, seed=1), noise(*shape, seed=2)
    b = b + 0.7 * a
    curve = fsc.fsc(a, b) if len(shape) == 3 else fsc.frc(a, b)
    np.testing.assert_allclose(curve.numpy(), full_spectrum_correlation(a.numpy(), b.numpy()), atol=1e-12)


def test_batches_spectra_and_precision():
    a, b = noise(3, 10, 10, 10, seed=3), noise(3, 10, 10, 10, seed=4)
    curves = fsc.fsc(a, b)
    assert curves.shape == (3, 6)
    torch.testing.assert_close(curves[1], fsc.fsc(a[1], b[1]))
    spectra = (fourier.fft_centred(box, ndim=3) for box in (a, b))
    torch.testing.assert_close(fsc.shell_correlation(*spectra, shape=(10, 10, 10)), curves)
    single = fsc.fsc(a.float(), b.float())
    assert single.dtype == torch.float32
    # Single-precision transforms of 1000 voxels: relative errors of a few 1e-7 in each sum.
    torch.testing.assert_close(single.double(), curves, atol=2e-6, rtol=0)


def test_shells_without_power_have_no_correlation_and_no_nan():
    curve = fsc.fsc(torch.zeros(8, 8, 8), torch.ones(8, 8, 8))
    assert (curve == 0).all()


def test_correlation_of_noisy_maps_follows_from_their_signal_to_noise_ratio():
    n = 40
    signal = noise(n, n, n, seed=5)
    ratio = 0.5
    halves = [signal * ratio**0.5 + noise(n, n, n, seed=seed) for seed in (6, 7)]
    curve = fsc.fsc(*halves)
    counts = grids.ring_sums(torch.ones(n, n, n // 2 + 1), shape=(n, n, n))
    # Half of the coefficients are independent; five standard deviations of a correlation of that many pairs.
    bound = 5 / (counts / 2).sqrt()
    assert ((curve - ratio / (1 + ratio)).abs()[2:] < bound[2:]).all()


def test_resolution_is_linear_between_shells():
    curve = torch.tensor([0.0, 1.0, 0.9, 0.4, 0.1, 0.5, 0.0])
    # 0.143 lies between shells 3 (0.4) and 4 (0.1).
    shell = 3 + (0.4 - 0.143) / 0.3
    assert fsc.resolution(curve, pixel_size=1.2, box=12) == pytest.approx(12 * 1.2 / shell)
    assert fsc.resolution(curve, pixel_size=1.2, box=12, threshold=0.5) == pytest.approx(14.4 / 2.8)


def test_resolution_at_the_ends_of_the_curve():
    assert fsc.resolution(torch.ones(7), pixel_size=1.5, box=12) == pytest.approx(3.0)
    assert fsc.resolution(torch.tensor([1.0, 0.1, 0.0]), pixel_size=1.0, box=4) == float("inf")
    assert fsc.resolution(torch.tensor([1.0, 0.9, float("nan")]), pixel_size=1.0, box=4) > 2.0


@pytest.mark.parametrize("n", [15, 16])
def test_random_phases_keep_amplitudes_and_the_shells_before(n):
    volume = noise(n, n, n, seed=8)
    random = fsc.phase_randomise(volume, from_shell=5, generator=torch.Generator().manual_seed(0))
    before, after = fourier.rfft3(volume), fourier.rfft3(random)
    torch.testing.assert_close(after.abs(), before.abs())
    kept = grids.ring_index((n, n, n)) < 5
    torch.testing.assert_close(after[kept], before[kept])
    curve = fsc.fsc(volume, random)
    torch.testing.assert_close(curve[:5], torch.ones(5, dtype=torch.float64))
    counts = grids.ring_sums(torch.ones(n, n, n // 2 + 1), shape=(n, n, n))
    assert (curve[5:].abs() < 5 / (counts[5:] / 2).sqrt()).all()


def test_the_correction_removes_the_correlation_that_a_mask_brings():
    n = 32
    mask = masks.soft_sphere((n, n, n), radius=7.0, edge=1.0, dtype=torch.float64)
    radius = grids.frequency_radius((n, n, n), dtype=torch.float64) * n
    spectrum = fourier.rfft3(noise(n, n, n, seed=9)) * torch.where(radius < 6.5, 1.0, 0.0)
    signal = fourier.irfft3(spectrum, shape=(n, n, n)) * 8
    # Strong low shells common to both maps: the mask's sharp edge spreads them over all others.
    halves = [signal + noise(n, n, n, seed=seed) for seed in (11, 12)]
    result = fsc.corrected_fsc(*halves, mask=mask, generator=torch.Generator().manual_seed(1))
    assert result.from_shell == 7
    start = result.from_shell + 2
    inflated, corrected = result.masked[start:].mean(), result.corrected[start:].mean()
    assert inflated > 0.05
    assert corrected.abs() < inflated / 3
    torch.testing.assert_close(result.corrected[:start], result.masked[:start])
    formula = (result.masked - result.randomised) / (1 - result.randomised)
    torch.testing.assert_close(result.corrected[start:], formula[start:])


def test_maps_that_agree_everywhere_need_no_correction():
    volume = noise(12, 12, 12, seed=13)
    mask = masks.soft_sphere((12, 12, 12), radius=3.0, edge=2.0)
    result = fsc.corrected_fsc(volume, volume.clone(), mask=mask)
    assert result.from_shell == 7
    torch.testing.assert_close(result.corrected, result.masked)


def test_maps_that_do_not_fit_are_refused():
    with pytest.raises(ShapeError, match="cannot be compared"):
        fsc.fsc(torch.zeros(4, 4, 4), torch.zeros(4, 4, 6))
    with pytest.raises(ShapeError, match="one axis"):
        fsc.resolution(torch.zeros(2, 4), pixel_size=1.0, box=6)
    with pytest.raises(ParameterError, match="randomised"):
        fsc.corrected_fsc(*[torch.ones(4, 4, 4)] * 2, mask=torch.ones(4, 4, 4), randomise_below=2.0)


@pytest.mark.relion
@pytest.mark.skipif(shutil.which("relion_postprocess") is None, reason="relion_postprocess is not on PATH")
def test_curves_agree_with_relion_postprocess(tmp_path):
    n, pixel = 40, 1.5
    x = torch.arange(n, dtype=torch.float64) - n // 2
    r2 = x[:, None, None] ** 2 + x[:, None] ** 2 + x**2
    signal = noise(n, n, n, seed=14) * torch.exp(-r2 / 200)
    radius = grids.frequency_radius((n, n, n), dtype=torch.float64) * n
    smooth = fourier.rfft3(signal) * (20 * torch.exp(-((radius / 9) ** 2)))
    signal = fourier.irfft3(smooth, shape=(n, n, n))
    halves = [(signal + noise(n, n, n, seed=seed)).float() for seed in (15, 16)]
    mask = masks.soft_sphere((n, n, n), radius=14.0, edge=4.0)
    for name, box in (("half1", halves[0]), ("half2", halves[1]), ("mask", mask)):
        with mrcfile.new(tmp_path / f"{name}.mrc", box.numpy()) as file:
            file.voxel_size = pixel
    (tmp_path / "out").mkdir()
    files = "--i half1.mrc --i2 half2.mrc --o out/post --mask mask.mrc"
    command = f"relion_postprocess {files} --angpix {pixel} --randomize_at_fsc 0.7"
    subprocess.run(command.split(), cwd=tmp_path, check=True, capture_output=True)
    lines = (tmp_path / "out/post.star").read_text().split("data_fsc")[1].split("data_")[0].splitlines()
    columns = {line.split()[0]: int(line.split()[1][1:]) - 1 for line in lines if line.startswith("_rln")}
    table = np.array([line.split() for line in lines if line.strip()[:1].isdigit()], dtype=float)

    def relion(name: str) -> np.ndarray:
        return table[:, columns[f"_rln{name}"]]

    random = torch.Generator().manual_seed(2)
    result = fsc.corrected_fsc(*halves, mask=mask, randomise_below=0.7, generator=random)
    for name, boxes, ours in (
        ("FourierShellCorrelationUnmaskedMaps", halves, result.unmasked),
        ("FourierShellCorrelationMaskedMaps", [half * mask for half in halves], result.masked),
    ):
        # RELION gives stored coefficients equal weight: both of a Friedel pair at kx = 0, one elsewhere.
        spectra = [np.fft.rfftn(box.double().numpy()) for box in boxes]
        rings = grids.ring_index((n, n, n)).numpy()
        stored = [
            np.vdot(spectra[0][rings == ring], spectra[1][rings == ring]).real
            / np.prod([np.linalg.norm(spectrum[rings == ring]) for spectrum in spectra])
            for ring in range(n // 2 + 1)
        ]
        # The table rounds negative values to five decimals.
        np.testing.assert_allclose(relion(name)[1:], stored[1:], rtol=0, atol=6e-6)
        # Both weightings estimate the same correlation, from nearly all the same coefficients.
        counts = grids.ring_sums(torch.ones(n, n, n // 2 + 1), shape=(n, n, n)).numpy()
        assert (np.abs(ours.numpy() - relion(name))[2:] < 5 / np.sqrt(counts / 2)[2:]).all()
        assert not np.allclose(ours.numpy()[2:], relion(name)[2:], atol=1e-5)
    start = 1 + int(np.argmax(relion("FourierShellCorrelationUnmaskedMaps")[1:] < 0.7))
    assert result.from_shell == start
    later = slice(start + 2, None)
    masked = relion("FourierShellCorrelationMaskedMaps")[later]
    random_masked = relion("CorrectedFourierShellCorrelationPhaseRandomizedMaskedMaps")[later]
    corrected = relion("FourierShellCorrelationCorrected")[later]
    np.testing.assert_allclose(corrected, (masked - random_masked) / (1 - random_masked), rtol=0, atol=3e-5)
