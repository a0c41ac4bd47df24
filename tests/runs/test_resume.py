"""Resuming: only with the same config and data, and no command overwrites a run by mistake. Out-of-memory messages."""

import json
import logging
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from omegaconf import DictConfig
from safetensors.torch import load_file, save_file

from tests.security.conftest import seal
from tests.support.composing import compose
from tests.training.test_trainer import TINY, lines
from vqf.data.emoji import EmojiSplit
from vqf.errors import UserError
from vqf.pipelines.stage1 import Stage1
from vqf.pipelines.stage2 import Stage2
from vqf.runs.checkpoint import latest_checkpoint
from vqf.training.out_of_memory import explain_oom
from vqf.training.tokenizer_task import TokenizerTask
from vqf.training.trainer import Trainer

SHORT = [*TINY, "steps=2", "evaluate.every=50"]


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("finished")
    Stage1(compose(*SHORT), run).run()
    return run


@pytest.fixture
def run(finished: Path, tmp_path: Path) -> Path:
    """A run of two steps."""
    return Path(shutil.copytree(finished, tmp_path / "run"))


def refused(run: Path, *words: str) -> str:
    with pytest.raises(UserError) as caught:
        Stage1(compose(*SHORT, "resume=true", *words), run).run()
    line = str(caught.value)
    assert "\n" not in line
    return line


@pytest.mark.parametrize(
    ("words", "difference"),
    [
        (["model.quantizer.codebook_size=32"], "model.quantizer.codebook_size 16 → 32"),
        (["model/quantizer=vq"], "model.quantizer ema → vq"),
        (["model/loss=[l1,l2]"], "model.loss.l2 null → l2"),
        (["model.adversary.weight=0.5", "seed=3"], "model.adversary.weight 0.4 → 0.5, seed 0 → 3"),
        (["optimizer.lr=0.1"], "optimizer.lr 0.001 → 0.1"),
        (["schedule=constant"], "schedule cosine → constant"),
        (["batch_size=4"], "batch_size 8 → 4"),
        (["clip=null"], "clip 1.0 → null"),
        (
            ["model.discriminator=null", "model.adversary=null"],
            "model.discriminator patchgan → null, model.adversary hinge → null",
        ),
    ],
)
def test_another_config_is_refused_with_every_difference(run: Path, words: list[str], difference: str) -> None:
    assert refused(run, *words) == (
        f"resume: {run}/checkpoints/step-00000002 was trained with another config: {difference}. Undo the changes, "
        "give another run_dir to start a new run, or resume anyway with allow_changes=true"
    )


