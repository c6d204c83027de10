"""Maps that other programs make for us, and we for RELION: the same files, and nobody's data in another's."""

from __future__ import annotations

import os
import pickle
import shutil
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from pose_simulation import Particle, simulate

from halfmap.cli import main
from halfmap.errors import FileFormatError, ParameterError
from halfmap.io.mrc import read_header, read_mrc, write_mrc
from halfmap.io.star import read_star
from halfmap.ops.fsc import fsc as correlation_of
from halfmap.ops.masks import soft_sphere
from halfmap.search.backprojector import Backprojection
from halfmap.search.disc import FourierDisc
from halfmap.search.halfmaps import HalfSums, solved
from halfmap.search.regularise import Evidence
from halfmap.search.regularise.external import FOLDER, VARIABLE, External
from halfmap.search.regularise.external_files import read, write
from halfmap.search.regularise.fsc import fsc
from halfmap.search.regularise.named import Named, Settings, find
from halfmap.search.stored_sums import StoredSums, store

BOX, RADIUS, PIXEL = 24, 9, 4.0
PARTICLE = Particle.random(BOX, count=30, radius_px=6.0)

WIENER = '''#!{python}
"""As RELION would do it, by nobody's code but this."""
import sys
import numpy as np

lines = [line.split() for line in open(sys.argv[-1]) if line.strip()]
value = {{words[0][1:]: words[1] for words in lines if words[0].startswith("_rln")}}
tau2 = np.array([float(words[1]) for words in lines if len(words) == 3 and words[0].isdigit()])
box, padding = int(value["rlnOriginalImageSize"]), float(value["rlnPaddingFactor"])
n = round(box * padding)
real, imaginary, weight = (
    np.fromfile(value["rlnExtRecons" + name], "f4", offset=1024).reshape(n, n, n // 2 + 1).astype("f8")
    for name in ("DataReal", "DataImag", "Weight")
)
k = np.fft.fftfreq(n, 1 / n)
k2 = k[:, None, None] ** 2 + k[:, None] ** 2 + np.arange(n // 2 + 1) ** 2
shell = np.minimum(np.rint(np.sqrt(k2) / padding).astype(int), len(tau2) - 1)
power = padding**3 * tau2[shell]
known = (power > 0) & (weight > 0)
quotient = np.zeros(weight.shape, complex)
quotient[known] = (real + 1j * imaginary)[known] / (weight[known] + 1 / power[known])
volume = np.fft.fftshift(np.fft.irfftn(quotient, (n, n, n), (0, 1, 2))) * box**2
first = (n - box) // 2
inner = slice(first, first + box)
x = (np.arange(box) - box // 2) / n
volume = volume[inner, inner, inner]
volume /= np.sinc(np.sqrt(x[:, None, None] ** 2 + x[:, None] ** 2 + x**2)) ** 2
header = np.fromfile(value["rlnExtReconsDataReal"], "i4", 256)
header[:3] = header[7:10] = box
{more}
with open(value["rlnExtReconsResult"], "wb") as file:
    file.write(header.tobytes() + volume.astype("f4").tobytes())
'''


def program(folder: Path, more: str = "") -> str:
    path = folder / "a program.py"
    path.write_text(WIENER.format(python=sys.executable, more=more))
    path.chmod(0o755)
    return f"'{path}'"


def sums(seed: int, box: int = BOX) -> Backprojection:
    disc = FourierDisc(box, RADIUS)
    drawn = simulate(replace(PARTICLE, box=box), disc, 60, snr=0.3, seed=seed)
    made = Backprojection.empty(box, RADIUS)
    made.add(drawn.images, drawn.rotations, drawn.shifts_px)
    return made.symmetrised()


@pytest.fixture(scope="module")
def halves() -> tuple[Backprojection, Backprojection]:
    return sums(1), sums(2)


@pytest.fixture(scope="module")
def evidence(halves) -> Evidence:
    held = HalfSums.of(halves)
    agreed = torch.linspace(1, 0.1, RADIUS + 1)
    mask = soft_sphere((BOX,) * 3, radius=8.0, edge=3.0)
    return Evidence(held.unfiltered(), mask, agreed, held.prior(agreed), held.least, PIXEL, BOX, 10, "near")


def test_wieners_filter_of_another_program_is_ours(tmp_path, halves, evidence):
    filtered = External(tmp_path, 60.0, program(tmp_path))(evidence)(halves, "without_part1")
    for one, other in zip(filtered, fsc(evidence)(halves, ""), strict=True):
        assert float((one - other).abs().max() / other.std()) < 1e-4
    assert not (tmp_path / FOLDER).exists()


