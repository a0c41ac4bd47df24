"""Time of a checkpoint: `python benchmarks/saving.py FOLDER`.

Measures the state of stage 1 of `model=vqgan` (tokenizer, discriminator, moments of both Adams): the copy in memory,
for which a step waits, and the write in a background thread (hashes and flushing to disk included).
"""

import argparse
import shutil
import statistics
import tempfile
import time
from pathlib import Path

import torch
from omegaconf import DictConfig

from vqf import terminal
from vqf.config.compose import config_dir
from vqf.distributed.engine import make_engine
from vqf.registry import build
from vqf.runs.async_checkpointer import AsyncCheckpointer
from vqf.training.tokenizer_task import TokenizerTask, build_tokenizer_task
from vqf.training.train_state import TrainState


def compose(*words: str) -> DictConfig:
    """Compose the config of a command line."""
    from hydra import compose, initialize_config_dir

    with initialize_config_dir(version_base="1.3", config_dir=str(config_dir())):
        return compose("config", overrides=list(words))


def trained(config: DictConfig, size: int) -> TokenizerTask:
    """Return a stage whose optimizers have moments."""
    data = build("data", config.data, image_size=size, seed=0)
    stage = build_tokenizer_task(config, data, make_engine(config))
    for optimizer in stage.optimizers.values():
        for parameter in (each for group in optimizer.param_groups for each in group["params"]):
            parameter.grad = torch.zeros_like(parameter)
        optimizer.step()
    return stage


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", nargs="?", type=Path, default=Path(tempfile.gettempdir()))
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    run_dir = Path(tempfile.mkdtemp(dir=arguments.folder))
    config = compose("model=vqgan", "model/loss=[l1]", "image_size=64", "checkpoint.keep=1")
    stage = trained(config, 64)
    training = TrainState(stage, config, make_engine(config))
    saver, times = (
        AsyncCheckpointer(run_dir, config.checkpoint, None, before_write=lambda: None),
        dict[str, list[float]](),
    )
    try:
        for step in range(arguments.rounds):
            began = time.perf_counter()
            snapshot = training.snapshot({"kind": "stage1", "step": step, "seed": 0, **stage.metadata})
            assert snapshot is not None
            saver.save(snapshot)
            times.setdefault("a step waits", []).append(time.perf_counter() - began)
            saver.wait()
            times.setdefault("until it is on the disk", []).append(time.perf_counter() - began)
        size = sum(file.stat().st_size for file in run_dir.rglob("*") if file.is_file())
    finally:
        saver.close()
        shutil.rmtree(run_dir)
    rows = [(name, f"{statistics.median(each):.2f} s") for name, each in times.items()]
    terminal.print_table(f"a checkpoint of {size / 1e6:.0f} MB, median of {arguments.rounds}", ("", "time"), rows)


if __name__ == "__main__":
    main()
