"""Non-finite scalars: named, and answered by stopping, skipping or rolling back."""

import json
import logging
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from omegaconf import OmegaConf
from torch import Tensor

from tests.support.composing import compose
from tests.training.test_trainer import TINY, lines, weights
from vqf.batch import Batch
from vqf.dataloading.order import ShuffledBatches
from vqf.errors import UserError
from vqf.losses.adversarial import Hinge
from vqf.losses.pixel import L1
from vqf.pipelines.stage1 import Stage1
from vqf.pipelines.stage2 import Stage2
from vqf.runs.checkpoint import latest_checkpoint
from vqf.training.nonfinite import NonFiniteDetector, NonFiniteGuard
from vqf.training.prior_task import PriorTask
from vqf.training.tokenizer_task import TokenizerTask

nan, inf = float("nan"), float("inf")
GAN = [*TINY, "model/quantizer=ema", "+model/regularizer=[lecam]"]


def scalars(**values: float) -> dict[str, Tensor]:
    return {key: torch.tensor(value) for key, value in values.items()}


def test_the_detector_records_the_first_step_and_every_name() -> None:
    detector = NonFiniteDetector()
    detector.update(3, scalars(loss=1.0, l1=2.0))
    detector.update(4, scalars(loss=1.0, l1=2.0, g_loss=0.0))  # the discriminator starts
    detector.update(5, scalars(loss=inf, l1=2.0, g_loss=-inf))
    detector.update(6, scalars(loss=nan, l1=nan, g_loss=nan))
    detector.update(7, scalars(loss=1.0, l1=1.0, g_loss=1.0))
    event = detector.poll()
    assert event is not None
    assert (event.step, event.message) == (5, "'g_loss' is -inf (loss too)")


def test_finite_scalars_are_no_event() -> None:
    detector = NonFiniteDetector()
    detector.update(
        0, {"dead_codes": torch.tensor(3), "loss": torch.tensor(1e30), "half": torch.tensor(2.0).bfloat16()}
    )
    assert detector.poll() is None


@pytest.mark.parametrize("policy", ["skip", "rollback"])
def test_the_limit(policy: str) -> None:
    guard = NonFiniteGuard("stage1", OmegaConf.create({"action": policy, "limit": 2}))
    moved = policy != "skip"

    def step() -> None:
        guard.update(8, scalars(loss=nan))
        guard.poll(moved)

    step()
    step()
    guard.checkpoint_saved() if policy == "rollback" else guard.poll(stepped=True)  # resets the count
    step()
    step()
    with pytest.raises(UserError, match=r"^stage1, step 9: 'loss' is nan, 3 times .*, and nonfinite\.limit=2\. Lower"):
        step()


