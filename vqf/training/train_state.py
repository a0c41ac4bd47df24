"""Everything of a run that a step changes: how it gets into a checkpoint, and back out of one."""

import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from omegaconf import DictConfig
from torch import Tensor
from torch.optim.lr_scheduler import LambdaLR, LRScheduler

from vqf.distributed import comm
from vqf.distributed.engine import Engine
from vqf.errors import UserError
from vqf.registry import build
from vqf.runs.checkpoint import Checkpoint
from vqf.runs.snapshot import Snapshot
from vqf.training.ema import EMA
from vqf.training.task import TrainingTask

# A schedule runs from the first step on, an optimizer that waits (the discriminator's) takes its first step later.
warnings.filterwarnings("ignore", message="Detected call of `lr_scheduler.step", category=UserWarning)


class TrainState:
    """Modules and optimizers of a stage, with the schedules and the average that follow them."""

    def __init__(self, task: TrainingTask, config: DictConfig, engine: Engine) -> None:
        self.task, self.config, self.engine = task, config, engine
        self.ema = None if config.ema is None else EMA(task.model, config.ema)
        self.schedules: dict[str, LRScheduler] = {
            name: build("schedule", config.schedule, optimizer=optimizer, steps=config.steps)
            for name, optimizer in task.optimizers.items()
        }

    def after_step(self, step: int) -> None:
        """Let schedules, buffers of other processes and the average follow a step that the stage has taken."""
        for schedule in self.schedules.values():
            schedule.step()
        self.engine.sync_buffers(self.task.modules[name] for name in self.task.optimizers)
        if self.ema and self.task.optimizer_steps["model"].stepped:
            self.ema.update(step)

    def learning_rates(self) -> dict[str, float]:
        """Return the learning rate of every optimizer."""
        return {f"lr/{name}": float(each.get_last_lr()[0]) for name, each in self.schedules.items()}

    def snapshot(self, state: Mapping[str, Any]) -> Snapshot | None:
        """Copy everything, with what else `state.json` is to say, in the first process; every process must call it."""
        weights = {name: self.engine.full_state(module.state_dict()) for name, module in self.task.modules.items()}
        if self.ema:
            weights["ema"] = self.engine.full_state(self.ema.state_dict())
        optimizers = {name: self.engine.full_optimizer_state(each) for name, each in self.task.optimizers.items()}
        if not comm.is_main():
            return None
        schedules = {name: each.state_dict() for name, each in self.schedules.items()}
        states = {"optimizers": optimizers, "schedules": schedules}
        return Snapshot(state, self.config, _copy_to_cpu(weights), _copy_to_cpu(states))

    def restore(self, checkpoint: Checkpoint) -> None:
        """Become what a checkpoint holds.

        Raises:
            UserError: If its weights or optimizers do not fit.
        """
        for name, module in self.task.modules.items():
            with _explain_mismatch(checkpoint, name):
                self.engine.load_weights(module, checkpoint.load_weights(name))
        if self.ema:
            with _explain_mismatch(checkpoint, "ema"):
                self.ema.load_state_dict(
                    self.engine.shard_state(checkpoint.load_weights("ema"), self.ema.shadow_params)
                )
        states = checkpoint.load_optimizers()
        anew = any(checkpoint.config.get(part) != self.config.get(part) for part in ("optimizer", "schedule"))
        for name in self.task.optimizers:
            with _explain_mismatch(checkpoint, f"optimizer of {name}"):
                self._restore_optimizer(name, states, anew)

    def _restore_optimizer(self, name: str, states: Mapping[str, Any], keep_config_lr: bool) -> None:
        """Load an optimizer and its schedule; `keep_config_lr` keeps the rates and other settings of this config."""
        optimizer, schedule = self.task.optimizers[name], self.schedules[name]
        bases = schedule.base_lrs
        settings = [{key: each for key, each in group.items() if key != "params"} for group in optimizer.param_groups]
        self.engine.load_optimizer_state(optimizer, states["optimizers"][name])
        schedule.load_state_dict(states["schedules"][name])
        if keep_config_lr and isinstance(schedule, LambdaLR):
            schedule.base_lrs = bases
            rates = [base * rise(schedule.last_epoch) for base, rise in zip(bases, schedule.lr_lambdas, strict=True)]
            schedule._last_lr = rates
            for group, own, rate in zip(optimizer.param_groups, settings, rates, strict=True):
                group.update(own, lr=rate)


def _copy_to_cpu(tree: Any) -> Any:
    """Copy the tensors of nested mappings and lists to memory of their own on the CPU."""
    if isinstance(tree, Tensor):
        return tree.detach().to("cpu", copy=True)
    if isinstance(tree, Mapping):
        return {key: _copy_to_cpu(each) for key, each in tree.items()}
    return type(tree)(map(_copy_to_cpu, tree)) if isinstance(tree, list | tuple) else tree


@contextmanager
def _explain_mismatch(checkpoint: Checkpoint, name: str) -> Iterator[None]:
    try:
        yield
    except torch.OutOfMemoryError:
        raise
    except (RuntimeError, ValueError, LookupError, OSError) as error:
        lines = str(error).splitlines() or [repr(error)]
        reason = lines[min(1, len(lines) - 1)].strip()  # torch's first line names the class
        raise UserError(f"resume: {checkpoint.path}: its '{name}' does not fit this config: {reason}") from error
