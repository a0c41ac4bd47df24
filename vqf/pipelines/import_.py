"""Turn a checkpoint of another project into a run; `export` is the way back."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import torch
from omegaconf import DictConfig, OmegaConf, open_dict
from torch import Tensor, nn
from torch.optim import Optimizer

from vqf.batch import Size, pair
from vqf.config.access import DEFAULT_IMAGE_SIZE, image_size
from vqf.config.inherit import cli_keys
from vqf.interop import optimizers
from vqf.interop.import_model import ImportedCheckpoint, import_checkpoint
from vqf.interop.priors import ImportOptions
from vqf.interop.tokenizers import ImportedModule
from vqf.models.tokenizer import build_tokenizer
from vqf.registry import KINDS, Kind, build, find_component, register
from vqf.runs import checkpoint_writer
from vqf.runs.load import ConditionTokenizers, build_generator
from vqf.runs.resume import check_not_overwriting
from vqf.terminal import log
from vqf.training.codebook_usage import CodebookUsage
from vqf.training.gan import GANModule, build_gan
from vqf.training.prior_task import param_groups_weight_decay

REPORT_NAME = "import-report.txt"


@register("pipeline", "import")
class Import:
    """Turn a checkpoint of another project into a run that sample, reconstruct, stage2 and vqf.load accept.

    Args:
        path: Checkpoint file, or the folder of a diffusers or transformers model.
        source: Project whose layout the file has; auto recognizes it by the names of the tensors.
        yaml: Config file that describes the model, read as data; by default a file beside it with a usual name.
        heads: Attention heads of the transformer, if the config file does not say; 16 by default.
        classes: Number of classes of a class-conditional transformer, if the config file does not say; none by
            default.
    """

    def __init__(
        self,
        config: DictConfig,
        run_dir: Path,
        *,
        path: str,
        source: Literal["auto", "taming", "ldm", "llamagen", "diffusers", "janus"] = "auto",
        yaml: str | None = None,
        heads: int | None = None,
        classes: int | None = None,
    ) -> None:
        self.config, self.run_dir, self.source = config, run_dir, source
        self.path = Path(path).expanduser()
        self.yaml = None if yaml is None else Path(yaml).expanduser()
        self.options = ImportOptions(heads, classes)

    def run(self) -> None:
        """Write the run, a report on every tensor, and a second run for the tokenizer of condition maps.

        Raises:
            UserError: If either folder holds a run already, or the checkpoint cannot be imported.
        """
        check_not_overwriting(self.run_dir)
        check_not_overwriting(condition_run_dir(self.run_dir))
        imported = import_checkpoint(
            self.path, source=self.source, yaml=self.yaml, size=self._size(), options=self.options
        )
        config = self._config_without_options()
        save_run(imported, config, self.run_dir)
        (self.run_dir / REPORT_NAME).write_text(imported.report.text())
        self._log_result(imported)

    def _log_result(self, imported: ImportedCheckpoint) -> None:
        for line in imported.report.summary():
            log.info("%s", line)
        if imported.report.unknown_tensors:
            log.warning("%d unknown tensors were not imported", len(imported.report.unknown_tensors))
        if nonfinite := imported.nonfinite_tensors():
            more = f" and {len(nonfinite) - 1} more" if nonfinite[1:] else ""
            log.warning("'%s'%s: not all values are finite, nor will the model's outputs be", nonfinite[0], more)
        log.info("%s run in %s; %s lists every tensor", imported.kind, self.run_dir, REPORT_NAME)
        if imported.kind == "stage1":
            arguments = f"--config-dir {self.run_dir / PRESETS_DIR} experiment=imported resume={self.run_dir}"
            log.info("to continue training: python -m vqf.run %s steps=... data=...", arguments)

    def _size(self) -> Size | None:
        """Return the image size if the user set it; None for the default, so that the checkpoint decides."""
        size = image_size(self.config)
        return size if "image_size" in cli_keys() or size != pair(DEFAULT_IMAGE_SIZE) else None

    def _config_without_options(self) -> DictConfig:
        config = self.config.copy()
        with open_dict(config):
            for option in find_component("pipeline", "import").options:
                config.pop(option, None)
        return config


PRESETS_DIR = "conf"  # folder in the run for --config-dir, to continue training


def save_run(imported: ImportedCheckpoint, config: DictConfig, run_dir: Path) -> None:
    """Write a run with the imported weights; `config` supplies what the checkpoint does not say.

    The tokenizer of condition maps becomes a run beside it, in `condition_run_dir(run_dir)`.
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
        _write_presets(config, run_dir)
    log.info("saved %s", path)


