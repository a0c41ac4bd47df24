"""`pipeline=export`: the other projects load the export strictly and compute the same; re-importing it is exact."""

import copy
import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from omegaconf import OmegaConf
from safetensors.torch import load_file
from torch import Tensor

import vqf
from tests.interop.composing import composed, run
from tests.interop.models import images, run_diffusers, run_vqgan, spread
from tests.parity.comparisons import difference
from tests.parity.mapping import from_gpt
from tests.parity.peers import need, taming
from vqf.batch import Batch
from vqf.errors import UserError
from vqf.models.generator import Generator
from vqf.models.tokenizer import Tokenizer, build_tokenizer
from vqf.registry import build
from vqf.runs import checkpoint_writer
from vqf.runs.checkpoint import latest_checkpoint
from vqf.runs.load import ConditionTokenizers, build_generator
from vqf.training.gan import GANModule
from vqf.training.prior_task import param_groups_weight_decay

SIZE, CODES = 16, 24
TINY = [
    *("model=vqgan", f"image_size={SIZE}", "model.quantizer.dim=8", f"model.quantizer.codebook_size={CODES}"),
    *("model.encoder.channels=32", "model.decoder.channels=32", "model.encoder.dim=16"),
    *("model.encoder.multipliers=[1,2]", "model.decoder.multipliers=[1,2]"),
    *("model.encoder.blocks=1", "model.decoder.blocks=1"),
    *("model.encoder.attention=[8]", "model.decoder.attention=[8]"),
    *("model.discriminator.channels=8", "model.discriminator.layers=2"),
    *("model.prior.layers=2", "model.prior.heads=2", "model.prior.dim=16", "model.prior.shared_vocabulary=true"),
]
CODEBOOKS = ["vq_published", "cosine", "ema", "rotation", "gumbel"]


def save(folder: Path, *words: str, ema: bool = False) -> Tokenizer:
    """Write a stage-1 run with random weights and optimizer states, as training leaves it."""
    torch.manual_seed(0)
    config = composed(*TINY, *words)
    tokenizer = build_tokenizer(config.model, SIZE).eval()
    codebook = tokenizer.quantizer.codebook
    with torch.no_grad():
        for parameter in tokenizer.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
        z = tokenizer.quant_conv(tokenizer.encoder(images()[:, :, :SIZE, :SIZE]))
        spread(codebook if isinstance(codebook, Tensor) else codebook.weight, z)
    weights = {"ema": copy.deepcopy(tokenizer.state_dict())} if ema else {}
    modules = {"model": tokenizer}
    if config.model.discriminator is not None:
        adversary = build("adversary", config.model.adversary, steps=10)
        modules["discriminator"] = GANModule(
            build("discriminator", config.model.discriminator, in_channels=3, image_size=(SIZE, SIZE)), adversary, {}
        )
    optimizers = {}
    for name, module in modules.items():
        optimizer = torch.optim.Adam(module.parameters(), lr=1e-5)
        for parameter in module.parameters():
            parameter.grad = torch.randn_like(parameter)
        optimizer.step()
        weights[name] = module.state_dict()
        optimizers[name] = optimizer.state_dict()
    state = {"kind": "stage1", "step": 9, "image_size": [SIZE, SIZE], "classes": []}
    checkpoint_writer.write_checkpoint(
        folder,
        state=state,
        config=config,
        weights=weights,
        optimizers={"optimizers": optimizers, "schedules": {}},
        keep=0,
    )
    return tokenizer


def export(folder: Path, to: str, path: Path) -> Path:
    run(folder.parent / "job", "pipeline=export", f"run={folder}", f"to={to}", f"path={path}")
    return path


def reimport(folder: Path, path: Path) -> Any:
    run(folder, "pipeline=import", f"path={path}", f"image_size={SIZE}", "heads=2")
    found = latest_checkpoint(folder)
    assert found is not None
    return found


def taming_model(path: Path, prefix: str = "") -> Any:
    """Build the model of the yaml beside a checkpoint and load the weights strictly."""
    settings: Any = OmegaConf.to_container(OmegaConf.load(path.with_suffix(".yaml")).model)
    module, name = settings["target"].rsplit(".", 1)
    model = getattr(taming(module.removeprefix("taming.")), name)(**settings["params"])
    whole = torch.load(path, weights_only=True)
    assert whole["global_step"] == 9
    tensors = {key: each for key, each in whole["state_dict"].items() if not key.startswith("loss.")}
    model.load_state_dict(tensors)
    return model.eval()


