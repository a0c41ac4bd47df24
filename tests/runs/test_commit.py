"""The commit of the working directory is read without running commands that the repository's config names."""

import shutil
import subprocess
from pathlib import Path

import pytest

from vqf.runs.provenance import git_commit

needs_git = pytest.mark.skipif(shutil.which("git") is None, reason="git is not installed")


def repository(folder: Path) -> str:
    """Make a repository with one commit, whose config names commands to run."""

    def git(*words: str) -> str:
        who = ("-c", "user.name=a", "-c", "user.email=a@b.c")
        return subprocess.run(["git", *who, *words], cwd=folder, check=True, capture_output=True, text=True).stdout

    git("init", "-q")
    (folder / "file").write_text("text")
    git("add", "file")
    git("commit", "-qm", "first")
    (folder / ".gitattributes").write_text("* filter=evil\n")
    for key in ("core.fsmonitor", "filter.evil.clean", "core.pager", "core.sshCommand", "alias.rev-parse"):
        git("config", key, "touch canary; cat" if key != "alias.rev-parse" else "!touch canary")
    (folder / "file").write_text("text that is changed")
    return (folder / ".git" / "refs" / "heads" / git("branch", "--show-current").strip()).read_text().strip()


@needs_git
def test_the_commit_is_read_and_no_command_of_the_config_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = repository(tmp_path)
    (tmp_path / "canary").unlink(missing_ok=True)
    (tmp_path / "below").mkdir()
    monkeypatch.chdir(tmp_path / "below")
    assert git_commit() == {"commit": expected}
    assert not list(tmp_path.rglob("canary"))


def test_without_a_repository_or_git_there_is_no_commit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    assert git_commit() == {}
    monkeypatch.setenv("PATH", str(tmp_path))
    assert git_commit() == {}


@needs_git
def test_a_repository_without_a_commit_has_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    subprocess.run(["git", "init", "-q"], check=True)
    assert git_commit() == {}
