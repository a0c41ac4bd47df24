"""Pipelines, one module for each value of `pipeline=`."""

from vqf.pipelines import (
    check,
    compare,
    complete,
    evaluate,
    export,
    full,
    import_,
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
    "evaluate",
    "export",
    "full",
    "import_",
    "plan",
    "reconstruct",
    "report",
    "sample",
    "shard",
    "stage1",
    "stage2",
    "tokenize",
]
