"""Sets of particles and micrographs: what they refuse, their tensor views, and the way back."""

from __future__ import annotations

import dataclasses
import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import polars as pl
import pytest
import torch

from halfmap.data import MicrographSet, MovieSet, ParticleSet
from halfmap.data.ctf import CTFParameters
from halfmap.data.optics import add_optics
from halfmap.data.poses import Poses
from halfmap.data.volume import Volume
from halfmap.errors import HalfmapError, ParameterError, ShapeError, TableError
from halfmap.ops.ctf import ctf, odd_aberration_phase
from halfmap.ops.rotations import angular_distance, random_rotations

PATH = Path("Extract/job003/particles.star")

OPTICS = pl.DataFrame(
    {
        "rlnOpticsGroup": [1, 2],
        "rlnOpticsGroupName": ["a", "b"],
        "rlnVoltage": [300.0, 200.0],
        "rlnSphericalAberration": [2.7, 2.0],
        "rlnAmplitudeContrast": [0.1, 0.07],
        "rlnImagePixelSize": [1.25, 1.25],
        "rlnImageSize": [64, 64],
        "rlnBeamTiltX": [0.5, 0.0],
        "rlnBeamTiltY": [-0.25, 0.0],
        "rlnOddZernike": ["[0.5,-1]", "[]"],
        "rlnEvenZernike": ["[]", "[0,0,0.25]"],
        "rlnMagMat00": [1.01, 1.0],
        "rlnMagMat01": [0.0, 0.0],
        "rlnMagMat10": [0.02, 0.0],
        "rlnMagMat11": [0.99, 1.0],
    }
)

ROWS = pl.DataFrame(
    {
        "rlnImageName": ["000001@a.mrcs", "000002@a.mrcs", "000001@b.mrcs"],
        "rlnOpticsGroup": [2, 1, 2],
        "rlnAngleRot": [10.0, -20.0, 30.0],
        "rlnAngleTilt": [90.0, 45.0, 10.0],
        "rlnAnglePsi": [-170.0, 0.0, 60.0],
        "rlnOriginXAngst": [1.5, 0.0, -2.0],
        "rlnOriginYAngst": [0.25, -3.0, 0.0],
        "rlnDefocusU": [15_000.0, 12_000.0, 9_000.0],
        "rlnDefocusV": [14_500.0, 12_500.0, 9_000.0],
        "rlnDefocusAngle": [30.0, 40.0, 0.0],
        "rlnPhaseShift": [0.0, 90.0, 0.0],
        "rlnRandomSubset": [1, 2, 1],
        "mine": ["x", "y", "z"],
    }
)


def particles(rows: pl.DataFrame = ROWS, optics: pl.DataFrame = OPTICS) -> ParticleSet:
    return ParticleSet(optics, rows, PATH)


def with_value(table: pl.DataFrame, label: str, row: int, value: object) -> pl.DataFrame:
    values = table[label].to_list()
    values[row] = value
    return table.with_columns(pl.Series(label, values))


