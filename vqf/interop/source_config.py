"""What the tensors of a checkpoint do not tell, as the yaml or json beside it does."""

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
    """Return the side of the images that a tokenizer was made for, in pixels."""
    size = get_first(settings, f"{DDCONFIG}.resolution", f"{FIRST_STAGE_DDCONFIG}.resolution", "sample_size", kind=int)
    patches = get_first(settings, "num_patches", "vq_config.num_patches", kind=int)
    return size or (patches * stride if patches else None)


def adversary(settings: DictConfig) -> dict[str, Any]:
    """Return the options of the adversary that a lossconfig sets."""
    loss = get_first(settings, f"{LOSS_PARAMS}.disc_loss", kind=str)
    found = {
        "name": loss if loss in ("hinge", "vanilla") else None,
        "start": get_first(settings, f"{LOSS_PARAMS}.disc_start", kind=int),
        "weight": get_first(settings, f"{LOSS_PARAMS}.disc_weight", kind=(int, float)),
    }
    return {key: value for key, value in found.items() if value is not None}


def quantizer(settings: DictConfig) -> dict[str, Any]:
    """Return what a yaml says of a Gumbel quantizer."""
    schedule = "model.params.temperature_scheduler_config.params"
    found = {
        "kl_weight": get_first(settings, "model.params.kl_weight", kind=float),
        "temperature_start": get_first(settings, f"{schedule}.lr_max", f"{schedule}.lr_start", kind=(int, float)),
        "temperature_end": get_first(settings, f"{schedule}.lr_min", kind=(int, float)),
        "anneal_steps": get_first(settings, f"{schedule}.max_decay_steps", kind=int),
    }
    return {key: value for key, value in found.items() if value is not None}


def prior(settings: DictConfig) -> dict[str, Any]:
    """Return what a yaml says of a transformer beyond its sizes."""
    found: dict[str, Any] = {}
    if (heads := get_first(settings, f"{TRANSFORMER_PARAMS}.n_head", kind=int)) is not None:
        found["heads"] = heads
    if (pkeep := get_first(settings, "model.params.pkeep", kind=(int, float))) is not None:
        found["pkeep"] = float(pkeep)
    rates = {
        float(get_first(settings, f"{TRANSFORMER_PARAMS}.{each}", kind=(int, float)) or 0) for each in DROPOUT_KEYS
    }
    if len(rates) > 1:
        raise UserError(f"dropouts {sorted(rates)} differ between embeddings, residuals and attention: not supported")
    return {**found, "dropout": rates.pop()}


def num_classes(settings: DictConfig) -> int | None:
    """Return the number of classes that a prior is conditioned on."""
    return get_first(settings, f"{CONDITION_CONFIG}.params.n_classes", kind=int)


def condition_size(settings: DictConfig) -> int | None:
    """Return the size that the image of a condition is brought to before it is encoded; None: it keeps its own."""
    size = get_first(settings, "model.params.downsample_cond_size", kind=int)
    return size if size is not None and size > 0 else None


def start_token(settings: DictConfig) -> int:
    """Return the token that an unconditional prior starts from."""
    return get_first(settings, "model.params.sos_token", kind=int) or 0


def num_norm_groups(settings: DictConfig) -> int:
    """Return the number of groups of the group norms."""
    return get_first(settings, "norm_num_groups", kind=int) or 32


def get_first(settings: DictConfig, *places: str, kind: type | Sequence[type]) -> Any:
    """Return the value at the first place that holds one of a kind; nothing in the file is resolved or run."""
    kinds = kind if isinstance(kind, type) else tuple(kind)
    plain = OmegaConf.to_container(settings, resolve=False)
    for place in places:
        value: Any = plain
        for key in place.split("."):
            value = value.get(key) if isinstance(value, dict) else None
        if isinstance(value, kinds) and not isinstance(value, bool):
            return value
    return None


def check_activation(settings: DictConfig) -> None:
    """Refuse a model of diffusers that computes something else with the same weights.

    Raises:
        UserError: Naming the setting.
    """
    for key, known in (("act_fn", ("silu", "swish")), ("norm_type", ("group",))):
        told = get_first(settings, key, kind=str)
        if told is not None and told not in known:
            raise UserError(f"{key}={told} in its settings: vqf's encoder has {known[0]}")
