"""The steps that simulate particles, micrographs and movies from atomic models or maps."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Literal

from pydantic import model_validator

from halfmap.engine import Context, Input, Out, Param, Step

SPECIMEN, MICROSCOPE, VIEW, ICE = "Specimen", "Microscope", "Field of view", "Ice"
DETECTOR, EXPOSURE, MOTION, OUTPUT = "Detector", "Exposure", "Motion", "Output"


class Simulate(Step):
    """What all simulations share: the molecules and the microscope."""

    models: tuple[Path, ...] = Input(
        "atomic models (mmCIF, PDB) or maps (MRC), a conformation each; default: human apoferritin",
        default=(),
        section=SPECIMEN,
    )
    fractions: tuple[float, ...] = Param(
        (), "share of each conformation among the particles; default: equal", unit="none", section=SPECIMEN
    )
    morph_states: int = Param(
        0,
        "states of a continuous motion between two models of the same atoms; 0 takes the models as they are",
        unit="none",
        section=SPECIMEN,
        ge=0,
        le=200,
    )
    assembly: str = Param(
        "1", "biological assembly to build; none for the atoms as they stand", unit="none", section=SPECIMEN
    )
    atom_b_factor: float | None = Param(
        None, "B-factor of all atoms; default: each its own from the file", unit="Å²", section=SPECIMEN, ge=0
    )
    pixel_size: float = Param(1.4, "size of the detector's pixels", unit="Å/px", section=SPECIMEN, gt=0.1)
    box_size: int | None = Param(
        None,
        "box of particles and truth maps, even; default: 1.5 times the longest distance in the molecule",
        unit="px",
        section=SPECIMEN,
        ge=16,
        multiple_of=2,
    )
    preferred_orientation: float = Param(
        0.0,
        "share of the particles that show one of three preferred views",
        unit="none",
        section=SPECIMEN,
        ge=0,
        le=1,
    )
    voltage: float = Param(300.0, "acceleration voltage", unit="kV", section=MICROSCOPE, ge=100, le=300)
    spherical_aberration: float = Param(2.7, "spherical aberration Cs", unit="mm", section=MICROSCOPE, ge=0)
    amplitude_contrast: float = Param(
        0.1, "fraction of amplitude contrast", unit="none", section=MICROSCOPE, ge=0, le=0.5
    )
    defocus_min: float = Param(8000.0, "least underfocus", unit="Å", section=MICROSCOPE, ge=100)
    defocus_max: float = Param(20000.0, "greatest underfocus", unit="Å", section=MICROSCOPE, ge=100)
    astigmatism: float = Param(
        200.0, "typical difference between the two defoci", unit="Å", section=MICROSCOPE, ge=0
    )
    beam_tilt: float = Param(
        0.0, "beam tilt, in another direction in every optics group", unit="mrad", section=MICROSCOPE, ge=0
    )
    optics_groups: int = Param(1, "number of optics groups", unit="none", section=MICROSCOPE, ge=1)
    phase_shift: float = Param(
        0.0, "phase shift of a phase plate", unit="°", section=MICROSCOPE, ge=0, le=180
    )
    focal_spread: float = Param(
        60.0,
        "standard deviation of the focus, by the electrons' energy spread",
        unit="Å",
        section=MICROSCOPE,
        advanced=True,
        ge=0,
    )
    convergence: float = Param(
        0.01, "semi-angle of the illumination", unit="mrad", section=MICROSCOPE, advanced=True, ge=0
    )
    envelope_b_factor: float = Param(
        20.0,
        "B-factor of all losses of contrast that are not simulated by themselves",
        unit="Å²",
        section=MICROSCOPE,
        advanced=True,
        ge=0,
    )
    image_model: Literal["weak-phase", "phase-object"] = Param(
        "weak-phase",
        "image linear in the potential, or by the wave behind a phase object",
        unit="none",
        section=MICROSCOPE,
        advanced=True,
    )
    seed: int = Param(1, "seed of all random numbers", unit="none", section=OUTPUT, ge=0)

    @model_validator(mode="after")
    def _check(self) -> Simulate:
        n = max(1, len(self.models))
        if self.morph_states and (len(self.models) != 2 or self.morph_states < 2):
            raise ValueError("--morph-states needs two models and two states or more")
        if self.fractions and len(self.fractions) != (self.morph_states or n):
            raise ValueError(f"--fractions needs {self.morph_states or n} numbers, one a conformation")
        if self.fractions and (min(self.fractions) < 0 or sum(self.fractions) <= 0):
            raise ValueError("--fractions must be 0 or more and not all 0")
        if self.defocus_min > self.defocus_max:
            raise ValueError("--defocus-min is greater than --defocus-max")
        return self


class SimulateExposures(Simulate):
    """What micrographs and movies share: the field of view, the ice and the detector."""

    width: int = Param(2048, "width of the detector", unit="px", section=VIEW, ge=64, multiple_of=2)
    height: int = Param(2048, "height of the detector", unit="px", section=VIEW, ge=64, multiple_of=2)
    particles: int = Param(
        100, "particles in a view, fewer where there is no room", unit="none", section=VIEW, ge=0
    )
    overlapping: float = Param(
        0.1, "share of the particles that overlap another one", unit="none", section=VIEW, ge=0, le=1
    )
    broken: float = Param(
        0.05, "share of the particles that are fragments", unit="none", section=VIEW, ge=0, le=1
    )
    contaminants: float = Param(0.5, "mean number of ice crystals in a view", unit="none", section=VIEW, ge=0)
    carbon: float = Param(
        0.1, "share of the views with the edge of the carbon film", unit="none", section=VIEW, ge=0, le=1
    )
    tilt: float = Param(0.0, "tilt of the stage", unit="°", section=VIEW, ge=0, le=70)
    ice_thickness: float = Param(300.0, "mean thickness of the ice", unit="Å", section=ICE, gt=0)
    ice_variation: float = Param(
        0.1,
        "relative variation of the thickness, between views and in each",
        unit="none",
        section=ICE,
        ge=0,
        le=0.5,
    )
    ice_noise: float = Param(
        1.0,
        "contrast of the ice's own structure relative to its physical one",
        unit="none",
        section=ICE,
        ge=0,
    )
    mean_free_path: float = Param(
        4000.0,
        "mean free path in ice of the electrons that an energy filter lets pass",
        unit="Å",
        section=ICE,
        advanced=True,
        gt=0,
    )
    efficiency: float = Param(
        0.9,
        "share of the electrons that are counted, the DQE at zero frequency",
        unit="none",
        section=DETECTOR,
        gt=0,
        le=1,
    )
    mislocation: float = Param(
        0.15,
        "error of the place where an electron is counted; with the pixel's area it makes the MTF",
        unit="px",
        section=DETECTOR,
        ge=0,
    )
    write_clean: bool = Param(
        False, "write noise-free images of the particles alone as well", unit="none", section=OUTPUT
    )


class SimulateMovies(SimulateExposures, name="simulate movies", label="halfmap.simulate.movies"):
    """Simulate dose-fractionated movies from atomic models or maps, with the whole truth.

    The electrostatic potential of the atoms, less that of the ice they displace (a continuum with a hydration
    layer), is projected in the pose of every particle and imaged by the lens at the particle's own defocus.
    Ice adds the noise of its structure, which flows under the beam; the specimen drifts and deforms;
    radiation fades the particles' fine detail from frame to frame. A counting detector with gain, dead and
    hot pixels records Poisson distributed counts. Tables hold the truth: poses, heights, motion, defocus,
    contaminants.

    References
    ----------
    .. [1] Vulović et al. 2013, J. Struct. Biol. 183, 19-32, DOI 10.1016/j.jsb.2013.05.008
    .. [2] Shang & Sigworth 2012, J. Struct. Biol. 180, 10-16, DOI 10.1016/j.jsb.2012.04.021
    .. [3] Grant & Grigorieff 2015, eLife 4, e06980, DOI 10.7554/eLife.06980
    .. [4] McMullan, Vinothkumar & Henderson 2015, Ultramicroscopy 158, DOI 10.1016/j.ultramic.2015.05.017
    """

    outputs = {
        "movies": Out("movies.star", "MicrographMovieGroupMetadata.star.relion"),
        "gain": Out("gain.mrc", "Image2D.mrc.halfmap.gain"),
        "truth_movies": Out("truth_movies.star", "MicrographGroupMetadata.star.halfmap.truth"),
        "truth_particles": Out(
            "truth_particles.star", "ParticleGroupMetadata.star.halfmap.truth", optional=True
        ),
        "truth_map": Out("truth_map.mrc", "DensityMap.mrc"),
        "picture": Out("overview.png", "Image2D.png.halfmap.overview"),
    }

    n_movies: int = Param(10, "number of movies", unit="none", section=VIEW, ge=1)
    n_frames: int = Param(24, "frames of a movie", unit="none", section=EXPOSURE, ge=2)
    dose_per_frame: float = Param(1.5, "exposure of a frame", unit="e/Å²", section=EXPOSURE, gt=0)
    pre_exposure: float = Param(0.0, "exposure before the first frame", unit="e/Å²", section=EXPOSURE, ge=0)
    drift: float = Param(25.0, "typical drift over the whole exposure", unit="Å", section=MOTION, ge=0)
    local_motion: float = Param(
        6.0, "typical displacement against the drift over the whole exposure", unit="Å", section=MOTION, ge=0
    )
    correlation_length: float = Param(
        4000.0, "distance over which local motion is alike", unit="Å", section=MOTION, gt=100
    )
    jitter: float = Param(0.3, "displacement of each frame by vibration", unit="Å", section=MOTION, ge=0)
    super_resolution: bool = Param(
        False, "record every pixel of the detector as 2 x 2", unit="none", section=DETECTOR
    )
    gain_spread: float = Param(
        0.05, "relative variation of the pixels' gains", unit="none", section=DETECTOR, ge=0, le=0.3
    )
    dead_pixels: int = Param(20, "pixels that count nothing", unit="none", section=DETECTOR, ge=0)
    hot_pixels: int = Param(20, "pixels that count too much", unit="none", section=DETECTOR, ge=0)
    movie_format: Literal["tiff-lzw", "tiff-deflate", "mrc"] = Param(
        "tiff-lzw", "format of the movies", unit="none", section=OUTPUT
    )

    def run(self, ctx: Context) -> None:
        """Prepare the molecules and the camera, expose movie after movie, tabulate the truth, draw it."""
        from halfmap.steps.simulate import exposure, movie, pictures, preparation, truth

        specimen = preparation.prepare(
            self, ctx, upsampling=2 if self.super_resolution else 1, fragments=self.broken > 0
        )
        movie.write_camera(self, ctx.folder)
        expose = functools.partial(movie.simulate, step=self, specimen=specimen, folder=ctx.folder)
        exposures = ctx.map(expose, range(self.n_movies), key=exposure.name, unit="movie")
        truth.write_movie_tables(self, ctx, exposures)
        pictures.draw_movies(self, ctx, exposures, diameter=specimen.diameter)
        preparation.discard(specimen, ctx)


class SimulateMicrographs(
    SimulateExposures, name="simulate micrographs", label="halfmap.simulate.micrographs"
):
    """Simulate motion-corrected micrographs from atomic models or maps, with the whole truth.

    As ``simulate movies``, without motion and the camera's flaws: the sum of an exposure whose frames have
    been aligned perfectly and not been weighted by dose. Radiation damage is that of the average over the
    exposure, the ice has flowed, counts are Poisson distributed.

    References
    ----------
    .. [1] Vulović et al. 2013, J. Struct. Biol. 183, 19-32, DOI 10.1016/j.jsb.2013.05.008
    .. [2] Shang & Sigworth 2012, J. Struct. Biol. 180, 10-16, DOI 10.1016/j.jsb.2012.04.021
    .. [3] Grant & Grigorieff 2015, eLife 4, e06980, DOI 10.7554/eLife.06980
    .. [4] McMullan, Vinothkumar & Henderson 2015, Ultramicroscopy 158, DOI 10.1016/j.ultramic.2015.05.017
    """

    outputs = {
        "micrographs": Out("micrographs.star", "MicrographGroupMetadata.star.relion"),
        "truth_micrographs": Out("truth_micrographs.star", "MicrographGroupMetadata.star.relion.ctf"),
        "truth_particles": Out(
            "truth_particles.star", "ParticleGroupMetadata.star.halfmap.truth", optional=True
        ),
        "truth_map": Out("truth_map.mrc", "DensityMap.mrc"),
        "picture": Out("overview.png", "Image2D.png.halfmap.overview"),
    }

    n_micrographs: int = Param(10, "number of micrographs", unit="none", section=VIEW, ge=1)
    dose: float = Param(40.0, "whole exposure", unit="e/Å²", section=EXPOSURE, gt=0)
    write_halves: bool = Param(
        False, "write the sums of even and odd frames as well", unit="none", section=OUTPUT
    )

    def run(self, ctx: Context) -> None:
        """Prepare the molecules, expose micrograph after micrograph, tabulate the truth, draw it."""
        from halfmap.steps.simulate import exposure, micrograph, pictures, preparation, truth

        specimen = preparation.prepare(self, ctx, fragments=self.broken > 0)
        micrograph.write_camera(self, ctx.folder)
        expose = functools.partial(micrograph.simulate, step=self, specimen=specimen, folder=ctx.folder)
        exposures = ctx.map(expose, range(self.n_micrographs), key=exposure.name, unit="micrograph")
        truth.write_micrograph_tables(self, ctx, exposures)
        pictures.draw_micrographs(self, ctx, exposures, diameter=specimen.diameter)
        preparation.discard(specimen, ctx)


class SimulateParticles(Simulate, name="simulate particles", label="halfmap.simulate.particles"):
    """Simulate a stack of particle images with true poses, shifts and CTFs.

    Projections of the potential against ice are multiplied by the CTF of each particle and shifted; noise of
    a chosen colour is added until the signal-to-noise ratio is the one asked. Particles are bright, as RELION
    extracts them, and carry the lens's envelope, which the table does not. The ratio is the variance of the
    noise-free image inside the circle that holds the molecule, averaged over the particles, over the variance
    of the noise.

    References
    ----------
    .. [1] Vulović et al. 2013, J. Struct. Biol. 183, 19-32, DOI 10.1016/j.jsb.2013.05.008
    .. [2] Shang & Sigworth 2012, J. Struct. Biol. 180, 10-16, DOI 10.1016/j.jsb.2012.04.021
    """

    outputs = {
        "particles": Out("particles.star", "ParticleGroupMetadata.star.relion"),
        "truth_map": Out("truth_map.mrc", "DensityMap.mrc"),
        "picture": Out("overview.png", "Image2D.png.halfmap.overview"),
    }

    n_particles: int = Param(1000, "number of particles", unit="none", section="Particles", ge=1)
    per_micrograph: int = Param(
        100, "particles that share a micrograph's defocus and a file", unit="none", section="Particles", ge=1
    )
    snr: float = Param(0.05, "signal-to-noise ratio; 0 for no noise", unit="none", section="Particles", ge=0)
    noise_colour: float = Param(
        0.5,
        "share of the noise's variance that is structured as ice, the rest is white",
        unit="none",
        section="Particles",
        ge=0,
        le=1,
    )
    shift: float = Param(
        3.0,
        "standard deviation along each axis of the particles' offsets",
        unit="Å",
        section="Particles",
        ge=0,
    )
    ice_thickness: float = Param(300.0, "range of the particles' heights", unit="Å", section=ICE, ge=0)
    exposure: float = Param(
        40.0, "exposure, during which the ice that makes noise has flowed", unit="e/Å²", section=ICE, ge=0
    )
    float16: bool = Param(
        False, "store images in half precision, which RELION 4 or newer reads", unit="none", section=OUTPUT
    )

    def run(self, ctx: Context) -> None:
        """Prepare the molecules, image stack after stack, tabulate poses and CTFs, draw a few."""
        from halfmap.steps.simulate import exposure, particles, pictures, preparation, truth

        specimen = preparation.prepare(self, ctx)
        scale = particles.measure_scale(self, specimen)
        image = functools.partial(
            particles.simulate, step=self, specimen=specimen, folder=ctx.folder, scale=scale
        )
        stacks = ctx.map(image, range(particles.count_stacks(self)), key=exposure.name, unit="stack")
        truth.write_particle_table(self, ctx, stacks, specimen=specimen, scale=scale)
        pictures.draw_particles(self, ctx, stacks)
        preparation.discard(specimen, ctx)