class TestRefused:
    @pytest.mark.parametrize(
        ("make", "row", "words"),
        [
            (lambda: particles(ROWS.clear()), None, "no particles"),
            (lambda: particles(optics=OPTICS.clear()), None, "no optics groups"),
            (lambda: particles(optics=OPTICS.drop("rlnOpticsGroup")), None, "lacks _rlnOpticsGroup"),
            (lambda: particles(ROWS.drop("rlnOpticsGroup")), None, "lack _rlnOpticsGroup"),
            (lambda: particles(with_value(ROWS, "rlnOpticsGroup", 1, 3)), 2, "group 3 is missing.*has 1, 2"),
            (lambda: particles(with_value(ROWS, "rlnOpticsGroup", 2, None)), 3, "None is missing"),
            (lambda: particles(ROWS.cast({"rlnOpticsGroup": pl.String})), None, "not whole numbers"),
            (lambda: particles(optics=with_value(OPTICS, "rlnOpticsGroup", 1, 1)), 1, "group 1 comes twice"),
            (lambda: particles(optics=with_value(OPTICS, "rlnImagePixelSize", 1, math.nan)), 2, "is nan"),
            (lambda: particles(optics=with_value(OPTICS, "rlnImagePixelSize", 1, 0.0)), 2, "is 0.0"),
            (lambda: particles(optics=with_value(OPTICS, "rlnVoltage", 0, None)), 1, "is None"),
            (lambda: particles(ROWS.drop("rlnImageName")), None, "_rlnImageName or _rlnMicrographName and"),
            (lambda: MicrographSet(OPTICS, ROWS, PATH), None, "micrographs lack _rlnMicrographName"),
            (lambda: MovieSet(OPTICS, ROWS, PATH), None, "movies lack _rlnMicrographMovieName"),
        ],
    )
    def test_on_construction(self, make, row, words):
        with pytest.raises(TableError, match=words) as caught:
            make()
        assert caught.value.row == row
        assert caught.value.path == PATH

    @pytest.mark.parametrize(
        ("rows", "optics", "use", "row", "words"),
        [
            (ROWS.drop("rlnAngleRot", "rlnAnglePsi"), OPTICS, "poses", None, "_rlnAngleRot.*refine"),
            (with_value(ROWS, "rlnAngleTilt", 2, math.nan), OPTICS, "poses", 3, "_rlnAngleTilt is nan"),
            (with_value(ROWS, "rlnOriginXAngst", 1, math.inf), OPTICS, "poses", 2, "_rlnOriginXAngst is inf"),
            (ROWS.drop("rlnDefocusU"), OPTICS, "ctf", None, "_rlnDefocusU.*estimate the CTF"),
            (with_value(ROWS, "rlnDefocusV", 0, math.nan), OPTICS, "ctf", 1, "_rlnDefocusV is nan"),
            (ROWS, OPTICS.drop("rlnVoltage"), "ctf", None, "add _rlnVoltage to the optics table"),
            (ROWS, with_value(OPTICS, "rlnOddZernike", 0, "[x]"), "ctf", None, "not a vector"),
            (ROWS, OPTICS.drop("rlnImagePixelSize"), "pixel_size", None, "add _rlnImagePixelSize"),
            (ROWS, with_value(OPTICS, "rlnImagePixelSize", 0, 1.5), "pixel_size", None, "1.25, 1.5; split"),
            (ROWS, with_value(OPTICS, "rlnImageSize", 0, 32), "box_size", None, "differs.*32, 64"),
        ],
    )
    def test_where_a_value_is_needed(self, rows, optics, use, row, words):
        with pytest.raises(TableError, match=words) as caught:
            getattr(particles(rows, optics), use)
        assert caught.value.row == row

    def test_half_sets(self):
        with pytest.raises(TableError, match="split the particles"):
            particles(ROWS.drop("rlnRandomSubset")).half(1)
        with pytest.raises(TableError, match="not 1 or 2") as caught:
            particles(with_value(ROWS, "rlnRandomSubset", 1, 0)).half(1)
        assert caught.value.row == 2
        with pytest.raises(TableError, match="no particles"):
            particles(with_value(ROWS, "rlnRandomSubset", 1, 1)).half(2)


class TestSelection:
    def test_masks_of_any_kind(self):
        table = particles()
        wanted = ["000001@a.mrcs", "000001@b.mrcs"]
        mask = [True, False, True]
        for form in (pl.Series(mask), np.array(mask), torch.tensor(mask), pl.col("rlnOpticsGroup") == 2):
            selected = table.select(form)
            assert selected.rows["rlnImageName"].to_list() == wanted
            assert selected.optics.equals(OPTICS)
            assert selected.path is None

    @pytest.mark.parametrize("mask", [np.array([True]), np.array([0, 1, 1])])
    def test_masks_that_do_not_fit(self, mask):
        with pytest.raises(ParameterError):
            particles().select(mask)

    def test_halves(self):
        table = particles()
        assert table.half(1).rows["mine"].to_list() == ["x", "z"]
        assert table.half(2).rows["mine"].to_list() == ["y"]

    def test_mixed_groups_that_are_not_used_do_not_matter(self):
        table = particles(optics=with_value(OPTICS, "rlnImagePixelSize", 0, 1.5))
        assert table.select(pl.col("rlnOpticsGroup") == 2).pixel_size == 1.25

    def test_columns_of_rows_come_before_those_of_optics(self):
        table = particles(ROWS.with_columns(rlnVoltage=pl.Series([100.0, 120.0, 80.0])))
        assert table.column("rlnVoltage").to_list() == [100.0, 120.0, 80.0]
        assert particles().column("rlnVoltage").to_list() == [200.0, 300.0, 200.0]
        assert particles().column("none", default=1.0).to_list() == [1.0] * 3


