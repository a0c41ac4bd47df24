"""A finished run of stage 2, opened to draw images from it."""

from dataclasses import dataclass

from omegaconf import DictConfig

from vqf.config.inherit import inherit
from vqf.distributed.engine import make_engine
from vqf.models.generator import Generator
from vqf.runs.checkpoint import Checkpoint
from vqf.runs.load import find_generator_checkpoint, load_generator


@dataclass(frozen=True)
class OpenedRun:
    """What is drawn from: on the device that the config chose."""

    checkpoint: Checkpoint
    config: DictConfig  # with the run's data, sampler and batch size where the command names none
    generator: Generator


def open_run(config: DictConfig) -> OpenedRun:
    """Open the run that a config names.

    Raises:
        UserError: If there is none, or it holds no prior.
    """
    checkpoint = find_generator_checkpoint(config.run)
    config = inherit(config, checkpoint.config, ["data", "sampler", "batch_size"])
    generator = load_generator(checkpoint, config.sampler).to(make_engine(config).device)
    return OpenedRun(checkpoint, config, generator)
