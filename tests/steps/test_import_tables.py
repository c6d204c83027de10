from __future__ import annotations

from pathlib import Path

import numpy as np
import polars as pl
import pytest

from halfmap.cli import main
from halfmap.errors import FileFormatError, ParameterError, TableError
from halfmap.io.coordinates import read_coordinates
from halfmap.io.images import ImageStack
from halfmap.io.mrc import write_mrc
from halfmap.io.star import read_star, write_star
from halfmap.io.tables import read_particles
from halfmap.project import Project
from halfmap.steps.import_.step import ImportCoordinates, ImportMicrographs, ImportParticles

BOX = 16


@pytest.fixture
def project(tmp_path, monkeypatch) -> Project:
    monkeypatch.chdir(tmp_path)
    return Project.open(tmp_path)


def write_particle_files(folder: Path, *, n: int = 6, name: str = "Extract/stack.mrcs", **optics) -> Path:
    """A stack and its table as another project holds them: names relative to that project's root."""
    images = np.random.default_rng(0).normal(size=(n, BOX, BOX)).astype(np.float32)
    images += np.arange(n)[:, None, None]
    write_mrc(folder / name, images, pixel_size=1.5)
    rows = pl.DataFrame(
        {
            "rlnImageName": [f"{i + 1:06d}@{name}" for i in range(n)],
            "rlnMicrographName": ["Mics/a.mrc"] * n,
            "rlnOpticsGroup": [1] * n,
            "rlnAngleRot": [10.0 * i for i in range(n)],
            "someOtherColumn": ["x"] * n,
        }
    )
    columns = {"rlnOpticsGroup": 1, "rlnOpticsGroupName": "g", "rlnVoltage": 300.0} | optics
    write_star(folder / "Job/particles.star", {"optics": pl.DataFrame([columns]), "particles": rows})
    return folder / "Job/particles.star"


def test_names_are_rewritten_relative_to_the_project_and_the_rest_kept(project, tmp_path_factory):
    other = tmp_path_factory.mktemp("other_project")
    source = write_particle_files(other, rlnImagePixelSize=1.5, rlnImageSize=BOX)
    job = project.run(ImportParticles(particles=source))
    table = read_particles(job.outputs["particles"])
    names = table.rows["rlnImageName"]
    assert names[2] == f"000003@{other}/Extract/stack.mrcs"
    # The file is not there, and nothing here needs it: its name stays.
    assert table.rows["rlnMicrographName"][0] == "Mics/a.mrc"
    assert table.rows["rlnAngleRot"].to_list() == [0.0, 10.0, 20.0, 30.0, 40.0, 50.0]
    assert table.rows["someOtherColumn"].to_list() == ["x"] * 6
    means = ImageStack(names, root=project.root).read(range(6)).mean(axis=(1, 2))
    np.testing.assert_allclose(means, np.arange(6), atol=5 / BOX)  # noise of 1 / BOX


def test_files_inside_the_project_get_short_names(project):
    write_particle_files(project.root / "Old")
    job = project.run(ImportParticles(particles="Old/Job/particles.star"))
    assert read_particles(job.outputs["particles"]).rows["rlnImageName"][0] == "000001@Old/Extract/stack.mrcs"


def test_what_the_optics_lack_comes_from_the_stacks(project):
    source = write_particle_files(project.root)
    table = read_particles(project.run(ImportParticles(particles=source)).outputs["particles"])
    assert (table.pixel_size, table.box_size) == (1.5, BOX)
    assert table.optics["rlnOpticsGroupName"].to_list() == ["g"]


def test_a_table_without_pixel_size_takes_the_users(project, capsys):
    source = write_particle_files(project.root)
    header = bytearray(Path("Extract/stack.mrcs").read_bytes())
    header[40:52] = bytes(12)  # the cell's size
    Path("Extract/stack.mrcs").write_bytes(header)
    words = ["import", "particles", "--particles", str(source)]
    assert main(words) == 2
    assert "state the pixel size; give it with --pixel-size" in capsys.readouterr().err
    assert not Path("Import").exists()
    assert main([*words, "--pixel-size", "2.5"]) == 0
    assert read_particles("Import/job001/particles.star").pixel_size == 2.5


