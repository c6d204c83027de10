"""Images made ready: the same in a disc and on rings, with what was done to their phases taken back."""

import math
from dataclasses import replace

import pytest
import torch
from pose_simulation import Particle
from torch._subclasses.fake_tensor import FakeTensorMode

from halfmap.data.ctf import CTFParameters
from halfmap.errors import TableError
from halfmap.ops.fourier import irfft2, rfft2
from halfmap.ops.masks import soft_circle
from halfmap.ops.rotations import random_rotations
from halfmap.search import prepared
from halfmap.search.disc import FourierDisc
from halfmap.search.polar import PolarGrid
from halfmap.search.prepared import on_rings, prepare

BOX, PIXEL, N = 40, 3.0, 6
PARTICLE = Particle.random(BOX, count=40, radius_px=10.0)


def _parameters(tilt_mrad: float = 0.0) -> CTFParameters:
    def all_of(value: float) -> torch.Tensor:
        return torch.full((N,), value)

    return CTFParameters(
        voltage_kV=all_of(300.0),
        cs_mm=all_of(2.7),
        amplitude_contrast=all_of(0.1),
        pixel_size=all_of(PIXEL),
        defocus_u=torch.linspace(6000, 9000, N),
        defocus_v=torch.linspace(5800, 8800, N),
        defocus_angle=all_of(20.0),
        phase_shift=all_of(0.0),
        b_factor=all_of(0.0),
        scale=all_of(1.0),
        beam_tilt_mrad=torch.tensor([[tilt_mrad, -tilt_mrad / 2]]).expand(N, -1),
        odd_zernike=torch.zeros(N, 0),
        even_zernike=torch.zeros(N, 0),
        magnification=torch.eye(2).expand(N, -1, -1),
    )


def _microscope(parameters: CTFParameters) -> dict[str, torch.Tensor]:
    names = ("voltage_kV", "cs_mm", "amplitude_contrast", "pixel_size")
    return {name: getattr(parameters, name) for name in (*names, "defocus_u", "defocus_v", "defocus_angle")}


def _clean() -> tuple[torch.Tensor, torch.Tensor]:
    rotations = random_rotations(N, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    return rotations, PARTICLE.images(rotations)


@pytest.mark.parametrize("box", [40, 28])
def test_disc_holds_transform_and_ctf_whatever_its_box(box: int):
    rotations, clean = _clean()
    disc = FourierDisc(box, 10)
    ready = prepare(clean, torch.ones(BOX, BOX), _parameters(), disc, PIXEL * BOX / box)
    exact = PARTICLE.slices(rotations, disc.points)
    assert float((ready.whole - exact).abs().max()) < 2e-3 * float(exact.abs().max())
    whole = prepare(clean, torch.ones(BOX, BOX), _parameters(), FourierDisc(BOX, 10), PIXEL)
    assert torch.allclose(ready.ctf, whole.ctf, atol=1e-4)


def test_aberrations_are_taken_off():
    """An image with beam tilt, prepared with it, is that without, prepared without."""
    from halfmap.ops.ctf import odd_aberration_phase

    _, clean = _clean()
    parameters = _parameters(2.0)
    odd = parameters.for_odd_aberrations()
    assert odd is not None
    tilted = irfft2(rfft2(clean) * odd_aberration_phase((BOX, BOX), **odd), shape=(BOX, BOX))
    mask, disc = torch.ones(BOX, BOX), FourierDisc(BOX, 12)
    found = prepare(tilted, mask, parameters, disc, PIXEL)
    plain = prepare(clean, mask, _parameters(), disc, PIXEL)
    assert not torch.allclose(prepare(tilted, mask, _parameters(), disc, PIXEL).whole, plain.whole, atol=0.1)
    assert torch.allclose(found.whole, plain.whole, atol=1e-3)


def test_ctfs_are_computed_where_their_parameters_are(monkeypatch):
    """With images and frequencies on a GPU, whose devices can be followed without there being one."""
    # What looks at values, of which there are none here.
    monkeypatch.setattr(prepared, "refuse_stretched", lambda parameters: None)
    monkeypatch.setattr(CTFParameters, "for_odd_aberrations", lambda self: None)
    monkeypatch.setattr(CTFParameters, "for_ctf", _microscope)

    def pack(self: FourierDisc, spectra: torch.Tensor) -> torch.Tensor:
        return torch.empty(len(spectra), len(self.points), dtype=spectra.dtype, device=spectra.device)

    # Indexing is what a build without CUDA cannot follow.
    monkeypatch.setattr(FourierDisc, "pack", pack)
    disc = FourierDisc(BOX, 10)
    shape = disc.points.shape
    with FakeTensorMode():
        disc.__dict__["points"] = torch.empty(shape, dtype=torch.float64, device="cuda")
        images, mask = torch.empty(N, BOX, BOX, device="cuda"), torch.empty(BOX, BOX, device="cuda")
        ready = prepare(images, mask, _parameters(), disc, PIXEL, phase_flipped=torch.ones(N) > 0)
        assert ready.masked.device.type == "cuda"
        assert ready.ctf.device.type == disc.device == "cpu"


def test_anisotropic_magnification_is_refused():
    _, clean = _clean()
    stretched = torch.tensor([[1.004, 0.0], [0.0, 1.0]]).expand(N, -1, -1)
    with pytest.raises(TableError, match="magnification"):
        prepare(
            clean,
            torch.ones(BOX, BOX),
            replace(_parameters(), magnification=stretched),
            FourierDisc(BOX, 12),
            PIXEL,
        )


def test_flipped_phases_make_the_ctf_positive():
    _, clean = _clean()
    flipped = torch.arange(N) % 2 == 0
    ready = prepare(
        clean, torch.ones(BOX, BOX), _parameters(), FourierDisc(BOX, 12), PIXEL, phase_flipped=flipped
    )
    assert float(ready.ctf[flipped].min()) >= 0
    assert float(ready.ctf[~flipped].min()) < 0


def test_rings_hold_the_same_as_the_disc():
    rotations, clean = _clean()
    mask = soft_circle((BOX, BOX), radius=16.0, edge=3.0)
    grid = PolarGrid(28, 9, 13.3)
    samples, transfer = on_rings(clean, mask, _parameters(), grid, PIXEL * BOX / 28)
    exact = PARTICLE.slices(rotations, grid.frequencies.flatten(0, 1)).reshape(samples.shape)
    assert float((samples - exact).abs().max()) < 0.02 * float(exact.abs().max())
    # Along x, rings are the disc's own points.
    disc = FourierDisc(28, 9)
    ready = prepare(clean, mask, _parameters(), disc, PIXEL * BOX / 28)
    on_axis = (disc.points[:, 1] == 0).nonzero().squeeze(1)
    order = on_axis[disc.points[on_axis, 0].argsort()]
    assert torch.allclose(ready.ctf[:, order], transfer[:, :, 0], atol=1e-4)
    # With an odd aberration the sign of the CTF goes to the image as well.
    tilted, absolute = on_rings(clean, mask, _parameters(1.0), grid, PIXEL * BOX / 28)
    assert float(absolute.min()) >= 0
    assert torch.allclose(absolute, transfer.abs(), atol=1e-4)
    assert tilted.shape == samples.shape
    assert math.isfinite(float(tilted.abs().max()))
