"""Imported tokenizers of other projects give the same codes and images as their own classes."""

import json
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from omegaconf import OmegaConf
from safetensors.torch import save_file
from torch import Tensor

from tests.interop.models import PEERS, SIZE, Peer, gumbel, images, vqgan
from tests.parity.comparisons import TOLERANCE, difference
from tests.parity.peers import CODE_DIM, CODES, SHAPE, WIDTHS, Z, taming
from vqf.errors import UserError
from vqf.interop.import_model import ImportedCheckpoint, import_checkpoint
from vqf.models.tokenizer import Tokenizer, build_tokenizer


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def save(tensors: Mapping[str, Tensor], path: Path, **more: object) -> Path:
    torch.save({"state_dict": dict(tensors), "global_step": 7, **more}, path)
    return path


def rebuilt(found: ImportedCheckpoint) -> Tokenizer:
    tokenizer = build_tokenizer(OmegaConf.create(found.nodes), found.image_size)
    tokenizer.load_state_dict(found.tokenizer.weights)
    return tokenizer.eval()


def check(tokenizer: Tokenizer, peer: Peer, dtype: torch.dtype) -> None:
    x = images().to(dtype)
    expected_indices, expected = peer(x)
    with torch.no_grad():
        out = tokenizer.to(dtype)(x)
    assert torch.equal(out.quantized.indices, expected_indices)
    assert len(expected_indices.unique()) > 2
    assert difference(out.reconstructions, expected) <= TOLERANCE[dtype]


@pytest.mark.parametrize("name", PEERS)
def test_same_codes_and_images(name: str, tmp_path: Path) -> None:
    peer = PEERS[name]()
    found = import_checkpoint(save(peer.model.state_dict(), tmp_path / "last.ckpt"), size=SIZE)
    assert found.report.layout in (peer.source, "taming")  # latent-diffusion's names are taming's
    assert found.report.unknown_tensors == []
    assert set(found.report.loaded) | set(found.report.skipped) == set(peer.model.state_dict())
    for dtype in (torch.float32, torch.float64):
        check(rebuilt(found), peer, dtype)


def test_sizes_are_read_from_the_tensors(tmp_path: Path) -> None:
    found = import_checkpoint(save(vqgan(num_res_blocks=1).model.state_dict(), tmp_path / "last.ckpt"), size=SIZE)
    sizes = {
        "channels": SHAPE["ch"],
        "multipliers": list(WIDTHS),
        "blocks": 1,
        "attention": SHAPE["attn_resolutions"],
        "middle_attention": True,
    }
    assert found.nodes == {
        "encoder": {"name": "conv", "dim": Z, **sizes},
        "decoder": {"name": "conv", **sizes},
        "quantizer": {"name": "vq", "dim": CODE_DIM, "codebook_size": CODES, "beta_placement": "codebook"},
    }
    assert (found.kind, found.step) == ("stage1", 7)


@pytest.mark.parametrize("size", [16, 32, 48])
def test_attention_stays_on_its_level_whatever_the_nominal_size(size: int, tmp_path: Path) -> None:
    peer = vqgan()
    tokenizer = rebuilt(import_checkpoint(save(peer.model.state_dict(), tmp_path / "last.ckpt"), size=(size, size)))
    check(tokenizer, peer, torch.float32)


@pytest.mark.parametrize("name", ["diffusers", "janus"])
def test_folders_with_settings(name: str, tmp_path: Path) -> None:
    peer = PEERS[name]()
    peer.model.save_pretrained(tmp_path)
    found = import_checkpoint(tmp_path)
    assert found.image_size == SIZE
    check(rebuilt(found), peer, torch.float32)


def test_a_pipeline_folder_of_diffusers_with_the_old_names_of_attention(tmp_path: Path) -> None:
    peer = PEERS["diffusers"]()
    old = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    tensors = peer.model.state_dict()
    for new, before in old.items():
        tensors = {name.replace(f".{new}.", f".{before}."): each for name, each in tensors.items()}
    assert sum(".query." in name for name in tensors) > 0
    folder = tmp_path / "vqvae"
    folder.mkdir()
    torch.save(tensors, folder / "diffusion_pytorch_model.bin")
    (folder / "config.json").write_text(json.dumps(dict(peer.model.config)))
    check(rebuilt(import_checkpoint(tmp_path)), peer, torch.float32)


def test_a_model_inside_a_larger_one_in_several_files(tmp_path: Path) -> None:
    peer = PEERS["janus"]()
    inside = {f"model.vqmodel.{name}": each for name, each in peer.model.state_dict().items()}
    names = sorted(inside)
    for i in range(2):
        save_file({name: inside[name] for name in names[i::2]}, tmp_path / f"model-{i}.safetensors")
    save_file({"model.language_model.weight": torch.zeros(3)}, tmp_path / "model-2.safetensors")
    (tmp_path / "config.json").write_text(json.dumps({"vq_config": {"num_patches": 8}}))
    found = import_checkpoint(tmp_path)
    assert found.report.skipped == {"model.language_model.weight": "unknown to vqf"}
    check(rebuilt(found), peer, torch.float32)