def test_a_pixel_size_against_the_tables_is_refused(project):
    source = write_particle_files(project.root, rlnImagePixelSize=1.5)
    with pytest.raises(ParameterError, match=r"states a pixel size of 1.5 Å, --pixel-size is 2"):
        project.run(ImportParticles(particles=source, pixel_size=2))


def test_a_missing_stack_is_named_with_its_row_and_remedy(project, capsys):
    source = write_particle_files(project.root)
    Path("Extract").rename("Moved")
    assert main(["import", "particles", "--particles", str(source)]) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error == (
        f"halfmap: {source}, row 1: its image stack Extract/stack.mrcs is not there; "
        "give the folder that such names are relative to with --images"
    )
    assert not Path("Import").exists()
    (project.root / "Moved/Extract").mkdir()
    Path("Moved/stack.mrcs").rename("Moved/Extract/stack.mrcs")
    assert main(["import", "particles", "--particles", str(source), "--images", "Moved"]) == 0
    names = read_particles("Import/job001/particles.star").rows["rlnImageName"]
    assert names[0] == "000001@Moved/Extract/stack.mrcs"


def test_a_short_stack_is_an_error_with_the_row(project):
    source = write_particle_files(project.root)
    write_mrc("Extract/stack.mrcs", np.ones((4, BOX, BOX), np.float32), pixel_size=1.5)
    with pytest.raises(TableError, match=r"particles.star, row 5: asks for image 5 of .*, which holds 4"):
        project.run(ImportParticles(particles=source))
    assert not list(project.root.glob("Import/job001/particles*"))


def test_a_truncated_stack_is_an_error(project):
    source = write_particle_files(project.root)
    Path("Extract/stack.mrcs").write_bytes(Path("Extract/stack.mrcs").read_bytes()[:-1])
    with pytest.raises(FileFormatError, match=r"stack\.mrcs: is truncated"):
        project.run(ImportParticles(particles=source))


def test_a_box_that_is_not_the_tables_is_an_error(project):
    source = write_particle_files(project.root, rlnImageSize=2 * BOX)
    with pytest.raises(TableError, match=f"states a box of {2 * BOX} px, the stacks have {BOX} px"):
        project.run(ImportParticles(particles=source))


def test_picks_without_images_are_no_particles(project):
    rows = pl.DataFrame({"rlnMicrographName": ["a.mrc"], "rlnCoordinateX": [1.0], "rlnCoordinateY": [2.0]})
    write_star("picks.star", {"particles": rows})
    with pytest.raises(TableError, match="no images; use: halfmap import coordinates"):
        project.run(ImportParticles(particles="picks.star"))


def test_images_in_the_place_of_their_table(project):
    write_particle_files(project.root)
    with pytest.raises(FileFormatError, match=r"stack\.mrcs: is an image, .* table that lists its images"):
        project.run(ImportParticles(particles=Path("Extract/stack.mrcs")))


def test_passthrough_files_belong_to_cryosparc(project):
    source = write_particle_files(project.root)
    with pytest.raises(ParameterError, match="leave --passthrough out"):
        project.run(ImportParticles(particles=source, passthrough=(source,)))


def test_relion_30_origins_become_angstrom_once_the_pixel_size_is_known(project):
    write_mrc("s.mrcs", np.random.default_rng(0).normal(size=(2, BOX, BOX)), pixel_size=2.0)
    rows = pl.DataFrame(
        {"rlnImageName": ["1@s.mrcs", "2@s.mrcs"], "rlnOriginX": [1.5, -2.0], "rlnVoltage": 300.0}
    )
    write_star("old.star", {"": rows})
    table = read_particles(project.run(ImportParticles(particles="old.star")).outputs["particles"])
    assert table.rows["rlnOriginXAngst"].to_list() == [3.0, -4.0]
    assert table.optics["rlnVoltage"].to_list() == [300.0]


