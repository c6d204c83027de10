"""Whether particles are more than noise that a template has picked and aligned."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.axes import Axes
from scipy.stats import wilcoxon

from halfmap.errors import TableError
from halfmap.pictures import INK, MARGIN, QUIET, add_panel, add_text, dress, new_figure, save
from halfmap.search.picked_noise import Compared, compare
from halfmap.search.template_bias import least_share
from halfmap.steps.validate.finding import Finding, Given, Light

NAME = "Einstein from noise"

_MOST = 1000

_SURE, _DOUBTFUL = 4.0, 2.0
"""Standard deviations by which images must agree beyond the template, and below which they share nothing."""

_FAINT = 0.2
"""Signal in percent of an image's power that must not have been missed where nothing is found."""

_RARE = 1e-3
"""Probability below which images fit the template better than noise does."""

_SHOWN, _TILE, _GAP = 4, 104, 6

_METHOD = (
    "Each image, and a twin of the same amplitudes with random phases, were aligned to the template by its "
    "coarse detail. Aligned noise averages to the template, but shares nothing in finer detail, which was "
    "not compared: there images were compared with each other. "
    "DOI 10.1073/pnas.1314449110, 10.1016/j.jsb.2008.12.008"
)


def check_picks(
    given: Given, template: Path, folder: Path, *, project: Path = Path(), detail: float = 20.0
) -> Finding:
    """Find whether particles share more than noise does that was aligned to the template they were picked by.

    Parameters
    ----------
    given : Given
        With particles.
    template : path
        Map, or stack of images, that the particles were picked with.
    folder : path
        Where the picture goes.
    project : path
        Folder that names of stacks are relative to.
    detail : float
        Finest detail in Å that is compared with the template; picking must not have used finer.

    Returns
    -------
    Finding
        Red if images fit the template no better than noise, or share nothing beyond it; amber if they are
        too few to say so.

    Raises
    ------
    TableError, FileFormatError, ShapeError, ParameterError
        If images or template cannot be used.
    """
    if given.particles is None:
        raise TableError("there are no particles to compare with the template")
    found = compare(
        given.particles,
        template,
        project=project,
        diameter=given.diameter,
        detail=detail,
        group=given.step.symmetry,
        most=min(_MOST, given.step.sample),
        seed=given.step.seed,
    )
    values = _values(found)
    picture = folder / "picks.png"
    draw(picture, found)
    light, sentence = _judge(values)
    return Finding(NAME, light, sentence, values=values, pictures=(picture.name,), method=_METHOD)


def _values(found: Compared) -> dict[str, Any]:
    plan = found.plan
    one, two = (each.matches.correlation.numpy().astype(float) for each in (found.particles, found.noise))
    return {
        "particles": len(one),
        "templates": len(found.templates),
        "template_detail_A": plan.detail(plan.radius),
        "beyond_from_A": plan.detail(plan.first),
        "beyond_to_A": plan.detail(plan.grid.radius),
        "median_correlation": float(np.median(one)),
        "median_correlation_of_noise": float(np.median(two)),
        "above_95_percent_of_noise_percent": 100 * float((one > np.quantile(two, 0.95)).mean()),
        "fit_better_at_least_percent": 100 * least_share(one, two),
        "probability_fit_is_of_noise": float(np.asarray(wilcoxon(one, two, alternative="greater"))[1]),
        "average_like_template": found.particles.likeness,
        "average_of_noise_like_template": found.noise.likeness,
        "sigmas_beyond": found.particles.common.sigmas,
        "sigmas_beyond_of_noise": found.noise.common.sigmas,
        "sigmas_beyond_of_one_percent_signal": found.particles.common.expected_sigmas,
    }


