"""Opens a checkpoint of another project."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from safetensors import SafetensorError, safe_open
from torch import Tensor
from yaml import YAMLError

from vqf.errors import UserError
from vqf.interop.unpickle import load_untrusted

DISCRIMINATOR_PREFIX = "loss.discriminator."  # of taming-transformers
DDP_PREFIX = "module."  # of every name in a DistributedDataParallel model
EMA_PREFIX = "model_ema."  # of latent-diffusion, followed by the parameter name without dots
DIFFUSERS_SUBFOLDERS = (".", "vqvae", "vqmodel", "movq")  # that hold the tokenizer in a diffusers pipeline
WEIGHT_PATTERNS = ("*.safetensors", "*.bin", "*.ckpt", "*.pt", "*.pth")
CONFIG_PATTERNS = ("{stem}.yaml", "config.json", "config.yaml", "model.yaml", "../configs/*project.yaml")


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
    if files[0].suffix == ".safetensors":
        contents = CheckpointContents(path, LazySafetensors(files))
    elif len(files) > 1:
        raise UserError(
            f"{path}: several weight files ({files[0].name}, {files[1].name}); give the path of one of them"
        )
    else:
        contents = _unwrap(path, load_untrusted(files[0]))
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
                raise UserError(f"{file}: damaged, or not a safetensors file ({error})") from error

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
    optimizers = [each for each in content.get("optimizer_states") or [] if isinstance(each, dict)]
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
    if all(name.startswith(DDP_PREFIX) for name in tensors):
        return {name.removeprefix(DDP_PREFIX): each for name, each in tensors.items()}
    return tensors


def _int_or_zero(value: Any) -> int:
    return value if isinstance(value, int) else 0


def _find_config(file: Path) -> Path | None:
    for pattern in CONFIG_PATTERNS:
        if paths := sorted(file.parent.glob(pattern.format(stem=file.stem))):
            return paths[-1]
    return None


def _read_config(path: Path) -> DictConfig:
    try:
        settings = OmegaConf.load(path)  # JSON is valid YAML
    except (OSError, YAMLError, OmegaConfBaseException, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read as yaml ({str(error).splitlines()[0]})") from error
    if not isinstance(settings, DictConfig):
        raise UserError(f"{path}: not a mapping of settings")
    return settings
