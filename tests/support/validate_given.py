"""What checks of a map are given, as far as one of them looks at it."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path
from typing import Any

from halfmap.steps.validate.finding import Given
from halfmap.steps.validate.step import ValidateStep


def given(**what: Any) -> Given:
    """Give these, and nothing else."""
    everything: dict[str, Any] = dict.fromkeys(field.name for field in fields(Given))
    everything["step"] = ValidateStep(half1=Path("half1.mrc"))
    return Given(**everything | what)
