"""`pipeline=report` on finished runs, killed runs and folders that are no run."""

import os
from pathlib import Path

import pytest

from tests import test_run
from tests.loggers.made_up import make_run
from tests.support.composing import compose
from vqf.errors import UserError
from vqf.pipelines.report import Report, refresh_page

command_line = test_run.run  # a fixture


def test_a_killed_run_has_a_page_by_one_command(command_line: test_run.Run, tmp_path: Path) -> None:
    run = make_run(tmp_path, "killed")
    with (run / "stage1" / "metrics.jsonl").open("a") as file:
        file.write('{"step": 1001, "lo')
    command_line("pipeline=report", f"run={run}")
    text = (run / "report.html").read_text()
    assert "<h1>killed</h1>" in text and "was in progress when this page was written" in text
    (run / "summary.json").write_text('{"wall_seconds": 9}')
    command_line("pipeline=report", f"run={run}")
    assert "was in progress" not in (run / "report.html").read_text()


def test_errors_are_one_line(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"^run: give run=FOLDER"):
        Report(compose("pipeline=report"), tmp_path).run()
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=r"no run of vqf; it has no metrics\.jsonl"):
        Report(compose("pipeline=report", f"run={tmp_path / 'empty'}"), tmp_path).run()


def test_nothing_is_written_through_a_link(tmp_path: Path) -> None:
    run, victim = make_run(tmp_path, "theirs"), tmp_path / "victim"
    victim.write_text("mine")
    os.symlink(victim, run / "report.html")
    config = compose("pipeline=report", f"run={run}")
    with pytest.raises(UserError, match="is a symbolic link to"):
        Report(config, tmp_path).run()
    refresh_page(run, config)
    assert victim.read_text() == "mine"


def test_a_page_is_refreshed_only_where_there_is_one(tmp_path: Path) -> None:
    run, config = make_run(tmp_path, "run"), compose()
    refresh_page(run / "stage1", config)
    assert not list(run.rglob("report.html"))
    (run / "report.html").write_text("old")
    refresh_page(run / "stage1", config)
    assert "<h1>run</h1>" in (run / "report.html").read_text()
