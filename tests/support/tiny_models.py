"""Untrained models of images of 16 x 16 pixels, one for each layout of tokens. Tests must not change them."""

from functools import cache

import torch
from torch import Tensor

from tests.pipelines.test_token_layouts import SHAPES, Shape, options
from tests.support.composing import compose
from vqf.models.generator import Generator
from vqf.models.tokenizer import Tokenizer, build_tokenizer
from vqf.runs.load import build_generator

CLASSES = ["cat", "dog", "owl", "7"]
RASTER = Shape(("model.quantizer.dim=4", "model.quantizer.codebook_size=16"), 4, completes=True)
LAYOUTS = {"raster": RASTER, **{name: SHAPES[name] for name in ("two codebooks", "pyramid", "no places")}}


@cache
def generator_of(layout: str, *words: str) -> Generator:
    """A generator with conditioners, by default of labels."""
    config = compose(*options(LAYOUTS[layout], *(words or ("model/conditioner=label",))))
    torch.manual_seed(0)
    made = build_generator(config, build_tokenizer(config.model, 16), CLASSES)
    for parameter in made.prior.parameters():  # type: ignore[attr-defined]
        torch.nn.init.normal_(parameter, std=0.3)
    return made.eval().requires_grad_(False)


def tokenizer_of(layout: str) -> Tokenizer:
    return generator_of(layout).tokenizer


def make_images(count: int = 3) -> Tensor:
    return torch.rand(count, 3, 16, 16, generator=torch.Generator().manual_seed(0)) * 2 - 1
