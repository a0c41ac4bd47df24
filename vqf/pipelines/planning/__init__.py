"""Helpers of `pipeline=plan`: memory, FLOPs and time of a training before it starts."""
