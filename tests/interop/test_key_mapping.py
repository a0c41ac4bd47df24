"""The tables of tensor names work in both directions, for models of any shape and every layout."""

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from omegaconf import OmegaConf

from tests.support.layouts import raster
from vqf.interop import infer_config
from vqf.interop.key_mapping import KeyMapping, KeyRule, matches, parse, to_conv, to_linear
from vqf.interop.key_tables import DISCRIMINATOR_RULES, EMBEDDING_RULES, GPT_RULES, LAYOUTS, CheckpointLayout
from vqf.interop.meta_models import shapes_of
from vqf.models.tokenizer import Tokenizer, build_tokenizer
from vqf.registry import build
from vqf.tokens.prefix import PrefixSpec

SIZE = 64


@st.composite
def networks(draw: st.DrawFn) -> dict[str, Any]:
    multipliers = draw(st.lists(st.integers(1, 3), min_size=1, max_size=4))
    levels = draw(st.sets(st.integers(0, len(multipliers) - 1)))
    return {
        "channels": draw(st.sampled_from([1, 2])),
        "multipliers": multipliers,
        "blocks": draw(st.integers(1, 3)),
        "attention": [SIZE // 2**i for i in sorted(levels)],
        "middle_attention": draw(st.booleans()),
    }


def blank(network: dict[str, Any]) -> Tokenizer:
    codes = {"name": "vq", "dim": 2, "codebook_size": 3}
    nodes = {"encoder": {"name": "conv", "dim": 4, **network}, "decoder": {"name": "conv", **network}}
    with torch.device("meta"):
        return build_tokenizer(OmegaConf.create({**nodes, "quantizer": codes}), SIZE)


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=lambda each: each.name)
@given(network=networks())
@settings(max_examples=12, deadline=None)
def test_names_of_tokenizers_go_there_and_back(layout: CheckpointLayout, network: dict[str, Any]) -> None:
    ours = blank(network).state_dict()
    rules = [*layout.rules, *EMBEDDING_RULES]
    there = KeyMapping.for_export(rules, ours)
    moved = {name: there.to_source(name) for name in ours}
    assert None not in moved.values()
    theirs = {name: found[0] for name, found in moved.items() if found}
    assert len(set(theirs.values())) == len(ours), "two tensors with one name"
    back = KeyMapping.for_import(rules, theirs.values())
    for name, new in theirs.items():
        found = back.to_vqf(new)
        assert found is not None and found[0] == name
        assert to_conv(to_linear(ours[name], moved[name][1]), found[1]).shape == ours[name].shape  # type: ignore[index]


@given(network=networks())
@settings(max_examples=12, deadline=None)
def test_sizes_are_read_back(network: dict[str, Any]) -> None:
    found = shapes_of(blank(network).state_dict())
    assert infer_config.encoder_node(found, SIZE) == {"name": "conv", "dim": 4, **network}
    assert infer_config.decoder_node(found, SIZE) == {"name": "conv", **network}
    assert infer_config.quantizer_node(found, "vq") == {"name": "vq", "dim": 2, "codebook_size": 3}


def test_names_of_a_prior_go_there_and_back() -> None:
    wired = {"layout": raster((2, 2), 5), "prefix": PrefixSpec(1, 1)}
    prior = build("prior", {"name": "gpt", "layers": 12, "dim": 4, "heads": 2, "shared_vocabulary": True}, **wired)
    names = list(prior.state_dict())
    there, back = KeyMapping.for_export(GPT_RULES, names), []
    for name in names:
        found = there.to_source(name)
        assert found is not None
        back.append(found[0])
    table = KeyMapping.for_import(GPT_RULES, back)
    again = [table.to_vqf(name) for name in back]
    assert [found and found[0] for found in again] == names


@pytest.mark.parametrize("layers", [1, 2, 3, 5])
def test_a_discriminator_is_read_back(layers: int) -> None:
    node = {"name": "patchgan", "channels": 4, "layers": layers, "norm": "batch"}
    weights = build("discriminator", node, in_channels=3, image_size=(64, 64)).state_dict()
    names = {f"discriminator.{name}": each for name, each in weights.items()}
    assert infer_config.discriminator_node(shapes_of(names)) == node
    found = KeyMapping.for_export(DISCRIMINATOR_RULES, names).to_source("discriminator.main.0.bias")
    assert found is not None and found[0] == "loss.discriminator.main.0.bias"


def test_templates() -> None:
    assert parse("a.{i}.{*}", "a.12.b.c") == {"i": "12", "rest": "b.c"}
    assert parse("a.{i}.{*}", "a.x.b") is None
    assert matches("a.b", "a.b") and not matches("a.b", "aXb")
    flipped = KeyMapping([KeyRule("x.{-i}", "y.{i}")], levels=4, last=2)
    assert flipped.to_vqf("x.0") is not None and flipped.to_vqf("x.0")[0] == "y.3"  # type: ignore[index]
    assert flipped.to_source("y.3") is not None and flipped.to_source("y.3")[0] == "x.0"  # type: ignore[index]