def make_images() -> Tensor:
    return images()[:, :, :SIZE, :SIZE]


@pytest.mark.parametrize("codebook", ["vq_published", "ema", "rotation", "cosine"])
def test_taming_loads_it_and_computes_the_same(codebook: str, tmp_path: Path) -> None:
    save(tmp_path / "run", f"model/quantizer={codebook}")
    model = taming_model(export(tmp_path / "run", "taming", tmp_path / "out.ckpt"))
    check(tmp_path / "run", *run_vqgan(model, make_images()))


def check(folder: Path, indices: Tensor, expected: Tensor) -> None:
    tokenizer = vqf.load(folder)
    assert isinstance(tokenizer, Tokenizer)
    with torch.no_grad():
        out = tokenizer(make_images())
    assert torch.equal(out.quantized.indices, indices)
    assert len(indices.unique()) > 2
    assert difference(out.reconstructions, expected) <= 1e-5


def test_taming_s_gumbel_loads_it(tmp_path: Path) -> None:
    save(tmp_path / "run", "model/quantizer=gumbel", "model.encoder.dim=8")
    model = taming_model(export(tmp_path / "run", "taming", tmp_path / "out.ckpt"))
    indices = model.quantize.proj(model.encode_to_prequant(make_images())).argmax(1)
    codes = model.quantize.embed(indices).movedim(-1, 1)
    check(tmp_path / "run", indices, model.decode(codes))


@pytest.mark.parametrize("codebook", ["vq_published", "ema", "cosine"])
@pytest.mark.parametrize("attention", [True, False])
def test_diffusers_loads_it_and_computes_the_same(codebook: str, attention: bool, tmp_path: Path) -> None:
    words = [f"model.{part}.middle_attention={attention}" for part in ("encoder", "decoder")]
    words += [] if attention else ["model.encoder.attention=[]", "model.decoder.attention=[]"]
    save(tmp_path / "run", f"model/quantizer={codebook}", *words)
    path = export(tmp_path / "run", "diffusers", tmp_path / "out")
    settings = json.loads((path / "config.json").read_text())
    model = need("diffusers").VQModel.from_config(settings)
    model.load_state_dict(load_file(path / "diffusion_pytorch_model.safetensors"))
    check(tmp_path / "run", *run_diffusers(model.eval(), make_images()))
    check(tmp_path / "run", *run_diffusers(need("diffusers").VQModel.from_pretrained(path).eval(), make_images()))


@pytest.mark.parametrize(
    ("codebook", "to"), [*((each, "taming") for each in CODEBOOKS), *((each, "diffusers") for each in CODEBOOKS[:-1])]
)
def test_round_trip_is_bitwise_equal(codebook: str, to: str, tmp_path: Path) -> None:
    save(tmp_path / "run", f"model/quantizer={codebook}", *(["model.encoder.dim=8"] if codebook == "gumbel" else []))
    path = export(tmp_path / "run", to, tmp_path / ("out.ckpt" if to == "taming" else "out"))
    found, original = reimport(tmp_path / "back", path), latest_checkpoint(tmp_path / "run")
    assert original is not None
    back, before = found.load_weights("model"), original.load_weights("model")
    codes = "quantizer.codebook" if codebook == "ema" else "quantizer.codebook.weight"
    if codebook == "cosine":
        before[codes] = torch.nn.functional.normalize(before[codes], dim=1)
    if codebook == "ema":
        before["quantizer.codebook.weight"] = before.pop(codes)
    left = {"quantizer.N", "quantizer.m", "quantizer.initialized", "quantizer.steps"}
    assert set(before) - left == set(back) - left
    for name in set(back) - left:
        assert torch.equal(back[name], before[name]), name
    assert found.step == (9 if to == "taming" else 0)
    for part in ("encoder", "decoder"):
        assert {**original.config.model[part], **found.config.model[part]} == original.config.model[part]


