"""The steps that train networks to denoise micrographs, and apply them."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from halfmap.engine import Context, Input, Out, Param, Step

NETWORK, TRAINING, IMAGES, OUTPUT = "Network", "Training", "Images", "Output"
MEASURED = "Measured"

MODEL = "Model.npz.halfmap.denoiser"


class DenoiseTrain(Step, name="denoise train", label="halfmap.denoise.train"):
    """Train a network to denoise micrographs, on nothing but their even and odd sums.

    The network predicts one half of a micrograph from the other. It cannot predict that one's noise, and so
    learns what both have in common. Halves are cropped in Fourier space, and normalised about each place over
    the width of a patch. Part of the micrographs is held out; the weights that predict these best are kept.

    References
    ----------
    .. [1] Lehtinen et al. 2018, ICML 35, arXiv 1803.04189
    .. [2] Palovcak, Asarnow, Campbell, Yu & Cheng 2020, IUCrJ 7, 1142-1150, DOI 10.1107/S2052252520013184
    """

    outputs = {
        "model": Out("model.npz", MODEL),
        "picture": Out("training.png", "Image2D.png.halfmap.overview"),
    }

    micrographs: tuple[Path, ...] = Input(
        "tables of motion-corrected micrographs, of one data set or several",
        node="MicrographGroupMetadata.star.relion",
        min_length=1,
    )
    thin: bool = Param(
        False,
        "part the counts of counted images at random into halves, where there are no movies",
        unit="none",
        section=IMAGES,
    )
    electron: float = Param(
        1.0,
        "value that one electron has in images whose counts are parted",
        unit="none",
        section=IMAGES,
        gt=0,
    )
    pixel_size: float = Param(
        1.5, "pixel size that images are cropped to", unit="Å/px", section=IMAGES, gt=0.2, le=20
    )
    phase_flip: bool = Param(
        False, "flip phases by the sign of the CTF first", unit="none", section=IMAGES, advanced=True
    )
    model: Path | None = Input("model to go on with; default: train anew", node=MODEL, default=None)
    general: bool = Param(
        False, "go on with the general model, for fewer --steps", unit="none", section=TRAINING
    )
    network: Literal["wide", "plain"] = Param(
        "wide", "residual blocks wide at their rectifiers, or a plain U-Net", unit="none", section=NETWORK
    )
    size: Literal["auto", "small", "full"] = Param(
        "auto", "of the network; auto: full with a GPU, else small", unit="none", section=NETWORK
    )
    steps: int = Param(2000, "batches to train on", unit="none", section=TRAINING, ge=1, le=10_000_000)
    batch: int | None = Param(
        None,
        "patches in a batch; default: 32 with a GPU, else 8",
        unit="none",
        section=TRAINING,
        advanced=True,
        ge=1,
    )
    patch: int = Param(
        192,
        "side of the patches, a multiple of 8",
        unit="px",
        section=TRAINING,
        advanced=True,
        ge=32,
        multiple_of=8,
    )
    learning_rate: float = Param(
        2e-3, "highest rate", unit="none", section=TRAINING, advanced=True, gt=0, le=1
    )
    most: int = Param(
        60, "micrographs to train on at the most, drawn at random", unit="none", section=TRAINING, ge=1
    )
    held_out: float = Param(
        0.1, "share of them that is held out", unit="none", section=TRAINING, advanced=True, gt=0, lt=1
    )
    seed: int = Param(1, "seed of all random numbers", unit="none", section=TRAINING, advanced=True, ge=0)

    def run(self, ctx: Context) -> None:
        """Prepare halves, refuse those that are not independent, train, keep the weights that were best."""
        from halfmap.steps.denoise import train

        train.run(self, ctx)


class DenoiseApply(Step, name="denoise apply", label="halfmap.denoise.apply"):
    """Denoise micrographs, and measure what is left of signal and noise, and what bias there is.

    The even and the odd sum of a micrograph are denoised each by itself, and added. What the two have in
    common, before and after and across, tells ring by ring the power of signal, noise and bias. A merged
    micrograph has its low frequencies from the denoised one, at the amplitude of the signal, and those from
    the raw one where that is the nearer to the signal.

    References
    ----------
    .. [1] Palovcak, Asarnow, Campbell, Yu & Cheng 2020, IUCrJ 7, 1142-1150, DOI 10.1107/S2052252520013184
    """

    outputs = {
        "micrographs": Out("micrographs.star", "MicrographGroupMetadata.star.relion"),
        "picture": Out("summary.png", "Image2D.png.halfmap.overview"),
    }

    micrographs: Path = Input(
        "table of motion-corrected micrographs", node="MicrographGroupMetadata.star.relion"
    )
    model: Path | None = Input(
        "model that denoise train wrote; default: the general one, for 1.5 Å/px", node=MODEL, default=None
    )
    thin: bool = Param(
        False,
        "part the counts of counted images at random into halves, where there are no movies",
        unit="none",
        section=IMAGES,
    )
    electron: float = Param(
        1.0,
        "value that one electron has in images whose counts are parted",
        unit="none",
        section=IMAGES,
        gt=0,
    )
    merge: bool = Param(True, "write merged micrographs as well", unit="none", section=OUTPUT)
    pictures: bool = Param(True, "draw a picture of each micrograph", unit="none", section=OUTPUT)
    seed: int = Param(1, "seed of the parting of counts", unit="none", section=IMAGES, advanced=True, ge=0)

    def run(self, ctx: Context) -> None:
        """Denoise every micrograph half by half, measure, write the table, and draw."""
        from halfmap.steps.denoise import apply

        apply.run(self, ctx)


class DenoiseMeasure(Step, name="denoise measure", label="halfmap.denoise.measure"):
    """Measure what denoising did to a data set: signal, noise and bias by frequency, defocus, picks.

    The powers are those that ``denoise apply`` found in the halves of each micrograph; standard errors come
    from leaving out one micrograph after the other, of fewer than ten one window. The CTF is estimated in the
    denoised micrographs and compared with that of the raw ones: what denoises well keeps the Thon rings.

    References
    ----------
    .. [1] Palovcak, Asarnow, Campbell, Yu & Cheng 2020, IUCrJ 7, 1142-1150, DOI 10.1107/S2052252520013184
    """

    outputs = {
        "table": Out("measured.star", "Measured.star.halfmap.denoising"),
        "picture": Out("measured.png", "Image2D.png.halfmap.overview"),
        "defocus": Out("defocus.png", "Image2D.png.halfmap.overview", optional=True),
    }

    micrographs: Path = Input("table that denoise apply wrote", node="MicrographGroupMetadata.star.relion")
    defocus: bool = Param(True, "compare defoci", unit="none", section=MEASURED)
    picking: bool = Param(False, "compare picks without references", unit="none", section=MEASURED)
    diameter: float | None = Param(
        None, "diameter of the particle, for the picks; default: found", unit="Å", section=MEASURED, ge=20
    )

    def run(self, ctx: Context) -> None:
        """Gather powers, compare defoci and picks, write the table, name outliers, and draw."""
        from halfmap.steps.denoise import measure

        measure.run(self, ctx)
