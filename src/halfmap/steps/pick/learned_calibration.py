"""A network's log-odds under the share of particles that the data have, and the probabilities they are."""

from __future__ import annotations

import json
import math
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray
from scipy.ndimage import gaussian_filter1d
from scipy.special import expit

from halfmap.nets.weights import record_file, shipped
from halfmap.steps.pick.calibrate import Calibration

_BINS, _SMOOTH = 128, 1.5
_ROUNDS = 200


@lru_cache(maxsize=1)
def calibrated_share() -> float:
    """Share of particles among the candidates that the general model's scores were calibrated on.

    Models that ``pick train`` makes keep that calibration.
    """
    record = json.loads(record_file(shipped("picker")).read_text(encoding="utf-8"))
    return float(record["calibrated_on"]["share_of_particles"])


def calibrate_log_odds(score: NDArray, *, probability: float = 0.5) -> Calibration:
    """Threshold and probabilities of scores that are log-odds.

    Parameters
    ----------
    score : array (n,)
        Log-odds of all candidates of all micrographs.
    probability : float
        Least probability of a pick.
    """
    score = np.asarray(score, np.float64)[np.isfinite(score)]
    if len(score) == 0:
        return Calibration(math.inf, "none", np.array([0.0, 1.0]), np.zeros(2))
    threshold = math.log(probability / (1 - probability))
    likely = expit(score)
    kept = score >= threshold
    edges = np.linspace(score.min(), score.max() + 1e-6, _BINS + 1)
    middles = (edges[1:] + edges[:-1]) / 2
    particles, background = (
        gaussian_filter1d(np.histogram(score, edges, weights=share)[0], _SMOOTH)
        / (len(score) * (edges[1] - edges[0]))
        for share in (likely, 1 - likely)
    )
    return Calibration(
        threshold=threshold if kept.any() else math.inf,
        kind="two populations" if kept.any() else "none",
        grid=middles,
        probability=expit(middles),
        weights=(float(1 - likely.mean()), float(likely.mean()), 0.0),
        means=(float(np.average(score, weights=1 - likely)), float(np.average(score, weights=likely))),
        picked=int(kept.sum()),
        expected_false=float((1 - likely[kept]).sum()),
        missed=float(likely[~kept].sum()),
        densities=(middles, background, particles, np.zeros(_BINS)),
    )


def fewer_particles(score: NDArray, share: float | None = None) -> float:
    """Change of the log-odds, 0 or less, by a share of particles that is below that of the calibration.

    Parameters
    ----------
    score : array (n,)
        Log-odds under the share of the calibration.
    share : float, optional
        Share of particles in the calibration; the general model's if not given.

    Notes
    -----
    Where fewer of the candidates are particles, the odds fall by as much [1]_; they are not raised where
    there are more, which would trust the network farther than it was tested.

    References
    ----------
    .. [1] Saerens, Latinne & Decaestecker 2002, Neural Comput. 14, 21-41, DOI 10.1162/089976602753284446
    """
    if len(score) == 0:
        return 0.0
    most = calibrated_share() if share is None else share
    usual = math.log(most / (1 - most))
    lowest = 1 / (10 * len(score) + 1)
    share = most
    for _ in range(_ROUNDS):
        before = share
        share = max(float(expit(score + math.log(share / (1 - share)) - usual).mean()), lowest)
        if share >= most:
            return 0.0
        if before - share < 1e-3 * share:
            break
    return math.log(share / (1 - share)) - usual
