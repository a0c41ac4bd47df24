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
from vqf.config.access import group_nodes, image_size
from vqf.dataloading.loader import sequential_batches
from vqf.dataloading.training_target import data_channels, target_is_class_map
from vqf.distributed import comm
from vqf.distributed.engine import Engine, upcast
from vqf.errors import UserError
from vqf.evaluation import reconstruction
from vqf.evaluation.validation import ValidationResult
from vqf.models.tokenizer import Tokenizer, TokenizerOutput, build_tokenizer
from vqf.protocols import Data, DiscriminatorOutput, Loss
from vqf.registry import build, find_component
from vqf.training.codebook_usage import CodebookUsage
from vqf.training.gan import GANModule, build_gan, check_discriminator_input, no_param_grad
from vqf.training.optimizer_step import OptimizerStep, ScalarAccumulator, check_accumulate


class TokenizerTask:
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
        gan: GANModule | None,
        data: Data,
        config: DictConfig,
        engine: Engine,
    ) -> None:
        self.model, self.losses, self.gan = tokenizer, losses, gan
        self.data, self.config, self.engine = data, config, engine
        self.parallel_tokenizer = engine.parallelize(
            tokenizer, compiled=config.compile
        )  # before the optimizer is built
        self.codebook_usage = engine.prepare(CodebookUsage(tokenizer.vocab_size))
        self.modules: dict[str, nn.Module] = {"model": tokenizer, "usage": self.codebook_usage}
        self.optimizer_steps = {"model": self._build_optimizer_step(tokenizer, self.codebook_usage)}
        if gan is not None:
            self.ddp_discriminator = engine.parallelize(gan, "score_pair", sharded=False)
            self.modules["discriminator"] = gan
            self.optimizer_steps["discriminator"] = self._build_optimizer_step(gan)
        self.optimizers: dict[str, Optimizer] = {name: each.optimizer for name, each in self.optimizer_steps.items()}
        self.higher_is_better = reconstruction.metric_directions(config)
        self.metadata: Mapping[str, Any] = {
            "classes": list(data.classes),
            "data": data.split("train").fingerprint,
            "validation_fingerprint": data.split("validation").fingerprint,
            "image_size": list(tokenizer.image_size),
            "channels": tokenizer.channels,
        }

    def step(self, step: int, batch: Batch) -> dict[str, Tensor]:
        """Move both players once; returns what to log."""
        total = ScalarAccumulator()
        self.model.train()
        for player in self.optimizer_steps.values():
            player.start()
        pieces = batch.chunk(self.config.accumulate)
        fakes = []
        for i, piece in enumerate(pieces, 1):
            with self.engine.accumulating(self.parallel_tokenizer, more=i < len(pieces)):
                fakes.append(self._tokenizer_backward(step, piece, total, 1 / len(pieces)))
        total.add(self.codebook_usage.end_step())
        total.add({"grad_norm": self.optimizer_steps["model"].step(total.values)})
        total.add(self._update_quantizer())
        if self.gan is not None and step >= self.gan.adversary.start_step:
            for i, (piece, fake) in enumerate(zip(pieces, fakes, strict=True), 1):
                with self.engine.accumulating(self.ddp_discriminator, more=i < len(pieces)):
                    self._discriminator_backward(step, piece, fake, total, 1 / len(pieces))
            total.add({"grad_norm/discriminator": self.optimizer_steps["discriminator"].step(total.values)})
        return total.values

    def evaluate(self, model: nn.Module) -> ValidationResult:
        """Reconstruct held-out images."""
        assert isinstance(model, Tokenizer)
        split, config = self.data.split("validation"), self.config
        count = min(config.evaluate.count or len(split), len(split))
        held_out = sequential_batches(
            split, config.batch_size, count=count, workers=config.workers, timeout=config.worker_timeout
        )
        return reconstruction.evaluate_and_preview(model, split, held_out, count, config, self.engine)

    def final_validation(self, model: nn.Module) -> ValidationResult:
        """Add nothing to the last look."""
        return ValidationResult({})

    def _tokenizer_backward(self, step: int, batch: Batch, logs: ScalarAccumulator, batch_weight: float) -> Tensor:
        images = batch.images
        assert images is not None
        with self.engine.autocast():
            out: TokenizerOutput = self.parallel_tokenizer(images)
        leaf = upcast(out.reconstructions.detach()).requires_grad_()
        terms = {name: loss(leaf, images) for name, loss in self.losses.items()}
        rec_loss = torch.stack([self.losses[name].weight * term for name, term in terms.items()]).sum()
        (gradient,) = torch.autograd.grad(rec_loss, leaf)
        logs.add({"loss": rec_loss + out.quantized.loss, **terms, "quantizer_loss": out.quantized.loss}, batch_weight)
        logs.add(out.quantized.stats, batch_weight)
        self.codebook_usage.update(out.quantized.indices)
        if self.gan is not None and (ramp := self.gan.adversary.weight_at(step)) > 0:
            gradient = gradient + ramp * self._adversarial_gradient(self.gan, leaf, out, gradient, logs, batch_weight)
        surrogate = (upcast(out.reconstructions) * gradient).sum() + out.quantized.loss
        (surrogate * batch_weight).backward()
        return leaf.detach()

    def _update_quantizer(self) -> dict[str, Tensor]:
        """Let the quantizer move what no gradient moves, if the step was taken."""
        update = getattr(self.model.quantizer, "update", None)
        return update() if update is not None and self.optimizer_steps["model"].stepped else {}

    def _adversarial_gradient(
        self,
        gan: GANModule,
        x_hat: Tensor,
        out: TokenizerOutput,
        rec_grad: Tensor,
        logs: ScalarAccumulator,
        batch_weight: float,
    ) -> Tensor:
        """Return the weighted gradient of the generator's loss at the reconstruction."""
        with no_param_grad(gan), self.engine.autocast():
            logits = upcast(gan(x_hat))
        fooling = gan.adversary.generator_loss(logits)
        (adversarial,) = torch.autograd.grad(fooling, x_hat)
        weight = gan.adversary.adaptive_weight(
            *comm.all_reduce_mean(self._last_layer_grads(out.features, rec_grad, adversarial))
        )
        logs.add({"g_loss": fooling, "gan_weight": weight}, batch_weight)
        return weight * adversarial

    def _last_layer_grads(self, features: Tensor, *output_grads: Tensor) -> Tensor:
        """Return the gradients of the last layer's weight, given those of its output, one behind the other."""
        layer = self.model.last_layer
        # They do not depend on the weights, of which a process may have only a share.
        blank = {name: output_grads[0].new_zeros(each.shape) for name, each in layer.named_parameters()}
        weight = blank["weight"].requires_grad_()
        output = functional_call(layer, blank, upcast(features.detach()))
        return torch.stack([torch.autograd.grad(output, weight, each, retain_graph=True)[0] for each in output_grads])

    def _discriminator_backward(
        self, step: int, batch: Batch, x_hat: Tensor, logs: ScalarAccumulator, batch_weight: float
    ) -> None:
        critic, images = self.gan, batch.images
        assert critic is not None and images is not None
        if critic.adversary.refresh_fakes:
            with torch.no_grad(), self.engine.autocast():
                x_hat = upcast(self.parallel_tokenizer(images).reconstructions)
        with self.engine.autocast():
            # One after the other: batch norm must not normalise real and fake by common statistics.
            real_logits, fake_logits = (upcast(each) for each in self.ddp_discriminator(images, x_hat))
        loss = critic.adversary.discriminator_loss(real_logits, fake_logits)
        judged = DiscriminatorOutput(critic, images, real_logits, fake_logits, step)
        terms = {name: each(judged) for name, each in critic.regularizers.items()}
        penalty = sum(critic.regularizers[name].weight * term for name, term in terms.items())
        ((loss + penalty) * batch_weight).backward()
        logits = {"logits_real": real_logits.mean(), "logits_fake": fake_logits.mean()}
        shown = {name: getattr(critic.regularizers[name], "last_value", term) for name, term in terms.items()}
        logs.add({"d_loss": loss, **logits, **shown}, batch_weight)

    def _build_optimizer_step(self, module: nn.Module, *others: nn.Module) -> OptimizerStep:
        trained = [parameter for parameter in module.parameters() if parameter.requires_grad]
        return OptimizerStep(build("optimizer", self.config.optimizer, params=trained), [module, *others], self.config)


