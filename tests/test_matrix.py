"""Every encoder with every decoder and every quantizer: it trains a step, or is refused in one line."""

import copy
from functools import cache
from typing import Any

import pytest
import torch
from omegaconf import DictConfig, OmegaConf

from tests.support.composing import compose
from tests.test_contracts import TINY, is_number
from vqf import registry
from vqf.batch import Batch
from vqf.distributed.engine import Engine, make_engine
from vqf.errors import UserError
from vqf.protocols import Data
from vqf.registry import component_names
from vqf.training.tokenizer_task import TokenizerTask, build_tokenizer_task

PLACES = "one knows the places of its latents, the other does not"
UNPLACED = {"titok", "toy_queries"}
# Quantizers whose last scale is the grid of 8 x 8 latents, and what they say of 5 latents without places.
EIGHT_BY_EIGHT = {"toy_pyramid": "must be the side of the grid", "multiscale": "the last scale is 8, the latents are"}
LATENTS = {("encoder", "titok"), ("encoder", "toy_queries"), ("decoder", "toy_queries")}  # that have `num_latents`


@cache
def base() -> tuple[DictConfig, Data, Engine, Batch]:
    """The config of a VQGAN with the smallest of each, and a batch: built once."""
    config = compose(
        *("model=vqgan", "data=emoji", "image_size=16", "batch_size=2", "steps=10", "device=cpu", "model/loss=[l1]"),
        *("model.adversary.start=0", "model.discriminator.channels=4", "model.discriminator.layers=1"),
    )
    data = registry.build("data", config.data, image_size=16, seed=0)
    batch = Batch.collate([data.split("train").item(0, i) for i in range(2)])
    return config, data, make_engine(config), batch


def node(kind: str, name: str) -> dict[str, Any]:
    latents = {"num_latents": 5} if (kind, name) in LATENTS else {}
    return {"name": name, **TINY.get((kind, name), {}), **latents}


def build_task(encoder: str, decoder: str, quantizer: str) -> TokenizerTask:
    config, data, engine, _ = base()
    config = copy.deepcopy(config)
    for kind, name in (("encoder", encoder), ("decoder", decoder), ("quantizer", quantizer)):
        OmegaConf.update(config, f"model.{kind}", node(kind, name), merge=False)
    return build_tokenizer_task(config, data, engine)


def refusal(encoder: str, decoder: str, quantizer: str) -> str | None:
    if (encoder in UNPLACED) != (decoder in UNPLACED):
        return PLACES
    return EIGHT_BY_EIGHT.get(quantizer) if encoder in UNPLACED else None


@pytest.mark.parametrize("encoder", component_names("encoder"))
@pytest.mark.parametrize("decoder", component_names("decoder"))
def test_every_quantizer_trains_a_step_with_every_encoder_and_decoder(encoder: str, decoder: str) -> None:
    for quantizer in component_names("quantizer"):
        if expected := refusal(encoder, decoder, quantizer):
            with pytest.raises(UserError, match=expected) as caught:
                build_task(encoder, decoder, quantizer)
            assert "\n" not in str(caught.value)
            continue
        task, batch = build_task(encoder, decoder, quantizer), base()[-1]
        assert isinstance(task.model, torch.nn.Module) and batch.images is not None
        before = [parameter.detach().clone() for parameter in task.model.parameters() if parameter.requires_grad]
        log = task.step(0, batch)
        assert [key for key, value in log.items() if not is_number(value)] == []
        assert float(log["gan_weight"]) > 0  # the gradients at the last layer were comparable
        after = [parameter for parameter in task.model.parameters() if parameter.requires_grad]
        changed = [not torch.equal(*pair) for pair in zip(before, after, strict=True)]
        assert sum(changed) > 0.8 * len(changed)
        tokenizer = task.model.eval()
        tokens = tokenizer.encode_tokens(batch.images)
        assert tokens.shape == (2, tokenizer.layout.length)
        assert tokenizer.decode_tokens(tokens).shape == batch.images.shape
