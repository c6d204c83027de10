"""The fit of the CTF: geometry, likelihood, search, errors, against slow references and synthetic spectra."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from halfmap.data.defocus import surface_terms
from halfmap.errors import FileFormatError
from halfmap.ops.ctf import ctf
from halfmap.steps.ctf import fit as fits
from halfmap.steps.ctf import likelihood, quality, tiles
from halfmap.steps.ctf._kernels import N_SUMS, normal_sums, ring_sums
from halfmap.steps.ctf.average import Optics, fit_average
from halfmap.steps.ctf.estimate import estimate_ctf
from halfmap.steps.ctf.likelihood import Problem
from halfmap.steps.ctf.search import Search
from halfmap.steps.ctf.thickness import _half_width
from halfmap.units import electron_wavelength

OPTICS = Optics(voltage_kV=300.0, cs_mm=2.7, amplitude_contrast=0.1)


def test_polar_bins_average_the_phase_of_the_ctf():
    # sin² of the mean phase of a bin is the square of the CTF where a bin holds one coefficient.
    box, extent = 64, 64 * 2.0
    bins = tiles.polar_bins(box, extent, 1 / 30, 1 / 5, None, 180)
    phase = tiles.phase_terms(bins, voltage_kV=300, cs_mm=2.7, amplitude_contrast=0.1, fixed_phase=20)
    mean, half, angle = 15_000.0, 400.0, math.radians(35)
    cosine, sine = half * math.cos(2 * angle), half * math.sin(2 * angle)
    chi = phase[0] * mean + phase[1] * cosine + phase[2] * sine + phase[3]
    values = ctf(
        (box, box),
        pixel_size=torch.tensor(2.0, dtype=torch.float64),
        defocus_u=mean + half,
        defocus_v=mean - half,
        defocus_angle=35.0,
        voltage_kV=300.0,
        cs_mm=2.7,
        amplitude_contrast=0.1,
        phase_shift=20.0,
    ).numpy()
    single = bins.count == 1
    assert single.sum() > 300
    for ring, sector in np.argwhere(single)[::17]:
        where = bins.index == ring * bins.count.shape[1] + sector
        assert math.sin(chi[ring, sector]) == pytest.approx(values[where][0], abs=1e-7)


def test_every_coefficient_of_a_ring_is_in_one_bin_and_mates_are_counted_once():
    bins = tiles.polar_bins(64, 64.0, 5 / 64, 20 / 64)
    k = np.fft.fftfreq(64) * 64
    radius = np.rint(np.hypot(k[:, None], k))
    for ring, frequency in enumerate(bins.frequency):
        assert bins.count[ring].sum() == (radius == round(frequency * 64)).sum() / 2


def test_magnification_turns_image_frequencies_into_true_ones():
    scaled = tiles.polar_bins(64, 64.0, 5 / 64, 20 / 64, (1.1, 0.0, 0.0, 1.1))
    plain = tiles.polar_bins(64, 64.0, 5 / 64, 20 / 64)
    np.testing.assert_allclose(scaled.k2, 1.21 * plain.k2)
    np.testing.assert_allclose(scaled.k4, 1.1**4 * plain.k4)


def test_spectra_of_white_noise_scatter_as_independence_says():
    rng = np.random.default_rng(3)

    def spectra() -> tiles.TileSpectra:
        image = rng.normal(size=(512, 512)).astype(np.float32)
        return tiles.tile_spectra(image, pixel_size=2.0, lowest=1 / 30, highest=1 / 5, extent=512)

    first = spectra()
    assert first.power.shape[0] == 9
    assert first.bins.extent == 512
    # Weighted sums over all bins, like those of a score, for slow and for fast rings.
    phase = tiles.phase_terms(first.bins, voltage_kV=300, cs_mm=0.0, amplitude_contrast=0.0)
    count = first.bins.count
    waves = {defocus: np.cos(2 * phase[0] * defocus) for defocus in (2_000.0, 11_000.0)}
    means = [spectra().power.mean(axis=0) for _ in range(150)]
    level = np.mean(means)
    for defocus, wave in waves.items():
        worth = tiles.independence(first, phase, defocus)
        sums = [float((count * wave * mean).sum()) / level for mean in means]
        # The variance of 150 sums is known to 12 %.
        assert np.var(sums) / ((count * wave**2 / worth).sum() / 9) == pytest.approx(1, abs=0.4)


def _problem(
    rng: np.random.Generator, *, t: int = 3, free_phase: bool = True
) -> tuple[Problem, likelihood.State]:
    bins = tiles.polar_bins(128, 128 * 2.0, 1 / 30, 1 / 5, None, 8)
    phase = tiles.phase_terms(bins, voltage_kV=300, cs_mm=2.7, amplitude_contrast=0.1)
    r, s = bins.count.shape
    centres = rng.uniform(-1, 1, (t, 2))
    problem = Problem(
        power=rng.uniform(0.5, 2.5, (t, r, s)).astype(np.float32),
        weight=bins.count * 0.3,
        effective=1.0,
        phase=phase,
        terms=surface_terms(centres[:, 0], centres[:, 1], 3),
        free_phase=free_phase,
        free_cs=free_phase,
        roughness=np.full(r, 0.01),
        gain=np.ones(r),
        trust=np.ones(r),
    )
    state = likelihood.start_state(
        replace(problem, power=problem.power * 1.0), np.array([9_000.0, 150.0, -80.0, 0.3]), np.full(r, 0.3)
    )
    profile = 0.1 * rng.normal(size=(t, 3))
    return problem, replace(
        state,
        rough=0.05 * rng.normal(size=r),
        profile=profile - profile.mean(axis=0),
        relative=np.linspace(0.8, 1.2, t),
        surface=np.array([9_000.0, 60.0, -40.0]),
        cs_change=0.2,
    )


def test_ring_sums_are_a_slow_sum():
    rng = np.random.default_rng(1)
    problem, state = _problem(rng)
    sums = likelihood.evaluate(problem, state)
    log_s, contrast, defocus = likelihood.spectra_of(problem, state)
    t, r = 1, 7
    expected = np.zeros(N_SUMS)
    for s in range(problem.weight.shape[1]):
        n = problem.weight[r, s]
        if n == 0:
            continue
        a, b, c, d, e = problem.phase[:, r, s]
        chi = (
            a * defocus[t]
            + b * state.astigmatism[0]
            + c * state.astigmatism[1]
            + d
            + e * state.cs_change
            + state.phase_shift
        )
        model = 1 - contrast[t, r] * math.cos(2 * chi)
        ratio = float(problem.power[t, r, s]) / math.exp(log_s[t, r]) / model
        limit = 1 + 4 / math.sqrt(n) + 4 / n
        beyond = max(ratio / limit, 1.0)
        ratio = min(ratio, limit)
        slope = 2 * contrast[t, r] * math.sin(2 * chi) / model
        local = np.array([1, -math.cos(2 * chi) / model, slope * a, slope * b, slope * c, slope])
        expected[:21] += n * np.outer(local, local)[np.triu_indices(6)]
        expected[21:27] += n * (ratio - 1) * local
        expected[27] += n * (math.log(model) + log_s[t, r] + ratio + limit * math.log(beyond))
    np.testing.assert_allclose(sums[t, r], expected, rtol=1e-9, atol=1e-9)


def test_score_is_the_gradient_of_the_loss():
    rng = np.random.default_rng(2)
    problem, state = _problem(rng)
    # Without rough rings the score of the system is the plain one.
    problem = replace(problem, roughness=np.zeros_like(problem.roughness))
    state = replace(state, rough=np.zeros_like(state.rough))
    # Some bins stick out; they pull no more than the limit, and the loss must say the same.
    power = np.where(rng.uniform(size=problem.power[:1].shape) < 0.05, 40.0, problem.power[:1])
    one = replace(problem, power=power, terms=problem.terms[:1])
    alone = replace(state, profile=np.zeros((1, 3)), relative=np.ones(1))
    system = fits._system(one, alone, likelihood.evaluate(one, alone))

    def loss(**change: object) -> float:
        moved = replace(alone, **change)
        return likelihood.loss_of(one, moved, likelihood.evaluate(one, moved))

    def slope(name: str, index: int | None, step: float) -> float:
        values = []
        for sign in (1, -1):
            value = getattr(alone, name)
            if index is None:
                values.append(loss(**{name: value + sign * step}))
            else:
                moved = np.array(value)
                moved[index] += sign * step
                values.append(loss(**{name: moved}))
        return (values[0] - values[1]) / (2 * step)

    n = len(alone.smooth)
    checks = [
        ("smooth", 3, 1e-5, 3),
        ("contrast", 2, 1e-5, n + 2),
        ("surface", 0, 0.1, n + 7),
        ("surface", 2, 0.1, n + 9),
        ("astigmatism", 1, 0.1, n + 11),
        ("phase_shift", None, 1e-5, n + 12),
        ("cs_change", None, 1e-4, n + 13),
    ]
    for name, index, step, place in checks:
        # Of Cs every ring has one factor: over the width of a ring, a pixel, k⁴ varies.
        rel = 2e-3 if name == "cs_change" else 1e-4
        assert -slope(name, index, step) == pytest.approx(system.score[place], rel=rel, abs=1e-4)


def test_normal_equations_are_those_of_dense_matrices():
    rng = np.random.default_rng(5)
    problem, state = _problem(rng)
    sums = likelihood.evaluate(problem, state)
    t, r = sums.shape[:2]
    m = 3
    smooth, contrast, slow = (
        likelihood.spline_basis(r, 12),
        likelihood.spline_basis(r, 7),
        likelihood.slow_terms(r),
    )
    own = contrast @ state.contrast
    aberration = problem.phase[4].mean(axis=1)
    rings, ring_score = np.zeros((r, 9, 9)), np.zeros((r, 9))
    blocks, block_score, cross = np.zeros((t, 4, 4)), np.zeros((t, 4)), np.zeros((t, 4, 26))
    normal_sums(
        sums,
        problem.terms,
        state.relative,
        own,
        smooth,
        contrast,
        slow,
        1.0,
        aberration,
        rings,
        ring_score,
        blocks,
        block_score,
        cross,
    )
    local = np.zeros((t, r, 6, 6))
    a, b = np.triu_indices(6)
    local[..., a, b] = local[..., b, a] = sums[..., :21]
    design = np.zeros((t, r, 6, 12 + 7 + m + 4))
    design[:, :, 0, :12] = smooth
    design[:, :, 1, 12:19] = state.relative[:, None, None] * contrast
    design[:, :, 2, 19:22] = problem.terms[:, None]
    design[:, :, [3, 4, 5], [22, 23, 24]] = 1
    design[:, :, 5, 25] = aberration
    mine = np.zeros((r, 6, 4))
    mine[:, 0, :3], mine[:, 1, 3] = slow, own
    columns = fits._columns(problem)
    np.testing.assert_allclose(
        np.einsum("rva,rvw,rwb->ab", columns, rings, columns),
        np.einsum("tria,trij,trjb->ab", design, local, design),
        rtol=1e-9,
        atol=1e-6,
    )
    np.testing.assert_allclose(
        blocks, np.einsum("ria,trij,rjb->tab", mine, local, mine), rtol=1e-9, atol=1e-9
    )
    np.testing.assert_allclose(
        block_score, np.einsum("ria,tri->ta", mine, sums[..., 21:27]), rtol=1e-9, atol=1e-9
    )
    expected = np.einsum("ria,trij,trjb->tab", mine, local, design)
    np.testing.assert_allclose(cross, expected, rtol=1e-9, atol=1e-6)


def test_threads_change_nothing():
    problem, state = _problem(np.random.default_rng(4), t=7)
    whole = likelihood.evaluate(problem, state)
    parts = np.empty_like(whole)
    log_s, contrast, defocus = likelihood.spectra_of(problem, state)
    for tile in range(7):
        ring_sums(
            tile,
            tile + 1,
            problem.power,
            problem.weight,
            problem.effective,
            problem.phase,
            log_s,
            contrast,
            defocus,
            state.astigmatism,
            state.phase_shift,
            state.cs_change,
            likelihood.CLIP,
            parts,
        )
    np.testing.assert_array_equal(whole, parts)


def synthetic(
    rng: np.random.Generator,
    *,
    defocus: float,
    astigmatism: float = 0.0,
    angle: float = 0.0,
    phase_shift: float = 0.0,
    size: int = 1024,
    contrast: float = 0.5,
    thickness: float = 0.0,
    falloff: float = 6.0,
    pixel_size: float = 1.4,
) -> np.ndarray:
    """Noise whose power is (1 - contrast) + contrast * 2 CTF², falling off; CTF² is a slab's."""
    values = ctf(
        (size, size),
        pixel_size=pixel_size,
        defocus_u=defocus + astigmatism / 2,
        defocus_v=defocus - astigmatism / 2,
        defocus_angle=angle,
        voltage_kV=300.0,
        cs_mm=2.7,
        amplitude_contrast=0.1,
        phase_shift=phase_shift,
    ).numpy()
    k = np.hypot(np.fft.fftfreq(size, pixel_size)[:, None], np.fft.rfftfreq(size, pixel_size))
    seen = contrast * np.exp(-((k * falloff) ** 2))
    slab = np.sinc(electron_wavelength(300.0) * thickness * k**2)
    power = (1 + 2 * np.exp(-30 * k)) * (1 - seen * slab * (1 - 2 * values**2))
    noise = np.fft.rfft2(rng.normal(size=(size, size)))
    return np.fft.irfft2(noise * np.sqrt(power), s=(size, size)).astype(np.float32)