def test_other_training_images_are_refused(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    facts = json.loads((run / "checkpoints" / "step-00000002" / "state.json").read_text())["data"]
    monkeypatch.setattr(EmojiSplit, "_fingerprint", lambda self: "0123456789")
    assert f"the training images ({facts[:8]} → 01234567)" in refused(run)


@pytest.mark.parametrize(
    "words", [["log.every=2", "evaluate.every=1", "checkpoint.keep=1", "metric=[psnr]", "nonfinite.action=skip"]]
)
def test_options_that_do_not_affect_training_may_change(
    run: Path, words: list[str], caplog: pytest.LogCaptureFixture
) -> None:
    Stage1(compose(*SHORT, "resume=true", *words), run).run()
    assert "not bit for bit" not in caplog.text


def test_options_that_change_rounding_are_logged(run: Path, caplog: pytest.LogCaptureFixture) -> None:
    Stage1(compose(*SHORT, "resume=true", "steps=3", "accumulate=2"), run).run()
    assert "not bit for bit the run that was saved: steps 2 → 3, accumulate 1 → 2" in caplog.text
    assert lines(run)[-1]["step"] == 3


def test_allowed_changes_take_effect(run: Path, caplog: pytest.LogCaptureFixture) -> None:
    words = ["steps=4", "optimizer.lr=0.25", "schedule=constant", "allow_changes=true"]
    Stage1(compose(*SHORT, "resume=true", *words), run).run()
    assert "optimizer.lr 0.001 → 0.25, schedule cosine → constant, steps 2 → 4" in caplog.text
    assert [line["lr/model"] for line in lines(run) if "lr/model" in line][2:] == [0.25, 0.25]
    found = latest_checkpoint(run)
    assert found
    entry = found.load_optimizers()["optimizers"]["model"]
    assert entry["param_groups"][0]["lr"] == 0.25 and float(entry["state"][0]["step"]) == 4


def test_weights_that_do_not_fit_are_named_in_one_line(run: Path) -> None:
    line = refused(run, "model.quantizer.codebook_size=32", "allow_changes=true")
    assert line.startswith(f"resume: {run}/checkpoints/step-00000002: its 'model' does not fit this config: ")
    assert "size mismatch for quantizer" in line


def changed_optimizer(run: Path, change: Any) -> None:
    """Change the optimizer states of a checkpoint, with a manifest that fits."""
    file = run / "checkpoints" / "step-00000002" / "optimizers.pt"
    states = torch.load(file, weights_only=True)
    change(states["optimizers"]["model"], states["schedules"]["model"])
    torch.save(states, file)
    seal(file.parent)


def set_option(key: str, value: Any) -> Any:
    return lambda optimizer, schedule: optimizer["param_groups"][0].update({key: value})


def set_schedule(key: str, value: Any) -> Any:
    return lambda optimizer, schedule: schedule.update({key: value})


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (set_option("lr", "high"), "lr is a str, not a number"),
        (set_option("lr", None), "lr is a NoneType, not a number"),
        (set_option("lr", float("nan")), "lr is nan"),
        (set_option("betas", [0.9]), "betas is not 2 values"),
        (set_option("betas", ("a", "b")), "betas is a str, not a number"),
        (set_option("params", [0]), "size"),
        (set_schedule("last_epoch", "now"), "'last_epoch' is a str, not a number"),
        (set_schedule("base_lrs", 3), "'base_lrs' is not 1 values"),
        (set_schedule("step", 3), "it has no 'step'"),
        (lambda optimizer, schedule: optimizer["state"].update({9999: {}}), "a state of parameter 9999"),
        (lambda optimizer, schedule: optimizer["state"].update({"x": {}}), "a state of parameter x"),
        (lambda optimizer, schedule: optimizer["state"][0].update(exp_avg=3), "another shape"),
        (lambda optimizer, schedule: optimizer["state"][0].update(exp_avg_sq=torch.zeros(2)), "another shape"),
    ],
)
def test_optimizer_states_of_other_values_are_refused(run: Path, change: Any, words: str) -> None:
    changed_optimizer(run, change)
    line = refused(run, "steps=4", "allow_changes=true")
    assert "step-00000002: its 'optimizer of model' does not fit this config: " in line and words in line


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("skipped_batches", "many"),
        ("skipped_batches", -1),
        ("best", [1]),
        ("last_validation", 3),
        ("last_validation", {}),
        ("validation_due", 3),
        ("nonfinite", 3),
        ("nonfinite", {"consecutive_skips": "x"}),
        ("alarms", 3),
        ("alarms", {"raised": 3}),
        ("alarms", {"raised": [[]]}),
    ],
)
def test_a_state_of_other_values_is_refused(run: Path, key: str, value: Any) -> None:
    file = run / "checkpoints" / "step-00000002" / "state.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), key: value}))
    seal(file.parent)
    assert "state.json has no valid" in refused(run, "steps=4")


@pytest.mark.parametrize("name", ["model", "ema", "discriminator"])
def test_weights_that_are_not_finite_are_not_resumed(run: Path, name: str) -> None:
    file = run / "checkpoints" / "step-00000002" / f"{name}.safetensors"
    weights = load_file(file)
    key = next(key for key, tensor in weights.items() if tensor.is_floating_point() and tensor.numel())
    weights[key].view(-1)[0] = float("nan")
    save_file(weights, file)
    seal(file.parent)
    assert f"not all values of '{name}: {key}' are finite; resume=PATH of an earlier" in refused(run, "steps=4")


def test_weights_of_another_kind_of_number_are_not_resumed(run: Path) -> None:
    file = run / "checkpoints" / "step-00000002" / "model.safetensors"
    weights = load_file(file)
    key = next(iter(weights))
    save_file({**weights, key: weights[key].int()}, file)
    seal(file.parent)
    assert f"its 'model' does not fit this config: '{key}' holds int32, not float32" in refused(run, "steps=4")


def test_a_discriminator_that_the_run_does_not_have_is_named(tmp_path: Path) -> None:
    Stage1(compose(*SHORT, "model.discriminator=null", "model.adversary=null"), tmp_path).run()
    assert "its 'discriminator' does not fit this config: " in refused(tmp_path, "allow_changes=true")


def test_a_run_of_the_other_stage_is_refused(run: Path, tmp_path: Path) -> None:
    words = [*SHORT, "pipeline=stage2", f"run={run}", f"resume={run}"]
    with pytest.raises(UserError, match="is of a stage1 run, and this is stage2"):
        Stage2(compose(*words), tmp_path / "second").run()


def test_a_run_beyond_the_end_is_refused(run: Path) -> None:
    assert refused(run, "steps=1") == (
        f"steps=1: must be at least 2, the step of {run}/checkpoints/step-00000002; "
        "steps count from the start of the run"
    )


