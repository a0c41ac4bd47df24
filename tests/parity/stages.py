"""Both sides' stage 1, small: vqf's from its preset `model=vqgan`, the reference's from its own classes."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from hydra import compose, initialize_config_dir
from omegaconf import DictConfig
from torch import Tensor, nn
from torch.optim import Optimizer

from tests.parity.mapping import from_vq_model
from tests.parity.peers import CODE_DIM, CODES, NOMINAL, WIDTHS, Z, spread_codes, taming_lpips, vq_model
from vqf.batch import Batch, Sample
from vqf.discriminators.patchgan import PatchGAN
from vqf.distributed.engine import Engine
from vqf.training.tokenizer_task import build_tokenizer_task

CONF = Path(__file__).parents[2] / "conf"
ENGINE = Engine(torch.device("cpu"), torch.float32)
COLOURED = Sample(torch.zeros(3, 1, 1))
DATA = SimpleNamespace(classes=[], split=lambda name: SimpleNamespace(fingerprint="", item=lambda *_: COLOURED))
LR = 1e-3
SMALL = [
    f"image_size={NOMINAL}",
    "batch_size=2",
    "model.encoder.channels=32",
    "model.decoder.channels=32",
    f"model.encoder.multipliers={list(WIDTHS)}",
    f"model.decoder.multipliers={list(WIDTHS)}",
    f"model.encoder.attention=[{NOMINAL // 2}]",
    f"model.decoder.attention=[{NOMINAL // 2}]",
    f"model.encoder.dim={Z}",
    f"model.quantizer.dim={CODE_DIM}",
    f"model.quantizer.codebook_size={CODES}",
    "logger=[]",
    "metric=[]",
]
PLAYERS = ["model.discriminator.channels=8", "model.discriminator.layers=2", "model.adversary.start=0"]


def configure(*overrides: str) -> DictConfig:
    """Compose what a command line of these words would run."""
    with initialize_config_dir(str(CONF), version_base=None):
        return compose("config", overrides=list(overrides))


class Sides:
    """A reference's VQModel with its loss, and vqf's stage with the same weights, both in one dtype.

    The weights are drawn alike whatever the dtype, but for rounding.
    """

    def __init__(self, vgg_file: str, *overrides: str, dtype: torch.dtype = torch.float64, **loss: Any) -> None:
        self.dtype = dtype
        taming_lpips()
        options = {"disc_start": 0, "disc_weight": 0.8, "disc_ndf": 8, "disc_num_layers": 2, **loss}
        target = "taming.modules.losses.vqperceptual.VQLPIPSWithDiscriminator"
        self.theirs = vq_model(torch.float64, {"target": target, "params": options}).train()
        self.theirs.loss.perceptual_loss.eval()  # exact, as vqf's is by default; see test_lpips
        self.theirs.learning_rate = LR
        spread_codes(self.theirs, self.images().double())
        self.theirs.to(dtype)
        perceptual = [f"model.loss.lpips.weights={vgg_file}", "model.loss.lpips.epsilon=beside"]
        self.ours = build_tokenizer_task(
            configure("model=vqgan", *SMALL, *PLAYERS, *perceptual, f"optimizer.lr={LR}", *overrides), DATA, ENGINE
        )
        self.discriminator = next(
            each for each in self.ours.modules["discriminator"].modules() if isinstance(each, PatchGAN)
        )
        for module in [*self.ours.modules.values(), *self.ours.losses.values()]:
            module.to(dtype)
        self.ours.model.load_state_dict(from_vq_model(self.theirs.state_dict()))
        self.discriminator.load_state_dict(self.theirs.loss.discriminator.state_dict())

    def images(self) -> Tensor:
        return (torch.rand(2, 3, NOMINAL, NOMINAL, dtype=torch.float64) * 2 - 1).to(self.dtype)

    def step(self, step: int, images: Tensor) -> dict[str, Tensor]:
        return self.ours.step(step, Batch(images=images))

    def weights(self) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Return all weights and buffers that training moves, ours and theirs."""
        return self._merge(self.ours.model.state_dict(), self.discriminator.state_dict()), self._merge(
            from_vq_model(self.theirs.state_dict()), self.theirs.loss.discriminator.state_dict()
        )

    def moments(self, optimizers: list[Optimizer]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Return Adam's averages of the gradients and of their squares, ours and theirs."""
        ours, theirs = {}, {}
        for moment in ("exp_avg", "exp_avg_sq"):
            tokenizer = _moments(self.ours.model, self.ours.optimizers["model"], moment)
            discriminator = _moments(self.discriminator, self.ours.optimizers["discriminator"], moment)
            ours |= {f"{moment}.{name}": each for name, each in self._merge(tokenizer, discriminator).items()}
            tokenizer = from_vq_model(_moments(self.theirs, optimizers[0], moment))
            discriminator = _moments(self.theirs.loss.discriminator, optimizers[1], moment)
            theirs |= {f"{moment}.{name}": each for name, each in self._merge(tokenizer, discriminator).items()}
        return ours, theirs

    def _merge(self, tokenizer: dict[str, Tensor], discriminator: dict[str, Tensor]) -> dict[str, Tensor]:
        return {**tokenizer, **{f"discriminator.{name}": each for name, each in discriminator.items()}}


def _moments(module: nn.Module, optimizer: Optimizer, moment: str) -> dict[str, Tensor]:
    state = optimizer.state
    return {name: state[each][moment] for name, each in module.named_parameters() if each in state}


def watch(module: nn.Module, optimizer: Optimizer) -> dict[str, Tensor]:
    """Return what will hold the gradients of a module at the optimizer's next step."""
    seen: dict[str, Tensor] = {}

    def hook(*_: Any) -> None:
        seen.update({name: parameter.grad.clone() for name, parameter in module.named_parameters()})  # type: ignore[union-attr]

    optimizer.register_step_pre_hook(hook)
    return seen
