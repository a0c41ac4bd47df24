"""A run's records are trusted less than its checkpoints: resume, report, compare and evaluate outlive all damage."""

import errno
import logging
import os
import re
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.run_files.damage import KINDS, damage
from tests.support.composing import compose
from tests.test_run import Run, run  # noqa: F401  (a fixture)
from tests.training.test_trainer import TINY, lines, weights
from vqf.config.settings import fill_missing_groups
from vqf.errors import UserError
from vqf.evaluation import result
from vqf.evaluation.result import EvaluationResult
from vqf.loggers.report import page
from vqf.loggers.report.page import write_report
from vqf.pipelines.comparison.ranking import rank
from vqf.pipelines.comparison.runs import read_run
from vqf.pipelines.stage1 import Stage1
from vqf.run import main
from vqf.run_files.aside import warn_once
from vqf.runs.checkpoint import Checkpoint, latest_checkpoint
from vqf.runs.lock import folder_lock

WORDS = [*TINY, "logger=[images,report]", "evaluate.every=2"]
JSON = ("metrics.jsonl", "details.json", "summary.json", "metrics.json")
HYDRA = tuple(f".hydra/{name}.yaml" for name in ("config", "hydra", "overrides"))
RECORDS = (*JSON, "log.txt", "report.html", *HYDRA, "images/best-latest.png")


def train(run_dir: Path, *words: str) -> None:
    Stage1(fill_missing_groups(compose(*WORDS, *words)), run_dir).run()


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of six steps, with an evaluation."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    (folder / ".hydra").mkdir(parents=True)
    for name in ("log.txt", *HYDRA):
        (folder / name).write_text("steps: 6\npipeline: {name: stage1}\n")
    train(folder)
    save_evaluation(folder, 20.0)
    return folder


@pytest.fixture
def damaged(finished: Path, tmp_path: Path) -> Path:
    return shutil.copytree(finished, tmp_path / "run")


@pytest.fixture(autouse=True)
def forgetful() -> Iterator[None]:
    warn_once.cache_clear()
    yield
    warn_once.cache_clear()


def save_evaluation(run_dir: Path, value: float) -> Path:
    measured = EvaluationResult(values={"psnr": value})
    measured.set_protocol({"name": "reconstruction", "count": 4})
    return result.save(measured, newest(run_dir), {}, run_dir, run_dir.parent / "evaluation")


def newest(run_dir: Path) -> Checkpoint:
    checkpoint = latest_checkpoint(run_dir)
    assert checkpoint
    return checkpoint


def check_lines(caplog: pytest.LogCaptureFixture) -> None:
    """Every warning is a line that names a file; none comes with a traceback."""
    for record in caplog.records:
        assert record.exc_info is None
        if record.levelno >= logging.WARNING:
            assert re.match(r"/.*: |not bit for bit", record.getMessage()), record.getMessage()


@pytest.mark.parametrize("kind", ["flipped", "cut", "nul", "shapes", "folder"])
def test_resume_with_every_record_damaged(
    finished: Path, damaged: Path, kind: str, caplog: pytest.LogCaptureFixture
) -> None:
    newest(damaged).path.rename(damaged / "checkpoints" / "aside")  # the run goes on from step 4
    for name in JSON:
        damage(damaged / name, kind)
    train(damaged, "resume=true")
    check_lines(caplog)
    assert weights(damaged) == weights(finished)
    assert newest(damaged).state == newest(finished).state
    later = [[line for line in lines(run_dir) if line["step"] > 4] for run_dir in (finished, damaged)]
    assert later[0] == later[1]
    whole = {"flipped", "cut"}  # some lines of the log are still there
    assert all(line in lines(finished) for line in lines(damaged))
    assert kind in whole or lines(damaged)[0]["step"] == 5
    hole = f"{damaged / 'metrics.jsonl'}: has no line after step "
    assert any(message.startswith(hole) for message in caplog.messages) == (kind != "flipped")


