"""Helpers of `pipeline=import`: write an imported checkpoint as a run, with presets to continue its training."""