class TestPoses:
    def test_values(self):
        poses = particles().poses
        assert poses.rotations.dtype == torch.float32
        assert torch.allclose(
            poses.euler, torch.tensor(ROWS.select("^rlnAngle.*$").to_numpy()).float(), atol=1e-4
        )
        assert poses.shifts_A.tolist() == [[1.5, 0.25], [0.0, -3.0], [-2.0, 0.0]]
        # psi 0, tilt 45, rot -20: the view direction is the third row.
        tilt, rot = math.radians(45), math.radians(-20)
        expected = [math.sin(tilt) * math.cos(rot), math.sin(tilt) * math.sin(rot), math.cos(tilt)]
        assert poses.rotations[1, 2].tolist() == pytest.approx(expected, abs=1e-6)

    def test_back_and_forth_keeps_other_columns(self):
        table = particles()
        same = table.with_poses(table.poses)
        assert same.rows.columns == table.rows.columns
        assert same.rows.drop("^rlnAngle.*$").equals(table.rows.drop("^rlnAngle.*$"))
        for label in ("rlnAngleRot", "rlnAngleTilt", "rlnAnglePsi"):
            # Single precision: 2^-24 of a matrix entry of one, as an angle, a few of them added.
            assert (same.rows[label] - table.rows[label]).abs().max() < 2e-5

    def test_other_poses_in_double_precision(self):
        rotations = random_rotations(3, generator=torch.Generator().manual_seed(1)).double()
        shifts = torch.tensor([[0.1, 0.2], [1 / 3, -5.0], [0.0, 1e-9]], dtype=torch.float64)
        table = particles(ROWS.with_columns(rlnOriginX=pl.lit(3.0))).with_poses(Poses(rotations, shifts))
        assert "rlnOriginX" not in table.rows.columns
        assert table.rows.select("rlnOriginXAngst", "rlnOriginYAngst").to_numpy().tolist() == shifts.tolist()
        assert angular_distance(table.poses.rotations.double(), rotations).max() < 1e-4

    def test_what_is_said_of_poses_goes_with_them(self):
        said = {"hmAngleViewError": 0.5, "hmOriginError": 0.2, "rlnMaxValueProbDistribution": 0.9}
        table = particles(ROWS.with_columns(**{label: pl.lit(value) for label, value in said.items()}))
        assert table.with_poses(table.poses).rows.columns == ROWS.columns

    def test_pixel_origins_of_old_tables(self):
        rows = ROWS.drop("rlnOriginXAngst", "rlnOriginYAngst").with_columns(rlnOriginX=2.0, rlnOriginY=-4.0)
        assert particles(rows).poses.shifts_A.tolist() == [[2.5, -5.0]] * 3

    def test_psi_alone_and_no_origins(self):
        rows = ROWS.drop("rlnAngleRot", "rlnAngleTilt", "rlnOriginXAngst", "rlnOriginYAngst")
        poses = particles(rows).poses
        assert poses.euler[:, 2].tolist() == pytest.approx([-170.0, 0.0, 60.0], abs=1e-4)
        assert not poses.shifts_A.any()

    def test_wrong_shapes(self):
        table = particles()
        with pytest.raises(ShapeError, match="2 poses for 3 particles"):
            table.with_poses(table.poses[:2])
        with pytest.raises(ShapeError):
            Poses(torch.zeros(2, 3, 3), torch.zeros(3, 2))


