"""Compiled loops over the polar spectra of tiles.

They hold no lock of the interpreter and are called on parts of the tiles in threads, whose number changes
nothing.
"""

from __future__ import annotations

import math

import numpy as np
from numba import njit

N_LOCAL = 6
"""Quantities that the spectrum of a ring depends on: ln S, c, defocus, two astigmatisms, phase shift."""

N_SUMS = N_LOCAL * (N_LOCAL + 1) // 2 + N_LOCAL + 1
"""Sums of a ring: the upper triangle of the information, row by row, then the score, then -ln L."""


@njit(nogil=True, cache=True)
def add_to_bins(spectrum, index, total):
    """Add |spectrum|² (h, w) to the bins that `index` (h, w) names; negative ones are left out."""
    for y in range(spectrum.shape[0]):
        for x in range(spectrum.shape[1]):
            i = index[y, x]
            if i >= 0:
                value = spectrum[y, x]
                total[i] += value.real * value.real + value.imag * value.imag


@njit(nogil=True, cache=True)
def ring_sums(
    first,
    last,
    power,
    weight,
    effective,
    phase,
    log_s,
    contrast,
    defocus,
    astigmatism,
    shift,
    cs_change,
    clip,
    sums,
):
    """Add up what each ring of the tiles from `first` to `last` says about the parameters.

    Parameters
    ----------
    first, last : int
        Tiles to do.
    power : array (t, r, s)
        Mean power in the bins of ring and sector.
    weight : array (r, s)
        Independent coefficients that a bin of one tile is worth; 0 leaves it out.
    effective : float
        Factor on `weight`.
    phase : array (5, r, s)
        Means over a bin of what defocus, the two astigmatisms, 1 and a change of Cs are multiplied with in
        chi; see `tiles.phase_terms`.
    log_s, contrast : array (t, r)
        Logarithm of the smooth spectrum, and contrast of its rings.
    defocus : array (t,)
        Of each tile in Å.
    astigmatism : array (2,)
        Its two components in Å.
    shift : float
        Phase shift in radian.
    cs_change : float
        Change of Cs in mm.
    clip : float
        Residuals beyond so many standard errors pull as if they were there.
    sums : array (t, r, N_SUMS)
        Written to.
    """
    n_rings, n_sectors = weight.shape
    d = np.empty(6)
    for t in range(first, last):
        for r in range(n_rings):
            out = sums[t, r]
            out[:] = 0.0
            c = contrast[t, r]
            scale = math.exp(-log_s[t, r])
            for s in range(n_sectors):
                n = weight[r, s] * effective
                if n <= 0.0:
                    continue
                chi = (
                    phase[0, r, s] * defocus[t]
                    + phase[1, r, s] * astigmatism[0]
                    + phase[2, r, s] * astigmatism[1]
                    + phase[3, r, s]
                    + phase[4, r, s] * cs_change
                    + shift
                )
                cosine, sine = math.cos(2 * chi), math.sin(2 * chi)
                model = 1 - c * cosine
                ratio = power[t, r, s] * scale / model
                limit = 1 + clip / math.sqrt(n) + clip / n
                # The loss goes on as the integral of the bounded score: with a bounded ratio it would fall
                # for ever with the level of the spectrum.
                deviance = ratio
                if ratio > limit:
                    deviance = limit * (1 + math.log(ratio / limit))
                    ratio = limit
                slope = 2 * c * sine / model
                d[0] = 1.0
                d[1] = -cosine / model
                d[2] = slope * phase[0, r, s]
                d[3] = slope * phase[1, r, s]
                d[4] = slope * phase[2, r, s]
                d[5] = slope
                k = 0
                for i in range(6):
                    ni = n * d[i]
                    for j in range(i, 6):
                        out[k] += ni * d[j]
                        k += 1
                    out[21 + i] += ni * (ratio - 1)
                out[27] += n * (math.log(model) + log_s[t, r] + deviance)