def test_a_new_run_over_an_old_one_is_refused(run: Path) -> None:
    before = (run / "metrics.jsonl").read_bytes()
    with pytest.raises(UserError) as caught:
        Stage1(compose(*SHORT), run).run()
    assert str(caught.value) == (
        f"run_dir={run}: holds a run at step 2; continue it with resume=true, or give another run_dir for a new run"
    )
    assert (run / "metrics.jsonl").read_bytes() == before


@pytest.mark.parametrize("resume", ["true", "false", "{run}"])
def test_a_run_without_an_intact_checkpoint_is_not_changed(run: Path, resume: str) -> None:
    """Neither restarted nor deleted: the user may have a backup of the checkpoints."""
    (run / "checkpoints" / "step-00000002").rename(run / "checkpoints" / "step-00000001")
    shutil.copytree(run / "checkpoints" / "step-00000001", run / "checkpoints" / "step-00000002")
    for folder in (run / "checkpoints").iterdir():
        content = bytearray((folder / "model.safetensors").read_bytes())
        content[len(content) // 2] ^= 1
        (folder / "model.safetensors").write_bytes(content)
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    with pytest.raises(UserError) as caught:
        Stage1(compose(*SHORT, f"resume={resume.format(run=run)}"), run).run()
    assert str(caught.value) in (
        f"run_dir={run}: holds a run, but none of its checkpoints is intact (step-00000001, step-00000002); nothing "
        "was changed. Restore one from a backup, or give another run_dir to start a new run",
        f"resume={run}: no intact checkpoint there; give a run's folder or one of its checkpoints",
    )
    assert {path: path.read_bytes() for path in run.rglob("*") if path.is_file()} == before


def test_a_refused_command_does_not_change_the_run(run: Path) -> None:
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    refused(run, "optimizer.lr=0.1")
    refused(run, "model.quantizer.codebook_size=32", "allow_changes=true")
    assert {path: path.read_bytes() for path in run.rglob("*") if path.is_file()} == before


class EndedError(Exception):
    """Raised in place of a scheduler's kill during validation."""


@pytest.mark.parametrize(("every", "step"), [(2, 2), (50, 6)])
@pytest.mark.parametrize("told", [False, True])
def test_a_process_killed_during_validation_loses_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, every: int, step: int, told: bool
) -> None:
    """In a validation between two steps and in the last one, before and after its metrics are logged."""
    words = [*TINY, f"evaluate.every={every}", "checkpoint.every=50", "checkpoint.best=psnr"]
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    Stage1(compose(*words), whole).run()

    def end(*_: Any) -> Any:
        raise EndedError

    with monkeypatch.context() as patch:
        patch.setattr(*(Trainer, "_store_validation") if told else (TokenizerTask, "evaluate"), end)
        with pytest.raises(EndedError):
            Stage1(compose(*words), cut).run()
    found = latest_checkpoint(cut)
    assert found and found.step == step
    Stage1(compose(*words, "resume=true"), cut).run()
    assert lines(cut) == lines(whole)
    left, right = latest_checkpoint(cut), latest_checkpoint(whole)
    assert left and right and left.state == right.state and not left.state["validation_due"]


