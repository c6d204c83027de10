"""Half maps: what belongs together, and what is refused or warned of."""

import logging

import numpy as np
import pytest
import torch

from halfmap.errors import FileFormatError, ParameterError, ShapeError
from halfmap.io.half_maps import other_half, read_half_maps, read_map_mask
from halfmap.io.mrc import write_mrc
from halfmap.ops.filters import low_pass
from halfmap.ops.fourier import irfft3, rfft3

BOX, PIXEL = 24, 1.5


@pytest.fixture
def noise():
    return np.random.default_rng(1).standard_normal((2, BOX, BOX, BOX)).astype(np.float32)


def write(folder, name, array, pixel_size=PIXEL):
    write_mrc(folder / name, array, pixel_size=pixel_size, stack=False)
    return folder / name


def test_the_second_is_found_by_the_name_of_the_first(tmp_path, noise):
    first = write(tmp_path, "run_half1_class001_unfil.mrc", noise[0])
    write(tmp_path, "run_half2_class001_unfil.mrc", noise[1])
    halves = read_half_maps(first)
    np.testing.assert_array_equal(halves.second.numpy(), noise[1])
    np.testing.assert_allclose(halves.mean.numpy(), noise.mean(0), atol=1e-6)
    assert (halves.box, halves.pixel_size) == (BOX, PIXEL)


def test_names_that_tell_nothing(tmp_path, noise):
    with pytest.raises(FileFormatError, match="does not say which half"):
        other_half(write(tmp_path, "map.mrc", noise[0]))
    with pytest.raises(FileFormatError, match="no a_half2"):
        other_half(write(tmp_path, "a_half1.mrc", noise[0]))


@pytest.mark.parametrize(
    ("array", "pixel_size", "error", "says"),
    [
        (lambda noise: noise[1][1:, 1:, 1:], PIXEL, ShapeError, "23³ voxels of 1.5 Å"),
        (lambda noise: noise[1], 1.6, ShapeError, "24³ voxels of 1.6 Å"),
        (lambda noise: noise[0], PIXEL, FileFormatError, "the same map as"),
        (lambda noise: np.full_like(noise[0], np.nan), PIXEL, FileFormatError, "NaN"),
    ],
)
def test_what_does_not_belong_together_is_refused(tmp_path, noise, array, pixel_size, error, says):
    first = write(tmp_path, "half1.mrc", noise[0])
    second = write(tmp_path, "half2.mrc", array(noise), pixel_size)
    with pytest.raises(error, match=says):
        read_half_maps(first, second)


def test_half_maps_that_were_filtered_are_told(tmp_path, noise, caplog):
    passed = low_pass((BOX,) * 3, pixel_size=PIXEL, resolution=5.0)
    filtered = [irfft3(rfft3(torch.from_numpy(each)) * passed, shape=(BOX,) * 3).numpy() for each in noise]
    paths = [write(tmp_path, f"f{i}.mrc", each) for i, each in enumerate(filtered)]
    with caplog.at_level(logging.WARNING, logger="halfmap"):
        found = read_half_maps(*paths)
        assert "were filtered" in caplog.text
        assert found.last_shell in (7, 8)
        caplog.clear()
        found = read_half_maps(*(write(tmp_path, f"u{i}.mrc", each) for i, each in enumerate(noise)))
        assert not caplog.text
        assert found.last_shell == BOX // 2


def test_masks_of_another_box(tmp_path, noise):
    halves = read_half_maps(*(write(tmp_path, f"{i}.mrc", each) for i, each in enumerate(noise)))
    ones = np.ones((BOX, BOX, BOX), np.float32)
    assert bool((read_map_mask(write(tmp_path, "m.mrc", ones), halves) == 1).all())
    with pytest.raises(ShapeError, match="the mask has 23³ voxels"):
        read_map_mask(write(tmp_path, "small.mrc", ones[1:, 1:, 1:]), halves)
    with pytest.raises(ShapeError, match="of 3 Å"):
        read_map_mask(write(tmp_path, "coarse.mrc", ones, 3.0), halves)
    with pytest.raises(ParameterError, match="no mask"):
        read_map_mask(write(tmp_path, "density.mrc", noise[0]), halves)