def test_discriminator_and_optimizers_make_the_round_trip(tmp_path: Path) -> None:
    save(tmp_path / "run", "model/quantizer=vq_published")
    path = export(tmp_path / "run", "taming", tmp_path / "out.ckpt")
    whole = torch.load(path, weights_only=True)
    judge = taming("modules.discriminator.model").NLayerDiscriminator(ndf=8, n_layers=2)
    start = "loss.discriminator."
    judge.load_state_dict(
        {name.removeprefix(start): each for name, each in whole["state_dict"].items() if name.startswith(start)}
    )
    found, original = reimport(tmp_path / "back", path), latest_checkpoint(tmp_path / "run")
    assert original is not None
    for name, each in original.load_weights("discriminator").items():
        assert torch.equal(found.load_weights("discriminator")[name], each), name
    for name in ("model", "discriminator"):
        ours, back = original.load_optimizers()["optimizers"][name], found.load_optimizers()["optimizers"][name]
        assert len(ours["state"]) == len(back["state"]) > 0
        for number, entry in ours["state"].items():
            for key, each in entry.items():
                assert torch.equal(back["state"][number][key], each)


def test_the_order_of_adam_is_the_reference_s(tmp_path: Path) -> None:
    """The reference's optimizer loads the state, and every entry belongs to the parameter of its shape and name."""
    save(tmp_path / "run", "model/quantizer=vq_published")
    path = export(tmp_path / "run", "taming", tmp_path / "out.ckpt")
    model, original = taming_model(path), latest_checkpoint(tmp_path / "run")
    assert original is not None
    parts = [model.encoder, model.decoder, model.quantize, model.quant_conv, model.post_quant_conv]
    optimizer = torch.optim.Adam([each for part in parts for each in part.parameters()])
    optimizer.load_state_dict(torch.load(path, weights_only=True)["optimizer_states"][0])
    ours = original.load_optimizers()["optimizers"]["model"]["state"]
    tokenizer = vqf.load(tmp_path / "run")
    from tests.parity.mapping import from_vq_model

    moments = {name: optimizer.state[each]["exp_avg"] for name, each in model.named_parameters()}
    for number, (name, _) in enumerate(tokenizer.named_parameters()):
        assert torch.equal(from_vq_model(moments)[name], ours[number]["exp_avg"]), name


def test_ema_weights_are_exported(tmp_path: Path) -> None:
    save(tmp_path / "run", ema=True)
    path = export(tmp_path / "run", "taming", tmp_path / "out.ckpt")
    whole, original = torch.load(path, weights_only=True), latest_checkpoint(tmp_path / "run")
    assert original is not None
    assert torch.equal(whole["state_dict"]["quant_conv.bias"], original.load_weights("ema")["quant_conv.bias"])
    assert not torch.equal(whole["state_dict"]["quant_conv.bias"], original.load_weights("model")["quant_conv.bias"])
    assert whole["optimizer_states"] == []


def save_prior(folder: Path, tokenizer: Tokenizer, *words: str, classes: int = 0, ema: bool = False) -> Generator:
    """Write a stage-2 run with random weights and AdamW's state, as training leaves it."""
    config, coders, names = composed(*TINY, *words).copy(), ConditionTokenizers(), [str(i) for i in range(classes)]
    if "spatial" in config.model.conditioner:
        config.model.conditioner.spatial.run = str(folder.parent / "maps")
    generator = build_generator(config, tokenizer, names, coders)
    prior: Any = generator.prior
    for parameter in prior.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
        parameter.grad = torch.randn_like(parameter)
    optimizer = torch.optim.AdamW(param_groups_weight_decay(prior), lr=1e-5)
    optimizer.step()
    weights = {"model": prior.state_dict(), "tokenizer": tokenizer.state_dict()}
    if told := generator.conditioner.state_dict():
        weights["conditioner"] = told
    if ema:
        weights["ema"] = prior.state_dict()
    state = {
        "kind": "stage2",
        "step": 9,
        "image_size": [SIZE, SIZE],
        "classes": names,
        "condition_tokenizers": coders.specs,
    }
    states = {"optimizers": {"model": optimizer.state_dict()}, "schedules": {}}
    checkpoint_writer.write_checkpoint(folder, state=state, config=config, weights=weights, optimizers=states, keep=0)
    return generator


