"""What a stage is to the loop."""

from collections.abc import Mapping
from typing import Any, Protocol

from torch import Tensor, nn
from torch.optim import Optimizer

from vqf.batch import Batch
from vqf.evaluation.validation import ValidationResult
from vqf.training.optimizer_step import OptimizerStep


class TrainingTask(Protocol):
    """What is optimised."""

    kind: str  # "stage1" or "stage2"

    @property
    def model(self) -> nn.Module: ...  # what is averaged and evaluated

    @property
    def modules(self) -> Mapping[str, nn.Module]: ...  # what a checkpoint keeps, `model` under the name "model"

    @property
    def optimizer_steps(
        self,
    ) -> Mapping[str, OptimizerStep]: ...  # who moves, under the names of the modules that they move

    @property
    def optimizers(self) -> Mapping[str, Optimizer]: ...  # theirs

    @property
    def metadata(self) -> Mapping[str, Any]: ...  # kept in the checkpoint's state.json

    @property
    def higher_is_better(self) -> Mapping[str, bool]: ...  # of the held-out numbers by which a checkpoint can be best

    def step(self, step: int, batch: Batch) -> dict[str, Tensor]: ...

    def evaluate(self, model: nn.Module) -> ValidationResult: ...

    def final_validation(
        self, model: nn.Module
    ) -> ValidationResult: ...  # what is too dear for every look, once at the end
