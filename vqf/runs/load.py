"""From a run on disk back to a model: its own config says what to build, its weights fill it."""

import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf

from vqf.config.access import chosen
from vqf.errors import UserError
from vqf.models.conditioning import Conditions
from vqf.models.generator import Generator
from vqf.models.tokenizer import Tokenizer, build_tokenizer
from vqf.registry import build, check, nodes
from vqf.runs.checkpoint import Checkpoint, locate

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
    _check_registered(checkpoint, TOKENIZER_PARTS)
    model = checkpoint.config.model
    tokenizer = build_tokenizer(model, checkpoint.image_size, checkpoint.channels)
    if checkpoint.kind == "stage2":
        name = "tokenizer"
    else:
        name = "ema" if checkpoint.has("ema") else "model"
    _fill(tokenizer, checkpoint, name)
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
    coders = Coders(checkpoint.state.get("coders", {}))
    generator = build_generator(config, tokenizer, checkpoint.classes, coders, sampler)
    generator.extent = checkpoint.state.get("extent")
    assert isinstance(generator.prior, torch.nn.Module)
    _fill(generator.prior, checkpoint, "ema" if checkpoint.has("ema") else "model")
    if checkpoint.has("conditioner"):
        _fill(generator.conditioner, checkpoint, "conditioner")
    return generator.eval().requires_grad_(False)


class Coders:
    """The tokenizers that conditioners ask for, by the folder of the run that trained each.

    A checkpoint of stage 2 keeps their weights with the conditioner's, and here how they are built, so that it needs
    no other folder.

    Args:
        facts: By folder, what is needed to build the tokenizer; its weights come later.
    """

    def __init__(self, facts: Mapping[str, Any] | None = None) -> None:
        self.facts = dict(facts or {})

    def __call__(self, run: str) -> Tokenizer:
        """Build the tokenizer of a run, with its weights unless the facts are known."""
        if run in self.facts:
            facts = self.facts[run]
            size: Sequence[int] = facts["image_size"]
            built = build_tokenizer(OmegaConf.create(facts["model"]), (size[0], size[1]), facts["channels"])
            return built.eval().requires_grad_(False)
        checkpoint = find_tokenizer(run)
        tokenizer, model = load_tokenizer(checkpoint), checkpoint.config.model
        parts = {part: OmegaConf.to_container(model[part], resolve=True) for part in TOKENIZER_PARTS}
        self.facts[run] = {"model": parts, "image_size": list(tokenizer.image_size), "channels": tokenizer.channels}
        return tokenizer


def build_generator(
    config: DictConfig,
    tokenizer: Tokenizer,
    classes: Sequence[str],
    coders: Coders | None = None,
    sampler: DictConfig | None = None,
) -> Generator:
    """Build what stands on a tokenizer, untrained: everything wired comes from built objects."""
    grid = tokenizer.grid
    conditioner = build_conditions(config, tokenizer, classes, coders)
    prior = build(
        "prior",
        config.model.prior,
        vocab_size=tokenizer.vocab_size,
        length=grid[0] * grid[1],
        grid=grid,
        prefix_vocab=conditioner.vocab_size,
        prefix_length=conditioner.length,
        prefix_places=conditioner.places,
    )
    return Generator(tokenizer, conditioner, prior, build("sampler", sampler or config.sampler), classes)


def build_conditions(
    config: DictConfig, tokenizer: Tokenizer, classes: Sequence[str], coders: Coders | None = None
) -> Conditions:
    """Build the conditioners of a config, for the pictures of a tokenizer.

    Raises:
        UserError: If there is none.
    """
    grid = tokenizer.grid
    wired, coders = {"classes": len(classes), "grid": grid, "tokenizer": tokenizer}, coders or Coders()
    parts = {
        name: build("conditioner", node, open_tokenizer=_named(coders, name), **wired)
        for name, node in chosen(config.model, "conditioner").items()
    }
    if not parts:
        raise UserError("model.conditioner: none is chosen; model/conditioner=none gives a prior its start token")
    return Conditions(parts)


def _named(coders: Coders, name: str) -> Callable[[str], Tokenizer]:
    """Return what opens the tokenizer of a conditioner, and names the conditioner's option where it cannot."""

    def opened(run: str) -> Tokenizer:
        try:
            return coders(run)
        except UserError as error:
            raise UserError(re.sub(r"^run=", f"model.conditioner.{name}.run=", str(error))) from error

    return opened


def _fill(module: torch.nn.Module, checkpoint: Checkpoint, name: str) -> None:
    weights = checkpoint.weights(name)
    try:
        module.load_state_dict(weights)
    except RuntimeError as error:
        reason = " ".join(str(error).splitlines()[1:2]).strip()
        raise UserError(
            f"{checkpoint.path}: {name}.safetensors is not of the model in config.yaml ({reason})"
        ) from error


def _check_registered(checkpoint: Checkpoint, kinds: Sequence[str]) -> None:
    if not isinstance(checkpoint.config.get("model"), DictConfig):
        raise UserError(f"{checkpoint.path}: its config.yaml describes no model")
    for kind, node, place in nodes(checkpoint.config):
        if kind not in kinds:
            continue
        try:
            check(kind, node, place)
        except UserError as error:
            plugins = OmegaConf.to_container(checkpoint.config.get("plugins") or OmegaConf.create([]))
            cure = f"; it was trained with plugins={plugins}: load them first" if plugins else ""
            raise UserError(f"{checkpoint.path}: {error}{cure}") from error
