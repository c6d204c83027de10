from __future__ import annotations

import errno
import json
import logging
from pathlib import Path
from types import SimpleNamespace

import pytest
import toy_step as toy

from halfmap.engine import Context, RunOptions
from halfmap.engine.progress import Progress
from halfmap.errors import ItemsFailedError, ResourceError
from halfmap.log import log


def run(folder: Path, step, **options) -> Context:
    ctx = Context(folder=folder, project=folder, options=RunOptions(**options))
    step.run(ctx)
    return ctx


@pytest.mark.parametrize(
    "options", [{}, {"executor": "processes", "workers": 2}, {"cluster": "local", "workers": 2}], ids=str
)
def test_every_executor_gives_the_same_table_in_the_items_order(tmp_path, options):
    run(tmp_path, toy.Toy(n=7), **options)
    assert (tmp_path / "squares.txt").read_text() == "".join(f"{i} {i * i}\n" for i in range(7))


@pytest.mark.parametrize("options", [{}, {"executor": "processes", "workers": 2}], ids=str)
def test_a_bad_item_is_named_and_the_rest_is_done(tmp_path, options):
    ctx = run(tmp_path, toy.Toy(n=5, bad=(1, 3)), **options)
    assert {failure.key for failure in ctx.failures} == {"1", "3"}
    assert ctx.failures[0].reason.endswith("is a bad number; leave it out")
    assert (tmp_path / "squares.txt").read_text().split() == ["0", "0", "2", "4", "4", "16"]


def test_a_worker_that_dies_costs_only_its_item(tmp_path):
    ctx = run(tmp_path, toy.Toy(n=8, deadly=(2,)), executor="processes", workers=2)
    assert [failure.key for failure in ctx.failures] == ["2"]
    assert "died" in ctx.failures[0].reason
    assert len((tmp_path / "squares.txt").read_text().splitlines()) == 7


def test_too_many_failures_stop_the_step(tmp_path):
    with pytest.raises(ItemsFailedError, match="2 numbers failed, more than the 1 allowed"):
        run(tmp_path, toy.Toy(n=50, bad=(0, 1)), max_failures=1)
    assert not (tmp_path / "5.txt").exists()


def test_failures_outside_the_loop_count_too(tmp_path):
    with pytest.raises(ItemsFailedError, match=r"2 things failed, more than the 1 allowed; .*: is unwanted"):
        run(tmp_path, toy.Toy(n=2, unwanted=("a", "b", "c")), max_failures=1)
    with pytest.raises(ItemsFailedError, match="3 items failed, more than the 2 allowed"):
        run(tmp_path, toy.Toy(n=5, unwanted=("a", "b"), bad=(3,)), max_failures=2)
    ctx = run(tmp_path, toy.Toy(n=5, unwanted=("a", "b"), bad=(3,)), max_failures=3)
    assert [failure.key for failure in ctx.failures] == ["a", "b", "3"]


@pytest.mark.parametrize(
    "options", [{}, {"executor": "processes", "workers": 2}, {"cluster": "local", "workers": 2}], ids=str
)
def test_what_items_log_is_heard_wherever_they_run(tmp_path, options, caplog):
    caplog.set_level(logging.DEBUG, logger="halfmap")
    ctx = run(tmp_path, toy.Toy(n=6, bad=(3,)), **options)
    heard = [record.getMessage() for record in caplog.records]
    for number in range(6):
        place = heard.index(f"number {number} is looked at")
        assert heard[place + 1] == f"and closely: {number}"
        assert caplog.records[place].levelname == "WARNING"
    # An item's messages come before what became of it.
    assert heard.index("and closely: 3") + 1 == heard.index(ctx.failures[0].reason)


def test_all_failed_is_an_error_even_when_any_number_may_fail(tmp_path):
    with pytest.raises(ItemsFailedError, match="every number failed"):
        run(tmp_path, toy.Toy(n=2, bad=(0, 1)))


def test_resume_runs_only_what_is_missing_and_retries_failures(tmp_path):
    run(tmp_path, toy.Toy(n=6, bad=(4,)))
    run(tmp_path, toy.Toy(n=6))
    assert (tmp_path / "calls.txt").read_text().split() == ["0", "1", "2", "3", "5", "4"]
    assert len((tmp_path / "squares.txt").read_text().splitlines()) == 6


def test_a_ledger_line_cut_by_a_kill_is_done_again(tmp_path):
    run(tmp_path, toy.Toy(n=3))
    ledger = tmp_path / "items.jsonl"
    ledger.write_bytes(ledger.read_bytes()[:-9])
    run(tmp_path, toy.Toy(n=3))
    assert (tmp_path / "calls.txt").read_text().split() == ["0", "1", "2", "2"]
    assert [json.loads(line)["key"] for line in ledger.read_text().splitlines()] == ["0", "1", "2"]