def _fit(image: np.ndarray, optics: Optics = OPTICS, finest: float = 3.5, **options: object):
    spectra = tiles.tile_spectra(image, pixel_size=1.4, lowest=1 / 30, highest=1 / finest)
    free_phase = bool(options.pop("free_phase", False))
    search = Search(lowest=3_000, highest=50_000, free_phase=free_phase)
    average, problem = fit_average(spectra, optics, search)
    return spectra, estimate_ctf(spectra, average, problem, **options)


@pytest.mark.parametrize(
    ("defocus", "astigmatism", "angle"),
    [(5_000, 300, 20), (12_000, 0, 0), (21_000, 1_000, -70), (33_000, 400, 85)],
)
def test_defocus_and_astigmatism_are_found_within_their_errors(defocus, astigmatism, angle):
    rng = np.random.default_rng(defocus)
    _, found = _fit(synthetic(rng, defocus=defocus, astigmatism=astigmatism, angle=angle))
    state, errors = found.fit.state, np.sqrt(np.diag(found.covariance))
    m = len(state.surface)
    truth = astigmatism / 2 * np.array([math.cos(2 * math.radians(angle)), math.sin(2 * math.radians(angle))])
    assert 0.5 < errors[0] < 40
    assert abs(state.surface[0] - defocus) < 4 * errors[0]
    np.testing.assert_array_less(np.abs(state.astigmatism - truth), 4 * errors[m : m + 2])


