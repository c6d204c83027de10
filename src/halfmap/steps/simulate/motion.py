"""How the specimen moves under the beam: drift of the whole, a smooth deformation, and their exact record."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import polars as pl
from numpy.random import Generator
from numpy.typing import ArrayLike, NDArray

from halfmap.errors import FileFormatError
from halfmap.io.star import read_star, write_star

_WAVES = 48
"""Waves whose sum is the random field of one mode."""

_SHORTEST_WAVE_A = 400.0
_GENERAL = ("rlnImageSizeZ", "rlnMicrographDoseRate", "rlnMicrographPreExposure")
_DRIFT_MODES = ((2.5, 0.6), (40.0, 0.4))
"""Exposure (e/Å²) over which a part of the drift fades, and that part; the first few frames move most."""

_LOCAL_MODES = ((4.0, 0.75), (20.0, 0.66))
"""The same for the deformation; the parts are root mean squares of independent fields and add in square."""


@dataclass(frozen=True, eq=False)
class Motion:
    """Displacement of the specimen in every frame of a movie, relative to the middle of the first.

    Every part grows with the exposure e as (1 - exp(-e / tau)) / (1 - exp(-e_end / tau)), from the beginning
    of the exposure, that before the first frame included, to its end; how it is cut into frames changes
    nothing. What had moved by the middle of the first frame is taken off.

    Parameters
    ----------
    n_frames : int
        Frames.
    dose_per_frame, pre_exposure : float
        Exposure of a frame, and before the first, e/Å².
    drift : array (m, 3)
        tau in e/Å², and the displacement (x, y) in Å of the whole view over the whole exposure.
    jitter : array (n_frames, 2)
        A displacement (x, y) in Å of each frame alone; the first is zero.
    waves : array (w, 6)
        The deformation as a sum of cosines: tau, wave vector (x, y) in 1/Å, phase in radian, and the
        displacement (x, y) in Å at the crest over the whole exposure. Positions are those in the middle of
        the first frame, in Å from the centre of the first pixel.
    """

    n_frames: int
    dose_per_frame: float
    pre_exposure: float
    drift: NDArray
    jitter: NDArray
    waves: NDArray

    def trajectory(self, x: ArrayLike, y: ArrayLike, frame: ArrayLike) -> NDArray:
        """Displacement in Å of what lies at (x, y) Å in the first frame.

        Parameters
        ----------
        x, y, frame : array (...,)
            Broadcast against each other. Frames are counted from 0, whole numbers are their middles; between
            them the motion goes on smoothly, with the jitter of the nearest.

        Returns
        -------
        array (..., 2)
            (x, y) in Å, exact.
        """
        x, y, frame = np.broadcast_arrays(*(np.asarray(value, np.float64) for value in (x, y, frame)))
        total = self.common(frame)
        for tau, qx, qy, phase, ax, ay in self.waves:
            crest = self._growth(np.array([tau]), frame)[..., 0] * np.cos(
                2 * np.pi * (qx * x + qy * y) + phase
            )
            total = total + crest[..., None] * (ax, ay)
        return total

    def common(self, frame: ArrayLike) -> NDArray:
        """Drift and jitter, which the whole view has: (..., 2) in Å."""
        frame = np.asarray(frame, np.float64)
        nearest = np.clip(np.rint(frame), 0, self.n_frames - 1).astype(int)
        parts = self._growth(self.drift[:, 0], frame)[..., None] * self.drift[:, 1:]
        return self.jitter[nearest] + parts.sum(axis=-2)

    def local_field(self, x: NDArray, y: NDArray, frame: float) -> NDArray:
        """Deformation alone, without drift and jitter, on the grid of x (w,) and y (h,): (h, w, 2) in Å."""
        field = np.zeros((len(y), len(x), 2))
        if len(self.waves) == 0:
            return field
        tau, qx, qy, phase = self.waves[:, :4].T
        along_x = np.exp(2j * np.pi * np.outer(qx, x))
        along_y = np.exp(1j * (2 * np.pi * np.outer(y, qy) + phase)) * self._growth(tau, frame)
        for axis in (0, 1):
            # Not a matrix product of BLAS, whose threads round otherwise than one.
            field[..., axis] = np.einsum("yw,wx->yx", along_y * self.waves[:, 4 + axis], along_x).real
        return field

    def smear(self, x: ArrayLike, y: ArrayLike, frame: int) -> NDArray:
        """Displacement in Å between the beginning and the end of a frame; its images are blurred along it."""
        ends = [self.trajectory(x, y, frame + half) for half in (-0.5 + 1e-9, 0.5 - 1e-9)]
        return ends[1] - ends[0]

    def _growth(self, tau: NDArray, frame: ArrayLike) -> NDArray:
        """Part of the whole displacement made since the middle of the first frame, (..., len(tau))."""
        before = self.pre_exposure + self.dose_per_frame / 2
        since = np.asarray(frame, np.float64)[..., None] * self.dose_per_frame
        whole = self.pre_exposure + self.n_frames * self.dose_per_frame
        return np.exp(-before / tau) * np.expm1(-since / tau) / np.expm1(-whole / tau)

    def write(self, path: str | Path) -> None:
        """Write everything that `trajectory` needs as STAR."""
        frames = np.arange(1, self.n_frames + 1)
        names = ("hmTau", "hmWaveX", "hmWaveY", "hmWavePhase", "hmMotionX", "hmMotionY")
        blocks: dict[str, pl.DataFrame | Mapping[str, str | int | float]] = {
            "general": {
                "rlnImageSizeZ": self.n_frames,
                "rlnMicrographDoseRate": self.dose_per_frame,
                "rlnMicrographPreExposure": self.pre_exposure,
            },
            "drift": pl.DataFrame(dict(zip(("hmTau", "hmMotionX", "hmMotionY"), self.drift.T, strict=True))),
            "jitter": pl.DataFrame(
                {
                    "rlnMicrographFrameNumber": frames,
                    "hmMotionX": self.jitter[:, 0],
                    "hmMotionY": self.jitter[:, 1],
                }
            ),
        }
        if len(self.waves):
            blocks["deformation"] = pl.DataFrame(dict(zip(names, self.waves.T, strict=True)))
        write_star(path, blocks)


def read_motion(path: str | Path) -> Motion:
    """Read back what `Motion.write` wrote.

    Raises
    ------
    FileFormatError
        If the file does not hold a motion.
    """
    blocks = read_star(path)
    general, tables = blocks.get("general"), {}
    for name in ("drift", "jitter", "deformation"):
        table = blocks.get(name)
        tables[name] = table if isinstance(table, pl.DataFrame) else None
    if not isinstance(general, dict) or not set(_GENERAL) <= set(general):
        general = None
    if general is None or tables["drift"] is None or tables["jitter"] is None:
        raise FileFormatError("holds no motion", path=path, hint="give a file of the Truth folder")
    waves = tables["deformation"]
    n_frames, dose_per_frame, pre_exposure = (float(general[label]) for label in _GENERAL)
    return Motion(
        n_frames=round(n_frames),
        dose_per_frame=dose_per_frame,
        pre_exposure=pre_exposure,
        drift=tables["drift"].to_numpy(),
        jitter=tables["jitter"].select("hmMotionX", "hmMotionY").to_numpy(),
        waves=np.zeros((0, 6)) if waves is None else waves.to_numpy(),
    )


def random_motion(
    rng: Generator,
    *,
    n_frames: int,
    dose_per_frame: float,
    pre_exposure: float,
    size_A: tuple[float, float],
    drift: float,
    jitter: float,
    deformation: float,
    correlation_length: float,
) -> Motion:
    """Draw a movie's motion.

    Parameters
    ----------
    rng : Generator
        Source of randomness.
    n_frames, dose_per_frame, pre_exposure
        As in `Motion`.
    size_A : tuple of 2 float
        Height and width of the view in Å.
    drift : float
        Typical length in Å of the drift over the whole exposure; movies vary from half to 1.5 times of it.
    jitter : float
        Standard deviation in Å, per axis, of each frame's own displacement.
    deformation : float
        Root mean square over the view, in Å, of the displacement against the drift over the whole exposure.
    correlation_length : float
        Length scale in Å of the Matérn-3/2 field that the deformation is drawn from.

    References
    ----------
    .. [1] Brilot et al. 2012, J. Struct. Biol. 177, 630-637, DOI 10.1016/j.jsb.2012.02.003
    .. [2] Rahimi & Recht 2007, NIPS 20, 1177-1184 (random fields as sums of cosines)
    """
    length = drift * rng.uniform(0.5, 1.5)
    angle = rng.uniform(0, 2 * np.pi)
    modes = []
    for tau, part in _DRIFT_MODES:
        direction = angle + rng.normal(0, 0.5)
        modes.append((tau, length * part * np.cos(direction), length * part * np.sin(direction)))
    shake = rng.normal(0, jitter, (n_frames, 2)) if jitter else np.zeros((n_frames, 2))
    shake[0] = 0
    waves = [
        _random_waves(rng, tau, part * deformation, correlation_length, size_A)
        for tau, part in _LOCAL_MODES
        if deformation
    ]
    return Motion(
        n_frames=n_frames,
        dose_per_frame=dose_per_frame,
        pre_exposure=pre_exposure,
        drift=np.array(modes),
        jitter=shake,
        waves=np.concatenate(waves) if waves else np.zeros((0, 6)),
    )


def _random_waves(
    rng: Generator, tau: float, rms: float, length: float, size_A: tuple[float, float]
) -> NDArray:
    """Waves of one mode: a Matérn-3/2 field without mean over the view, of the root mean square asked."""
    # The spectral density of a Matérn-3/2 field in the plane is Student's t with 3 degrees of freedom.
    vectors = rng.normal(size=(_WAVES, 2)) / (2 * np.pi * length)
    vectors *= np.sqrt(3 / rng.chisquare(3, size=(_WAVES, 1)))
    norm = np.linalg.norm(vectors, axis=1, keepdims=True)
    vectors *= np.minimum(1, 1 / (_SHORTEST_WAVE_A * np.maximum(norm, 1e-12)))
    phases = rng.uniform(0, 2 * np.pi, _WAVES)
    amplitudes = rng.normal(size=(_WAVES, 2))
    y, x = (np.linspace(0, size, 24) for size in size_A)
    crests = np.cos(
        2 * np.pi * (vectors[:, 0, None, None] * x + vectors[:, 1, None, None] * y[:, None])
        + phases[:, None, None]
    )
    field = np.einsum("wyx,wa->yxa", crests, amplitudes)
    mean = field.mean(axis=(0, 1))
    scale = rms / np.sqrt(np.square(field - mean).sum(axis=-1).mean())
    waves = np.column_stack([np.full(_WAVES, tau), vectors, phases, amplitudes * scale])
    # A wave without a wave vector takes the mean away: the drift is what the view has in common.
    return np.vstack([waves, [tau, 0, 0, 0, *(-mean * scale)]])