@pytest.fixture
def spoil(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Multiply a result by a value at some batch numbers, as a broken image would do."""
    at: dict[str, int] = {}
    original = ShuffledBatches.batch

    def batch(self: ShuffledBatches, step: int) -> Any:
        at["now"] = step
        return original(self, step)

    def install(cls: type, name: str, steps: set[int], value: float) -> None:
        method = getattr(cls, name)

        def patched(self: object, *arguments: Any) -> Tensor:
            found = method(self, *arguments)
            return found * value if at["now"] in steps and torch.is_grad_enabled() else found

        monkeypatch.setattr(cls, name, patched)

    monkeypatch.setattr(ShuffledBatches, "batch", batch)
    return install


def record_states(monkeypatch: pytest.MonkeyPatch, cls: type = TokenizerTask) -> list[dict[str, bytes]]:
    """Record all state that a run changes, before its first step and after each."""
    states: list[dict[str, bytes]] = []
    step = cls.step  # type: ignore[attr-defined]

    def state(stage: Any) -> dict[str, bytes]:
        found = {f"{name}/{key}": t for name, module in stage.modules.items() for key, t in module.state_dict().items()}
        for name, optimizer in stage.optimizers.items():
            for number, entry in optimizer.state_dict()["state"].items():
                found |= {f"{name}-optimizer/{number}/{key}": each for key, each in entry.items()}
        return {key: each.numpy().tobytes() for key, each in found.items()}

    def stepped(self: Any, number: int, batch: Batch) -> Any:
        if not states:
            states.append(state(self))
        values = step(self, number, batch)
        states.append(state(self))
        return values

    monkeypatch.setattr(cls, "step", stepped)
    return states


@pytest.mark.parametrize("value", [nan, inf])
def test_a_skipped_step_changes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, spoil: Any, value: float, caplog: pytest.LogCaptureFixture
) -> None:
    spoil(L1, "forward", {0, 4}, value)  # 0: before the codebook is initialized, 4: with the discriminator
    states = record_states(monkeypatch)
    Stage1(compose(*GAN, "nonfinite.action=skip"), tmp_path).run()
    same = [[key for key in after if before.get(key) == after[key]] for before, after in pairwise(states)]
    assert len(same) == 6
    for step, unchanged in enumerate(same):
        if step in (0, 4):
            assert set(unchanged) == set(states[step + 1])
        else:
            assert "model/quantizer.codebook" not in unchanged and "usage/age" not in unchanged
    said = [record.getMessage() for record in caplog.records if "step skipped" in record.getMessage()]
    assert [line.split(";")[1] for line in said] == [" step skipped, 1 of at most 10 in a row"] * 2
    assert said[0].startswith("stage1, step 1: 'l1' is ") and said[1].startswith("stage1, step 5: ")


def test_a_skipped_step_does_not_update_the_ema(tmp_path: Path, spoil: Any) -> None:
    spoil(L1, "forward", {5}, nan)  # the last one
    Stage1(compose(*GAN, "nonfinite.action=skip", "checkpoint.every=5"), tmp_path).run()
    before, after = (tmp_path / "checkpoints" / f"step-0000000{step}" / "ema.safetensors" for step in (5, 6))
    assert before.read_bytes() == after.read_bytes()


def test_the_tokenizer_steps_when_only_the_discriminator_is_skipped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, spoil: Any
) -> None:
    spoil(Hinge, "discriminator_loss", {4}, nan)
    states = record_states(monkeypatch)
    Stage1(compose(*GAN, "nonfinite.action=skip"), tmp_path).run()
    before, after = states[4:6]
    for key, value in after.items():
        if key.startswith("discriminator"):
            assert value == before[key], key
    assert after["model/quantizer.codebook"] != before["model/quantizer.codebook"]


def test_too_many_skipped_steps_stop_the_run_also_over_a_resume(tmp_path: Path, spoil: Any) -> None:
    spoil(L1, "forward", {1, 2, 3, 4}, nan)
    words = [*GAN, "nonfinite.action=skip", "nonfinite.limit=3"]
    for resume in ("false", "true"):  # the second process resumes at step 4, after three skipped steps
        with pytest.raises(
            UserError, match=r"^stage1, step 5: 'l1' is nan.*, 4 times in a row, and nonfinite\.limit=3"
        ):
            Stage1(compose(*words, f"resume={resume}"), tmp_path).run()
    found = latest_checkpoint(tmp_path)
    assert found and found.step == 4


def test_stage2_skips_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, spoil: Any) -> None:
    Stage1(compose(*TINY), tmp_path / "tokenizer").run()
    spoil(PriorTask, "_loss", {2}, nan)
    states = record_states(monkeypatch, PriorTask)
    config = compose(*TINY, "pipeline=stage2", f"run={tmp_path / 'tokenizer'}", "nonfinite.action=skip")
    Stage2(config, tmp_path / "prior").run()
    assert [before == after for before, after in pairwise(states)] == [
        False,
        False,
        True,
        *[False] * 3,
    ]


@pytest.fixture
def order(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The batch numbers that steps were taken on."""
    seen: list[int] = []
    original = ShuffledBatches.batch

    def batch(self: ShuffledBatches, step: int) -> Any:
        seen.append(step)
        return original(self, step)

    monkeypatch.setattr(ShuffledBatches, "batch", batch)
    return seen


def test_rollback_skips_the_batches_up_to_the_event(
    tmp_path: Path, order: list[int], spoil: Any, caplog: pytest.LogCaptureFixture
) -> None:
    spoil(L1, "forward", {3}, nan)
    Stage1(compose(*GAN, "nonfinite.action=rollback"), tmp_path).run()
    assert order == [0, 1, 2, 3, 4, 5, 6, 7]
    found = latest_checkpoint(tmp_path)
    assert found and (found.step, found.state["skipped_batches"]) == (6, 2)
    assert [line["step"] for line in lines(tmp_path) if "loss" in line] == [1, 2, 3, 4, 5, 6]
    assert (
        "stage1, step 4: 'l1' is nan" in caplog.text
        and "rolled back to step 2; continuing with other batches" in caplog.text
    )


def test_rollback_to_step_0(tmp_path: Path, spoil: Any) -> None:
    spoil(L1, "forward", {0}, nan)
    Stage1(compose(*GAN, "nonfinite.action=rollback"), tmp_path).run()
    found = latest_checkpoint(tmp_path)
    assert found and (found.step, found.state["skipped_batches"]) == (6, 1)


def test_a_run_with_rollbacks_resumes_bit_for_bit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, spoil: Any) -> None:
    spoil(L1, "forward", {1, 5}, nan)
    words = [*GAN, "nonfinite.action=rollback"]
    Stage1(compose(*words), tmp_path / "uninterrupted").run()
    for kill in range(8):
        with monkeypatch.context() as patch:
            end_after(kill, patch)
            with pytest.raises(KeyboardInterrupt):
                Stage1(compose(*words, "resume=true"), tmp_path / "resumed").run()
    Stage1(compose(*words, "resume=true"), tmp_path / "resumed").run()
    assert lines(tmp_path / "resumed") == lines(tmp_path / "uninterrupted")
    assert weights(tmp_path / "resumed") == weights(tmp_path / "uninterrupted")


