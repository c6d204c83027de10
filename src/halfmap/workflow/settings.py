"""What a person says of a data set: the options of `halfmap run`."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from pydantic import model_validator

from halfmap.engine import Input, Param
from halfmap.engine.parameters import Form
from halfmap.errors import ParameterError

MICROSCOPE, EXPOSURE, GAIN, PARTICLE, CHAIN = "Microscope", "Exposure", "Gain", "Particle", "Chain"


_CAMERA = {"dose_per_frame", "gain", "gain_rotation", "gain_flip", "defects"}
_IDLE = {
    "micrographs": _CAMERA,
    "particles": _CAMERA | {"voltage", "spherical_aberration", "amplitude_contrast"},
}
"""Options that say nothing of what a chain begins with."""


class RunSettings(Form):
    """Run the whole chain: from movies, micrographs or particles to a validated map and a report.

    Every stage is an ordinary job of the project. Given again, the command goes on where it stopped, keeps
    what is done, and runs only what other options change; options that are not given are those of the run
    before. What is decided from the data is said with the reason and the option that decides otherwise.
    """

    movies: tuple[Path, ...] = Input("movies (TIFF, MRC or EER), as names or quoted patterns", default=())
    micrographs: tuple[Path, ...] = Input(
        "instead: motion-corrected micrographs (MRC or TIFF), as names or quoted patterns", default=()
    )
    particles: Path | None = Input("instead: table of particles (.star or .cs)", default=None)

    pixel_size: float | None = Param(
        None,
        "pixel size of the files; default: read from their headers",
        unit="Å/px",
        section=MICROSCOPE,
        aliases=("angpix",),
        gt=0.1,
        le=50,
    )
    voltage: float | None = Param(
        None,
        "acceleration voltage; default: 300",
        unit="kV",
        section=MICROSCOPE,
        aliases=("kV",),
        ge=30,
        le=1000,
    )
    spherical_aberration: float | None = Param(
        None, "spherical aberration; default: 2.7", unit="mm", section=MICROSCOPE, aliases=("Cs",), ge=0
    )
    amplitude_contrast: float | None = Param(
        None,
        "fraction of amplitude contrast; default: 0.1",
        unit="none",
        section=MICROSCOPE,
        aliases=("Q0",),
        ge=0,
        le=1,
    )
    dose_per_frame: float | None = Param(
        None,
        "exposure of each stored frame; movies need it",
        unit="e/Å²",
        section=EXPOSURE,
        aliases=("dose",),
        gt=0,
        le=100,
    )
    gain: Path | None = Input(
        "gain reference, multiplied with each frame", default=None, section=GAIN, aliases=("gainref",)
    )
    gain_rotation: int = Param(
        0,
        "turn the gain reference by this many times 90°, as RELION does",
        unit="none",
        section=GAIN,
        aliases=("gain_rot",),
        ge=0,
        le=3,
    )
    gain_flip: int = Param(
        0,
        "then flip it: 1 upside down, 2 left to right, as RELION does",
        unit="none",
        section=GAIN,
        ge=0,
        le=2,
    )
    defects: Path | None = Input(
        "defects: lines 'x y width height', or a mask image",
        default=None,
        section=GAIN,
        aliases=("defect_file",),
    )
    diameter: float | None = Param(
        None,
        "longest diameter of the particle; default: found in the images",
        unit="Å",
        section=PARTICLE,
        gt=0,
    )
    symmetry: str | None = Param(
        None, "point group of the particle; default: found in a first map", unit="none", section=PARTICLE
    )
    until: str | None = Param(
        None, "last stage to run, such as motion; default: all", unit="none", section=CHAIN
    )
    anew: str | None = Param(
        None, "run this stage and all that follow again, also if they are done", unit="none", section=CHAIN
    )
    set: tuple[str, ...] = Param(
        (),
        "parameters of single stages, as STAGE.PARAMETER=VALUE: ctf.defocus-max=40000; STAGE.PARAMETER= "
        "takes one back",
        unit="none",
        section=CHAIN,
    )
    controls: bool = Param(
        True, "let validation refine again with controls, which takes long", unit="none", section=CHAIN
    )
    seed: int = Param(1, "seed of all random numbers", unit="none", section=CHAIN, ge=0)

    @model_validator(mode="after")
    def _check(self) -> RunSettings:
        given = [f"--{name}" for name in ("movies", "micrographs", "particles") if getattr(self, name)]
        if len(given) > 1:
            raise ValueError(f"give one of {', '.join(given)}: the chain begins with it")
        if self.movies and self.dose_per_frame is None:
            raise ValueError("movies need the exposure of each frame: give --dose-per-frame")
        for name in sorted(_IDLE.get(given[0][2:], set()) if given else ()):
            if getattr(self, name) not in (None, type(self).model_fields[name].default):
                raise ValueError(f"--{name.replace('_', '-')} says nothing of {given[0][2:]}: leave it out")
        if self.symmetry is not None:
            _check_group(self.symmetry)
        for each in self.set:
            parse_override(each)
        return self

    @property
    def source(self) -> str:
        """What the chain begins with: movies, micrographs or particles."""
        return next(name for name in ("movies", "micrographs", "particles") if getattr(self, name))


def _check_group(name: str) -> None:
    from halfmap.ops import symmetry

    try:
        symmetry.order(name)
    except ParameterError as error:
        raise ValueError(str(error)) from None


def parse_override(text: str) -> tuple[str, str, str]:
    """Stage, parameter and value of a word such as ``ctf.defocus-max=40000``.

    Raises
    ------
    ValueError
        If it has not that form.
    """
    target, equals, value = text.partition("=")
    stage, dot, parameter = target.partition(".")
    if not (equals and dot and stage and parameter):
        raise ValueError(f"--set takes STAGE.PARAMETER=VALUE, such as ctf.defocus-max=40000, not {text!r}")
    return stage, parameter.replace("-", "_"), value


_TRANSIENT = {"until", "anew"}
"""Options that hold for one run of the chain only."""


def merged(given: Mapping[str, Any], before: Mapping[str, Any]) -> dict[str, Any]:
    """Options of a chain that goes on: those `given` now, the others as they were `before`.

    A source given takes the place of another one; words of ``--set`` add to earlier ones of other parameters.

    Raises
    ------
    ParameterError
        If neither names what the chain begins with.
    """
    sources = {"movies", "micrographs", "particles"}
    kept = {name: value for name, value in before.items() if name not in _TRANSIENT}
    for source in sources & {name for name, value in given.items() if value}:
        gone = sources | _IDLE.get(source, set())
        kept = {name: value for name, value in kept.items() if name not in gone}
    result = kept | dict(given)
    if not any(result.get(name) for name in sources):
        raise ParameterError(
            "nothing to begin with", hint="give movies, --micrographs or --particles: halfmap run --help"
        )
    words = {word.partition("=")[0].replace("-", "_"): word for word in before.get("set", ())}
    words |= {word.partition("=")[0].replace("-", "_"): word for word in given.get("set", ())}
    result["set"] = tuple(word for word in words.values() if not word.endswith("="))
    return result


def overrides(words: Iterable[str], stage: str) -> dict[str, str]:
    """Parameters of a stage that were set by hand."""
    parsed = [parse_override(word) for word in words]
    return {parameter: value for name, parameter, value in parsed if name == stage}
