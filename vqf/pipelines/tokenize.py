"""Encode a data source into token shards."""

from pathlib import Path

import torch
from omegaconf import DictConfig, open_dict

from vqf.config.inherit import inherit
from vqf.dataloading.encode import TokenEncoder, check_image_size, token_folder, tokenize_split
from vqf.dataloading.splits import open_splits
from vqf.distributed.engine import make_engine
from vqf.options.ranges import PositiveInt
from vqf.registry import register
from vqf.runs.load import build_conditioner_stack, find_tokenizer_checkpoint, load_tokenizer
from vqf.terminal import log


@register("pipeline", "tokenize")
class Tokenize:
    """Write the tokens of `data` into shards in `tokens.root`; `pipeline=stage2 tokens.root=...` trains on them.

    Data and conditioners are those of `run` unless the command line sets them. Intact shards are kept.

    Args:
        rows: Rows (augmented views of images) per shard; by default 4096, or as in the folder's shards.
    """

    distributed = True

    def __init__(self, config: DictConfig, run_dir: Path, *, rows: PositiveInt | None = None) -> None:
        self.config, self.run_dir, self.rows = config, run_dir, rows

    def run(self) -> None:
        checkpoint = find_tokenizer_checkpoint(self.config.run)
        config = inherit(self.config, checkpoint.config, ["data", "model.conditioner"])
        engine = make_engine(config)
        tokenizer = engine.prepare(load_tokenizer(checkpoint))
        check_image_size(config, tokenizer)
        with open_dict(config):
            config.image_size = list(tokenizer.image_size)
        data, splits = open_splits(config)
        torch.manual_seed(config.seed)  # as in stage 2, so that untrained conditioners get the same weights
        conditioner = build_conditioner_stack(config, tokenizer, data.classes).to(engine.device)
        folder = token_folder(config, self.run_dir)
        encoder = TokenEncoder(tokenizer, conditioner, engine)
        for name, split in splits.items():
            tokens = tokenize_split(encoder, split, name, folder, config, self.rows)
            log.info(
                "%s: %d views of %d images in %d shards",
                name,
                tokens.num_augmentations,
                len(tokens),
                len(tokens.shards),
            )
        log.info("%s", folder)
