"""Simulated particle stacks: convention, scale, noise, reconstruction."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from halfmap.engine import Context
from halfmap.io.models import read_model
from halfmap.io.mrc import read_header, read_mrc
from halfmap.io.tables import read_particles
from halfmap.ops import fourier, grids
from halfmap.ops.ctf import ctf, odd_aberration_phase
from halfmap.ops.fsc import fsc
from halfmap.ops.slices import project_volume, reconstruct
from halfmap.search.source import mask_diameter
from halfmap.steps.simulate.step import SimulateParticles

SHIPPED = Path(__file__).resolve().parents[2] / "src/halfmap/steps/simulate/apoferritin.cif.gz"
SETTINGS = {
    "assembly": "none",
    "pixel_size": 2.0,
    "box_size": 64,
    "n_particles": 40,
    "per_micrograph": 25,
    "shift": 4.0,
    "envelope_b_factor": 0.0,
    "focal_spread": 0.0,
    "convergence": 0.0,
    "seed": 9,
}


def simulate(folder: Path, **changes):
    """Run; the table, the images, and the truth map."""
    folder.mkdir(parents=True)
    SimulateParticles(**{**SETTINGS, **changes}).run(Context(folder=folder, project=folder.parent))
    table = read_particles(folder / "particles.star")
    names = [name.split("@") for name in table.rows["rlnImageName"]]
    images = np.stack([read_mrc(folder.parent / path, int(index) - 1) for index, path in names])
    return (
        table,
        torch.from_numpy(images.astype(np.float32)),
        torch.from_numpy(read_mrc(folder / "truth_map.mrc")),
    )


def transfer(table) -> torch.Tensor:
    parameters = table.ctf
    given = {
        "pixel_size": parameters.pixel_size,
        "voltage_kV": parameters.voltage_kV,
        "cs_mm": parameters.cs_mm,
    }
    value = ctf(
        (64, 64),
        defocus_u=parameters.defocus_u,
        defocus_v=parameters.defocus_v,
        defocus_angle=parameters.defocus_angle,
        amplitude_contrast=parameters.amplitude_contrast,
        **given,
    )
    return value * odd_aberration_phase((64, 64), beam_tilt_mrad=parameters.beam_tilt_mrad, **given)


@pytest.fixture(scope="module")
def clean(tmp_path_factory):
    return simulate(tmp_path_factory.mktemp("p") / "job001", snr=0.0, beam_tilt=0.3, optics_groups=2)


def test_images_are_shifted_ctf_times_projection(clean):
    """image = shift(CTF * projection, -origin), bright, in the truth map's volts times voxels."""
    table, images, truth = clean
    assert (table.box_size, table.pixel_size, len(table)) == (64, 2.0, 40)
    assert float(table.optics["hmSignalScale"][0]) == 1
    projections = project_volume(truth, table.poses.rotations, padding=4)
    spectra = fourier.fft_centred(projections, ndim=2) * transfer(table)
    spectra = fourier.phase_shift(spectra, shape=(64, 64), shift_px=-table.poses.shifts_A / 2.0)
    found = fourier.fft_centred(images, ndim=2)
    k = grids.frequency_radius((64, 64))
    inside = (k > 0.02) & (k < 0.45)
    error = (found - spectra)[:, inside].norm() / spectra[:, inside].norm()
    # Linear interpolation of slices, padded four times, errs by two per cent.
    assert error < 0.03
    assert float(images.amax(dim=(1, 2)).mean()) > -float(images.amin(dim=(1, 2)).mean())


def test_shifts_and_heights_have_the_spread_asked(clean):
    table, _, _ = clean
    shifts = table.poses.shifts_A.numpy()
    assert shifts.std() == pytest.approx(4.0, rel=4 / np.sqrt(2 * shifts.size))
    first = table.rows["rlnDefocusU"].to_numpy()[:25]
    assert 150 < np.ptp(first) < 300
    assert table.rows["rlnMicrographName"].n_unique() == 2


