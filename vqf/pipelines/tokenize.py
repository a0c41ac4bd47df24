"""Any data source into shards of tokens, in any number of processes: before stage 2, or as the first thing it does."""

from pathlib import Path

import torch
from omegaconf import DictConfig, open_dict

from vqf.config.inherit import inherit
from vqf.dataloading.encode import TokenEncoder, check_image_size, token_folder, tokenize_split
from vqf.dataloading.image_files import open_splits
from vqf.distributed.engine import make_engine
from vqf.registry import register
from vqf.runs.load import build_conditioner_stack, find_tokenizer_checkpoint, load_tokenizer
from vqf.terminal import log


@register("pipeline", "tokenize")
class Tokenize:
    """Write the tokens of `data` into shards in `tokens.root`, which `pipeline=stage2 tokens.root=...` trains on.

    `run` is the run of the tokenizer; data and conditions are its own unless others are named. Each of several
    processes writes other shards. Those that an earlier run finished are kept if their hash is right; a run that is
    killed leaves none half-written.

    Args:
        rows: Views of images in a shard: 4096 by default, or as many as the folder began with.
    """

    distributed = True

    def __init__(self, config: DictConfig, run_dir: Path, *, rows: int | None = None) -> None:
        if rows is not None and rows < 1:
            raise ValueError(f"rows={rows}: a shard has at least one")
        self.config, self.run_dir, self.rows = config, run_dir, rows

    def run(self) -> None:
        """Write `<part>-00000.safetensors` and so on, and `<part>.json`, for training and validation."""
        checkpoint = find_tokenizer_checkpoint(self.config.run)
        config = inherit(self.config, checkpoint.config, ["data", "model.conditioner"])
        engine = make_engine(config)
        tokenizer = engine.prepare(load_tokenizer(checkpoint))
        check_image_size(config, tokenizer)
        with open_dict(config):
            config.image_size = list(tokenizer.image_size)
        data, parts = open_splits(config)
        torch.manual_seed(config.seed)  # as stage 2 does: a condition may have weights
        conditions = build_conditioner_stack(config, tokenizer, data.classes).to(engine.device)
        folder = token_folder(config, self.run_dir)
        for part, split in parts.items():
            found = tokenize_split(TokenEncoder(tokenizer, conditions, engine), split, part, folder, config, self.rows)
            log.info(
                "%s: %d views of %d images in %d shards", part, found.num_augmentations, len(found), len(found.shards)
            )
        log.info("%s", folder)