class TestCtf:
    def test_values(self):
        params = particles().ctf
        assert params.voltage_kV.tolist() == [200.0, 300.0, 200.0]
        assert params.cs_mm.tolist() == pytest.approx([2.0, 2.7, 2.0])
        assert params.amplitude_contrast.tolist() == pytest.approx([0.07, 0.1, 0.07])
        assert params.pixel_size.tolist() == [1.25] * 3
        assert params.phase_shift.tolist() == [0.0, 90.0, 0.0]
        assert params.b_factor.tolist() == [0.0] * 3
        assert params.scale.tolist() == [1.0] * 3
        assert params.beam_tilt_mrad.tolist() == [[0.0, 0.0], [0.5, -0.25], [0.0, 0.0]]
        assert params.odd_zernike.tolist() == [[0.0, 0.0], [0.5, -1.0], [0.0, 0.0]]
        assert params.even_zernike.tolist() == [[0.0, 0.0, 0.25], [0.0, 0.0, 0.0], [0.0, 0.0, 0.25]]
        assert torch.allclose(params.magnification[1], torch.tensor([[1.01, 0.0], [0.02, 0.99]]))

    def test_larger_defocus_comes_first(self):
        params = particles().ctf
        assert params.defocus_u.tolist() == [15_000.0, 12_500.0, 9_000.0]
        assert params.defocus_v.tolist() == [14_500.0, 12_000.0, 9_000.0]
        assert params.defocus_angle.tolist() == [30.0, -50.0, 0.0]

    def test_exchanged_defocus_is_the_same_ctf(self):
        table = particles()
        params = table.select(pl.col("mine") == "y").ctf
        optics = {"pixel_size": 1.25, "voltage_kV": 300.0, "cs_mm": 2.7, "amplitude_contrast": 0.1}
        as_in_file = {
            "defocus_u": 12_000.0,
            "defocus_v": 12_500.0,
            "defocus_angle": 40.0,
            "phase_shift": 90.0,
        }
        magnification = params.magnification[0].double()
        expected = ctf((64, 64), **optics, **as_in_file, magnification=magnification)
        found = ctf((64, 64), **params.for_ctf())[0]
        # The largest phase is about 220 rad; parameters carry 2^-24 of it.
        assert (found - expected).abs().max() < 5e-5

    def test_arguments_of_the_ctf(self):
        params = particles().ctf
        assert ctf((32, 32), **params.for_ctf()).shape == (3, 32, 17)
        odd = params.for_odd_aberrations()
        assert odd is not None
        assert odd_aberration_phase((32, 32), **odd).shape == (3, 32, 17)
        plain = params[torch.tensor([2])]
        assert plain.for_odd_aberrations() is None
        assert "magnification" not in plain.for_ctf()
        assert set(params.for_ctf()) - set(plain.for_ctf()) == {"magnification"}

    def test_back_and_forth_changes_nothing(self):
        rows = with_value(ROWS, "rlnDefocusU", 1, 12_500.123456789)
        table = particles(with_value(rows, "rlnDefocusV", 1, 12_000.0))
        same = table.with_ctf(table.ctf)
        assert same.optics.equals(table.optics)
        assert same.rows.select(table.rows.columns).equals(table.rows)
        assert same.rows["rlnCtfScalefactor"].to_list() == [1.0] * 3

    def test_new_values(self):
        table = particles()
        old = table.ctf
        tilts = torch.tensor([[0.3, 0.0], [0.1, 0.2], [0.3, 0.0]])
        new = dataclasses.replace(old, defocus_u=old.defocus_u + 100, beam_tilt_mrad=tilts)
        changed = table.with_ctf(new)
        assert changed.rows["rlnDefocusU"].to_list() == [15_100.0, 12_600.0, 9_100.0]
        assert changed.optics["rlnBeamTiltX"].to_list() == [0.1, 0.3]
        assert changed.optics["rlnVoltage"].to_list() == [300.0, 200.0]
        assert torch.equal(changed.ctf.beam_tilt_mrad, tilts)

    def test_new_values_of_columns_that_were_not_there(self):
        table = particles(optics=OPTICS.drop("^rlnBeamTilt.$", "^rlnMagMat..$", "^rln.*Zernike$"))
        old = table.ctf
        zernike = torch.tensor([[0.5], [1.5], [0.5]])
        changed = table.with_ctf(dataclasses.replace(old, even_zernike=zernike))
        assert changed.optics["rlnEvenZernike"].to_list() == ["[1.5]", "[0.5]"]
        assert "rlnBeamTiltX" not in changed.optics.columns
        assert torch.equal(changed.ctf.even_zernike, zernike)

    def test_microscope_values_that_differ_within_a_group(self):
        table = particles()
        new = dataclasses.replace(table.ctf, voltage_kV=torch.tensor([200.0, 300.0, 120.0]))
        with pytest.raises(TableError, match="_rlnVoltage differs within optics group 2"):
            table.with_ctf(new)

    def test_wrong_shapes(self):
        table = particles()
        with pytest.raises(ShapeError, match="2 CTFs for 3 particles"):
            table.with_ctf(table.ctf[:2])
        with pytest.raises(ShapeError, match="scale of 3 images has the shape"):
            dataclasses.replace(table.ctf, scale=torch.ones(2))
        assert isinstance(table.ctf[1:], CTFParameters)
        assert len(table.ctf[1:]) == 2

    def test_micrographs(self):
        rows = ROWS.select("rlnOpticsGroup", "^rlnDefocus.*$", rlnMicrographName="rlnImageName")
        optics = OPTICS.rename({"rlnImagePixelSize": "rlnMicrographPixelSize"})
        micrographs = MicrographSet(optics, rows)
        assert micrographs.pixel_size == 1.25
        assert micrographs.ctf.pixel_size.tolist() == [1.25] * 3
        assert micrographs.with_ctf(micrographs.ctf).ctf.defocus_u.tolist() == [15_000.0, 12_500.0, 9_000.0]


