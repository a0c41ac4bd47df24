"""A run of vqf's, out as a checkpoint of another project."""

import json
from pathlib import Path
from typing import Any, Literal

import torch
from omegaconf import DictConfig, OmegaConf
from safetensors.torch import save_file
from torch import Tensor, nn

from vqf.errors import UserError
from vqf.interop.export_model import EXPORT_LAYOUTS, ExportedModel, write_discriminator, write_prior, write_tokenizer
from vqf.interop.infer_config import discriminator_node
from vqf.interop.meta_models import meta_discriminator
from vqf.interop.optimizers import reorder_state
from vqf.interop.priors import optimizer_groups
from vqf.interop.tokenizers import PARAMETER_PREFIXES
from vqf.models.generator import Generator
from vqf.registry import register
from vqf.runs.checkpoint import Checkpoint
from vqf.runs.load import find_tokenizer_checkpoint, load_generator, load_tokenizer
from vqf.terminal import log
from vqf.training.prior_task import param_groups_weight_decay

LIGHTNING_VERSION = "1.0.8"  # the version that taming-transformers pins


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
        if self.path == self._settings:
            raise UserError(f"path={self.path}: that is where the settings go; name the weights, as in path=vqgan.ckpt")
        for path in (self.path, self._settings):
            if path.exists():
                raise UserError(f"path={self.path}: {path} exists already")
        checkpoint = find_tokenizer_checkpoint(self.config.run)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        if self.to == "diffusers":
            if checkpoint.kind == "stage2":
                log.info("the prior is left out: diffusers has none of its kind")
            self._diffusers(checkpoint)
        elif checkpoint.kind == "stage2":
            self._transformer(checkpoint)
        else:
            self._taming(checkpoint)
        log.info("written: %s", self.path)

    @property
    def _settings(self) -> Path:
        return self.path / "config.json" if self.to == "diffusers" else self.path.with_suffix(".yaml")

    def _diffusers(self, checkpoint: Checkpoint) -> None:
        written = self._tokenizer(checkpoint)
        self.path.mkdir()
        save_file(written.tensors, self.path / "diffusion_pytorch_model.safetensors", metadata={"format": "pt"})
        self._settings.write_text(json.dumps(written.settings, indent=2))

    def _tokenizer(self, checkpoint: Checkpoint) -> ExportedModel:
        tokenizer = load_tokenizer(checkpoint)
        written = write_tokenizer(tokenizer, checkpoint.config.model.quantizer.name, EXPORT_LAYOUTS[self.to])
        for note in written.notes:
            log.info("%s", note)
        return written

    def _taming(self, checkpoint: Checkpoint) -> None:
        written, tokenizer = self._tokenizer(checkpoint), load_tokenizer(checkpoint)
        ordered = [
            name for start in PARAMETER_PREFIXES for name, new in written.key_mapping.items() if new.startswith(start)
        ]
        states = [_reordered_state(checkpoint, "model", _parameter_names(tokenizer), [ordered])]
        tensors = written.tensors
        if checkpoint.has_weights("discriminator"):
            critic, state = self._discriminator(checkpoint)
            tensors |= critic.tensors
            states.append(state)
        self._save(tensors, checkpoint.step, self._exportable_states(checkpoint, states), written.settings)

    def _discriminator(self, checkpoint: Checkpoint) -> tuple[ExportedModel, dict[str, Any] | None]:
        """Write the discriminator of a run in the order of its layers, and its optimizer's state in the same."""
        weights = checkpoint.load_weights("discriminator")
        node = discriminator_node({name: each.shape for name, each in weights.items()})
        if node is None:
            log.info("the discriminator is left out: it is no PatchGAN with batch norm")
            return ExportedModel({}, {}), None
        judge = meta_discriminator(node)
        ordered = {name: weights[name] for name in judge.state_dict()}
        if rest := [name for name in weights if name not in ordered]:
            log.info("left out, since taming-transformers has no place for it: %s", ", ".join(rest))
        return write_discriminator(ordered), _reordered_state(
            checkpoint, "discriminator", _parameter_names(judge), [list(ordered)]
        )

    def _transformer(self, checkpoint: Checkpoint) -> None:
        first, config = self._tokenizer(checkpoint), checkpoint.config
        node, generator = config.model.prior, load_generator(checkpoint)
        condition = self._condition(checkpoint, generator)
        assert isinstance(generator.prior, nn.Module)
        prior = write_prior(generator.prior, node, int(generator.prior.bidirectional_prefix))  # type: ignore[arg-type]
        tensors = {f"first_stage_model.{name}": each for name, each in first.tensors.items()}
        tensors |= {f"transformer.{name}": each for name, each in prior.tensors.items()}
        params = {
            "transformer_config": prior.settings,
            "first_stage_config": first.settings,
            "pkeep": node.get("pkeep", 1.0),
            **condition.settings,
        }
        settings = {"target": "taming.models.cond_transformer.Net2NetTransformer", "params": params}
        ours = {theirs: name for name, theirs in prior.key_mapping.items()}
        groups = [[ours[theirs] for theirs in group] for group in optimizer_groups(generator.prior, ours)]
        state = _reordered_state(checkpoint, "model", _optimizer_parameter_names(generator.prior), groups)
        self._save(tensors | condition.tensors, checkpoint.step, self._exportable_states(checkpoint, [state]), settings)

    def _condition(self, checkpoint: Checkpoint, generator: Generator) -> ExportedModel:
        """Write what a prior is told: nothing, a class, or a map by a tokenizer of its own.

        Raises:
            UserError: If it is told anything else.
        """
        nodes, parts = checkpoint.config.model.conditioner, generator.conditioner.conditioners
        kinds = [node.name for node in nodes.values()]
        if kinds == ["none"]:
            return ExportedModel({}, {"cond_stage_config": "__is_unconditional__", "unconditional": True})
        if kinds == ["label"]:
            labels = {"target": "taming.modules.util.Labelator", "params": {"n_classes": len(generator.classes)}}
            return ExportedModel({}, {"cond_stage_config": labels})
        if kinds != ["spatial"] or nodes.spatial.get("dropout"):
            told = " and ".join(kinds) if kinds != ["spatial"] else "spatial with dropout"
            raise UserError(f"to=taming: model/conditioner={told}: it knows none, label, or spatial without dropout")
        spatial: Any = parts["spatial"]
        quantizer = checkpoint.state["condition_tokenizers"][nodes.spatial.run]["model"]["quantizer"]["name"]
        found = write_tokenizer(spatial.tokenizer, quantizer, EXPORT_LAYOUTS["taming"])
        tensors = {f"cond_stage_model.{name}": each for name, each in found.tensors.items()}
        return ExportedModel(
            tensors, {"cond_stage_config": found.settings, **_downsample_setting(generator, spatial.downsample)}
        )

    def _exportable_states(self, checkpoint: Checkpoint, states: list[dict[str, Any] | None]) -> list[Any]:
        """Return the states of optimizers that go along, all or none, and say why not."""
        if checkpoint.has_weights("ema"):  # a state belongs to the weights that it moved
            log.info("optimizer states are left out: the weights written are the averaged ones")
        elif None in states:
            log.info("optimizer states are left out: the run has none, or not of Adam")
        else:
            return states
        return []

    def _save(self, tensors: dict[str, Tensor], step: int, states: list[Any], settings: dict[str, Any]) -> None:
        lightning = {
            "epoch": 0,
            "global_step": step,
            "pytorch-lightning_version": LIGHTNING_VERSION,
            "state_dict": tensors,
        }
        torch.save({**lightning, "optimizer_states": states, "lr_schedulers": [], "callbacks": {}}, self.path)
        self._settings.write_text(OmegaConf.to_yaml(OmegaConf.create({"model": settings})))


