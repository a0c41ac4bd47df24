"""Loggers: where the numbers and pictures of a run go."""

from vqf.loggers import console, images, report, wandb

__all__ = ["console", "images", "report", "wandb"]
