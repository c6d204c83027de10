"""The step `extract` from tables to stacks."""

from __future__ import annotations

import math
import os
from pathlib import Path

import numpy as np
import polars as pl
import pytest
import tifffile

from halfmap.data import MicrographSet, ParticleSet
from halfmap.data.columns import COLUMNS
from halfmap.engine import Context, RunOptions
from halfmap.errors import FileFormatError, HalfmapError, ItemsFailedError, ParameterError, TableError
from halfmap.io.coordinates import write_coordinates
from halfmap.io.images import ImageStack
from halfmap.io.mrc import read_header, read_mrc, write_mrc
from halfmap.io.star import read_star, write_star
from halfmap.io.tables import read_particles, write_micrographs, write_particles
from halfmap.project import Project
from halfmap.steps.extract import reading
from halfmap.steps.extract.step import ExtractStep

SIDE, BOX, PIXEL, DIAMETER = 256, 64, 2.0, 60.0
OPTICS = {
    "rlnOpticsGroup": [1, 2],
    "rlnOpticsGroupName": ["one", "two"],
    "rlnVoltage": [300.0, 200.0],
    "rlnSphericalAberration": [2.7, 2.7],
    "rlnAmplitudeContrast": [0.1, 0.1],
    "rlnMicrographPixelSize": [PIXEL, PIXEL],
}
PLACES = {
    "a": np.array([[60.25, 70.75], [120.0, 100.0], [180.5, 60.5], [100.3, 190.9]]),
    "b": np.array([[80.0, 80.0], [150.9, 160.1]]),
}


def _spots(places: np.ndarray, seed: int, noise: float = 0.05) -> np.ndarray:
    """Dark spots of Gaussian shape on bright noise."""
    y, x = np.mgrid[:SIDE, :SIDE]
    image = np.random.default_rng(seed).normal(20, noise, (SIDE, SIDE))
    for px, py in places:
        image -= 4 * np.exp(-((x - px) ** 2 + (y - py) ** 2) / 32)
    return image.astype(np.float32)


def _micrographs(folder: Path, *, optics: dict | None = None, **columns) -> None:
    rows = {
        "rlnMicrographName": ["Images/a.mrc", "Images/b.mrc"],
        "rlnOpticsGroup": [1, 2],
        "rlnDefocusU": [10_000.0, 20_000.0],
        "rlnDefocusV": [9_500.0, 19_000.0],
        "rlnDefocusAngle": [10.0, 20.0],
        "hmDefocusUncertainty": [25.0, 30.0],
        "someOtherColumn": [1, 2],
    }
    table = pl.DataFrame({key: value for key, value in (rows | columns).items() if value is not None})
    write_micrographs(folder / "micrographs.star", MicrographSet(pl.DataFrame(optics or OPTICS), table))


def _coordinates(folder: Path, tables: dict[str, pl.DataFrame]) -> None:
    for name, table in tables.items():
        write_coordinates(folder / f"Picks/{name}.star", table)
    names, files = [f"Images/{name}.mrc" for name in tables], [f"Picks/{name}.star" for name in tables]
    listed = pl.DataFrame({"rlnMicrographName": names, "rlnMicrographCoordinates": files})
    write_star(folder / "coordinates.star", {"coordinate_files": listed})


def _table(places: np.ndarray, **columns) -> pl.DataFrame:
    return pl.DataFrame(places, schema=["rlnCoordinateX", "rlnCoordinateY"]).with_columns(**columns)


@pytest.fixture
def project(tmp_path) -> Path:
    for seed, (name, places) in enumerate(PLACES.items()):
        write_mrc(tmp_path / f"Images/{name}.mrc", _spots(places, seed), pixel_size=PIXEL)
    _micrographs(tmp_path)
    _coordinates(tmp_path, {name: _table(places) for name, places in PLACES.items()})
    return tmp_path


def _run(folder: Path, **options) -> tuple[Path, ParticleSet]:
    run = options.pop("run", RunOptions())
    values = {"micrographs": "micrographs.star", "coordinates": "coordinates.star"}
    values |= {"box": BOX, "diameter": DIAMETER, **options}
    job = Project.at(folder).run(ExtractStep(**values), run)  # type: ignore[arg-type]
    return job.folder, read_particles(job.folder / "particles.star")


