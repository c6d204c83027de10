"""The picker's network: what its scores see, where they lie, and that tiles change nothing."""

from __future__ import annotations

import pytest
import torch

from halfmap.nets.picker import REACH, STRIDE, Picker, score_image


@pytest.fixture(scope="module")
def network() -> Picker:
    torch.manual_seed(1)
    return Picker().eval()


def noise(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(2))


@pytest.mark.parametrize(("shape", "tile"), [((300, 412), 128), ((131, 257), 64), ((90, 40), 128)])
def test_tiles_give_what_the_whole_image_gives(network, shape, tile):
    image = noise(*shape)
    whole, tiled = score_image(network, image, tile=4096), score_image(network, image, tile=tile)
    assert whole.shape == tiled.shape == ((shape[0] + 1) // 2, (shape[1] + 1) // 2)
    # Rounding of float32 through some twenty layers.
    assert torch.allclose(whole, tiled, atol=1e-4 * float(whole.abs().max()), rtol=0)


def test_a_score_sees_no_farther_than_the_tiles_overlap(network):
    image = noise(1, 1, 512, 512).requires_grad_()
    network(image)[0, 0, 128, 128].backward()
    assert image.grad is not None
    y, x = image.grad[0, 0].nonzero().T
    reach = max(int((place - 128 * STRIDE).abs().max()) for place in (y, x))
    assert REACH // 2 < reach <= REACH


def test_scores_move_with_the_image(network):
    image = noise(1, 1, 400, 400)
    with torch.no_grad():
        still, moved = network(image), network(image.roll((16, -24), (2, 3)))
    inside = slice(60, 140)
    expected = still.roll((16 // STRIDE, -24 // STRIDE), (2, 3))
    assert torch.allclose(moved[..., inside, inside], expected[..., inside, inside], atol=1e-5)


def test_calibration_is_a_line(network):
    image = noise(1, 1, 64, 64)
    with torch.no_grad():
        before = network(image)
        network.temperature.fill_(2.0)
        network.offset.fill_(-1.0)
        after = network(image)
        network.temperature.fill_(1.0)
        network.offset.fill_(0.0)
    assert torch.allclose(after, before / 2 - 1, atol=1e-6)