@pytest.mark.parametrize("kind", KINDS)
def test_report_and_comparison_with_every_record_damaged(
    damaged: Path, kind: str, caplog: pytest.LogCaptureFixture
) -> None:
    evaluation = next(damaged.glob("evaluations/*/*/metrics.json"))
    for path in (evaluation, *(damaged / name for name in RECORDS)):
        damage(path, kind)
    assert write_report(damaged).read_text().endswith("</html>")
    compared = read_run(damaged)
    assert compared.step == 6
    assert rank([compared], [1], None).order == [0]
    check_lines(caplog)
    named = {message.partition(": ")[0] for message in caplog.messages}
    assert {str(damaged / name) for name in JSON} <= named or kind == "flipped"


@pytest.mark.parametrize("kind", ["cut", "shapes", "folder"])
def test_an_evaluation_of_damaged_files_is_saved(damaged: Path, kind: str, caplog: pytest.LogCaptureFixture) -> None:
    path = next(damaged.glob("evaluations/*/*/metrics.json"))
    damage(path, kind)
    assert save_evaluation(damaged, 30.0) == path
    assert path.with_name("aside-metrics.json").exists()
    (message,) = caplog.messages
    assert message.startswith(f"{path}: ") and message.endswith("; moved to aside-metrics.json")
    found = [value for values in read_run(damaged).metrics.values() for value in values if value.from_evaluation]
    assert [each.value for each in found] == [30.0]


def test_a_whole_run_says_nothing(damaged: Path, caplog: pytest.LogCaptureFixture) -> None:
    write_report(damaged)
    read_run(damaged)
    save_evaluation(damaged, 30.0)
    train(damaged, "resume=true")
    assert [record for record in caplog.records if record.levelno >= logging.WARNING] == []


def test_folders_where_a_command_writes_files(
    damaged: Path,
    run: Run,  # noqa: F811
    capsys: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
) -> None:
    for name in RECORDS[:-1]:
        damage(damaged / name, "folder")
    sys.argv[1:] = [*WORDS, f"run_dir={damaged}", "resume=true", "steps=7"]
    main()
    shown = capsys.readouterr()
    said = {*caplog.messages, *shown.out.splitlines(), *shown.err.splitlines()}  # Hydra sets logging up anew
    for name in RECORDS[:-1]:
        assert not (damaged / name).is_dir(), name
        assert f"{damaged / name}: is a folder, not a file; moved to aside-{Path(name).name}" in said
    assert "Traceback" not in shown.out + shown.err
    assert (damaged / "log.txt").read_text() and (damaged / "summary.json").is_file()


def test_a_file_in_place_of_hydras_folder(
    damaged: Path,
    run: Run,  # noqa: F811
    caplog: pytest.LogCaptureFixture,
) -> None:
    shutil.rmtree(damaged / ".hydra")
    (damaged / ".hydra").write_text("no folder")
    sys.argv[1:] = [*WORDS, f"run_dir={damaged}", "resume=true"]
    main()
    assert (damaged / ".hydra" / "config.yaml").is_file()
    assert f"{damaged / '.hydra'}: is no folder; moved to aside-.hydra" in caplog.messages


@pytest.mark.parametrize("kind", ["flipped", "bytes", "folder"])
def test_a_damaged_lock_ends_with_the_cure(tmp_path: Path, kind: str) -> None:
    (tmp_path / ".lock").write_bytes(b"process")
    damage(tmp_path / ".lock", kind)
    with pytest.raises(UserError) as caught, folder_lock(tmp_path):
        pass
    assert str(caught.value) == (
        f"run_dir={tmp_path}: its '.lock' was not written by vqf; delete it, or give another run_dir"
    )


def test_a_disk_that_is_full_for_the_page(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(page, "atomic_write_text", full)
    train(tmp_path)
    assert newest(tmp_path).step == 6
    warnings = [record for record in caplog.records if record.levelno >= logging.WARNING]
    assert [record.getMessage() for record in warnings] == [
        f"{tmp_path / 'report.html'} cannot be written: No space left on device"
    ]
    assert warnings[0].exc_info is None
