"""Loads a model from a checkpoint, built from the checkpoint's own config."""

import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf

from vqf.config.access import group_nodes
from vqf.distributed.devices import find_device
from vqf.errors import UserError, name_first
from vqf.models.conditioning import ConditionerStack
from vqf.models.generator import Generator
from vqf.models.sample_request import check_pair
from vqf.models.tokenizer import Tokenizer, build_tokenizer
from vqf.networks.weights import check_dtypes, nonfinite_names
from vqf.options.typed_nodes import to_cli
from vqf.registry import build, check_options, chosen_components
from vqf.runs.bounded_build import build_blank, build_bounded
from vqf.runs.checkpoint import Checkpoint, default_output, find_checkpoint
from vqf.runs.initial_weights import averaged_weights, tokenizer_weights
from vqf.terminal import log

TOKENIZER_COMPONENTS = ("encoder", "quantizer", "decoder")


def load(path: str | Path, device: str | torch.device = "cpu") -> Tokenizer | Generator:
    """Load a trained model: a tokenizer from a stage-1 run, a generator from a stage-2 run.

    A checkpoint imports nothing: first import the module that registers your own components.

    Args:
        path: A run's folder or one of its checkpoints.
        device: "cpu", "cuda", ...; "auto" is a GPU if there is one.

    Raises:
        UserError: If there is no intact checkpoint or no such device, or a component is not registered.
    """
    device = find_device(str(device))
    checkpoint = find_checkpoint(path, lambda _: True, "a run of vqf", "train one with python -m vqf.run")
    if checkpoint.kind == "stage1":
        return load_tokenizer(checkpoint).to(device)
    return load_generator(checkpoint).to(device)


def find_tokenizer_checkpoint(path: str | Path | None) -> Checkpoint:
    """Open a checkpoint of a stage-1 or stage-2 run; both hold a tokenizer."""
    return find_checkpoint(
        path,
        lambda checkpoint: checkpoint.kind == "stage1" or checkpoint.has_weights("tokenizer"),
        "the run of a tokenizer",
        "python -m vqf.run pipeline=stage1 trains one",
    )


def find_stage1_checkpoint(path: str | Path | None) -> Checkpoint:
    """Open a checkpoint of a stage-1 run, which also holds the discriminator; else one with a tokenizer."""
    try:
        return find_checkpoint(path, lambda checkpoint: checkpoint.kind == "stage1", "", "")
    except UserError:
        return find_tokenizer_checkpoint(path)


def find_generator_checkpoint(path: str | Path | None) -> Checkpoint:
    """Open a checkpoint of a stage-2 run."""
    return find_checkpoint(
        path,
        lambda checkpoint: checkpoint.kind == "stage2",
        "the run of a prior",
        f"python -m vqf.run pipeline=stage2 run={path or 'FOLDER'} trains one on its tokenizer",
    )


def load_tokenizer(checkpoint: Checkpoint) -> Tokenizer:
    """Load a frozen tokenizer in eval mode, with the EMA weights if any."""
    _check_registered(checkpoint, TOKENIZER_COMPONENTS)
    model = checkpoint.config.model
    tokenizer = build_bounded(
        checkpoint, lambda: build_tokenizer(model, checkpoint.image_size, checkpoint.channels, checkpoint.output)
    )
    _load_weights(tokenizer, checkpoint, tokenizer_weights(checkpoint))
    return tokenizer.eval().requires_grad_(False)


def load_generator(checkpoint: Checkpoint, sampler: DictConfig | None = None) -> Generator:
    """Load a frozen generator in eval mode; `sampler` replaces its own."""
    _check_registered(checkpoint, ("conditioner", "prior", *(["sampler"] if sampler is None else [])))
    tokenizer = load_tokenizer(checkpoint)
    generator = build_bounded(checkpoint, lambda: _build_saved_generator(checkpoint, tokenizer, sampler))
    generator.crop_extent = checkpoint.state.get("crop_extent")
    assert isinstance(generator.prior, torch.nn.Module)
    _load_weights(generator.prior, checkpoint, averaged_weights(checkpoint))
    if checkpoint.has_weights("conditioner"):
        _load_weights(generator.conditioner, checkpoint, "conditioner")
    return generator.eval().requires_grad_(False)


def blank_generator(checkpoint: Checkpoint, tokenizer: Tokenizer) -> Generator:
    """Build the generator of a checkpoint without its weights, on the meta device where possible."""
    return build_blank(checkpoint, lambda: _build_saved_generator(checkpoint, tokenizer))


def _build_saved_generator(
    checkpoint: Checkpoint, tokenizer: Tokenizer, sampler: DictConfig | None = None
) -> Generator:
    specs = ConditionTokenizers(checkpoint.state.get("condition_tokenizers", {}))
    return build_generator(checkpoint.config, tokenizer, checkpoint.classes, specs, sampler)


