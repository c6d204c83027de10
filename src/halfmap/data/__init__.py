"""The tables and arrays that the pipeline hands on: micrographs, particles, optics, poses, CTFs."""

from halfmap.data.ctf import CTFParameters
from halfmap.data.motion import MotionTracks
from halfmap.data.poses import Poses
from halfmap.data.sets import MicrographSet, MovieSet, ParticleSet, TableSet
from halfmap.data.volume import Volume

__all__ = [
    "CTFParameters",
    "MicrographSet",
    "MotionTracks",
    "MovieSet",
    "ParticleSet",
    "Poses",
    "TableSet",
    "Volume",
]