class TestOldTables:
    ROWS = pl.DataFrame(
        {
            "rlnMicrographName": ["a", "b", "c", "d"],
            "rlnVoltage": [300.0, 200.0, 300.0, 300.0],
            "rlnMagnification": [10_000.0, 10_000.0, 10_000.0, 20_000.0],
            "rlnOriginX": [1.0, 2.0, 3.0, 4.0],
            "rlnOriginYPrior": [1.0, 1.0, 1.0, 1.0],
            "rlnDetectorPixelSize": [1.5, 1.5, 1.5, 1.5],
            "mine": [1, 2, 3, 4],
        }
    )

    def test_groups_and_units(self):
        optics, rows = add_optics(self.ROWS, pixel_column="rlnImagePixelSize")
        assert optics.to_dict(as_series=False) == {
            "rlnOpticsGroup": [1, 2, 3],
            "rlnOpticsGroupName": ["opticsGroup1", "opticsGroup2", "opticsGroup3"],
            "rlnVoltage": [300.0, 200.0, 300.0],
            "rlnMagnification": [10_000.0, 10_000.0, 20_000.0],
            "rlnDetectorPixelSize": [1.5, 1.5, 1.5],
            "rlnImagePixelSize": [1.5, 1.5, 0.75],
        }
        assert rows.to_dict(as_series=False) == {
            "rlnMicrographName": ["a", "b", "c", "d"],
            "rlnOriginXAngst": [1.5, 3.0, 4.5, 3.0],
            "rlnOriginYPriorAngst": [1.5, 1.5, 1.5, 0.75],
            "mine": [1, 2, 3, 4],
            "rlnOpticsGroup": [1, 2, 1, 3],
        }

    def test_without_a_pixel_size_origins_stay_in_pixels(self):
        optics, rows = add_optics(self.ROWS.drop("rlnMagnification"), pixel_column="rlnImagePixelSize")
        assert "rlnImagePixelSize" not in optics.columns
        assert rows["rlnOriginX"].to_list() == [1.0, 2.0, 3.0, 4.0]

    def test_nothing_of_the_microscope_known(self):
        optics, rows = add_optics(self.ROWS.select("rlnMicrographName"), pixel_column="rlnImagePixelSize")
        assert optics.rows() == [(1, "opticsGroup1")]
        assert rows["rlnOpticsGroup"].to_list() == [1] * 4

    def test_group_numbers_without_an_optics_table(self):
        numbered = self.ROWS.with_columns(rlnOpticsGroup=pl.Series([7, 8, 9, 7]))
        optics, rows = add_optics(numbered.select("rlnMicrographName", "rlnOpticsGroup"), pixel_column="x")
        assert optics["rlnOpticsGroup"].to_list() == [1, 2, 3]
        assert rows["rlnOpticsGroup"].to_list() == [1, 2, 3, 1]


class TestVolume:
    def test_sizes(self):
        volume = Volume(torch.zeros(4, 4, 4), 1.5)
        assert volume.shape == (4, 4, 4)
        assert volume.box_size == 4
        with pytest.raises(ShapeError, match="not a cube"):
            _ = Volume(torch.zeros(4, 5, 4), 1.5).box_size

    @pytest.mark.parametrize(
        ("shape", "pixel_size"), [((4, 4), 1.0), ((0, 4, 4), 1.0), ((4, 4, 4), 0.0), ((4, 4, 4), math.nan)]
    )
    def test_refused(self, shape, pixel_size):
        with pytest.raises(HalfmapError):
            Volume(torch.zeros(shape), pixel_size)


def test_tables_do_not_import_torch():
    modules = (
        "halfmap.data.sets, halfmap.data.ctf, halfmap.data.volume, halfmap.io.tables, halfmap.io.cryosparc"
    )
    code = f"import sys, {modules}; sys.exit('torch' in sys.modules or 'numba' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
