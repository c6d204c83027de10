"""What jobs are called in a report."""

from __future__ import annotations

from halfmap.workflow.report.graph import Node

_TITLES = {
    "halfmap.simulate": "Simulation",
    "relion.import": "Import",
    "relion.motioncorr": "Motion",
    "relion.ctf": "CTF",
    "relion.select.class2d": "Selection of classes",
    "relion.select": "Selection",
    "halfmap.pick.train": "Training of the picker",
    "halfmap.pick.export": "Export of picks",
    "relion.autopick": "Picks",
    "relion.manualpick": "Picks by hand",
    "relion.extract": "Extraction",
    "relion.class2d": "Classes in 2D",
    "relion.initialmodel": "First map",
    "relion.class3d": "Classes in 3D",
    "relion.refine3d": "Refinement",
    "relion.maskcreate": "Mask",
    "relion.ctfrefine": "CTF refinement",
    "relion.polish": "Polishing",
    "relion.localres": "Local resolution",
    "relion.postprocess": "Resolution and sharpening",
    "halfmap.symmetry": "Symmetry",
    "halfmap.hand": "Hand",
    "halfmap.fit": "Model in the map",
    "halfmap.compare": "Comparison of maps",
    "halfmap.validate": "Validation",
}
"""By the beginnings of their types."""

_STEPS = {"curate": "Selection of micrographs"}


def in_text(node: Node) -> str:
    """The same within a sentence."""
    name = title(node)
    return name if name[1:2].isupper() else name[:1].lower() + name[1:]


def title(node: Node) -> str:
    """What a job does, in a word or two."""
    known = next((title for start, title in _TITLES.items() if node.label.startswith(start)), node.label)
    return _STEPS.get(node.step, known)
