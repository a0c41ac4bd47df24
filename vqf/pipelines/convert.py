"""Checkpoints of other projects: in as a run of vqf's, out as a file of theirs."""

import json
from pathlib import Path
from typing import Any, Literal

import torch
from omegaconf import DictConfig, OmegaConf, open_dict
from safetensors.torch import save_file
from torch import Tensor, nn

from vqf.errors import UserError
from vqf.interop.blanks import blank_discriminator
from vqf.interop.geometry import discriminator_node
from vqf.interop.optimizers import in_order
from vqf.interop.priors import Asked
from vqf.interop.reading import Read, read
from vqf.interop.tokenizers import PARTS
from vqf.interop.writing import TARGETS, Written, write_discriminator, write_prior, write_tokenizer
from vqf.pipelines.checkpoint import Checkpoint
from vqf.pipelines.common import DEFAULT_IMAGE_SIZE, image_size
from vqf.pipelines.imported import PRESETS, save_run
from vqf.pipelines.inherit import given
from vqf.pipelines.restore import find_tokenizer, load_generator, load_tokenizer
from vqf.protocols import Size, pair
from vqf.registry import find, register
from vqf.terminal import log

REPORT = "import-report.txt"
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
        found = read(self.path, source=self.source, yaml=self.yaml, size=self._size(), asked=self.asked)
        config = self._without_options()
        save_run(found, config, self.run_dir)
        (self.run_dir / REPORT).write_text(found.report.text())
        self._tell(found)

    def _tell(self, found: Read) -> None:
        for line in found.report.summary():
            log.info("%s", line)
        if found.report.strange:
            log.warning("%d tensors that vqf does not know were left", len(found.report.strange))
        log.info("a %s run in %s; what became of every tensor in %s", found.kind, self.run_dir, REPORT)
        if found.kind == "stage1":
            words = f"--config-dir {self.run_dir / PRESETS} experiment=imported resume={self.run_dir}"
            log.info("to train it on: python -m vqf.run %s steps=... data=...", words)

    def _size(self) -> Size | None:
        """Return the size of pictures that the user chose; None where it is the default of the command line."""
        size = image_size(self.config)
        return size if "image_size" in given() or size != pair(DEFAULT_IMAGE_SIZE) else None

    def _without_options(self) -> DictConfig:
        config = self.config.copy()
        with open_dict(config):
            for option in find("pipeline", "import").options:
                config.pop(option, None)
        return config


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
        checkpoint = find_tokenizer(self.config.run)
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

    def _tokenizer(self, checkpoint: Checkpoint) -> Written:
        tokenizer = load_tokenizer(checkpoint)
        written = write_tokenizer(tokenizer, checkpoint.config.model.quantizer.name, TARGETS[self.to])
        for note in written.notes:
            log.info("%s", note)
        return written

    def _taming(self, checkpoint: Checkpoint) -> None:
        written, tokenizer = self._tokenizer(checkpoint), load_tokenizer(checkpoint)
        ordered = [name for start in PARTS for name, new in written.names.items() if new.startswith(start)]
        states = [_state(checkpoint, "model", tokenizer, ordered)]
        tensors = written.tensors
        if checkpoint.has("discriminator"):
            critic, state = self._discriminator(checkpoint)
            tensors |= critic.tensors
            states.append(state)
        # An optimizer's state belongs to the weights that it moved, not to their average.
        kept = [] if checkpoint.has("ema") or None in states else states
        self._save(tensors, checkpoint.step, kept, written.settings)

    def _discriminator(self, checkpoint: Checkpoint) -> tuple[Written, dict[str, Any] | None]:
        """Write the discriminator of a run in the order of its layers, and its optimizer's state in the same."""
        weights = checkpoint.weights("discriminator")
        node = discriminator_node({name: each.shape for name, each in weights.items()})
        if node is None:
            log.info("the discriminator is left out: it is no PatchGAN with batch norm")
            return Written({}, {}), None
        judge = blank_discriminator(node)
        ordered = {name: weights[name] for name in judge.state_dict()}
        if rest := [name for name in weights if name not in ordered]:
            log.info("left out, since taming-transformers has no place for it: %s", ", ".join(rest))
        return write_discriminator(ordered), _state(checkpoint, "discriminator", judge, list(ordered))

    def _transformer(self, checkpoint: Checkpoint) -> None:
        first, config = self._tokenizer(checkpoint), checkpoint.config
        node, generator = config.model.prior, load_generator(checkpoint)
        assert isinstance(generator.prior, nn.Module)
        prior = write_prior(generator.prior, node, int(generator.prior.unmasked))  # type: ignore[arg-type]
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
        self._settings.write_text(OmegaConf.to_yaml(OmegaConf.create({"model": settings})))


def _state(checkpoint: Checkpoint, name: str, module: nn.Module, order: list[str]) -> dict[str, Any] | None:
    """Return the state of a run's optimizer with the parameters in another order; None unless it is Adam's."""
    saved = checkpoint.optimizers()["optimizers"][name]
    names = [each for each, _ in module.named_parameters()]
    if any("exp_avg_sq" not in entry for entry in saved["state"].values()):
        return None
    return in_order(saved, names, [[each for each in order if each in names]])
