"""Models of other projects with random weights, and their codes and images for comparison."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from tests.parity.peers import CODE_DIM, CODES, NOMINAL, SHAPE, WIDTHS, Z, need, spread_codes, stir, taming, vq_model

SIZE = (NOMINAL, NOMINAL)


@dataclass
class Peer:
    """A model, and how it turns images into indices (B, h, w) and reconstructions."""

    source: str
    model: Any
    run: Callable[[Any, Tensor], tuple[Tensor, Tensor]]
    settings: Mapping[str, Any] | None = None

    def __call__(self, images: Tensor) -> tuple[Tensor, Tensor]:
        with torch.no_grad():
            return self.run(self.model.to(images.dtype), images)


def images(count: int = 2) -> Tensor:
    return torch.randn(count, 3, *SIZE, generator=torch.Generator().manual_seed(5)).clamp(-1, 1)


def vqgan(**changes: Any) -> Peer:
    """The reference's VQModel."""
    model = vq_model(torch.float32, **changes).eval()
    spread_codes(model, images())
    return Peer("taming", model, run_vqgan)


def run_vqgan(model: Any, x: Tensor) -> tuple[Tensor, Tensor]:
    indices = model.encode(x)[2][2]
    return grid(indices, len(x)), model(x)[0]


def spread(codes: Tensor, latents: Tensor, unit: bool = False) -> None:
    """Move code vectors among latents (B, d, h, w), so that many codes are used and no two are nearly equidistant."""
    with torch.no_grad():
        flat = rearrange(latents, "b d h w -> (b h w) d")
        moved = flat[torch.randint(len(flat), (len(codes),))] + 0.1 * flat.std() * torch.randn_like(codes)
        codes.copy_(F.normalize(moved, dim=1) if unit else moved)


def gumbel() -> Peer:
    """The reference's GumbelVQ; without its noise in eval mode it takes the likeliest code."""
    scheduler = {
        "target": "taming.lr_scheduler.LambdaWarmUpCosineScheduler",
        "params": dict.fromkeys(("warm_up_steps", "lr_min", "lr_max", "lr_start", "max_decay_steps"), 1)
        | {"verbosity_interval": 0},
    }
    nothing = {"target": "taming.modules.losses.vqperceptual.DummyLoss"}
    module = taming("models.vqgan")
    model = module.GumbelVQ({**SHAPE, "z_channels": CODE_DIM}, nothing, CODES, CODE_DIM, scheduler)
    stir(model).eval()

    def run(model: Any, x: Tensor) -> tuple[Tensor, Tensor]:
        indices = model.quantize.proj(model.encode_to_prequant(x)).argmax(1)
        return indices, model.decode(rearrange(model.quantize.embed(indices), "b h w d -> b d h w"))

    return Peer("taming", model, run)


def latent_diffusion(attention: bool) -> Peer:
    """The reference's classes with latent-diffusion's sizes: few channels, attention in the middle only."""
    peer = vqgan(attn_resolutions=[], z_channels=CODE_DIM)
    if not attention:
        peer.model.encoder.mid.attn_1 = peer.model.decoder.mid.attn_1 = nn.Identity()
        spread_codes(peer.model, images())
    return Peer("ldm", peer.model, run_vqgan)


class LlamaGen(nn.Module):
    """LlamaGen's tokenizer: blocks in flat lists, the decoder's in the order they run, codes on the unit sphere."""

    def __init__(self) -> None:
        super().__init__()
        widths = [32 * each for each in WIDTHS]
        self.encoder, self.decoder = half(widths, [32, *widths], 2, 3, Z), half(widths[::-1], [], 3, Z, 3)
        self.quantize = nn.Module()
        self.quantize.embedding = nn.Embedding(CODES, CODE_DIM)
        self.quantize.register_buffer("codebook_used", torch.zeros(65536))
        self.quant_conv, self.post_quant_conv = nn.Conv2d(Z, CODE_DIM, 1), nn.Conv2d(CODE_DIM, Z, 1)

    def latents(self, x: Tensor) -> Tensor:
        h = self.encoder.conv_in(x)
        for level in self.encoder.conv_blocks:
            h = through(level, h)
            h = level.downsample(h) if hasattr(level, "downsample") else h
        return F.normalize(self.quant_conv(end(self.encoder, through_all(self.encoder.mid, h))), dim=1)

    def decode(self, indices: Tensor) -> Tensor:
        codes = F.normalize(self.quantize.embedding.weight, dim=1)[indices]
        h = self.decoder.conv_in(self.post_quant_conv(rearrange(codes, "b h w d -> b d h w")))
        h = through_all(self.decoder.mid, h)
        for level in self.decoder.conv_blocks:
            h = through(level, h)
            h = level.upsample(h) if hasattr(level, "upsample") else h
        return end(self.decoder, h)


