"""A checkpoint of another project, in as a run of vqf's; `export` is the way out."""

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
        path: A file, or the folder of a model of diffusers or transformers.
        source: Whose layout it has; auto tells by the names of its tensors.
        yaml: The settings that describe it, read as data; by default a file beside it under a usual name.
        heads: Of its transformer, where those settings do not say; 16 by default.
        classes: Of its class-conditional transformer, where those settings do not say; none by default.
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
        """Write the run, a report on every tensor, and a run beside it for the tokenizer of a condition.

        Raises:
            UserError: If either folder holds a run already.
        """
        check_not_overwriting(self.run_dir)
        check_not_overwriting(condition_run_dir(self.run_dir))
        found = import_checkpoint(
            self.path, source=self.source, yaml=self.yaml, size=self._size(), options=self.options
        )
        config = self._config_without_options()
        save_run(found, config, self.run_dir)
        (self.run_dir / REPORT_NAME).write_text(found.report.text())
        self._log_result(found)

    def _log_result(self, found: ImportedCheckpoint) -> None:
        for line in found.report.summary():
            log.info("%s", line)
        if found.report.unknown_tensors:
            log.warning("%d tensors that vqf does not know were left", len(found.report.unknown_tensors))
        if broken := found.nonfinite_tensors():
            more = f" and {len(broken) - 1} more" if broken[1:] else ""
            log.warning(
                "'%s'%s: not all numbers in it are finite; what it computes will not be, either", broken[0], more
            )
        log.info("a %s run in %s; what became of every tensor in %s", found.kind, self.run_dir, REPORT_NAME)
        if found.kind == "stage1":
            words = f"--config-dir {self.run_dir / PRESETS_DIR} experiment=imported resume={self.run_dir}"
            log.info("to train it on: python -m vqf.run %s steps=... data=...", words)

    def _size(self) -> Size | None:
        """Return the size of images that the user chose; None where it is the default of the command line."""
        size = image_size(self.config)
        return size if "image_size" in cli_keys() or size != pair(DEFAULT_IMAGE_SIZE) else None

    def _config_without_options(self) -> DictConfig:
        config = self.config.copy()
        with open_dict(config):
            for option in find_component("pipeline", "import").options:
                config.pop(option, None)
        return config


PRESETS_DIR = "conf"  # in the run's folder: what --config-dir needs to train on


def save_run(found: ImportedCheckpoint, config: DictConfig, run_dir: Path) -> None:
    """Write a run that holds what was found, with the choices of `config` for what no file tells.

    The tokenizer of a condition becomes a run beside it.
    """
    asked, config, coders = config, _config(found, config), ConditionTokenizers()
    if found.condition is not None:
        save_run(found.condition, asked, condition_run_dir(run_dir))
        config.model.conditioner.spatial.run = str(condition_run_dir(run_dir))
    modules = _modules(found, config, coders)
    players = ("model",) if found.prior else ("model", "discriminator")
    trained = {name: modules[name] for name in players if name in modules}
    states = _optimizer_states(found, config, trained)
    facts = {"kind": found.kind, "step": found.step, "seed": config.seed, "image_size": list(found.image_size)}
    tokenizer = modules["tokenizer" if found.prior else "model"]
    facts |= {"channels": found.tokenizer.channels, "condition_tokenizers": coders.specs}
    path = checkpoint_writer.write_checkpoint(
        run_dir,
        state={**facts, "classes": list(found.classes), "data": None, "tokenizer": tokenizer.fingerprint()},
        config=config,
        weights={name: each.state_dict() for name, each in modules.items()},
        optimizers=states,
        keep=0,
    )
    if found.kind == "stage1":
        _write_presets(config, run_dir)
    log.info("saved %s", path)


def condition_run_dir(run_dir: Path) -> Path:
    """Return where the tokenizer of a condition becomes a run."""
    return run_dir.with_name(f"{run_dir.name}-condition")


def _config(found: ImportedCheckpoint, config: DictConfig) -> DictConfig:
    config = config.copy()
    with open_dict(config):
        config.pipeline = {"name": found.kind}
        config.image_size = found.image_size[0] if len(set(found.image_size)) == 1 else list(found.image_size)
        config.ema, config.run, config.run_dir = found.ema_decay, None, None
        for key, node in found.nodes.items():
            config.model[key] = {} if node is None and key == "conditioner" else node
        if config.model.get("discriminator") is not None:
            config.model.adversary = {**(config.model.get("adversary") or {"name": "hinge"}), **found.adversary}
        config.optimizer = _optimizer(found, config)
    return config


def _optimizer(found: ImportedCheckpoint, config: DictConfig) -> Mapping[str, Any]:
    """Return the optimizer's node: what the file's was set to, or else what the command line or vqf's preset says."""
    part = found.prior or found.tokenizer
    if part.optimizer_state is not None:
        return {"name": "adamw" if found.prior else "adam", **part.optimizer_state.options}
    return config.stage2.optimizer if found.prior and "optimizer" not in cli_keys() else config.optimizer