def _judge(values: dict[str, Any]) -> tuple[Light, str]:
    better = values["probability_fit_is_of_noise"] < _RARE
    sigmas, faint = values["sigmas_beyond"], _FAINT * values["sigmas_beyond_of_one_percent_signal"]
    fits = (
        f"{values['above_95_percent_of_noise_percent']:.0f} % of {values['particles']} particles fit the "
        "template better than 95 % of noise"
    )
    beyond = f"beyond its {values['template_detail_A']:.0f} Å they"
    if better and sigmas > _SURE:
        agree = (
            f"agree by {sigmas:.0f} standard deviations with each other, which is not the template's doing"
        )
        return "green", f"{fits}, and {beyond} {agree}."
    advice = "pick again without a template, or with another, and see whether the same comes out"
    if not better:
        return "red", f"{fits}, as noise alone would; {advice}."
    if sigmas > _DOUBTFUL or faint < _SURE:
        doubt = f"agree by no more than {sigmas:.1f} standard deviations, which may be picked noise"
        return "amber", f"{fits}, but {beyond} {doubt}; give more particles, or a template with less detail."
    what = f"share nothing ({sigmas:.1f} standard deviations), as noise that a template has picked"
    return "red", f"{fits}, but {beyond} {what}; {advice}."


def draw(path: Path, found: Compared) -> None:
    """Draw templates, and the means of particles and of noise aligned to them, and how well images fit."""
    shown = torch.bincount(found.particles.matches.template, minlength=len(found.templates))
    views = shown.argsort(descending=True, stable=True)[:_SHOWN]
    rows = (
        ("template, as these images would show it", found.particles.seen),
        ("mean of particles", found.particles.means),
        ("mean of aligned noise", found.noise.means),
    )
    height = 3 * (_TILE + 22) + 62 + MARGIN
    left = MARGIN + _SHOWN * (_TILE + _GAP) + 60
    figure = new_figure(left + 330 + MARGIN, height)
    title = "particles, and noise, aligned to the template"
    add_text(figure, MARGIN, height - 30, title, size=13, weight="bold")
    limit = found.plan.detail(found.plan.radius)
    detail = (
        f"by detail to {limit:.0f} Å; means with that to {found.plan.detail(found.plan.grid.radius):.0f} Å"
    )
    add_text(figure, MARGIN, height - 48, detail, size=10, color=QUIET)
    for row, (name, samples) in enumerate(rows):
        bottom = height - 62 - (row + 1) * (_TILE + 22) + 16
        chosen = samples[views].clone()
        chosen[:, 0] = 0
        for column, image in enumerate(found.plan.grid.images(chosen).numpy()):
            axes = add_panel(figure, MARGIN + column * (_TILE + _GAP), bottom, _TILE, _TILE)
            axes.imshow(image, cmap="gray", origin="lower")
            axes.set_axis_off()
        add_text(figure, MARGIN, bottom - 16, name, size=9)
    _draw_fits(add_panel(figure, left, height - 62 - 150, 320, 138), found)
    _draw_rings(add_panel(figure, left, 52, 320, 116), found)
    save(figure, path)


def _draw_fits(axes: Axes, found: Compared) -> None:
    curves = (found.particles, "particles", "C0"), (found.noise, "noise", QUIET)
    every = torch.cat([each.matches.correlation for each, _, _ in curves])
    edges = np.linspace(float(every.min()), float(every.max()), 41)
    for each, label, colour in curves:
        counts, _ = np.histogram(each.matches.correlation.numpy(), edges)
        share = 100 * counts / len(each.matches.correlation)
        axes.stairs(share, edges, label=label, color=colour, fill=True, alpha=0.25)
        axes.stairs(share, edges, color=colour, lw=1.3)
    axes.set_ylabel("images, %", fontsize=9, color=INK)
    dress(axes, "best correlation with the template")
    axes.legend(fontsize=8, frameon=False, ncols=2, loc="lower right", bbox_to_anchor=(1.0, 1.0))


def _draw_rings(axes: Axes, found: Compared) -> None:
    plan = found.plan
    frequency = np.arange(plan.grid.rings) / plan.side
    for each, colour in ((found.particles, "C0"), (found.noise, QUIET)):
        axes.plot(frequency[1:], each.common.frc.numpy()[1:], color=colour, lw=1.3)
    axes.axvline(plan.radius / plan.side, color=INK, lw=1.0, ls="--")
    axes.axhline(0, color=QUIET, lw=0.6)
    ticks = [d for d in (100, 50, 30, 20, 15, 12, 10, 8, 6) if frequency[1] <= 1 / d <= frequency[-1]]
    axes.set_xticks([1 / d for d in ticks], [f"{d:g}" for d in ticks])
    axes.set_ylim(-0.3, 1.04)
    axes.set_ylabel("FRC of the means", fontsize=9, color=INK)
    dress(axes, "resolution, Å; dashed: of the alignment")