def half(widths: list[int], before: list[int], blocks: int, channels_in: int, channels_out: int) -> nn.Module:
    """An encoder, or, where the widths fall, a decoder."""
    parts = taming("modules.diffusionmodules.model")
    encodes = bool(before)
    before = before or [widths[0], *widths]
    made: Any = nn.Module()
    made.conv_in = nn.Conv2d(channels_in, before[0], 3, padding=1)
    made.conv_blocks = nn.ModuleList()
    for i, width in enumerate(widths):
        ins = [before[i]] + [width] * (blocks - 1)
        level: Any = nn.Module()
        level.res = nn.ModuleList(block(parts, each, width) for each in ins)
        lowest = i == (len(widths) - 1 if encodes else 0)
        level.attn = nn.ModuleList(parts.AttnBlock(width) for _ in ins if lowest)
        if i + 1 < len(widths):
            kind, name = (parts.Downsample, "downsample") if encodes else (parts.Upsample, "upsample")
            setattr(level, name, kind(width, True))
        made.conv_blocks.append(level)
    lowest_width = widths[-1] if encodes else widths[0]
    middle = [block(parts, lowest_width, lowest_width) for _ in range(2)]
    made.mid = nn.ModuleList([middle[0], parts.AttnBlock(lowest_width), middle[1]])
    made.norm_out, made.conv_out = parts.Normalize(widths[-1]), nn.Conv2d(widths[-1], channels_out, 3, padding=1)
    return made


def block(parts: Any, channels_in: int, channels_out: int) -> nn.Module:
    return parts.ResnetBlock(in_channels=channels_in, out_channels=channels_out, temb_channels=0, dropout=0.0)


def apply(layer: nn.Module, h: Tensor) -> Tensor:
    return layer(h, None) if hasattr(layer, "conv1") else layer(h)


def through(level: Any, h: Tensor) -> Tensor:
    for i, layer in enumerate(level.res):
        h = apply(layer, h)
        h = level.attn[i](h) if len(level.attn) else h
    return h


def through_all(layers: Any, h: Tensor) -> Tensor:
    for layer in layers:
        h = apply(layer, h)
    return h


def end(side: Any, h: Tensor) -> Tensor:
    return side.conv_out(F.silu(side.norm_out(h)))


def llamagen() -> Peer:
    model = stir(LlamaGen()).eval()
    with torch.no_grad():
        spread(model.quantize.embedding.weight, model.latents(images()))

    def run(model: Any, x: Tensor) -> tuple[Tensor, Tensor]:
        codes = F.normalize(model.quantize.embedding.weight, dim=1)
        indices = torch.einsum("bdhw,vd->bhwv", model.latents(x), codes).argmax(-1)
        return indices, model.decode(indices)

    return Peer("llamagen", model, run)


def janus() -> Peer:
    """transformers' JanusVQVAE. It searches without normalizing and looks up with: codes of length 1 agree on both."""
    transformers = need("transformers")
    config = transformers.models.janus.JanusVQVAEConfig(
        embed_dim=CODE_DIM,
        num_embeddings=CODES,
        latent_channels=Z,
        base_channels=32,
        channel_multiplier=list(WIDTHS),
        num_res_blocks=2,
        num_patches=NOMINAL // 4,
    )
    model = stir(transformers.JanusVQVAE(config)).eval()
    with torch.no_grad():
        spread(model.quantize.embedding.weight, model.quant_conv(model.encoder(images())), unit=True)

    def run(model: Any, x: Tensor) -> tuple[Tensor, Tensor]:
        indices = model.quantize(model.quant_conv(model.encoder(x)))[2]
        return grid(indices, len(x)), model.decode(indices.view(len(x), -1))

    return Peer("janus", model, run, config.to_dict())


def diffusers(attention: bool = True) -> Peer:
    """diffusers' VQModel: linear layers for attention, levels with attention of another class."""
    model = need("diffusers").VQModel(
        block_out_channels=[32 * each for each in WIDTHS],
        down_block_types=["DownEncoderBlock2D", "AttnDownEncoderBlock2D", "DownEncoderBlock2D"],
        up_block_types=["UpDecoderBlock2D", "AttnUpDecoderBlock2D", "UpDecoderBlock2D"],
        layers_per_block=2,
        latent_channels=Z,
        num_vq_embeddings=CODES,
        vq_embed_dim=CODE_DIM,
        mid_block_add_attention=attention,
        sample_size=NOMINAL,
    )
    stir(model).eval()
    with torch.no_grad():
        spread(model.quantize.embedding.weight, model.encode(images()).latents)
    return Peer("diffusers", model, run_diffusers, dict(model.config))


def run_diffusers(model: Any, x: Tensor) -> tuple[Tensor, Tensor]:
    indices = model.quantize(model.encode(x).latents)[2][2]
    return grid(indices, len(x)), model(x).sample


def grid(indices: Tensor, count: int) -> Tensor:
    side = int((indices.numel() // count) ** 0.5)
    return indices.reshape(count, side, side)


PEERS: dict[str, Callable[[], Peer]] = {
    "taming": vqgan,
    "gumbel": gumbel,
    "ldm": lambda: latent_diffusion(True),
    "ldm-noattn": lambda: latent_diffusion(False),
    "llamagen": llamagen,
    "janus": janus,
    "diffusers": diffusers,
    "diffusers-noattn": lambda: diffusers(False),
}
