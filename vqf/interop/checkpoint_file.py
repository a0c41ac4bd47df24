"""Opens a checkpoint of another project."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf
from safetensors import SafetensorError, safe_open
from torch import Tensor

from vqf.errors import UserError
from vqf.interop.unpickle import load_untrusted
from vqf.networks.file_content import describe_substitute, is_safetensors
from vqf.networks.weights import not_weights_error
from vqf.run_files.yaml_file import read_yaml

DISCRIMINATOR_PREFIX = "loss.discriminator."  # of taming-transformers
DDP_PREFIX = "module."  # of every name in a DistributedDataParallel model
EMA_PREFIX = "model_ema."  # of latent-diffusion, followed by the parameter name without dots
DIFFUSERS_SUBFOLDERS = (".", "vqvae", "vqmodel", "movq")  # that hold the tokenizer in a diffusers pipeline
WEIGHT_PATTERNS = ("*.safetensors", "*.bin", "*.ckpt", "*.pt", "*.pth")
CONFIG_PATTERNS = ("{stem}.yaml", "config.json", "config.yaml", "model.yaml", "../configs/*project.yaml")
MAX_STEP = 2**53  # of a file that is to be believed
MAX_EXPANDED = 2**24  # numbers in a tensor that repeats a few


@dataclass
class CheckpointContents:
    """Content of a checkpoint file."""

    path: Path
    tensors: Mapping[str, Tensor]
    ema_tensors: Mapping[str, Tensor] = field(default_factory=dict)  # same names as in `tensors`
    optimizers: Sequence[Mapping[str, Any]] = ()  # state dicts: model, discriminator
    step: int = 0
    settings: DictConfig = field(default_factory=lambda: OmegaConf.create({}))
    settings_path: Path | None = None


def open_checkpoint_file(path: Path, settings: Path | None) -> CheckpointContents:
    """Read a checkpoint, or the folder of a diffusers or transformers model, and its config.

    `settings` is by default a yaml or json beside it.

    Raises:
        UserError: If the file cannot be read or holds no weights.
    """
    files = _weight_files(path)
    if is_safetensors(files[0]) or (len(files) > 1 and files[0].suffix == ".safetensors"):
        contents = CheckpointContents(path, LazySafetensors(files))
    elif len(files) > 1:
        raise UserError(
            f"{path}: several weight files ({files[0].name}, {files[1].name}); give the path of one of them"
        )
    else:
        contents = _read_torch_checkpoint(path, files[0])
    contents.settings_path = settings or _find_config(files[0])
    if contents.settings_path:
        contents.settings = _read_config(contents.settings_path)
    return contents


class LazySafetensors(Mapping[str, Tensor]):
    """Tensors of safetensors files, read on access."""

    def __init__(self, files: list[Path]) -> None:
        self.file_by_name: dict[str, Path] = {}
        for file in files:
            try:
                with safe_open(file, "pt") as opened:
                    self.file_by_name.update(dict.fromkeys(opened.keys(), file))
            except SafetensorError as error:
                raise not_weights_error(file) from error

    def __getitem__(self, name: str) -> Tensor:
        with safe_open(self.file_by_name[name], "pt") as opened:
            return opened.get_tensor(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self.file_by_name)

    def __len__(self) -> int:
        return len(self.file_by_name)


def _weight_files(path: Path) -> list[Path]:
    if path.is_file():
        return [path]
    if not path.is_dir():
        raise UserError(f"path={path}: no such file or folder")
    for folder in (path / each for each in DIFFUSERS_SUBFOLDERS):
        for pattern in WEIGHT_PATTERNS:
            if files := sorted(folder.glob(pattern)):
                return files
    raise UserError(f"path={path}: no weights in this folder ({', '.join(WEIGHT_PATTERNS)})")


def _read_torch_checkpoint(path: Path, file: Path) -> CheckpointContents:
    content = load_untrusted(file)
    try:
        return _unwrap(path, content)
    except UserError as error:
        raise UserError(f"{path}: {str(error).removeprefix(f'{path}: ')}") from error


def _unwrap(path: Path, content: Any) -> CheckpointContents:
    if not isinstance(content, dict):
        raise UserError(f"{path}: holds one {type(content).__name__}, not a mapping of names to tensors")
    for key in ("state_dict", "model", "ema"):
        if tensors := _tensors(content.get(key)):
            break
    else:
        key, tensors = "", _tensors(content)
    if not tensors:
        raise UserError(f"{path}: no weights in it; it holds {', '.join(map(str, list(content)[:8])) or 'nothing'}")
    if key == "state_dict":
        return _unwrap_lightning(path, content, tensors)
    ema = _tensors(content.get("ema")) if key == "model" else {}
    tensors |= {DISCRIMINATOR_PREFIX + name: each for name, each in _tensors(content.get("discriminator")).items()}
    optimizers = [each for each in (content.get("optimizer"), content.get("optimizer_disc")) if isinstance(each, dict)]
    return CheckpointContents(path, tensors, ema, optimizers, _int_or_zero(content.get("steps")))


def _unwrap_lightning(path: Path, content: Mapping[Any, Any], tensors: Mapping[str, Tensor]) -> CheckpointContents:
    saved = content.get("optimizer_states")
    optimizers = [each for each in saved if isinstance(each, dict)] if isinstance(saved, list | tuple) else []
    step = _int_or_zero(content.get("global_step"))
    if _counts_every_optimizer(content.get("pytorch-lightning_version")):
        step //= max(len(optimizers), 1)
    ema = {name: tensors[short] for name in tensors if (short := EMA_PREFIX + name.replace(".", "")) in tensors}
    return CheckpointContents(path, tensors, ema, optimizers, step)


def _counts_every_optimizer(version: Any) -> bool:
    """Tell whether `global_step` counts all optimizers (Lightning 1.6 and later)."""
    numbers = str(version or "0").split(".")[:2]
    return all(each.isdigit() for each in numbers) and tuple(map(int, numbers)) >= (1, 6)


def _tensors(mapping: Any) -> dict[str, Tensor]:
    """Drop DDP's prefix; empty for other types."""
    items = mapping.items() if isinstance(mapping, dict) else ()
    tensors = {str(name): each for name, each in items if isinstance(each, Tensor)}
    for name, tensor in tensors.items():
        _check_stored(name, tensor)
    if all(name.startswith(DDP_PREFIX) for name in tensors):
        return {name.removeprefix(DDP_PREFIX): each for name, each in tensors.items()}
    return tensors


