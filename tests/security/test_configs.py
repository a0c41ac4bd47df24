"""Untrusted config files and output folders: only the command line chooses code to run and paths to write."""

import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from omegaconf import OmegaConf

from tests.security.canary import Canary
from vqf.config import inherit as inheriting
from vqf.config.compose import check_command, flags_first
from vqf.config.inherit import inherit
from vqf.config.untrusted import CLI_ONLY_KEYS, check_symlinks
from vqf.errors import UserError
from vqf.run import main
from vqf.runs.run_dir import choose_run_dir

Say = Callable[..., list[str]]


@pytest.fixture
def say(tmp_path: Path) -> Say:
    """The messages for a command line with a folder of presets that holds one experiment."""

    def said(content: dict[str, Any], *arguments: str, flag: str = "--config-dir") -> list[str]:
        folder = tmp_path / "theirs"
        (folder / "experiment").mkdir(parents=True, exist_ok=True)
        header = "# @package _global_\n"
        (folder / "experiment" / "theirs.yaml").write_text(header + OmegaConf.to_yaml(OmegaConf.create(content)))
        try:
            check_command(flags_first([flag, str(folder), "experiment=theirs", *arguments]))
        except UserError as error:
            return str(error).splitlines()
        return []

    return said


HOSTILE: dict[str, Any] = {
    "plugins": ["./evil.py"],
    "run_dir": "/tmp/elsewhere",
    "resume": "/",
    "tokens.root": "/tmp/elsewhere",
    "data.index": "/tmp/elsewhere",
    "hydra.callbacks": {"evil": {"_target_": "os.system", "command": "touch evil"}},
    "hydra.hydra_logging": {"formatters": {"simple": {"()": "os.system"}}},
    "hydra.job_logging": {"handlers": {"evil": {"class": "logging.FileHandler", "filename": "/tmp/elsewhere"}}},
    "hydra.launcher": {"_target_": "os.system"},
    "hydra.sweeper._target_": "os.system",
    "hydra.job.chdir": True,
    "hydra.job.env_copy": ["HOME"],
    "hydra.job.env_set": {"LD_PRELOAD": "/tmp/evil.so"},
    "hydra.output_subdir": "../../elsewhere",
    "hydra.run": {"dir": "/tmp/elsewhere"},
    "hydra.sweep": {"dir": "/tmp/elsewhere"},
}
OF_PIPELINES = {"out": "shard", "path": "export", "statistics": "evaluate"}


def nested(place: str, value: Any) -> dict[str, Any]:
    for part in reversed(place.split(".")):
        value = {part: value}
    return value


@pytest.mark.parametrize("place", HOSTILE)
def test_a_file_sets_neither_code_nor_output_paths(say: Say, place: str) -> None:
    content = nested(place, HOSTILE[place])
    data = ["data=shards"] if place.startswith("data.") else []
    told = [line.split(":")[0] for line in say(content, *data)]
    assert told == ([place, "hydra.job.env_set"] if place == "hydra.job.env_copy" else [place])
    assert say({"steps": 3}, *data) == []


@pytest.mark.parametrize("place", OF_PIPELINES)
def test_a_file_does_not_set_where_a_pipeline_writes(say: Say, place: str) -> None:
    pipeline = f"pipeline={OF_PIPELINES[place]}"
    assert [line.split(":")[0] for line in say({place: "/tmp/elsewhere"}, pipeline)] == [place]
    assert say({place: "/tmp/elsewhere"}, pipeline, f"{place}=here") == []


def test_every_option_is_covered() -> None:
    assert set(CLI_ONLY_KEYS) - {*HOSTILE, *OF_PIPELINES} == {"hydra.searchpath"}


def test_hydra_itself_refuses_another_search_path(say: Say) -> None:
    (line,) = say({"hydra": {"searchpath": ["file:///tmp"]}})
    assert "hydra.searchpath" in line


@pytest.mark.parametrize(
    ("content", "arguments"),
    [
        ({"plugins": ["./mine.py"]}, ["plugins=[./mine.py]"]),
        ({"run_dir": "x"}, ["run_dir=here"]),
        ({"hydra": {"job": {"env_set": {"A": "1"}}}}, ["+hydra.job.env_set.B=2"]),
        ({"hydra": {"mode": "MULTIRUN", "sweeper": {"params": {"seed": "1,2"}}}}, []),
        ({"steps": 5, "model": {"quantizer": {"beta": 0.5}}, "logger": {"console": None}}, []),
    ],
)
def test_the_command_line_has_the_last_word(say: Say, content: dict[str, Any], arguments: list[str]) -> None:
    assert say(content, *arguments) == []


def test_a_foreign_launcher_is_refused(say: Say, tmp_path: Path) -> None:
    folder = tmp_path / "theirs" / "hydra" / "launcher"
    folder.mkdir(parents=True)
    (folder / "evil.yaml").write_text("_target_: os.system\nsetup: [touch evil]\n")
    content = {"defaults": [{"override /hydra/launcher": "evil"}]}
    assert [line.split(":")[0] for line in say(content)] == ["hydra.launcher"]
    assert say({}, "hydra/launcher=joblib") == []


