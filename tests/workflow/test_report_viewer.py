"""The map that turns in a report: its voxels, the picture in its place, and both in a browser."""

from __future__ import annotations

import base64
import io
import re
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
from made_project import ball
from PIL import Image

from halfmap.io.mrc import write_mrc
from halfmap.markup import page
from halfmap.workflow.report import viewer

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
GROUND = (246, 247, 248)


def written(folder: Path, array: np.ndarray, pixel_size: float = 2.0) -> Path:
    path = folder / "map.mrc"
    write_mrc(path, array.astype(np.float32), pixel_size=pixel_size, stack=False)
    return path


def arm(n: int = 48) -> np.ndarray:
    """A ball in the middle with one arm that is long, another that is short, and so has a hand."""
    parts = (((0, 0, 0), 8.0), ((12, 0, 0), 4.0), ((0, 9, 0), 3.0), ((0, 0, 10), 3.5))
    return np.max([ball(n, centre, radius) for centre, radius in parts], axis=0)


def test_a_map_is_cut_to_the_particle_and_its_densities_kept(tmp_path):
    whole = ball(n=64, radius=12.0)
    shown = viewer.prepare(written(tmp_path, whole))
    n = len(shown.voxels)
    assert 24 <= n < 64
    assert shown.pixel_size == pytest.approx(2.0)
    first = 32 - n // 2
    part = whole[first : first + n, first : first + n, first : first + n]
    found = shown.low + shown.voxels / 255.0 * (shown.high - shown.low)
    assert np.abs(found - part).max() < 0.01
    assert 0.1 < shown.level < 0.9


def test_a_large_map_is_made_small(tmp_path):
    shown = viewer.prepare(written(tmp_path, ball(n=150, radius=60.0), 1.0))
    assert shown.voxels.shape == (96, 96, 96)
    assert 120 / 96 <= shown.pixel_size <= 150 / 96
    inside = (shown.voxels > 127).sum() * shown.pixel_size**3
    assert inside == pytest.approx(4 / 3 * np.pi * 60**3, rel=0.02)


def test_a_map_of_noise_is_shown_too(tmp_path):
    shown = viewer.prepare(written(tmp_path, np.random.default_rng(1).normal(size=(32, 32, 32))))
    assert shown.low < shown.level < shown.high


def test_what_is_no_map_is_left_out(tmp_path):
    assert viewer.view(tmp_path / "none.mrc", "x") is None
    assert viewer.view(written(tmp_path, np.ones((8, 8, 8))), "x") is None
    assert viewer.view(written(tmp_path, np.random.default_rng(1).normal(size=(8, 8, 10))), "x") is None


@pytest.mark.parametrize("place", [(14, 0, 0), (0, 14, 0), (0, 0, 14), (-9, 4, 11)])
def test_the_picture_has_the_map_s_hand(place):
    """A ball off the middle is where the rotation takes it: x to the right, y upwards, z to the eye."""
    voxels = np.rint(255 * ball(48, place, 4.0)).astype(np.uint8)
    picture = np.asarray(viewer.still(viewer.Shown(voxels, 0.0, 1.0, 0.5, 1.0)), dtype=int)
    rows, columns = np.nonzero(np.abs(picture - GROUND).max(axis=-1) > 30)
    middle, scale = (len(picture) - 1) / 2, len(picture) / 48
    found = (columns.mean() - middle) / scale, (middle - rows.mean()) / scale
    tilt, turn = np.deg2rad((20.0, 30.0))
    x, y, z = np.array(place) + 0.5  # voxel n // 2 is half a voxel beyond the box's middle
    x, z = x * np.cos(turn) + z * np.sin(turn), z * np.cos(turn) - x * np.sin(turn)
    y, z = y * np.cos(tilt) - z * np.sin(tilt), z * np.cos(tilt) + y * np.sin(tilt)
    assert found == pytest.approx((x, y), abs=0.4)


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium is installed")
def test_in_a_browser_the_surface_is_the_picture_s(tmp_path):
    """Without errors, and turned the same way; dragging turns it, as the viewer's own events do."""
    shown = viewer.view(written(tmp_path, arm()), "A map.")
    ask = """
    const canvas = document.querySelector("canvas"), tell = (name) => {
      const part = document.createElement("p");
      part.id = name;
      part.textContent = canvas.toDataURL();
      document.body.append(part);
    };
    const point = (kind, x) => canvas.dispatchEvent(
      new PointerEvent(kind, {pointerId: 1, clientX: x, clientY: 50, bubbles: true}));
    canvas.setPointerCapture = () => {};
    setTimeout(() => {
      tell("first");
      const before = canvas.toDataURL();
      let looks = 0;
      const same = () => canvas.toDataURL() === before && ++looks < 100;
      const wait = () => same() ? setTimeout(wait, 200) : tell("turned");
      point("pointerdown", 0); point("pointermove", 150); point("pointerup", 150);
      setTimeout(wait, 1000);
    }, 2000);
    """
    text = page("x", shown, style=viewer.resource("viewer.css"), script=viewer.resource("viewer.js") + ask)
    (tmp_path / "page.html").write_text(text)
    words = "--headless=new --no-sandbox --use-gl=angle --use-angle=swiftshader --enable-unsafe-swiftshader"
    words += f" --virtual-time-budget=30000 --enable-logging=stderr --user-data-dir={tmp_path / 'profile'}"
    command = [str(CHROMIUM), *words.split(), "--dump-dom", f"file://{tmp_path / 'page.html'}"]
    run = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    assert "CONSOLE" not in run.stderr
    if '<canvas tabindex="0" hidden' in run.stdout:
        pytest.skip("this Chromium has no WebGL 2")
    first, turned = (_drawn(run.stdout, name) for name in ("first", "turned"))
    still = np.asarray(viewer.still(viewer.prepare(tmp_path / "map.mrc")), dtype=int)
    expected = np.asarray(np.abs(still - GROUND).max(axis=-1) > 30)
    assert _overlap(first, expected) > 0.97
    for other in (expected[:, ::-1], expected[::-1], expected.T, turned):
        assert _overlap(first, other) < 0.9


def _drawn(dom: str, name: str) -> np.ndarray:
    found = re.search(rf'<p id="{name}">data:image/png;base64,([^<]*)', dom)
    assert found, dom[-500:]
    picture = Image.open(io.BytesIO(base64.b64decode(found[1]))).resize((480, 480))
    return np.asarray(picture)[..., 3] > 127


def _overlap(a: np.ndarray, b: np.ndarray) -> float:
    return (a & b).sum() / (a | b).sum()