class ConditionTokenizers:
    """Builds the tokenizers of conditioners, each named by the folder of its run.

    A stage-2 checkpoint stores their weights and `specs`, so needs no such folder.

    Args:
        specs: Config nodes, image size and channels of known tokenizers, by folder.
    """

    def __init__(self, specs: Mapping[str, Any] | None = None) -> None:
        self.specs = dict(specs or {})

    def __call__(self, run: str) -> Tokenizer:
        """Build the tokenizer of a run: untrained from `specs`, else trained."""
        if run in self.specs:
            spec = self.specs[run]
            size: Sequence[int] = spec["image_size"]
            output = spec.get("output") or default_output(spec["channels"])
            untrained = build_tokenizer(OmegaConf.create(spec["model"]), (size[0], size[1]), spec["channels"], output)
            return untrained.eval().requires_grad_(False)
        checkpoint = find_tokenizer_checkpoint(run)
        with torch.device("cpu"):  # its weights are read even where the generator is built on the meta device
            tokenizer = load_tokenizer(checkpoint)
        model = checkpoint.config.model
        nodes = {kind: OmegaConf.to_container(model[kind], resolve=True) for kind in TOKENIZER_COMPONENTS}
        self.specs[run] = {
            "model": {**nodes, "projection": model.get("projection", 1)},
            "image_size": list(tokenizer.image_size),
            "channels": tokenizer.channels,
            "output": tokenizer.output,
        }
        return tokenizer


def build_generator(
    config: DictConfig,
    tokenizer: Tokenizer,
    classes: Sequence[str],
    condition_tokenizers: ConditionTokenizers | None = None,
    sampler: DictConfig | None = None,
) -> Generator:
    """Build an untrained generator on a tokenizer."""
    conditioner = build_conditioner_stack(config, tokenizer, classes, condition_tokenizers)
    wired = {"layout": tokenizer.layout, "prefix": conditioner.spec, "quantizer": tokenizer.quantizer}
    prior = build("prior", config.model.prior, **wired)
    node = sampler or config.sampler
    built_sampler = build("sampler", node)
    check_pair(built_sampler, prior, (node.name, config.model.prior.name))
    return Generator(tokenizer, conditioner, prior, built_sampler, classes)


def build_conditioner_stack(
    config: DictConfig,
    tokenizer: Tokenizer,
    classes: Sequence[str],
    condition_tokenizers: ConditionTokenizers | None = None,
) -> ConditionerStack:
    """Build the conditioners of a config.

    Raises:
        UserError: If it has none.
    """
    condition_tokenizers = condition_tokenizers or ConditionTokenizers()
    wired = {"num_classes": len(classes), "layout": tokenizer.layout, "tokenizer": tokenizer}
    conditioners = {
        name: build("conditioner", node, open_tokenizer=_tokenizer_opener(condition_tokenizers, name), **wired)
        for name, node in group_nodes(config.model, "conditioner").items()
    }
    if not conditioners:
        raise UserError("model.conditioner: none is chosen; choose model/conditioner=none for an unconditional prior")
    return ConditionerStack(conditioners)


def _tokenizer_opener(condition_tokenizers: ConditionTokenizers, name: str) -> Callable[[str], Tokenizer]:
    def open_tokenizer(run: str) -> Tokenizer:
        try:
            return condition_tokenizers(run)
        except UserError as error:
            raise UserError(re.sub(r"^run=", f"model.conditioner.{name}.run=", str(error))) from error

    return open_tokenizer


def _load_weights(module: torch.nn.Module, checkpoint: Checkpoint, name: str) -> None:
    weights, blank = checkpoint.load_weights(name), module.state_dict()
    nonfinite_before = nonfinite_names(blank)
    try:
        check_dtypes(weights, blank)
        module.load_state_dict(weights)
    except (RuntimeError, ValueError) as error:
        lines = str(error).splitlines()
        reason = lines[min(1, len(lines) - 1)].strip()  # torch's first line names only the class
        raise UserError(
            f"{checkpoint.path}: {name}.safetensors does not fit the model in config.yaml ({reason})"
        ) from error
    if nonfinite := [each for each in nonfinite_names(module.state_dict()) if each not in nonfinite_before]:
        log.warning(
            "%s: %s.safetensors: %s: not all values are finite, nor will the model's outputs be",
            *(checkpoint.path, name, name_first(nonfinite)),
        )


def _check_registered(checkpoint: Checkpoint, kinds: Sequence[str]) -> None:
    if not isinstance(checkpoint.config.get("model"), DictConfig):
        raise UserError(f"{checkpoint.path}: its config.yaml has no model")
    for kind, node, key in chosen_components(checkpoint.config):
        if kind not in kinds:
            continue
        try:
            check_options(kind, node, key)
        except UserError as error:
            plugins = to_cli(checkpoint.config.get("plugins") or [])
            hint = f"; it was trained with plugins={plugins}, which such a run needs" if plugins != "[]" else ""
            raise UserError(f"{checkpoint.path}: {error}{hint}") from error
