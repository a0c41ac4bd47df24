"""Loggers: where the numbers and pictures of a run go."""

from vqf.loggers import console, images, report, tensorboard, wandb

__all__ = ["console", "images", "report", "tensorboard", "wandb"]
