"""Which weight of a peer is which of vqf: an oracle of its own, written apart from `vqf.interop`."""

import re
from collections.abc import Mapping

from torch import Tensor

Rules = list[tuple[str, str]]

BLOCKS: Rules = [
    (r"\bmid\.block_1\b", "mid.0"),
    (r"\bmid\.attn_1\b", "mid.1"),
    (r"\bmid\.block_2\b", "mid.2"),
    (r"\b(down|up)sample\.conv\b", "resample.conv"),
    (r"\bnin_shortcut\b", "shortcut"),
    (r"^decoder\.conv_out\b", "decoder.last_layer"),
    (r"^quantize\.embedding\b", "quantizer.codebook"),
]
GPT: Rules = [
    (r"^tok_emb\b", "token_embedding"),
    (r"^pos_emb\b", "position_embedding"),
    (r"^ln_f\b", "norm"),
    (r"\bln([12])\b", r"norm\1"),
    (r"\battn\b", "attention"),
]
DIFFUSERS: Rules = [
    (r"\bdown_blocks\b", "down"),
    (r"\bup_blocks\b", "up"),
    (r"\bmid_block\.resnets\.0\b", "mid.0"),
    (r"\bmid_block\.attentions\.0\b", "mid.1"),
    (r"\bmid_block\.resnets\.1\b", "mid.2"),
    (r"\bresnets\b", "block"),
    (r"\battentions\b", "attn"),
    (r"\bgroup_norm\b", "norm"),
    (r"\bto_([qkv])\b", r"\1"),
    (r"\bto_out\.0\b", "proj_out"),
    (r"\bconv_shortcut\b", "shortcut"),
    (r"\b(down|up)samplers\.0\.conv\b", "resample.conv"),
    (r"\bconv_norm_out\b", "norm_out"),
    *BLOCKS[-2:],
]


def rename(tensors: Mapping[str, Tensor], rules: Rules) -> dict[str, Tensor]:
    """Give tensors the names that vqf uses."""
    renamed = {}
    for name, tensor in tensors.items():
        for pattern, replacement in rules:
            name = re.sub(pattern, replacement, name)
        assert name not in renamed, f"two weights became {name}"
        renamed[name] = tensor
    return renamed


def from_vq_model(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Name weights or gradients of taming's VQModel as a Tokenizer's, without those of its loss."""
    return rename({name: each for name, each in tensors.items() if not name.startswith("loss.")}, BLOCKS)


def from_gpt(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Name weights or gradients of taming's GPT as vqf's; its causal masks are buffers that vqf does not keep."""
    return rename({name: each for name, each in tensors.items() if not name.endswith(".mask")}, GPT)


def from_diffusers(tensors: Mapping[str, Tensor], levels: int) -> dict[str, Tensor]:
    """Name those of diffusers' VQModel, which stores `up` in the order it runs and attention as linear layers."""
    flipped = flip_up(tensors, levels)
    return {
        name: each[..., None, None] if re.search(r"\.(q|k|v|proj_out)\.weight$", name) else each
        for name, each in rename(flipped, DIFFUSERS).items()
    }


def from_janus(tensors: Mapping[str, Tensor], levels: int) -> dict[str, Tensor]:
    """Name those of transformers' JanusVQVAE: taming's names, `up` in the order it runs."""
    return rename(flip_up(tensors, levels), BLOCKS)


def flip_up(tensors: Mapping[str, Tensor], levels: int) -> dict[str, Tensor]:
    """Count the levels of a decoder from the other end."""
    pattern = re.compile(r"(?<=^decoder\.up\.)\d+|(?<=^decoder\.up_blocks\.)\d+")
    return {pattern.sub(lambda match: str(levels - 1 - int(match[0])), name): each for name, each in tensors.items()}


def from_part(tensors: Mapping[str, Tensor], part: str) -> dict[str, Tensor]:
    """Name those of taming's Encoder or Decoder alone; `part` is "encoder" or "decoder"."""
    whole = rename({f"{part}.{name}": each for name, each in tensors.items()}, BLOCKS)
    return {name.removeprefix(f"{part}."): each for name, each in whole.items()}
