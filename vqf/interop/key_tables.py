"""Which name of which project is which name of vqf's: tables, and nothing but tables.

Every table is read both ways, for import and for export. `{i}` is a level counted from full resolution; where a
project stores its decoder in the order it runs, `{-i}` says so.
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


def _level_rules(theirs: str, ours: str, block: str, resample: str) -> tuple[KeyRule, ...]:
    """Return the rules of one side's levels, whose attention is stored as vqf stores it."""
    return (
        KeyRule(f"{theirs}.{block}.{{j}}.nin_shortcut.{{*}}", f"{ours}.block.{{j}}.shortcut.{{*}}"),
        KeyRule(f"{theirs}.{block}.{{j}}.{{*}}", f"{ours}.block.{{j}}.{{*}}"),
        KeyRule(f"{theirs}.attn.{{j}}.{{*}}", f"{ours}.attn.{{j}}.{{*}}"),
        KeyRule(f"{theirs}.{resample}.conv.{{*}}", f"{ours}.resample.conv.{{*}}"),
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


def _attention_rules(theirs: str, ours: str) -> tuple[KeyRule, ...]:
    """Return the rules of an attention block of diffusers, today's names first, those of before 0.13 behind."""
    return (
        KeyRule(f"{theirs}.group_norm.{{*}}", f"{ours}.norm.{{*}}"),
        KeyRule(f"{theirs}.to_{{qkv}}.{{*}}", f"{ours}.{{qkv}}.{{*}}", is_linear=True),
        KeyRule(f"{theirs}.to_out.0.{{*}}", f"{ours}.proj_out.{{*}}", is_linear=True),
        KeyRule(f"{theirs}.query.{{*}}", f"{ours}.q.{{*}}", is_linear=True),
        KeyRule(f"{theirs}.key.{{*}}", f"{ours}.k.{{*}}", is_linear=True),
        KeyRule(f"{theirs}.value.{{*}}", f"{ours}.v.{{*}}", is_linear=True),
        KeyRule(f"{theirs}.proj_attn.{{*}}", f"{ours}.proj_out.{{*}}", is_linear=True),
    )


def _side_rules(theirs: str, ours: str, resample: str) -> tuple[KeyRule, ...]:
    return (
        KeyRule(f"{theirs}.resnets.{{j}}.conv_shortcut.{{*}}", f"{ours}.block.{{j}}.shortcut.{{*}}"),
        KeyRule(f"{theirs}.resnets.{{j}}.{{*}}", f"{ours}.block.{{j}}.{{*}}"),
        *_attention_rules(f"{theirs}.attentions.{{j}}", f"{ours}.attn.{{j}}"),
        KeyRule(f"{theirs}.{resample}.0.conv.{{*}}", f"{ours}.resample.conv.{{*}}"),
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
# How each of vqf's quantizers is written; what it keeps beside its codes (averages, counters) has no place there.
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

# What files hold beside the weights of a model, and why it is not taken.
IGNORED_KEYS = (
    ("loss.perceptual_loss.scaling_layer.{*}", "LPIPS: scaling of its input"),
    ("loss.perceptual_loss.net.{*}", "LPIPS: VGG16"),
    ("loss.perceptual_loss.{*}", "LPIPS: calibrated heads"),
    ("loss.{*}", "of a training loss"),
    ("quantize.codebook_used", "record of the codes used last"),
    ("quantize.used", "list of codes in use; vqf numbers all codes"),
    ("colorize", "random colours of label maps"),
    ("model_ema.decay", "of the average of the weights"),
    ("model_ema.num_updates", "of the average of the weights"),
    ("model_ema.loss{*}", "average of weights of the loss"),
    ("model_ema.{*}", "average of weights that are not taken"),
    ("cond_stage_model.{*}", "of the condition"),
    ("permuter.{*}", "order of the tokens: row by row"),
    ("model.diffusion_model.{*}", "a diffusion model"),
)


@dataclass(frozen=True)
class CheckpointLayout:
    """How one project writes a tokenizer.

    Args:
        name: What `source=` calls it.
        marker: A piece of a name that all of its files have and none of the layouts before it in `LAYOUTS`.
        rules: Of encoder and decoder.
        quantizers: The quantizers of vqf that its codebook may be, with the rules of each.
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
