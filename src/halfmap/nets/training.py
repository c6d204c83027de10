"""The one loop that trains networks."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn

from halfmap.log import log


def train(
    network: nn.Module,
    batches: Iterable[tuple[Tensor, ...]],
    loss: Callable[..., Tensor],
    *,
    steps: int,
    learning_rate: float,
    weight_decay: float = 1e-4,
    warm_up: float = 0.1,
    half: bool = False,
    report: int = 100,
) -> list[float]:
    """Fit a network's weights in place by AdamW under a rate that rises and falls once.

    Parameters
    ----------
    network : Module
        In the mode wanted (with or without batch statistics), on the device that is to compute.
    batches : iterable of tuple of Tensor
        First the network's input, then what the loss compares its output with; endless or long enough.
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

    Returns
    -------
    list of float
        Those means.

    References
    ----------
    .. [1] Loshchilov & Hutter 2019, arXiv 1711.05101
    .. [2] Smith & Topin 2019, DOI 10.1117/12.2520589
    """
    device = next(network.parameters()).device
    trained = [weight for weight in network.parameters() if weight.requires_grad]
    groups = [
        {"params": [weight for weight in trained if weight.ndim > 1], "weight_decay": weight_decay},
        {"params": [weight for weight in trained if weight.ndim <= 1], "weight_decay": 0.0},
    ]
    optimiser = torch.optim.AdamW(groups, lr=learning_rate)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimiser, learning_rate, total_steps=steps + 1, pct_start=warm_up, final_div_factor=4.0
    )
    means: list[float] = []
    total = 0.0
    for step, batch in zip(range(1, steps + 1), batches, strict=False):
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
    return means
