"""The report of a project: what it counts, what it shows, and what it does where something is missing."""

from __future__ import annotations

import re
from html.parser import HTMLParser
from pathlib import Path

import made_project as made
import numpy as np
import pytest
from PIL import Image

from halfmap.cli import main
from halfmap.engine import Failure
from halfmap.errors import ParameterError, ProjectError
from halfmap.project import Project
from halfmap.steps.class2d.step import Class2DStep
from halfmap.steps.curate.step import CurateStep
from halfmap.steps.pick.step import PickBlob
from halfmap.steps.refine.step import RefineStep
from halfmap.steps.symmetry.step import SymmetryStep
from halfmap.workflow.record import RECORD_FILE, Decision, Record, Stage, write_record
from halfmap.workflow.report import page, write_report
from halfmap.workflow.report.page import read_story


class Parsed(HTMLParser):
    """What a page holds: its text without scripts and styles, and what its elements name."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.words: list[str] = []
        self.addresses: list[str] = []
        self.ids: list[str] = []
        self.tags: list[str] = []
        self._inside: list[str] = []
        self.feed(html)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self._inside.append(tag)
        for name, value in attrs:
            if name in ("src", "href", "srcset", "action", "data"):
                self.addresses.append(value)
            if name == "id":
                self.ids.append(value)

    def handle_endtag(self, tag):
        while self._inside and self._inside.pop() != tag:
            pass

    def handle_data(self, data):
        if not {"script", "style"} & set(self._inside):
            self.words.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.words).split())


def parsed(project: Project, wanted: str | None = None) -> Parsed:
    return Parsed(write_report(project, wanted).read_text(encoding="utf-8"))


def test_counts_of_every_stage_add_up_with_their_reasons(tmp_path):
    story = read_story(made.whole(tmp_path))
    found = [(count.node.number, count.unit, count.kept, dict(count.lost)) for count in story.counts]
    assert found == [
        (1, "movies", 4, {"failed": 1}),
        (2, "micrographs", 3, {"failed": 1}),
        (3, "micrographs", 3, {}),
        (4, "micrographs", 2, {"motion and tilt": 1}),
        (5, "picks", 100, {}),
        (
            6,
            "particles",
            83,
            {"too near to the edge": 12, "close to a better one": 2, "left out otherwise": 3},
        ),
        (7, "particles", 83, {}),
        (8, "particles", 70, {"in rejected classes": 10, "in kept classes, particle score below 0.3": 3}),
        (9, "particles", 70, {}),
    ]
    assert [count.given for count in story.counts] == [5, 4, 3, 3, 100, 100, 83, 83, 70]


def test_the_page_tells_of_every_job_and_of_what_came_out(tmp_path):
    found = parsed(made.whole(tmp_path))
    assert {f"job{i:03d}" for i in range(1, 12)} | {"counts", "jobs"} <= set(found.ids)
    assert "others" not in found.ids  # all jobs led to the result, or measured it
    assert "stopped" not in found.ids
    for words in (
        "6.10 Å 5.90 Å to 6.40 Å at 95 %",
        "17 lost: 12 too near to the edge; 3 left out otherwise; 2 close to a better one",
        "Particles of the half sets 35 and 35",
        "Symmetry D2",
        "Views & more Seen < often.",
        "Motion over all frames median 20, 10 to 60 Å",
        "B-factor for sharpening -90 Å²",
        "Classes kept 2 of 3",
        "--symmetry D2",
        "halfmap refine --particles Select/job008/particles.star --reference first.mrc --symmetry D2",
    ):
        assert words in found.text.replace("\N{NO-BREAK SPACE}", " "), words


def test_the_page_needs_no_other_file_and_asks_for_none(tmp_path):
    html = write_report(made.whole(tmp_path)).read_text(encoding="utf-8")
    found = Parsed(html)
    assert found.addresses
    inside = [a for a in found.addresses if a.startswith("data:")]
    links = [a[1:] for a in found.addresses if a.startswith("#")]
    assert len(inside) + len(links) == len(found.addresses)
    assert set(links) <= set(found.ids)
    assert len(found.ids) == len(set(found.ids))
    assert not {"link", "iframe", "object", "embed", "base"} & set(found.tags)
    assert not re.search(r"https?:|@import|url\(|fetch\(|XMLHttpRequest|WebSocket|import\(", html)


def test_names_of_files_are_no_markup(tmp_path):
    html = write_report(made.whole(tmp_path)).read_text(encoding="utf-8")
    assert made.ODD not in html
    assert f"{made.ODD}: is cut short" in Parsed(html).text


def test_it_begins_with_the_last_result_and_follows_it_back(tmp_path):
    project = made.whole(tmp_path)
    assert read_story(project).last.name == "Validate/job011/"
    story = read_story(project, "Class2D/job007")
    assert [node.number for node in story.nodes] == [1, 2, 3, 4, 5, 6, 7]
    assert [node.number for node in story.others] == [8, 9, 10, 11]
    for name in (
        "job007",
        "7",
        str(tmp_path / "Class2D/job007"),
        str(tmp_path / "Class2D/job007/model.star"),
    ):
        assert read_story(project, name).last.name == "Class2D/job007/"
    with pytest.raises(ProjectError, match="has no job 99"):
        read_story(project, "99")
    # A job that leads nowhere yet is no result.
    made.end(project, Class2DStep(particles=Path("Select/job008/particles.star")), status="Aborted")
    story = read_story(project)
    assert story.last.name == "Validate/job011/"
    assert "Later jobs did not end well: Class2D/job012 aborted" in parsed(project).text


def test_a_project_that_failed_tells_at_the_top_what_stopped_it(tmp_path):
    project = made.to_micrographs(tmp_path)
    step = CurateStep(micrographs=Path("Ctf/job003/micrographs_ctf.star"))
    rejected = made.micrographs(3, hmReason=["motion 60 above 50 Å (median 20)"] * 2 + ["no Thon rings"])
    job = made.end(project, step, status="Failed", micrographs_rejected=rejected)
    line = "2026-11-22 13:01:08,276 ERROR all 3 micrographs are rejected; give <wider> limits\n"
    (job.folder / "run.err").write_text(line)
    found = parsed(project)
    at = found.text.index("Where it stopped")
    assert at < found.text.index("What was kept and what was lost")
    assert (
        "Curate/job004 (curate) has failed: all 3 micrographs are rejected; give <wider> limits" in found.text
    )
    assert "halfmap resume Curate/job004" in found.text
    assert "3 lost: 2 motion; 1 no Thon rings" in found.text


def test_a_project_without_picks_says_so(tmp_path):
    project = made.to_micrographs(tmp_path)
    picks = {"rlnMicrographName": ["Motion/0.mrc"], "rlnMicrographCoordinates": ["0"]}
    table = made.pl.DataFrame(picks | {"hmPicks": [0], "hmPicksFalse": [0.0]})
    made.end(
        project,
        PickBlob(micrographs=Path("Ctf/job003/micrographs_ctf.star")),
        autopick={"coordinate_files": table},
    )
    assert "Pick/job004 (picks) leaves no picks." in parsed(project).text


def test_a_project_under_way_says_how_far_it_is(tmp_path):
    found = parsed(made.to_micrographs(tmp_path))
    assert "How far it is The project has come to CTF so far" in found.text


def test_jobs_of_relion_are_counted_and_shown(tmp_path):
    project = made.to_micrographs(tmp_path)
    node = {"Extract/job004/particles.star": "ParticleGroupMetadata.star.relion.extract"}
    folder = made.foreign(
        project, "Extract/job004/", "relion.extract", ["Ctf/job003/micrographs_ctf.star"], node
    )
    made.write_star(folder / "particles.star", made.particles(25))
    made.end(
        project,
        Class2DStep(particles=Path("Extract/job004/particles.star")),
        particles=made.particles(24),
        model={"model_general": {"rlnNrClasses": 1}},
    )
    story = read_story(project)
    assert [(c.node.number, c.kept, c.lost) for c in story.counts][-2:] == [
        (4, 25, ()),
        (5, 24, (("left out otherwise", 1),)),
    ]
    text = parsed(project).text
    assert "Extract/job004 · made by another program" in text
    assert "`which relion_preprocess` --i x.star" in text


def test_a_map_of_relion_s_is_shown(tmp_path):
    project = Project.open(tmp_path)
    star = "Refine3D/job001/run_data.star"
    kinds = {star: "ParticleGroupMetadata.star.relion.refine3d"}
    folder = made.foreign(project, "Refine3D/job001/", "relion.refine3d", [], kinds)
    made.write_star(folder / "run_data.star", made.particles(20, rlnRandomSubset=[1, 1, 1, 2] * 5))
    general = {"rlnCurrentResolution": 7.5, "rlnPixelSize": 2.5, "rlnOriginalImageSize": 48}
    made.write_star(folder / "run_model.star", {"model_general": general})
    made.write_mrc(folder / "run_class001.mrc", made.ball(), pixel_size=2.5, stack=False)
    found = parsed(project)
    assert "canvas" in found.tags
    text = found.text.replace("\N{NO-BREAK SPACE}", " ")
    assert "Resolution 7.50 Å FSC = 0.143" in text
    assert "Particles of the half sets 15 and 5" in text


def test_pictures_that_are_not_there_and_tables_that_cannot_be_read_leave_the_rest(tmp_path):
    project = made.whole(tmp_path)
    (tmp_path / "Motion/job002/summary.png").write_bytes(b"\x89PNG" + b"x" * 100_000)
    (tmp_path / "Ctf/job003/micrographs_ctf.star").write_bytes(b"\x00\xff")
    (tmp_path / "Refine/job009/model.star").unlink()
    (tmp_path / "Refine/job009/map.mrc").write_bytes(b"short")
    (tmp_path / "Validate/job011/findings.json").write_text("{")
    (tmp_path / "PostProcess/job010/job.json").write_text("{")
    found = parsed(project)
    assert "The picture summary.png is not there, or cannot be read." in found.text
    assert "canvas" not in found.tags
    assert "70 particles" in found.text


def test_folders_that_are_gone_are_told(tmp_path):
    project = made.whole(tmp_path)
    (tmp_path / "Extract/job006").rename(tmp_path / "away")
    found = parsed(project)
    assert "Extract/job006, folder gone" in found.text


def test_large_pictures_do_not_make_a_large_page(tmp_path, monkeypatch):
    project = made.whole(tmp_path)
    noise = np.random.default_rng(1).integers(0, 255, (600, 1000, 3), dtype=np.uint8)
    for name in ("Motion/job002", "Ctf/job003"):
        Image.fromarray(noise).save(tmp_path / name / "summary.png")
    sizes = []
    for most in (10**9, 600_000):
        monkeypatch.setattr(page, "_LARGEST_bytes", most)
        sizes.append(write_report(project).stat().st_size)
    assert sizes[0] > 1_000_000
    assert sizes[1] <= 600_000


def test_a_result_that_another_job_has_replaced_is_not_what_a_report_is_of(tmp_path):
    project = made.whole(tmp_path)
    write_record(tmp_path, Record({}, (Stage("validate", "", (), ("Validate/job011/",)),)))
    assert read_story(project).last.name != "Validate/job011/"


def test_decisions_of_the_chain_stand_with_their_job(tmp_path):
    project = made.whole(tmp_path)
    decision = Decision("diameter 130 Å", "from 161 <picks>", "--diameter")
    stages = (
        Stage("extract", "Extract/job006/", (decision,)),
        Stage("symmetry", "", (Decision("no search", "it is given"),)),
    )
    record = Record({"symmetry": "D2", "gain": None, "movies": ["a", "b"]}, stages)
    write_record(tmp_path, record)
    text = parsed(project).text
    at = text.index("Decided from the data")
    assert text.index("Extract/job006 · took") < at < text.index("Class2D/job007 · took")
    assert "diameter 130 Å from 161 <picks> --diameter" in text
    assert "The chain halfmap run was given: --symmetry D2 --movies a, b It left out:" in text
    assert "It left out: symmetry: no search: it is given" in text
    (tmp_path / RECORD_FILE).write_text("{")
    assert "Decided from the data" not in parsed(project).text


def with_symmetry(project: Project, *, search: bool = True) -> Project:
    """The same with the jobs of the chain that decided on the point group; nothing descends from them."""
    groups = {
        "rlnSymmetryGroup": ["C2", "C3", "D2"],
        "hmVerdict": ["nearly", "no", "no"],
        "hmWeakestCorrelation": [0.71, 0.3, 0.52],
    }
    scores = {"rlnSymmetryGroup": "C1", "hmSignalCorrelation": 0.9, "hmComparedResolution": 15.0}
    tables = {"symmetry_general": scores, "symmetry_groups": made.pl.DataFrame(groups)}
    made.end(project, SymmetryStep(map=Path("first.mrc")), symmetry=tables)
    for group in ("C1", "T"):
        particles = Path("Select/job008/particles.star")
        step = RefineStep(particles=particles, reference=Path("first.mrc"), symmetry=group)
        made.end(project, step, particles=made.particles(20))
    decision = Decision("symmetry C1", "no group makes particles surely likelier", "--symmetry GROUP")
    stages = (
        Stage("select", "Select/job008/"),
        Stage("abinitio-trial", "Refine/job013/"),
        Stage("symmetry", "Symmetry/job012/" if search else ""),
        Stage("round-T-trial", "Refine/job014/"),
        Stage("first-refine", "Refine/job009/", (decision,)),
    )
    write_record(project.root, Record({}, stages))
    return project


def test_the_search_for_a_point_group_is_told_of_though_no_map_comes_of_it(tmp_path):
    project = with_symmetry(made.whole(tmp_path))
    story = read_story(project)
    assert [node.number for node in story.nodes] == list(range(1, 13))
    assert story.others == []
    found = parsed(project)
    text = found.text.replace("\N{NO-BREAK SPACE}", " ")
    own = text[text.index("Symmetry/job012 · took") :]
    for words in (
        "Point group found none (C1)",
        "Nearest C2 0.71 (nearly), D2 0.52, C3 0.30",
        "Noise leaves of a perfect symmetry 0.90; a group needs 0.81",
        "Decided in the end: symmetry C1 : no group makes particles surely likelier.",
        "tried by refining a sample of the particles a little: C1 in Refine/job013, T in Refine/job014.",
        "Correlation of the map with itself",
    ):
        assert words in own, words
    assert "6.10 Å 5.90 Å to 6.40 Å at 95 %" in text, "trials are no result"
    # What ends before the search knows nothing of it.
    assert [node.number for node in read_story(project, "8").others] == [9, 10, 11, 12, 13, 14]


def test_trials_of_point_groups_are_told_of_where_none_was_looked_for(tmp_path):
    text = parsed(with_symmetry(made.whole(tmp_path), search=False)).text
    tried = text.index("Point groups tried by refining a sample of the particles a little")
    assert text.index("Refine/job009 · took") < tried < text.index("PostProcess/job010 · took")
    assert "Not part of what is shown: Symmetry/job012." in text


def test_tilt_and_cs_stand_with_their_errors(tmp_path):
    project = made.to_micrographs(tmp_path)
    columns = {
        "hmCtfProblem": ["none", "strong ice ring", "no Thon rings"],
        "rlnMicrographTiltAngle": [1.0, 9.0, 80.0],
        "hmTiltUncertainty": [0.8, 1.2, 26.0],
        "hmCtfCs": [2.6, 2.8, 7.0],
        "hmCtfCsUncertainty": [0.1, 0.1, float("nan")],
    }
    table = tmp_path / "Ctf/job003/micrographs_ctf.star"
    made.write_star(table, made.micrographs(3, **columns))
    text = parsed(project).text.replace("\N{NO-BREAK SPACE}", " ")
    assert "Tilt median 5, 1 to 9 °; standard error 1 °; beyond 3 standard errors in 1 of 2" in text
    assert "Cs at which the rings fit best 2.70 ± 0.1 mm (2.7 mm was used)" in text
    made.write_star(table, made.micrographs(3, rlnMicrographTiltAngle=[1.0, 9.0, 80.0]))
    text = parsed(project).text.replace("\N{NO-BREAK SPACE}", " ")
    assert "Tilt median 9, 1 to 80 °; standard error not known" in text
    assert "Cs at which" not in text


def test_failed_jobs_elsewhere_are_listed_with_their_errors(tmp_path):
    project = made.whole(tmp_path)
    step = Class2DStep(particles=Path("Extract/job006/particles.star"))
    job = made.end(project, step, status="Failed", failed=[Failure("x", "y")])
    (job.folder / "run.err").write_text("2026-11-22 13:01:08,276 ERROR the disk is full\n")
    text = parsed(project).text
    assert "Class2D/job012 class2d Failed the disk is full" in text


def test_the_command(tmp_path, capsys, monkeypatch):
    (tmp_path / "made").mkdir()
    project = made.whole(tmp_path / "made")
    monkeypatch.chdir(project.root)
    assert main(["report"]) == 0
    assert "Validation" in (project.root / "report.html").read_text()
    assert main(["report", "job007", "--output", "../seven.html"]) == 0
    assert "How Class2D/job007" in (tmp_path / "seven.html").read_text()
    monkeypatch.chdir(tmp_path)
    assert main(["report", "made", "--output", str(tmp_path / "again.html")]) == 0
    assert (tmp_path / "again.html").exists()
    capsys.readouterr()
    assert main(["report"]) == 2
    assert "no project here" in capsys.readouterr().err
    assert main(["report", "made", "--workers", "2"]) == 2
    assert "no option --workers" in capsys.readouterr().err
    with pytest.raises(ParameterError, match="no page can be written"):
        write_report(project, None, tmp_path / "nowhere/x.html")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ProjectError, match="no job to report of"):
        write_report(Project.open(tmp_path / "empty"))