@njit(nogil=True, cache=True)
def normal_sums(
    sums,
    terms,
    relative,
    own_contrast,
    smooth,
    contrast,
    slow,
    free,
    aberration,
    rings,
    ring_score,
    tiles,
    tile_score,
    cross,
):
    """Add the sums of all tiles' rings up to normal equations, by ring and by tile.

    Parameters
    ----------
    sums : array (t, r, N_SUMS)
        From `ring_sums`.
    terms : array (t, m)
        Terms of the surface of defocus.
    relative : array (t,)
        Contrast of each tile against the field's.
    own_contrast : array (r,)
        The field's contrast.
    smooth, contrast : array (r, n)
        Splines of ln S and of the contrast.
    slow : array (r, 3)
        Terms of a tile's own change of ln S.
    free : float
        1 if the phase shift is fitted, else 0.
    aberration : array (r,)
        Change of a ring's phase per mm of Cs; 0 if it is not fitted.
    rings, ring_score : array (r, 6 + m, 6 + m), (r, 6 + m)
        Added to: information and score on ln S, contrast, surface, astigmatism, phase shift, Cs.
    tiles, tile_score : array (t, 4, 4), (t, 4)
        Added to: those on a tile's own change of ln S and relative contrast.
    cross : array (t, 4, n + n + m + 4)
        Added to: information shared with the splines' coefficients and the geometry.
    """
    n_tiles, n_rings = sums.shape[:2]
    m = terms.shape[1]
    size = 6 + m
    n_smooth, n_contrast = smooth.shape[1], contrast.shape[1]
    # Which local quantity a column is made of, and its factor.
    source = np.empty(size, np.int64)
    factor = np.empty(size)
    place = np.empty((6, 6), np.int64)
    k = 0
    for i in range(6):
        for j in range(i, 6):
            place[i, j] = place[j, i] = k
            k += 1
    half = np.empty((2, size))
    shared = np.empty((4, size))
    for t in range(n_tiles):
        source[0], factor[0] = 0, 1.0
        source[1], factor[1] = 1, relative[t]
        for i in range(m):
            source[2 + i], factor[2 + i] = 2, terms[t, i]
        source[2 + m], factor[2 + m] = 3, 1.0
        source[3 + m], factor[3 + m] = 4, 1.0
        source[4 + m], factor[4 + m] = 5, free
        source[5 + m] = 5
        for r in range(n_rings):
            factor[5 + m] = aberration[r]
            s = sums[t, r]
            for v in range(size):
                ring_score[r, v] += factor[v] * s[21 + source[v]]
                for w in range(v, size):
                    rings[r, v, w] += factor[v] * factor[w] * s[place[source[v], source[w]]]
            if n_tiles == 1:
                continue
            for v in range(size):
                half[0, v] = factor[v] * s[place[0, source[v]]]
                half[1, v] = factor[v] * s[place[1, source[v]]]
            c = own_contrast[r]
            for a in range(3):
                tile_score[t, a] += slow[r, a] * s[21]
                tiles[t, a, 3] += slow[r, a] * c * s[1]
                for b in range(a, 3):
                    tiles[t, a, b] += slow[r, a] * slow[r, b] * s[0]
                for v in range(size):
                    shared[a, v] = slow[r, a] * half[0, v]
            tile_score[t, 3] += c * s[22]
            tiles[t, 3, 3] += c * c * s[6]
            for v in range(size):
                shared[3, v] = c * half[1, v]
            for a in range(4):
                for i in range(n_smooth):
                    cross[t, a, i] += shared[a, 0] * smooth[r, i]
                for i in range(n_contrast):
                    cross[t, a, n_smooth + i] += shared[a, 1] * contrast[r, i]
                for i in range(m + 4):
                    cross[t, a, n_smooth + n_contrast + i] += shared[a, 2 + i]
        for a in range(4):
            for b in range(a):
                tiles[t, a, b] = tiles[t, b, a]
    for r in range(n_rings):
        for v in range(size):
            for w in range(v):
                rings[r, v, w] = rings[r, w, v]
