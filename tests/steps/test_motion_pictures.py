"""Pictures of motion: they are written whatever a movie has or lacks, and say what they should."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
from matplotlib.figure import Figure
from matplotlib.image import imread

from halfmap.data.motion import MotionTracks
from halfmap.steps.motion import pictures

N, SHAPE = 10, (240, 320)


def make_tracks(*, n: int = N, local: bool = True, patches: bool = True, **changes) -> MotionTracks:
    """A field that drifts along x, and stretches about its middle."""
    rng = np.random.default_rng(1)
    h, w = SHAPE
    grown = np.linspace(0, 1, n)
    fields: dict = {}
    if local:
        y, x = np.meshgrid(np.linspace(-0.5, 0.5, 5), np.linspace(-0.5, 0.5, 5), indexing="ij")
        fields["local_grid"] = 2 * grown[:, None, None, None] * np.stack([x, y], axis=-1)
        fields["local_error"] = np.full((n, 5, 5), 0.1)
    if local and patches:
        x, y = np.meshgrid((np.arange(4) + 0.5) * w / 4, (np.arange(3) + 0.5) * h / 3)
        centres = np.stack([x, y], axis=-1).reshape(-1, 2)
        measured = 2 * grown[:, None] * (centres[:, None] / (w, h) - 0.5) + rng.normal(0, 0.1, (12, n, 2))
        measured[:, n // 2] = math.nan
        measured[0] = math.nan
        errors = np.full((12, n), 0.1)
        fields |= {"patch_centres": centres, "patch_shifts": measured, "patch_errors": errors}
    fields |= {
        "movie": "Movies/a.tiff",
        "shape": SHAPE,
        "n_frames": n + 2,
        "first_frame": 2,
        "last_frame": n + 1,
        "pixel_size": 1.2,
        "dose_per_frame": 1.5,
        "pre_exposure": 0.5,
        "voltage_kV": 300.0,
        "global_shift": np.column_stack([-8 * grown, np.sin(3 * grown)]),
        "global_error": np.full(n, 0.2) * (grown > 0),
    }
    return MotionTracks(**(fields | changes))


def draw(path: Path, tracks: MotionTracks, **changes) -> np.ndarray:
    rng = np.random.default_rng(2)
    settings = {
        "micrograph": rng.normal(8, 1, SHAPE).astype(np.float32),
        "spectrum": rng.rayleigh(1, (64, 64)).astype(np.float32),
        "spectrum_pixel_size": 1.2,
        "title": "Movies/a_$1$.tiff: 240 × 320 px of 1.2 Å",
    }
    pictures.draw_movie(path, tracks, **(settings | changes))
    return imread(path)


def texts(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What is written in the pictures drawn from now on."""
    found: list[str] = []
    save = Figure.savefig

    def watch(figure: Figure, path: Path, **options) -> None:
        found.extend(text.get_text() for text in figure.texts)
        found.extend(text.get_text() for axes in figure.axes for text in axes.texts)
        save(figure, path, **options)

    monkeypatch.setattr(Figure, "savefig", watch)
    return found


@pytest.mark.parametrize(
    "tracks",
    [
        make_tracks(),
        make_tracks(patches=False),
        make_tracks(local=False),
        make_tracks(n=1),
        make_tracks(n=300),
        make_tracks(global_error=np.full(N, math.nan), dose_per_frame=0.0),
        make_tracks(global_shift=np.zeros((N, 2)), local_grid=np.zeros((N, 5, 5, 2))),
        make_tracks(local=False, local_coefficients=np.full((2, 18), 1e-3)),
    ],
    ids=["all", "no patches", "no model", "one frame", "many frames", "no errors", "still", "polynomial"],
)
def test_whatever_tracks_there_are_they_are_drawn(tmp_path: Path, tracks: MotionTracks) -> None:
    image = draw(tmp_path / "movie.png", tracks)
    assert image.shape[:2] == (560, 1500)
    assert [file.name for file in tmp_path.iterdir()] == ["movie.png"]


