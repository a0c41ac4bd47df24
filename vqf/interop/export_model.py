"""A run of vqf's as a checkpoint of another project: the tables of `layouts`, read the other way."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vqf.errors import UserError
from vqf.interop import infer_config
from vqf.interop.infer_config import Node
from vqf.interop.key_mapping import KeyMapping, KeyRule, to_linear
from vqf.interop.key_tables import (
    CAUSAL_MASK_KEY,
    DISCRIMINATOR_RULES,
    EXPORT_QUANTIZER_RULES,
    GPT_RULES,
    LAYOUTS,
    CheckpointLayout,
)
from vqf.interop.meta_models import Weights, shapes_of
from vqf.models.tokenizer import Tokenizer

TAMING_NORM_GROUPS = 32  # of taming-transformers' group norms, whatever the width
# Only training needs them.
TRAINING_ONLY_KEYS = (
    *("quantizer.N", "quantizer.m", "quantizer.initialized", "quantizer.updates", "quantizer.steps"),
    *("quantizer.revival.N", "quantizer.revival.initialized"),
)


@dataclass
class ExportedModel:
    """Tensors by another project's names, the settings of a model that they fit, and what to say about them."""

    tensors: Weights
    settings: dict[str, Any]
    key_mapping: dict[str, str] = field(default_factory=dict)  # from vqf's names to theirs
    notes: list[str] = field(default_factory=list)


def write_tokenizer(tokenizer: Tokenizer, quantizer: str, layout: CheckpointLayout) -> ExportedModel:
    """Write a tokenizer by another project's names.

    Args:
        tokenizer: To write.
        quantizer: The name of its quantizer.
        layout: Of the other project.

    Raises:
        UserError: If that project has no such tokenizer.
    """
    if quantizer not in EXPORT_QUANTIZER_RULES or (quantizer == "gumbel" and layout.name != "taming"):
        raise UserError(f"model.quantizer={quantizer}: {layout.name} has no such quantizer")
    weights = {name: each.detach().cpu() for name, each in tokenizer.state_dict().items()}
    notes = []
    if quantizer == "cosine":
        weights["quantizer.codebook.weight"] = F.normalize(weights["quantizer.codebook.weight"], dim=1)
        notes.append("codes are written at length 1, where the nearest one is the one of the smallest angle")
    if held := [name for name in TRAINING_ONLY_KEYS if weights.pop(name, None) is not None]:
        notes.append(f"left out, since only training needs them: {', '.join(held)}")
    tensors, names = _translate(weights, [*layout.rules, *EXPORT_QUANTIZER_RULES[quantizer]], layout.name)
    network = _network(weights, min(tokenizer.image_size))
    make = _taming_settings if layout.name == "taming" else _diffusers_settings
    return ExportedModel(tensors, make(tokenizer, quantizer, network), names, notes)


def write_discriminator(weights: Mapping[str, Tensor]) -> ExportedModel:
    """Write a PatchGAN with batch norm by taming-transformers' names."""
    tensors, names = _translate(weights, DISCRIMINATOR_RULES, "taming")
    return ExportedModel(tensors, {}, names)


def write_prior(prior: nn.Module, node: Mapping[str, Any], unmasked: int) -> ExportedModel:
    """Write a GPT by taming-transformers' names, causal masks included.

    Raises:
        UserError: If it is another kind of prior, or embeds its condition by a table of its own.
    """
    if node["name"] != "gpt" or not node.get("shared_vocabulary"):
        raise UserError("to=taming: of priors only model/prior=gpt with shared_vocabulary=true has a place there")
    weights = {name: each.detach().cpu() for name, each in prior.state_dict().items()}
    tensors, names = _translate(weights, GPT_RULES, "taming")
    rows, layers = tensors["pos_emb"].shape[1], infer_config.count_blocks(weights, "blocks")
    mask = torch.ones(rows, rows).tril()
    mask[:unmasked, :unmasked] = 1
    tensors |= {CAUSAL_MASK_KEY.replace("{i}", str(i)): mask[None, None].clone() for i in range(layers)}
    rate = node.get("dropout", 0.0)
    settings = {
        "vocab_size": tensors["tok_emb.weight"].shape[0],
        "block_size": rows,
        "n_layer": layers,
        "n_head": node["heads"],
        "n_embd": tensors["tok_emb.weight"].shape[1],
        "n_unmasked": unmasked,
        **dict.fromkeys(("embd_pdrop", "resid_pdrop", "attn_pdrop"), rate),
    }
    return ExportedModel(tensors, {"target": "taming.modules.transformer.mingpt.GPT", "params": settings}, names)


