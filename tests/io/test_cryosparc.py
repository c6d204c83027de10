"""cryoSPARC files: conventions against published values, joins, errors, and the way back."""

from __future__ import annotations

import logging
import math

import numpy as np
import polars as pl
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from halfmap.data import MicrographSet, ParticleSet
from halfmap.errors import FileFormatError, HalfmapError, TableError
from halfmap.io.cryosparc import read_cs, write_cs
from halfmap.io.tables import read_particles, write_particles
from halfmap.ops.ctf import ctf, odd_aberration_phase
from halfmap.ops.rotations import angular_distance, from_euler

FILES = {
    "metadata/cryodrgn-cs-star/cryosparc_J2_particles_exported.cs": 22,
    "metadata/cryodrgn-cs-star/cryosparc_P12_J24_001_particles.cs": 2019,
    "particles/cryodrgn-empiar10076-7/empiar_10076_7.cs": 7,
}


def fields(n: int = 3) -> dict[str, np.ndarray]:
    """Fields of particles whose every value differs."""
    rng = np.random.default_rng(3)
    single = rng.random((n, 30)).astype(np.float32)
    return {
        "uid": rng.integers(2**63, 2**64, n, dtype=np.uint64),
        "blob/path": np.array([b">J1/extract/a.mrc", b"J1/extract/b.mrc", b"J1/extract/a.mrc"])[:n],
        "blob/idx": np.arange(n, dtype=np.uint32),
        "blob/shape": np.full((n, 2), 64, np.uint32),
        "blob/psize_A": np.full(n, 1.345, np.float32),
        "blob/sign": np.full(n, -1, np.float32),
        "ctf/exp_group_id": np.array([5, 23, 5], np.uint32)[:n],
        "ctf/accel_kv": np.full(n, 300, np.float32),
        "ctf/cs_mm": np.full(n, 2.7, np.float32),
        "ctf/amp_contrast": np.full(n, 0.1, np.float32),
        "ctf/df1_A": 15_000 + 1_000 * single[:, 0],
        "ctf/df2_A": 14_000 + 1_000 * single[:, 1],
        "ctf/df_angle_rad": single[:, 2],
        "ctf/phase_shift_rad": single[:, 3],
        "ctf/tilt_A": np.array([[8_100, -2_700], [0, 0], [8_100, -2_700]], np.float32)[:n],
        "ctf/anisomag": np.array([[0.01, 0.02, -0.03, 0.005]] * 3, np.float32)[:n],
        "alignments3D/pose": (4 * single[:, 4:7] - 2),
        "alignments3D/shift": (10 * single[:, 7:9] - 5),
        "alignments3D/psize_A": np.full(n, 2.69, np.float32),
        "alignments3D/split": np.array([0, 1, 0], np.uint32)[:n],
        "alignments3D/class": np.array([0, 2, 1], np.uint32)[:n],
        "location/micrograph_path": np.array([b"J1/000123_m.mrc"] * 3)[:n],
        "location/micrograph_shape": np.array([[1_000, 2_000]] * 3, np.uint32)[:n],
        "location/center_x_frac": np.array([0.25, 0.5, 0.75])[:n],
        "location/center_y_frac": np.array([0.1, 0.5, 0.25])[:n],
    }


def save(path, values: dict[str, np.ndarray]):
    records = np.empty(
        len(values["uid"]), dtype=[(name, array.dtype, array.shape[1:]) for name, array in values.items()]
    )
    for name, array in values.items():
        records[name] = array
    with path.open("wb") as file:
        np.save(file, records)
    return path


def only(values: dict[str, np.ndarray], *prefixes: str) -> dict[str, np.ndarray]:
    return {name: array for name, array in values.items() if name == "uid" or name.startswith(prefixes)}