def _trained_names(imported: ImportedCheckpoint) -> tuple[str, ...]:
    return ("model",) if imported.prior else ("model", "discriminator")


def condition_run_dir(run_dir: Path) -> Path:
    """Return the folder of the run that holds the tokenizer of condition maps."""
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
    """Return the optimizer's node: the options in the file, or else those of the command line or the preset."""
    module = imported.prior or imported.tokenizer
    if module.optimizer_state is not None:
        return {"name": "adamw" if imported.prior else "adam", **module.optimizer_state.options}
    return config.stage2.optimizer if imported.prior and "optimizer" not in cli_keys() else config.optimizer


def _modules(
    imported: ImportedCheckpoint, config: DictConfig, condition_tokenizers: ConditionTokenizers
) -> dict[str, Any]:
    """Build the modules of the checkpoint with the imported weights; a missing discriminator is initialized."""
    torch.manual_seed(config.seed)
    channels = imported.tokenizer.channels
    tokenizer = _load(build_tokenizer(config.model, imported.image_size, channels), imported.tokenizer)
    if imported.prior is not None:
        if not config.model.conditioner:
            return {"tokenizer": tokenizer, "model": _WeightsOnly(imported.prior.weights)}
        generator = build_generator(config, tokenizer, imported.classes, condition_tokenizers)
        conditioner = {"conditioner": generator.conditioner} if generator.conditioner.state_dict() else {}
        return {"tokenizer": tokenizer, "model": _load(generator.prior, imported.prior), **conditioner}
    modules: dict[str, Any] = {"model": tokenizer, "usage": CodebookUsage(tokenizer.vocab_size)}
    if gan := build_gan(config, channels):
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
    """Weights of a prior without a conditioner in its config, which cannot be built yet."""

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
    """Return the states of optimizers and schedules at the step of the checkpoint, to resume from."""
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


def _write_presets(config: DictConfig, run_dir: Path) -> None:
    """Write the model as presets: a resumed run is composed from the command line again."""
    folder = run_dir / PRESETS_DIR
    choices: dict[str, Any] = {}
    for kind in KINDS.values():
        parent, _, key = kind.group.partition("/")
        if parent == "model":
            node = config.model.get(key)
            nodes = (node or {}) if kind.multiple else {"": node}
            names = [
                _write_variant(folder, kind, variant, name) for name, variant in nodes.items() if variant is not None
            ]
            choices[key] = names if kind.multiple else next(iter(names), None)
    absent = {key: None for key, choice in choices.items() if choice is None}
    preset = {"defaults": ["_self_", *({key: choice} for key, choice in choices.items())], **absent}
    _save_yaml(folder / "model" / "imported.yaml", preset)
    options = {option: value for option, value in config.optimizer.items() if option != "name"}
    values = {"image_size": config.image_size, "ema": config.ema, "optimizer": options}
    defaults = [{"override /model": "imported"}, {"override /optimizer": config.optimizer.name}]
    _save_yaml(folder / "experiment" / "imported.yaml", {"defaults": defaults, **values}, "# @package _global_\n")


def _write_variant(folder: Path, kind: Kind, node: DictConfig, key: str) -> str:
    """Write a component's options as a preset of its group; return the preset's name."""
    name = f"imported_{key}" if key else "imported"
    options = {option: value for option, value in node.items() if option != "name"}
    header = f"# @package {kind.group.replace('/', '.')}.{key}\n" if key else ""
    _save_yaml(folder / kind.group / f"{name}.yaml", {"defaults": [node.name], **options}, header)
    return name


def _save_yaml(path: Path, content: Any, header: str = "") -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(header + OmegaConf.to_yaml(OmegaConf.create(content), resolve=True))