def check_back(folder: Path, path: Path, generator: Generator) -> Generator:
    """Import an export: every weight and every state of AdamW is bitwise equal."""
    found, original = reimport(folder, path), latest_checkpoint(path.parent / "run")
    assert original is not None
    again = vqf.load(folder)
    assert isinstance(again, Generator)
    for ours, back in ((generator.prior, again.prior), (generator.conditioner, again.conditioner)):
        expected, got = ours.state_dict(), back.state_dict()  # type: ignore[attr-defined]
        assert expected.keys() == got.keys()
        for name, each in expected.items():
            assert torch.equal(got[name], each), name
    before, after = original.load_optimizers()["optimizers"]["model"], found.load_optimizers()["optimizers"]["model"]
    assert len(before["state"]) == len(after["state"]) > 0
    for number, entry in before["state"].items():
        for key, each in entry.items():
            assert torch.equal(after["state"][number][key], each)
    return again


@pytest.mark.parametrize("classes", [0, 5])
def test_a_transformer(classes: int, tmp_path: Path) -> None:
    words = ["model/quantizer=vq_published", f"model/conditioner={'label' if classes else 'none'}"]
    tokenizer = save(tmp_path / "first", *words)
    generator = save_prior(tmp_path / "run", tokenizer, *words, classes=classes)
    path = export(tmp_path / "run", "taming", tmp_path / "out.ckpt")
    taming("modules.transformer.mingpt"), taming("models.vqgan")
    model = taming_model(path)
    x, labels = make_images(), torch.tensor([3, 1])
    with torch.no_grad():
        expected, tokens = model(x, labels if classes else x)
        prefix = labels[:, None] if classes else torch.zeros(2, 1, dtype=torch.long)
        assert difference(generator.prior.eval()(tokens, prefix), expected) <= 1e-5  # type: ignore[attr-defined]
    for name, each in from_gpt(model.transformer.state_dict()).items():
        assert torch.equal(each, generator.prior.state_dict()[name]), name  # type: ignore[attr-defined]
    assert check_back(tmp_path / "back", path, generator).classes == generator.classes


def test_adamw_of_a_transformer_in_the_reference_s_order(tmp_path: Path) -> None:
    words = ["model/quantizer=vq_published", "model/conditioner=label"]
    generator = save_prior(tmp_path / "run", save(tmp_path / "first", *words), *words, classes=5)
    path = export(tmp_path / "run", "taming", tmp_path / "out.ckpt")
    taming("modules.transformer.mingpt"), taming("models.vqgan")
    model = taming_model(path)
    model.learning_rate = 1e-5
    optimizer = model.configure_optimizers()
    (state,) = torch.load(path, weights_only=True)["optimizer_states"]
    optimizer.load_state_dict(state)
    original = latest_checkpoint(tmp_path / "run")
    assert original is not None
    prior: Any = generator.prior
    names = {id(each): name for name, each in prior.named_parameters()}
    order = [names[id(each)] for group in param_groups_weight_decay(prior) for each in group["params"]]
    ours = original.load_optimizers()["optimizers"]["model"]["state"]
    found = from_gpt({name: optimizer.state[each]["exp_avg"] for name, each in model.transformer.named_parameters()})
    for number, name in enumerate(order):
        assert torch.equal(found[name], ours[number]["exp_avg"]), name


