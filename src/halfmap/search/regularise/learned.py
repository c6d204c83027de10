"""What a network expects a half map to be of, and how far it is believed."""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from halfmap.nets.map_prior import MapPrior, load_map_prior
from halfmap.ops.filters import radial_average, radial_profile_to_grid
from halfmap.ops.fourier import irfft3, rfft3
from halfmap.search.halfmaps import Sums, solved, solved_towards
from halfmap.search.regularise import Evidence, Filter, Pair

WEIGHTS = "map_prior"
"""Those that ship."""

_THRESHOLD = 0.143
_SOFT = 3
"""Shells over which what the network says ends, before those that half maps do not agree in."""

_MARGIN = 4
"""Voxels around the mask that the network sees."""

_INSIDE = 0.5
"""Of the mask, where values are taken."""

_FAINT = 1e-3
_LESS, _MORE = 0.5, 4.0
"""Factors of the error that a network is known for, by what it says itself."""


@dataclass(frozen=True)
class Learned:
    """Posterior mean with a network's expectation for the prior's.

    The network sees one half map, made white, and the correlation of both, and says what the map is of. How
    much that is to count beside the images, from which it has its own errors, is known for each correlation
    that a shell may have, from structures that it was not trained on; where it says itself that it is less
    sure, it counts less. Between that expectation and the sums of the images, each voxel of the transform is
    weighed: where many images say what it is, these rule. Beyond
    the resolution of the half maps there is nothing. Of the other half set it knows the correlation with it.

    Parameters
    ----------
    weights : path
        Of the network.
    device : str

    References
    ----------
    .. [1] Ramirez-Aportela, Carazo & Sorzano 2022, IUCrJ 9, 632-638, DOI 10.1107/S2052252522006959
    .. [2] Kimanius et al. 2021, IUCrJ 8, 60-75, DOI 10.1107/S2052252520014384
    """

    weights: Path
    device: str = "cpu"

    def network(self) -> tuple[MapPrior, Tensor]:
        """Network, and how far it errs (3, known).

        Correlations of half maps; the share of the signal's power that makes the best mean of what it says
        and the images; and the power of what it errs by over that of all that is there.

        Raises
        ------
        FileFormatError
            If the file holds none.
        """
        stamp = self.weights.stat().st_mtime_ns if self.weights.exists() else 0
        return _load(self.weights, stamp, self.device)

    def __call__(self, evidence: Evidence) -> Filter:
        """Filter for all sums of an iteration."""
        network, error = self.network()

        def made(halves: Pair, name: str) -> tuple[Tensor, Tensor]:
            first, second = (_filtered(network, error, evidence, own, h) for h, own in enumerate(halves))
            return first, second

        return made