def test_a_pending_validation_is_done_after_resuming(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In the folder of another run, which has no checkpoint to store it in."""
    words = [*TINY, "checkpoint.every=50"]
    Stage1(compose(*words), tmp_path / "whole").run()

    def end(*_: Any) -> Any:
        raise EndedError

    with monkeypatch.context() as patch:
        patch.setattr(TokenizerTask, "evaluate", end)
        with pytest.raises(EndedError):
            Stage1(compose(*words), tmp_path / "cut").run()
    Stage1(compose(*words, f"resume={tmp_path / 'cut'}"), tmp_path / "other").run()
    found, whole = latest_checkpoint(tmp_path / "other"), latest_checkpoint(tmp_path / "whole")
    assert found and whole and found.state == whole.state


def test_resuming_from_another_run_does_not_overwrite_one(run: Path, tmp_path: Path) -> None:
    other = shutil.copytree(run, tmp_path / "other")
    with pytest.raises(UserError, match="holds a run at step 2"):
        Stage1(compose(*SHORT, f"resume={other}"), run).run()


def test_a_finished_run_is_not_run_again(run: Path) -> None:
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file() and path.name != "summary.json"}
    value = Stage1(compose(*SHORT, "resume=true"), run).run()
    assert value == -lines(run)[-1]["validation/psnr"]
    assert {path: path.read_bytes() for path in before} == before


def test_resuming_an_earlier_step_archives_the_later_checkpoints(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    Stage1(compose(*TINY, "checkpoint.keep=2"), tmp_path).run()
    names = [f"step-0000000{step}" for step in (4, 6)]
    checkpoints = tmp_path / "checkpoints"
    assert sorted(path.name for path in checkpoints.iterdir()) == names
    words = [*TINY, f"resume={checkpoints / names[0]}", "optimizer.lr=0.01", "allow_changes=true", "checkpoint.keep=1"]
    before = (checkpoints / names[1] / "model.safetensors").read_bytes()
    Stage1(compose(*words), tmp_path).run()
    assert "archived as" in caplog.text
    assert sorted(path.name for path in checkpoints.iterdir()) == ["aside-step-00000006", "step-00000006"]
    assert (checkpoints / "aside-step-00000006" / "model.safetensors").read_bytes() == before


def test_a_damaged_checkpoint_does_not_displace_intact_ones(tmp_path: Path) -> None:
    """The newest is broken and keep=1: the run must resume from the one before, and keep what it saves next."""
    Stage1(compose(*TINY), tmp_path).run()
    (tmp_path / "checkpoints" / "step-00000006" / "model.safetensors").write_bytes(b"damaged")
    whole = lines(tmp_path)

    def stop(self: TokenizerTask, number: int, batch: Any) -> Any:
        if number == 5:
            raise KeyboardInterrupt
        return step(self, number, batch)

    step = TokenizerTask.step
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(TokenizerTask, "step", stop)
        with pytest.raises(KeyboardInterrupt):
            Stage1(compose(*TINY, "resume=true", "checkpoint.keep=1", "checkpoint.every=1"), tmp_path).run()
    found = latest_checkpoint(tmp_path)
    assert found and found.step == 5
    Stage1(compose(*TINY, "resume=true"), tmp_path).run()
    assert lines(tmp_path) == whole


def test_a_moved_folder_of_images_is_the_same_run(tmp_path: Path) -> None:
    from tests.data.packing import png

    for i in range(20):
        path = tmp_path / "here" / f"{i:02}.png"
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(png((i * 10, 0, 0)))
    words = [*SHORT, "data=folder"]
    Stage1(compose(*words, f"data.root={tmp_path / 'here'}"), tmp_path / "run").run()
    (tmp_path / "here").rename(tmp_path / "there")
    Stage1(compose(*words, f"data.root={tmp_path / 'there'}", "resume=true"), tmp_path / "run").run()
    (tmp_path / "there" / "07.png").write_bytes(png((1, 2, 3), (40, 40)))
    with pytest.raises(UserError, match="the training images"):
        Stage1(compose(*words, f"data.root={tmp_path / 'there'}", "resume=true"), tmp_path / "run").run()


MODEL = {"encoder": {"gradient_checkpointing": False}, "decoder": {}, "prior": {"gradient_checkpointing": False}}


def config(**values: Any) -> DictConfig:
    return DictConfig(
        {"batch_size": 12, "accumulate": 1, "precision": "fp32", "image_size": 256, "model": MODEL, **values}
    )


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 8 GiB"),
        MemoryError(),
    ],
)
def test_out_of_memory_names_the_options_that_lower_it(error: Exception) -> None:
    with pytest.raises(UserError) as caught, explain_oom("stage1, step 3", "stage1", config()):
        raise error
    reason = "CUDA out of memory" if str(error) else "no memory left"
    assert str(caught.value) == (
        f"stage1, step 3: out of memory ({reason}). Continue with resume=true and accumulate=2, precision=bf16, "
        "model.encoder.gradient_checkpointing=true; or start a new run with batch_size=6 or image_size=128"
    )


def test_an_allocation_that_this_machine_refuses() -> None:
    with (
        pytest.raises(UserError, match=r"^here: out of memory .*model.prior.gradient_checkpointing=true"),
        explain_oom("here", "stage2", config()),
    ):
        torch.empty(2**60)


def test_options_that_cannot_be_lowered_are_not_suggested() -> None:
    with pytest.raises(UserError) as caught, explain_oom("here", "stage2", config(batch_size=1, precision="bf16")):
        raise MemoryError
    assert "accumulate" not in str(caught.value) and "batch_size" not in str(caught.value)
    assert "bf16" not in str(caught.value)


def test_a_bug_is_not_reported_as_out_of_memory() -> None:
    with pytest.raises(RuntimeError, match=r"^a bug$"), explain_oom("here", "stage2", config()):
        raise RuntimeError("a bug")


def test_out_of_memory_in_a_step_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def step(*_: Any) -> Any:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried")

    monkeypatch.setattr(TokenizerTask, "step", step)
    logging.disable(logging.NOTSET)
    with pytest.raises(UserError, match=r"^stage1, step 1: out of memory \(CUDA out of memory\)"):
        Stage1(compose(*TINY), tmp_path).run()