class TestConventions:
    def test_pose_of_pyem(self, tmp_path):
        """The pair of rotation vector and RELION Euler angles (radians) in the unit tests of pyem.

        csparc2star of that package is what the field converts poses with.
        """
        values = fields(1)
        pose = [-2.14932622394, 0.746829503588, -0.487367610323]
        values["alignments3D/pose"] = np.array([pose], np.float32)
        particles = read_cs(save(tmp_path / "a.cs", values))
        assert isinstance(particles, ParticleSet)
        expected = np.rad2deg([0.7844259044446438, 2.2296280676903204, -1.6883258657322704])
        found = [particles.rows[label].item() for label in ("rlnAngleRot", "rlnAngleTilt", "rlnAnglePsi")]
        assert found == pytest.approx(expected, abs=1e-4)

    def test_pose_is_the_transposed_rodrigues_matrix(self, tmp_path):
        values = fields()
        found = read_cs(save(tmp_path / "a.cs", values)).poses.rotations.double().numpy()
        for pose, rotation in zip(values["alignments3D/pose"].astype(float), found, strict=True):
            angle = np.linalg.norm(pose)
            x, y, z = pose / angle
            cross = np.array([[0, -z, y], [z, 0, -x], [-y, x, 0]])
            matrix = np.eye(3) + math.sin(angle) * cross + (1 - math.cos(angle)) * cross @ cross
            assert np.abs(rotation - matrix.T).max() < 1e-6

    def test_everything_else(self, tmp_path):
        values = fields()
        particles = read_cs(save(tmp_path / "a.cs", values))
        assert isinstance(particles, ParticleSet)
        rows = particles.rows
        assert rows["rlnImageName"].to_list() == [
            "000001@J1/extract/a.mrc",
            "000002@J1/extract/b.mrc",
            "000003@J1/extract/a.mrc",
        ]
        assert rows["rlnMicrographName"][0] == "J1/000123_m.mrc"
        assert rows["rlnCoordinateX"].to_list() == [500.0, 1000.0, 1500.0]
        assert rows["rlnCoordinateY"].to_list() == [100.0, 500.0, 250.0]
        assert rows["rlnRandomSubset"].to_list() == [1, 2, 1]
        assert rows["rlnClassNumber"].to_list() == [1, 3, 2]
        assert rows["hmCryosparcUid"].to_list() == [str(uid) for uid in values["uid"]]
        shifts = 2.69 * values["alignments3D/shift"].astype(float)
        assert np.abs(particles.poses.shifts_A.numpy() - shifts).max() < 1e-5
        params = particles.ctf
        assert params.defocus_u.tolist() == pytest.approx(values["ctf/df1_A"].tolist(), rel=1e-7)
        for name, field in (("defocus_angle", "ctf/df_angle_rad"), ("phase_shift", "ctf/phase_shift_rad")):
            assert getattr(params, name).tolist() == pytest.approx(np.rad2deg(values[field]), rel=1e-6)
        # Cs times tilt: 2.7e7 Å x 0.3 mrad = 8,100 Å.
        assert torch.allclose(params.beam_tilt_mrad, torch.tensor([[0.3, -0.1], [0, 0], [0.3, -0.1]]))
        assert torch.allclose(params.magnification[0], torch.tensor([[1.01, 0.02], [-0.03, 1.005]]))
        optics = particles.optics
        assert optics["rlnOpticsGroupName"].to_list() == ["exposureGroup5", "exposureGroup23"]
        assert rows["rlnOpticsGroup"].to_list() == [1, 2, 1]
        assert optics["rlnImagePixelSize"].to_list() == [1.345] * 2
        assert optics["rlnImageSize"].to_list() == [64] * 2
        assert optics["hmContrastSign"].to_list() == [-1] * 2
        assert optics["hmFlippedY"].to_list() == [False] * 2

    def test_classes_in_the_plane(self, shared_data):
        path = shared_data / "metadata/cryodrgn-cs-star/cryosparc_J2_particles_exported.cs"
        records = np.load(path)
        particles = read_cs(path)
        assert isinstance(particles, ParticleSet)
        off = particles.rows["rlnAnglePsi"].to_numpy() - np.rad2deg(records["alignments2D/pose"])
        assert np.abs((off + 180) % 360 - 180).max() < 1e-4
        assert particles.rows["rlnAngleTilt"].abs().max() == 0
        assert "rlnRandomSubset" not in particles.rows.columns
        assert particles.rows["rlnOriginYAngst"][0] == pytest.approx(12 * 1.345)

    def test_same_particles_as_relion_has_them(self, shared_data):
        folder = shared_data / "particles/cryodrgn-empiar10076-7"
        ours, theirs = read_cs(folder / "empiar_10076_7.cs"), read_particles(folder / "empiar_10076_7.star")
        assert ours.pixel_size == pytest.approx(theirs.pixel_size, rel=1e-6)
        for name in ("defocus_u", "defocus_v", "defocus_angle", "voltage_kV", "cs_mm", "amplitude_contrast"):
            assert torch.allclose(getattr(ours.ctf, name), getattr(theirs.ctf, name), rtol=1e-6), name


