"""Reads the config of another project."""

from collections.abc import Sequence
from typing import Any

from omegaconf import DictConfig, OmegaConf

from vqf.errors import UserError

DDCONFIG = "model.params.ddconfig"
FIRST_STAGE_DDCONFIG = "model.params.first_stage_config.params.ddconfig"
LOSS_PARAMS = "model.params.lossconfig.params"
TRANSFORMER_PARAMS = "model.params.transformer_config.params"
CONDITION_CONFIG = "model.params.cond_stage_config"
DROPOUT_KEYS = ("embd_pdrop", "resid_pdrop", "attn_pdrop")


def image_size(settings: DictConfig, stride: int) -> int | None:
    """Side of a tokenizer's training images in pixels."""
    size = get_first(settings, f"{DDCONFIG}.resolution", f"{FIRST_STAGE_DDCONFIG}.resolution", "sample_size", kind=int)
    patches = get_first(settings, "num_patches", "vq_config.num_patches", kind=int)
    return size or (patches * stride if patches else None)


def adversary(settings: DictConfig) -> dict[str, Any]:
    """vqf's adversary options from a lossconfig."""
    loss = get_first(settings, f"{LOSS_PARAMS}.disc_loss", kind=str)
    options = {
        "name": loss if loss in ("hinge", "vanilla") else None,
        "start": get_first(settings, f"{LOSS_PARAMS}.disc_start", kind=int),
        "weight": get_first(settings, f"{LOSS_PARAMS}.disc_weight", kind=(int, float)),
    }
    return {key: value for key, value in options.items() if value is not None}


def quantizer(settings: DictConfig) -> dict[str, Any]:
    """vqf's options of a Gumbel quantizer."""
    schedule = "model.params.temperature_scheduler_config.params"
    options = {
        "kl_weight": get_first(settings, "model.params.kl_weight", kind=float),
        "temperature_start": get_first(settings, f"{schedule}.lr_max", f"{schedule}.lr_start", kind=(int, float)),
        "temperature_end": get_first(settings, f"{schedule}.lr_min", kind=(int, float)),
        "anneal_steps": get_first(settings, f"{schedule}.max_decay_steps", kind=int),
    }
    return {key: value for key, value in options.items() if value is not None}


def prior(settings: DictConfig) -> dict[str, Any]:
    """vqf's GPT options: heads, pkeep, dropout.

    Raises:
        UserError: If the dropout rates differ.
    """
    options: dict[str, Any] = {}
    if (heads := get_first(settings, f"{TRANSFORMER_PARAMS}.n_head", kind=int)) is not None:
        options["heads"] = heads
    if (pkeep := get_first(settings, "model.params.pkeep", kind=(int, float))) is not None:
        options["pkeep"] = float(pkeep)
    rates = {
        float(get_first(settings, f"{TRANSFORMER_PARAMS}.{each}", kind=(int, float)) or 0) for each in DROPOUT_KEYS
    }
    if len(rates) > 1:
        raise UserError(f"dropout rates {sorted(rates)} of embeddings, residuals and attention differ: not supported")
    return {**options, "dropout": rates.pop()}


def num_classes(settings: DictConfig) -> int | None:
    """Number of classes of a prior's condition."""
    return get_first(settings, f"{CONDITION_CONFIG}.params.n_classes", kind=int)


def condition_size(settings: DictConfig) -> int | None:
    """Side to which a condition map is resized; None keeps its size."""
    size = get_first(settings, "model.params.downsample_cond_size", kind=int)
    return size if size is not None and size > 0 else None


def start_token(settings: DictConfig) -> int:
    """Start token of an unconditional prior."""
    return get_first(settings, "model.params.sos_token", kind=int) or 0


def num_norm_groups(settings: DictConfig) -> int:
    """Number of norm groups."""
    return get_first(settings, "norm_num_groups", kind=int) or 32


def get_first(settings: DictConfig, *keys: str, kind: type | Sequence[type]) -> Any:
    """First value of type `kind` at one of the dotted keys, unresolved, or None."""
    kinds = kind if isinstance(kind, type) else tuple(kind)
    plain = OmegaConf.to_container(settings, resolve=False)
    for key in keys:
        value: Any = plain
        for name in key.split("."):
            value = value.get(name) if isinstance(value, dict) else None
        if isinstance(value, kinds) and not isinstance(value, bool):
            return value
    return None


def check_activation(settings: DictConfig) -> None:
    """Refuse another activation or normalization than vqf's.

    Raises:
        UserError: Naming the setting.
    """
    for key, known in (("act_fn", ("silu", "swish")), ("norm_type", ("group",))):
        value = get_first(settings, key, kind=str)
        if value is not None and value not in known:
            raise UserError(f"{key}={value} in its settings, but vqf's encoder has {known[0]}")