def test_every_item_leaves_an_event(tmp_path):
    run(tmp_path, toy.Toy(n=4, bad=(2,)))
    events = [json.loads(line) for line in (tmp_path / "events.jsonl").read_text().splitlines()]
    assert [event["done"] for event in events] == [1, 2, 3, 4]
    assert [event["failed"] for event in events] == [0, 0, 1, 1]
    assert ["error" in event for event in events] == [False, False, True, False]


def test_lines_of_progress_say_how_long_the_rest_takes(tmp_path, monkeypatch, caplog):
    now = [0.0]
    monkeypatch.setattr(
        "halfmap.engine.progress.time", SimpleNamespace(monotonic=lambda: now[0], time=lambda: 0.0)
    )
    caplog.set_level("INFO", log.name)
    with Progress(tmp_path / "events.jsonl", "movie", done=10, total=100) as progress:
        for number in range(90):
            now[0] += 90
            progress.advance(str(number), 1.0, None)
    assert caplog.messages[0] == "20 of 100 movies, 90.00 s each, 2.0 h left"
    assert caplog.messages[-2] == "90 of 100 movies, 90.00 s each, 15 min left"
    assert caplog.messages[-1] == "100 of 100 movies, 90.00 s each"


def test_two_items_of_one_name_are_refused(tmp_path):
    ctx = Context(folder=tmp_path, project=tmp_path)
    with pytest.raises(ValueError, match="same key"):
        ctx.map(str, [1, 1])


def _full(number: int) -> int:
    if number == 1:
        raise OSError(errno.ENOSPC, "No space left on device")
    return number


def test_a_full_disk_stops_the_step_instead_of_leaving_items_out(tmp_path):
    ctx = Context(folder=tmp_path, project=tmp_path)
    with pytest.raises(ResourceError, match="No space left"):
        ctx.map(_full, range(4))
    assert len((tmp_path / "items.jsonl").read_text().splitlines()) == 1


def test_a_damaged_line_of_the_ledger_is_done_again(tmp_path):
    run(tmp_path, toy.Toy(n=3))
    ledger = tmp_path / "items.jsonl"
    lines = ledger.read_bytes().splitlines(keepends=True)
    ledger.write_bytes(lines[0] + b"\0" * 20 + b"\n" + lines[2])
    run(tmp_path, toy.Toy(n=3))
    assert (tmp_path / "calls.txt").read_text().split() == ["0", "1", "2", "1"]


def _unsendable(number: int):
    return lambda: number


def test_a_result_that_cannot_be_sent_is_not_blamed_on_memory(tmp_path):
    ctx = Context(folder=tmp_path, project=tmp_path, options=RunOptions(executor="processes", workers=2))
    with pytest.raises(ItemsFailedError, match="pickle"):
        ctx.map(_unsendable, range(2))


def test_an_item_goes_by_its_name_or_else_by_its_text(tmp_path):
    ctx = Context(folder=tmp_path, project=tmp_path)
    items = [SimpleNamespace(name="Movies/a.mrc"), 7]
    assert ctx.map(str, items) == [str(item) for item in items]
    keys = [json.loads(line)["key"] for line in (tmp_path / "items.jsonl").read_text().splitlines()]
    assert keys == ["Movies/a.mrc", "7"]


def test_a_step_within_another_runs_once_and_its_failures_are_told(tmp_path):
    ctx = Context(folder=tmp_path, project=tmp_path)
    folder = ctx.run_within("toy", "Inner/toy", n=4, bad=(1,))
    assert folder == tmp_path / "Inner/toy"
    assert (folder / "squares.txt").exists()
    assert [failure.key for failure in ctx.failures] == ["1"]
    (folder / "squares.txt").unlink()
    again = Context(folder=tmp_path, project=tmp_path)
    again.run_within("toy", "Inner/toy", n=4, bad=(1,))
    assert not (folder / "squares.txt").exists()
    assert again.failures == ctx.failures
    strict = Context(folder=tmp_path, project=tmp_path, options=RunOptions(max_failures=0))
    with pytest.raises(ItemsFailedError, match="1 number failed"):
        strict.run_within("toy", "Inner/toy", n=4, bad=(1,))
    ctx.run_within("toy", "Inner/toy", n=5)
    assert len((folder / "squares.txt").read_text().splitlines()) == 5


def test_a_step_within_another_goes_on_where_it_was_killed(tmp_path):
    ctx = Context(folder=tmp_path, project=tmp_path)
    with pytest.raises(ItemsFailedError):
        ctx.run_within("toy", "toy", n=3, bad=(0, 1, 2))
    assert not (tmp_path / "toy/step.json").exists()