def _centre(image: np.ndarray) -> np.ndarray:
    """Centre of the bright spot in the middle, (x, y) from ``n // 2``."""
    grid = np.arange(len(image)) - len(image) // 2
    near = np.hypot(grid[:, None], grid) < 12
    excess = np.where(near, np.clip(image - 5, 0, None), 0)
    return np.array([(excess * grid).sum(), (excess * grid[:, None]).sum()]) / excess.sum()


def test_particles_are_cut_normalised_and_have_their_ctf(project):
    folder, particles = _run(project)
    rows = particles.rows
    job = folder.relative_to(project)
    expected = [f"{number:06d}@{job}/Particles/a.mrcs" for number in (1, 2, 3, 4)]
    expected += [f"{number:06d}@{job}/Particles/b.mrcs" for number in (1, 2)]
    assert rows["rlnImageName"].to_list() == expected
    assert rows["rlnOpticsGroup"].to_list() == [1] * 4 + [2] * 2
    assert rows["rlnDefocusU"].to_list() == [10_000.0] * 4 + [20_000.0] * 2
    assert rows["hmDefocusUncertainty"].to_list() == [25.0] * 4 + [30.0] * 2
    optics = particles.optics.to_dicts()
    assert [group["rlnVoltage"] for group in optics] == [300.0, 200.0]
    for group in optics:
        assert (group["rlnImageSize"], group["rlnImagePixelSize"]) == (BOX, PIXEL)
        assert group["rlnImageDimensionality"] == 2
        assert group["rlnMicrographOriginalPixelSize"] == PIXEL
        assert not group["rlnCtfDataArePhaseFlipped"]
    stack = ImageStack(rows["rlnImageName"], root=project)
    images = stack.read(np.arange(6))
    assert stack.pixel_size == pytest.approx(PIXEL)
    outside = np.hypot(*np.mgrid[-32:32, -32:32]) > 20
    assert np.abs(images[:, outside].mean(axis=1)).max() < 0.05
    assert np.abs(images[:, outside].std(axis=1) - 1).max() < 0.05
    # Bright particles, where the origin says they are.
    for image, row in zip(images, rows.to_dicts(), strict=True):
        origin = np.array([row["rlnOriginXAngst"], row["rlnOriginYAngst"]]) / PIXEL
        np.testing.assert_allclose(_centre(image), -origin, atol=0.1)
    assert set(rows.columns) <= set(COLUMNS)
    for name in ("summary.png", "particles.png"):
        assert (folder / name).stat().st_size > 10_000


def test_coordinates_stay_true(project):
    _, particles = _run(project)
    rows = particles.rows
    for axis, place in zip("XY", np.concatenate(list(PLACES.values())).T, strict=True):
        pixels = rows[f"rlnCoordinate{axis}"].to_numpy()
        np.testing.assert_array_equal(pixels, np.floor(place))
        np.testing.assert_allclose(pixels - rows[f"rlnOrigin{axis}Angst"] / PIXEL, place, atol=1e-4)


