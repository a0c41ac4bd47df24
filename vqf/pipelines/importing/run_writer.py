"""Write an imported checkpoint as a run."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig, open_dict
from torch import Tensor, nn
from torch.optim import Optimizer

from vqf.config.inherit import cli_keys
from vqf.interop import optimizers
from vqf.interop.import_model import ImportedCheckpoint
from vqf.interop.tokenizers import ImportedModule
from vqf.models.tokenizer import build_tokenizer
from vqf.pipelines.importing.presets import write_presets
from vqf.registry import build
from vqf.runs import checkpoint_writer
from vqf.runs.load import ConditionTokenizers, build_generator
from vqf.terminal import log
from vqf.training.codebook_usage import CodebookUsage
from vqf.training.gan import GANModule, build_gan
from vqf.training.prior_task import param_groups_weight_decay


def save_run(imported: ImportedCheckpoint, config: DictConfig, run_dir: Path) -> None:
    """Write a run with the imported weights; `config` supplies what the checkpoint does not say.

    The tokenizer of condition maps becomes a run in `condition_run_dir(run_dir)`.
    """
    user_config, config, condition_tokenizers = config, _config(imported, config), ConditionTokenizers()
    if imported.condition is not None:
        save_run(imported.condition, user_config, condition_run_dir(run_dir))
        config.model.conditioner.spatial.run = str(condition_run_dir(run_dir))
    modules = _modules(imported, config, condition_tokenizers)
    trained = {name: modules[name] for name in _trained_names(imported) if name in modules}
    tokenizer = modules["tokenizer" if imported.prior else "model"]
    state = {"kind": imported.kind, "step": imported.step, "seed": config.seed}
    state |= {"image_size": list(imported.image_size), "channels": imported.tokenizer.channels}
    state |= {"condition_tokenizers": condition_tokenizers.specs, "classes": list(imported.classes)}
    path = checkpoint_writer.write_checkpoint(
        run_dir,
        state={**state, "data": None, "tokenizer": tokenizer.fingerprint()},
        config=config,
        weights={name: module.state_dict() for name, module in modules.items()},
        optimizers=_optimizer_states(imported, config, trained),
        keep=0,
    )
    if imported.kind == "stage1":
        write_presets(config, run_dir)
    log.info("saved %s", path)


def _trained_names(imported: ImportedCheckpoint) -> tuple[str, ...]:
    return ("model",) if imported.prior else ("model", "discriminator")


def condition_run_dir(run_dir: Path) -> Path:
    """Return the folder of the condition maps' tokenizer."""
    return run_dir.with_name(f"{run_dir.name}-condition")


def _config(imported: ImportedCheckpoint, config: DictConfig) -> DictConfig:
    config = config.copy()
    with open_dict(config):
        config.pipeline = {"name": imported.kind}
        config.image_size = imported.image_size[0] if len(set(imported.image_size)) == 1 else list(imported.image_size)
        config.ema, config.run, config.run_dir = imported.ema_decay, None, None
        for key, node in imported.nodes.items():
            config.model[key] = {} if node is None and key == "conditioner" else node
        if config.model.get("discriminator") is not None:
            config.model.adversary = {**(config.model.get("adversary") or {"name": "hinge"}), **imported.adversary}
        config.optimizer = _optimizer(imported, config)
    return config


def _optimizer(imported: ImportedCheckpoint, config: DictConfig) -> Mapping[str, Any]:
    module = imported.prior or imported.tokenizer
    if module.optimizer_state is not None:
        return {"name": "adamw" if imported.prior else "adam", **module.optimizer_state.options}
    return config.stage2.optimizer if imported.prior and "optimizer" not in cli_keys() else config.optimizer


def _modules(
    imported: ImportedCheckpoint, config: DictConfig, condition_tokenizers: ConditionTokenizers
) -> dict[str, Any]:
    torch.manual_seed(config.seed)
    channels = imported.tokenizer.channels
    tokenizer = _load(build_tokenizer(config.model, imported.image_size, channels), imported.tokenizer)
    if imported.prior is not None:
        if not config.model.conditioner:
            return {"tokenizer": tokenizer, "model": _WeightsOnly(imported.prior.weights)}
        generator = build_generator(config, tokenizer, imported.classes, condition_tokenizers)
        conditioner = {"conditioner": generator.conditioner} if generator.conditioner.state_dict() else {}
        return {"tokenizer": tokenizer, "model": _load(generator.prior, imported.prior), **conditioner}
    modules: dict[str, Any] = {"model": tokenizer, "usage": CodebookUsage(tokenizer.layout)}
    if gan := build_gan(config, channels, imported.image_size):
        modules["discriminator"] = _load_discriminator(gan, imported)
    if imported.tokenizer.ema_weights:
        modules["ema"] = build_tokenizer(config.model, imported.image_size, channels)
        modules["ema"].load_state_dict(imported.tokenizer.ema_weights)
    return modules


def _load_discriminator(gan: GANModule, imported: ImportedCheckpoint) -> GANModule:
    if imported.discriminator is None:
        imported.report.note("no discriminator in the checkpoint: the run has a newly initialized one")
        return gan
    gan.load_state_dict({**gan.state_dict(), **imported.discriminator.weights})
    return gan


class _WeightsOnly(nn.Module):
    """Weights of a prior that cannot be built without a conditioner."""

    def __init__(self, weights: Mapping[str, Tensor]) -> None:
        super().__init__()
        self.weights = weights

    def state_dict(self) -> Mapping[str, Tensor]:  # type: ignore[override]
        return self.weights


def _load(module: Any, imported: ImportedModule) -> Any:
    module.load_state_dict(imported.weights)
    return module


def _optimizer_states(
    imported: ImportedCheckpoint, config: DictConfig, trained: Mapping[str, nn.Module]
) -> dict[str, Any]:
    sources = {"model": imported.prior or imported.tokenizer, "discriminator": imported.discriminator}
    result: dict[str, Any] = {"optimizers": {}, "schedules": {}}
    for name, module in trained.items():
        if not list(module.parameters()):
            continue
        params = param_groups_weight_decay(module) if imported.prior else list(module.parameters())
        optimizer: Optimizer = build("optimizer", config.optimizer, params=params)
        schedule = build("schedule", config.schedule, optimizer=optimizer, steps=config.steps)
        schedule.last_epoch, schedule._step_count = imported.step, imported.step + 1
        source = sources[name]
        if source is not None and source.optimizer_state is not None:
            optimizers.load_named_state(optimizer, module, source.optimizer_state)
        result["optimizers"][name] = optimizer.state_dict()
        result["schedules"][name] = schedule.state_dict()
    return result
