"""The training state, as a checkpoint saves it."""

import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, fields
from typing import Any, Self

import torch
from omegaconf import DictConfig
from torch import Tensor
from torch.optim.lr_scheduler import LambdaLR, LRScheduler

from vqf.distributed import comm
from vqf.distributed.engine import Engine
from vqf.errors import UserError, name_first
from vqf.networks.weights import check_dtypes, nonfinite_names
from vqf.registry import build
from vqf.run_files.shapes import is_number
from vqf.runs.checkpoint import Checkpoint
from vqf.runs.optimizer_states import ELEMENTWISE, check_fits_optimizer, check_fits_schedule
from vqf.runs.snapshot import Snapshot
from vqf.training.ema import EMA
from vqf.training.task import TrainingTask

# All schedules advance from step 0 on; the discriminator's optimizer takes its first step later.
warnings.filterwarnings("ignore", message="Detected call of `lr_scheduler.step", category=UserWarning)


@dataclass
class Progress:
    """How far a run is; the fields are keys of `state.json`."""

    step: int = 0  # steps done
    skipped_batches: int = 0  # by rollbacks: the next batch has number step + skipped_batches
    best: float | None = None  # the best score of a validation so far
    last_validation: dict[str, Any] | None = None  # "step", and "values": scalars by name
    validation_due: bool = False  # saved, but not yet validated
    last_logged: int = 0  # the last step with a line in metrics.jsonl

    @classmethod
    def from_state(cls, state: Mapping[str, Any]) -> Self:
        """Read it from `state.json`.

        Raises:
            UserError: If a value has another type.
        """
        progress = cls(**{field.name: state.get(field.name, field.default) for field in fields(cls)})
        last = progress.last_validation
        valid = {
            "step": type(progress.step) is int,
            "skipped_batches": type(progress.skipped_batches) is int and progress.skipped_batches >= 0,
            "best": progress.best is None or is_number(progress.best),
            "last_validation": last is None or (isinstance(last, dict) and {"step", "values"} <= last.keys()),
            "validation_due": isinstance(progress.validation_due, bool),
        }
        if wrong := [name for name, is_valid in valid.items() if not is_valid]:
            raise UserError(f"resume: state.json has no valid {wrong[0]}: {getattr(progress, wrong[0])!r}")
        return progress


