"""Write a run as a checkpoint of another project."""

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

LIGHTNING_VERSION = "1.0.8"  # pinned by taming-transformers


@register("pipeline", "export")
class Export:
    """Write a run as a checkpoint of another project, with the config that builds the model there.

    Args:
        path: File (taming) or folder (diffusers) to write.
        to: Project whose layout to write: taming (taming-transformers) or diffusers.
    """

    def __init__(
        self, config: DictConfig, run_dir: Path, *, path: str, to: Literal["taming", "diffusers"] = "taming"
    ) -> None:
        self.config, self.run_dir, self.to, self.path = config, run_dir, to, Path(path).expanduser()

    def run(self) -> None:
        """Write the checkpoint, preferably with EMA weights.

        Raises:
            UserError: If a file exists, or the other project cannot build the model.
        """
        if self.path == self._config_path:
            raise UserError(f"path={self.path}: the config is written there; name the weights, as in path=vqgan.ckpt")
        for path in (self.path, self._config_path):
            if path.exists():
                raise UserError(f"path={self.path}: {path} exists already")
        checkpoint = find_tokenizer_checkpoint(self.config.run)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        if self.to == "diffusers":
            if checkpoint.kind == "stage2":
                log.info("the prior is left out: diffusers has no such model")
            self._diffusers(checkpoint)
        elif checkpoint.kind == "stage2":
            self._transformer(checkpoint)
        else:
            self._taming(checkpoint)
        log.info("written: %s", self.path)

    @property
    def _config_path(self) -> Path:
        return self.path / "config.json" if self.to == "diffusers" else self.path.with_suffix(".yaml")

    def _diffusers(self, checkpoint: Checkpoint) -> None:
        exported = self._tokenizer(checkpoint)
        self.path.mkdir()
        save_file(exported.tensors, self.path / "diffusion_pytorch_model.safetensors", metadata={"format": "pt"})
        self._config_path.write_text(json.dumps(exported.settings, indent=2))

    def _tokenizer(self, checkpoint: Checkpoint) -> ExportedModel:
        tokenizer = load_tokenizer(checkpoint)
        exported = write_tokenizer(tokenizer, checkpoint.config.model.quantizer.name, EXPORT_LAYOUTS[self.to])
        for note in exported.notes:
            log.info("%s", note)
        return exported

    def _taming(self, checkpoint: Checkpoint) -> None:
        exported, tokenizer = self._tokenizer(checkpoint), load_tokenizer(checkpoint)
        # Lightning saves optimizer states by parameter order, which follows taming's module order.
        order = [
            name
            for prefix in PARAMETER_PREFIXES
            for name, their_name in exported.key_mapping.items()
            if their_name.startswith(prefix)
        ]
        states = [_reordered_state(checkpoint, "model", _parameter_names(tokenizer), [order])]
        tensors = exported.tensors
        if checkpoint.has_weights("discriminator"):
            discriminator, state = self._discriminator(checkpoint)
            tensors |= discriminator.tensors
            states.append(state)
        self._save(tensors, checkpoint.step, self._exportable_states(checkpoint, states), exported.settings)

    def _discriminator(self, checkpoint: Checkpoint) -> tuple[ExportedModel, dict[str, Any] | None]:
        weights = checkpoint.load_weights("discriminator")
        node = discriminator_node({name: tensor.shape for name, tensor in weights.items()})
        if node is None:
            log.info("the discriminator is left out: it is not a PatchGAN with batch norm")
            return ExportedModel({}, {}), None
        discriminator = meta_discriminator(node)
        ordered = {name: weights[name] for name in discriminator.state_dict()}
        if rest := [name for name in weights if name not in ordered]:
            log.info("left out, since taming-transformers has no such tensors: %s", ", ".join(rest))
        state = _reordered_state(checkpoint, "discriminator", _parameter_names(discriminator), [list(ordered)])
        return write_discriminator(ordered), state

    def _transformer(self, checkpoint: Checkpoint) -> None:
        tokenizer, generator = self._tokenizer(checkpoint), load_generator(checkpoint)
        node = checkpoint.config.model.prior
        condition = self._condition(checkpoint, generator)
        module: Any = generator.prior
        prior = write_prior(module, node, int(module.bidirectional_prefix))
        tensors = {f"first_stage_model.{name}": tensor for name, tensor in tokenizer.tensors.items()}
        tensors |= {f"transformer.{name}": tensor for name, tensor in prior.tensors.items()}
        params = {
            "transformer_config": prior.settings,
            "first_stage_config": tokenizer.settings,
            "pkeep": node.get("pkeep", 1.0),
            **condition.settings,
        }
        settings = {"target": "taming.models.cond_transformer.Net2NetTransformer", "params": params}
        our_names = {their_name: name for name, their_name in prior.key_mapping.items()}
        groups = [[our_names[name] for name in group] for group in optimizer_groups(module, our_names)]
        state = _reordered_state(checkpoint, "model", _optimizer_parameter_names(module), groups)
        self._save(tensors | condition.tensors, checkpoint.step, self._exportable_states(checkpoint, [state]), settings)

    def _condition(self, checkpoint: Checkpoint, generator: Generator) -> ExportedModel:
        nodes, conditioners = checkpoint.config.model.conditioner, generator.conditioner.conditioners
        kinds = [node.name for node in nodes.values()]
        if kinds == ["none"]:
            return ExportedModel({}, {"cond_stage_config": "__is_unconditional__", "unconditional": True})
        if kinds == ["label"]:
            labels = {"target": "taming.modules.util.Labelator", "params": {"n_classes": len(generator.classes)}}
            return ExportedModel({}, {"cond_stage_config": labels})
        if kinds != ["spatial"] or nodes.spatial.get("dropout"):
            found = " and ".join(kinds) if kinds != ["spatial"] else "spatial with dropout"
            raise UserError(f"to=taming: model/conditioner={found}: it knows none, label, or spatial without dropout")
        spatial: Any = conditioners["spatial"]
        quantizer = checkpoint.state["condition_tokenizers"][nodes.spatial.run]["model"]["quantizer"]["name"]
        exported = write_tokenizer(spatial.tokenizer, quantizer, EXPORT_LAYOUTS["taming"])
        tensors = {f"cond_stage_model.{name}": tensor for name, tensor in exported.tensors.items()}
        settings = {"cond_stage_config": exported.settings, **_downsample_setting(generator, spatial.downsample)}
        return ExportedModel(tensors, settings)

    def _exportable_states(self, checkpoint: Checkpoint, states: list[dict[str, Any] | None]) -> list[Any]:
        if checkpoint.has_weights("ema"):  # the states belong to the raw weights, which are not exported
            log.info("optimizer states are left out: the exported weights are the EMA")
        elif None in states:
            log.info("optimizer states are left out: the run has none of Adam")
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
        self._config_path.write_text(OmegaConf.to_yaml(OmegaConf.create({"model": settings})))


def _reordered_state(
    checkpoint: Checkpoint, name: str, names: list[str], groups: list[list[str]]
) -> dict[str, Any] | None:
    """Return an optimizer state with parameters `names` reordered to `groups`; None unless it is Adam's."""
    saved = checkpoint.load_optimizers().get("optimizers", {}).get(name)
    if saved is None or any("exp_avg_sq" not in entry for entry in saved["state"].values()):
        return None
    return reorder_state(saved, names, [[key for key in group if key in names] for group in groups])


def _parameter_names(module: nn.Module) -> list[str]:
    return [name for name, _ in module.named_parameters()]


def _optimizer_parameter_names(prior: nn.Module) -> list[str]:
    names = {id(param): name for name, param in prior.named_parameters()}
    groups = param_groups_weight_decay(prior.requires_grad_(True))
    return [names[id(param)] for group in groups for param in group["params"]]


def _downsample_setting(generator: Generator, downsample: int) -> dict[str, int]:
    height, width = generator.tokenizer.image_size
    if downsample == 1:
        return {}
    if height != width:
        raise UserError(f"to=taming: model.conditioner.spatial.downsample={downsample} needs square maps")
    return {"downsample_cond_size": height // downsample}