class TestFlip:
    """A mirrored image is a projection of the same map, seen from the other side."""

    def test_points_land_where_the_mirror_puts_them(self, tmp_path):
        path = save(tmp_path / "a.cs", fields())
        plain, mirrored = read_cs(path), read_cs(path, flip_y=True)
        points = torch.randn(5, 3, generator=torch.Generator().manual_seed(0))
        a, b = plain.poses, mirrored.poses
        seen = points @ a.rotations[:, :2].mT - a.shifts_A[:, None]
        seen_mirrored = points @ b.rotations[:, :2].mT - b.shifts_A[:, None]
        assert torch.allclose(seen_mirrored, seen * torch.tensor([1.0, -1.0]), atol=1e-5)
        assert torch.allclose(torch.linalg.det(b.rotations), torch.ones(3), atol=1e-5)

    def test_ctf_is_mirrored(self, tmp_path):
        path = save(tmp_path / "a.cs", fields())
        plain, mirrored = read_cs(path).ctf, read_cs(path, flip_y=True).ctf
        # An odd size has no Nyquist row, which would be its own mirror image.
        rows = torch.arange(33) * -1 % 33
        expected = ctf((33, 33), **plain.for_ctf())[:, rows]
        # Angles are rounded to 1e-6°, 2e-8 rad of a phase of some hundred radians.
        assert torch.allclose(ctf((33, 33), **mirrored.for_ctf()), expected, atol=1e-4)
        odd, odd_mirrored = plain.for_odd_aberrations(), mirrored.for_odd_aberrations()
        assert odd is not None
        assert odd_mirrored is not None
        expected = odd_aberration_phase((33, 33), **odd)[:, rows]
        assert torch.allclose(odd_aberration_phase((33, 33), **odd_mirrored), expected, atol=1e-4)

    def test_coordinates_and_records(self, tmp_path):
        mirrored = read_cs(save(tmp_path / "a.cs", fields()), flip_y=True)
        assert mirrored.rows["rlnCoordinateX"].to_list() == [500.0, 1000.0, 1500.0]
        assert mirrored.rows["rlnCoordinateY"].to_list() == [899.0, 499.0, 749.0]
        assert mirrored.optics["hmFlippedY"].to_list() == [True] * 2
        assert "rlnImageName" not in mirrored.rows.columns
        assert mirrored.rows["rlnImageOriginalName"][0] == "000001@J1/extract/a.mrc"

    def test_needs_the_micrograph(self, tmp_path):
        path = save(tmp_path / "a.cs", only(fields(), "blob", "ctf", "alignments3D"))
        with pytest.raises(TableError, match="location/micrograph_shape"):
            read_cs(path, flip_y=True)