def test_strong_rings_do_not_drive_the_spectrum_away():
    # At a wrong defocus every other ring sticks out of the model; the right one must still be likelier.
    rng = np.random.default_rng(31)
    optics = Optics(voltage_kV=300.0, cs_mm=2.7, amplitude_contrast=0.1)
    for pixel_size, defocus in ((3.0, 15_000.0), (6.0, 25_000.0)):
        image = synthetic(
            rng, defocus=defocus, astigmatism=300, angle=30, pixel_size=pixel_size, contrast=0.7
        )
        spectra = tiles.tile_spectra(image, pixel_size=pixel_size, lowest=1 / 30, highest=1 / 3)
        average, problem = fit_average(spectra, optics, Search(lowest=3_000, highest=50_000))
        found = estimate_ctf(spectra, average, problem)
        error = math.sqrt(found.covariance[0, 0])
        assert 0.5 < error < 100
        assert abs(found.surface[0] - defocus) < 4 * error


def test_phase_shift_is_found_within_its_error():
    _, found = _fit(synthetic(np.random.default_rng(8), defocus=9_000, phase_shift=70), free_phase=True)
    error = math.degrees(math.sqrt(found.covariance[-2, -2]))
    assert 0.1 < error < 5
    assert abs(math.degrees(found.fit.state.phase_shift) % 180 - 70) < 4 * error