def test_sums_in_files_and_a_smaller_box(tmp_path, halves, evidence):
    """Maps of as much detail as there is are asked for in the images' box, and cut to their own."""
    held = []
    for number, half in enumerate(halves):
        sizes = store(tmp_path / f"{number}.npy", half)
        held.append(StoredSums.open([tmp_path / f"{number}.npy"], sizes))
    wide = replace(evidence, box=36)
    keep = f"import shutil; shutil.copy(sys.argv[-1], {str(tmp_path)!r})"
    filtered = External(tmp_path, 60.0, program(tmp_path, keep))(wide)((held[0], held[1]), "a")
    for one, other in zip(filtered, fsc(evidence)(halves, ""), strict=True):
        one, other = one * evidence.mask, other * evidence.mask
        assert float((one - other).square().mean().sqrt() / other.std()) < 0.01
        curve = correlation_of(one, other)[: RADIUS + 1]
        assert float(curve.min()) > 0.999
    asked = read(tmp_path / "run_it010_half2_class001_external_reconstruct.star")
    assert (asked.box, asked.current, asked.padding, asked.diameter) == (36, 2 * RADIUS, 2.0, 60.0)
    assert asked.pixel_size == pytest.approx(BOX * PIXEL / 36)


def test_files_are_relions(tmp_path, halves, evidence):
    copy = f"import shutil, os; shutil.copytree(os.path.dirname(sys.argv[-1]), {str(tmp_path / 'kept')!r})"
    made = External(tmp_path, 60.0, program(tmp_path, f"if '_half2_' in sys.argv[-1]:\n    {copy}"))
    made(evidence)(halves, "without_part3")
    stem = "run_it010_half2_class001_external_reconstruct"
    blocks = read_star(tmp_path / f"kept/{stem}.star")
    folder = (tmp_path / FOLDER / "it010_without_part3").resolve()
    assert blocks["external_reconstruct_general"] == {
        "rlnExtReconsDataReal": f"{folder}/{stem}_data_real.mrc",
        "rlnExtReconsDataImag": f"{folder}/{stem}_data_imag.mrc",
        "rlnExtReconsWeight": f"{folder}/{stem}_weight.mrc",
        "rlnExtReconsResult": f"{folder}/{stem}.mrc",
        "rlnExtReconsResultStarfile": f"{folder}/{stem}_out.star",
        "rlnTau2FudgeFactor": 1.0,
        "rlnPaddingFactor": 2.0,
        "rlnReferenceDimensionality": 3,
        "rlnOriginalImageSize": BOX,
        "rlnCurrentImageSize": 2 * RADIUS,
        "rlnPixelSize": PIXEL,
        "rlnParticleDiameter": 60.0,
    }
    table = blocks["external_reconstruct_tau2"]
    assert list(table["rlnSpectralIndex"]) == list(range(BOX // 2 + 1))
    assert np.allclose(table["rlnGoldStandardFsc"][: RADIUS + 1], evidence.correlation)
    assert table["rlnReferenceTau2"][BOX // 2] == 0
    assert read_header(tmp_path / f"kept/{stem}_weight.mrc").shape == (2 * BOX, 2 * BOX, BOX + 1)
    options = read_star(tmp_path / "kept/job.star")["joboptions_values"]
    assert dict(options.iter_rows())["fn_mask"] == f"{folder}/mask.mrc"
    mask = read_mrc(tmp_path / "kept/mask.mrc")
    assert np.abs(mask - evidence.mask.numpy()).max() < 1e-5


def test_half_sets_do_not_meet(tmp_path, halves, evidence):
    made = External(tmp_path, None, program(tmp_path))(evidence)
    before, after = made(halves, "a"), made((halves[0], sums(3)), "a")
    assert torch.equal(before[0], after[0])
    assert not torch.equal(before[1], after[1])


def test_both_run_at_the_same_time(tmp_path, halves, evidence):
    """Each waits for a sign of the other, as SIDESPLITTER's script does."""
    meet = """
import os, time
sign = sys.argv[-1].replace("_half1_", "_{}_").replace("_half2_", "_{}_")
mine = sys.argv[-1] + ".here"
other = mine.replace("_half1_", "_x_").replace("_half2_", "_half1_").replace("_x_", "_half2_")
open(mine, "w").close()
until = time.time() + 60
while not os.path.exists(other):
    assert time.time() < until
    time.sleep(0.02)
"""
    first, _ = External(tmp_path, None, program(tmp_path, meet))(evidence)(halves, "a")
    assert bool(torch.isfinite(first).all())


@pytest.mark.parametrize(
    ("more", "error", "said"),
    [
        ("sys.exit('no such weights')", ParameterError, "ended with code 1: no such weights; see "),
        ("sys.exit(0)", FileFormatError, "there is no such map; "),
        ("volume = volume[1:]; header[2] -= 1", FileFormatError, "is 23 × 24 × 24, and 24 × 24 × 24 are"),
        ("volume[3, 4, 5] = np.nan", FileFormatError, "holds values that are not numbers; "),
        ("volume = volume[:3]", FileFormatError, "class001_external_reconstruct.mrc: "),
    ],
)
def test_failures_are_told_and_what_was_said_is_kept(tmp_path, halves, evidence, more, error, said):
    with pytest.raises(error) as caught:
        External(tmp_path, None, program(tmp_path, more))(evidence)(halves, "a")
    assert said in str(caught.value)
    left = sorted(path.name for path in (tmp_path / FOLDER / "it010_a").iterdir())
    assert "run_it010_half1_class001.err" in left
    assert "run_it010_half1_class001.out" in left
    assert not [name for name in left if name.endswith(".mrc")]


def test_what_waits_for_a_failed_one_is_ended(tmp_path, halves, evidence):
    more = "import time\nif '_half1_' in sys.argv[-1]:\n    sys.exit(3)\nelse:\n    time.sleep(100)"
    began = time.monotonic()
    with pytest.raises(ParameterError, match="ended with code 3"):
        External(tmp_path, None, program(tmp_path, more))(evidence)(halves, "a")
    assert time.monotonic() - began < 30


def test_the_program_is_found(tmp_path, monkeypatch):
    monkeypatch.delenv(VARIABLE, raising=False)
    settings = Settings(tmp_path)
    with pytest.raises(
        ParameterError, match=f"--external-program, or in the environment variable {VARIABLE}"
    ):
        find("external", settings)
    with pytest.raises(ParameterError, match="no program 'no_such_program'"):
        find("external", replace(settings, external_program="no_such_program --gpu 0"))
    with pytest.raises(ParameterError, match="cannot be split"):
        find("external", replace(settings, external_program="'a"))
    monkeypatch.setenv(VARIABLE, "python3 'a b.py' --c")
    assert External(tmp_path).command() == ["python3", "a b.py", "--c"]
    assert External(tmp_path, None, "env x").command() == ["env", "x"]
    named = Named("external", settings)
    assert pickle.loads(pickle.dumps(named)) == named


def test_odd_transforms_are_refused(tmp_path, halves, evidence):
    made = Backprojection.empty(BOX, RADIUS, padding=1.5)
    with pytest.raises(ParameterError, match=r"padded by 1.5 cannot be given.*; give more memory"):
        write(
            tmp_path / "a",
            made,
            box=26,
            prior=evidence.prior[0],
            correlation=evidence.correlation,
            pixel_size=1.0,
            diameter=None,
        )


def asked(folder: Path, halves, evidence: Evidence, only: tuple[int, ...] = (0, 1)) -> list[Path]:
    """Files as RELION would write them."""
    return [
        write(
            folder / f"run_it010_half{half + 1}_class001_external_reconstruct",
            halves[half],
            box=BOX,
            prior=evidence.prior[half],
            correlation=evidence.correlation,
            pixel_size=PIXEL,
            diameter=60.0,
        ).star
        for half in only
    ]


def reconstruct(*words: object) -> int:
    return main(["external-reconstruct", *map(str, words)])


def result(star: Path) -> torch.Tensor:
    path = star.with_suffix(".mrc")
    assert read_header(path).require_pixel_size() == pytest.approx(PIXEL)
    return torch.from_numpy(np.array(read_mrc(path), np.float32))


def test_the_command_makes_what_is_asked_for(tmp_path, halves, evidence, monkeypatch):
    stars = asked(tmp_path, halves, evidence)
    before = set(tmp_path.iterdir())
    monkeypatch.chdir(tmp_path)
    # RELION puts the file behind all options.
    assert reconstruct("--threads", 1, stars[0].name) == 0
    # The sphere in the box is left.
    inside = soft_sphere((BOX,) * 3, radius=BOX / 2 - 1, edge=1.0) > 0.999
    expected = solved(halves[0], evidence.prior[0])
    found = result(stars[0])
    assert float((found - expected)[inside].abs().max() / expected.std()) < 1e-4
    assert float(found[:2, :2, :2].std() / found.std()) < 0.05
    assert set(tmp_path.iterdir()) - before == {stars[0].with_suffix(".mrc")}


@pytest.mark.parametrize("name", ["nonuniform", "sidesplitter"])
def test_filters_that_need_both_halves(tmp_path, halves, evidence, name):
    stars = asked(tmp_path, halves, evidence)
    mask = tmp_path / "mask.mrc"
    write_mrc(mask, evidence.mask.numpy(), pixel_size=PIXEL)
    for star in stars:
        assert reconstruct(star, "--regulariser", name, "--mask", mask) == 0
    agreed = replace(evidence, correlation=torch.nn.functional.pad(evidence.correlation, (0, 1), value=0.1))
    expected = find(name)(agreed)(halves, "")
    inside = soft_sphere((BOX,) * 3, radius=BOX / 2 - 1, edge=1.0) > 0.999
    for star, own in zip(stars, expected, strict=True):
        found = result(star)
        assert float(torch.corrcoef(torch.stack([found[inside], own[inside]]))[0, 1]) > 0.999
        scale = (found * own)[inside].sum() / own[inside].square().sum()
        assert float(scale) == pytest.approx(1, abs=0.01)


def test_the_other_half_is_waited_for(tmp_path, halves, evidence, capsys):
    [star] = asked(tmp_path, halves, evidence, only=(1,))
    words = star, "--regulariser", "sidesplitter"
    assert reconstruct(*words, "--wait", 0) == 2
    assert "half1_class001_external_reconstruct.star: of the other half set is not there" in (
        capsys.readouterr().err
    )
    assert not star.with_suffix(".mrc").exists()
    later = threading.Timer(1.0, lambda: asked(tmp_path, halves, evidence, only=(0,)))
    later.start()
    assert reconstruct(*words, "--wait", 60) == 0
    later.join()
    assert star.with_suffix(".mrc").exists()


def test_files_of_an_earlier_attempt_are_not_taken(tmp_path, halves, evidence, capsys):
    stars = asked(tmp_path, halves, evidence)
    os.utime(stars[0], (1, 1))
    (tmp_path / "run_it009_optimiser.star").write_text(
        "data_optimiser_general\n\n_rlnSolventMaskName None\n_rlnParticleDiameter 60\n"
    )
    assert reconstruct(stars[1], "--regulariser", "nonuniform", "--wait", 0) == 2
    assert "is of an earlier attempt" in capsys.readouterr().err


def test_the_joined_map_is_made_by_fsc(tmp_path, halves, evidence):
    [star] = asked(tmp_path, halves, evidence, only=(0,))
    joined = star.with_name(star.name.replace("_half1", ""))
    shutil.copy(star, joined)
    assert reconstruct(joined, "--regulariser", "sidesplitter", "--wait", 0) == 0
    assert star.with_suffix(".mrc").exists()


def test_what_relion_3_1_does_not_say_is_in_its_other_files(tmp_path, halves, evidence):
    [star] = asked(tmp_path, halves, evidence, only=(0,))
    star.write_text(
        "".join(
            line
            for line in star.read_text().splitlines(keepends=True)
            if "rlnPixelSize" not in line and "rlnParticleDiameter" not in line
        )
    )
    (tmp_path / "run_it009_half1_model.star").write_text(f"data_model_general\n\n_rlnPixelSize {PIXEL}\n")
    assert reconstruct(star) == 0
    result(star)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (("data_external_reconstruct_general", "data_other"), "is no file of RELION's that asks for"),
        (("_rlnOriginalImageSize ", "_rlnOther "), "lacks a number _rlnOriginalImageSize"),
        (("_rlnExtReconsWeight ", "_rlnOther "), "lacks _rlnExtReconsWeight"),
        (("_rlnReferenceTau2", "_rlnOther"), f"lacks _rlnReferenceTau2 of {BOX // 2 + 1} shells"),
        (("Dimensionality 3", "Dimensionality 2"), "asks for images"),
        (("PaddingFactor 2.0", "PaddingFactor 0.5"), "states sizes that cannot be"),
        (("PaddingFactor 2.0", "PaddingFactor 1.0"), "holds 48 × 48 × 25 values, not 24 × 24 × 13"),
        (("_weight.mrc", "_weights.mrc"), "_weights.mrc"),
    ],
)
def test_bad_input_is_one_sentence(tmp_path, halves, evidence, change, said, capsys):
    [star] = asked(tmp_path, halves, evidence, only=(0,))
    text = "\n".join(" ".join(line.split()) for line in star.read_text().splitlines())
    assert change[0] in text
    star.write_text(text.replace(*change) + "\n")
    assert reconstruct(star) == 2
    shown = capsys.readouterr().err
    assert said in shown
    assert shown.count("\n") == 1
    assert not star.with_suffix(".mrc").exists()


def test_no_program_calls_itself(tmp_path, halves, evidence):
    [star] = asked(tmp_path, halves, evidence, only=(0,))
    assert reconstruct(star, "--regulariser", "external") == 2
    assert reconstruct(tmp_path / "none.star") == 2
    assert reconstruct(star, "--regulariser", "fcs") == 2
    assert reconstruct(star, "--regulariser", "learned", "--weights", "none.npz") == 2
