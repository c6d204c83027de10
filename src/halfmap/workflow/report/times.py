"""When jobs began, and how long they took."""

from __future__ import annotations

from contextlib import suppress
from datetime import datetime

from halfmap.workflow.report.graph import Node


def began(node: Node) -> datetime | None:
    """When the job was made, as its record says."""
    with suppress(ValueError, TypeError):
        return datetime.strptime(node.record.get("created", ""), "%Y-%m-%dT%H:%M:%S%z")
    return None


def elapsed(node: Node) -> float | None:
    """Seconds that the job ran, in all its runs together; None where its record does not tell."""
    seconds = node.record.get("seconds")
    return float(seconds) if isinstance(seconds, int | float) else None
