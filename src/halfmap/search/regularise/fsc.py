"""Wiener's filter, shell by shell, by the correlation of the half maps."""

from __future__ import annotations

from torch import Tensor

from halfmap.search.halfmaps import solved
from halfmap.search.regularise import Evidence, Filter, Pair


def fsc(evidence: Evidence) -> Filter:
    """Filter each voxel of the transform by its weight and the power that the signal has in its shell.

    Notes
    -----
    The map of greatest posterior under a normal prior whose power depends on the frequency alone. Of the
    other half set it knows the correlation with it.

    References
    ----------
    .. [1] Scheres 2012, J. Struct. Biol. 180, 519-530, DOI 10.1016/j.jsb.2012.09.006
    .. [2] Scheres & Chen 2012, Nat. Methods 9, 853-854, DOI 10.1038/nmeth.2115
    """

    def made(halves: Pair, name: str) -> tuple[Tensor, Tensor]:
        first, second = halves
        return solved(first, evidence.prior[0]), solved(second, evidence.prior[1])

    return made