def _check_stored(name: str, tensor: Tensor) -> None:
    """Refuse a tensor whose numbers are not in the file: a pickle may name any size."""
    if tensor.layout != torch.strided or tensor.is_quantized or tensor.device.type != "cpu":
        raise UserError(f"'{name}' is a sparse, quantized or empty tensor; save the model with dense weights")
    if tensor.numel() > MAX_EXPANDED and tensor.nbytes > tensor.untyped_storage().nbytes():
        raise UserError(f"'{name}' is of size {list(tensor.shape)}, and the file has fewer numbers for it")


def _int_or_zero(value: Any) -> int:
    return value if isinstance(value, int) and 0 <= value < MAX_STEP else 0


def _find_config(file: Path) -> Path | None:
    for pattern in CONFIG_PATTERNS:
        if paths := sorted(file.parent.glob(pattern.format(stem=file.stem))):
            return paths[-1]
    return None


def _read_config(path: Path) -> DictConfig:
    if substitute := describe_substitute(path):  # which may be valid YAML
        raise UserError(f"{path}: not a file of settings: {substitute}")
    try:
        settings = read_yaml(path)  # JSON is valid YAML
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: cannot be read as yaml ({error})") from error
    if not isinstance(settings, DictConfig):
        raise UserError(f"{path}: not a mapping of settings")
    return settings