class TestPassthrough:
    def split(self, folder):
        values = fields()
        main = save(folder / "P1_J24_004_particles.cs", only(values, "alignments3D", "blob"))
        rest = only(values, "ctf", "location")
        more = {name: np.concatenate([array[::-1], array[:1]]) for name, array in rest.items()}
        more["uid"][-1] = 7
        return main, more, values

    def test_found_beside_the_file_and_joined_by_uid(self, tmp_path):
        main, rest, values = self.split(tmp_path)
        save(tmp_path / "P1_J24_passthrough_particles.cs", rest)
        save(tmp_path / "P1_J25_passthrough_particles.cs", only(fields(1), "ctf"))
        whole = read_cs(save(tmp_path / "whole.cs", values))
        joined = read_cs(main)
        assert joined.rows.equals(whole.rows)
        assert joined.optics.equals(whole.optics)

    def test_given(self, tmp_path):
        main, rest, values = self.split(tmp_path)
        other = save(tmp_path / "elsewhere.cs", rest)
        assert read_cs(main, passthrough=[other]).rows.equals(read_cs(save(tmp_path / "w.cs", values)).rows)

    def test_missing(self, tmp_path):
        main, _, _ = self.split(tmp_path)
        words = r"no ctf/accel_kv, ctf/cs_mm.*passthrough_particles\.cs"
        with pytest.raises(TableError, match=words) as caught:
            read_cs(main)
        assert caught.value.path == main
        bare = save(tmp_path / "J3_particles.cs", only(fields(), "alignments3D"))
        with pytest.raises(TableError, match=r"no blob/path, blob/idx.*ctf/accel_kv"):
            read_cs(bare)

    def test_of_another_job(self, tmp_path):
        main, rest, _ = self.split(tmp_path)
        other = save(tmp_path / "other.cs", {name: array[:2] for name, array in rest.items()})
        with pytest.raises(TableError, match="1 of 3 items are missing") as caught:
            read_cs(main, passthrough=[other])
        assert caught.value.path == other


class TestKinds:
    def test_picked_particles(self, tmp_path):
        particles = read_cs(save(tmp_path / "a.cs", only(fields(), "location", "ctf")))
        assert isinstance(particles, ParticleSet)
        assert "rlnImageName" not in particles.rows.columns
        assert particles.rows["rlnCoordinateX"].to_list() == [500.0, 1000.0, 1500.0]

    def test_micrographs(self, tmp_path):
        values = only(fields(), "ctf/df", "ctf/amp", "ctf/exp")
        values["micrograph_blob/path"] = np.array([b"a.mrc", b"b.mrc", b"c.mrc"])
        values["micrograph_blob/psize_A"] = np.full(3, 1.06, np.float32)
        values["mscope_params/accel_kv"] = np.full(3, 200, np.float32)
        values["mscope_params/cs_mm"] = np.full(3, 2.7, np.float32)
        micrographs = read_cs(save(tmp_path / "a.cs", values))
        assert isinstance(micrographs, MicrographSet)
        assert micrographs.pixel_size == 1.06
        assert micrographs.ctf.voltage_kV.tolist() == [200.0] * 3
        assert micrographs.rows["rlnMicrographName"].to_list() == ["a.mrc", "b.mrc", "c.mrc"]

    def test_movies_and_lone_poses(self, tmp_path):
        values = only(fields(), "ctf") | {"movie_blob/path": np.array([b"a", b"b", b"c"])}
        with pytest.raises(TableError, match="movies"):
            read_cs(save(tmp_path / "a.cs", values))

    def test_divided_exposure_group_and_kept_aberrations(self, tmp_path, caplog):
        values = fields()
        values["ctf/trefoil_A"] = np.array([[1, 2], [0, 0], [3, 4]], np.float32)
        with caplog.at_level(logging.WARNING, logger="halfmap"):
            particles = read_cs(save(tmp_path / "a.cs", values))
        assert "ctf/trefoil_A are kept but not applied" in caplog.text
        names = particles.optics["rlnOpticsGroupName"].to_list()
        assert names == ["exposureGroup5_1", "exposureGroup23", "exposureGroup5_2"]
        assert particles.optics["hmTrefoil"].to_list() == ["[1,2]", "[0,0]", "[3,4]"]


