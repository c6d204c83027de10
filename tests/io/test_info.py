from __future__ import annotations

import bz2
import gzip
import io
import struct
from pathlib import Path

import numpy as np
import polars as pl
import pytest
from eer_writer import encode, random_events, write_eer
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from rich.console import Console

from halfmap.errors import FileFormatError, HalfmapError, TableError
from halfmap.io import info
from halfmap.io.info import describe
from halfmap.io.mrc import write_mrc
from halfmap.io.star import write_star
from halfmap.io.tiff import write_tiff_movie


def shown(path: str | Path, width: int = 160) -> str:
    console = Console(file=io.StringIO(), width=width)
    console.print(describe(path))
    return console.file.getvalue()  # type: ignore[attr-defined]


def fact(path: str | Path, name: str) -> str:
    """Value beside a name."""
    lines = [line.strip() for line in shown(path).splitlines()]
    return next(line.removeprefix(name).strip() for line in lines if line.startswith(name + " "))


def statistics(path: Path) -> list[float]:
    words = fact(path, "values").replace(",", " ").split()
    return [float(words[words.index(word) + 1]) for word in ("min", "mean", "max", "deviation")]


@pytest.mark.parametrize("offset", [0.0, 1e6], ids=["centred", "large mean"])
def test_a_volume_with_its_statistics(tmp_path, offset):
    array = np.random.default_rng(1).normal(offset, 1, (8, 8, 8)).astype(np.float32)
    write_mrc(tmp_path / "a.mrc", array, pixel_size=1.25, origin=(1, 2, 3))
    assert fact(tmp_path / "a.mrc", "holds") == "MRC volume of 8 × 8 × 8 voxels (x, y, z)"
    assert fact(tmp_path / "a.mrc", "pixel size") == "1.25 Å"
    assert fact(tmp_path / "a.mrc", "extent") == "10.0 × 10.0 × 10.0 Å"
    assert fact(tmp_path / "a.mrc", "type") == "float32 (mode 2)"
    wide = array.astype(np.float64)
    # Six digits are printed.
    expected = [wide.min(), wide.mean(), wide.max(), wide.std()]
    np.testing.assert_allclose(statistics(tmp_path / "a.mrc"), expected, rtol=5e-6)


@pytest.mark.parametrize(
    ("array", "name", "kind"),
    [
        (np.zeros((3, 4, 6), np.float32), "a.mrcs", "MRC stack of 3 images of 6 × 4 px"),
        (np.zeros((4, 6), np.int16), "a.mrc", "MRC image of 6 × 4 px"),
        (np.zeros((4, 4, 4), np.float16), "a.map", "MRC volume of 4 × 4 × 4 voxels (x, y, z)"),
    ],
)
def test_kinds_of_mrc(tmp_path, array, name, kind):
    write_mrc(tmp_path / name, array, pixel_size=1)
    assert fact(tmp_path / name, "holds") == kind
    assert fact(tmp_path / name, "type").startswith(str(array.dtype))


def test_a_large_stack_is_sampled_and_says_so(tmp_path, monkeypatch):
    monkeypatch.setattr(info, "SAMPLED_px", 3 * 16)
    stack = np.arange(100, dtype=np.float32)[:, None, None] * np.ones((4, 4), np.float32)
    write_mrc(tmp_path / "a.mrcs", stack, pixel_size=1)
    assert "values of 3 of 100 sections" in shown(tmp_path / "a.mrcs")
    # The first, one from the middle, the last: 0, 50 (49.5 rounded to even), 99.
    assert "min 0, mean 49.6667, max 99" in shown(tmp_path / "a.mrcs")


@pytest.mark.parametrize("compress", [gzip.compress, bz2.compress])
def test_compressed_maps_whatever_their_name(tmp_path, compress):
    write_mrc(tmp_path / "a.mrc", np.ones((4, 4, 4), np.float32), pixel_size=2)
    data = compress((tmp_path / "a.mrc").read_bytes())
    for name in ("a.mrc.gz", "download"):
        (tmp_path / name).write_bytes(data)
        assert "volume of 4 × 4 × 4" in fact(tmp_path / name, "holds")
        assert fact(tmp_path / name, "compression") in ("gzip", "bzip2")


def test_nan_and_a_missing_pixel_size_are_pointed_out(tmp_path):
    write_mrc(tmp_path / "a.mrc", np.array([[np.nan, 1.0], [3.0, np.inf]]), pixel_size=1)
    data = bytearray((tmp_path / "a.mrc").read_bytes())
    data[40:52] = struct.pack("<3f", 0, 0, 0)
    (tmp_path / "a.mrc").write_bytes(data)
    text = shown(tmp_path / "a.mrc")
    assert "not stated in the header" in text
    assert "2 are NaN or infinite" in text
    assert "min 1, mean 2, max 3" in text