@pytest.mark.parametrize(
    ("name", "count", "box"),
    [
        ("aspire-sample17/sample_particles_relion30.star", 17, 200),
        ("aspire-sample17/sample_particles_relion31.star", 17, 200),
        ("cryodrgn-empiar10076-7/empiar_10076_7.star", 7, 320),
        ("cryodrgn-empiar10076-7/empiar_10076_7.cs", 7, 320),
        ("cryodrgn-relion31-filament5/relion31.star", 5, 256),
    ],
)
def test_real_particles(project, shared_data, name, count, box):
    job = project.run(ImportParticles(particles=shared_data / "particles" / name))
    table = read_particles(job.outputs["particles"])
    assert (len(table), table.box_size) == (count, box)
    assert len(ImageStack(table.rows["rlnImageName"], root=project.root)) == count
    assert job.outputs["picture"].read_bytes().startswith(b"\x89PNG")


# Coordinates

SHAPE = (60, 80)


@pytest.fixture
def micrographs(project) -> Path:
    for name in ("grid_1", "grid_10", "grid_2.v2"):
        write_mrc(f"Mics/{name}.mrc", np.random.default_rng(len(name)).normal(size=SHAPE), pixel_size=2.0)
    project.run(ImportMicrographs(micrographs=("Mics/*.mrc",)))
    return Path("Import/job001/micrographs.star")


def picks(job) -> dict[str, list[tuple[float, float]]]:
    table = read_star(job.outputs["coordinates"])["coordinate_files"]
    return {
        Path(name).stem: read_coordinates(job.root / file).select("rlnCoordinateX", "rlnCoordinateY").rows()
        for name, file in table.iter_rows()
    }


def test_coordinates_find_their_micrograph_by_name(project, micrographs):
    Path("grid_1_manual.csv").write_text("x,y\n10,20\n30,40\n")
    Path("grid_10.box").write_text("5 6 10 20\n")
    write_star("grid_2.v2_pick.star", {"": pl.DataFrame({"rlnCoordinateX": [1.0], "rlnCoordinateY": [59.0]})})
    step = ImportCoordinates(
        coordinates=("grid_*.csv", "grid_10.box", "grid_2.v2_pick.star"), micrographs=micrographs
    )
    job = project.run(step)
    assert picks(job) == {"grid_1": [(10, 20), (30, 40)], "grid_10": [(10, 16)], "grid_2.v2": [(1, 59)]}
    assert (micrographs.as_posix(), job.name) in project.pipeline.inputs


def test_a_table_of_all_micrographs_is_divided_by_the_names_in_it(project, micrographs):
    text = "image_name\tx_coord\ty_coord\tscore\n"
    Path("picks.txt").write_text(
        text + "grid_1\t4\t5\t0.5\ngrid_2.v2\t6\t7\t-1\ngrid_1\t8\t9\t2\nother\t1\t1\t1\n"
    )
    job = project.run(ImportCoordinates(coordinates=("picks.txt",), micrographs=micrographs, scale=2))
    assert picks(job) == {"grid_1": [(8, 10), (16, 18)], "grid_2.v2": [(12, 14)]}
    scores = read_coordinates(job.folder / "coordinates/grid_1.star")["rlnAutopickFigureOfMerit"]
    assert scores.to_list() == [0.5, 2.0]


def test_coordinates_outside_are_left_out_and_counted(project, micrographs, caplog):
    Path("grid_1.csv").write_text("x,y\n10,20\n79,59\n80,1\n-1,5\n3,3\n")
    job = project.run(ImportCoordinates(coordinates=("grid_1.csv",), micrographs=micrographs))
    assert picks(job) == {"grid_1": [(10, 20), (79, 59), (3, 3)]}
    assert "2 of 5 coordinates lie outside" in caplog.text
    assert "those of grid_1.mrc (2); were the micrographs binned (shrunk) for picking?" in caplog.text


def test_micrographs_without_coordinates_are_not_counted_as_having_some(project, micrographs, caplog):
    caplog.set_level("INFO", logger="halfmap")
    Path("grid_1.csv").write_text("x,y\n10,20\n")
    Path("grid_10.csv").write_text("x,y\n")
    job = project.run(ImportCoordinates(coordinates=("*.csv",), micrographs=micrographs))
    assert picks(job) == {"grid_1": [(10, 20)], "grid_10": []}
    assert "1 coordinate in 1 of 3 micrographs; 1 more has none left" in caplog.text


