"""Memory that a simulation takes: estimated beforehand, refused where it is not there."""

from __future__ import annotations

from pathlib import Path

import pytest

from halfmap import cli
from halfmap.engine import memory as engine_memory
from halfmap.steps.simulate import memory
from halfmap.steps.simulate.specimen import Specimen, choose_box
from halfmap.steps.simulate.step import SimulateMicrographs, SimulateMovies, SimulateParticles

GB = 1e9


def specimen(diameter: float, pixel_size: float = 1.4) -> Specimen:
    return Specimen(
        folder=Path("Specimen"),
        box=choose_box(diameter, pixel_size),
        pixel_size=pixel_size,
        fractions=(1.0,),
        n_broken=0,
        diameter=diameter,
    )


@pytest.mark.parametrize(
    ("diameter", "n_atoms", "measured_GB"),
    [(133.6, 32_618, 0.42), (336.5, 317_160, 1.28), (400.6, 677_040, 1.78)],
)
def test_the_estimate_is_the_peak_measured(diameter, n_atoms, measured_GB):
    """Of apoferritin, an enterovirus-like particle and a norovirus capsid: 0.4, 4.5 and 9.6 MDa."""
    need = memory._PROCESS + memory.preparing_bytes(specimen(diameter), n_atoms=n_atoms)
    assert need / GB == pytest.approx(measured_GB, rel=0.25)


def test_a_coarser_pixel_and_a_smaller_molecule_need_less():
    def need(*arguments: float) -> float:
        return memory.preparing_bytes(specimen(*arguments), n_atoms=100_000)

    assert need(400) > 1.4 * need(300)
    assert need(400, 1.0) > 1.8 * need(400, 1.5)
    assert memory.preparing_bytes(specimen(400), n_atoms=0, map_voxels=600) > 2 * GB


def test_images_that_are_larger_or_tilted_need_more():
    made = specimen(130)

    def need(cls, **changes) -> float:
        return memory.imaging_bytes(cls(**changes), made)

    assert need(SimulateParticles, per_micrograph=200) == 2 * need(SimulateParticles, per_micrograph=100)
    assert need(SimulateMovies, width=4096, height=4096) > 2.5 * need(SimulateMovies)
    assert need(SimulateMovies, tilt=45.0) > 1.1 * need(SimulateMovies)
    assert need(SimulateMicrographs, tilt=45.0) == need(SimulateMicrographs)


def test_too_little_memory_ends_in_a_sentence_before_the_work(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(engine_memory, "available_memory", lambda: int(0.2 * GB))
    words = ["simulate", "particles", "--assembly", "none", "--workers", "2", "--project", str(tmp_path)]
    assert cli.main(words) == 2
    message = capsys.readouterr().err.strip().splitlines()[-1]
    assert "GB of memory, 0.2 GB are available; use fewer --workers, give a coarser --pixel-size" in message
    assert not (tmp_path / "Simulate/job001/Specimen").exists()
    assert not (tmp_path / "Simulate/job001/items.jsonl").exists()


def group(folder: Path, names: tuple[str, str], figures: tuple[int | str, int], **pages: int) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, figure in zip(names, figures, strict=True):
        (folder / name).write_text(f"{figure}\n")
    pages = {"inactive_file": 0, "active_file": 0, **pages}
    (folder / "memory.stat").write_text("".join(f"{name} {value}\n" for name, value in pages.items()))


@pytest.fixture
def groups(tmp_path, monkeypatch):
    monkeypatch.setattr(engine_memory, "_GROUPS", tmp_path / "cgroup")
    monkeypatch.setattr(engine_memory, "_MOUNT", tmp_path / "mount")
    return tmp_path


def test_limits_of_control_groups_count_if_they_are_less(groups):
    (groups / "cgroup").write_text("0::/slice/job\n")
    names = "memory.max", "memory.current"
    group(groups / "mount/slice/job", names, ("max", 5_000_000))
    group(groups / "mount/slice", names, (10_000_000, 8_000_000), inactive_file=1_000_000)
    # What files are held in memory can be given up.
    assert engine_memory.available_memory() == 3_000_000


def test_control_groups_of_the_first_version_are_read(groups):
    (groups / "cgroup").write_text("5:devices:/\n4:cpu,memory:/container/inside\n0::/\n")
    # In a container the path told is not there; the root is the container's own group.
    names = "memory.limit_in_bytes", "memory.usage_in_bytes"
    group(
        groups / "mount/memory",
        names,
        (9_000_000, 4_000_000),
        total_inactive_file=500_000,
        total_active_file=0,
    )
    assert engine_memory.available_memory() == 5_500_000


def test_without_control_groups_the_systems_figure_holds(groups):
    assert engine_memory.available_memory() > 10_000_000
