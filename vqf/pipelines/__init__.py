"""Pipelines: what `python -m vqf.run` can do, chosen with `pipeline=`."""

from vqf.pipelines import check, complete, convert, full, reconstruct, sample, shard, stage1, stage2

__all__ = ["check", "complete", "convert", "full", "reconstruct", "sample", "shard", "stage1", "stage2"]