def test_a_table_of_other_micrographs_is_shown_beside_ours(project, micrographs):
    Path("picks.csv").write_text("image_name,x,y\nother,1,2\n")
    with pytest.raises(TableError, match=r"its first is other, the table's first is grid_1\.mrc"):
        project.run(ImportCoordinates(coordinates=("picks.csv",), micrographs=micrographs))


def test_the_diameter_is_kept_for_extraction(project, micrographs):
    Path("grid_1.csv").write_text("x,y\n10,20\n3,4\n")
    step = ImportCoordinates(coordinates=("grid_1.csv",), micrographs=micrographs, diameter=120)
    job = project.run(step)
    table = read_coordinates(job.folder / "coordinates/grid_1.star")
    assert table["hmParticleDiameter"].to_list() == [120, 120]


@pytest.mark.parametrize(("size", "warned"), [(0.15, True), (0.3, False), (8, False), (15, True)])
def test_an_unusual_pixel_size_is_warned_of(project, caplog, size, warned):
    # Headers that say 1 Å were often never set.
    write_mrc("Mics/a.mrc", np.random.default_rng(1).normal(size=SHAPE), pixel_size=1.0)
    project.run(ImportMicrographs(micrographs=("Mics/*.mrc",), pixel_size=size))
    assert (f"is the pixel size of {size:g} Å right?" in caplog.text) == warned


@pytest.mark.parametrize("size", [0.2, 18.0])
def test_an_unusual_pixel_size_that_headers_speak_against_is_refused(project, size):
    write_mrc("Mics/a.mrc", np.random.default_rng(1).normal(size=SHAPE), pixel_size=1.8)
    with pytest.raises(ParameterError, match=r"of 1 of 1 files say 1\.8 Å; give --pixel-size 1\.8"):
        project.run(ImportMicrographs(micrographs=("Mics/*.mrc",), pixel_size=size))


def test_coordinates_that_are_mostly_outside_have_a_wrong_scale(project, micrographs, capsys):
    Path("grid_1.csv").write_text("x,y\n100,20\n790,59\n80,1\n1,5\n")
    words = ["import", "coordinates", "--coordinates", "grid_1.csv", "--micrographs", str(micrographs)]
    assert main(words) == 2
    assert "3 of 4 coordinates lie outside the micrographs; were" in capsys.readouterr().err
    assert not list(project.root.glob("Import/job002/coordinates*"))


def test_coordinates_of_no_micrograph_are_named(project, micrographs):
    Path("grid_3.csv").write_text("x,y\n10,20\n")
    Path("grid_100.csv").write_text("x,y\n10,20\n")  # begins as grid_10 does, but is another
    Path("grid_1.csv").write_text("x,y\n10,20\n")
    Path("grid_10.csv").write_text("x,y\n10,abc\n")
    job = project.run(ImportCoordinates(coordinates=("*.csv",), micrographs=micrographs))
    assert set(picks(job)) == {"grid_1"}
    failures = dict(read_star(job.folder / "failures.star")["failures"].iter_rows())
    assert set(failures) == {"grid_3.csv", "grid_10.csv", "grid_100.csv"}
    assert "row 1" in failures["grid_10.csv"]
    with pytest.raises(TableError, match=r"grid_3\.csv: is of none of the micrographs.*such as grid_1$"):
        project.run(ImportCoordinates(coordinates=("grid_3.csv",), micrographs=micrographs))
    with pytest.raises(TableError, match=r"none of 2 coordinate files is of use; the first one: .*abc|row 1"):
        project.run(ImportCoordinates(coordinates=("grid_10.csv", "grid_3.csv"), micrographs=micrographs))


def test_real_coordinates(project, shared_data):
    folder = shared_data / "micrographs/apoferritin_empiar10146"
    project.run(ImportMicrographs(micrographs=(folder / "apo_0305*.mrc", folder / "apo_0343*.mrc")))
    step = ImportCoordinates(
        coordinates=(folder / "peer_topaz_resnet16_u64.csv", folder / "apo_030502_manual.csv"),
        micrographs="Import/job001/micrographs.star",
    )
    found = picks(project.run(step))
    topaz = pl.read_csv(folder / "peer_topaz_resnet16_u64.csv").group_by("micrograph").len()
    expected = dict(topaz.iter_rows())
    assert len(found["apo_034344"]) == expected["apo_034344"]
    assert len(found["apo_030502"]) == expected["apo_030502"] + 167


