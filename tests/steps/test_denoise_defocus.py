"""Thon rings survive denoising: images are evened, and the defocus is found in them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import polars as pl
import pytest
import torch

from halfmap.data import MicrographSet
from halfmap.io.mrc import write_mrc
from halfmap.io.star import read_star
from halfmap.io.tables import write_micrographs
from halfmap.ops.ctf import ctf
from halfmap.ops.filters import radial_average
from halfmap.ops.fourier import irfft2, rfft2
from halfmap.ops.grids import frequency_radius
from halfmap.project import Project
from halfmap.steps import load_steps
from halfmap.steps.denoise.defocus import evened
from halfmap.steps.denoise.step import DenoiseApply, DenoiseMeasure

load_steps()

SHAPE, PIXEL, DEFOCUS_A = (1024, 1024), 1.0, 14_000.0
LENS = {"voltage_kV": 300.0, "cs_mm": 2.7, "amplitude_contrast": 0.1}


def seen(seed: int) -> torch.Tensor:
    """Thin ice with dark discs in it, through the lens: white but for Thon rings and what is coarse."""
    generator = torch.Generator().manual_seed(seed)
    ice = 0.8 * torch.randn(SHAPE, generator=generator)
    y, x = torch.meshgrid(torch.arange(SHAPE[0]), torch.arange(SHAPE[1]), indexing="ij")
    for cy, cx in (torch.rand(40, 2, generator=generator) * SHAPE[0]).tolist():
        ice = ice - torch.sigmoid(30.0 - torch.hypot(y - cy, x - cx))
    lens = ctf(SHAPE, pixel_size=PIXEL, defocus_u=DEFOCUS_A, defocus_v=DEFOCUS_A, defocus_angle=0.0, **LENS)
    return irfft2(rfft2(ice) * -lens, shape=SHAPE)


def test_what_a_network_has_faded_is_evened():
    """Power that falls by four orders of magnitude, on a slope that does not meet at the borders."""
    image = seen(1)
    spectrum = rfft2(image)
    faded = irfft2(spectrum * 10 ** (-10 * frequency_radius(SHAPE) / PIXEL), shape=SHAPE)
    faded += torch.linspace(0, 30, SHAPE[1])
    taper = torch.hann_window(SHAPE[0])[:, None] * torch.hann_window(SHAPE[1])
    even = torch.from_numpy(evened(faded.numpy(), PIXEL, 4.0))
    power = radial_average(rfft2(even * taper).abs().square(), shape=SHAPE)
    frequency = np.arange(len(power)) / (SHAPE[0] * PIXEL)
    bands = [
        float(power[(frequency > low) & (frequency < low + 0.03)].mean())
        for low in np.arange(0.03, 0.21, 0.03)
    ]
    assert max(bands) < 1.5 * min(bands)
    assert float(power[frequency > 0.26].max()) < 1e-3 * min(bands)
    rings = radial_average(spectrum.abs().square(), shape=SHAPE)
    fitted = (frequency > 0.1) & (frequency < 0.2)
    flat = [np.asarray(each)[fitted] for each in (power, rings)]
    assert np.corrcoef(flat[0], flat[1])[0, 1] > 0.9, "Thon rings as before"


def test_defoci_of_denoised_micrographs_are_those_of_the_raw_ones(tmp_path: Path):
    names = {}
    for label, seed in (("rlnMicrographNameEven", 1), ("rlnMicrographNameOdd", 2)):
        noise = torch.randn(SHAPE, generator=torch.Generator().manual_seed(10 + seed))
        names[label] = (seen(1) + 1.5 * noise).numpy()
    for label, image in (*names.items(), ("rlnMicrographName", sum(names.values()))):
        write_mrc(tmp_path / f"{label}.mrc", np.asarray(image), pixel_size=PIXEL, stack=False)
    optics = {"rlnOpticsGroupName": ["og1"], "rlnOpticsGroup": [1], "rlnMicrographPixelSize": [PIXEL]}
    optics |= {"rlnVoltage": [300.0], "rlnSphericalAberration": [2.7], "rlnAmplitudeContrast": [0.1]}
    rows = {label: [f"{label}.mrc"] for label in ("rlnMicrographName", *names)} | {"rlnOpticsGroup": [1]}
    write_micrographs(tmp_path / "micrographs.star", MicrographSet(pl.DataFrame(optics), pl.DataFrame(rows)))
    project = Project.open(tmp_path)
    done = project.run(DenoiseApply(micrographs=tmp_path / "micrographs.star", pictures=False, merge=False))
    job = project.run(DenoiseMeasure(micrographs=done.outputs["micrographs"]))
    table = read_star(job.outputs["table"])["micrographs"]
    assert isinstance(table, pl.DataFrame)
    assert table["hmDefocusDifference"][0] == pytest.approx(0, abs=100)
    found = read_star(job.folder / "ctf_of_denoised/micrographs_ctf.star")["micrographs"]
    assert isinstance(found, pl.DataFrame)
    assert found["rlnDefocusU"][0] == pytest.approx(DEFOCUS_A, abs=150)
    assert (job.folder / "defocus.png").exists()
    assert not (job.folder / "evened").exists(), "images as large as the micrographs are not kept"
