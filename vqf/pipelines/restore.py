"""From a run on disk back to a model: its own config says what to build, its weights fill it."""

from collections.abc import Sequence
from pathlib import Path

import torch
from omegaconf import DictConfig, OmegaConf

from vqf.errors import UserError
from vqf.generator import Generator
from vqf.pipelines.checkpoint import Checkpoint, locate
from vqf.registry import build, check
from vqf.tokenizer import Tokenizer, build_tokenizer

TOKENIZER_PARTS = ("encoder", "quantizer", "decoder")


def load(path: str | Path, device: str | torch.device = "cpu") -> Tokenizer | Generator:
    """Load a trained model: a tokenizer from a stage-1 run, a generator from a stage-2 run.

    Nothing that a checkpoint names is imported: if it was trained with a component of yours, import the module
    that registers it first.

    Args:
        path: A run's folder or one of its checkpoints.
        device: Where to put it.

    Raises:
        UserError: If there is no whole checkpoint, or a component that it needs is not registered.
    """
    checkpoint = locate(path, lambda _: True, "a run of vqf", "train one with python -m vqf.run")
    if checkpoint.kind == "stage1":
        return load_tokenizer(checkpoint).to(device)
    return load_generator(checkpoint).to(device)


def find_tokenizer(path: str | Path | None) -> Checkpoint:
    """Locate a checkpoint that holds a tokenizer: of a stage-1 run, or of a stage-2 run, which keeps its own."""
    return locate(
        path,
        lambda found: found.kind == "stage1" or found.has("tokenizer"),
        "the run of a tokenizer",
        "python -m vqf.run pipeline=stage1 trains one",
    )


def find_generator(path: str | Path | None) -> Checkpoint:
    """Locate a checkpoint of a stage-2 run."""
    return locate(
        path,
        lambda found: found.kind == "stage2",
        "the run of a prior",
        f"python -m vqf.run pipeline=stage2 run={path or 'FOLDER'} trains one on its tokenizer",
    )


def load_tokenizer(checkpoint: Checkpoint) -> Tokenizer:
    """Rebuild the tokenizer of a checkpoint, with averaged weights where it has them, in eval mode."""
    model = checkpoint.config.model
    _check_registered(checkpoint, TOKENIZER_PARTS)
    size: Sequence[int] = checkpoint.state["image_size"]
    tokenizer = build_tokenizer(model, (size[0], size[1]))
    if checkpoint.kind == "stage2":
        name = "tokenizer"
    else:
        name = "ema" if checkpoint.has("ema") else "model"
    tokenizer.load_state_dict(checkpoint.weights(name))
    return tokenizer.eval().requires_grad_(False)


def load_generator(checkpoint: Checkpoint, sampler: DictConfig | None = None) -> Generator:
    """Rebuild tokenizer, conditioner, prior and sampler of a stage-2 checkpoint, in eval mode.

    Args:
        checkpoint: Of a stage-2 run.
        sampler: A node to take instead of the run's own.
    """
    config = checkpoint.config
    _check_registered(checkpoint, ("conditioner", "prior"))
    tokenizer = load_tokenizer(checkpoint)
    generator = build_generator(config, tokenizer, checkpoint.state["classes"], sampler)
    assert isinstance(generator.prior, torch.nn.Module)
    generator.prior.load_state_dict(checkpoint.weights("ema" if checkpoint.has("ema") else "model"))
    if checkpoint.has("conditioner"):
        assert isinstance(generator.conditioner, torch.nn.Module)
        generator.conditioner.load_state_dict(checkpoint.weights("conditioner"))
    return generator.eval().requires_grad_(False)


def build_generator(
    config: DictConfig, tokenizer: Tokenizer, classes: Sequence[str], sampler: DictConfig | None = None
) -> Generator:
    """Build what stands on a tokenizer, untrained: everything wired comes from built objects."""
    conditioner = build("conditioner", config.model.conditioner, classes=len(classes))
    grid = tokenizer.grid
    prior = build(
        "prior",
        config.model.prior,
        vocab_size=tokenizer.vocab_size,
        length=grid[0] * grid[1],
        grid=grid,
        prefix_vocab=conditioner.vocab_size,
        prefix_length=conditioner.length,
    )
    return Generator(tokenizer, conditioner, prior, build("sampler", sampler or config.sampler), classes)


def _check_registered(checkpoint: Checkpoint, kinds: Sequence[str]) -> None:
    for kind in kinds:
        try:
            check(kind, checkpoint.config.model[kind], f"model.{kind}")
        except UserError as error:
            plugins = OmegaConf.to_container(checkpoint.config.get("plugins") or OmegaConf.create([]))
            cure = f"; it was trained with plugins={plugins}: load them first" if plugins else ""
            raise UserError(f"{checkpoint.path}: {error}{cure}") from error