def test_ema_weights_of_latent_diffusion(tmp_path: Path) -> None:
    peer = PEERS["ldm"]()
    shadow = {f"model_ema.{name.replace('.', '')}": each + 1 for name, each in peer.model.named_parameters()}
    more = {"model_ema.decay": torch.tensor(0.99), "model_ema.num_updates": torch.tensor(3)}
    found = import_checkpoint(save({**peer.model.state_dict(), **shadow, **more}, tmp_path / "last.ckpt"), size=SIZE)
    assert (found.report.layout, found.ema_decay) == ("ldm", pytest.approx(0.99))
    for name, each in found.tokenizer.weights.items():
        assert torch.equal(found.tokenizer.ema_weights[name], each + 1), name
    assert found.report.unknown_tensors == []


def test_a_file_of_llamagen(tmp_path: Path) -> None:
    peer = PEERS["llamagen"]()
    state, path = peer.model.state_dict(), tmp_path / "vq_ds16_c2i.pt"
    average = {name: each * 2 for name, each in state.items()}
    torch.save({"model": state, "ema": average, "steps": 11}, path)
    found = import_checkpoint(path, size=SIZE)
    assert found.step == 11
    assert torch.equal(found.tokenizer.ema_weights["quant_conv.weight"], state["quant_conv.weight"] * 2)
    assert found.report.skipped == {"quantize.codebook_used": "record of recently used codes"}
    check(rebuilt(found), peer, torch.float32)


def test_training_state_of_llamagen(tmp_path: Path) -> None:
    """Two Adam states, over the parameters in the order in which the modules register them."""
    model, judge = PEERS["llamagen"]().model, taming("modules.discriminator.model").NLayerDiscriminator(ndf=8)
    optimizers = [torch.optim.Adam(each.parameters(), lr=1e-4, betas=(0.9, 0.95)) for each in (model, judge)]
    for optimizer in optimizers:
        for parameter in optimizer.param_groups[0]["params"]:
            parameter.grad = torch.randn_like(parameter)
        optimizer.step()
    states = {"optimizer": optimizers[0].state_dict(), "optimizer_disc": optimizers[1].state_dict()}
    path = tmp_path / "0000011.pt"
    torch.save({"model": model.state_dict(), "discriminator": judge.state_dict(), "steps": 11, **states}, path)
    found = import_checkpoint(path, size=SIZE)
    assert found.discriminator is not None
    assert found.discriminator.nodes["discriminator"]["layers"] == 3
    named = {f"loss.discriminator.{name}": each for name, each in judge.named_parameters()}
    for part, optimizer, parameters in [
        (found.tokenizer, optimizers[0], dict(model.named_parameters())),
        (found.discriminator, optimizers[1], named),
    ]:
        assert part.optimizer_state is not None
        assert part.optimizer_state.options["betas"] == [0.9, 0.95]
        for name, parameter in parameters.items():
            entry = part.optimizer_state.entries[found.report.loaded[name]]
            assert torch.equal(entry["exp_avg"], optimizer.state[parameter]["exp_avg"]), name


def test_half_precision_is_widened(tmp_path: Path) -> None:
    state = {name: each.half() for name, each in vqgan().model.state_dict().items()}
    found = import_checkpoint(save(state, tmp_path / "last.ckpt"), size=SIZE)
    assert {each.dtype for each in found.tokenizer.weights.values()} == {torch.float32}


def test_a_gumbel_quantizer_continues_with_its_temperature(tmp_path: Path) -> None:
    path = save(gumbel().model.state_dict(), tmp_path / "last.ckpt")
    schedule = {"lr_max": 0.9, "lr_min": 1e-6, "max_decay_steps": 1000001}
    params = {"kl_weight": 1e-8, "temperature_scheduler_config": {"params": schedule}}
    OmegaConf.save({"model": {"params": params}}, tmp_path / "last.yaml")
    found = import_checkpoint(path, size=SIZE)
    options = {"temperature_start": 0.9, "temperature_end": 1e-6, "anneal_steps": 1000001, "kl_weight": 1e-8}
    assert options.items() <= found.nodes["quantizer"].items()
    assert found.tokenizer.weights["quantizer.steps"] == 7


