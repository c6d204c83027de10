"""How far transforms of maps are padded, by what memory there is."""

from __future__ import annotations

from halfmap.engine.memory import memory_of_each, processes_of
from halfmap.engine.options import RunOptions
from halfmap.log import log

_PADDINGS = 2.0, 1.5, 1.25
"""Of transforms, over the box, the best first."""


def affordable_padding(box: int, images: float, options: RunOptions) -> float:
    """Largest of the paddings that memory suffices for, beside bytes of images, or the smallest."""
    available, share = memory_of_each(options), images / processes_of(options)
    fit = [each for each in _PADDINGS if share + map_bytes(box, each) <= available]
    padding = fit[0] if fit else _PADDINGS[-1]
    if padding < _PADDINGS[0]:
        log.warning("memory does not suffice for transforms padded by 2: they are padded by %g", padding)
    return padding


def map_bytes(box: int, padding: float) -> float:
    """Memory that a process takes for maps: 2.5 sums of all frequencies, of which it was seen to take 2.2."""
    return 2.5 * 16 * (padding * box) ** 2 * (padding * box / 2 + 2)