class TestRefused:
    @pytest.mark.parametrize(
        ("change", "words"),
        [
            ({"uid": None}, "no field uid"),
            ({"blob/shape": np.full(3, 64, np.uint32)}, "field blob/shape is of type"),
            ({"ctf/df1_A": np.array([b"a"] * 3)}, "field ctf/df1_A is of type"),
            ({"blob/path": np.arange(3)}, "field blob/path is of type"),
            ({"blob/path": np.array([b"\xff"] * 3)}, "field blob/path is of type"),
            ({"blob/psize_A": np.array([1, np.nan, 1], np.float32)}, "_rlnImagePixelSize .* is nan"),
        ],
    )
    def test_fields(self, tmp_path, change, words):
        values = {name: array for name, array in (fields() | change).items() if array is not None}
        path = tmp_path / "a.cs"
        if "uid" in values:
            save(path, values)
        else:
            save(path, {"uid": values["blob/idx"]})
            records = np.load(path)
            records.dtype.names = ("other",)
            with path.open("wb") as file:
                np.save(file, records)
        with pytest.raises(HalfmapError, match=words) as caught:
            read_cs(path)
        assert caught.value.path == path

    def test_files(self, tmp_path):
        path = tmp_path / "a.cs"
        with pytest.raises(FileFormatError, match="No such file"):
            read_cs(path)
        for content in (b"", b"text", b"\x93NUMPY\x01\x00", b"PK\x03\x04"):
            path.write_bytes(content)
            with pytest.raises(FileFormatError, match="truncated or not"):
                read_cs(path)
        path.write_bytes(b"\x94CSDAT more")
        with pytest.raises(FileFormatError, match="compressed stream"):
            read_cs(path)
        whole = save(path, fields()).read_bytes()
        path.write_bytes(whole[:-10])
        with pytest.raises(FileFormatError, match="truncated or not"):
            read_cs(path)
        with path.open("wb") as file:
            np.save(file, np.zeros(3))
        with pytest.raises(FileFormatError, match="without named fields"):
            read_cs(path)
        save(path, {name: array[:0] for name, array in fields().items()})
        with pytest.raises(TableError, match="no items"):
            read_cs(path)

    @given(
        st.lists(st.tuples(st.integers(0, 2_500), st.binary(min_size=1, max_size=4)), max_size=4),
        st.integers(0, 3_000),
    )
    @settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
    def test_mutated_file(self, tmp_path, edits, length):
        whole = bytearray(save(tmp_path / "whole.cs", fields()).read_bytes())
        for position, patch in edits:
            whole[position : position + len(patch)] = patch
        path = tmp_path / "mutated.cs"
        path.write_bytes(whole[: length or None])
        try:
            read_cs(path)
        except HalfmapError:
            return