def test_picture_states_motion_and_its_enlargement(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tracks = make_tracks(patches=False, global_shift=np.column_stack([-np.arange(N) / 1.2, np.zeros(N)]))
    found = texts(monkeypatch)
    draw(tmp_path / "movie.png", tracks)
    # The first step is from frame 2 to 3, which ends at 0.5 + 3 · 1.5 = 5 e/Å²; early is up to 4.
    assert any("9.0 Å in all, 0.0 early, 9.0 late" in text for text in found)
    enlarged = next(text for text in found if text.startswith("Local motion"))
    assert "without the whole field's track" in enlarged
    # Nodes are 64 px apart, the farthest moves by √2 · 0.8 px.
    magnification = float(enlarged.split("×")[1].split(",")[0])
    assert 64 / 4 < magnification * math.hypot(0.8, 0.8) < 64 / 2


def test_tracks_are_drawn_as_displacements_of_the_specimen() -> None:
    tracks = make_tracks()
    places, model, measured = pictures._local_tracks(tracks)
    last = tracks.shift_at(places[:, 0], places[:, 1], N - 1) - tracks.global_shift[-1]
    assert np.allclose(model[:, -1], -last)
    assert np.allclose(model[:, 0], 0)
    assert np.nanmax(np.abs(measured[:, -1] - model[:, -1])) < 0.5


@pytest.mark.parametrize("value", [0.0, 7.0, math.nan])
def test_flat_micrograph_and_spectrum_do_not_matter(tmp_path: Path, value: float) -> None:
    flat = np.full(SHAPE, value, np.float32)
    draw(
        tmp_path / "movie.png", make_tracks(), micrograph=flat, spectrum=np.full((32, 32), value, np.float32)
    )
    assert (tmp_path / "movie.png").stat().st_size > 10_000


@pytest.mark.parametrize("shape", [(31, 500), (500, 40), (1001, 1000)])
def test_any_shape_of_micrograph(tmp_path: Path, shape: tuple[int, int]) -> None:
    micrograph = np.random.default_rng(3).normal(size=shape).astype(np.float32)
    tracks = make_tracks(local=False, shape=shape)
    draw(tmp_path / "movie.png", tracks, micrograph=micrograph, spectrum_pixel_size=6.0)
    assert (tmp_path / "movie.png").stat().st_size > 10_000


def test_thumbnail_averages_blocks() -> None:
    image = np.arange(64.0).reshape(8, 8)
    assert np.allclose(pictures._thumbnail(image, 4, 4), image.reshape(4, 2, 4, 2).mean(axis=(1, 3)))
    assert np.allclose(pictures._thumbnail(image, 20, 20), image)


def test_background_goes_and_thon_rings_stay() -> None:
    axis = np.arange(256) - 128
    k = np.hypot(axis[:, None], axis)
    rings = 1 + 0.2 * np.cos(0.004 * k**2)
    noise = np.random.default_rng(4).rayleigh(1, k.shape)
    image, average = pictures._whitened(noise * (3 + 100 / (5 + k)) * rings)
    seen = (k > 25) & (k < 120)
    assert abs(np.polynomial.Polynomial.fit(k[seen], image[seen], 1).convert().coef[1]) < 1e-3
    assert np.corrcoef(image[seen], rings[seen])[0, 1] > 0.3
    assert np.corrcoef(average[seen], rings[seen])[0, 1] > 0.8


def make_rows(n: int) -> list[dict]:
    rng = np.random.default_rng(5)
    rows = []
    for number in range(n):
        early, late = rng.lognormal(1, 0.2, 2)
        rows.append(
            {
                "name": f"Movies/movie_${number:05d}$.tiff",
                "early": early,
                "late": late,
                "total": early + late,
                "error": 0.1,
                "spread": rng.lognormal(0, 0.2),
                "misfit": 1.1,
                "peak_height": 8.0,
                "dose": 40.0,
            }
        )
    return rows


@pytest.mark.parametrize("n", [1, 2, 7, 10_000])
def test_any_number_of_movies_is_summed_up(tmp_path: Path, n: int) -> None:
    pictures.draw_summary(tmp_path / "all.png", make_rows(n))
    height, width = imread(tmp_path / "all.png").shape[:2]
    assert width == 1500
    assert 800 < height < 1300


def test_summary_leaves_out_what_is_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = make_rows(20)
    for row in rows:
        row |= {"spread": None, "misfit": math.nan, "error": math.inf if row is rows[0] else 0.0}
    found = texts(monkeypatch)
    pictures.draw_summary(tmp_path / "all.png", rows)
    assert found.count("not measured") == 2


def test_summary_names_outliers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = make_rows(60)
    rows[7]["total"] = 400.0
    rows[8]["total"] = 300.0
    found = texts(monkeypatch)
    pictures.draw_summary(tmp_path / "all.png", rows)
    named = [text for text in found if "movie_" in text]
    assert named == ["movie_$00007$ (400 Å)", "movie_$00008$ (300 Å)"]