def test_every_tensor_is_accounted_for(tmp_path: Path) -> None:
    extra = {
        "loss.perceptual_loss.lin0.model.1.weight": "LPIPS: calibrated heads",
        "loss.perceptual_loss.net.slice1.0.weight": "LPIPS: VGG16",
        "loss.perceptual_loss.scaling_layer.shift": "LPIPS: scaling of its input",
        "colorize": "random colors of label maps",
        "encoder.adapter.weight": "unknown to vqf",
    }
    tensors = {**vqgan().model.state_dict(), **{name: torch.zeros(1) for name in extra}}
    report = import_checkpoint(save(tensors, tmp_path / "last.ckpt"), size=SIZE).report
    assert report.skipped == extra
    assert report.unknown_tensors == ["encoder.adapter.weight"]
    for name in tensors:
        assert f"  {name}" in report.text()


def broken(change: str) -> dict[str, Tensor]:
    tensors = dict(vqgan().model.state_dict())
    if change == "missing":
        del tensors["decoder.up.1.attn.2.q.bias"]
    elif change == "misfit":
        tensors["decoder.mid.block_1.conv1.bias"] = torch.zeros(5)
    elif change == "codes":
        del tensors["quantize.embedding.weight"]
    elif change == "entrance":
        del tensors["encoder.conv_in.weight"]
    elif change == "two":
        tensors |= {f"other.{name}": each for name, each in tensors.items()}
    elif change == "depth":
        tensors["encoder.conv_in.weight"] = torch.zeros(32, 1, 3, 3)
    elif change == "other":
        tensors = {"layers.0.weight": torch.zeros(1)}
    return tensors


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (
            "missing",
            "does not fit the model that its own sizes describe: 'decoder.up.1.attn.2.q.bias' is missing",
        ),
        (
            "misfit",
            "does not fit the model that its own sizes describe: 'decoder.mid.block_1.conv1.bias' is [5], not [64]",
        ),
        ("codes", "no codebook in it; is it an autoencoder without a quantizer?"),
        ("entrance", "no 'encoder.conv_in.weight' in it"),
        ("two", "several tokenizers (, other.) in it"),
        (
            "depth",
            "does not fit the model that its own sizes describe: 'decoder.conv_out.weight' is [3, 32, 3, 3], not "
            "[1, 32, 3, 3]; 'decoder.conv_out.bias' is [3], not [1]",
        ),
        (
            "other",
            "no tokenizer in it whose layout vqf knows (diffusers, llamagen, janus, ldm, taming); "
            "its first tensors are layers.0.weight",
        ),
    ],
)
def test_what_cannot_be_imported_completely_is_refused(change: str, words: str, tmp_path: Path) -> None:
    path = save(broken(change), tmp_path / "last.ckpt")
    with pytest.raises(UserError) as caught:
        import_checkpoint(path, size=SIZE)
    assert str(caught.value) == f"{path}: {words}"


def test_another_layout_than_the_one_named(tmp_path: Path) -> None:
    path = save(vqgan().model.state_dict(), tmp_path / "last.ckpt")
    assert import_checkpoint(path, source="ldm", size=SIZE).report.layout == "ldm"
    with pytest.raises(UserError) as caught:
        import_checkpoint(path, source="llamagen")
    assert str(caught.value) == f"source=llamagen: the names in {path} are those of 'taming'"


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"norm_num_groups": 8}, "group norms of 8 groups, but vqf has 32 for these widths"),
        ({"act_fn": "mish"}, "act_fn=mish in its settings, but vqf's encoder has silu"),
    ],
)
def test_settings_that_change_what_the_weights_mean(settings: dict[str, object], words: str, tmp_path: Path) -> None:
    peer = PEERS["diffusers"]()
    save_file(peer.model.state_dict(), tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps({**dict(peer.model.config), **settings}))
    with pytest.raises(UserError, match=words):
        import_checkpoint(tmp_path)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("!!python/object/apply:os.system ['touch {touched}']", "cannot be read as yaml"),
        ("model: [", "cannot be read as yaml"),
        ("- 1", "not a mapping of settings"),
    ],
)
def test_settings_are_data(text: str, words: str, tmp_path: Path) -> None:
    path = save(vqgan().model.state_dict(), tmp_path / "last.ckpt")
    (tmp_path / "last.yaml").write_text(text.format(touched=tmp_path / "touched"))
    with pytest.raises(UserError, match=words):
        import_checkpoint(path)
    assert not (tmp_path / "touched").exists()


def test_settings_are_not_resolved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SECRET", "32")
    path = save(vqgan().model.state_dict(), tmp_path / "last.ckpt")
    settings = {"model": {"params": {"ddconfig": {"resolution": "${oc.decode:${oc.env:SECRET}}"}}}}
    OmegaConf.save(OmegaConf.create(settings), tmp_path / "other.yaml")
    assert import_checkpoint(path, yaml=tmp_path / "other.yaml").image_size == (256, 256)
