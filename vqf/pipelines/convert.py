"""Checkpoints of other projects: in as a run of vqf's, out as a file of theirs."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import torch
from omegaconf import DictConfig, OmegaConf, open_dict
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.optim import Optimizer

from vqf.errors import UserError
from vqf.interop import optimizers
from vqf.interop.priors import Asked
from vqf.interop.reading import Read, read
from vqf.interop.tokenizers import PARTS, Part
from vqf.interop.writing import TARGETS, Written, write_discriminator, write_prior, write_tokenizer
from vqf.pipelines import checkpoint as checkpoints
from vqf.pipelines.checkpoint import Checkpoint
from vqf.pipelines.common import image_size
from vqf.pipelines.inherit import given
from vqf.pipelines.restore import build_generator, find_tokenizer, load_generator, load_tokenizer
from vqf.pipelines.stage1 import Critic
from vqf.pipelines.stage2 import decay_groups
from vqf.registry import build, find, register
from vqf.terminal import log
from vqf.tokenizer import build_tokenizer

REPORT = "import-report.txt"
PRESETS = "conf"  # in the run's folder: what --config-dir needs to train on
LIGHTNING = "1.0.8"  # the version that taming-transformers pins


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
        self.asked = Asked(heads, classes)

    def run(self) -> None:
        """Write the run, a report on every tensor, and a run beside it for the tokenizer of a condition."""
        size = image_size(self.config) if "image_size" in given() else None
        found = read(self.path, source=self.source, yaml=self.yaml, size=size, asked=self.asked)
        self._write(found, self.run_dir)
        if found.condition is not None:
            self._write(found.condition, self.run_dir.with_name(f"{self.run_dir.name}-condition"))
        self.run_dir.mkdir(parents=True, exist_ok=True)
        (self.run_dir / REPORT).write_text(found.report.text())
        for line in found.report.summary():
            log.info("%s", line)
        if found.report.strange:
            log.warning("%d tensors that vqf does not know were left: %s", len(found.report.strange), REPORT)
        log.info("%s run in %s; every tensor in %s", found.kind, self.run_dir, self.run_dir / REPORT)

    def _write(self, found: Read, run_dir: Path) -> None:
        config = self._config(found)
        modules = _modules(found, config)
        trained = {"model": modules["model"]} if found.prior else {k: v for k, v in modules.items() if k != "ema"}
        states = _states(found, config, trained)
        facts = {"kind": found.kind, "step": found.step, "seed": config.seed, "image_size": list(found.image_size)}
        tokenizer = modules["tokenizer" if found.prior else "model"]
        path = checkpoints.save(
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

    def _config(self, found: Read) -> DictConfig:
        """Return the config of a run that holds what was found, with the command line's choices for the rest."""
        config = self.config.copy()
        with open_dict(config):
            for option in find("pipeline", "import").options:
                config.pop(option, None)
            config.pipeline = {"name": found.kind}
            config.image_size = found.image_size[0] if len(set(found.image_size)) == 1 else list(found.image_size)
            config.ema, config.run, config.run_dir = found.decay, None, None
            for key, node in found.nodes.items():
                config.model[key] = node
            if config.model.get("discriminator") is not None:
                config.model.adversary = {**(config.model.get("adversary") or {"name": "hinge"}), **found.adversary}
            config.optimizer = _optimizer(found, config)
        return config


def _optimizer(found: Read, config: DictConfig) -> Mapping[str, Any]:
    """Return the optimizer's node: what the file's was set to, or else what the command line or vqf's preset says."""
    part = found.prior or found.tokenizer
    if part.state is not None:
        return {"name": "adamw" if found.prior else "adam", **part.state.options}
    return config.stage2.optimizer if found.prior and "optimizer" not in given() else config.optimizer


def _modules(found: Read, config: DictConfig) -> dict[str, Any]:
    """Build what the run's checkpoint keeps, with the weights that were found; a discriminator is made if it lacks."""
    torch.manual_seed(config.seed)
    tokenizer = _filled(build_tokenizer(config.model, found.image_size), found.tokenizer)
    if found.prior is not None:
        if config.model.conditioner is None:
            return {"tokenizer": tokenizer, "model": _Loose(found.prior.weights)}
        prior = build_generator(config, tokenizer, found.classes).prior
        assert isinstance(prior, nn.Module)
        return {"tokenizer": tokenizer, "model": _filled(prior, found.prior)}
    modules: dict[str, Any] = {"model": tokenizer}
    if config.model.get("discriminator") is not None:
        modules["discriminator"] = _critic(found, config)
    if found.tokenizer.average:
        modules["ema"] = build_tokenizer(config.model, found.image_size)
        modules["ema"].load_state_dict(found.tokenizer.average)
    return modules


def _critic(found: Read, config: DictConfig) -> Critic:
    model = config.model
    nodes = (model.get("regularizer") or {}).items()
    critic = Critic(
        build("discriminator", model.discriminator, in_channels=3),
        build("adversary", model.adversary, steps=config.steps),
        {key: build("regularizer", node) for key, node in nodes if node},
    )
    if found.discriminator is None:
        found.report.note("no discriminator was read: the run has a fresh one")
        return critic
    critic.load_state_dict({**critic.state_dict(), **found.discriminator.weights})
    return critic


class _Loose(nn.Module):
    """Weights of a prior that nothing can be built for yet."""

    def __init__(self, weights: Mapping[str, Tensor]) -> None:
        super().__init__()
        self.weights = weights

    def state_dict(self) -> Mapping[str, Tensor]:  # type: ignore[override]
        return self.weights