def test_the_folder_of_stacks_is_named_from_where_one_stands(project, tmp_path_factory, monkeypatch):
    other = tmp_path_factory.mktemp("other")
    table = write_particle_files(other, name="Data/deep/stack.mrcs")
    blocks = read_star(table)
    blocks["particles"] = blocks["particles"].with_columns(
        pl.col("rlnImageName").str.replace("Data/deep/", "")
    )
    write_star(table, blocks)
    monkeypatch.chdir(other)
    job = project.run(ImportParticles(particles="Job/particles.star", images="Data/deep"))
    first = read_star(job.outputs["particles"])["particles"]["rlnImageName"][0]
    assert first == f"000001@{other}/Data/deep/stack.mrcs"


def test_micrographs_that_share_a_name_are_not_mixed_up(project):
    for folder in ("A", "B"):
        write_mrc(
            f"{folder}/grid_1.mrc", np.random.default_rng(ord(folder)).normal(size=SHAPE), pixel_size=2.0
        )
    project.run(ImportMicrographs(micrographs=("*/*.mrc",)))
    Path("grid_1.csv").write_text("x,y\n10,20\n")
    step = ImportCoordinates(coordinates=("grid_1.csv",), micrographs="Import/job001/micrographs.star")
    with pytest.raises(TableError, match=r"B/grid_1.mrc and A/grid_1.mrc differ only in their folders"):
        project.run(step)


def test_coordinates_of_low_score_are_left_out(project, micrographs, caplog):
    Path("picks.csv").write_text(
        "micrograph,x,y,score\ngrid_1,4,5,0.5\ngrid_1,8,9,nan\ngrid_10,6,7,-1\ngrid_1,8,9,2\n"
    )
    Path("grid_2.v2.csv").write_text("x,y\n1,2\n")
    step = ImportCoordinates(
        coordinates=("picks.csv", "grid_2.v2.csv"), micrographs=micrographs, min_score=0.5, diameter=20
    )
    caplog.set_level("INFO", logger="halfmap")
    job = project.run(step)
    assert picks(job) == {"grid_1": [(4, 5), (8, 9)], "grid_10": []}
    assert "2 of 4 coordinates score 0.5 or more" in caplog.text
    # What has no score cannot be judged.
    failures = read_star(job.folder / "failures.star")["failures"]
    assert failures["hmItem"].to_list() == ["grid_2.v2.csv"]
    assert "has no scores; leave --min-score out" in failures["hmReason"][0]
    step = ImportCoordinates(coordinates=("picks.csv",), micrographs=micrographs, min_score=9)
    with pytest.raises(TableError, match="none of 4 coordinates scores 9 or more"):
        project.run(step)


def test_circles_have_the_particles_diameter(project, micrographs, monkeypatch):
    from matplotlib.axes import Axes

    drawn = []
    monkeypatch.setattr(Axes, "add_collection", lambda _, circles, **__: drawn.append(circles))
    Path("grid_1.csv").write_text("x,y\n10,20\n30,40\n")
    step = ImportCoordinates(coordinates=("grid_1.csv",), micrographs=micrographs, diameter=20)
    project.run(step)
    # 20 Å at 2 Å a pixel; the micrographs are drawn at their own size.
    assert [circles.get_widths().tolist() for circles in drawn] == [[10.0]]


def test_particles_are_counted_at_the_end(project, caplog):
    caplog.set_level("INFO", logger="halfmap")
    project.run(ImportParticles(particles=write_particle_files(project.root)))
    assert f"particles: 6, image stacks: 1, optics groups: 1, box: {BOX} px" in caplog.text


def test_micrographs_of_one_name_in_two_folders_are_both_listed(project):
    for folder in ("A", "B"):
        write_mrc(
            f"{folder}/grid_1.mrc", np.random.default_rng(ord(folder)).normal(size=SHAPE), pixel_size=2.0
        )
    job = project.run(ImportMicrographs(micrographs=("*/*.mrc",)))
    names = read_star(job.outputs["micrographs"])["micrographs"]["rlnMicrographName"].to_list()
    assert names == ["A/grid_1.mrc", "B/grid_1.mrc"]
