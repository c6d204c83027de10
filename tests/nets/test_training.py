"""The training loop finds a known optimum, and the same one every time."""

from __future__ import annotations

import torch
from torch import nn

from halfmap.nets.training import train

SLOPE = torch.tensor([[1.5, -2.0, 0.5]])


def batches(seed: int):
    generator = torch.Generator().manual_seed(seed)
    while True:
        x = torch.randn(64, 3, generator=generator)
        yield x, x @ SLOPE.T + 0.75


def fitted(seed: int) -> tuple[nn.Linear, list[float]]:
    torch.manual_seed(seed)
    network = nn.Linear(3, 1)
    losses = train(
        network,
        batches(seed),
        nn.functional.mse_loss,
        steps=400,
        learning_rate=0.05,
        weight_decay=0.0,
        report=50,
    )
    return network, losses


def test_a_line_is_found():
    network, losses = fitted(0)
    # The rate ends at 0.05 / 100, and Adam's steps are about the rate.
    assert torch.allclose(network.weight, SLOPE, atol=2e-3)
    assert torch.allclose(network.bias, torch.tensor([0.75]), atol=2e-3)
    assert len(losses) == 8
    assert losses[-1] < 1e-3 * losses[0]


def test_the_same_seed_gives_the_same_weights():
    assert torch.equal(fitted(4)[0].weight, fitted(4)[0].weight)


def test_weights_that_are_frozen_stay():
    network = nn.Linear(3, 1)
    network.bias.requires_grad_(False)
    before = network.bias.clone()
    train(network, batches(1), nn.functional.mse_loss, steps=20, learning_rate=0.05)
    assert torch.equal(network.bias, before)
