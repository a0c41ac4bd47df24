"""Pipelines: what `python -m vqf.run` can do, chosen with `pipeline=`."""

from vqf.pipelines import complete, convert, full, reconstruct, sample, stage1, stage2

__all__ = ["complete", "convert", "full", "reconstruct", "sample", "stage1", "stage2"]
