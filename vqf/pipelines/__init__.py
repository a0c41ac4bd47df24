"""Pipelines: what `python -m vqf.run` can do, chosen with `pipeline=`."""

from vqf.pipelines import convert, full, reconstruct, sample, stage1, stage2

__all__ = ["convert", "full", "reconstruct", "sample", "stage1", "stage2"]
