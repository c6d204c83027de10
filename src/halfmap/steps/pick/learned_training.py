"""Fine-tune the picker's network on some picks of a data set, of which others may have been left out."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from numpy.random import Generator
from numpy.typing import NDArray
from scipy.special import expit
from torch import Tensor
from torch.nn.functional import softplus

from halfmap.io.atomic import atomic_path
from halfmap.io.micrographs import MicrographItem, load
from halfmap.nets.picker import STRIDE, Picker, score_image
from halfmap.nets.training import train
from halfmap.ops.threads import one_torch_thread
from halfmap.steps.pick.candidates import find_peaks
from halfmap.steps.pick.learned import DISTANCE, PIXELS, mask_at, network_shape, normalised, resized
from halfmap.steps.pick.learned_calibration import fewer_particles
from halfmap.steps.pick.learned_examples import DISC_AREA, Example, batches

BATCH = 16
STEPS = 300
LEARNING_RATE = 1e-3

_CORRECTION = 1.0
"""Share of the gradient that is taken back where the risk of the unlabelled pixels has become negative."""


def prepare(item: MicrographItem, centres: NDArray, diameter: float) -> Example:
    """Read a micrograph as the network sees it, with its picks.

    Parameters
    ----------
    item : MicrographItem
        What to read.
    centres : array (n, 2)
        (x, y) of the picks in pixels of the micrograph.
    diameter : float
        Of the particles in Å.
    """
    image = load(item, diameter / PIXELS)
    old = image.values.shape
    new = network_shape(old, image.pixel_size, diameter)
    values = normalised(resized(torch.from_numpy(image.values), new).numpy(), mask_at(image, new))
    scale = np.array(image.scale) * [old[1] / new[1], old[0] / new[0]]
    return Example(values, centres / scale, np.zeros((0, 3)))


def write_example(path: Path, example: Example) -> None:
    """Keep an example for the training, whole or not at all."""
    with atomic_path(path, durable=False) as temporary, temporary.open("wb") as file:
        np.savez(file, image=example.image, centres=example.centres, ignored=example.ignored)


def read_example(path: Path) -> Example:
    """Read what `write_example` wrote."""
    with np.load(path, allow_pickle=False) as file:
        return Example(file["image"], file["centres"], file["ignored"])


def class_prior(network: Picker, examples: Sequence[Example]) -> float:
    """Share of the target's pixels that lie on particles, picked or not.

    The probabilities of a network's candidates, by looks and the share of particles that each image has, add
    up to the expected number of particles. At least those that were picked are there.

    Parameters
    ----------
    network : Picker
        The general model in evaluation mode.
    examples : sequence of Example
        Images with the picks.
    """
    particles, area = 0.0, 0
    for example in examples:
        score = score_image(network, torch.from_numpy(example.image)).numpy()
        peaks = find_peaks(score, pixel_size=STRIDE, distance=DISTANCE * PIXELS)
        log_odds = peaks.score.astype(np.float64)
        expected = float(expit(log_odds + fewer_particles(log_odds)).sum())
        particles += max(expected, len(example.centres))
        area += example.image.size
    return min(particles * DISC_AREA / area, 0.5)


def pu_loss(prior: float) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    """Risk of a classifier that is trained on positive and unlabelled pixels.

    The unlabelled ones hold `prior` of positives, whose part in their risk is subtracted. Where less than
    nothing remains, the network has learned the very pixels, and the gradient is turned back [1]_. With all
    particles picked and a prior that says so it is the cross-entropy.

    Parameters
    ----------
    prior : float
        Share of positives among all pixels.

    Returns
    -------
    callable
        Of log-odds, targets from 0 to 1 that are above 0 at picks only, and weights; all (n, 1, h, w).

    References
    ----------
    .. [1] Kiryo et al. 2017, NeurIPS 30, arXiv 1703.00593
    """

    def loss(logits: Tensor, target: Tensor, weight: Tensor) -> Tensor:
        positive, every = target * weight, weight.sum().clamp(min=1)
        labelled = positive.sum().clamp(min=1e-6)
        as_positive = prior * (positive * softplus(-logits)).sum() / labelled
        as_negative = prior * (positive * softplus(logits)).sum() / labelled
        unlabelled = (weight * softplus(logits)).sum() / every - as_negative
        if unlabelled < 0:
            return -_CORRECTION * unlabelled
        return as_positive + unlabelled

    return loss


@one_torch_thread()
def fine_tune(
    network: Picker, examples: Sequence[Example], *, rng: Generator, steps: int = STEPS
) -> tuple[float, list[float]]:
    """Train a network further on picks of the data set at hand, in place.

    The statistics of the features and the calibration of the scores stay those of the general model.

    Parameters
    ----------
    network : Picker
        General model in evaluation mode.
    examples : sequence of Example
        Images with the picks, which need not be all.
    rng : Generator
        Decides the crops.
    steps : int
        Batches of 16 crops.

    Returns
    -------
    float
        Share of pixels on particles that was assumed.
    list of float
        Mean losses along the training.
    """
    prior = class_prior(network, examples)
    calibration = network.temperature.clone(), network.offset.clone()
    # The loss is of single pixels; temperature and offset speak of candidates.
    network.temperature.fill_(1.0)
    network.offset.fill_(0.0)
    drawn = batches(_again(examples, rng), size=BATCH, per_example=BATCH, pool=BATCH * 8, rng=rng)
    losses = train(
        network, drawn, pu_loss(prior), steps=steps, learning_rate=LEARNING_RATE, report=math.ceil(steps / 10)
    )
    network.temperature.copy_(calibration[0])
    network.offset.copy_(calibration[1])
    return prior, losses


def _again(examples: Sequence[Example], rng: Generator) -> Iterator[Example]:
    while True:
        for i in rng.permutation(len(examples)):
            yield examples[i]