class TrainState:
    """The modules and optimizers of a task, its schedules, and the EMA of its model."""

    def __init__(self, task: TrainingTask, config: DictConfig, engine: Engine) -> None:
        self.task, self.config, self.engine = task, config, engine
        self.ema = None if config.ema is None else EMA(task.model, config.ema)
        self.schedules: dict[str, LRScheduler] = {
            name: build("schedule", config.schedule, optimizer=optimizer, steps=config.steps)
            for name, optimizer in task.optimizers.items()
        }
        self.nonfinite_at_start: frozenset[str] = frozenset()
        self.nonfinite_at_start = frozenset(self.nonfinite_names())  # such as a buffer with a mask of -inf

    def after_step(self, step: int) -> None:
        for schedule in self.schedules.values():
            schedule.step()
        # Each rank has updated batch norm statistics and codebook averages from its own images.
        self.engine.sync_buffers(self.task.modules[name] for name in self.task.optimizers)
        if self.ema and self.task.optimizer_steps["model"].stepped:
            self.ema.update(step)

    def learning_rates(self) -> dict[str, float]:
        return {f"lr/{name}": float(schedule.get_last_lr()[0]) for name, schedule in self.schedules.items()}

    def nonfinite_names(self) -> list[str]:
        """Names of weights, averages and optimizer moments with NaN or infinity that a new run does not have.

        On a GPU the host waits for the device once.
        """
        names = nonfinite_names({name: comm.local_tensor(tensor) for name, tensor in self._saved_tensors()})
        return [name for name in names if name not in self.nonfinite_at_start]

    def _saved_tensors(self) -> Iterator[tuple[str, Tensor]]:
        for name, module in self.task.modules.items():
            yield from ((f"{name}: {key}", tensor) for key, tensor in module.state_dict().items())
        if self.ema:
            yield from ((f"ema: {key}", tensor) for key, tensor in self.ema.state_dict().items())
        for name, optimizer in self.task.optimizers.items():
            for number, entry in enumerate(optimizer.state.values()):
                for key in ELEMENTWISE & entry.keys():
                    yield f"optimizer of {name}: {key} of parameter {number}", entry[key]

    def snapshot(self, state: Mapping[str, Any]) -> Snapshot | None:
        """Copy everything to the CPU on the main rank (else None); every rank must call this."""
        weights = {name: self.engine.full_state(module.state_dict()) for name, module in self.task.modules.items()}
        if self.ema:
            weights["ema"] = self.engine.full_state(self.ema.state_dict())
        optimizers = {
            name: self.engine.full_optimizer_state(optimizer) for name, optimizer in self.task.optimizers.items()
        }
        if not comm.is_main():
            return None
        schedules = {name: schedule.state_dict() for name, schedule in self.schedules.items()}
        states = {"optimizers": optimizers, "schedules": schedules}
        return Snapshot(state, self.config, _copy_to_cpu(weights), _copy_to_cpu(states))

    def restore(self, checkpoint: Checkpoint) -> None:
        """Load a checkpoint.

        Raises:
            UserError: If its weights or optimizer states do not fit, or are not finite.
        """
        for name, module in self.task.modules.items():
            with _explain_mismatch(checkpoint, name):
                weights = checkpoint.load_weights(name)
                check_dtypes(weights, module.state_dict())
                self.engine.load_weights(module, weights)
        if self.ema:
            with _explain_mismatch(checkpoint, "ema"):
                weights = checkpoint.load_weights("ema")
                check_dtypes(weights, self.ema.state_dict())
                self.ema.load_state_dict(self.engine.shard_state(weights, self.ema.shadow_params))
        states = checkpoint.load_optimizers()
        # With allow_changes=true the config may have another learning rate: then the config's counts.
        keep_config_lr = any(checkpoint.config.get(key) != self.config.get(key) for key in ("optimizer", "schedule"))
        for name in self.task.optimizers:
            with _explain_mismatch(checkpoint, f"optimizer of {name}"):
                self._restore_optimizer(name, states, keep_config_lr)
        names = self.nonfinite_names()
        if comm.any_rank(bool(names)):
            what = name_first(names) if names else "a tensor of another process"
            raise UserError(
                f"resume: {checkpoint.path}: not all values of {what} are finite; resume=PATH of an earlier checkpoint"
            )

    def _restore_optimizer(self, name: str, states: Mapping[str, Any], keep_config_lr: bool) -> None:
        optimizer, schedule = self.task.optimizers[name], self.schedules[name]
        base_lrs = schedule.base_lrs
        options = [{key: value for key, value in group.items() if key != "params"} for group in optimizer.param_groups]
        check_fits_optimizer(states["optimizers"][name], optimizer)
        check_fits_schedule(states["schedules"][name], schedule)
        self.engine.load_optimizer_state(optimizer, states["optimizers"][name])
        schedule.load_state_dict(states["schedules"][name])
        if keep_config_lr and isinstance(schedule, LambdaLR):
            # load_state_dict has overwritten them with the checkpoint's.
            schedule.base_lrs = base_lrs
            factors = [factor(schedule.last_epoch) for factor in schedule.lr_lambdas]
            lrs = [base_lr * factor for base_lr, factor in zip(base_lrs, factors, strict=True)]
            schedule._last_lr = lrs
            for group, own_options, lr in zip(optimizer.param_groups, options, lrs, strict=True):
                group.update(own_options, lr=lr)


def _copy_to_cpu(tree: Any) -> Any:
    if isinstance(tree, Tensor):
        return tree.detach().to("cpu", copy=True)
    if isinstance(tree, Mapping):
        return {key: _copy_to_cpu(value) for key, value in tree.items()}
    return type(tree)(map(_copy_to_cpu, tree)) if isinstance(tree, list | tuple) else tree


@contextmanager
def _explain_mismatch(checkpoint: Checkpoint, name: str) -> Iterator[None]:
    try:
        yield
    except torch.OutOfMemoryError:
        raise
    except (RuntimeError, ValueError, LookupError, OSError) as error:
        lines = str(error).splitlines() or [repr(error)]
        reason = lines[min(1, len(lines) - 1)].strip()  # torch's first line names only the class
        raise UserError(f"resume: {checkpoint.path}: its '{name}' does not fit this config: {reason}") from error
