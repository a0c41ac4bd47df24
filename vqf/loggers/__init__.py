"""Loggers of scalars and images."""

from vqf.loggers import console, images, tensorboard, wandb
from vqf.loggers.report import page

__all__ = ["console", "images", "page", "tensorboard", "wandb"]
