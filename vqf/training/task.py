"""What the trainer is given: a task and its batches."""

from collections.abc import Callable, Generator, Mapping
from typing import Any, Protocol

from torch import Tensor, nn
from torch.optim import Optimizer

from vqf.batch import Batch
from vqf.evaluation.validation import ValidationResult
from vqf.training.optimizer_step import OptimizerStep

# (first, stop) -> the batches with these numbers. Batch numbers count over all epochs.
Batches = Generator[Batch]
BatchSource = Callable[[int, int], Batches]


class TrainingTask(Protocol):
    """One of the two stages, to be trained."""

    kind: str  # "stage1" or "stage2"

    @property
    def model(self) -> nn.Module: ...  # has an EMA and is validated

    @property
    def modules(self) -> Mapping[str, nn.Module]: ...  # saved in checkpoints; `model` has the name "model"

    @property
    def optimizer_steps(self) -> Mapping[str, OptimizerStep]: ...  # by the name of the module that is trained

    @property
    def optimizers(self) -> Mapping[str, Optimizer]: ...  # those of `optimizer_steps`, under the same names

    @property
    def metadata(self) -> Mapping[str, Any]: ...  # JSON, saved in the checkpoint's state.json

    @property
    def higher_is_better(self) -> Mapping[str, bool]: ...  # by validation metric: what `checkpoint.best` may name

    # Trains on one batch. Returns scalars to log, on the device: reading one would make the host wait.
    def step(self, step: int, batch: Batch) -> dict[str, Tensor]: ...

    # Runs without gradients, in eval mode, with the EMA weights in `model`, on every rank.
    def evaluate(self, model: nn.Module) -> ValidationResult: ...

    # What is too expensive for every validation; runs once, with the final weights.
    def final_validation(self, model: nn.Module) -> ValidationResult: ...