def test_a_wrong_cs_is_measured_and_ends_the_range():
    image = synthetic(np.random.default_rng(12), defocus=12_000, astigmatism=300, size=2048, falloff=3.0)
    _, right = _fit(image, finest=3.0)
    assert right.finest < 3.02
    assert abs(right.cs_change) < 3 * right.cs_error
    _, wrong = _fit(image, Optics(voltage_kV=300.0, cs_mm=1.0, amplitude_contrast=0.1), finest=3.0)
    assert wrong.finest > 3.2
    assert wrong.cs_change == pytest.approx(1.7, abs=4 * wrong.cs_error)
    assert wrong.cs_change > 5 * wrong.cs_error


def test_thickness_of_ice_is_found_from_its_nodes_or_not_at_all():
    rng = np.random.default_rng(13)
    for thickness in (1_000.0, 200.0):
        image = synthetic(rng, defocus=12_000, astigmatism=300, size=1536, thickness=thickness, falloff=2.0)
        _, found = _fit(image, finest=3.0, fit_thickness=True)
        assert found.thickness is not None
        if thickness == 200.0:
            # The node lies at 2 Å, where nothing is seen.
            assert math.isnan(found.thickness.value)
        else:
            assert 1 < found.thickness.error < 60
            assert abs(found.thickness.value - thickness) < 4 * found.thickness.error
            error = math.sqrt(found.covariance[0, 0])
            assert abs(found.surface[0] - 12_000) < 4 * error


