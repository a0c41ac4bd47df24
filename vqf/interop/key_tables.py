"""Tables of tensor names, for import and export.

`{i}` is a level counted from full resolution, `{-i}` one counted from the lowest.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from vqf.interop.key_mapping import MIDDLE_ATTENTION, KeyRule

CONV_RULES = (
    KeyRule("{part}.conv_in.{*}", "{part}.conv_in.{*}"),
    KeyRule("encoder.conv_out.{*}", "encoder.conv_out.{*}"),
    KeyRule("decoder.conv_out.{*}", "decoder.last_layer.{*}"),
    KeyRule("quant_conv.{*}", "quant_conv.{*}"),
    KeyRule("post_quant_conv.{*}", "post_quant_conv.{*}"),
)
NORM_RULES = (KeyRule("{part}.norm_out.{*}", "{part}.norm_out.{*}"),)


def _level_rules(source: str, vqf: str, block: str, resample: str) -> tuple[KeyRule, ...]:
    return (
        KeyRule(f"{source}.{block}.{{j}}.nin_shortcut.{{*}}", f"{vqf}.block.{{j}}.shortcut.{{*}}"),
        KeyRule(f"{source}.{block}.{{j}}.{{*}}", f"{vqf}.block.{{j}}.{{*}}"),
        KeyRule(f"{source}.attn.{{j}}.{{*}}", f"{vqf}.attn.{{j}}.{{*}}"),
        KeyRule(f"{source}.{resample}.conv.{{*}}", f"{vqf}.resample.conv.{{*}}"),
    )


MIDDLE_RULES = (
    KeyRule("{part}.mid.block_1.{*}", "{part}.mid.0.{*}"),
    KeyRule("{part}.mid.block_2.{*}", "{part}.mid.{last}.{*}"),
    KeyRule("{part}.mid.attn_1.{*}", MIDDLE_ATTENTION + "{*}"),
)
DOWN_RULES = _level_rules("encoder.down.{i}", "encoder.down.{i}", "block", "downsample")
TAMING_RULES = (
    *CONV_RULES,
    *NORM_RULES,
    *MIDDLE_RULES,
    *DOWN_RULES,
    *_level_rules("decoder.up.{i}", "decoder.up.{i}", "block", "upsample"),
)
JANUS_RULES = (
    *CONV_RULES,
    *NORM_RULES,
    *MIDDLE_RULES,
    *DOWN_RULES,
    *_level_rules("decoder.up.{-i}", "decoder.up.{i}", "block", "upsample"),
)
LLAMAGEN_RULES = (
    *CONV_RULES,
    *NORM_RULES,
    KeyRule("{part}.mid.{j}.{*}", "{part}.mid.{j}.{*}"),
    *_level_rules("encoder.conv_blocks.{i}", "encoder.down.{i}", "res", "downsample"),
    *_level_rules("decoder.conv_blocks.{-i}", "decoder.up.{i}", "res", "upsample"),
)


def _attention_rules(source: str, vqf: str) -> tuple[KeyRule, ...]:
    return (
        KeyRule(f"{source}.group_norm.{{*}}", f"{vqf}.norm.{{*}}"),
        KeyRule(f"{source}.to_{{qkv}}.{{*}}", f"{vqf}.{{qkv}}.{{*}}", is_linear=True),
        KeyRule(f"{source}.to_out.0.{{*}}", f"{vqf}.proj_out.{{*}}", is_linear=True),
        KeyRule(f"{source}.query.{{*}}", f"{vqf}.q.{{*}}", is_linear=True),
        KeyRule(f"{source}.key.{{*}}", f"{vqf}.k.{{*}}", is_linear=True),
        KeyRule(f"{source}.value.{{*}}", f"{vqf}.v.{{*}}", is_linear=True),
        KeyRule(f"{source}.proj_attn.{{*}}", f"{vqf}.proj_out.{{*}}", is_linear=True),
    )


def _side_rules(source: str, vqf: str, resample: str) -> tuple[KeyRule, ...]:
    return (
        KeyRule(f"{source}.resnets.{{j}}.conv_shortcut.{{*}}", f"{vqf}.block.{{j}}.shortcut.{{*}}"),
        KeyRule(f"{source}.resnets.{{j}}.{{*}}", f"{vqf}.block.{{j}}.{{*}}"),
        *_attention_rules(f"{source}.attentions.{{j}}", f"{vqf}.attn.{{j}}"),
        KeyRule(f"{source}.{resample}.0.conv.{{*}}", f"{vqf}.resample.conv.{{*}}"),
    )


DIFFUSERS_RULES = (
    *CONV_RULES,
    KeyRule("{part}.conv_norm_out.{*}", "{part}.norm_out.{*}"),
    KeyRule("{part}.mid_block.resnets.0.{*}", "{part}.mid.0.{*}"),
    KeyRule("{part}.mid_block.resnets.1.{*}", "{part}.mid.{last}.{*}"),
    *_attention_rules("{part}.mid_block.attentions.0", MIDDLE_ATTENTION.rstrip(".")),
    *_side_rules("encoder.down_blocks.{i}", "encoder.down.{i}", "downsamplers"),
    *_side_rules("decoder.up_blocks.{-i}", "decoder.up.{i}", "upsamplers"),
)

EMBEDDING_RULES = (KeyRule("quantize.embedding.weight", "quantizer.codebook.weight"),)
GUMBEL_RULES = (
    KeyRule("quantize.proj.{*}", "quantizer.proj.{*}"),
    KeyRule("quantize.embed.weight", "quantizer.codebook.weight"),
)
# How each quantizer of vqf is exported; its averages and counters have no counterpart there.
EXPORT_QUANTIZER_RULES: Mapping[str, Sequence[KeyRule]] = {
    "vq": EMBEDDING_RULES,
    "rotation": EMBEDDING_RULES,
    "cosine": EMBEDDING_RULES,
    "ema": (KeyRule("quantize.embedding.weight", "quantizer.codebook"),),
    "gumbel": GUMBEL_RULES,
}

DISCRIMINATOR_RULES = (KeyRule("loss.discriminator.{*}", "discriminator.{*}"),)
GPT_RULES = (
    KeyRule("tok_emb.weight", "token_embedding.weight"),
    KeyRule("pos_emb", "position_embedding"),
    KeyRule("blocks.{i}.ln1.{*}", "blocks.{i}.norm1.{*}"),
    KeyRule("blocks.{i}.ln2.{*}", "blocks.{i}.norm2.{*}"),
    KeyRule("blocks.{i}.attn.{*}", "blocks.{i}.attention.{*}"),
    KeyRule("blocks.{i}.mlp.{*}", "blocks.{i}.mlp.{*}"),
    KeyRule("ln_f.{*}", "norm.{*}"),
    KeyRule("head.weight", "head.weight"),
)
CAUSAL_MASK_KEY = "blocks.{i}.attn.mask"

# Tensors in files that are not weights of a model vqf loads, and why they are skipped.
IGNORED_KEYS = (
    ("loss.perceptual_loss.scaling_layer.{*}", "LPIPS: scaling of its input"),
    ("loss.perceptual_loss.net.{*}", "LPIPS: VGG16"),
    ("loss.perceptual_loss.{*}", "LPIPS: calibrated heads"),
    ("loss.{*}", "part of a training loss"),
    ("quantize.codebook_used", "record of recently used codes"),
    ("quantize.used", "list of codes in use; vqf numbers all codes"),
    ("colorize", "random colors of label maps"),
    ("model_ema.decay", "bookkeeping of the EMA"),
    ("model_ema.num_updates", "bookkeeping of the EMA"),
    ("model_ema.loss{*}", "EMA of the loss"),
    ("model_ema.{*}", "EMA of weights that are skipped"),
    ("cond_stage_model.{*}", "part of the conditioner"),
    ("permuter.{*}", "order of the tokens: row by row"),
    ("model.diffusion_model.{*}", "part of a diffusion model"),
)


@dataclass(frozen=True)
class CheckpointLayout:
    """Tensor names of a tokenizer in one project.

    Args:
        marker: Part of a tensor name in all files of this layout and none of those before it in `LAYOUTS`.
    """

    name: str
    marker: str
    rules: Sequence[KeyRule]
    quantizers: Mapping[str, Sequence[KeyRule]]


TAMING_QUANTIZERS = {"vq": EMBEDDING_RULES, "gumbel": GUMBEL_RULES}
LAYOUTS = {
    each.name: each
    for each in (
        CheckpointLayout("diffusers", "encoder.down_blocks.0.", DIFFUSERS_RULES, {"vq": EMBEDDING_RULES}),
        CheckpointLayout("llamagen", "encoder.conv_blocks.0.", LLAMAGEN_RULES, {"cosine": EMBEDDING_RULES}),
        CheckpointLayout("janus", "decoder.up.0.upsample.", JANUS_RULES, {"cosine": EMBEDDING_RULES}),
        CheckpointLayout("ldm", "model_ema.encoder", TAMING_RULES, TAMING_QUANTIZERS),
        CheckpointLayout("taming", "encoder.down.0.", TAMING_RULES, TAMING_QUANTIZERS),
    )
}
