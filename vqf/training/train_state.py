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
from vqf.training.ema import Average
from vqf.training.task import Stage

# A schedule runs from the first step on, an optimizer that waits (the discriminator's) takes its first step later.
warnings.filterwarnings("ignore", message="Detected call of `lr_scheduler.step", category=UserWarning)


class Training:
    """Modules and optimizers of a stage, with the schedules and the average that follow them."""

    def __init__(self, stage: Stage, config: DictConfig, engine: Engine) -> None:
        self.stage, self.config, self.engine = stage, config, engine
        self.average = None if config.ema is None else Average(stage.model, config.ema)
        self.schedules: dict[str, LRScheduler] = {
            name: build("schedule", config.schedule, optimizer=optimizer, steps=config.steps)
            for name, optimizer in stage.optimizers.items()
        }

    def follow(self, step: int) -> None:
        """Let schedules, buffers of other processes and the average follow a step that the stage has taken."""
        for schedule in self.schedules.values():
            schedule.step()
        self.engine.align(self.stage.modules[name] for name in self.stage.optimizers)
        if self.average and self.stage.players["model"].moved:
            self.average.update(step)

    def rates(self) -> dict[str, float]:
        """Return the learning rate of every optimizer."""
        return {f"lr/{name}": float(each.get_last_lr()[0]) for name, each in self.schedules.items()}

    def snapshot(self, state: Mapping[str, Any]) -> Snapshot | None:
        """Copy everything, with what else `state.json` is to say, in the first process; every process must call it."""
        weights = {name: self.engine.gather(module.state_dict()) for name, module in self.stage.modules.items()}
        if self.average:
            weights["ema"] = self.engine.gather(self.average.state())
        optimizers = {name: self.engine.gather_optimizer(each) for name, each in self.stage.optimizers.items()}
        if not comm.first():
            return None
        schedules = {name: each.state_dict() for name, each in self.schedules.items()}
        states = {"optimizers": optimizers, "schedules": schedules}
        return Snapshot(state, self.config, _copied(weights), _copied(states))

    def restore(self, found: Checkpoint) -> None:
        """Become what a checkpoint holds.

        Raises:
            UserError: If its weights or optimizers do not fit.
        """
        for name, module in self.stage.modules.items():
            with _fitting(found, name):
                self.engine.load(module, found.weights(name))
        if self.average:
            with _fitting(found, "ema"):
                self.average.load(self.engine.cut(found.weights("ema"), self.average.tensors))
        states = found.optimizers()
        anew = any(found.config.get(part) != self.config.get(part) for part in ("optimizer", "schedule"))
        for name in self.stage.optimizers:
            with _fitting(found, f"optimizer of {name}"):
                self._restore(name, states, anew)

    def _restore(self, name: str, states: Mapping[str, Any], anew: bool) -> None:
        """Load an optimizer and its schedule; `anew` keeps the rates and other settings of this config."""
        optimizer, schedule = self.stage.optimizers[name], self.schedules[name]
        bases = schedule.base_lrs
        settings = [{key: each for key, each in group.items() if key != "params"} for group in optimizer.param_groups]
        self.engine.load_optimizer(optimizer, states["optimizers"][name])
        schedule.load_state_dict(states["schedules"][name])
        if anew and isinstance(schedule, LambdaLR):
            schedule.base_lrs = bases
            rates = [base * rise(schedule.last_epoch) for base, rise in zip(bases, schedule.lr_lambdas, strict=True)]
            schedule._last_lr = rates
            for group, own, rate in zip(optimizer.param_groups, settings, rates, strict=True):
                group.update(own, lr=rate)


def _copied(tree: Any) -> Any:
    """Copy the tensors of nested mappings and lists to memory of their own on the CPU."""
    if isinstance(tree, Tensor):
        return tree.detach().to("cpu", copy=True)
    if isinstance(tree, Mapping):
        return {key: _copied(each) for key, each in tree.items()}
    return type(tree)(map(_copied, tree)) if isinstance(tree, list | tuple) else tree


@contextmanager
def _fitting(found: Checkpoint, name: str) -> Iterator[None]:
    try:
        yield
    except torch.OutOfMemoryError:
        raise
    except (RuntimeError, ValueError, LookupError, OSError) as error:
        lines = str(error).splitlines() or [repr(error)]
        reason = lines[min(1, len(lines) - 1)].strip()  # torch's first line names the class
        raise UserError(f"resume: {found.path}: its '{name}' does not fit this config: {reason}") from error
