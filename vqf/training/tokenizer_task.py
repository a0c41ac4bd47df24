"""Stage 1: learn a codebook, and to draw images from it.

VQGAN, https://arxiv.org/abs/2012.09841, equations 4 to 7. Without discriminator and adversary it is a VQ-VAE,
https://arxiv.org/abs/1711.00937.
"""

from collections.abc import Mapping
from typing import Any

import torch
from omegaconf import DictConfig
from torch import Tensor, nn
from torch.func import functional_call
from torch.optim import Optimizer

from vqf.batch import Batch
from vqf.config.access import chosen, image_size
from vqf.dataloading.loader import sequential
from vqf.dataloading.subject import channels_of, shows_classes
from vqf.distributed import comm
from vqf.distributed.engine import Engine, widen
from vqf.errors import UserError
from vqf.evaluation import reconstruction
from vqf.evaluation.validation import Evaluation
from vqf.models.tokenizer import Reconstructed, Tokenizer, build_tokenizer
from vqf.protocols import Data, Judged, Loss
from vqf.registry import build, find
from vqf.training.codebook_usage import UsageWindow
from vqf.training.gan import Critic, check_judge, frozen, make_critic
from vqf.training.optimizer_step import Accumulated, Player, check_accumulate


class TokenizerStage:
    """Two players: the tokenizer that reconstructs, and from some step on the discriminator that judges it.

    Both play on one shared forward of the tokenizer. The losses are taken on a leaf cut at the reconstruction:
    their gradients there give the adaptive weight, through the last layer alone, and then go back through the
    tokenizer once. This is the gradient of the whole expression without keeping the graph for a second pass.

    Several processes average the two gradients at the last layer first, so that the weight, too, is that of the
    whole batch. It is a ratio: of micro-batches, each has its own.
    """

    kind = "stage1"

    def __init__(
        self,
        tokenizer: Tokenizer,
        losses: Mapping[str, Loss],
        critic: Critic | None,
        data: Data,
        config: DictConfig,
        engine: Engine,
    ) -> None:
        self.model, self.losses, self.critic = tokenizer, losses, critic
        self.data, self.config, self.engine = data, config, engine
        self.forward = engine.spread(tokenizer, compiled=config.compile)  # before the optimizer is built
        self.usage = engine.place(UsageWindow(tokenizer.vocab_size))
        self.modules: dict[str, nn.Module] = {"model": tokenizer, "usage": self.usage}
        self.players = {"model": self._player(tokenizer, self.usage)}
        if critic is not None:
            self.judge = engine.spread(critic, "both", sharded=False)
            self.modules["discriminator"] = critic
            self.players["discriminator"] = self._player(critic)
        self.optimizers: dict[str, Optimizer] = {name: each.optimizer for name, each in self.players.items()}
        self.higher_is_better = reconstruction.senses(config)
        self.facts: Mapping[str, Any] = {
            "classes": list(data.classes),
            "data": data.split("train").fingerprint,
            "held_out": data.split("validation").fingerprint,
            "image_size": list(tokenizer.image_size),
            "channels": tokenizer.channels,
        }

    def step(self, step: int, batch: Batch) -> dict[str, Tensor]:
        """Move both players once; returns what to log."""
        total = Accumulated()
        self.model.train()
        for player in self.players.values():
            player.begin()
        pieces = batch.chunk(self.config.accumulate)
        fakes = []
        for i, piece in enumerate(pieces, 1):
            with self.engine.collecting(self.forward, more=i < len(pieces)):
                fakes.append(self._reconstruct(step, piece, total, 1 / len(pieces)))
        total.add(self.usage.tick())
        total.add({"gradient": self.players["model"].move(total.values)})
        total.add(self._follow())
        if self.critic is not None and step >= self.critic.adversary.start:
            for i, (piece, fake) in enumerate(zip(pieces, fakes, strict=True), 1):
                with self.engine.collecting(self.judge, more=i < len(pieces)):
                    self._discriminate(step, piece, fake, total, 1 / len(pieces))
            total.add({"discriminator_gradient": self.players["discriminator"].move(total.values)})
        return total.values

    def evaluate(self, model: nn.Module) -> Evaluation:
        """Reconstruct held-out pictures."""
        assert isinstance(model, Tokenizer)
        split, config = self.data.split("validation"), self.config
        count = min(config.evaluate.count or len(split), len(split))
        held_out = sequential(
            split, config.batch_size, count=count, workers=config.workers, timeout=config.worker_timeout
        )
        return reconstruction.report(model, split, held_out, count, config, self.engine)

    def conclude(self, model: nn.Module) -> Evaluation:
        """Add nothing to the last look."""
        return Evaluation({})

    def _reconstruct(self, step: int, batch: Batch, total: Accumulated, share: float) -> Tensor:
        images = batch.images
        assert images is not None
        with self.engine.autocast():
            out: Reconstructed = self.forward(images)
        leaf = widen(out.reconstructions.detach()).requires_grad_()
        terms = {name: loss(leaf, images) for name, loss in self.losses.items()}
        rec_loss = torch.stack([self.losses[name].weight * term for name, term in terms.items()]).sum()
        (gradient,) = torch.autograd.grad(rec_loss, leaf)
        total.add({"loss": rec_loss + out.quantized.loss, **terms, "codebook": out.quantized.loss}, share)
        total.add(out.quantized.stats, share)
        self.usage.see(out.quantized.indices)
        if self.critic is not None and (ramp := self.critic.adversary.ramp(step)) > 0:
            gradient = gradient + ramp * self._adversarial(self.critic, leaf, out, gradient, total, share)
        surrogate = (widen(out.reconstructions) * gradient).sum() + out.quantized.loss
        (surrogate * share).backward()
        return leaf.detach()

    def _follow(self) -> dict[str, Tensor]:
        """Let the quantizer move what no gradient moves, if the step was taken."""
        update = getattr(self.model.quantizer, "update", None)
        return update() if update is not None and self.players["model"].moved else {}

    def _adversarial(
        self, critic: Critic, leaf: Tensor, out: Reconstructed, gradient: Tensor, total: Accumulated, share: float
    ) -> Tensor:
        """Return the weighted gradient of the generator's loss at the reconstruction."""
        with frozen(critic), self.engine.autocast():
            logits = widen(critic(leaf))
        fooling = critic.adversary.generator_loss(logits)
        (adversarial,) = torch.autograd.grad(fooling, leaf)
        weight = critic.adversary.weight(*comm.mean(self._at_last_layer(out.features, gradient, adversarial)))
        total.add({"generator": fooling, "gan_weight": weight}, share)
        return weight * adversarial

    def _at_last_layer(self, features: Tensor, *gradients: Tensor) -> Tensor:
        """Return the gradients of the last layer's weight, given those of its output, one behind the other."""
        layer = self.model.last_layer
        # They do not depend on the weights, of which a process may have only a share.
        blank = {name: gradients[0].new_zeros(each.shape) for name, each in layer.named_parameters()}
        weight = blank["weight"].requires_grad_()
        output = functional_call(layer, blank, widen(features.detach()))
        return torch.stack([torch.autograd.grad(output, weight, each, retain_graph=True)[0] for each in gradients])

    def _discriminate(self, step: int, batch: Batch, fake: Tensor, total: Accumulated, share: float) -> None:
        critic, images = self.critic, batch.images
        assert critic is not None and images is not None
        if critic.adversary.second_forward:
            with torch.no_grad(), self.engine.autocast():
                fake = widen(self.forward(images).reconstructions)
        with self.engine.autocast():
            # One after the other: batch norm must not normalise real and fake by common statistics.
            real_logits, fake_logits = (widen(each) for each in self.judge(images, fake))
        loss = critic.adversary.discriminator_loss(real_logits, fake_logits)
        judged = Judged(critic, images, real_logits, fake_logits, step)
        terms = {name: each(judged) for name, each in critic.regularizers.items()}
        penalty = sum(critic.regularizers[name].weight * term for name, term in terms.items())
        ((loss + penalty) * share).backward()
        logits = {"logits_real": real_logits.mean(), "logits_fake": fake_logits.mean()}
        shown = {name: getattr(critic.regularizers[name], "logged", term) for name, term in terms.items()}
        total.add({"discriminator": loss, **logits, **shown}, share)

    def _player(self, module: nn.Module, *others: nn.Module) -> Player:
        trained = [parameter for parameter in module.parameters() if parameter.requires_grad]
        return Player(build("optimizer", self.config.optimizer, params=trained), [module, *others], self.config)