def particles(path: Path) -> Path:
    rows = pl.DataFrame(
        {
            "rlnImageName": [f"{i:06d}@Extract/[1]/stack{i % 2}.mrcs" for i in range(1, 7)],
            "rlnMicrographName": ["a.mrc", "b.mrc", "c.mrc"] * 2,
            "rlnOpticsGroup": [1, 1, 1, 1, 2, 2],
            "rlnDefocusU": [11000.0, 12000, 13000, 14000, 15000, 16000],
            "rlnDefocusV": [9000.0, 10000, 11000, 12000, 13000, 14000],
            "rlnAngleRot": [0.0] * 6,
            "rlnAngleTilt": [0.0] * 6,
            "rlnAnglePsi": [1.0, 2, 3, 4, 5, 6],
            "rlnClassNumber": [1, 2, 1, 1, 3, 1],
            "rlnRandomSubset": [1, 2, 1, 2, 1, 2],
        }
    )
    optics = pl.DataFrame(
        {
            "rlnOpticsGroup": [1, 2],
            "rlnOpticsGroupName": ["day1", "day2"],
            "rlnVoltage": [300.0, 200.0],
            "rlnImagePixelSize": [1.4, 1.4],
        }
    )
    write_star(path, {"optics": optics, "particles": rows})
    return path


def test_particles(tmp_path):
    path = particles(tmp_path / "particles.star")
    assert fact(path, "data_particles") == "6 rows × 10 columns"
    assert fact(path, "holds") == "6 particles"
    assert fact(path, "micrographs") == "3"
    assert fact(path, "image stacks") == "2"
    assert fact(path, "defocus") == "10,000 to 15,000 Å"
    assert fact(path, "poses") == "in the plane only"
    assert fact(path, "classes") == "1: 4, 2: 1, 3: 1"
    assert fact(path, "half sets") == "1: 3, 2: 3"
    assert fact(path, "day1").split() == ["300", "1.4", "4"]
    assert fact(path, "day2").split() == ["200", "1.4", "2"]
    # Brackets in names are not mark-up.
    assert "000001@Extract/[1]/stack1.mrcs" in shown(path)


def test_everything_fits_a_screen(tmp_path):
    path = particles(tmp_path / "particles.star")
    lines = shown(path, width=80).splitlines()
    assert len(lines) <= 30
    assert max(map(len, lines)) <= 80


def test_a_set_that_cannot_be_used_is_still_shown(tmp_path):
    path = particles(tmp_path / "particles.star")
    path.write_text(path.read_text().replace("\n2 day2", "\n1 day2"))
    assert "cannot be used as particles: optics group 1 comes twice" in shown(path)


def test_movies_and_micrographs(tmp_path):
    optics = pl.DataFrame({"rlnOpticsGroup": [1], "rlnMicrographDoseRate": [1.5]})
    rows = pl.DataFrame(
        {"rlnMicrographMovieName": ["a.tif", "b.tif"], "rlnOpticsGroup": 1, "rlnImageSizeZ": [40, 50]}
    )
    write_star(tmp_path / "movies.star", {"optics": optics, "movies": rows})
    assert fact(tmp_path / "movies.star", "holds") == "2 movies"
    assert fact(tmp_path / "movies.star", "frames") == "40 to 50"
    rows = pl.DataFrame({"rlnMicrographName": ["a.mrc"], "rlnOpticsGroup": 1})
    write_star(tmp_path / "mics.star", {"optics": optics, "micrographs": rows})
    assert fact(tmp_path / "mics.star", "holds") == "1 micrographs"
    assert fact(tmp_path / "mics.star", "defocus") == "not estimated"


def test_other_star_files_show_their_values_and_first_rows(tmp_path):
    loop = pl.DataFrame({"rlnSpectralIndex": list(range(20)), "rlnGoldStandardFsc": [0.5] * 20})
    write_star(tmp_path / "a.star", {"general": {"rlnFinalResolution": 3.25}, "fsc": loop})
    text = shown(tmp_path / "a.star")
    assert fact(tmp_path / "a.star", "rlnFinalResolution") == "3.25"
    assert "data_fsc" in text
    assert "SpectralIndex" in text


def test_movies_in_tiff(tmp_path):
    frames = np.random.default_rng(0).poisson(3, (5, 6, 9)).astype(np.uint8)
    write_tiff_movie(tmp_path / "a.tif", frames, pixel_size=0.8)
    assert fact(tmp_path / "a.tif", "holds") == "TIFF movie of 5 frames of 9 × 6 px"
    assert fact(tmp_path / "a.tif", "pixel size") == "0.8 Å"
    assert fact(tmp_path / "a.tif", "compression") == "lzw"
    np.testing.assert_allclose(
        statistics(tmp_path / "a.tif"), [frames.min(), frames.mean(), frames.max(), frames.std()], rtol=5e-6
    )