def _filled(module: Any, part: Part) -> Any:
    module.load_state_dict(part.weights)
    return module


def _states(found: Read, config: DictConfig, trained: Mapping[str, nn.Module]) -> dict[str, Any]:
    """Return the states of optimizers and schedules at the step that the file is of, for a run to go on from."""
    parts = {"model": found.prior or found.tokenizer, "discriminator": found.discriminator}
    result: dict[str, Any] = {"optimizers": {}, "schedules": {}}
    for name, module in trained.items():
        if not list(module.parameters()):
            continue
        params = decay_groups(module) if found.prior else list(module.parameters())
        optimizer: Optimizer = build("optimizer", config.optimizer, params=params)
        schedule = build("schedule", config.schedule, optimizer=optimizer, steps=config.steps)
        schedule.last_epoch, schedule._step_count = found.step, found.step + 1
        part = parts[name]
        if part is not None and part.state is not None:
            optimizers.restore(optimizer, module, part.state)
        result["optimizers"][name] = optimizer.state_dict()
        result["schedules"][name] = schedule.state_dict()
    return result


def _write_presets(config: DictConfig, run_dir: Path) -> None:
    """Write the run's model and optimizer as presets, since a run that is resumed is composed anew."""
    folder = run_dir / PRESETS
    chosen = {key: config[key] for key in ("image_size", "ema", "optimizer")}
    name = chosen["optimizer"]["name"]
    defaults = [{"override /model": "imported"}, {"override /optimizer": name}]
    _save_yaml(folder / "model" / "imported.yaml", config.model)
    _save_yaml(folder / "experiment" / "imported.yaml", {"defaults": defaults, **chosen}, "# @package _global_\n")
    log.info(
        "to train it on: python -m vqf.run --config-dir %s experiment=imported resume=%s steps=... data=...",
        folder,
        run_dir,
    )


def _save_yaml(path: Path, content: Any, header: str = "") -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(header + OmegaConf.to_yaml(OmegaConf.create(content), resolve=True))


@register("pipeline", "export")
class Export:
    """Write a run as a checkpoint of another project, with the settings that build its model there.

    Args:
        path: The file (taming) or folder (diffusers) to write.
        to: Whose layout.
    """

    def __init__(
        self, config: DictConfig, run_dir: Path, *, path: str, to: Literal["taming", "diffusers"] = "taming"
    ) -> None:
        self.config, self.run_dir, self.to, self.path = config, run_dir, to, Path(path).expanduser()

    def run(self) -> None:
        """Write it, averaged weights where the run has them."""
        if self.path.exists():
            raise UserError(f"path={self.path}: exists already")
        checkpoint = find_tokenizer(self.config.run)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        if self.to == "diffusers":
            self._diffusers(checkpoint)
        elif checkpoint.kind == "stage2":
            self._transformer(checkpoint)
        else:
            self._taming(checkpoint)
        log.info("written: %s", self.path)

    def _diffusers(self, checkpoint: Checkpoint) -> None:
        written = self._tokenizer(checkpoint)
        self.path.mkdir()
        save_file(written.tensors, self.path / "diffusion_pytorch_model.safetensors", metadata={"format": "pt"})
        (self.path / "config.json").write_text(json.dumps(written.settings, indent=2))

    def _tokenizer(self, checkpoint: Checkpoint) -> Written:
        tokenizer = load_tokenizer(checkpoint)
        written = write_tokenizer(tokenizer, checkpoint.config.model.quantizer.name, TARGETS[self.to])
        for note in written.notes:
            log.info("%s", note)
        return written

    def _taming(self, checkpoint: Checkpoint) -> None:
        written = self._tokenizer(checkpoint)
        tensors, states = written.tensors, []
        averaged = checkpoint.has("ema")
        if not averaged:
            ordered = [name for start in PARTS for name, new in written.names.items() if new.startswith(start)]
            states.append(_reordered(checkpoint, "model", load_tokenizer(checkpoint), ordered))
        if checkpoint.has("discriminator"):
            critic = write_discriminator(checkpoint.weights("discriminator"))
            tensors |= critic.tensors
        self._save(tensors, checkpoint.step, [each for each in states if each], written.settings)

    def _transformer(self, checkpoint: Checkpoint) -> None:
        first, config = self._tokenizer(checkpoint), checkpoint.config
        node, generator = config.model.prior, load_generator(checkpoint)
        assert isinstance(generator.prior, nn.Module)
        prior = write_prior(generator.prior, node, generator.prior.unmasked)
        tensors = {f"first_stage_model.{name}": each for name, each in first.tensors.items()}
        tensors |= {f"transformer.{name}": each for name, each in prior.tensors.items()}
        labels = {"target": "taming.modules.util.Labelator", "params": {"n_classes": len(generator.classes)}}
        params = {
            "transformer_config": prior.settings,
            "first_stage_config": first.settings,
            "cond_stage_config": labels if generator.classes else "__is_unconditional__",
            "unconditional": not generator.classes,
            "pkeep": node.get("pkeep", 1.0),
        }
        settings = {"target": "taming.models.cond_transformer.Net2NetTransformer", "params": params}
        self._save(tensors, checkpoint.step, [], settings)

    def _save(self, tensors: dict[str, Tensor], step: int, states: list[Any], settings: dict[str, Any]) -> None:
        lightning = {"epoch": 0, "global_step": step, "pytorch-lightning_version": LIGHTNING, "state_dict": tensors}
        torch.save({**lightning, "optimizer_states": states, "lr_schedulers": [], "callbacks": {}}, self.path)
        _save_yaml(self.path.with_suffix(".yaml"), {"model": settings})
