"""The one loop that trains networks."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from copy import deepcopy
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from halfmap.errors import ParameterError
from halfmap.io.atomic import atomic_path
from halfmap.log import log


@dataclass
class Progress:
    """How a training gets on: its loss on data that it never sees, the best weights, where it was stopped.

    Parameters
    ----------
    held_out : callable
        Loss of a network in evaluation mode on data that is not trained on.
    every : int
        Steps between two looks at it.
    file : path
        Where all that is needed to go on is kept at each look.
    """

    held_out: Callable[[nn.Module], float]
    every: int
    file: Path
    losses: list[tuple[int, float]] = field(default_factory=list)
    """Steps, and the loss on held-out data after them."""
    best: tuple[float, dict[str, Tensor]] = (math.inf, {})

    def look(self, network: nn.Module, step: int) -> None:
        """Note the loss on held-out data, and the weights if they are the best so far."""
        was_training = network.training
        network.eval()
        with torch.no_grad():
            value = self.held_out(network)
        network.train(was_training)
        self.losses.append((step, value))
        if value < self.best[0]:
            self.best = value, deepcopy(network.state_dict())

    def save(self, step: int, means: list[float], total: float, *parts: Any) -> None:
        """Keep all that is needed to go on, whole or not at all; `total` is of losses since the last mean."""
        state = {
            "step": step,
            "means": means,
            "total": total,
            "losses": self.losses,
            "best": self.best,
            "parts": [part.state_dict() for part in parts],
        }
        with atomic_path(self.file, durable=False) as temporary:
            torch.save(state, temporary)

    def load(self, *parts: Any) -> tuple[int, list[float], float]:
        """Take up where an earlier run was stopped: its steps, its means, and the losses since the last."""
        if not self.file.exists():
            return 0, [], 0.0
        state = torch.load(self.file, map_location="cpu", weights_only=True)
        for part, kept in zip(parts, state["parts"], strict=True):
            part.load_state_dict(kept)
        self.losses = [(int(step), float(value)) for step, value in state["losses"]]
        self.best = state["best"][0], state["best"][1]
        return state["step"], state["means"], state.get("total", 0.0)


def bfloat16_pays(device: str) -> bool:
    """Whether convolutions are quicker in bfloat16: on GPUs, and on processors that know it."""
    if not device.startswith("cpu"):
        return True
    knows = getattr(torch.cpu, "_is_avx512_bf16_supported", None)
    return bool(knows is not None and knows())


def train(
    network: nn.Module,
    batches: Iterable[tuple[Tensor, ...]] | Callable[[int], Iterable[tuple[Tensor, ...]]],
    loss: Callable[..., Tensor],
    *,
    steps: int,
    learning_rate: float,
    weight_decay: float = 1e-4,
    warm_up: float = 0.1,
    half: bool = False,
    report: int = 100,
    progress: Progress | None = None,
) -> list[float]:
    """Fit a network's weights in place by AdamW under a rate that rises and falls once.

    Parameters
    ----------
    network : Module
        In the mode wanted (with or without batch statistics), on the device that is to compute.
    batches : iterable of tuple of Tensor
        First the network's input, then what the loss compares its output with; endless or long enough. Where
        a training may be gone on with: a function of how many are done, which gives the others.
    loss : callable
        ``loss(output, *rest of the batch)``, a scalar to make small.
    steps : int
        Batches to take.
    learning_rate : float
        Highest rate, after the `warm_up` share of the steps; it falls as a cosine to a hundredth.
    weight_decay : float
        Of all weights with more than one axis.
    warm_up : float
        Share of the steps.
    half : bool
        Compute convolutions in bfloat16, which halves the time where the processor knows it.
    report : int
        Steps between lines in the log, each with the mean loss since the one before.
    progress : Progress, optional
        Looks at held-out data now and then, keeps what is needed to go on, and begins there if it is kept. At
        the end the network has the weights that were best.

    Returns
    -------
    list of float
        Those means.

    References
    ----------
    .. [1] Loshchilov & Hutter 2019, arXiv 1711.05101
    .. [2] Smith & Topin 2019, DOI 10.1117/12.2520589

    Raises
    ------
    ParameterError
        If the loss on held-out data was never a number.
    """
    device = next(network.parameters()).device
    trained = [weight for weight in network.parameters() if weight.requires_grad]
    optimiser = _optimiser(trained, learning_rate, weight_decay)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimiser, learning_rate, total_steps=steps + 1, pct_start=warm_up, final_div_factor=4.0
    )
    done, means, total = 0, list[float](), 0.0
    if progress is not None:
        done, means, total = progress.load(network, optimiser, schedule)
    for step, batch in zip(
        range(done + 1, steps + 1), batches(done) if callable(batches) else batches, strict=False
    ):
        image, *rest = (tensor.to(device) for tensor in batch)
        optimiser.zero_grad(set_to_none=True)
        with torch.autocast(device.type, torch.bfloat16, enabled=half):
            output = network(image)
        value = loss(output.float(), *rest)
        value.backward()
        nn.utils.clip_grad_norm_(trained, 1.0)
        optimiser.step()
        schedule.step()
        total += float(value.detach())
        if step % report == 0:
            means.append(total / report)
            total = 0.0
            log.info("step %d of %d, mean loss %.4f", step, steps, means[-1])
        if progress is not None and (step % progress.every == 0 or step == steps):
            progress.look(network, step)
            log.info("step %d of %d, loss %.4f on data held out", step, steps, progress.losses[-1][1])
            progress.save(step, means, total, network, optimiser, schedule)
    if progress is not None and progress.losses:
        if not progress.best[1]:
            raise ParameterError("the loss came to no number", hint="lower --learning-rate")
        network.load_state_dict(progress.best[1])
    return means


def _optimiser(trained: list[nn.Parameter], learning_rate: float, weight_decay: float) -> torch.optim.AdamW:
    groups = [
        {"params": [weight for weight in trained if weight.ndim > 1], "weight_decay": weight_decay},
        {"params": [weight for weight in trained if weight.ndim <= 1], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=learning_rate)
