"""Loggers: where the numbers and images of a run go."""

from vqf.loggers import console, images, tensorboard, wandb
from vqf.loggers.report import page

__all__ = ["console", "images", "page", "tensorboard", "wandb"]