def _translate(weights: Mapping[str, Tensor], rules: Iterable[KeyRule], layout: str) -> tuple[Weights, dict[str, str]]:
    table = KeyMapping.for_export(list(rules), weights)
    tensors, names = {}, {}
    for name, tensor in weights.items():
        found = table.to_source(name)
        if found is None:
            raise UserError(
                f"to={layout}: there is no place for '{name}'; only model/encoder=conv, patch_size=1 has one"
            )
        names[name], rule = found
        tensors[names[name]] = to_linear(tensor, rule).contiguous()
    return tensors, names


def _network(weights: Weights, nominal: int) -> Node:
    """Describe the one network that both halves have to be."""
    encoder = infer_config.encoder_node(shapes_of(weights), nominal)
    decoder = infer_config.decoder_node(shapes_of(weights), nominal)
    for key, value in decoder.items():
        if encoder[key] != value:
            raise UserError(
                f"model.encoder.{key}={encoder[key]} and model.decoder.{key}={value} must be the same there"
            )
    return encoder


def _taming_settings(tokenizer: Tokenizer, quantizer: str, network: Node) -> dict[str, Any]:
    _check_groups(tokenizer, {TAMING_NORM_GROUPS}, "taming")
    ddconfig = {
        "double_z": False,
        "z_channels": network["dim"],
        "resolution": min(tokenizer.image_size),
        "in_channels": tokenizer.channels,
        "out_ch": tokenizer.channels,
        "ch": network["channels"],
        "ch_mult": network["multipliers"],
        "num_res_blocks": network["blocks"],
        "attn_resolutions": network["attention"],
        "dropout": 0.0,
    }
    if not network["middle_attention"]:  # which only latent-diffusion's class can leave out
        ddconfig["attn_type"] = "none"
    params = {
        "embed_dim": tokenizer.quantizer.dim,
        "n_embed": tokenizer.vocab_size,
        "ddconfig": ddconfig,
        "lossconfig": {"target": "taming.modules.losses.vqperceptual.DummyLoss"},
    }
    if quantizer == "gumbel":
        params |= _gumbel_schedule(tokenizer.quantizer)
    name = "GumbelVQ" if quantizer == "gumbel" else "VQModel"
    module = "taming.models.vqgan" if network["middle_attention"] else "ldm.models.autoencoder"
    return {"target": f"{module}.{name}", "params": params}


def _gumbel_schedule(quantizer: Any) -> dict[str, Any]:
    schedule = {
        "verbosity_interval": 0,
        "warm_up_steps": 0,
        "max_decay_steps": max(quantizer.anneal_steps, 1),
        "lr_start": quantizer.temperature_start,
        "lr_max": quantizer.temperature_start,
        "lr_min": quantizer.temperature_end,
    }
    scheduler = {"target": "taming.lr_scheduler.LambdaWarmUpCosineScheduler", "params": schedule}
    return {"kl_weight": quantizer.kl_weight, "temperature_scheduler_config": scheduler}


def _diffusers_settings(tokenizer: Tokenizer, quantizer: str, network: Node) -> dict[str, Any]:
    size, levels = min(tokenizer.image_size), range(len(network["multipliers"]))
    attends = [size // 2**i in network["attention"] for i in levels]
    (groups,) = _check_groups(tokenizer, None, "diffusers")
    return {
        "_class_name": "VQModel",
        "act_fn": "silu",
        "in_channels": tokenizer.channels,
        "out_channels": tokenizer.channels,
        "block_out_channels": [network["channels"] * each for each in network["multipliers"]],
        "down_block_types": [f"{'Attn' * each}DownEncoderBlock2D" for each in attends],
        "up_block_types": [f"{'Attn' * each}UpDecoderBlock2D" for each in reversed(attends)],
        "layers_per_block": network["blocks"],
        "latent_channels": network["dim"],
        "mid_block_add_attention": network["middle_attention"],
        "norm_num_groups": groups,
        "norm_type": "group",
        "num_vq_embeddings": tokenizer.vocab_size,
        "sample_size": size,
        "vq_embed_dim": tokenizer.quantizer.dim,
    }


def _check_groups(tokenizer: Tokenizer, wanted: set[int] | None, layout: str) -> set[int]:
    found = {each.num_groups for each in tokenizer.modules() if isinstance(each, nn.GroupNorm)}
    if len(found) != 1 or (wanted is not None and found != wanted):
        raise UserError(
            f"to={layout}: group norms of {sorted(found)} groups; widths must be multiples of {TAMING_NORM_GROUPS}"
        )
    return found


EXPORT_LAYOUTS = {name: LAYOUTS[name] for name in ("taming", "diffusers")}
