"""The training loop finds a known optimum, and the same one every time."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn.functional import mse_loss

from halfmap.errors import ParameterError
from halfmap.nets.training import Progress, train

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


def _batches(done: int):
    for number in itertools.count(done):
        generator = torch.Generator().manual_seed(number)
        x = torch.randn(8, 3, generator=generator)
        yield x, (x @ torch.tensor([[1.0], [-2.0], [0.5]])) + 0.1 * torch.randn(8, 1, generator=generator)


def _line(path: Path, held_out) -> tuple[nn.Module, Progress, list[float]]:
    torch.manual_seed(1)
    network = nn.Linear(3, 1)
    progress = Progress(held_out, every=10, file=path)
    means = train(network, _batches, mse_loss, steps=40, learning_rate=0.1, report=7, progress=progress)
    return network, progress, means


def test_a_training_that_was_stopped_ends_as_one_that_was_not(tmp_path: Path):
    looks = iter(range(100))

    def decreasing(network: nn.Module) -> float:
        return -float(next(looks))

    whole, _, means = _line(tmp_path / "a.pt", decreasing)

    def stops(network: nn.Module) -> float:
        number = next(looks)
        if number == 6:
            raise KeyboardInterrupt
        return -float(number)

    with pytest.raises(KeyboardInterrupt):
        _line(tmp_path / "b.pt", stops)
    again, progress, found = _line(tmp_path / "b.pt", decreasing)
    assert found == pytest.approx(means), "losses since the last mean are not lost"
    for one, other in zip(whole.parameters(), again.parameters(), strict=True):
        torch.testing.assert_close(one, other)
    assert [step for step, _ in progress.losses] == [10, 20, 30, 40]


def test_the_weights_that_were_best_on_held_out_data_are_kept(tmp_path: Path):
    seen = []

    def second_is_best(network: nn.Module) -> float:
        seen.append([weight.detach().clone() for weight in network.parameters()])
        return 0.0 if len(seen) == 2 else 1.0

    network, progress, _ = _line(tmp_path / "c.pt", second_is_best)
    assert progress.best[0] == 0.0
    for weight, kept in zip(network.parameters(), seen[1], strict=True):
        assert torch.equal(weight, kept)


def test_a_training_that_comes_to_no_number_is_no_model(tmp_path: Path):
    with pytest.raises(ParameterError, match="came to no number"):
        _line(tmp_path / "d.pt", lambda network: float("nan"))