@pytest.mark.parametrize("error", [4.0, 9.0, 33.0])
def test_the_error_of_a_thickness_is_that_of_a_parabola_on_any_grid(error):
    grid = np.arange(-90.0, 91, 15)
    assert _half_width(grid, (grid / error) ** 2 / 2) == pytest.approx(error)


def test_stated_errors_are_those_of_a_bootstrap_over_tiles():
    image = synthetic(np.random.default_rng(14), defocus=11_000, astigmatism=400, angle=10, size=1536)
    spectra, found = _fit(image, fit_tilt=False)
    rng, values = np.random.default_rng(15), []
    state, t = found.fit.state, len(spectra.power)
    for _ in range(60):
        some = rng.integers(0, t, t)
        problem = replace(found.problem, power=found.problem.power[some], terms=found.problem.terms[some])
        start = replace(state, profile=state.profile[some], relative=state.relative[some])
        best = fits.maximise(problem, start, iterations=6).state
        values.append([best.surface[0], *best.astigmatism])
    drawn = np.std(values, axis=0, ddof=1) * math.sqrt(spectra.overlap)
    stated = np.sqrt(np.diag(found.covariance))[:3]
    # A standard deviation of n values is known to 1 / sqrt(2 n): of 60 draws, and of the tiles themselves.
    spread = math.sqrt((1 / 120 + 1 / (2 * t)) / 3)
    assert abs(np.log(stated / drawn).mean()) < 4 * spread


def test_rings_that_fade_in_one_direction_are_seen():
    rng = np.random.default_rng(16)
    image = synthetic(rng, defocus=12_000, size=1024, contrast=0.9)
    k = np.fft.fftfreq(1024, 1.4)[:, None], np.fft.rfftfreq(1024, 1.4)[None]
    along = k[1] * math.cos(math.radians(30)) + k[0] * math.sin(math.radians(30))
    # The specimen drifts, the noise of counting does not.
    drifted = np.fft.irfft2(np.fft.rfft2(image) * np.sinc(8 * along)) + rng.normal(size=image.shape)
    for picture, lost in ((image, False), (drifted.astype(np.float32), True)):
        spectra, found = _fit(picture)
        profile = quality.equiphase_profile(found.problem, found.fit.state, spectra.bins, 1.0)
        ratio, error, direction = quality.anisotropy(profile)
        assert (ratio > 0.3 and ratio > 5 * error) == lost
        if lost:
            assert direction == pytest.approx(30, abs=10)


def test_noise_has_no_rings_and_rings_are_significant():
    rng = np.random.default_rng(9)
    for image, seen in (
        (rng.normal(size=(768, 768)).astype(np.float32), False),
        # Contrast and spectrum can make up for each other at the first rings; that is no evidence.
        (np.random.default_rng(101).normal(size=(2048, 2048)).astype(np.float32), False),
        (synthetic(rng, defocus=12_000, size=768), True),
    ):
        spectra, found = _fit(image)
        profile = quality.equiphase_profile(found.problem, found.fit.state, spectra.bins, 1.0)
        assert (quality.significance(profile) > 10) == seen
        assert (quality.resolution_limit(profile) < 8) == seen


