"""The picture of how a classification got on."""

from __future__ import annotations

import json

import numpy as np
import pytest
from matplotlib.figure import Figure

from halfmap.steps.class2d import progress

CURVES = {
    "searched_A": 9.0,
    "best_resolution_A": 11.0,
    "median_resolution_A": 14.0,
    "particles": 1234567,
    "mean_greatest_probability": 0.2,
    "largest_share": 0.3,
    "effective_classes": 4.0,
    "seeded": 1,
}


@pytest.fixture
def drawn(tmp_path, monkeypatch) -> Figure:
    """The picture of three iterations, before it is written."""
    for i in (1, 2, 3):
        (tmp_path / f"it{i:03d}.json").write_text(json.dumps({"iteration": i, **CURVES}))
    kept = []
    monkeypatch.setattr(progress, "save", lambda figure, path: kept.append(figure))
    progress.draw(tmp_path / "progress.png", tmp_path)
    kept[0].canvas.draw()
    return kept[0]


def test_every_panel_says_what_its_axes_are_and_counts_iterations_in_whole_numbers(drawn):
    titles = "resolution, Å; particles taken; probability, share of the particles; number of classes"
    assert [text.get_text() for text in drawn.texts] == titles.split("; ")
    for axes in drawn.axes:
        assert axes.get_xlabel() == "iteration"
        shown = [tick for tick in axes.get_xticks() if axes.get_xlim()[0] <= tick <= axes.get_xlim()[1]]
        assert shown == [1, 2, 3]


def test_numbers_of_resolution_enclose_the_curves(drawn):
    axes = drawn.axes[0]
    assert [label.get_text() for label in axes.get_yticklabels()] == ["8", "10", "12", "15"]
    assert axes.get_ylim() == (8, 15)


def test_the_picture_fits_a_small_screen_and_no_text_meets_another(drawn):
    width, height = drawn.get_size_inches() * drawn.dpi
    assert width <= 1280 and height <= 720
    for axes in drawn.axes:
        texts = [*axes.get_xticklabels(), *axes.get_yticklabels(), axes.xaxis.label]
        texts += axes.get_legend().get_texts() if axes.get_legend() else []
        assert min(text.get_fontsize() for text in texts) >= 10
    boxes = [axes.get_tightbbox() for axes in drawn.axes] + [text.get_window_extent() for text in drawn.texts]
    corners = np.array([box.extents for box in boxes if box is not None])
    assert corners.min() >= 0 and (corners[:, 2] <= width).all() and (corners[:, 3] <= height).all()
    for i, a in enumerate(corners):
        for b in corners[i + 1 :]:
            assert a[2] <= b[0] or b[2] <= a[0] or a[3] <= b[1] or b[3] <= a[1]
