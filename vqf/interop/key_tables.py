"""Which name of which project is which name of vqf's: tables, and nothing but tables.

Every table is read both ways, for import and for export. `{i}` is a level counted from full resolution; where a
project stores its decoder in the order it runs, `{-i}` says so.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from vqf.interop.key_mapping import ATTENDING, Rule

ENDS = (
    Rule("{part}.conv_in.{*}", "{part}.conv_in.{*}"),
    Rule("encoder.conv_out.{*}", "encoder.conv_out.{*}"),
    Rule("decoder.conv_out.{*}", "decoder.last_layer.{*}"),
    Rule("quant_conv.{*}", "quant_conv.{*}"),
    Rule("post_quant_conv.{*}", "post_quant_conv.{*}"),
)
NORMS = (Rule("{part}.norm_out.{*}", "{part}.norm_out.{*}"),)


def _levels(theirs: str, ours: str, block: str, resample: str) -> tuple[Rule, ...]:
    """Return the rules of one side's levels, whose attention is stored as vqf stores it."""
    return (
        Rule(f"{theirs}.{block}.{{j}}.nin_shortcut.{{*}}", f"{ours}.block.{{j}}.shortcut.{{*}}"),
        Rule(f"{theirs}.{block}.{{j}}.{{*}}", f"{ours}.block.{{j}}.{{*}}"),
        Rule(f"{theirs}.attn.{{j}}.{{*}}", f"{ours}.attn.{{j}}.{{*}}"),
        Rule(f"{theirs}.{resample}.conv.{{*}}", f"{ours}.resample.conv.{{*}}"),
    )


MIDDLE = (
    Rule("{part}.mid.block_1.{*}", "{part}.mid.0.{*}"),
    Rule("{part}.mid.block_2.{*}", "{part}.mid.{last}.{*}"),
    Rule("{part}.mid.attn_1.{*}", ATTENDING + "{*}"),
)
DOWN = _levels("encoder.down.{i}", "encoder.down.{i}", "block", "downsample")
TAMING = (*ENDS, *NORMS, *MIDDLE, *DOWN, *_levels("decoder.up.{i}", "decoder.up.{i}", "block", "upsample"))
JANUS = (*ENDS, *NORMS, *MIDDLE, *DOWN, *_levels("decoder.up.{-i}", "decoder.up.{i}", "block", "upsample"))
LLAMAGEN = (
    *ENDS,
    *NORMS,
    Rule("{part}.mid.{j}.{*}", "{part}.mid.{j}.{*}"),
    *_levels("encoder.conv_blocks.{i}", "encoder.down.{i}", "res", "downsample"),
    *_levels("decoder.conv_blocks.{-i}", "decoder.up.{i}", "res", "upsample"),
)


def _attention(theirs: str, ours: str) -> tuple[Rule, ...]:
    """Return the rules of an attention block of diffusers, today's names first, those of before 0.13 behind."""
    return (
        Rule(f"{theirs}.group_norm.{{*}}", f"{ours}.norm.{{*}}"),
        Rule(f"{theirs}.to_{{qkv}}.{{*}}", f"{ours}.{{qkv}}.{{*}}", matrix=True),
        Rule(f"{theirs}.to_out.0.{{*}}", f"{ours}.proj_out.{{*}}", matrix=True),
        Rule(f"{theirs}.query.{{*}}", f"{ours}.q.{{*}}", matrix=True),
        Rule(f"{theirs}.key.{{*}}", f"{ours}.k.{{*}}", matrix=True),
        Rule(f"{theirs}.value.{{*}}", f"{ours}.v.{{*}}", matrix=True),
        Rule(f"{theirs}.proj_attn.{{*}}", f"{ours}.proj_out.{{*}}", matrix=True),
    )


def _side(theirs: str, ours: str, resample: str) -> tuple[Rule, ...]:
    return (
        Rule(f"{theirs}.resnets.{{j}}.conv_shortcut.{{*}}", f"{ours}.block.{{j}}.shortcut.{{*}}"),
        Rule(f"{theirs}.resnets.{{j}}.{{*}}", f"{ours}.block.{{j}}.{{*}}"),
        *_attention(f"{theirs}.attentions.{{j}}", f"{ours}.attn.{{j}}"),
        Rule(f"{theirs}.{resample}.0.conv.{{*}}", f"{ours}.resample.conv.{{*}}"),
    )


DIFFUSERS = (
    *ENDS,
    Rule("{part}.conv_norm_out.{*}", "{part}.norm_out.{*}"),
    Rule("{part}.mid_block.resnets.0.{*}", "{part}.mid.0.{*}"),
    Rule("{part}.mid_block.resnets.1.{*}", "{part}.mid.{last}.{*}"),
    *_attention("{part}.mid_block.attentions.0", ATTENDING.rstrip(".")),
    *_side("encoder.down_blocks.{i}", "encoder.down.{i}", "downsamplers"),
    *_side("decoder.up_blocks.{-i}", "decoder.up.{i}", "upsamplers"),
)

EMBEDDING = (Rule("quantize.embedding.weight", "quantizer.codebook.weight"),)
GUMBEL = (
    Rule("quantize.proj.{*}", "quantizer.proj.{*}"),
    Rule("quantize.embed.weight", "quantizer.codebook.weight"),
)
# How each of vqf's quantizers is written; what it keeps beside its codes (averages, counters) has no place there.
WRITTEN: Mapping[str, Sequence[Rule]] = {
    "vq": EMBEDDING,
    "rotation": EMBEDDING,
    "cosine": EMBEDDING,
    "ema": (Rule("quantize.embedding.weight", "quantizer.codebook"),),
    "gumbel": GUMBEL,
}

DISCRIMINATOR = (Rule("loss.discriminator.{*}", "discriminator.{*}"),)
GPT = (
    Rule("tok_emb.weight", "token_embedding.weight"),
    Rule("pos_emb", "position_embedding"),
    Rule("blocks.{i}.ln1.{*}", "blocks.{i}.norm1.{*}"),
    Rule("blocks.{i}.ln2.{*}", "blocks.{i}.norm2.{*}"),
    Rule("blocks.{i}.attn.{*}", "blocks.{i}.attention.{*}"),
    Rule("blocks.{i}.mlp.{*}", "blocks.{i}.mlp.{*}"),
    Rule("ln_f.{*}", "norm.{*}"),
    Rule("head.weight", "head.weight"),
)
MASK = "blocks.{i}.attn.mask"

# What files hold beside the weights of a model, and why it is not taken.
KNOWN = (
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
class Layout:
    """How one project writes a tokenizer.

    Args:
        name: What `source=` calls it.
        sign: A piece of a name that all of its files have and none of the layouts before it in `LAYOUTS`.
        rules: Of encoder and decoder.
        quantizers: The quantizers of vqf that its codebook may be, with the rules of each.
    """

    name: str
    sign: str
    rules: Sequence[Rule]
    quantizers: Mapping[str, Sequence[Rule]]


PLAIN = {"vq": EMBEDDING, "gumbel": GUMBEL}
LAYOUTS = {
    each.name: each
    for each in (
        Layout("diffusers", "encoder.down_blocks.0.", DIFFUSERS, {"vq": EMBEDDING}),
        Layout("llamagen", "encoder.conv_blocks.0.", LLAMAGEN, {"cosine": EMBEDDING}),
        Layout("janus", "decoder.up.0.upsample.", JANUS, {"cosine": EMBEDDING}),
        Layout("ldm", "model_ema.encoder", TAMING, PLAIN),
        Layout("taming", "encoder.down.0.", TAMING, PLAIN),
    )
}
