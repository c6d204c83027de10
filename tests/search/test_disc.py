import pytest
import torch

from halfmap.errors import ParameterError, ShapeError
from halfmap.ops.fourier import fft_centred, shift_image
from halfmap.search.disc import DiscImages, FourierDisc


def _images(n: int = 3, box: int = 24) -> torch.Tensor:
    return torch.randn(n, box, box, generator=torch.Generator().manual_seed(0))


def test_coefficients_are_those_of_the_transform_ring_by_ring():
    disc, images = FourierDisc(24, 7), _images()
    spectra = fft_centred(images, ndim=2)
    found = disc.transform(images)
    for (kx, ky), value in zip(disc.points.long().tolist(), found.T, strict=True):
        assert torch.equal(value, spectra[:, ky, kx])
    assert bool((disc.rings.diff() >= 0).all())
    assert disc.count(3) == int((disc.points.norm(dim=1).round() <= 3).sum())
    assert torch.equal(disc.pack(spectra), found)


def test_images_of_coefficients_hold_all_of_them_and_nothing_else():
    disc, images = FourierDisc(24, 7), _images()
    passed = disc.images(disc.transform(images))
    torch.testing.assert_close(disc.transform(passed), disc.transform(images))
    larger = FourierDisc(24, 11)
    beyond = larger.points.norm(dim=1) > 7
    assert float(larger.transform(passed)[:, beyond].abs().max()) < 1e-4


def test_disc_holds_each_friedel_pair_once():
    disc = FourierDisc(24, 7)
    full = {(kx, ky) for kx in range(-7, 8) for ky in range(-7, 8) if kx * kx + ky * ky <= 49}
    once = {tuple(point) for point in disc.points.long().tolist()}
    assert len(once) == len(disc.points)
    assert once | {(-kx, -ky) for kx, ky in once} == full
    assert float(disc.multiplicity.sum()) == len(full)


def test_unpacked_spectra_give_the_coefficients_back():
    disc = FourierDisc(24, 7)
    coefficients = disc.transform(_images())
    assert torch.equal(disc.pack(disc.unpack(coefficients)), coefficients)


def test_shift_factors_move_images():
    disc, images, shift = FourierDisc(24, 7), _images(), torch.tensor([1.3, -2.4])
    moved = disc.transform(images) * disc.shifts(shift)
    torch.testing.assert_close(moved, disc.transform(shift_image(images, shift_px=shift)), atol=2e-4, rtol=0)


def test_weighting():
    disc, noise = FourierDisc(24, 7), torch.arange(1.0, 9)[None]
    coefficients, ctf = disc.transform(_images()), torch.rand(3, len(disc.points))
    images = DiscImages.of(disc, coefficients, ctf, noise)
    weight = disc.multiplicity / (disc.rings + 1)
    torch.testing.assert_close(images.linear, coefficients * ctf * weight)
    torch.testing.assert_close(images.squared, ctf**2 * weight)


@pytest.mark.parametrize("radius", [0, 12])
def test_radius_that_does_not_fit(radius: int):
    with pytest.raises(ParameterError, match="radius"):
        FourierDisc(24, radius)


def test_images_of_another_box():
    with pytest.raises(ShapeError, match="pixels"):
        FourierDisc(24, 7).transform(_images(box=20))