@dataclass(frozen=True, eq=False)
class White:
    """How a map is made white for the network, and back.

    Attributes
    ----------
    place : tuple of slice
        Part of the box that the network sees.
    noisy, wiener, signal : Tensor (n, n, n // 2 + 1)
        Factors of the half-spectrum: of all that is there, of what Wiener's filter leaves of it, and of a map
        that is signal alone.
    back : Tensor (n, n, n // 2 + 1)
        Factors of a white map's that make it one of signal.
    unit : float
        Values of a white map, within the mask, have this standard deviation.
    """

    place: tuple[slice, ...]
    noisy: Tensor
    wiener: Tensor
    signal: Tensor
    back: Tensor
    unit: float

    @classmethod
    def of(cls, volume: Tensor, mask: Tensor, correlation: Tensor, *, multiple: int) -> White:
        """By the power that a map (n, n, n) has within its mask.

        Parameters
        ----------
        volume, mask : Tensor (n, n, n)
            Unfiltered map, and where the particle is.
        correlation : Tensor (shells,)
            Of both half maps within the mask, 0 from the first shell where there is none.
        multiple : int
            Of the sides of what the network sees.
        """
        n, shape = len(volume), tuple(volume.shape)
        agreed = volume.new_zeros(n // 2 + 1)
        held = min(len(correlation), len(agreed))
        agreed[:held] = correlation[:held].to(volume)
        ends = ending(agreed)
        power = radial_average(rfft3(volume * mask).abs().square(), shape=shape)[: len(agreed)]
        amplitude = power.clamp_min(torch.finfo(power.dtype).tiny).sqrt()
        signal = amplitude * agreed.clamp_min(_FAINT).sqrt()
        noisy, wiener, likely, back = (
            radial_profile_to_grid(profile, shape=shape)
            for profile in (ends / amplitude, ends * agreed / signal, ends / signal, ends.sign() * signal)
        )
        inside = irfft3(rfft3(volume) * noisy, shape=shape)[mask > _INSIDE]
        unit = float(inside.std()) if len(inside) > 1 else 0.0
        return cls(_around(mask, multiple), noisy, wiener, likely, back, unit or 1.0)

    def seen(self, volume: Tensor) -> Tensor:
        """What the network is shown (2, d, h, w) of a map (n, n, n): filtered, and all that is there."""
        spectrum, shape = rfft3(volume), tuple(volume.shape)
        both = [irfft3(spectrum * each, shape=shape)[self.place] for each in (self.wiener, self.noisy)]
        return torch.stack(both) / self.unit

    def target(self, truth: Tensor) -> Tensor:
        """What the network should say (d, h, w) of a map that is the truth (n, n, n)."""
        return irfft3(rfft3(truth) * self.signal, shape=truth.shape)[self.place] / self.unit

    def restored(self, white: Tensor, n: int) -> Tensor:
        """Half-spectrum of the map (n, n, n) of which what the network says (d, h, w) is the white one."""
        whole = white.new_zeros(n, n, n)
        whole[self.place] = white * self.unit
        return rfft3(whole) * self.back


def ending(correlation: Tensor) -> Tensor:
    """Weights of shells: 1, and softly 0 where half maps agree no more."""
    last = int((correlation[1:] >= _THRESHOLD).int().cumprod(0).sum())
    shells = torch.arange(len(correlation), device=correlation.device)
    part = ((last + 1 - shells) / _SOFT).clamp(0, 1)
    return 0.5 - 0.5 * torch.cos(math.pi * part)


def _filtered(network: MapPrior, error: Tensor, evidence: Evidence, sums: Sums, half: int) -> Tensor:
    """Map (n, n, n) of greatest posterior, where the network says what is likely."""
    volume = solved(sums, least=evidence.least[half])
    expected, share = _expected(network, error, volume, evidence.mask, evidence.correlation)
    prior = evidence.prior[half] / share[: evidence.prior.shape[1]].to(evidence.prior)
    return solved_towards(sums, prior, expected)


def posterior_mean(
    volume: Tensor, mask: Tensor, correlation: Tensor, network: MapPrior, error: Tensor
) -> Tensor:
    """Mean of a map and of what a network says that it is of, shell by shell as sure as both are.

    Parameters
    ----------
    volume, mask : Tensor (n, n, n)
        Unfiltered map, and where the particle is.
    correlation : Tensor (shells,)
        That it would have with another map as noisy, within the mask; 0 from where there is none.
    network, error
        As `Learned.network` gives them.

    Returns
    -------
    Tensor (n, n, n)
        Nothing beyond the shells that correlate.
    """
    shape = tuple(volume.shape)
    expected, share = _expected(network, error, volume, mask, correlation)
    agreed = correlation.double().cpu().clamp(0, 1 - _FAINT)
    # Precisions, for a signal of power 1 in each shell.
    images, network_ = agreed / (1 - agreed), 1 / share
    weights = [
        radial_profile_to_grid((each * (ending(agreed) > 0)).to(volume), shape=shape)
        for each in (images / (images + network_), network_ / (images + network_))
    ]
    return irfft3(rfft3(volume) * weights[0] + expected * weights[1], shape=shape)


def _expected(
    network: MapPrior, error: Tensor, volume: Tensor, mask: Tensor, correlation: Tensor
) -> tuple[Tensor, Tensor]:
    """Half-spectrum (n, n, n // 2 + 1) of what a map is of, and its error's share of the signal (shells,)."""
    white = White.of(volume, mask, correlation, multiple=network.shape.multiple)
    with torch.inference_mode():
        found = network(white.seen(volume)[None])[0].clone()
    agreed = correlation.cpu().double()
    share = _known(error, agreed, 1) * _surer(white, found[1], error, mask, agreed)
    # Where it says nothing, what is likely is nothing, as surely as by the half maps. Of shells that it sees
    # faintly it knows little.
    share = 1 - (1 - share.clamp_max(1)) * ending(agreed).square()
    return white.restored(found[0], len(volume)), share


def _known(error: Tensor, correlation: Tensor, row: int) -> Tensor:
    """What a network is known for, by the correlation of the half maps in each shell (shells,)."""
    known = error.numpy()
    return torch.from_numpy(np.interp(correlation.numpy(), known[0], known[row]))


def _surer(white: White, spread: Tensor, error: Tensor, mask: Tensor, correlation: Tensor) -> float:
    """Variance that the network states over that which it is known for at such correlations."""
    inside = mask[white.place] > _INSIDE
    if not bool(inside.any()):
        return 1.0
    stated = float(spread[inside].mul(2).exp().mean())
    # All that is there has the same power in all shells, and variance 1: each counts by its voxels.
    agreed = correlation[: len(mask) // 2 + 1]
    counts = torch.arange(len(agreed), dtype=torch.float64).square() * ending(agreed).square()
    known = float((counts * _known(error, agreed, 2)).sum() / counts.sum().clamp_min(1))
    return min(max(stated / max(known, 1e-9), _LESS), _MORE)


def _around(mask: Tensor, multiple: int) -> tuple[slice, ...]:
    """Part of a box that holds a mask, of sides that are multiples of a number."""
    found = []
    for axis in range(3):
        other = [each for each in range(3) if each != axis]
        inside = (mask.amax(other) > _FAINT).nonzero().flatten()
        n = mask.shape[axis]
        low, high = (int(inside[0]), int(inside[-1]) + 1) if len(inside) else (0, n)
        low, high = max(0, low - _MARGIN), min(n, high + _MARGIN)
        side = min(math.ceil((high - low) / multiple) * multiple, n - n % multiple)
        low = max(0, min(low, n - side))
        found.append(slice(low, low + side))
    return tuple(found)


@functools.lru_cache(maxsize=2)
def _load(weights: Path, stamp: int, device: str) -> tuple[MapPrior, Tensor]:
    network, record = load_map_prior(weights)
    error = record["error"]
    rows = [error[name] for name in ("correlation", "share", "power")]
    return network.to(device), torch.tensor(rows, dtype=torch.float64)
