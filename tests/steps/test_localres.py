"""Local resolution of half maps whose parts are known to a different detail."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
import torch

from halfmap.errors import ParameterError
from halfmap.io.half_maps import HalfMaps
from halfmap.io.mrc import read_header, read_mrc, write_mrc
from halfmap.io.star import read_star
from halfmap.ops.filters import low_pass
from halfmap.ops.fourier import irfft3, rfft3
from halfmap.ops.masks import soft_sphere
from halfmap.project import Project
from halfmap.steps.localres.measure import Followed, icosahedral_axes, measure
from halfmap.steps.localres.step import LocalResStep

BOX, PIXEL = 48, 1.5
SHAPE = (BOX,) * 3
FINE, COARSE = 4.2, 8.0
MASK = soft_sphere(SHAPE, radius=32.0, edge=4.0, pixel_size=PIXEL)
LEFT = (torch.arange(BOX) < BOX // 2).expand(SHAPE)
METHODS = ("map", "monogenic")


@pytest.fixture
def project(tmp_path, monkeypatch) -> Project:
    monkeypatch.chdir(tmp_path)
    return Project.open(tmp_path)


def random(seed: int) -> torch.Tensor:
    return torch.randn(SHAPE, generator=torch.Generator().manual_seed(seed))


def filtered(volume: torch.Tensor, resolution: float) -> torch.Tensor:
    passed = low_pass(SHAPE, pixel_size=PIXEL, resolution=resolution)
    return irfft3(rfft3(volume) * passed, shape=SHAPE)


def write(name: str, volume: torch.Tensor) -> str:
    write_mrc(name, volume.numpy(), pixel_size=PIXEL, stack=False)
    return name


def two_parts() -> list[torch.Tensor]:
    """Half maps to 4.2 Å on the left, and to 8 Å on the right."""
    truth = torch.where(LEFT, filtered(random(1), FINE), filtered(random(1), COARSE)) * MASK
    return [truth + 0.4 * random(seed) for seed in (2, 3)]


def run(project: Project, volumes: list[torch.Tensor], **how):
    names = [write(f"half{i}.mrc", volume) for i, volume in enumerate(volumes, 1)]
    return project.run(LocalResStep(half1=names[0], **{"mask": write("given.mrc", MASK)} | how))


def parts(volume: np.ndarray) -> tuple[float, float]:
    """Medians of the left and the right part, away from where they meet."""
    inside = (MASK > 0.5).numpy()
    return tuple(
        float(np.median(volume[:, :, part][inside[:, :, part]])) for part in (slice(18), slice(30, None))
    )


def test_each_part_has_its_own_resolution(project):
    job = run(project, two_parts(), directions=False)
    for name in METHODS:
        fine, coarse = parts(read_mrc(job.outputs[name]))
        assert fine == pytest.approx(FINE, rel=0.15), name
        assert coarse == pytest.approx(COARSE, rel=0.15), name
    assert not (job.folder / "best_direction.mrc").exists()


def test_files_agree(project):
    volumes = two_parts()
    job = run(project, volumes, show=write("sharpened.mrc", volumes[0]))
    star = read_star(job.outputs["table"])
    inside, outside = (MASK > 0.5).numpy(), (MASK == 0).numpy()
    general, figures = star["general"], star["local_resolution"]
    assert figures["hmLocalMethod"].to_list() == [
        *("correlation", "monogenic", "best direction", "worst direction")
    ]
    maps = {name: read_mrc(job.outputs[name]) for name in (*METHODS, "best", "worst")}
    for row, (name, values) in zip(figures.iter_rows(named=True), maps.items(), strict=True):
        assert row["hmLocalMedian"] == pytest.approx(float(np.median(values[inside])), rel=1e-3), name
        assert row["hmLocalQuantile95"] == pytest.approx(float(np.quantile(values[inside], 0.95)), rel=1e-3)
        assert (values[outside] == np.float32(general["hmLocalCoarsest"])).all()
        assert values.min() >= 2 * PIXEL * (1 - 1e-5)
        assert read_header(job.outputs[name]).pixel_size == pytest.approx(PIXEL)
    assert (maps["best"] <= maps["worst"]).all()
    for column in ("hmVoxelsCorrelation", "hmVoxelsMonogenic"):
        assert star["histogram"][column].sum() == inside.sum()
    axes = star["axes"].select("hmAxisX", "hmAxisY", "hmAxisZ").to_numpy()
    np.testing.assert_allclose(np.linalg.norm(axes, axis=1), 1, atol=1e-5)
    script = job.outputs["colours"].read_text()
    assert 'open "../../sharpened.mrc" id 1\n' in script
    colours = re.search(r"color sample #1 map #2 palette (\S+) key true\n", script)
    assert colours is not None
    values = [float(part.split(",")[0]) for part in colours[1].split(":")]
    assert values == sorted(values)
    row = figures.row(0, named=True)
    assert values[0] == pytest.approx(row["hmLocalQuantile05"], abs=0.01)
    assert values[-1] == pytest.approx(row["hmLocalQuantile95"], abs=0.01)
    for name in ("histogram", "slices"):
        assert job.outputs[name].stat().st_size > 5000


def test_the_direction_that_is_worse_is_found():
    """Detail along z is lost beyond 9 Å, across it nothing is."""
    k = torch.fft.fftfreq(BOX, PIXEL)
    weight = torch.exp(-((k * 9.0) ** 4)[:, None, None])
    truth = irfft3(rfft3(filtered(random(1), FINE)) * weight, shape=SHAPE) * MASK
    found = measure(LocalResStep(half1="a"), halves([truth + 0.5 * random(s) for s in (2, 3)]), MASK)
    assert found.axes is not None
    assert found.medians is not None
    along = found.axes[:, 2].abs().numpy()
    assert found.medians[along > 0.8].min() > 1.2 * found.medians[along < 0.1].max()
    assert found.worst is not None
    assert found.best is not None
    assert float((found.worst / found.best)[found.inside].median()) > 1.2


def halves(volumes: list[torch.Tensor]) -> HalfMaps:
    return HalfMaps(volumes[0], volumes[1], PIXEL, (0.0, 0.0, 0.0), (Path("a"), Path("b")), BOX // 2)


def test_noise_alone_has_no_resolution():
    found = measure(LocalResStep(half1="a", directions=False), halves([random(5), random(6)]), MASK)
    for volume in (found.correlation, found.monogenic):
        assert float((volume[found.inside] > 0.99 * found.coarsest).double().mean()) > 0.9


def test_what_is_never_lost_has_the_last_shell():
    truth = random(1)
    volumes = [truth + 0.05 * random(s) for s in (2, 3)]
    found = measure(LocalResStep(half1="a", directions=False), halves(volumes), MASK)
    for volume in (found.correlation, found.monogenic):
        values = volume[found.inside]
        torch.testing.assert_close(values, torch.full_like(values, 2 * PIXEL), rtol=1e-5, atol=0)


def test_noise_that_is_stronger_in_both_makes_it_coarser():
    """Where detail falls gently, more noise hides it earlier."""
    squared = sum(
        torch.meshgrid(
            *(torch.fft.fftfreq(BOX, PIXEL) ** 2,) * 2, torch.fft.rfftfreq(BOX, PIXEL) ** 2, indexing="ij"
        )
    )
    truth = irfft3(rfft3(random(1)) * torch.exp(-60 * squared), shape=SHAPE)
    medians = []
    for noise in (0.05, 0.15):
        volumes = [truth + noise * random(s) for s in (2, 3)]
        found = measure(LocalResStep(half1="a", directions=False), halves(volumes), MASK)
        medians.append([float(v[found.inside].median()) for v in (found.correlation, found.monogenic)])
    assert medians[1][0] > 1.1 * medians[0][0]
    assert medians[1][1] > 1.1 * medians[0][1]


def test_the_same_halves_give_the_same():
    part = slice(8, 40)
    volumes, mask = ([each[part, part, part].clone() for each in group] for group in (two_parts(), [MASK]))
    one, two = (
        measure(LocalResStep(half1="a", directions=False), halves(volumes), mask[0]) for _ in range(2)
    )
    assert torch.equal(one.correlation, two.correlation)
    assert torch.equal(one.monogenic, two.monogenic)


def test_a_voxel_is_lost_once_and_where_it_falls():
    """Half-way between bands if it is as far below as it was above; what comes after does not count."""
    followed = Followed(2)
    ones, below = torch.ones(2, 2, 2), torch.ones(2, 2, 2)
    below[0, 0, 0], below[0, 0, 1] = -1.0, -0.25
    assert followed.follow(4.0, ones)
    assert followed.follow(6.0, below)
    assert followed.follow(8.0, ones)
    assert float(followed.shell[0, 0, 0]) == pytest.approx(5.0)
    assert float(followed.shell[0, 0, 1]) == pytest.approx(5.6)
    assert float(followed.shell[1, 1, 1]) == 8.0
    assert not followed.follow(10.0, -ones)


def test_axes_are_evenly_apart():
    axes = icosahedral_axes()
    cosines = (axes @ axes.T).abs()[~torch.eye(6, dtype=torch.bool)]
    torch.testing.assert_close(cosines, torch.full_like(cosines, 5**-0.5))


def test_what_cannot_be_done_says_so(project):
    volumes = [random(5), random(6)]
    with pytest.raises(ParameterError, match=r"no resolutions between 3\.2 Å"):
        run(project, volumes, coarsest=3.2)
    with pytest.raises(ParameterError, match="nowhere above"):
        run(project, volumes, mask=write("faint.mrc", 0.3 * MASK))