def test_resolution_ends_where_the_rings_do():
    k = np.linspace(0.04, 0.3, 200)
    rings = -np.cos(2 * np.pi * 400 * k**2 * 3)
    rng = np.random.default_rng(0)
    data = np.where(k < 0.2, rings, 0) + 0.05 * rng.normal(size=200)
    turns = np.gradient(2400 * np.pi * k**2) / (2 * np.pi)
    error = np.full(200, 0.05)
    profile = quality.Profile(
        k,
        data,
        error,
        rings,
        np.zeros(200),
        rings,
        quality._sliding_correlation(data, rings, turns),
        np.ones(18),
        np.ones(18),
    )
    assert quality.resolution_limit(profile) == pytest.approx(5.0, rel=0.05)


def test_ice_ring_is_power_over_what_is_beside():
    frequency = np.linspace(0.05, 0.35, 301)
    spectrum = np.exp(-5 * frequency) * np.where((frequency > 0.249) & (frequency < 0.281), 1.4, 1.0)
    power = np.broadcast_to(spectrum[:, None], (2, 301, 4))
    assert quality.ice_ring(power, np.ones((301, 4)), frequency) == pytest.approx(0.4, abs=0.01)
    assert quality.ice_ring(power[:, :200], np.ones((200, 4)), frequency[:200]) is None


@pytest.mark.parametrize(
    ("image", "words"),
    [
        (np.ones((512, 512)), "blank"),
        (np.full((512, 512), np.nan), "not numbers"),
        (np.where(np.arange(512 * 512).reshape(512, 512) % 2 == 0, 255.0, 3.0), "saturated"),
    ],
)
def test_useless_images_are_refused(image, words):
    with pytest.raises(FileFormatError, match=words):
        tiles.checked_image(image, "x.mrc")


def test_small_images_are_refused_and_hot_pixels_clipped():
    rng = np.random.default_rng(0)
    image = rng.normal(size=(240, 600)).astype(np.float32)
    with pytest.raises(FileFormatError, match="smaller than a tile"):
        tiles.tile_spectra(image, pixel_size=1.4, lowest=1 / 30, highest=1 / 4, name="x.mrc")
    for options in ({"pixel_size": 20.0, "highest": 1 / 3}, {"pixel_size": 1.4, "highest": 1 / 29}):
        with pytest.raises(FileFormatError, match="too few frequencies"):
            tiles.tile_spectra(rng.normal(size=(600, 600)), lowest=1 / 30, name="x.mrc", **options)
    image[100, 100] = 1e6
    image[3, 3] = np.nan
    checked = tiles.checked_image(image, "x.mrc")
    assert np.isfinite(checked).all()
    assert checked.max() < 10


def test_a_plane_of_defocus_is_found_tile_by_tile():
    # Halves of one picture at two defoci: the right one has more.
    rng = np.random.default_rng(11)
    pieces = [
        synthetic(rng, defocus=15_000 + 250 * i, size=1024)[:, 256 * i : 256 * (i + 1)] for i in range(4)
    ]
    _, found = _fit(np.concatenate(pieces, axis=1))
    # From the middle of the first quarter to that of the last: 750 Å over 1.5 halves of the field.
    gradient, error = found.plane.state.surface[1:3], np.sqrt(np.diag(found.plane_covariance))[1:3]
    assert gradient[0] == pytest.approx(500, abs=4 * error[0] + 60)
    assert abs(gradient[1]) < 4 * error[1] + 20


def test_tiles_leave_some_information_on_all_that_they_take_from():
    rng = np.random.default_rng(0)
    scale = 10.0 ** rng.uniform(-3, 3, 8)
    vectors = np.linalg.qr(rng.normal(size=(8, 8)))[0] * scale[:, None]
    share = np.array([0.0, 0.1, 0.2, 0.3, 0.5, 0.7, 0.9, 0.99])
    whole = vectors @ vectors.T
    taken = vectors * share @ vectors.T
    assert np.array_equal(fits._left(whole, taken), whole - taken)
    # More is taken along two directions than there is.
    share[2:4] = 1.1, 40.0
    left = fits._left(whole, vectors * share @ vectors.T)
    expected = vectors * np.maximum(1 - share, 1e-3) @ vectors.T
    np.testing.assert_allclose(left / scale[:, None] / scale, expected / scale[:, None] / scale, atol=1e-9)
    assert (np.linalg.eigvalsh(left / scale[:, None] / scale) > 0).all()
