"""What steps say of their options, in the words of the chain."""

from __future__ import annotations

import pytest

from halfmap.engine import registered_steps
from halfmap.steps import load_steps
from halfmap.workflow.words import Words

load_steps()


@pytest.mark.parametrize(
    ("stage", "step", "said", "meant"),
    [
        (
            "import",
            "import movies",
            "turn it with --gain-flip 1, or go on with --no-check-gain",
            "turn it with --gain-flip 1, or go on with --set import.check-gain=false",
        ),
        ("refine", "refine", "give --diameter 208", "give --set refine.diameter=208"),
        ("refine", "refine", "give --diameter, or a mask", "give --set refine.diameter=..., or a mask"),
        ("first-pick", "pick blob", "give --diameter", "give --diameter"),
        ("extract", "extract", "with --pixel-size 2.5.", "with --set extract.pixel-size=2.5."),
        ("refine", "refine", "refine with --symmetry D2", "refine with --symmetry D2"),
        ("refine", "refine", "use fewer --workers", "use fewer --workers"),
        ("refine", "refine", "see `halfmap refine --relax C1`", "see `halfmap refine --relax C1`"),
        (
            "refine",
            "refine",
            "see: halfmap refine --help; --sample 9",
            "see: halfmap refine --help; --set refine.sample=9",
        ),
        ("hand", "hand", "give --mirror=always", "give --set hand.mirror=always"),
        ("ctf", "ctf", "--defocus-max=40000", "--set ctf.defocus-max=40000"),
    ],
)
def test_options_are_named_as_the_chain_takes_them(stage: str, step: str, said: str, meant: str):
    assert Words(stage, registered_steps()[step]).translate(said) == meant