class TestWriting:
    @pytest.mark.parametrize("name", FILES)
    def test_real_files_come_back(self, shared_data, tmp_path, name):
        particles = read_cs(shared_data / name)
        assert isinstance(particles, ParticleSet)
        assert len(particles) == FILES[name]
        write_cs(tmp_path / "copy.cs", particles)
        copy = read_cs(tmp_path / "copy.cs")
        assert isinstance(copy, ParticleSet)
        assert copy.optics.equals(particles.optics)
        exact = ["hmCryosparcUid", "rlnImageName", "rlnOpticsGroup", "rlnDefocusU", "rlnDefocusV"]
        assert copy.rows.select(exact).equals(particles.rows.select(exact))
        if "rlnAngleRot" in particles.rows.columns:
            a, b = particles.poses, copy.poses
            # cryoSPARC stores radians and pixels in single precision, up to pi and some 20.
            assert angular_distance(a.rotations.double(), b.rotations.double()).max() < 5e-5
            assert (a.shifts_A - b.shifts_A).abs().max() < 1e-4

    def test_random_particles_come_back(self, tmp_path):
        n = 200
        generator = torch.Generator().manual_seed(2)
        angles = 360 * torch.rand(n, 3, generator=generator, dtype=torch.float64) - 180
        # Half turns and the identity are where rotation vectors are delicate.
        angles[:4] = torch.tensor([[0, 0, 0], [180, 0, 0], [0, 180, 0], [90, 180, 45]])
        rng = np.random.default_rng(0)
        optics = pl.DataFrame(
            {
                "rlnOpticsGroup": [3, 8],
                "rlnVoltage": [300.0, 200.0],
                "rlnSphericalAberration": [2.7, 0.01],
                "rlnAmplitudeContrast": [0.1, 0.07],
                "rlnImagePixelSize": [0.83, 1.1],
                "rlnImageSize": [256, 128],
                "rlnBeamTiltX": [0.12, -0.4],
                "rlnBeamTiltY": [0.0, 0.3],
                "rlnMagMat00": [1.002, 1.0],
                "rlnMagMat01": [0.001, 0.0],
                "rlnMagMat10": [-0.003, 0.0],
                "rlnMagMat11": [0.999, 1.0],
            }
        )
        rows = pl.DataFrame(
            {
                "rlnImageName": [f"{i + 1}@Extract/job003/stack {i % 3}.mrcs" for i in range(n)],
                "rlnOpticsGroup": rng.choice([3, 8], n),
                "rlnAngleRot": angles[:, 0].numpy(),
                "rlnAngleTilt": angles[:, 1].abs().numpy(),
                "rlnAnglePsi": angles[:, 2].numpy(),
                "rlnOriginXAngst": rng.normal(0, 5, n),
                "rlnOriginYAngst": rng.normal(0, 5, n),
                "rlnDefocusU": rng.uniform(10_000, 20_000, n),
                "rlnDefocusV": rng.uniform(9_000, 10_000, n),
                "rlnDefocusAngle": rng.uniform(-90, 90, n),
                "rlnPhaseShift": rng.uniform(0, 90, n),
                "rlnCtfBfactor": rng.uniform(0, 90, n),
                "rlnCtfScalefactor": rng.uniform(0.5, 1, n),
                "rlnRandomSubset": rng.choice([1, 2], n),
            }
        )
        particles = ParticleSet(optics, rows)
        write_cs(tmp_path / "a.cs", particles)
        copy = read_cs(tmp_path / "a.cs")
        assert isinstance(copy, ParticleSet)
        expected = from_euler(torch.tensor(rows.select("^rlnAngle.*$").to_numpy()))
        assert angular_distance(copy.poses.rotations.double(), expected).max() < 5e-5
        assert (copy.poses.shifts_A - particles.poses.shifts_A).abs().max() < 1e-5
        for name in ("voltage_kV", "cs_mm", "amplitude_contrast", "pixel_size", "defocus_u", "defocus_v"):
            assert torch.equal(getattr(copy.ctf, name), getattr(particles.ctf, name)), name
        for name in ("defocus_angle", "phase_shift", "b_factor", "scale", "beam_tilt_mrad", "magnification"):
            found, expected = getattr(copy.ctf, name), getattr(particles.ctf, name)
            assert torch.allclose(found, expected, rtol=1e-5, atol=1e-6), name
        assert copy.rows["rlnRandomSubset"].equals(rows["rlnRandomSubset"])
        assert copy.rows["hmCryosparcUid"].n_unique() == n
        assert copy.rows["rlnImageName"][10] == "000011@Extract/job003/stack 1.mrcs"

    def test_through_a_star_file(self, tmp_path):
        values = fields() | {"ctf/tetra_A": np.arange(12, dtype=np.float32).reshape(3, 4)}
        particles = read_cs(save(tmp_path / "a.cs", values), flip_y=True)
        assert isinstance(particles, ParticleSet)
        write_particles(tmp_path / "a.star", particles)
        copy = read_particles(tmp_path / "a.star")
        assert copy.optics.equals(particles.optics)
        assert copy.rows.equals(particles.rows)

    def test_names_that_are_no_stack(self, tmp_path):
        particles = read_cs(save(tmp_path / "a.cs", fields()))
        assert isinstance(particles, ParticleSet)
        for name in ("a.mrcs", "x@a.mrcs", "0@a.mrcs"):
            bad = particles.with_columns(pl.Series("rlnImageName", ["1@a.mrcs", name, "2@a.mrcs"]))
            with pytest.raises(TableError, match="not index@stack") as caught:
                write_cs(tmp_path / "b.cs", bad)
            assert caught.value.row == 2
            assert not (tmp_path / "b.cs").exists()

    def test_warns_of_what_has_no_place(self, tmp_path, caplog):
        particles = read_cs(save(tmp_path / "a.cs", fields()))
        assert isinstance(particles, ParticleSet)
        optics = particles.optics.with_columns(rlnOddZernike=pl.lit("[0.1,0.2]"))
        with caplog.at_level(logging.WARNING, logger="halfmap"):
            write_cs(tmp_path / "b.cs", ParticleSet(optics, particles.rows))
        assert "no place for rlnOddZernike" in caplog.text