def test_eer_movies(tmp_path):
    rng = np.random.default_rng(0)
    events = [random_events(rng, (32, 48), 60) for _ in range(10)]
    write_eer(tmp_path / "a.eer", [encode(frame, (32, 48), 7, 2) for frame in events], (32, 48))
    for name in ("a.eer", "misnamed.tif"):
        (tmp_path / name).write_bytes((tmp_path / "a.eer").read_bytes())
        assert fact(tmp_path / name, "holds") == "EER movie of 10 frames of 48 × 32 px"
        assert fact(tmp_path / name, "electrons").startswith(f"{60 / (32 * 48):.4g} a pixel and frame")
        assert fact(tmp_path / name, "exposureTime") == "4.5 s"


def test_a_gain_reference_counts_its_dead_pixels(tmp_path):
    import tifffile

    gain = np.ones((6, 8), np.float32)
    gain[1, 2] = gain[3, 4] = 0
    tifffile.imwrite(tmp_path / "a.gain", gain)
    assert fact(tmp_path / "a.gain", "holds") == "gain reference of 8 × 6 px"
    assert fact(tmp_path / "a.gain", "dead pixels") == "2"


def test_coordinates(tmp_path):
    (tmp_path / "a.txt").write_text("image_name\tx_coord\ty_coord\tscore\nm\t1\t2\t0.5\nn\t30\t4\t-1\n")
    assert fact(tmp_path / "a.txt", "holds") == "2 particle coordinates"
    assert fact(tmp_path / "a.txt", "micrographs") == "2"
    assert fact(tmp_path / "a.txt", "x") == "1 to 30 px"
    assert fact(tmp_path / "a.txt", "score") == "-1 to 0.5"
    (tmp_path / "b.csv").write_text("x,y\n")
    with pytest.raises(FileFormatError, match="holds no coordinates"):
        describe(tmp_path / "b.csv")


def test_atomic_models(tmp_path):
    line = "ATOM  {:5d}  CA  GLY {} {:3d}    {:8.3f}   0.000   0.000  1.00 20.00           C  \n"
    text = "".join(line.format(i, "AB"[i % 2], i, 30.0 * i) for i in range(2)) + "END\n"
    for name in ("a.pdb", "unnamed"):
        (tmp_path / name).write_text(text)
        assert fact(tmp_path / name, "holds") == "atomic model, 2 atoms without hydrogens and waters"
        assert fact(tmp_path / name, "chains") == "2: A, B"
        assert fact(tmp_path / name, "diameter") == "30.0 Å"
        assert fact(tmp_path / name, "elements") == "C 2"


def test_a_format_is_told_by_content_where_the_name_says_nothing(tmp_path):
    path = particles(tmp_path / "run_data.star").rename(tmp_path / "run_data")
    assert fact(path, "holds") == "6 particles"
    write_tiff_movie(tmp_path / "a.tif", np.ones((2, 4, 4), np.uint8))
    assert "TIFF movie" in fact((tmp_path / "a.tif").rename(tmp_path / "b.xyz"), "holds")
    write_mrc(tmp_path / "c.mrc", np.ones((4, 4), np.float32), pixel_size=1)
    assert "MRC image" in fact((tmp_path / "c.mrc").rename(tmp_path / "c.raw"), "holds")


@pytest.mark.parametrize("name", ["a.png", "a.docx", "noname"])
def test_an_unknown_format_lists_the_known_ones(tmp_path, name):
    (tmp_path / name).write_bytes(b"\x89PNG\r\n\x1a\n" + bytes(100))
    with pytest.raises(FileFormatError, match=r"is of no format that Halfmap knows; MRC, .* are known"):
        describe(tmp_path / name)


SUFFIXES = [
    ".mrc",
    ".mrc.gz",
    ".star",
    ".cs",
    ".tif",
    ".eer",
    ".gain",
    ".box",
    ".txt",
    ".csv",
    ".pdb",
    ".cif",
    "",
]


