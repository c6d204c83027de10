"""The denoiser's networks: what they see, tiles without seams, files."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from halfmap.errors import FileFormatError
from halfmap.nets.denoiser import FULL, SMALL, Denoiser, Shape, denoise, load_denoiser, save_denoiser

SHAPES = [
    Shape(blocks=1, filters=4, expansion=2),
    Shape(levels=2, blocks=2, filters=4, expansion=2),
    Shape(kind="plain", blocks=2, filters=8),
]


def network(shape: Shape) -> Denoiser:
    torch.manual_seed(3)
    made = Denoiser(shape)
    with torch.no_grad():
        for name, weight in made.named_parameters():
            if name.endswith("original0"):
                weight.mul_(2.0)  # each convolution says something
    return made.eval()


@pytest.mark.parametrize("shape", SHAPES)
def test_reach_holds_all_that_has_a_part_in_a_pixel(shape: Shape):
    torch.manual_seed(2)
    size = 4 * shape.reach + shape.multiple
    image = torch.randn(8, 1, size, size, dtype=torch.float64, requires_grad=True)
    middle = size // 2
    # Of several images: what is not rectified in one may be in another.
    network(shape).double()(image)[:, 0, middle, middle].sum().backward()
    assert image.grad is not None
    _, _, y, x = image.grad.nonzero().T
    far = int(max((y - middle).abs().max(), (x - middle).abs().max()))
    assert 0.5 * shape.reach < far <= shape.reach


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("size", [(96, 128), (61, 83), (7, 150)])
def test_tiles_have_no_seams(shape: Shape, size: tuple[int, int]):
    torch.manual_seed(1)
    image, net = torch.randn(size), network(shape)
    whole = denoise(net, image, tile=256)
    assert whole.shape == image.shape
    for tile in (16, 40):
        torch.testing.assert_close(denoise(net, image, tile=tile), whole, rtol=1e-4, atol=1e-5)


def test_a_network_far_from_the_border_sees_no_border():
    shape = SHAPES[0]
    torch.manual_seed(1)
    image, net = torch.randn(128, 128), network(shape)
    with torch.no_grad():
        plain = net(image[None, None])[0, 0]
    inner = slice(shape.reach, -shape.reach)
    torch.testing.assert_close(denoise(net, image)[inner, inner], plain[inner, inner], rtol=1e-4, atol=1e-5)


def test_the_small_layout_is_a_thirteenth_of_the_published_one():
    full, small = (
        sum(weight.numel() for name, weight in Denoiser(shape).named_parameters() if weight.ndim == 4)
        for shape in (FULL, SMALL)
    )
    assert full / small > 13


@pytest.mark.parametrize("shape", SHAPES)
def test_a_network_comes_back_from_its_files(tmp_path: Path, shape: Shape):
    net = network(shape)
    save_denoiser(tmp_path / "model.npz", net, {"version": 1, "pixel_size": 1.5})
    again, record = load_denoiser(tmp_path / "model.npz")
    assert (again.shape, record["pixel_size"], again.training) == (shape, 1.5, False)
    image = torch.randn(1, 1, 32, 32)
    with torch.no_grad():
        torch.testing.assert_close(again(image), net(image), rtol=0.01, atol=0.01)


def test_a_file_of_another_network_is_refused(tmp_path: Path):
    from halfmap.nets.weights import save_weights

    save_weights(tmp_path / "model.npz", torch.nn.Linear(2, 2), {"kind": "picker"})
    with pytest.raises(FileFormatError, match="layout"):
        load_denoiser(tmp_path / "model.npz")
