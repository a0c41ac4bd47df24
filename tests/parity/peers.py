"""Other people's packages as oracles: how to import them today, and the tiny models that the tests build with them."""

import importlib
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

# The smallest convolutional autoencoder with everything in it: a level that only widens, one that attends, shortcuts.
WIDTHS, NOMINAL, Z, CODES, CODE_DIM = (1, 2, 2), 16, 16, 12, 8
SHAPE = {
    "ch": 32,
    "out_ch": 3,
    "ch_mult": WIDTHS,
    "num_res_blocks": 2,
    "attn_resolutions": [NOMINAL // 2],
    "in_channels": 3,
    "resolution": NOMINAL,
    "z_channels": Z,
    "double_z": False,
}


def need(module: str) -> Any:
    """Import a module of a peer, or skip the test where it is not installed; VQF_PEERS=1 makes that an error."""
    if os.environ.get("VQF_PEERS") == "1":
        return importlib.import_module(module)
    return pytest.importorskip(module, reason="pip install vqf[peers]")


class LightningModule(nn.Module):
    """As much of pytorch-lightning 1.0.8 as the reference's models use."""

    global_step = 0
    learning_rate = 0.0

    def __init__(self) -> None:
        super().__init__()
        self.logged: dict[str, Tensor] = {}

    def log(self, name: str, value: Tensor, **_: Any) -> None:
        self.logged[name] = value.detach()

    def log_dict(self, values: dict[str, Tensor], **_: Any) -> None:
        for name, value in values.items():
            self.log(name, value)


# What taming-transformers imports and its dependencies no longer have. No test calls these names, but for the first.
GONE: dict[str, dict[str, Any]] = {
    "pytorch_lightning": {"LightningModule": LightningModule, "LightningDataModule": object, "seed_everything": None},
    "pytorch_lightning.trainer": {"Trainer": None},
    "pytorch_lightning.callbacks": {"ModelCheckpoint": None, "Callback": object, "LearningRateMonitor": None},
    "pytorch_lightning.utilities": {},
    "pytorch_lightning.utilities.distributed": {"rank_zero_only": lambda function: function},
    "transformers": {"top_k_top_p_filtering": None},
}


def taming(name: str) -> Any:
    """Import a module of the PyPI package taming-transformers-rom1504, such as `modules.transformer.mingpt`."""
    need("taming")
    with _stubs():
        return importlib.import_module(f"taming.{name}")


@contextmanager
def _stubs() -> Iterator[None]:
    before = {module: sys.modules.get(module) for module in GONE}
    for module, names in GONE.items():
        stub = ModuleType(module)
        stub.__path__ = []
        vars(stub).update(names)
        sys.modules[module] = stub
    try:
        yield
    finally:
        for module, original in before.items():
            del sys.modules[module]
            if original is not None:
                sys.modules[module] = original


def trunk() -> Any:
    """Build VGG16 without the classifier, which LPIPS does not use and which takes seconds to draw; always the same.

    The real weights are a download of 528 MB.
    """
    from torchvision.models.vgg import cfgs, make_layers

    with torch.device("meta"):
        layers = make_layers(cfgs["D"])
    generator = torch.Generator().manual_seed(0)
    state = {name: torch.zeros(each.shape) for name, each in layers.state_dict().items()}
    for each in state.values():
        if each.ndim > 1:
            each.normal_(std=(2 / each[0].numel()) ** 0.5, generator=generator)
    layers.load_state_dict(state, assign=True)
    return SimpleNamespace(features=layers)


def taming_lpips() -> Any:
    """Import the reference's LPIPS so that it takes the random trunk, and the real heads from the `lpips` package."""
    module = taming("modules.losses.lpips")
    heads = Path(need("lpips").__file__).parent / "weights" / "v0.1" / "vgg.pth"

    def load(self: Any, name: str = "") -> None:
        state = torch.load(heads, map_location="cpu", weights_only=True)
        assert not self.load_state_dict(state, strict=False).unexpected_keys

    module.models = SimpleNamespace(vgg16=lambda **_: trunk())
    module.LPIPS.load_from_pretrained = load
    return module.LPIPS


def stir(module: nn.Module) -> nn.Module:
    """Move what initialisation leaves at 0, 1 or nearly 0, so that no two of the weights could be swapped unseen."""
    with torch.no_grad():
        for parameter in module.parameters():
            if parameter.ndim == 1 and parameter.requires_grad:
                parameter += 0.2 * torch.randn_like(parameter)
        for child in module.modules():
            if isinstance(child, nn.Embedding):
                child.weight.normal_()
    return module


def vq_model(dtype: torch.dtype, loss: dict[str, Any] | None = None, **changes: Any) -> Any:
    """Build the reference's VQModel with weights of its own, and the loss that a config names (none: a dummy)."""
    nothing = {"target": "taming.modules.losses.vqperceptual.DummyLoss"}
    shape = {**SHAPE, **changes}
    model = taming("models.vqgan").VQModel(shape, loss or nothing, n_embed=CODES, embed_dim=CODE_DIM)
    model.get_input = lambda batch, key: batch[key]  # the original takes channels last, and float32 only
    return stir(model).to(dtype)


def spread_codes(model: Any, images: Tensor) -> None:
    """Move the codes of a VQModel among the latents of some images, so that many are chosen and none by a hair."""
    with torch.no_grad():
        latents = model.quant_conv(model.encoder(images)).movedim(1, -1).flatten(0, 2)
        codes = model.quantize.embedding.weight
        codes.copy_(latents[torch.randperm(len(latents))[: len(codes)]] + 0.1 * latents.std() * torch.randn_like(codes))


def play(model: Any, optimizers: list[Optimizer], batch: dict[str, Tensor], player: int) -> None:
    """Give one optimizer's parameters their gradients, as the Trainer of pytorch-lightning 1.0.8 does."""
    give_turn(model, optimizers[player])
    loss = model.training_step(batch, 0, player)
    optimizers[player].zero_grad()
    loss.backward()


def give_turn(model: nn.Module, optimizer: Optimizer) -> None:
    """Let gradients reach the parameters of one optimizer and no others."""
    model.requires_grad_(False)
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            parameter.requires_grad_(True)


def lightning_step(model: Any, optimizers: list[Optimizer], batch: dict[str, Tensor]) -> None:
    """Do what that Trainer does with a batch: the second player sees a forward with the first one's new weights."""
    for player, optimizer in enumerate(optimizers):
        play(model, optimizers, batch, player)
        optimizer.step()
    model.global_step += 1


def shared_step(model: Any, optimizers: list[Optimizer], images: Tensor) -> None:
    """The same with one forward for both players, which is what vqf does by default."""
    give_turn(model, optimizers[0])
    reconstructions, codebook_loss = model(images)
    for player, optimizer in enumerate(optimizers):
        give_turn(model, optimizer)
        seen = reconstructions if player == 0 else reconstructions.detach()
        last_layer = model.get_last_layer()
        loss, _ = model.loss(codebook_loss, images, seen, player, model.global_step, last_layer=last_layer)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    model.global_step += 1