def test_a_foreign_primary_config_is_checked_as_well(say: Say, tmp_path: Path) -> None:
    folder = tmp_path / "theirs"
    folder.mkdir()
    text = "defaults: [_self_, {pipeline: stage1}, {experiment: null}]\nhydra: {run: {dir: /tmp/elsewhere}}\n"
    (folder / "config.yaml").write_text(text)
    assert any("hydra.run: set by a config file" in line for line in say({}, flag="--config-path"))


@pytest.fixture
def command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, isolated: None, own_job: None) -> Callable[..., int]:
    """Run a command line in this process, in an empty folder; returns its exit status."""
    monkeypatch.chdir(tmp_path)

    def ran(*arguments: str) -> int:
        monkeypatch.setattr(sys, "argv", ["vqf", *arguments])
        try:
            main()
        except SystemExit as end:
            return int(end.code or 0)
        return 0

    return ran


def test_nothing_of_a_hostile_experiment_runs(
    command: Callable[..., int], canary: Canary, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "evil.py").write_text(f"import os\nos.system({canary.command!r})\n")
    folder = tmp_path / "theirs" / "experiment"
    folder.mkdir(parents=True)
    evil = {"_target_": "os.system", "command": canary.command}
    content = {"plugins": ["./evil.py"], "hydra": {"callbacks": {"evil": evil}}, "run_dir": "elsewhere"}
    (folder / "evil.yaml").write_text("# @package _global_\n" + OmegaConf.to_yaml(OmegaConf.create(content)))
    before = set(tmp_path.rglob("*"))
    assert command("--config-dir", "theirs", "experiment=evil") == 2
    assert [line.split(":")[0] for line in capsys.readouterr().err.splitlines()] == [
        *("plugins", "run_dir", "hydra.callbacks")
    ]
    assert set(tmp_path.rglob("*")) == before


@pytest.mark.parametrize("link", ["log.txt", "metrics.jsonl", "checkpoints", "images", ".hydra", "deep/er/file"])
@pytest.mark.parametrize("how", ["run_dir={}", "resume={}", "resume={}/checkpoints/step-00000001"])
def test_a_run_with_a_link_out_of_it_is_not_written(tmp_path: Path, link: str, how: str) -> None:
    outside = tmp_path / "outside"
    outside.mkdir()
    run = tmp_path / "run"
    (run / link).parent.mkdir(parents=True)
    os.symlink(outside if "." not in link or link == ".hydra" else outside / "file", run / link)
    key, _, path = how.format(run).partition("=")
    given = {"run_dir": None, "resume": False, key: path}
    with pytest.raises(UserError, match=f"run: '{link}' is a symbolic link to {outside}"):
        choose_run_dir(given["run_dir"], None, given["resume"], "small-emoji", "stage1")


def test_links_within_a_run_are_allowed(tmp_path: Path) -> None:
    (tmp_path / "run" / "images").mkdir(parents=True)
    os.symlink("images", tmp_path / "run" / "samples")
    os.symlink(tmp_path / "run", tmp_path / "alias")
    check_symlinks(tmp_path / "run")
    check_symlinks(tmp_path / "alias")
    check_symlinks(tmp_path / "not there")


def test_a_link_is_reported_in_one_line_and_not_written_through(
    command: Callable[..., int], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "run").mkdir()
    os.symlink(tmp_path / "canary", tmp_path / "run" / "log.txt")
    for sweep in ([], ["-m"]):
        assert command("run_dir=run", *sweep) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert line.startswith("run: 'log.txt' is a symbolic link to ")
    assert not (tmp_path / "canary").exists()


@pytest.mark.parametrize("name", ["../../evil-x", "/evil-x", "../evil/../x-y"])
def test_a_run_stays_below_outputs_for_any_name_of_a_preset(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    chosen = Path(choose_run_dir(None, None, False, name, "stage1"))
    assert chosen.resolve().is_relative_to(tmp_path / "outputs")


def test_a_foreign_run_does_not_set_output_paths(monkeypatch: pytest.MonkeyPatch) -> None:
    now = OmegaConf.create({"data": {"name": "emoji"}, "tokens": {"root": None}})
    run = OmegaConf.create({"data": {"name": "shards", "root": "x", "index": "/elsewhere"}, "tokens": {"root": "/y"}})
    monkeypatch.setattr(inheriting, "cli_keys", list)
    taken = inherit(now, run, ["data"])
    assert taken.data == {"name": "shards", "root": "x", "index": None} and taken.tokens.root is None
    mine = OmegaConf.create({"data": {"name": "shards", "index": "mine"}, "tokens": {"root": None}})
    monkeypatch.setattr(inheriting, "cli_keys", lambda: ["data.index"])
    assert inherit(mine, run, ["data"]).data == {"name": "shards", "root": "x", "index": "mine"}
