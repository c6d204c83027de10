"""CTF and odd aberrations against a plain reference in double precision, and against RELION's programs."""

from __future__ import annotations

import math
import shutil
import subprocess
from pathlib import Path

import mrcfile
import numpy as np
import pytest
import torch

from halfmap.errors import ParameterError, ShapeError
from halfmap.ops import fourier
from halfmap.ops.ctf import ctf, ctf_1d, odd_aberration_phase, zernike_index
from halfmap.units import electron_wavelength

OPTICS = {"voltage_kV": 300.0, "cs_mm": 2.7, "amplitude_contrast": 0.1}


def double(*values) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


def true_frequency(shape, pixel_size, magnification=((1, 0), (0, 1))) -> tuple[np.ndarray, np.ndarray]:
    ky, kx = np.fft.fftfreq(shape[0], pixel_size)[:, None], np.fft.rfftfreq(shape[1], pixel_size)[None]
    (a, b), (c, d) = magnification
    return a * kx + b * ky, c * kx + d * ky


def zernike_phase(coefficients, parity, x, y) -> np.ndarray:
    """Sum over RELION's list by the textbook's polar formula; the list's order is spelled out here."""
    order = {
        0: [(0, 0), (2, -2), (2, 0), (2, 2), (4, -4), (4, -2), (4, 0), (4, 2), (4, 4), (6, -6)],
        1: [(1, -1), (1, 1), (3, -3), (3, -1), (3, 1), (3, 3), (5, -5), (5, -3)],
    }[parity]
    r, phi = np.hypot(x, y), np.arctan2(y, x)
    total = np.zeros_like(r)
    for (n, m), value in zip(order, coefficients, strict=False):
        radial = sum(
            (-1) ** k * math.comb(n - k, k) * math.comb(n - 2 * k, (n - abs(m)) // 2 - k) * r ** (n - 2 * k)
            for k in range((n - abs(m)) // 2 + 1)
        )
        total = total + value * radial * (np.cos(m * phi) if m >= 0 else np.sin(-m * phi))
    return total


def reference(
    shape, *, pixel_size, defocus_u, defocus_v, defocus_angle, voltage_kV, cs_mm, amplitude_contrast,
    phase_shift=0.0, b_factor=0.0, scale=1.0, magnification=((1, 0), (0, 1)), even_zernike=(),
) -> np.ndarray:  # fmt: skip
    x, y = true_frequency(shape, pixel_size, magnification)
    k2, phi = x**2 + y**2, np.arctan2(y, x)
    wavelength = electron_wavelength(voltage_kV)
    azimuth = 2 * (phi - np.deg2rad(defocus_angle))
    defocus = (defocus_u + defocus_v) / 2 + (defocus_u - defocus_v) / 2 * np.cos(azimuth)
    gamma = np.pi / 2 * cs_mm * 1e7 * wavelength**3 * k2**2 - np.pi * wavelength * defocus * k2
    gamma = (
        gamma - np.deg2rad(phase_shift) - np.arctan(amplitude_contrast / np.sqrt(1 - amplitude_contrast**2))
    )
    gamma = gamma + zernike_phase(even_zernike, 0, x, y)
    return -scale * np.sin(gamma) * np.exp(-b_factor / 4 * k2)


PARAMETERS = {
    "pixel_size": 1.3,
    "defocus_u": 21_000.0,
    "defocus_v": 18_500.0,
    "defocus_angle": 37.0,
    "phase_shift": 30.0,
    "b_factor": 25.0,
    "scale": 0.9,
    **OPTICS,
}
MAGNIFICATION = ((1.01, 0.02), (-0.01, 0.98))
EVEN = (0.1, 3.0, -4.0, 5.0, 30.0, -20.0, 10.0, 15.0, -25.0, 60.0)
ODD = (0.4, -0.3, 20.0, -15.0, 10.0, 25.0, 60.0, -40.0)


@pytest.mark.parametrize("shape", [(32, 32), (31, 40), (24, 33)])
def test_ctf_is_the_formula(shape):
    values = ctf(shape, **PARAMETERS)
    assert values.dtype == torch.float32
    # Single precision of a phase wrapped to a few turns.
    np.testing.assert_allclose(values.numpy(), reference(shape, **PARAMETERS), atol=1e-5)
    exact = ctf(shape, **{**PARAMETERS, "defocus_u": double(21_000.0)[0]})
    np.testing.assert_allclose(exact.numpy(), reference(shape, **PARAMETERS), atol=1e-12)


def test_aberrations_and_anisotropic_magnification():
    extra = {"magnification": MAGNIFICATION, "even_zernike": EVEN}
    values = ctf((36, 30), **PARAMETERS, magnification=double(*MAGNIFICATION), even_zernike=list(EVEN))
    expected = reference((36, 30), **PARAMETERS, **extra)
    np.testing.assert_allclose(values.numpy(), expected, atol=1e-11)
    assert np.abs(expected - reference((36, 30), **PARAMETERS)).max() > 0.5


def test_precision_holds_where_the_phase_is_a_thousand_radian():
    case = {"pixel_size": 0.85, "defocus_u": 30_500.0, "defocus_v": 29_500.0, "defocus_angle": 37.0, **OPTICS}
    values, expected = ctf((4096, 64), **case).numpy(), reference((4096, 64), **case)
    # Four roundings of wrapped phases below 2 pi and four of cross terms below 80 radian.
    bound = 2**-24 * (4 * 2 * math.pi + 4 * 80)
    assert np.abs(values - expected).max() < bound


def test_low_frequencies_are_positive_in_underfocus():
    values = ctf((128, 128), pixel_size=1.0, defocus_u=1e4, defocus_v=1e4, defocus_angle=0.0, **OPTICS)
    assert values[0, 0].item() == pytest.approx(0.1)
    assert (values[0, :5] > 0).all()


def test_defocus_u_lies_along_the_defocus_angle():
    case = {"pixel_size": 2.0, "defocus_u": 9_000.0, "defocus_v": 5_000.0, **OPTICS}
    k = torch.fft.rfftfreq(64, 2.0, dtype=torch.float64)
    weak, strong = (ctf_1d(k, defocus=defocus, **OPTICS).float() for defocus in (5_000.0, 9_000.0))
    along_x = ctf((64, 64), defocus_angle=0.0, **case)
    torch.testing.assert_close(along_x[0], strong, atol=1e-5, rtol=0)
    torch.testing.assert_close(along_x[:32, 0], weak[:32], atol=1e-5, rtol=0)
    along_y = ctf((64, 64), defocus_angle=90.0, **case)
    torch.testing.assert_close(along_y[0], weak, atol=1e-5, rtol=0)
    # At 45 degrees the axis of U runs where x and y grow together, in the first rows.
    diagonal = ctf((64, 64), defocus_angle=45.0, **case)
    at = torch.arange(1, 22)
    expected = ctf_1d(k[at] * 2**0.5, defocus=9_000.0, **OPTICS).float()
    torch.testing.assert_close(diagonal[at, at], expected, atol=1e-5, rtol=0)


def test_batches_broadcast_over_every_parameter():
    defocus = double(8e3, 12e3, 2e4)
    pixel = double(1.0, 1.5)[:, None]
    matrices = torch.eye(2, dtype=torch.float64).repeat(3, 1, 1)
    matrices[1] = double(*MAGNIFICATION)
    zernike = torch.zeros(3, 9, dtype=torch.float64)
    zernike[2] = double(*EVEN[:9])
    values = ctf(
        (16, 18), pixel_size=pixel, defocus_u=defocus, defocus_v=7e3, defocus_angle=double(0, 20, 120),
        b_factor=double(0, 10, 20), scale=double(1.0, 0.5, 2.0), magnification=matrices, even_zernike=zernike,
        **OPTICS,
    )  # fmt: skip
    assert values.shape == (2, 3, 16, 10)
    for i, size in enumerate((1.0, 1.5)):
        for j in range(3):
            expected = reference(
                (16, 18), pixel_size=size, defocus_u=float(defocus[j]), defocus_v=7e3,
                defocus_angle=(0, 20, 120)[j], b_factor=(0, 10, 20)[j], scale=(1.0, 0.5, 2.0)[j],
                magnification=matrices[j].tolist(), even_zernike=zernike[j].tolist(), **OPTICS,
            )  # fmt: skip
            np.testing.assert_allclose(values[i, j].numpy(), expected, atol=1e-12)


def test_gradients_of_every_parameter():
    names = [*PARAMETERS, "magnification", "even_zernike"]
    values = [double(value)[0] for value in PARAMETERS.values()] + [double(*MAGNIFICATION), double(*EVEN)]
    values[names.index("defocus_u")] = double(2.1, 1.9) * 1e4
    inputs = tuple(value.requires_grad_() for value in values)
    # Defocus in Å changes the phase by 1e-3 per step of 1: the finite difference needs steps to suit.
    assert torch.autograd.gradcheck(
        lambda *given: ctf((4, 6), **dict(zip(names, given, strict=True))), inputs, eps=1e-5, atol=1e-6
    )
    odd = (double(1.3)[0], double(300.0)[0], double(2.7)[0], double(0.5, -0.4), double(*ODD))
    names = ["pixel_size", "voltage_kV", "cs_mm", "beam_tilt_mrad", "odd_zernike"]
    assert torch.autograd.gradcheck(
        lambda *given: torch.view_as_real(
            odd_aberration_phase((4, 6), **dict(zip(names, given, strict=True)))
        ),
        tuple(value.requires_grad_() for value in odd),
        eps=1e-5,
        atol=1e-6,
    )


def test_odd_aberrations_are_the_formula():
    x, y = true_frequency((22, 24), 1.1, MAGNIFICATION)
    wavelength = electron_wavelength(200.0)
    tilt = (0.8, -1.1)
    coma = -2 * np.pi * 2.7e7 * wavelength**2 * (x**2 + y**2) * 1e-3 * (tilt[0] * x + tilt[1] * y)
    optics = {"pixel_size": 1.1, "voltage_kV": 200.0, "cs_mm": 2.7, "magnification": double(*MAGNIFICATION)}
    factor = odd_aberration_phase((22, 24), beam_tilt_mrad=double(*tilt), odd_zernike=ODD, **optics)
    expected = np.exp(1j * (coma + zernike_phase(ODD, 1, x, y)))
    np.testing.assert_allclose(factor.numpy(), expected, atol=1e-11)
    only_tilt = odd_aberration_phase((22, 24), beam_tilt_mrad=double(*tilt), **optics)
    np.testing.assert_allclose(only_tilt.numpy(), np.exp(1j * coma), atol=1e-11)


def test_no_odd_aberration_is_a_factor_of_one():
    factor = odd_aberration_phase((8, 8), pixel_size=1.0, voltage_kV=300.0, cs_mm=2.7)
    torch.testing.assert_close(factor, torch.ones(8, 5, dtype=torch.complex64))


def test_a_coma_displaces_a_point_and_its_conjugate_brings_it_back():
    point = torch.zeros(32, 32)
    point[16, 16] = 1
    factor = odd_aberration_phase(
        (32, 32), pixel_size=1.5, voltage_kV=300.0, cs_mm=2.7, beam_tilt_mrad=(3.0, 0.0)
    )
    tilted = fourier.irfft2(fourier.rfft2(point) * factor, shape=(32, 32))
    assert tilted[16, 16] < 0.8
    restored = fourier.irfft2(fourier.rfft2(tilted) * factor.conj(), shape=(32, 32))
    # At Nyquist an odd phase is lost: 63 of 1024 coefficients, 1 / 1024 of the point's amplitude each.
    torch.testing.assert_close(restored, point, atol=63 / 1024, rtol=0)


def test_ctf_1d_is_a_row_of_the_ctf_and_broadcasts():
    k = torch.fft.rfftfreq(200, 1.2)
    curves = ctf_1d(k, defocus=double(1e4, 2e4), phase_shift=45.0, b_factor=50.0, **OPTICS)
    assert curves.shape == (2, 101)
    assert curves.dtype == torch.float32
    for curve, defocus in zip(curves, (1e4, 2e4), strict=True):
        case = {"defocus_u": defocus, "defocus_v": defocus, "defocus_angle": 0.0, "phase_shift": 45.0}
        row = reference((200, 200), pixel_size=1.2, b_factor=50.0, **case, **OPTICS)[0]
        # Frequencies come in single precision: 6e-8 of a phase of up to 210 radian, twice for its square.
        np.testing.assert_allclose(curve.numpy(), row, atol=2**-24 * 3 * 210)


def test_zernike_places():
    assert [zernike_index(n, m) for n in (0, 2, 4) for m in range(-n, n + 1, 2)] == list(range(9))
    assert [zernike_index(n, m) for n in (1, 3, 5) for m in range(-n, n + 1, 2)] == list(range(12))
    with pytest.raises(ParameterError, match="no Zernike"):
        zernike_index(3, 2)


def test_shapes_that_do_not_fit_are_refused():
    case = {"pixel_size": 1.0, "defocus_u": 1e4, "defocus_v": 1e4, "defocus_angle": 0.0, **OPTICS}
    with pytest.raises(ShapeError, match="two axes"):
        ctf((8, 8, 8), **case)
    with pytest.raises(ShapeError, match="2 by 2"):
        ctf((8, 8), magnification=torch.ones(3), **case)


# RELION side by side. Its wavelength comes from older constants and is 6.4e-6 of itself longer than CODATA's.
BOX, PIXEL = 64, 1.4
RELION_WAVELENGTH = 12.2643247 / math.sqrt(3e5 * (1 + 3e5 * 0.978466e-6))
OPTICS_LABELS = (
    "OpticsGroup OpticsGroupName Voltage SphericalAberration AmplitudeContrast "
    "ImagePixelSize ImageSize ImageDimensionality"
)
PARTICLE_LABELS = (
    "ImageName OpticsGroup AngleRot AngleTilt AnglePsi OriginXAngst OriginYAngst "
    "DefocusU DefocusV DefocusAngle PhaseShift CtfBfactor CtfScalefactor"
)


def loop(block: str, labels: str, rows: list[str]) -> str:
    names = [f"_rln{label}" for label in labels.split()]
    return "\n".join(["", f"data_{block}", "", "loop_", *names, *rows, ""])


def write_particles(
    path: Path, rows: list[str], *, contrast: float = 0.1, labels: str = "", values: str = ""
) -> None:
    optics = loop(
        "optics",
        f"{OPTICS_LABELS} {labels}",
        [f"1 one 300 2.7 {contrast} {PIXEL} {BOX} 2 {values}"],
    )
    path.write_text(optics + loop("particles", PARTICLE_LABELS, rows))


def run(folder: Path, command: str) -> None:
    subprocess.run(command.split(), cwd=folder, check=True, capture_output=True)


@pytest.fixture(scope="module")
def relion_folder(tmp_path_factory) -> Path:
    """Folder with a map of narrow Gaussians, whose spectrum reaches Nyquist."""
    folder = tmp_path_factory.mktemp("relion")
    rng = np.random.default_rng(0)
    axis = np.arange(BOX) - BOX // 2
    volume = np.zeros((BOX,) * 3)
    for z, y, x in rng.uniform(-11, 11, size=(60, 3)):
        gz, gy, gx = (np.exp(-((axis - c) ** 2) / (2 * 0.8**2)) for c in (z, y, x))
        volume += rng.uniform(0.5, 1.5) * gz[:, None, None] * gy[:, None] * gx
    with mrcfile.new(folder / "map.mrc", volume.astype(np.float32)) as file:
        file.voxel_size = PIXEL
    return folder


@pytest.mark.relion
@pytest.mark.parametrize("aberrated", [False, True])
def test_ctf_is_that_of_relion_project(relion_folder, tmp_path, aberrated):
    rows = [
        "1@none.mrcs 1 10 20 30 0 0 15000 14000 25 0 0 1",
        "2@none.mrcs 1 10 20 30 0 0 9500 8000 130 90 50 0.8",
        "3@none.mrcs 1 80 70 60 3 -4 25000 24800 -70 20 0 1",
    ]
    extra = {}
    if aberrated:
        zernike = ",".join(map(str, EVEN[:9]))
        matrix = " ".join(str(value) for row in MAGNIFICATION for value in row)
        extra = {
            "labels": "EvenZernike MagMat00 MagMat01 MagMat10 MagMat11",
            "values": f"[{zernike}] {matrix}",
        }
    write_particles(tmp_path / "particles.star", rows, **extra)
    for name, option in (("plain", ""), ("seen", "--ctf")):
        run(tmp_path, f"relion_project --i {relion_folder}/map.mrc --o {name} --ang particles.star {option}")
    plain, seen = (
        fourier.rfft2(torch.from_numpy(mrcfile.read(tmp_path / f"{name}.mrcs")).double())
        for name in ("plain", "seen")
    )
    columns = np.array([row.split()[7:] for row in rows], dtype=float).T
    names = ("defocus_u", "defocus_v", "defocus_angle", "phase_shift", "b_factor", "scale")
    parameters = dict(zip(names, torch.from_numpy(columns), strict=True))
    if aberrated:
        parameters |= {"magnification": double(*MAGNIFICATION), "even_zernike": double(*EVEN[:9])}
    difference = (seen - plain * ctf((BOX, BOX), pixel_size=PIXEL, **parameters, **OPTICS)).abs()
    # Defocus grows with the wavelength, spherical aberration with its cube; magnification adds 4 %.
    k2 = torch.from_numpy(sum(k**2 for k in true_frequency((BOX, BOX), PIXEL)))
    apart = abs(electron_wavelength(300.0) / RELION_WAVELENGTH - 1)
    phase = (
        torch.pi * RELION_WAVELENGTH * 25_000 * k2 + 3 * torch.pi / 2 * 2.7e7 * RELION_WAVELENGTH**3 * k2**2
    )
    # Files are in single precision: each of BOX² pixels is rounded by at most 2^-24 of the largest; 6 sigma.
    rounding = 6 * BOX * 2**-24 * mrcfile.read(tmp_path / "plain.mrcs").max()
    bound = 1.05 * apart * phase * plain.abs() + rounding
    # Beyond Nyquist RELION projects nothing; on the rows of Nyquist it takes the other sign of the frequency.
    within = torch.ones(BOX, BOX // 2 + 1, dtype=torch.bool)
    within[BOX // 2] = within[:, BOX // 2] = False
    assert (difference <= bound)[:, within].all()
    error = difference[:, within].square().sum().sqrt() / seen.abs()[:, within].square().sum().sqrt()
    assert error < 1e-3


@pytest.mark.relion
@pytest.mark.skipif(shutil.which("relion_reconstruct") is None, reason="relion_reconstruct is not on PATH")
@pytest.mark.parametrize(
    ("labels", "values", "nothing", "aberration"),
    [
        ("BeamTiltX BeamTiltY", "1.0 -0.7", "0 0", {"beam_tilt_mrad": (1.0, -0.7)}),
        ("OddZernike", "[0.4,-0.3,20,-15,10,25]", "[0,0,0,0,0,0]", {"odd_zernike": ODD[:6]}),
        (
            "BeamTiltX BeamTiltY OddZernike MagMat00 MagMat01 MagMat10 MagMat11",
            # RELION 3.1 drops the terms (3, ±1) where there is a beam tilt; from 4.0 on it adds both.
            "1.0 -0.7 [0.4,-0.3,20,0,0,25] 1.01 0.02 -0.01 0.98",
            "0 0 [0,0,0,0,0,0] 1.01 0.02 -0.01 0.98",
            {
                "beam_tilt_mrad": (1.0, -0.7),
                "odd_zernike": (0.4, -0.3, 20.0, 0.0, 0.0, 25.0),
                "magnification": double(*MAGNIFICATION),
            },
        ),
    ],
    ids=["tilt", "zernike", "both"],
)
def test_odd_aberrations_are_those_relion_reconstruct_removes(
    relion_folder, tmp_path, labels, values, nothing, aberration
):
    """A 2D reconstruction of one image without defocus is that image with its odd aberrations removed."""
    write_particles(tmp_path / "one.star", ["1@none.mrcs 1 10 20 30 0 0 0 0 0 90 0 1"])
    run(tmp_path, f"relion_project --i {relion_folder}/map.mrc --o plain --ang one.star")
    spectrum = fourier.rfft2(torch.from_numpy(mrcfile.read(tmp_path / "plain.mrcs")).double())
    factor = odd_aberration_phase((BOX, BOX), pixel_size=PIXEL, voltage_kV=300.0, cs_mm=2.7, **aberration)
    cases = {
        "none": (spectrum, nothing),
        "right": (spectrum * factor, values),
        "wrong": (spectrum * factor.conj(), values),
    }
    maps = {}
    for name, (seen, added) in cases.items():
        with mrcfile.new(tmp_path / f"{name}.mrcs") as file:
            file.set_data(fourier.irfft2(seen, shape=(BOX, BOX)).float().reshape(1, BOX, BOX).numpy())
            file.set_image_stack()
            file.voxel_size = PIXEL
        row = f"1@{name}.mrcs 1 0 0 0 0 0 0 0 0 90 0 1"
        write_particles(tmp_path / f"{name}.star", [row], contrast=0.0, labels=labels, values=added)
        run(tmp_path, f"relion_reconstruct --i {name}.star --o {name}.mrc --ctf --refdim 2 --pad 1")
        maps[name] = mrcfile.read(tmp_path / f"{name}.mrc").squeeze().astype(float)
    # The wavelengths differ by 6.4e-6, twice that in a phase below 10 radian; single precision adds 1e-6.
    apart = np.std(maps["right"] - maps["none"]) / np.std(maps["none"])
    assert apart < 2 * 6.5e-6 * 10 + 1e-6
    assert np.std(maps["wrong"] - maps["none"]) > 0.3 * np.std(maps["none"])