@pytest.mark.parametrize("downsample", [1, 2])
@pytest.mark.parametrize("quantizer", ["vq_published", "ema"])
def test_a_transformer_conditioned_on_maps(downsample: int, quantizer: str, tmp_path: Path) -> None:
    """With the tokenizer of the maps as the reference's cond_stage_model."""
    words = ["model/quantizer=vq_published", "model/conditioner=spatial"]
    words.append(f"model.conditioner.spatial.downsample={downsample}")
    tokenizer = save(tmp_path / "first", "model/quantizer=vq_published")
    maps = save(tmp_path / "maps", f"model/quantizer={quantizer}")
    generator = save_prior(tmp_path / "run", tokenizer, *words)
    path = export(tmp_path / "run", "taming", tmp_path / "out.ckpt")
    taming("modules.transformer.mingpt"), taming("models.vqgan")
    model = taming_model(path)
    x = make_images()
    with torch.no_grad():
        told = generator.conditioner(generator.conditioner.prepare(Batch(conditions=x))).ids
        small = torch.nn.functional.interpolate(x, size=(SIZE // downsample,) * 2)
        if downsample > 1:
            assert model.downsample_cond_size == SIZE // downsample
        assert torch.equal(model.cond_stage_model.encode(small)[2][2].reshape(2, -1), told)
        tokens = model.encode_to_z(x)[1]
        expected = model.transformer(torch.cat((told, tokens), 1)[:, :-1])[0][:, told.shape[1] - 1 :]
        assert difference(generator.prior.eval()(tokens, told), expected) <= 1e-5  # type: ignore[attr-defined]
    assert model.transformer.get_block_size() == told.shape[1] + tokens.shape[1] - 1
    if quantizer == "ema":  # comes back as codes learned by gradient
        assert torch.equal(
            reimport(tmp_path / "back", path).load_weights("model")["head.weight"], generator.prior.head.weight
        )  # type: ignore[attr-defined]
        beside = vqf.load(tmp_path / "back-condition")
        assert torch.equal(beside.quantizer.codebook.weight, maps.quantizer.codebook)  # type: ignore[union-attr]
        return
    again = check_back(tmp_path / "back", path, generator)
    assert again.conditioner.conditioners["spatial"].downsample == downsample  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["model/conditioner=[spatial,label]"], "to=taming: model/conditioner=spatial and label: it knows none, label"),
        (
            ["model/conditioner=spatial", "model.conditioner.spatial.dropout=0.1"],
            "model/conditioner=spatial with dropout: it",
        ),
        (["model/conditioner=coordinates"], "to=taming: model/conditioner=coordinates: it knows none, label, or"),
    ],
)
def test_a_condition_that_taming_does_not_have(words: list[str], message: str, tmp_path: Path) -> None:
    tokenizer = save(tmp_path / "first", "model/quantizer=vq_published")
    save(tmp_path / "maps", "model/quantizer=vq_published")
    words = ["model/quantizer=vq_published", "model.prior.shared_vocabulary=false", *words]
    save_prior(tmp_path / "run", tokenizer, *words, classes=5)
    with pytest.raises(UserError, match=re.escape(message)):
        export(tmp_path / "run", "taming", tmp_path / "out.ckpt")
    assert not (tmp_path / "out.ckpt").exists()


def test_ema_weights_of_a_transformer_are_exported_without_an_optimizer_state(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    words = ["model/quantizer=vq_published", "model/conditioner=none"]
    save_prior(tmp_path / "run", save(tmp_path / "first", *words), *words, ema=True)
    path = export(tmp_path / "run", "taming", tmp_path / "out.ckpt")
    assert torch.load(path, weights_only=True)["optimizer_states"] == []
    assert "optimizer states are left out: the exported weights are the EMA" in caplog.text


@pytest.mark.parametrize(
    ("words", "to", "message"),
    [
        (
            ["model/quantizer=gumbel", "model.encoder.dim=8"],
            "diffusers",
            "model.quantizer=gumbel: diffusers has no such quantizer",
        ),
        (
            [f"model.{part}.channels=24" for part in ("encoder", "decoder")],
            "taming",
            r"to=taming: group norms of \[8, 16\] groups; widths must be multiples of 32",
        ),
        (
            ["model.decoder.blocks=2"],
            "diffusers",
            "model.encoder.blocks=1 and model.decoder.blocks=2 must be equal",
        ),
        (
            [f"model.{part}.patch_size=2" for part in ("encoder", "decoder")],
            "taming",
            "cannot export 'decoder.unfold.conv.weight'; only model/encoder=conv with patch_size=1 can be exported",
        ),
    ],
)
def test_models_that_cannot_be_exported(words: list[str], to: str, message: str, tmp_path: Path) -> None:
    save(tmp_path / "run", *words)
    with pytest.raises(UserError, match=message):
        export(tmp_path / "run", to, tmp_path / "out")


@pytest.mark.parametrize("name", ["out.ckpt", "out.yaml"])
def test_nothing_is_overwritten(name: str, tmp_path: Path) -> None:
    save(tmp_path / "run")
    (tmp_path / name).write_text("precious")
    with pytest.raises(UserError, match="exists already"):
        export(tmp_path / "run", "taming", tmp_path / "out.ckpt")
    assert (tmp_path / name).read_text() == "precious"


def test_settings_and_weights_are_two_files(tmp_path: Path) -> None:
    save(tmp_path / "run")
    with pytest.raises(UserError, match="the config is written there"):
        export(tmp_path / "run", "taming", tmp_path / "out.yaml")