def test_refined_particles_are_cut_about_their_centres(project):
    _, first = _run(project)
    rng = np.random.default_rng(0)
    # Picks that were wrong by up to 12 px, and a refinement that found it out.
    wrong = rng.uniform(-12, 12, (6, 2))
    true = np.concatenate(list(PLACES.values()))
    cut = np.floor(true + wrong)
    moved = first.with_columns(
        *(pl.Series(f"rlnCoordinate{axis}", cut[:, i]) for i, axis in enumerate("XY")),
        *(pl.Series(f"rlnOrigin{axis}Angst", (cut - true)[:, i] * PIXEL) for i, axis in enumerate("XY")),
        *(pl.Series(f"rlnAngle{name}", rng.uniform(-90, 90, 6)) for name in ("Rot", "Tilt", "Psi")),
        pl.Series("rlnDefocusU", rng.uniform(9e3, 11e3, 6)),
        pl.Series("rlnRandomSubset", [1, 2] * 3),
    )
    write_particles(project / "refined.star", moved)
    _, again = _run(project, coordinates="refined.star", scaled_box=BOX // 2)
    rows = again.rows
    images = ImageStack(rows["rlnImageName"], root=project).read(np.arange(6))
    origins = rows.select("rlnOriginXAngst", "rlnOriginYAngst").to_numpy()
    assert np.abs(origins).max() <= PIXEL / 2
    place = rows.select("rlnCoordinateX", "rlnCoordinateY").to_numpy() - origins / PIXEL
    np.testing.assert_allclose(place, true, atol=1e-4)
    for image, origin in zip(images, origins, strict=True):
        np.testing.assert_allclose(_centre(image), -origin / (2 * PIXEL), atol=0.1)
    for label in ("rlnAngleRot", "rlnAngleTilt", "rlnAnglePsi", "rlnDefocusU", "rlnRandomSubset"):
        assert rows[label].to_list() == moved.rows[label].to_list()
    assert rows["rlnImageOriginalName"].to_list() == first.rows["rlnImageName"].to_list()
    _, fresh = _run(project, coordinates="refined.star", defocus_of_micrographs=True)
    assert fresh.rows["rlnDefocusU"].to_list() == [10_000.0] * 4 + [20_000.0] * 2
    _, kept = _run(project, coordinates="refined.star", recentre=False)
    np.testing.assert_array_equal(kept.rows["rlnCoordinateX"], cut[:, 0])
    np.testing.assert_allclose(kept.rows["rlnOriginXAngst"], (cut - true)[:, 0] * PIXEL)


def test_defocus_is_that_of_the_place(project):
    surface = {
        "hmDefocusSurface": ["[500,-200,0,0,0]", "[0,0,0,0,0]"],
        "hmMicrographHeight": [SIDE, SIDE],
        "hmMicrographWidth": [SIDE, SIDE],
    }
    _micrographs(project, **surface)
    _, particles = _run(project)
    x, y = PLACES["a"].T
    change = 500 * (2 * x / SIDE - 1) - 200 * (2 * y / SIDE - 1)
    np.testing.assert_allclose(particles.rows["rlnDefocusU"][:4], 10_000 + change, atol=0.01)
    np.testing.assert_allclose(particles.rows["rlnDefocusV"][:4], 9_500 + change, atol=0.01)
    assert particles.rows["rlnDefocusU"][4:].to_list() == [20_000.0] * 2


def test_results_do_not_depend_on_workers(project):
    tables, stacks = [], []
    for workers in (1, 2):
        options = {"white_dust": 4.0, "scaled_box": 48, "phase_flip": True}
        folder, particles = _run(project, run=RunOptions(workers=workers), **options)
        tables.append(particles.rows.drop("rlnImageName"))
        stacks.append([(folder / f"Particles/{name}.mrcs").read_bytes() for name in PLACES])
    assert tables[0].equals(tables[1])
    assert stacks[0] == stacks[1]


def test_picks_are_chosen(project, caplog):
    places = np.array([[100.0, 100], [103, 100], [106, 100], [180, 180], [10, 100], [-5, 50], [60, 200]])
    scores = [0.5, 0.9, 0.7, 0.2, 0.9, 0.9, 0.9]
    _coordinates(project, {"a": _table(places, rlnAutopickFigureOfMerit=pl.Series(scores))})
    mask = np.ones((SIDE // 4, SIDE // 4), np.float32)
    mask[50, 15] = 0
    write_mrc(project / "mask.mrc", mask, pixel_size=4 * PIXEL)
    _micrographs(project, hmMicrographMask=["mask.mrc", "None"])
    _, particles = _run(project, min_distance=8.0, min_score=0.3)
    # Of three in a row, 6 Å apart, the best stands for all; the one masked, two at the edge and beyond it.
    assert particles.rows["rlnCoordinateX"].to_list() == [103.0]
    assert "2 close to a better one" in caplog.text
    assert "1 in masked areas" in caplog.text
    assert "1 outside their micrograph" in caplog.text
    assert "1 too near to the edge" in caplog.text
    _, everything = _run(project, min_distance=0, use_masks=False)
    assert everything.rows["rlnCoordinateX"].to_list() == [100, 103, 106, 180, 60]
    _, whole = _run(project, min_distance=0, edges="leave-out", box=160)
    assert whole.rows["rlnCoordinateX"].to_list() == [100, 103, 106]


def test_the_pickers_diameter_is_used(project, caplog):
    tables = {name: _table(places, hmParticleDiameter=pl.lit(DIAMETER)) for name, places in PLACES.items()}
    _coordinates(project, tables)
    _, particles = _run(project, diameter=None, box=None, resolution=12)
    # 60 Å and wavelength times 1.2 µm over 12 Å, to both sides, in pixels of 2 Å.
    assert 48 <= particles.box_size <= 56
    assert "box: " in caplog.text


def test_half_precision_and_bright_micrographs(project):
    _micrographs(project, optics=OPTICS | {"hmContrastSign": [1, 1]})
    folder, particles = _run(project, float16=True, background="mean")
    stack = folder / "Particles/a.mrcs"
    assert read_header(stack).mode == 12
    # They say that particles are bright: nothing is turned, and the spots stay as dark as they are.
    assert read_mrc(stack, 1)[32, 32] < -4
    assert particles.optics["hmContrastSign"].to_list() == [1, 1]


def test_contrast_is_that_of_each_optics_group(project):
    _micrographs(project, optics=OPTICS | {"hmContrastSign": [-1, 1]})
    _, particles = _run(project, invert_contrast=False)
    assert particles.optics["hmContrastSign"].to_list() == [-1, 1]
    _, turned = _run(project)
    assert turned.optics["hmContrastSign"].to_list() == [1, 1]


@pytest.mark.parametrize(
    "options", [{}, {"scaled_box": 48}, {"phase_flip": True}, {"box": 62, "scaled_box": 54}]
)
def test_blank_areas_are_left_out_however_images_are_made(project, options, caplog):
    image = _spots(PLACES["a"], 0)
    # Of a level that transforms do not hold in full.
    image[:, :150] = 1000.37
    write_mrc(project / "Images/a.mrc", image, pixel_size=PIXEL)
    _coordinates(project, {"a": _table(np.array([[64.0, 100], [70, 128], [215, 100]]))})
    _, particles = _run(project, **options)
    assert particles.rows["rlnCoordinateX"].to_list() == [215]
    assert "2 where the micrograph is blank" in caplog.text


def test_a_hot_pixel_costs_its_own_particle_of_half_precision(project, caplog):
    image = _spots(PLACES["a"], 0)
    x, y = PLACES["a"][1].astype(int)
    image[y, x] = 1e5
    write_mrc(project / "Images/a.mrc", image, pixel_size=PIXEL)
    _, particles = _run(project, float16=True)
    assert particles.rows["rlnCoordinateX"].to_list() == [60, 180, 100, 80, 150]
    assert "1 with pixels beyond the range of half precision" in caplog.text
    _, single = _run(project)
    assert len(single) == 6


def test_dust_is_the_same_without_other_micrographs(project):
    options = {"white_dust": 2.0, "black_dust": 2.0}
    both, _ = _run(project, **options)
    _coordinates(project, {"b": _table(PLACES["b"])})
    alone, _ = _run(project, **options)
    assert (both / "Particles/b.mrcs").read_bytes() == (alone / "Particles/b.mrcs").read_bytes()


def test_odd_ones_stand_out(project):
    rng = np.random.default_rng(0)
    places = rng.uniform(40, SIDE - 40, (200, 2))
    image = rng.normal(20, 1, (SIDE, SIDE)).astype(np.float32)
    x, y = places[7].astype(int)
    image[y - 5 : y + 5, x - 5 : x + 5] += 15
    write_mrc(project / "Images/a.mrc", image, pixel_size=PIXEL)
    _coordinates(project, {"a": _table(places)})
    _, particles = _run(project, min_distance=0, box=48, diameter=40.0)
    scores = particles.rows["hmParticleZScore"].to_numpy()
    near = np.hypot(*(places - places[7]).T) < 6
    assert scores[7] > 10
    assert np.median(scores) < 2
    assert scores[np.hypot(*(places - places[7]).T) > 40].max() < 7
    assert near[7]


def _fails(folder: Path, message: str, error: type[HalfmapError] = TableError, **options) -> None:
    with pytest.raises(error, match=message):
        _run(folder, **options)


def test_tables_that_cannot_be_used(project):
    _micrographs(project, rlnDefocusU=None)
    _fails(project, "lack _rlnDefocusU.*halfmap ctf")
    _micrographs(project, optics=OPTICS | {"rlnMicrographPixelSize": [2.0, 1.5]})
    _fails(project, "pixels of 1.5, 2 Å.*one pixel size at a time")
    _micrographs(project)
    _fails(project, "--diameter", ParameterError, diameter=None, box=None)
    _fails(project, "lack _rlnAutopickFigureOfMerit.*leave --min-score out", min_score=0.3)
    _fails(project, "dust", ParameterError, background="none", white_dust=5)
    _coordinates(project, {"a": _table(np.empty((0, 2)))})
    _fails(project, "no particles in any of its files")
    _coordinates(project, {"elsewhere": _table(PLACES["a"])})
    _fails(project, "none of its 4 particles is of one of these")
    _coordinates(project, {"a": _table(PLACES["a"] + 1e4)})
    _fails(project, "none of 4 particles is left: 4 outside their micrograph")
    _coordinates(project, {"a": _table(np.array([[3.0, 100], [100, 250]]))})
    _fails(project, "none of 2 particles is left: 2 too near to the edge")
    scored = _table(PLACES["a"], rlnAutopickFigureOfMerit=pl.Series([0.1, 0.2, 0.3, 0.25]))
    _coordinates(project, {"a": scored})
    _fails(project, "none of 4 particles reaches --min-score 0.5; the best has 0.3", min_score=0.5)
    coordinates = _table(PLACES["a"]).with_columns(pl.lit("Images/a.mrc").alias("rlnMicrographName"))
    write_star(project / "one.star", {"particles": coordinates.with_columns(rlnCoordinateX=pl.lit(np.nan))})
    _fails(project, "one.star, row 1: _rlnCoordinateX is not a number", coordinates="one.star")


def test_a_single_table_of_coordinates_will_do(project):
    parts = [
        _table(places).with_columns(pl.lit(f"Elsewhere/{name}.mrc").alias("rlnMicrographName"))
        for name, places in reversed(PLACES.items())
    ]
    write_star(project / "one.star", {"particles": pl.concat(parts)})
    _, particles = _run(project, coordinates="one.star")
    # In the order of the micrographs, which are known by the names of their files.
    assert particles.rows["rlnMicrographName"].to_list() == ["Images/a.mrc"] * 4 + ["Images/b.mrc"] * 2
    assert particles.rows["rlnOpticsGroup"].to_list() == [1] * 4 + [2] * 2


@pytest.mark.parametrize(
    ("image", "reason"),
    [
        (None, "no such file|does not exist|not there"),
        (np.ones((40, 300)), "a box of 64 px does not fit into 300 × 40"),
        (np.ones((SIDE, SIDE)), "all 4 boxes are blank or broken"),
        (np.full((SIDE, SIDE), np.nan), "all 4 boxes are blank or broken"),
    ],
)
def test_a_bad_micrograph_costs_its_own_particles_only(project, image, reason):
    def spoil(path: Path) -> None:
        path.unlink()
        if image is not None:
            write_mrc(path, image, pixel_size=PIXEL, dtype=np.float32)

    spoil(project / "Images/a.mrc")
    folder, particles = _run(project)
    assert particles.rows["rlnMicrographName"].unique().to_list() == ["Images/b.mrc"]
    (failed,) = read_star(folder / "failures.star").values()
    assert isinstance(failed, pl.DataFrame)
    assert pl.Series(failed["hmReason"]).str.contains(f"(?i){reason}").all()
    spoil(project / "Images/b.mrc")
    if "does not fit" in reason:
        _fails(project, "is larger than the micrographs", ParameterError)
    else:
        _fails(project, "every micrograph failed", ItemsFailedError)


def test_pixels_that_are_no_numbers_cost_the_boxes_that_hold_them(project, caplog):
    image = _spots(PLACES["a"], 0)
    image[75, 62], image[5, 250] = np.nan, np.inf
    write_mrc(project / "Images/a.mrc", image, pixel_size=PIXEL)
    folder, particles = _run(project)
    assert particles.rows["rlnCoordinateX"].to_list() == [120, 180, 100, 80, 150]
    assert "1 with pixels that are not numbers" in caplog.text
    _coordinates(project, {"a": _table(PLACES["a"][1:])})
    without, _ = _run(project)
    stacks = [(job / "Particles/a.mrcs").read_bytes() for job in (folder, without)]
    assert stacks[0] == stacks[1]


def test_a_micrograph_that_shrinks_while_it_is_read_is_truncated(project, monkeypatch):
    path = project / "Images/a.mrc"
    header = read_header(path)
    os.truncate(path, header.end - 1)
    monkeypatch.setattr(reading, "read_header", lambda path: header)
    with (
        pytest.raises(FileFormatError, match=r"a\.mrc: is truncated"),
        reading.arriving(path) as micrograph,
    ):
        micrograph.wait(SIDE)


@pytest.mark.parametrize(("kind", "dtype"), [("mrc", "i2"), ("mrc", ">f4"), ("mrc", "f2"), ("tif", "f4")])
def test_micrographs_of_all_kinds_give_the_same(project, monkeypatch, kind, dtype):
    images = {name: np.rint(10 * _spots(places, 0)) for name, places in PLACES.items()}
    for name, image in images.items():
        write_mrc(project / f"Images/{name}.mrc", image, pixel_size=PIXEL, dtype=np.float32)
    expected = [read_mrc(_run(project)[0] / f"Particles/{name}.mrcs") for name in images]
    for name, image in images.items():
        path = project / f"Images/{name}.mrc"
        if kind == "tif":
            # Rows of TIFF files come from the top, and ours from the bottom.
            tifffile.imwrite(project / f"Images/{name}.tif", image[::-1].astype(np.float32))
        elif dtype == ">f4":
            content = path.read_bytes()
            header = np.frombuffer(content[:1024], ">u4").copy()
            words = np.r_[0:52, 54:56]
            header[words] = np.frombuffer(content[:1024], "<u4")[words]
            header[53] = 0x11110000
            path.write_bytes(header.tobytes() + image.astype(">f4").tobytes())
        else:
            write_mrc(path, image, pixel_size=PIXEL, dtype=dtype)
    _micrographs(project, rlnMicrographName=[f"Images/{name}.{kind}" for name in images])
    # Some rows at a time, the last ones fewer.
    monkeypatch.setattr(reading, "STRIP_BYTES", 15_000)
    folder, _ = _run(project)
    for name, before in zip(images, expected, strict=True):
        np.testing.assert_array_equal(read_mrc(folder / f"Particles/{name}.mrcs"), before)


def test_micrographs_of_one_name_in_two_folders_never_share_a_stack(tmp_path):
    """Names of stacks depend on the table's other micrographs, which may be others when a job goes on."""
    signs = {"A": 1, "B": -1}
    for folder, sign in signs.items():
        image = np.random.default_rng(0).normal(0, 0.1, (SIDE, SIDE))
        image[SIDE // 2 - 8 : SIDE // 2 + 8, SIDE // 2 - 8 : SIDE // 2 + 8] -= sign
        write_mrc(tmp_path / folder / "m.mrc", image.astype(np.float32), pixel_size=PIXEL)
        write_coordinates(tmp_path / f"Picks/{folder}.star", _table(np.full((1, 2), SIDE / 2)))
    (tmp_path / "job").mkdir()
    step = ExtractStep(
        micrographs=Path("micrographs.star"), coordinates=Path("coordinates.star"), box=BOX, diameter=DIAMETER
    )
    for folders in ("A", "B", "A", "AB", "B"):
        names = [f"{folder}/m.mrc" for folder in folders]
        values = {"rlnDefocusU": 1e4, "rlnDefocusV": 1e4, "rlnDefocusAngle": 0.0, "rlnOpticsGroup": 1}
        rows = pl.DataFrame({"rlnMicrographName": names}).with_columns(
            pl.lit(value).alias(label) for label, value in values.items()
        )
        write_micrographs(tmp_path / "micrographs.star", MicrographSet(pl.DataFrame(OPTICS), rows))
        files = [f"Picks/{folder}.star" for folder in folders]
        listed = pl.DataFrame({"rlnMicrographName": names, "rlnMicrographCoordinates": files})
        write_star(tmp_path / "coordinates.star", {"coordinate_files": listed})
        step.run(Context(tmp_path / "job", tmp_path))
        table = read_particles(tmp_path / "job/particles.star")
        assert table.rows["rlnMicrographName"].to_list() == names
        images = ImageStack(table.rows["rlnImageName"], root=tmp_path).read(np.arange(len(names)))
        for name, image in zip(names, images, strict=True):
            middle = image[BOX // 2 - 3 : BOX // 2 + 3, BOX // 2 - 3 : BOX // 2 + 3].mean()
            assert middle * signs[name[0]] > 1


def test_a_box_larger_than_all_micrographs_is_refused_at_once(project):
    message = "a box of 300 px, 600 Å, is larger than the micrographs, 256 × 256 px"
    _fails(project, message, ParameterError, box=300, run=RunOptions(workers=2))
    write_mrc(project / "Images/b.mrc", np.random.default_rng(0).normal(size=(310, 320)), pixel_size=PIXEL)
    _, particles = _run(project, box=300)
    assert particles.rows["rlnMicrographName"].unique().to_list() == ["Images/b.mrc"]


def test_coordinates_of_one_micrograph_are_no_list(project):
    message = "a.star: holds coordinates without the names of their micrographs; give the table"
    _fails(project, message, coordinates="Picks/a.star")
    for suffix in ("csv", "box", "txt"):
        (project / f"Picks/a.{suffix}").write_text("10 10 64 64\n20 20 64 64\n")
        _fails(project, f"a.{suffix}.*halfmap import coordinates", coordinates=f"Picks/a.{suffix}")


def test_nothing_picked_at_all_is_said(project):
    names = ["rlnMicrographName", "rlnMicrographCoordinates"]
    write_star(project / "none.star", {"coordinate_files": pl.DataFrame({name: [""] for name in names})[:0]})
    _fails(project, "none.star.*no particles", coordinates="none.star")
    write_star(
        project / "none.star", {"particles": _table(np.empty((0, 2)), rlnMicrographName=pl.lit("a.mrc"))}
    )
    _fails(project, "none.star.*no particles", coordinates="none.star")


def test_a_killed_run_goes_on_to_the_same_files(project):
    whole, expected = _run(project, scaled_box=BOX // 2)
    folder, _ = _run(project, scaled_box=BOX // 2)
    # As a kill leaves it after the first micrograph: a second one half written, and no table.
    (folder / "Particles/.12345~b.mrcs").write_bytes((folder / "Particles/b.mrcs").read_bytes()[:5000])
    ledger = (folder / "items.jsonl").read_text().splitlines(keepends=True)
    (folder / "items.jsonl").write_text(ledger[0] + ledger[1][:40])
    for name in ("Particles/b.mrcs", "particles.star", "particles.png", "RELION_JOB_EXIT_SUCCESS"):
        (folder / name).unlink()
    Project.at(project).resume(folder.relative_to(project).as_posix())
    for path in sorted(whole.glob("Particles/*")):
        assert (folder / "Particles" / path.name).read_bytes() == path.read_bytes()
    assert sorted(path.name for path in folder.glob("Particles/.*")) == []
    again = read_particles(folder / "particles.star").rows
    assert again.drop("rlnImageName").equals(expected.rows.drop("rlnImageName"))


def test_a_micrograph_without_defocus_is_named(project):
    _micrographs(project, rlnDefocusU=[np.nan, 20_000.0])
    folder, particles = _run(project)
    assert len(particles) == 2
    assert "defocus is not a number" in str(read_star(folder / "failures.star"))


def test_a_particle_without_defocus_costs_nobody_else(project, caplog):
    _, first = _run(project)
    defocus = [1e4, math.nan, 1e4, 1e4, 2e4, 2e4]
    write_particles(project / "refined.star", first.with_columns(pl.Series("rlnDefocusU", defocus)))
    folder, again = _run(project, coordinates="refined.star", phase_flip=True, recentre=False)
    assert again.rows["rlnCoordinateX"].to_list() == [60, 180, 100, 80, 150]
    assert "1 without a defocus" in caplog.text
    assert not (folder / "failures.star").exists()


def test_relions_empty_values_are_no_values(project):
    columns = {"rlnAnglePsi": pl.lit(-999.0), "rlnClassNumber": pl.lit(-999)}
    _coordinates(project, {name: _table(places, **columns) for name, places in PLACES.items()})
    _, particles = _run(project)
    assert not {"rlnAnglePsi", "rlnClassNumber"} & set(particles.rows.columns)


def test_poses_survive_as_they_are(project):
    _, first = _run(project)
    angles = np.random.default_rng(0).uniform(0, 90, (6, 3))
    labels = ("rlnAngleRot", "rlnAngleTilt", "rlnAnglePsi")
    write_particles(
        project / "refined.star",
        first.with_columns(*(pl.Series(label, angles[:, i]) for i, label in enumerate(labels))),
    )
    _, again = _run(project, coordinates="refined.star")
    for label, values in zip(labels, angles.T, strict=True):
        np.testing.assert_allclose(again.rows[label], values)


def test_a_diameter_far_from_that_of_the_picks_is_warned_of(project, caplog):
    _coordinates(
        project, {name: _table(places, hmParticleDiameter=pl.lit(60.0)) for name, places in PLACES.items()}
    )
    _run(project, diameter=25.0)
    assert "--diameter is 25 Å, but the picks are of particles of 60 Å" in caplog.text
    caplog.clear()
    _run(project, diameter=70.0)
    assert "but the picks are of" not in caplog.text