def end_after(steps: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """End the process after so many calls of step, counting those after a rollback."""
    numbers: Iterator[int] = iter(range(100))
    original = TokenizerTask.step

    def step(self: TokenizerTask, number: int, batch: Batch) -> Any:
        if next(numbers) >= min(steps, 2):
            raise KeyboardInterrupt
        return original(self, number, batch)

    monkeypatch.setattr(TokenizerTask, "step", step)


def test_too_many_rollbacks_stop_the_run(tmp_path: Path, spoil: Any) -> None:
    spoil(L1, "forward", set(range(2, 50)), nan)
    with pytest.raises(
        UserError, match=r"^stage1, step 3: .*, 4 times without a new checkpoint, and nonfinite\.limit=3"
    ):
        Stage1(compose(*GAN, "nonfinite.action=rollback", "nonfinite.limit=3"), tmp_path).run()
    found = latest_checkpoint(tmp_path)
    assert found and found.step == 2
    assert json.loads((found.path / "state.json").read_text())["skipped_batches"] == 0


def test_non_finite_scalars_between_two_log_lines_are_detected(tmp_path: Path, spoil: Any) -> None:
    spoil(L1, "forward", {2}, nan)
    with pytest.raises(UserError, match=r"^stage1, step 3: 'l1' is nan"):
        Stage1(compose(*GAN, "log.every=50", "checkpoint.every=50"), tmp_path).run()


def test_a_device_that_is_not_read_every_step_never_saves_non_finite_weights(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, spoil: Any, caplog: pytest.LogCaptureFixture
) -> None:
    """As on a GPU: the record is read where something is logged, validated or saved."""
    from vqf.training.trainer import Trainer

    reads: list[int] = []
    read = NonFiniteGuard.poll
    every = lambda self, needed: self.nonfinite_guard.poll(True) if needed else None  # noqa: E731
    monkeypatch.setattr(Trainer, "_poll_nonfinite", every)
    monkeypatch.setattr(NonFiniteGuard, "poll", lambda self, moved: (reads.append(1), read(self, moved))[1])
    spoil(L1, "forward", {2}, nan)
    caplog.set_level(logging.INFO, "vqf")
    Stage1(compose(*GAN, "nonfinite.action=rollback", "log.every=3", "checkpoint.every=2"), tmp_path).run()
    found = latest_checkpoint(tmp_path)
    assert found and (found.step, found.state["skipped_batches"]) == (6, 1)
    assert len(reads) == 5  # at steps 2, 3, and after the rollback 3, 4, 6
    assert "stage1, step 3: 'l1' is nan" in caplog.text


def spoil_weights(monkeypatch: pytest.MonkeyPatch, spoiled: set[int], where: str = "weight") -> None:
    """Let steps on some batches spoil a weight or a moment after all scalars were finite."""
    at: dict[str, int] = {}
    batch_of, step_of = ShuffledBatches.batch, TokenizerTask.step

    def batch(self: ShuffledBatches, step: int) -> Any:
        at["now"] = step
        return batch_of(self, step)

    def step(self: TokenizerTask, number: int, batch: Batch) -> Any:
        scalars = step_of(self, number, batch)
        if at["now"] in spoiled:
            parameter = next(self.modules["model"].parameters())
            tensor = parameter if where == "weight" else self.optimizers["model"].state[parameter]["exp_avg_sq"]
            tensor.data[(0,) * tensor.ndim] = inf
        return scalars

    monkeypatch.setattr(ShuffledBatches, "batch", batch)
    monkeypatch.setattr(TokenizerTask, "step", step)


@pytest.mark.parametrize("action", ["stop", "skip"])
def test_the_last_step_saves_no_weights_that_are_not_finite(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, action: str
) -> None:
    spoil_weights(monkeypatch, {0}, "weight")
    words = [*TINY, "schedule=constant", "steps=1", f"nonfinite.action={action}"]
    with pytest.raises(UserError) as caught:
        Stage1(compose(*words), tmp_path).run()
    assert str(caught.value).startswith("stage1, step 1: not all values of 'model: ")
    assert "are finite after the step; nothing of it is saved. Lower optimizer.lr" in str(caught.value)
    assert latest_checkpoint(tmp_path) is None


@pytest.mark.parametrize(("where", "what"), [("weight", "'model: "), ("moment", "'optimizer of model: exp_avg_sq of ")])
def test_weights_and_moments_are_checked_before_they_are_saved(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: str, what: str
) -> None:
    spoil_weights(monkeypatch, {3}, where)
    with pytest.raises(UserError, match=f"^stage1, step 4: not all values of {what}"):
        Stage1(compose(*TINY), tmp_path).run()
    found = latest_checkpoint(tmp_path)
    assert found and found.step == 2


def test_spoiled_weights_are_rolled_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    spoil_weights(monkeypatch, {3, 7})  # the second after the last step
    Stage1(compose(*TINY, "nonfinite.action=rollback"), tmp_path).run()
    found = latest_checkpoint(tmp_path)
    assert found and (found.step, found.state["skipped_batches"]) == (6, 4)
    assert all(weight.isfinite().all() for weight in found.load_weights("model").values())


def test_a_buffer_that_is_infinite_from_the_start_is_no_fault(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    built = TokenizerTask.__init__

    def init(self: TokenizerTask, *arguments: Any, **options: Any) -> None:
        built(self, *arguments, **options)
        self.modules["model"].register_buffer("mask", torch.tensor([0.0, -inf]))

    monkeypatch.setattr(TokenizerTask, "__init__", init)
    Stage1(compose(*TINY, "steps=2"), tmp_path).run()
    assert latest_checkpoint(tmp_path) is not None