def build_tokenizer_task(config: DictConfig, data: Data, engine: Engine) -> TokenizerTask:
    """Build both players, what they play for, and their optimizers.

    Raises:
        UserError: If only one of discriminator and adversary is chosen, or there is no loss.
    """
    model = config.model
    if (model.get("discriminator") is None) != (model.get("adversary") is None):
        raise UserError("model.discriminator and model.adversary go together: choose both, or null for both")
    if not group_nodes(model, "loss"):
        raise UserError("model.loss: a tokenizer needs at least one loss, model/loss=[l1]")
    check_accumulate(config)
    check_losses(config, channels := data_channels(data))
    torch.manual_seed(config.seed)
    tokenizer = engine.prepare(build_tokenizer(model, image_size(config), channels))
    losses = {name: engine.prepare(build("loss", node)) for name, node in group_nodes(model, "loss").items()}
    if critic := engine.prepare(build_gan(config, channels)):
        check_discriminator_input(critic, config, channels)
    return TokenizerTask(tokenizer, losses, critic, data, config, engine)


def check_losses(config: DictConfig, channels: int) -> None:
    """Refuse a loss that cannot compare the images of a config, of so many channels.

    Raises:
        UserError: One line that names the loss, and what to choose.
    """
    model, classes = config.model, target_is_class_map(config)
    what = f"maps of {channels} classes" if classes else f"images of {channels} channels"
    targets = {name: find_component("loss", node.name).target for name, node in group_nodes(model, "loss").items()}
    for name, target in targets.items():
        of_classes, known = getattr(target, "expects_logits", False), getattr(target, "channels", (channels,))
        if of_classes and not classes:
            raise UserError(f"model.loss.{name}: compares maps of classes, not {what}; model/loss=[l1] does")
        if channels not in known or (classes and hasattr(target, "channels")):
            raise UserError(
                f"model.loss.{name}: compares images of {' or '.join(map(str, known))} channels, not {what}; for "
                "maps of classes choose model/loss=[bce] model.discriminator=null model.adversary=null"
            )
        if of_classes and model.get("discriminator") is not None:
            raise UserError(
                f"model.loss.{name}: makes logits, which a discriminator tells from a map at sight; choose "
                "model.discriminator=null model.adversary=null"
            )
