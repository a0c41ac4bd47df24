"""Imported transformers of the reference give the same logits, and their runs can sample."""

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from omegaconf import OmegaConf
from torch import Tensor

import vqf
from tests.interop.composing import run
from tests.parity.comparisons import TOLERANCE, difference
from tests.parity.mapping import from_gpt
from tests.parity.peers import CODE_DIM, CODES, NOMINAL, SHAPE, spread_codes, stir, taming
from vqf.batch import Batch
from vqf.errors import UserError
from vqf.interop.import_model import import_checkpoint
from vqf.interop.priors import ImportOptions
from vqf.models.generator import Generator
from vqf.models.tokenizer import Tokenizer
from vqf.runs.checkpoint import latest_checkpoint
from vqf.runs.resume import check_same_run

N, CLASSES, HEADS = (NOMINAL // 4) ** 2, 5, 2
LABELLED = {"target": "taming.modules.util.Labelator", "params": {"n_classes": CLASSES}}
UNCONDITIONAL = "__is_unconditional__"
TINY = [f"image_size={NOMINAL}", f"heads={HEADS}"]


def network(channels: int = 3) -> dict[str, Any]:
    nothing = {"target": "taming.modules.losses.vqperceptual.DummyLoss"}
    shape = {**SHAPE, "in_channels": channels, "out_ch": channels}
    return {"ddconfig": shape, "lossconfig": nothing, "n_embed": CODES, "embed_dim": CODE_DIM}


def net2net(condition: Any, block_size: int, n_unmasked: int = 0, **options: Any) -> Any:
    """Build a Net2NetTransformer with weights of its own."""
    torch.manual_seed(0)
    for name in ("models.vqgan", "modules.transformer.mingpt"):  # which it would import by itself, without our stubs
        taming(name)
    sizes = {"vocab_size": CODES, "block_size": block_size, "n_layer": 2, "n_head": HEADS, "n_embd": 16}
    model = taming("models.cond_transformer").Net2NetTransformer(
        {"target": "taming.modules.transformer.mingpt.GPT", "params": {**sizes, "n_unmasked": n_unmasked}},
        {"target": "taming.models.vqgan.VQModel", "params": network()},
        condition,
        **options,
    )
    stir(model.first_stage_model)
    for parameter in model.transformer.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    spread_codes(model.first_stage_model, make_images())
    model.learning_rate = 1e-3
    return model.eval()


def make_images() -> Tensor:
    return torch.rand(4, 3, NOMINAL, NOMINAL, generator=torch.Generator().manual_seed(1)) * 2 - 1


def save(model: Any, path: Path, **more: Any) -> Path:
    torch.save({"state_dict": model.state_dict(), "global_step": 5, **more}, path)
    return path


def write_settings(path: Path, **params: Any) -> None:
    OmegaConf.save({"model": {"params": params}}, path.with_suffix(".yaml"))


def imported(path: Path, *words: str) -> Generator:
    run(path.parent / "run", "pipeline=import", f"path={path}", *TINY, *words)
    generator = vqf.load(path.parent / "run")
    assert isinstance(generator, Generator)
    return generator


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_class_conditional(dtype: torch.dtype, tmp_path: Path) -> None:
    model = net2net(LABELLED, N)
    generator = imported(save(model, tmp_path / "last.ckpt"), f"classes={CLASSES}").to(dtype)
    labels, x = torch.tensor([0, 3, 4, 3]), make_images().to(dtype)
    tokens = generator.tokenizer.encode_tokens(x)
    with torch.no_grad():
        expected, codes = model.to(dtype)(x, labels)
        found = generator.prior(tokens, generator.conditioner(Batch(labels=labels)))
    assert torch.equal(tokens, codes)
    assert difference(found, expected) <= TOLERANCE[dtype]
    assert generator.classes == ["0", "1", "2", "3", "4"]
    assert generator.sample(2, label=3).shape == (2, 3, NOMINAL, NOMINAL)


def test_training_does_not_continue_with_other_classes(tmp_path: Path) -> None:
    imported(save(net2net(LABELLED, N), tmp_path / "last.ckpt"), f"classes={CLASSES}")
    found = latest_checkpoint(tmp_path / "run")
    assert found is not None
    check_same_run(found, found.config, {"classes": [str(i) for i in range(CLASSES)]})
    with pytest.raises(UserError, match=r"^resume: .* was trained on 5 classes, but the data has 6$"):
        check_same_run(found, found.config, {"classes": [str(i) for i in range(6)]})


@pytest.mark.parametrize("start", [0, 3])
def test_unconditional(start: int, tmp_path: Path) -> None:
    """The published start token shares the embedding of code 0; another one gets its own table."""
    model = net2net(UNCONDITIONAL, N, sos_token=start)
    path = save(model, tmp_path / "last.ckpt")
    write_settings(path, sos_token=start)
    generator, x = imported(path), make_images()
    with torch.no_grad():
        expected, tokens = model(x, x)
        prefix = generator.conditioner(Batch(images=x))
        assert difference(generator.prior(tokens, prefix), expected) <= TOLERANCE[torch.float32]
    assert generator.classes == []
    assert generator.sample(2).shape == (2, 3, NOMINAL, NOMINAL)


def test_options_from_the_settings(tmp_path: Path) -> None:
    path = save(net2net(LABELLED, N), tmp_path / "last.ckpt")
    transformer = {"params": {"n_head": 4, **dict.fromkeys(("embd_pdrop", "resid_pdrop", "attn_pdrop"), 0.1)}}
    first = {"params": {"ddconfig": {"resolution": NOMINAL}}}
    write_settings(
        path, transformer_config=transformer, first_stage_config=first, cond_stage_config=LABELLED, pkeep=0.9
    )
    found = import_checkpoint(path)
    assert found.image_size == (NOMINAL, NOMINAL)
    assert len(found.classes) == CLASSES
    expected = {"name": "gpt", "layers": 2, "heads": 4, "dim": 16, "dropout": 0.1, "pkeep": 0.9}
    assert expected.items() <= found.nodes["prior"].items()
    assert import_checkpoint(path, options=ImportOptions(heads=8, classes=2)).nodes["prior"]["heads"] == 8


def test_heads_are_assumed_if_unknown(tmp_path: Path) -> None:
    found = import_checkpoint(save(net2net(UNCONDITIONAL, N), tmp_path / "last.ckpt"), size=(NOMINAL, NOMINAL))
    assert found.nodes["prior"]["heads"] == 16
    assert "number of attention heads unknown: 16 assumed, give heads= if it is another" in found.report.notes


def test_every_tensor_is_accounted_for(tmp_path: Path) -> None:
    model = net2net(LABELLED, N)
    report = import_checkpoint(
        save(model, tmp_path / "last.ckpt"), size=(NOMINAL, NOMINAL), options=ImportOptions(HEADS, CLASSES)
    ).report
    assert set(report.loaded) | set(report.skipped) == set(model.state_dict())
    assert set(report.skipped.values()) == {"causal mask"}


def test_its_optimizer_takes_the_step_that_the_reference_s_takes(tmp_path: Path) -> None:
    model = net2net(LABELLED, N)
    optimizer = model.configure_optimizers()
    for _ in range(2):
        for parameter in model.transformer.parameters():
            parameter.grad = torch.randn_like(parameter)
        optimizer.step()
    path = save(model, tmp_path / "last.ckpt", optimizer_states=[optimizer.state_dict()])
    generator = imported(path, f"classes={CLASSES}")
    checkpoint = latest_checkpoint(tmp_path / "run")
    assert checkpoint is not None
    from vqf.training.prior_task import param_groups_weight_decay

    prior: Any = generator.prior.requires_grad_(True)  # type: ignore[attr-defined]
    mine = torch.optim.AdamW(param_groups_weight_decay(prior))
    mine.load_state_dict(checkpoint.load_optimizers()["optimizers"]["model"])
    named = from_gpt(dict(model.transformer.named_parameters()))
    for name, parameter in prior.named_parameters():
        named[name].grad = torch.randn_like(parameter)
        parameter.grad = named[name].grad.clone()
    mine.step(), optimizer.step()
    for name, parameter in prior.named_parameters():
        torch.testing.assert_close(parameter, named[name], rtol=0, atol=1e-7, msg=name)
    assert {group["weight_decay"] for group in mine.param_groups} == {0.01, 0.0}


@pytest.mark.parametrize("channels", [1, 3, 5])
@pytest.mark.parametrize("unmasked", [0, 3])
def test_a_spatial_condition(unmasked: int, channels: int, tmp_path: Path) -> None:
    """The tokenizer of the maps (depth, images or classes) becomes a separate run; the prior samples from maps."""
    condition = {"target": "taming.models.vqgan.VQModel", "params": network(channels)}
    model = net2net(condition, 2 * N, n_unmasked=unmasked)
    generator = imported(save(model, tmp_path / "last.ckpt"))
    beside = vqf.load(tmp_path / "run-condition")
    assert isinstance(beside, Tokenizer) and beside.channels == channels
    assert torch.equal(beside.last_layer.weight, model.cond_stage_model.decoder.conv_out.weight)  # type: ignore[arg-type]
    x, maps = make_images(), torch.rand(4, channels, NOMINAL, NOMINAL) * 2 - 1
    with torch.no_grad():
        _, codes = model.encode_to_z(x)
        # Not encode_to_c: with a map it fails on the flat indices of its own tokenizer (taming-transformers issue 110).
        prefix = model.cond_stage_model.encode(maps)[2][2].reshape(4, N)
        expected = model.transformer(torch.cat((prefix, codes), 1)[:, :-1])[0][:, N - 1 :]
        told = generator.conditioner(generator.conditioner.prepare(Batch(conditions=maps))).ids
        assert torch.equal(told, prefix)
        assert difference(generator.prior(codes, told), expected) <= TOLERANCE[torch.float32]
    assert generator.prior.bidirectional_prefix == unmasked  # type: ignore[attr-defined]
    text = (tmp_path / "run" / "import-report.txt").read_text()
    assert "1 of 32 positions are skipped: no token is ever there" in text
    assert generator.sample(4, conditions=maps).shape == (4, 3, NOMINAL, NOMINAL)
    shutil.rmtree(tmp_path / "run-condition")  # the run itself has all weights
    again = vqf.load(tmp_path / "run")
    assert torch.equal(again.sample(4, conditions=maps), generator.sample(4, conditions=maps))  # type: ignore[union-attr]


def test_a_condition_whose_tokenizer_is_not_in_the_file(tmp_path: Path) -> None:
    """For example coordinates: the weights are imported, and the run can reconstruct."""
    tensors = {name: each for name, each in net2net(spatial(), 2 * N).state_dict().items() if "cond_stage" not in name}
    torch.save({"state_dict": tensors}, tmp_path / "last.ckpt")
    run(tmp_path / "run", "pipeline=import", f"path={tmp_path / 'last.ckpt'}", *TINY)
    assert (
        "the file does not hold the tokenizer of the prior's condition (16 tokens)"
        in (tmp_path / "run" / "import-report.txt").read_text()
    )
    found = latest_checkpoint(tmp_path / "run")
    assert found is not None
    assert torch.equal(found.load_weights("model")["head.weight"], tensors["transformer.head.weight"])
    with pytest.raises(UserError, match="model/conditioner"):
        vqf.load(tmp_path / "run")


def spatial() -> dict[str, Any]:
    return {"target": "taming.models.vqgan.VQModel", "params": network()}


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"transformer.ln_f.bias": None}, "'ln_f.bias' is missing"),
        ({"transformer.head.weight": torch.zeros(CODES + 1, 16)}, r"'head.weight' is \[13, 16\], not \[12, 16\]"),
        (
            {"transformer.pos_emb": torch.zeros(1, N - 2, 16)},
            "its prior has 14 positions, but images of 16 x 16 px need 16; give image_size= as in its training",
        ),
        ({"permuter.forward_shuffle_idx": torch.arange(N).flip(0)}, "in an order of its own"),
    ],
)
def test_what_does_not_fit_is_refused(change: dict[str, Tensor | None], words: str, tmp_path: Path) -> None:
    tensors = {**net2net(LABELLED, N).state_dict(), **change}
    torch.save({"state_dict": {name: each for name, each in tensors.items() if each is not None}}, tmp_path / "a.ckpt")
    with pytest.raises(UserError, match=words):
        import_checkpoint(tmp_path / "a.ckpt", size=(NOMINAL, NOMINAL), options=ImportOptions(HEADS, CLASSES))