@pytest.mark.parametrize("suffix", SUFFIXES)
@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.one_of(st.binary(max_size=2000), st.text(max_size=200).map(str.encode)))
def test_rubbish_is_an_error_in_one_sentence(tmp_path, suffix, data):
    path = tmp_path / f"rubbish{suffix}"
    path.write_bytes(data)
    try:
        describe(path)
    except HalfmapError as error:
        assert error.path is not None
        assert "\n" not in str(error)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("metadata/cryodrgn-cs-star/cryosparc_P12_J24_001_particles.cs", "2,019 particles"),
        ("metadata/cryodrgn-cs-star/relion31.6opticsgroups.star", "particles"),
        ("metadata/relion-tutorial-empiar10017-star/ap_s_c2d.star", "particles"),
        ("metadata/topaz-empiar10025-star/ctf_params.star", "30 micrographs"),
        ("metadata/topaz-empiar10025-star/particles.txt", "1,500 particle coordinates"),
        ("maps/betagal-relion-tutorial/betaGal.mrc", "volume of 100 × 100 × 100"),
        ("micrographs/krios_k2_0.85A/fei-extended.mrc", "image of 3710 × 3838 px"),
        ("models/1cgm.cif.gz", "atomic model"),
        ("particles/cryodrgn-empiar10076-7/empiar_10076_7.cs", "7 particles"),
    ],
)
def test_real_files(shared_data, name, expected):
    assert expected in shown(shared_data / name)
    assert len(shown(shared_data / name, width=100).splitlines()) <= 36


def test_an_incomplete_cryosparc_file_shows_its_fields_and_what_is_missing(tmp_path):
    records = np.zeros(
        3, dtype=[("uid", "<u8"), ("alignments3D/pose", "<f4", (3,)), ("alignments3D/shift", "<f4", (2,))]
    )
    records["uid"] = [1, 2, 3]
    with (tmp_path / "a.cs").open("wb") as file:
        np.save(file, records)
    assert fact(tmp_path / "a.cs", "holds") == "cryoSPARC table of 3 items"
    assert fact(tmp_path / "a.cs", "fields") == "alignments3D (2)"
    assert "passthrough" in shown(tmp_path / "a.cs")


def test_a_table_error_keeps_its_row(tmp_path):
    (tmp_path / "a.csv").write_text("x,y\n1,2\n3,b\n")
    with pytest.raises(TableError) as caught:
        describe(tmp_path / "a.csv")
    assert caught.value.row == 2


def test_texts_that_are_not_coordinates_are_named_for_what_they_are(tmp_path):
    (tmp_path / "defects.txt").write_text("# hot\n2 0 1 6\n7 4 5 9\n")
    assert fact(tmp_path / "defects.txt", "holds") == "2 rectangles of defective pixels"
    assert fact(tmp_path / "defects.txt", "pixels") == "51 at most"
    (tmp_path / "serialem.txt").write_text("CameraSizeX 5760\nBadColumns 5\n")
    assert "SerialEM's list of defects" in fact(tmp_path / "serialem.txt", "holds")
    (tmp_path / "ctf.csv").write_text("micrograph,defocus\na,10000\nb,20000\n")
    assert fact(tmp_path / "ctf.csv", "holds").startswith("table of 2 rows × 2 columns, not coordinates")
    assert "20000" in shown(tmp_path / "ctf.csv")
    (tmp_path / "note.txt").write_text("Grids were frozen\non a Monday.\n")
    assert fact(tmp_path / "note.txt", "holds").startswith("text of 2 lines")
    assert "on a Monday." in shown(tmp_path / "note.txt")


def test_quality_of_micrographs_is_summed_up(tmp_path):
    optics = pl.DataFrame(
        {"rlnOpticsGroup": [1], "rlnOpticsGroupName": ["a"], "rlnMicrographPixelSize": [1.0]}
    )
    rows = pl.DataFrame(
        {
            "rlnMicrographName": ["a.mrc", "b.mrc", "c.mrc", "d.mrc"],
            "rlnOpticsGroup": [1] * 4,
            "rlnCtfMaxResolution": [3.0, 4.5, 9.0, 3.5],
            "hmDefocusUncertainty": [12.0, np.nan, 7.5, 30.0],
            "hmBadPixels": [3, 4, 1200, 5],
            "hmMicrographWidth": [4096] * 4,
            "hmDefocusSurface": ["[0,0,0,0,0]"] * 4,
            "hmCtfProblem": ["none", "no Thon rings", "none", "no Thon rings"],
            "hmMotionMisfit": [np.nan] * 4,
        }
    )
    path = tmp_path / "micrographs_ctf.star"
    write_star(path, {"optics": optics, "micrographs": rows})
    assert fact(path, "quality").split() == ["min", "median", "max", "unknown"]
    assert fact(path, "CtfMaxResolution [Å]").split() == ["3", "4", "9"]
    assert fact(path, "hmDefocusUncertainty [Å]").split() == ["7.5", "12", "30", "1"]
    assert fact(path, "hmBadPixels").split() == ["3", "4.5", "1,200"]
    assert fact(path, "hmMotionMisfit").split() == ["–", "–", "–", "4"]
    assert fact(path, "problems") == "2 × no Thon rings"
    assert "hmMicrographWidth  " not in shown(path)
