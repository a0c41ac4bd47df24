"""Open a stage-2 run to sample from it."""

from dataclasses import dataclass
from typing import Any

from omegaconf import DictConfig

from vqf.config.inherit import inherit
from vqf.distributed.engine import make_engine
from vqf.models.generator import Generator
from vqf.pipelines.sampling.image_folder import sampling_settings
from vqf.runs.checkpoint import Checkpoint
from vqf.runs.load import find_generator_checkpoint, load_generator


@dataclass(frozen=True)
class OpenedRun:
    """A run's generator, checkpoint and config."""

    checkpoint: Checkpoint
    config: DictConfig  # data, sampler and batch size are the run's unless the command line sets them
    generator: Generator

    def class_name(self, label: int | str | None) -> str | None:
        """Return the name of a class given by number or name.

        Raises:
            UserError: If there is no such class.
        """
        return None if label is None else self.generator.classes[self.generator.class_index(label)]

    def settings(self, **options: Any) -> dict[str, Any]:
        return sampling_settings(self.checkpoint, self.config, **options)


def open_run(config: DictConfig) -> OpenedRun:
    """Open the run `config.run`.

    Raises:
        UserError: If there is no such run, or it has no prior.
    """
    checkpoint = find_generator_checkpoint(config.run)
    config = inherit(config, checkpoint.config, ["data", "sampler", "batch_size"])
    generator = load_generator(checkpoint, config.sampler).to(make_engine(config).device)
    return OpenedRun(checkpoint, config, generator)
