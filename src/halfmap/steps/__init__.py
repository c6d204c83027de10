"""The jobs of the pipeline, one folder each, named here in the order in which a data set meets them."""

from importlib import import_module

PIPELINE = (
    "simulate",
    "import_",
    "motion",
    "denoise",
    "ctf",
    "curate",
    "pick",
    "extract",
    "class2d",
    "select",
    "abinitio",
    "class3d",
    "refine",
    "mask",
    "symmetry",
    "hand",
    "postprocess",
    "localres",
    "fit",
    "compare",
    "validate",
)


def load_steps() -> None:
    """Import every step's definition, which registers it."""
    for name in PIPELINE:
        import_module(f"halfmap.steps.{name}.step")