def _reordered_state(
    checkpoint: Checkpoint, name: str, names: list[str], groups: list[list[str]]
) -> dict[str, Any] | None:
    """Return the state of a run's optimizer with the parameters in another order; None unless it is Adam's.

    Args:
        checkpoint: Of the run.
        name: Of the optimizer in it.
        names: Of its parameters, in its order.
        groups: The order that is wanted; names of buffers in it are passed over.
    """
    saved = checkpoint.load_optimizers().get("optimizers", {}).get(name)
    if saved is None or any("exp_avg_sq" not in entry for entry in saved["state"].values()):
        return None
    return reorder_state(saved, names, [[each for each in group if each in names] for group in groups])


def _parameter_names(module: nn.Module) -> list[str]:
    return [name for name, _ in module.named_parameters()]


def _optimizer_parameter_names(prior: nn.Module) -> list[str]:
    """Return the names of a prior's parameters as its optimizer has them."""
    names = {id(parameter): name for name, parameter in prior.named_parameters()}
    groups = param_groups_weight_decay(prior.requires_grad_(True))
    return [names[id(parameter)] for group in groups for parameter in group["params"]]


def _downsample_setting(generator: Generator, downsample: int) -> dict[str, int]:
    """Return the setting for the size that maps are brought to; taming-transformers makes them square."""
    height, width = generator.tokenizer.image_size
    if downsample == 1:
        return {}
    if height != width:
        raise UserError(f"to=taming: model.conditioner.spatial.downsample={downsample} of maps that are not square")
    return {"downsample_cond_size": height // downsample}
