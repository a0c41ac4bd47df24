"""Pipelines: what `python -m vqf.run` can do, chosen with `pipeline=`."""

from vqf.pipelines import (
    check,
    compare,
    complete,
    convert,
    evaluate,
    evaluation_protocol,
    export,
    full,
    plan,
    reconstruct,
    report,
    sample,
    shard,
    stage1,
    stage2,
    tokenize,
)

__all__ = [
    "check",
    "compare",
    "complete",
    "convert",
    "evaluate",
    "evaluation_protocol",
    "export",
    "full",
    "plan",
    "reconstruct",
    "report",
    "sample",
    "shard",
    "stage1",
    "stage2",
    "tokenize",
]