def _modules(found: ImportedCheckpoint, config: DictConfig, coders: ConditionTokenizers) -> dict[str, Any]:
    """Build what the run's checkpoint keeps, with the weights that were found; a discriminator is made if it lacks."""
    torch.manual_seed(config.seed)
    channels = found.tokenizer.channels
    tokenizer = _load(build_tokenizer(config.model, found.image_size, channels), found.tokenizer)
    if found.prior is not None:
        if not config.model.conditioner:
            return {"tokenizer": tokenizer, "model": _WeightsOnly(found.prior.weights)}
        generator = build_generator(config, tokenizer, found.classes, coders)
        told = {"conditioner": generator.conditioner} if generator.conditioner.state_dict() else {}
        return {"tokenizer": tokenizer, "model": _load(generator.prior, found.prior), **told}
    modules: dict[str, Any] = {"model": tokenizer, "usage": CodebookUsage(tokenizer.vocab_size)}
    if critic := build_gan(config, channels):
        modules["discriminator"] = _load_discriminator(critic, found)
    if found.tokenizer.ema_weights:
        modules["ema"] = build_tokenizer(config.model, found.image_size, channels)
        modules["ema"].load_state_dict(found.tokenizer.ema_weights)
    return modules


def _load_discriminator(critic: GANModule, found: ImportedCheckpoint) -> GANModule:
    if found.discriminator is None:
        found.report.note("no discriminator was read: the run has a fresh one")
        return critic
    critic.load_state_dict({**critic.state_dict(), **found.discriminator.weights})
    return critic


class _WeightsOnly(nn.Module):
    """Weights of a prior that nothing can be built for yet."""

    def __init__(self, weights: Mapping[str, Tensor]) -> None:
        super().__init__()
        self.weights = weights

    def state_dict(self) -> Mapping[str, Tensor]:  # type: ignore[override]
        return self.weights


def _load(module: Any, part: ImportedModule) -> Any:
    module.load_state_dict(part.weights)
    return module


def _optimizer_states(
    found: ImportedCheckpoint, config: DictConfig, trained: Mapping[str, nn.Module]
) -> dict[str, Any]:
    """Return the states of optimizers and schedules at the step that the file is of, for a run to go on from."""
    parts = {"model": found.prior or found.tokenizer, "discriminator": found.discriminator}
    result: dict[str, Any] = {"optimizers": {}, "schedules": {}}
    for name, module in trained.items():
        if not list(module.parameters()):
            continue
        params = param_groups_weight_decay(module) if found.prior else list(module.parameters())
        optimizer: Optimizer = build("optimizer", config.optimizer, params=params)
        schedule = build("schedule", config.schedule, optimizer=optimizer, steps=config.steps)
        schedule.last_epoch, schedule._step_count = found.step, found.step + 1
        part = parts[name]
        if part is not None and part.optimizer_state is not None:
            optimizers.load_named_state(optimizer, module, part.optimizer_state)
        result["optimizers"][name] = optimizer.state_dict()
        result["schedules"][name] = schedule.state_dict()
    return result


def _write_presets(config: DictConfig, run_dir: Path) -> None:
    """Write the run's choices as presets, since a run that is resumed is composed anew."""
    folder = run_dir / PRESETS_DIR
    choices: dict[str, Any] = {}
    for kind in KINDS.values():
        parent, _, key = kind.group.partition("/")
        if parent == "model":
            node = config.model.get(key)
            nodes = (node or {}) if kind.multiple else {"": node}
            names = [_write_variant(folder, kind, each, name) for name, each in nodes.items() if each is not None]
            choices[key] = names if kind.multiple else next(iter(names), None)
    absent = {key: None for key, choice in choices.items() if choice is None}
    preset = {"defaults": ["_self_", *({key: choice} for key, choice in choices.items())], **absent}
    _save_yaml(folder / "model" / "imported.yaml", preset)
    options = {option: value for option, value in config.optimizer.items() if option != "name"}
    whole = {"image_size": config.image_size, "ema": config.ema, "optimizer": options}
    defaults = [{"override /model": "imported"}, {"override /optimizer": config.optimizer.name}]
    _save_yaml(folder / "experiment" / "imported.yaml", {"defaults": defaults, **whole}, "# @package _global_\n")


def _write_variant(folder: Path, kind: Kind, node: DictConfig, key: str) -> str:
    """Write a component's numbers as a variant of it, and return what the variant is called."""
    name = f"imported_{key}" if key else "imported"
    options = {option: value for option, value in node.items() if option != "name"}
    header = f"# @package {kind.group.replace('/', '.')}.{key}\n" if key else ""
    _save_yaml(folder / kind.group / f"{name}.yaml", {"defaults": [node.name], **options}, header)
    return name


def _save_yaml(path: Path, content: Any, header: str = "") -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(header + OmegaConf.to_yaml(OmegaConf.create(content), resolve=True))
