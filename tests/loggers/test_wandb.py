"""The Weights & Biases logger, offline, and when wandb fails."""

import json
import logging
import os
from pathlib import Path
from typing import Any

import pytest
import torch
import wandb
from omegaconf import DictConfig, OmegaConf

from tests import test_run
from tests.loggers.wandb_file import history, records
from tests.support.composing import compose
from tests.training.test_trainer import TINY
from vqf.config.untrusted import check_symlinks
from vqf.errors import UserError
from vqf.pipelines.full import Full
from vqf.registry import build, find_component

command_line = test_run.run  # a fixture


@pytest.fixture(scope="module")
def config() -> DictConfig:
    return OmegaConf.create({"steps": 4321, "secret": "${oc.env:VQF_TEST_SECRET}", "absent": "???"})


@pytest.fixture(autouse=True)
def offline(monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> None:
    """No key, no network, nothing outside of the test's folder."""
    home = tmp_path_factory.mktemp("wandb")
    monkeypatch.setenv("VQF_TEST_SECRET", "very-secret-words")
    monkeypatch.setenv("NETRC", str(home / "netrc"))
    for name in ("DATA", "CACHE", "CONFIG"):
        monkeypatch.setenv(f"WANDB_{name}_DIR", str(home / name.lower()))
    for name in ("WANDB_MODE", "WANDB_DIR", "WANDB_DISABLED", "WANDB_API_KEY"):
        monkeypatch.delenv(name, raising=False)


def make(run_dir: Path, config: DictConfig, part: str = "", **options: object) -> Any:
    return build("logger", {"name": "wandb", **options}, run_dir=run_dir, config=config, subrun=part)


def use(logger: Any) -> None:
    for step in (5, 5, 2):
        logger.scalars(step, {"loss": 0.5, "validation/psnr": 20.25})
        logger.images(step, "samples", torch.zeros(2, 3, 8, 8))
    logger.close()


def files(folder: Path) -> list[Path]:
    wandb.teardown()  # waits until the last byte is on disk
    return sorted(folder.rglob("*.wandb"))


def ids(paths: list[Path]) -> set[str]:
    return {record.run.run_id for path in paths for record in records(path) if record.HasField("run")}


def artifacts(path: Path) -> list[Any]:
    return [record.artifact for record in records(path) if record.HasField("artifact")]


def test_an_offline_run_holds_numbers_images_and_the_unresolved_config(
    tmp_path: Path, config: DictConfig, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING, logger="vqf"):
        use(make(tmp_path / "new", config, project="trial", tags=["one", "two"]))
    (record,) = files(tmp_path / "new")
    assert not [record for record in caplog.records if record.name == "vqf"]
    rows = history(record)
    assert [row for row in rows if "loss" in row] == [
        {"step": step, "loss": 0.5, "validation/psnr": 20.25} for step in (5, 5, 2)
    ]
    assert [row["step"] for row in rows if any(key.startswith("samples") for key in row)] == [5, 5, 2]
    (run,) = (each.run for each in records(record) if each.HasField("run"))
    assert (run.project, list(run.tags)) == ("trial", ["one", "two"])
    logged = {item.key: json.loads(item.value_json) for item in run.config.update}
    assert (logged["steps"], logged["secret"]) == (4321, "${oc.env:VQF_TEST_SECRET}")
    assert b"very-secret-words" not in record.read_bytes()
    assert len(list((tmp_path / "new").rglob("*.png"))) >= 1


def test_curves_are_drawn_over_the_step_of_their_part(tmp_path: Path, config: DictConfig) -> None:
    for part in ("stage1", ""):
        use(make(tmp_path / part, config, part=part))
    (path,) = files(tmp_path)
    axes = {each.metric.name: each.metric.step_metric for each in records(path) if each.HasField("metric")}
    assert axes["stage1/loss"] == "stage1/step" and axes["loss"] == "step"
    assert axes["stage1/samples"] == "stage1/step"


def test_a_resumed_run_keeps_its_id_and_a_new_one_does_not(tmp_path: Path, config: DictConfig) -> None:
    for resume in (False, True, "some/checkpoint"):
        use(make(tmp_path, OmegaConf.merge(config, {"resume": resume})))  # type: ignore[arg-type]
    (known,) = ids(files(tmp_path))
    assert json.loads((tmp_path / "wandb.json").read_text())["id"] == known
    use(make(tmp_path, OmegaConf.merge(config, {"resume": False})))  # type: ignore[arg-type]
    assert len(ids(files(tmp_path))) == 2


@pytest.mark.slow
def test_a_command_with_wandb_can_be_resumed(command_line: test_run.Run) -> None:
    """wandb leaves a link to a log of its service outside of the run, which is no reason to refuse the run."""
    words = [*TINY, "run_dir=run", "logger=[wandb]", "pipeline=stage1", "checkpoint.every=1", "checkpoint.keep=0"]
    command_line(*words, "steps=1")
    wandb.teardown()
    run = Path("run").resolve()
    outward = [path for path in (run / "wandb").rglob("*") if not path.resolve().is_relative_to(run)]
    assert [path.name for path in outward] == ["debug-core.log"], "or this test shows nothing"
    command_line(*words, "steps=2", "resume=true", "allow_changes=true")
    rows = [row for path in files(Path("run")) for row in history(path)]
    assert {row["step"] for row in rows if "loss" in row} == {1, 2}


@pytest.mark.parametrize("link", ["wandb", "wandb/latest", "wandb/run-1-a/logs", "wandb/run-1-a/files/debug-core.log"])
def test_any_other_link_out_of_a_run_is_refused(tmp_path: Path, link: str) -> None:
    (tmp_path / "run" / link).parent.mkdir(parents=True)
    os.symlink(tmp_path / "outside", tmp_path / "run" / link)
    with pytest.raises(UserError, match=f"'{link}' is a symbolic link to"):
        check_symlinks(tmp_path / "run")


def test_a_broken_memory_means_a_new_run(tmp_path: Path, config: DictConfig) -> None:
    (tmp_path / "wandb.json").write_text('{"id"')
    use(make(tmp_path, OmegaConf.merge(config, {"resume": True})))  # type: ignore[arg-type]
    assert ids(files(tmp_path)) == {json.loads((tmp_path / "wandb.json").read_text())["id"]}


def test_another_run_is_not_mixed_up_with_one_whose_last_part_never_came(tmp_path: Path, config: DictConfig) -> None:
    lost = make(tmp_path / "lost" / "stage1", config, part="stage1")
    lost.scalars(1, {"loss": 3.0})
    lost.close()
    use(make(tmp_path / "next", config))
    (first,), (second,) = files(tmp_path / "lost"), files(tmp_path / "next")
    assert [row["stage1/loss"] for row in history(first)] == [3.0]
    assert ids([first]) != ids([second])
    assert all("stage1/loss" not in row for row in history(second))


@pytest.mark.slow
def test_a_full_run_is_one_run(tmp_path: Path) -> None:
    options = [*TINY, "pipeline=full", "stage2.steps=4", "stage2.batch_size=8", "logger=[console,images,wandb]"]
    options += ["evaluate.samples=0"]
    Full(compose(*options), tmp_path).run()
    (path,) = files(tmp_path)
    assert path.is_relative_to(tmp_path / "wandb")
    rows = history(path)
    for part, steps in (("stage1", 6), ("stage2", 4)):
        assert [row[f"{part}/step"] for row in rows if f"{part}/loss" in row] == list(range(1, steps + 1))
        assert sum(f"{part}/validation/{'psnr' if part == 'stage1' else 'nats_per_token'}" in row for row in rows) == 1
    assert {key.split("/")[1] for row in rows for key in row if key.startswith("stage1/reconstructions")}
    assert any(key.startswith("samples") for row in rows for key in row)


def test_the_use_of_the_codes_is_a_table(tmp_path: Path, config: DictConfig) -> None:
    (tmp_path / "details.json").write_text(json.dumps({"codes": {"counts": [3, 0, 5]}, "best": {}}))
    logger = make(tmp_path, config)
    logger.close()
    (path,) = files(tmp_path)
    (artifact,) = artifacts(path)
    assert artifact.type == "codes" and artifact.name == f"{logger.run.id}-codes"
    (entry,) = (each for each in artifact.manifest.contents if each.path == "codes.table.json")
    table = json.loads(Path(entry.local_path).read_text())
    assert table["columns"] == ["code", "count", "share"]
    assert table["data"] == [[0, 3, 0.375], [1, 0, 0.0], [2, 5, 0.625]]


@pytest.mark.parametrize("wanted", [True, False])
def test_the_newest_checkpoint_is_kept_where_that_is_wanted(tmp_path: Path, config: DictConfig, wanted: bool) -> None:
    for step in (2, 10):
        folder = tmp_path / "checkpoints" / f"step-{step:08d}"
        folder.mkdir(parents=True)
        (folder / "model.safetensors").write_text(f"weights of {step}")
    make(tmp_path, config, checkpoints=wanted).close()
    (path,) = files(tmp_path)
    kept = artifacts(path)
    assert [json.loads(each.metadata) for each in kept] == [{"step": 10}] * wanted
    for artifact in kept:
        (entry,) = artifact.manifest.contents
        assert Path(entry.local_path).read_text() == "weights of 10"


def test_disabled_leaves_nothing_to_sync(tmp_path: Path, config: DictConfig) -> None:
    use(make(tmp_path, config, mode="disabled"))
    assert not list(tmp_path.rglob("*.wandb"))


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({}, "offline"),
        ({"WANDB_API_KEY": "k" * 40}, "online"),
        ({"WANDB_API_KEY": "k" * 40, "WANDB_MODE": "offline"}, "offline"),
        ({"NETRC": "{netrc}"}, "online"),
        ({"NETRC": "{netrc}", "WANDB_BASE_URL": "https://wandb.example.org"}, "offline"),
    ],
)
def test_the_mode_follows_the_key(
    tmp_path: Path,
    config: DictConfig,
    monkeypatch: pytest.MonkeyPatch,
    environment: dict[str, str],
    expected: str,
) -> None:
    (tmp_path / "netrc").write_text("machine api.wandb.ai\n  login user\n  password kkkk\n")
    for name, value in environment.items():
        monkeypatch.setenv(name, value.format(netrc=tmp_path / "netrc"))
    asked: list[str] = []
    monkeypatch.setattr(wandb, "init", lambda **options: asked.append(options["mode"]) or Broken("none"))
    make(tmp_path / "run", config)
    assert asked == [expected]