def make_stage(config: DictConfig, data: Data, engine: Engine) -> TokenizerStage:
    """Build both players, what they play for, and their optimizers.

    Raises:
        UserError: If only one of discriminator and adversary is chosen, or there is no loss.
    """
    model = config.model
    if (model.get("discriminator") is None) != (model.get("adversary") is None):
        raise UserError("model.discriminator and model.adversary go together: choose both, or null for both")
    if not chosen(model, "loss"):
        raise UserError("model.loss: a tokenizer needs at least one loss, model/loss=[l1]")
    check_accumulate(config)
    check_losses(config, channels := channels_of(data))
    torch.manual_seed(config.seed)
    tokenizer = engine.place(build_tokenizer(model, image_size(config), channels))
    losses = {name: engine.place(build("loss", node)) for name, node in chosen(model, "loss").items()}
    if critic := engine.place(make_critic(config, channels)):
        check_judge(critic, config, channels)
    return TokenizerStage(tokenizer, losses, critic, data, config, engine)


def check_losses(config: DictConfig, channels: int) -> None:
    """Refuse a loss that cannot compare the pictures of a config, of so many channels.

    Raises:
        UserError: One line that names the loss, and what to choose.
    """
    model, classes = config.model, shows_classes(config)
    what = f"maps of {channels} classes" if classes else f"pictures of {channels} channels"
    targets = {name: find("loss", node.name).target for name, node in chosen(model, "loss").items()}
    for name, target in targets.items():
        of_classes, known = getattr(target, "of_classes", False), getattr(target, "channels", (channels,))
        if of_classes and not classes:
            raise UserError(f"model.loss.{name}: compares maps of classes, not {what}; model/loss=[l1] does")
        if channels not in known or (classes and hasattr(target, "channels")):
            raise UserError(
                f"model.loss.{name}: compares pictures of {' or '.join(map(str, known))} channels, not {what}; for "
                "maps of classes choose model/loss=[bce] model.discriminator=null model.adversary=null"
            )
        if of_classes and model.get("discriminator") is not None:
            raise UserError(
                f"model.loss.{name}: makes logits, which a discriminator tells from a map at sight; choose "
                "model.discriminator=null model.adversary=null"
            )
