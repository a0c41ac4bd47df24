"""Opens a checkpoint of another project and finds the weights in it, whoever wrapped them up."""

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

DISCRIMINATOR_PREFIX = "loss.discriminator."  # where taming-transformers keeps its discriminator
DDP_PREFIX = "module."  # what DistributedDataParallel puts in front of all names
EMA_PREFIX = "model_ema."  # where latent-diffusion keeps averages, their names without dots
DIFFUSERS_SUBFOLDERS = (".", "vqvae", "vqmodel", "movq")  # of a pipeline of diffusers
WEIGHT_PATTERNS = ("*.safetensors", "*.bin", "*.ckpt", "*.pt", "*.pth")
CONFIG_PATTERNS = ("{stem}.yaml", "config.json", "config.yaml", "model.yaml", "../configs/*project.yaml")


@dataclass
class CheckpointContents:
    """What a file holds."""

    path: Path
    tensors: Mapping[str, Tensor]
    ema_tensors: Mapping[str, Tensor] = field(default_factory=dict)  # by the names of `tensors`
    optimizers: Sequence[Mapping[str, Any]] = ()  # of the model, and of the discriminator
    step: int = 0
    settings: DictConfig = field(default_factory=lambda: OmegaConf.create({}))
    settings_path: Path | None = None


def open_checkpoint_file(path: Path, settings: Path | None) -> CheckpointContents:
    """Read a checkpoint.

    Args:
        path: A file, or the folder of a model of diffusers or transformers.
        settings: The yaml or json that describes it; by default one that lies beside it under a usual name.

    Raises:
        UserError: If there is none, or there are no weights in it.
    """
    files = _weight_files(path)
    if files[0].suffix == ".safetensors":
        contents = CheckpointContents(path, LazySafetensors(files))
    elif len(files) > 1:
        raise UserError(f"{path}: several files of weights ({files[0].name}, {files[1].name}); name one of them")
    else:
        contents = _unwrap(path, load_untrusted(files[0]))
    contents.settings_path = settings or _find_config(files[0])
    if contents.settings_path:
        contents.settings = _read_config(contents.settings_path)
    return contents


class LazySafetensors(Mapping[str, Tensor]):
    """The tensors of safetensors files, each read when it is asked for."""

    def __init__(self, files: list[Path]) -> None:
        self.file_by_name: dict[str, Path] = {}
        for file in files:
            try:
                with safe_open(file, "pt") as opened:
                    self.file_by_name.update(dict.fromkeys(opened.keys(), file))
            except SafetensorError as error:
                raise UserError(f"{file}: damaged, or no safetensors ({error})") from error

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
            if found := sorted(folder.glob(pattern)):
                return found
    raise UserError(f"path={path}: no weights in this folder ({', '.join(WEIGHT_PATTERNS)})")


def _unwrap(path: Path, found: Any) -> CheckpointContents:
    if not isinstance(found, dict):
        raise UserError(f"{path}: holds one {type(found).__name__}, not a mapping of names to tensors")
    for key in ("state_dict", "model", "ema"):
        if inside := _tensors(found.get(key)):
            break
    else:
        key, inside = "", _tensors(found)
    if not inside:
        raise UserError(f"{path}: no weights in it; it holds {', '.join(map(str, list(found)[:8])) or 'nothing'}")
    if key == "state_dict":
        return _unwrap_lightning(path, found, inside)
    average = _tensors(found.get("ema")) if key == "model" else {}
    critic = {DISCRIMINATOR_PREFIX + name: each for name, each in _tensors(found.get("discriminator")).items()}
    optimizers = [each for each in (found.get("optimizer"), found.get("optimizer_disc")) if isinstance(each, dict)]
    return CheckpointContents(path, {**inside, **critic}, average, optimizers, _int_or_zero(found.get("steps")))


def _unwrap_lightning(path: Path, found: Mapping[Any, Any], tensors: Mapping[str, Tensor]) -> CheckpointContents:
    optimizers = [each for each in found.get("optimizer_states") or [] if isinstance(each, dict)]
    step = _int_or_zero(found.get("global_step"))
    if _counts_every_optimizer(found.get("pytorch-lightning_version")):
        step //= max(len(optimizers), 1)
    average = {name: tensors[short] for name in tensors if (short := EMA_PREFIX + name.replace(".", "")) in tensors}
    return CheckpointContents(path, tensors, average, optimizers, step)


def _counts_every_optimizer(version: Any) -> bool:
    """Tell whether `global_step` counts the steps of all optimizers, as it does since Lightning 1.6."""
    numbers = str(version or "0").split(".")[:2]
    return all(each.isdigit() for each in numbers) and tuple(map(int, numbers)) >= (1, 6)


def _tensors(found: Any) -> dict[str, Tensor]:
    items = found.items() if isinstance(found, dict) else ()
    tensors = {str(name): each for name, each in items if isinstance(each, Tensor)}
    if all(name.startswith(DDP_PREFIX) for name in tensors):
        return {name.removeprefix(DDP_PREFIX): each for name, each in tensors.items()}
    return tensors


def _int_or_zero(found: Any) -> int:
    return found if isinstance(found, int) else 0


def _find_config(file: Path) -> Path | None:
    for pattern in CONFIG_PATTERNS:
        if found := sorted(file.parent.glob(pattern.format(stem=file.stem))):
            return found[-1]
    return None


def _read_config(path: Path) -> DictConfig:
    try:
        settings = OmegaConf.load(path)  # json is yaml
    except (OSError, YAMLError, OmegaConfBaseException, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read as yaml ({str(error).splitlines()[0]})") from error
    if not isinstance(settings, DictConfig):
        raise UserError(f"{path}: not a mapping of settings")
    return settings
