"""The TensorBoard logger, https://www.tensorflow.org/tensorboard."""

from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import numpy as np
from annotated_types import Interval
from omegaconf import DictConfig, OmegaConf
from torch import Tensor

from vqf.errors import UserError
from vqf.loggers.image_grid import make_grid
from vqf.registry import register

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter


@register("logger", "tensorboard")
class TensorBoardLogger:
    """Writes scalars, images and the config into `tensorboard/` of the run's folder.

    A resumed run continues the same curves.

    Args:
        run_dir: The run's folder.
        config: Written as text, unresolved.
        flush_seconds: Longest time that scalars are buffered before they are written.
    """

    def __init__(
        self, run_dir: Path, config: DictConfig, *, flush_seconds: Annotated[int, Interval(ge=1, le=86_400)] = 30
    ) -> None:
        if find_spec("tensorboard") is None:
            raise UserError('logger=tensorboard: the package is missing; pip install "vqf[tensorboard]"')
        self.folder, self.config, self.flush_seconds = run_dir / "tensorboard", config, flush_seconds
        self.writer: SummaryWriter | None = None

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        for key, value in values.items():
            self._open(step).add_scalar(key, value, step)

    def images(self, step: int, name: str, images: Tensor) -> None:
        self._open(step).add_image(name, np.asarray(make_grid(images)), step, dataformats="HWC")

    def close(self) -> None:
        if self.writer is not None:
            self.writer.close()
            self.writer = None

    def _open(self, step: int) -> "SummaryWriter":
        """Open the file; later points of an earlier process are purged."""
        if self.writer is None:
            from torch.utils.tensorboard import SummaryWriter

            purge_step = step if self.folder.is_dir() else None
            self.writer = SummaryWriter(str(self.folder), purge_step=purge_step, flush_secs=self.flush_seconds)
            text = OmegaConf.to_yaml(self.config, resolve=False)
            self.writer.add_text("config", f"```yaml\n{text}```", step)
        return self.writer
