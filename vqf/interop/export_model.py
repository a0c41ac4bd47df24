"""Exports models to other projects."""

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

TAMING_NORM_GROUPS = 32  # fixed in taming-transformers
# State that only training needs; it is not exported.
TRAINING_ONLY_KEYS = (
    *("quantizer.N", "quantizer.m", "quantizer.initialized", "quantizer.updates", "quantizer.steps"),
    *("quantizer.revival.N", "quantizer.revival.initialized"),
)


@dataclass
class ExportedModel:
    """Tensors and config of another project."""

    tensors: Weights
    settings: dict[str, Any]
    key_mapping: dict[str, str] = field(default_factory=dict)  # exported name of each vqf name
    notes: list[str] = field(default_factory=list)  # for the log


def write_tokenizer(tokenizer: Tokenizer, quantizer: str, layout: CheckpointLayout) -> ExportedModel:
    """Export a tokenizer whose quantizer is registered as `quantizer`.

    Raises:
        UserError: If the other project cannot express it.
    """
    if quantizer not in EXPORT_QUANTIZER_RULES or (quantizer == "gumbel" and layout.name != "taming"):
        raise UserError(f"model.quantizer={quantizer}: {layout.name} has no such quantizer")
    weights = {name: each.detach().cpu() for name, each in tokenizer.state_dict().items()}
    notes = []
    if quantizer == "cosine":
        weights["quantizer.codebook.weight"] = F.normalize(weights["quantizer.codebook.weight"], dim=1)
        notes.append("code vectors are written with norm 1: there the nearest is the one with the smallest angle")
    if dropped := [name for name in TRAINING_ONLY_KEYS if weights.pop(name, None) is not None]:
        notes.append(f"not exported, since only training needs them: {', '.join(dropped)}")
    tensors, names = _translate(weights, [*layout.rules, *EXPORT_QUANTIZER_RULES[quantizer]], layout.name)
    network = _shared_node(weights, min(tokenizer.image_size))
    make = _taming_settings if layout.name == "taming" else _diffusers_settings
    return ExportedModel(tensors, make(tokenizer, quantizer, network), names, notes)


def write_discriminator(weights: Mapping[str, Tensor]) -> ExportedModel:
    """Export a PatchGAN with batch norm to taming-transformers."""
    tensors, names = _translate(weights, DISCRIMINATOR_RULES, "taming")
    return ExportedModel(tensors, {}, names)


def write_prior(prior: nn.Module, node: Mapping[str, Any], unmasked: int) -> ExportedModel:
    """Export a GPT to taming-transformers.

    Args:
        unmasked: Condition tokens that see each other in both directions.

    Raises:
        UserError: If it is another prior, or embeds its condition by a table of its own.
    """
    if node["name"] != "gpt" or not node.get("shared_vocabulary"):
        raise UserError("to=taming: can only export the prior model/prior=gpt with shared_vocabulary=true")
    weights = {name: each.detach().cpu() for name, each in prior.state_dict().items()}
    tensors, names = _translate(weights, GPT_RULES, "taming")
    rows, layers = tensors["pos_emb"].shape[1], infer_config.count_blocks(weights, "blocks")
    mask = torch.ones(rows, rows).tril()
    mask[:unmasked, :unmasked] = 1
    tensors |= {CAUSAL_MASK_KEY.replace("{i}", str(i)): mask[None, None].clone() for i in range(layers)}
    dropout = node.get("dropout", 0.0)
    settings = {
        "vocab_size": tensors["tok_emb.weight"].shape[0],
        "block_size": rows,
        "n_layer": layers,
        "n_head": node["heads"],
        "n_embd": tensors["tok_emb.weight"].shape[1],
        "n_unmasked": unmasked,
        **dict.fromkeys(("embd_pdrop", "resid_pdrop", "attn_pdrop"), dropout),
    }
    return ExportedModel(tensors, {"target": "taming.modules.transformer.mingpt.GPT", "params": settings}, names)


def _translate(weights: Mapping[str, Tensor], rules: Iterable[KeyRule], layout: str) -> tuple[Weights, dict[str, str]]:
    table = KeyMapping.for_export(list(rules), weights)
    tensors, names = {}, {}
    for name, tensor in weights.items():
        translation = table.to_source(name)
        if translation is None:
            raise UserError(
                f"to={layout}: cannot export '{name}'; only model/encoder=conv with patch_size=1 can be exported"
            )
        names[name], rule = translation
        tensors[names[name]] = to_linear(tensor, rule).contiguous()
    return tensors, names


def _shared_node(weights: Weights, image_size: int) -> Node:
    """Encoder and decoder must have the same sizes."""
    encoder = infer_config.encoder_node(shapes_of(weights), image_size)
    decoder = infer_config.decoder_node(shapes_of(weights), image_size)
    for key, value in decoder.items():
        if encoder[key] != value:
            raise UserError(f"model.encoder.{key}={encoder[key]} and model.decoder.{key}={value} must be equal")
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
    if not network["middle_attention"]:  # only latent-diffusion's class can leave it out
        ddconfig["attn_type"] = "none"
    params = {
        "embed_dim": tokenizer.quantizer.dim,
        "n_embed": tokenizer.layout.vocab_size,
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
        "num_vq_embeddings": tokenizer.layout.vocab_size,
        "sample_size": size,
        "vq_embed_dim": tokenizer.quantizer.dim,
    }


def _check_groups(tokenizer: Tokenizer, allowed: set[int] | None, layout: str) -> set[int]:
    groups = {each.num_groups for each in tokenizer.modules() if isinstance(each, nn.GroupNorm)}
    if len(groups) != 1 or (allowed is not None and groups != allowed):
        raise UserError(
            f"to={layout}: group norms of {sorted(groups)} groups; widths must be multiples of {TAMING_NORM_GROUPS}"
        )
    return groups


EXPORT_LAYOUTS = {name: LAYOUTS[name] for name in ("taming", "diffusers")}
