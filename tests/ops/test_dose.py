"""Dose weights against the published formula, number by number, and against RELION's sum of frames."""

from __future__ import annotations

import math
import shutil
import subprocess

import mrcfile
import numpy as np
import pytest
import torch

from halfmap.errors import ParameterError
from halfmap.ops import dose, grids


def plain_weight(k: float, exposure: float, factor: float = 1.0) -> float:
    return math.exp(-exposure / (2 * factor * (0.245 * k**-1.665 + 2.81))) if k else 1.0


@pytest.mark.parametrize(("voltage", "factor"), [(300.0, 1.0), (200.0, 0.8), (100.0, 0.64), (120.0, 0.672)])
def test_critical_dose_scales_with_the_voltage(voltage, factor):
    k = torch.tensor([0.0, 0.05, 0.1, 1 / 3], dtype=torch.float64)
    critical = dose.critical_dose(k, voltage_kV=voltage)
    assert critical[0] == math.inf
    for value, frequency in zip(critical[1:].tolist(), k[1:].tolist(), strict=True):
        assert value == pytest.approx(factor * (0.245 * frequency**-1.665 + 2.81), rel=1e-12)


def test_weights_are_those_of_the_exposure_at_each_frames_end():
    k = grids.frequency_radius((6, 8), 1.2, dtype=torch.float64)
    weights = dose.dose_weights(
        k, dose_per_frame=1.5, n_frames=5, pre_exposure=2.0, voltage_kV=200.0, normalise=False
    )
    assert weights.shape == (5, 6, 5)
    for frame in range(5):
        for place in [(0, 0), (1, 2), (3, 4)]:
            expected = plain_weight(k[place].item(), 2.0 + 1.5 * (frame + 1), 0.8)
            assert weights[frame, *place].item() == pytest.approx(expected, rel=1e-12)


def test_normalised_weights_keep_noise_white():
    k = torch.linspace(0, 0.5, 9)
    raw = dose.dose_weights(k, dose_per_frame=2.0, n_frames=20, normalise=False)
    weights = dose.dose_weights(k, dose_per_frame=2.0, n_frames=20)
    torch.testing.assert_close(weights.square().sum(0), torch.ones(9))
    torch.testing.assert_close(weights, raw / raw.square().sum(0).sqrt())
    torch.testing.assert_close(weights[:, 0], torch.full((20,), 20**-0.5))


def test_one_frame_at_a_time_gives_the_same():
    k = torch.tensor([0.02, 0.2, 0.4])
    together = dose.dose_weights(k, dose_per_frame=1.3, n_frames=6, pre_exposure=4.0, normalise=False)
    for frame in range(6):
        single = dose.dose_weights(
            k, dose_per_frame=1.3, n_frames=1, pre_exposure=4.0 + 1.3 * frame, normalise=False
        )
        torch.testing.assert_close(single[0], together[frame])


def test_the_optimal_exposure_has_the_best_signal_to_noise_ratio():
    k = torch.tensor([0.1, 0.25, 0.4], dtype=torch.float64)
    critical = dose.critical_dose(k)
    step = 0.01
    weights = dose.dose_weights(k, dose_per_frame=step, n_frames=3000, normalise=False, cut_at_optimum=True)
    kept = (weights > 0).sum(0) * step
    # An unweighted sum to exposure N has the signal 2 Nc (1 - exp(-N / 2 Nc)) and the noise sqrt(N).
    exposure = torch.arange(1, 3001, dtype=torch.float64)[:, None] * step
    ratio = 2 * critical * (1 - torch.exp(-exposure / (2 * critical))) / exposure.sqrt()
    best = (ratio.argmax(0) + 1) * step
    torch.testing.assert_close(kept, best, atol=2 * step, rtol=0)


def test_exposures_and_voltages_out_of_range_are_refused():
    with pytest.raises(ParameterError, match="not known"):
        dose.critical_dose(torch.ones(1), voltage_kV=80.0)
    with pytest.raises(ParameterError, match="cannot be weighted"):
        dose.dose_weights(torch.ones(1), dose_per_frame=-1.0, n_frames=3)
    with pytest.raises(ParameterError, match="cannot be weighted"):
        dose.dose_weights(torch.ones(1), dose_per_frame=1.0, n_frames=0)


@pytest.mark.relion
@pytest.mark.skipif(shutil.which("relion_run_motioncorr") is None, reason="relion_run_motioncorr is missing")
@pytest.mark.parametrize("voltage", [300, 200, 100])
def test_the_sum_of_equal_frames_is_that_of_relion(tmp_path, voltage):
    n, frames, pixel = 256, 5, 1.2
    image = (np.random.default_rng(0).normal(size=(n, n)) + 10).astype(np.float32)
    with mrcfile.new(tmp_path / "movie.mrc") as file:
        file.set_data(np.repeat(image[None], frames, 0))
        file.set_image_stack()
        file.voxel_size = pixel
    optics = "OpticsGroupName OpticsGroup MicrographOriginalPixelSize Voltage SphericalAberration "
    optics += "AmplitudeContrast"
    lines = ["data_optics", "", "loop_", *(f"_rln{label}" for label in optics.split())]
    lines += [f"one 1 {pixel} {voltage} 2.7 0.1", "", "data_movies", "", "loop_"]
    lines += ["_rlnMicrographMovieName", "_rlnOpticsGroup", "movie.mrc 1", ""]
    (tmp_path / "movies.star").write_text("\n".join(lines))
    command = "relion_run_motioncorr --use_own --i movies.star --o out/ --patch_x 1 --patch_y 1"
    command += " --dose_weighting --dose_per_frame 3 --preexposure 2"
    subprocess.run(command.split(), cwd=tmp_path, check=True, capture_output=True)
    k = grids.frequency_radius((n, n), pixel, dtype=torch.float64)
    weights = dose.dose_weights(k, dose_per_frame=3.0, n_frames=frames, pre_exposure=2.0, voltage_kV=voltage)
    expected = np.fft.rfft2(image.astype(float)) * weights.sum(0).numpy()
    seen = np.fft.rfft2(mrcfile.read(tmp_path / "out/movie.mrc").astype(float))
    inside = np.s_[1 : n // 2 - 1, 1 : n // 2 - 1]
    # RELION works in single precision: about ten roundings of 6e-8 in transforms, weights and sums.
    difference = np.linalg.norm((seen - expected)[inside]) / np.linalg.norm(expected[inside])
    assert difference < 1e-5