def test_true_poses_reconstruct_the_truth_map(tmp_path):
    table, images, truth = simulate(tmp_path / "job001", snr=0.0, n_particles=500, per_micrograph=100)
    spectra = fourier.phase_shift(
        fourier.fft_centred(images, ndim=2), shape=(64, 64), shift_px=table.poses.shifts_A / 2.0
    )
    volume = reconstruct(spectra, table.poses.rotations, ctf=transfer(table).real)
    curve = fsc(volume, truth)
    assert float(curve[2:28].min()) > 0.99
    # In volts: the slope of reconstruction on truth at middle frequencies.
    a, b = fourier.fft_centred(volume, ndim=3), fourier.fft_centred(truth, ndim=3)
    k = grids.frequency_radius((64,) * 3)
    middle = (k > 0.05) & (k < 0.3)
    slope = (a * b.conj()).real[middle].sum() / b.abs().square()[middle].sum()
    assert float(slope) == pytest.approx(1, abs=0.03)


def test_noise_has_variance_one_and_the_ratio_asked(clean, tmp_path):
    _, signal, _ = clean
    table, images, _ = simulate(
        tmp_path / "job001", snr=0.1, noise_colour=0.6, beam_tilt=0.3, optics_groups=2
    )
    scale = float(table.optics["hmSignalScale"][0])
    noise = images - scale * signal
    assert float(noise.var()) == pytest.approx(1, abs=0.02)
    inside = grids.radius((64, 64), 2.0) < 65.8 / 2
    ratio = scale**2 * float(signal[:, inside].var(dim=1, correction=0).mean())
    # Of another sample of particles, with shifts.
    assert ratio == pytest.approx(0.1, rel=0.15)
    power = fourier.rfft2(noise).abs().square().mean(dim=0) / 64**2
    k = grids.frequency_radius((64, 64))
    low, zero_free = power[(k > 0.02) & (k < 0.06)].mean(), power.mean()
    assert float(low) != pytest.approx(float(zero_free), rel=0.1)


def test_white_noise_is_white(clean, tmp_path):
    _, signal, _ = clean
    table, images, _ = simulate(
        tmp_path / "job001", snr=0.1, noise_colour=0.0, beam_tilt=0.3, optics_groups=2
    )
    noise = images - float(table.optics["hmSignalScale"][0]) * signal
    power = fourier.rfft2(noise).abs().square().mean(dim=0)[:, 1:-1] / 64**2
    ring = grids.ring_index((64, 64))[:, 1:-1]
    for first in (2, 10, 20):
        band = (ring >= first) & (ring < first + 8)
        assert float(power[band].mean()) == pytest.approx(1, abs=4 / np.sqrt(40 * int(band.sum())))


def test_half_precision_is_a_smaller_file_of_the_same_images(clean, tmp_path):
    _, signal, _ = clean
    folder = tmp_path / "job001"
    _, images, _ = simulate(folder, snr=0.0, float16=True, beam_tilt=0.3, optics_groups=2)
    assert read_header(folder / "Particles/000001.mrcs").mode == 12
    assert torch.allclose(images, signal, rtol=1e-3, atol=1e-3)


def test_the_table_says_how_large_the_particles_are(clean):
    """Twice the distance of the outermost atom from the centre of mass, in which nothing is left out."""
    model = read_model(SHIPPED, assembly=None)
    reach = np.linalg.norm(model.positions - model.centre, axis=1).max()
    found = clean[0].rows["hmParticleDiameter"].to_numpy()
    assert found == pytest.approx(2 * reach, abs=0.05)
    assert model.diameter <= found[0] + 0.05
    assert mask_diameter(clean[0], None, 128.0) == pytest.approx(min(1.15 * 2 * reach, 0.95 * 128.0), abs=0.1)


def test_conformations_have_maps_of_their_own(tmp_path):
    folder = tmp_path / "job001"
    table, _, _ = simulate(folder, models=(SHIPPED, SHIPPED), fractions=(1.0, 3.0), n_particles=200, snr=0.0)
    share = (table.rows["rlnClassNumber"] == 2).mean()
    assert share == pytest.approx(0.75, abs=4 * np.sqrt(0.75 * 0.25 / 200))
    assert np.array_equal(read_mrc(folder / "truth_map.mrc"), read_mrc(folder / "truth_map_class002.mrc"))