class Broken:
    """A run that fails in one of its methods."""

    def __init__(self, method: str) -> None:
        self.method, self.calls = method, 0

    def __getattr__(self, name: str) -> Any:
        def call(*args: object, **kwargs: object) -> None:
            if name == self.method:
                self.calls += 1
                raise wandb.errors.CommError("the server is gone")

        return call


@pytest.mark.parametrize("method", ["define_metric", "log", "finish"])
def test_a_failure_is_said_once_and_then_it_is_quiet(
    tmp_path: Path, config: DictConfig, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, method: str
) -> None:
    broken = Broken(method)
    monkeypatch.setattr(wandb, "init", lambda **_: broken)
    with caplog.at_level(logging.WARNING, logger="vqf"):
        use(make(tmp_path, config))
    assert broken.calls == 1
    assert len(caplog.records) == 1
    assert "the server is gone" in caplog.records[0].getMessage()


def test_a_wandb_that_does_not_start_does_not_stop_the_run(
    tmp_path: Path, config: DictConfig, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def init(**_: object) -> None:
        raise wandb.errors.UsageError("api_key not configured (no-tty)")

    monkeypatch.setattr(wandb, "init", init)
    with caplog.at_level(logging.WARNING, logger="vqf"):
        use(make(tmp_path, config, mode="online"))
    assert [("api_key" in record.getMessage()) for record in caplog.records] == [True]


def test_an_interrupt_is_not_swallowed(tmp_path: Path, config: DictConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    def init(**_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(wandb, "init", init)
    with pytest.raises(KeyboardInterrupt):
        make(tmp_path, config)


def test_no_option_takes_a_key() -> None:
    options = {"mode", "project", "entity", "group", "tags", "checkpoints"}
    assert set(find_component("logger", "wandb").options) == options


def test_modes_are_checked(tmp_path: Path, config: DictConfig) -> None:
    with pytest.raises(UserError, match="offline"):
        make(tmp_path, config, mode="offlin")
