"""Whether a map has the right hand, by its alpha helices."""

from __future__ import annotations

from pathlib import Path

from halfmap.search.hand import Verdict, draw_hand, tell_hand
from halfmap.steps.validate.finding import Finding, Given, Light

NAME = "Hand"

_LIGHTS: dict[Verdict, Light] = {
    "right": "green",
    "left": "red",
    "either": "amber",
    "too few": "grey",
    "too coarse": "grey",
}

_ADVICE: dict[Verdict, str] = {
    "left": "; mirror it, and the poses, with `halfmap hand`",
    "either": "; look at helices by eye, or fit a known structure",
}

_METHOD = (
    "Ideal alpha helices of 11 residues, right-handed and left-handed, were fitted to the places that look "
    "most like a helix of either hand, by their correlation within a cylinder. Those of proteins are "
    "right-handed. Places share half of it at most, and copies by the symmetry count once."
)


def check_hand(given: Given, folder: Path) -> Finding:
    """Find whether the helices of a map are right-handed, and draw how well either hand fits.

    Parameters
    ----------
    given : Given
        With half maps, mask, resolution and the map's symmetry.
    folder : path
        Where the picture goes.

    Returns
    -------
    Finding
        Red if left-handed helices fit better, amber if neither do; grey if the resolution is not enough or
        there are no helices.
    """
    found = tell_hand(
        given.halves,
        given.mask,
        fsc=given.fsc.corrected,
        resolution=given.resolution,
        group=given.step.symmetry,
    )
    pictures = ()
    if found.places is not None and len(found.places.right):
        pictures = ("hand.png",)
        draw_hand(folder / "hand.png", found.places)
    sentence = f"{found.sentence}{_ADVICE.get(found.verdict, '')}."
    light = _LIGHTS[found.verdict]
    return Finding(NAME, light, sentence, values=found.values, pictures=pictures, method=_METHOD)
