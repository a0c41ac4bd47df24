"""Stage 1: train a tokenizer, with or without a discriminator.

VQGAN, https://arxiv.org/abs/2012.09841, equations 4 to 7, for an image x and its reconstruction x̂ = G(q(E(x))):

    L_VQ  = L_rec(x, x̂) + L_quantizer                     (4)  codebook and commitment terms
    L_GAN = log D(x) + log(1 - D(x̂))                      (5)  or hinge, as the adversary defines it
    min over E, G, Z  max over D  of  L_VQ + λ L_GAN        (6)
    λ = |∇ L_rec| / (|∇ L_GAN| + δ)                       (7)  gradients in the weight of the decoder's last layer

Without discriminator and adversary it is a VQ-VAE, https://arxiv.org/abs/1711.00937.
"""

from collections.abc import Callable, Mapping, Sequence
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
from vqf.models.tokenizer import Output, Tokenizer, TokenizerOutput, build_tokenizer
from vqf.protocols import (
    Data,
    DiscriminatorOutput,
    ExpectsLogits,
    LazyRegularizer,
    LimitedChannels,
    Loss,
    Updates,
)
from vqf.registry import build, find_component
from vqf.runs.checkpoint import default_output
from vqf.training.codebook_usage import CodebookUsage
from vqf.training.freezing import FrozenParts
from vqf.training.gan import GANModule, build_gan, check_discriminator_input, no_param_grad
from vqf.training.optimizer_step import OptimizerStep, ScalarAccumulator, check_accumulate


class TokenizerTask:
    """Trains the tokenizer and, from `adversary.start_step` on, the discriminator."""

    kind = "stage1"

    def __init__(
        self,
        tokenizer: Tokenizer,
        losses: Mapping[str, Loss],
        gan: GANModule | None,
        data: Data,
        config: DictConfig,
        engine: Engine,
        freeze: Sequence[str] = (),
    ) -> None:
        self.model, self.losses, self.gan = tokenizer, losses, gan
        self.frozen = FrozenParts(tokenizer, freeze)
        self.data, self.config, self.engine = data, config, engine
        # Before the optimizer is built: fsdp2 replaces the parameters.
        self.parallel_tokenizer = engine.parallelize(tokenizer, compiled=config.compile)
        self.codebook_usage = engine.prepare(CodebookUsage(tokenizer.layout))
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
            "output": tokenizer.output,
        }

    def step(self, step: int, batch: Batch) -> dict[str, Tensor]:
        logs = ScalarAccumulator()
        self.model.train()
        self.frozen.eval()
        for optimizer_step in self.optimizer_steps.values():
            optimizer_step.start()
        micro_batches = batch.chunk(self.config.accumulate)
        count = len(micro_batches)

        # The minimum of equation 6: the tokenizer.
        reconstructions = []
        for i, micro_batch in enumerate(micro_batches, 1):
            with self.engine.accumulating(self.parallel_tokenizer, more=i < count):
                reconstructions.append(self._tokenizer_backward(step, micro_batch, logs, 1 / count))
        logs.add(self.codebook_usage.end_step())
        logs.add({"grad_norm": self.optimizer_steps["model"].step(logs.values)})
        logs.add(self._update_quantizer())

        # The maximum of equation 6: the discriminator. Before its start nothing of it is computed.
        if self.gan is not None and step >= self.gan.adversary.start_step:
            for i, (micro_batch, x_hat) in enumerate(zip(micro_batches, reconstructions, strict=True), 1):
                with self.engine.accumulating(self.ddp_discriminator, more=i < count):
                    self._discriminator_backward(step, micro_batch, x_hat, logs, 1 / count)
            logs.add({"grad_norm/discriminator": self.optimizer_steps["discriminator"].step(logs.values)})
        return logs.values

    def _tokenizer_backward(self, step: int, batch: Batch, logs: ScalarAccumulator, batch_weight: float) -> Tensor:
        """Add the gradients of equation 6; returns the reconstructions, detached."""
        images = batch.images
        assert images is not None
        with self.engine.autocast():
            out: TokenizerOutput = self.parallel_tokenizer(images)

        # Equation 4, on a detached copy of x̂: its graph ends at x̂ and gives ∂L_rec/∂x̂.
        x_hat = upcast(out.reconstructions.detach()).requires_grad_()
        terms = {name: loss(x_hat, images) for name, loss in self.losses.items()}
        rec_loss = torch.stack([self.losses[name].weight * term for name, term in terms.items()]).sum()
        (gradient,) = torch.autograd.grad(rec_loss, x_hat)
        logs.add({"loss": rec_loss + out.quantized.loss, **terms, "quantizer_loss": out.quantized.loss}, batch_weight)
        logs.add(out.quantized.stats, batch_weight)
        self.codebook_usage.update(self.model.layout.flatten(out.quantized.indices))

        # + λ ∂L_GAN/∂x̂. `ramp` is 0 while the discriminator learns before its loss counts.
        if self.gan is not None and (ramp := self.gan.adversary.weight_at(step)) > 0:
            gradient = gradient + ramp * self._adversarial_gradient(self.gan, x_hat, out, gradient, logs, batch_weight)

        # The loss L(x̂) = L_rec + λ L_GAN has the gradient (∂L/∂x̂) ∂x̂/∂θ in the tokenizer's weights θ. `gradient` is
        # ∂L/∂x̂, a constant here, so (x̂ · gradient).sum() has the same gradient in θ. The graph of the tokenizer is
        # walked once, at the end, and no earlier `autograd.grad` has to retain it.
        surrogate = (upcast(out.reconstructions) * gradient).sum() + out.quantized.loss
        (surrogate * batch_weight).backward()
        return x_hat.detach()

    def _adversarial_gradient(
        self,
        gan: GANModule,
        x_hat: Tensor,
        out: TokenizerOutput,
        rec_grad: Tensor,
        logs: ScalarAccumulator,
        batch_weight: float,
    ) -> Tensor:
        """Return λ ∂L_GAN/∂x̂, with λ of equation 7, in the shape of x̂."""
        with no_param_grad(gan), self.engine.autocast():
            logits = upcast(gan(x_hat))
        g_loss = gan.adversary.generator_loss(logits)
        (gan_grad,) = torch.autograd.grad(g_loss, x_hat)
        # A rank knows the gradients of its own images only. Their norms, and so λ, would differ between ranks and from
        # one process with the full batch. The mean of the gradients over ranks is the gradient of the full batch.
        # Micro-batches are not averaged, each has its own λ: a common one would need all of their graphs in memory.
        last_layer_grads = comm.all_reduce_mean(self._last_layer_grads(out.features, rec_grad, gan_grad))
        weight = gan.adversary.adaptive_weight(*last_layer_grads)
        logs.add({"g_loss": g_loss, "gan_weight": weight}, batch_weight)
        return weight * gan_grad

    def _last_layer_grads(self, features: Tensor, *output_grads: Tensor) -> Tensor:
        """Turn output gradients into those of the last layer's weight, stacked in front."""
        layer = self.model.last_layer
        # The layer is linear in its weight, so the gradient does not depend on the weight's value. Zeros stand in for
        # it, because under fsdp2 this rank holds only a shard.
        zeros = {name: output_grads[0].new_zeros(param.shape) for name, param in layer.named_parameters()}
        weight = zeros["weight"].requires_grad_()
        output = functional_call(layer, zeros, upcast(features.detach()))
        return torch.stack([torch.autograd.grad(output, weight, grad, retain_graph=True)[0] for grad in output_grads])

    def _update_quantizer(self) -> dict[str, Tensor]:
        quantizer = self.model.quantizer
        if not isinstance(quantizer, Updates) or quantizer in self.frozen:
            return {}
        return quantizer.update() if self.optimizer_steps["model"].stepped else {}

    def _discriminator_backward(
        self, step: int, batch: Batch, x_hat: Tensor, logs: ScalarAccumulator, batch_weight: float
    ) -> None:
        gan, images = self.gan, batch.images
        assert gan is not None and images is not None
        if gan.adversary.refresh_fakes:  # as the published code: reconstruct again with the updated tokenizer
            with torch.no_grad(), self.engine.autocast():
                x_hat = upcast(self.parallel_tokenizer(images).reconstructions)
        with self.engine.autocast():
            # Two forwards in one call: batch norm normalizes real and fake separately, and DDP sees one forward.
            real_logits, fake_logits = map(upcast, self.ddp_discriminator(images, x_hat))
        loss = gan.adversary.discriminator_loss(real_logits, fake_logits)
        output = DiscriminatorOutput(gan, images, real_logits, fake_logits, step)
        terms = {name: regularizer(output) for name, regularizer in gan.regularizers.items()}
        penalty = sum(gan.regularizers[name].weight * term for name, term in terms.items())
        ((loss + penalty) * batch_weight).backward()
        logits = {"logits_real": real_logits.mean(), "logits_fake": fake_logits.mean()}
        # A lazy regularizer is 0 on most steps; the log shows the value that it had last.
        penalties = {name: _last_value(gan.regularizers[name], term) for name, term in terms.items()}
        logs.add({"d_loss": loss, **logits, **penalties}, batch_weight)

    def evaluate(self, model: nn.Module) -> ValidationResult:
        assert isinstance(model, Tokenizer)
        split, config = self.data.split("validation"), self.config
        count = min(config.evaluate.count or len(split), len(split))
        batches = sequential_batches(
            split, config.batch_size, count=count, workers=config.workers, timeout=config.worker_timeout
        )
        return reconstruction.evaluate_and_preview(model, split, batches, count, config, self.engine)

    def final_validation(self, model: nn.Module) -> ValidationResult:
        return ValidationResult({})

    def _build_optimizer_step(self, module: nn.Module, *others: nn.Module) -> OptimizerStep:
        trained = [parameter for parameter in module.parameters() if parameter.requires_grad]
        return OptimizerStep(build("optimizer", self.config.optimizer, params=trained), [module, *others], self.config)


def _last_value(regularizer: object, term: Tensor) -> Tensor:
    return regularizer.last_value if isinstance(regularizer, LazyRegularizer) else term


def build_tokenizer_task(
    config: DictConfig,
    data: Data,
    engine: Engine,
    freeze: Sequence[str] = (),
    initialize: Callable[[Tokenizer, GANModule | None], None] | None = None,
) -> TokenizerTask:
    """Build the task of a config.

    Args:
        freeze: See `FrozenParts`.
        initialize: Loads the weights from which training starts.

    Raises:
        UserError: If the losses are incomplete or do not fit the images.
    """
    model = config.model
    if (model.get("discriminator") is None) != (model.get("adversary") is None):
        raise UserError("model.discriminator and model.adversary go together: choose both, or null for both")
    if not group_nodes(model, "loss"):
        raise UserError("model.loss: a tokenizer needs at least one loss, model/loss=[l1]")
    check_accumulate(config)
    check_losses(config, channels := data_channels(data))
    torch.manual_seed(config.seed)
    output: Output = "logits" if target_is_class_map(config) else default_output(channels)
    tokenizer = engine.prepare(build_tokenizer(model, image_size(config), channels, output))
    losses = {name: engine.prepare(build("loss", node)) for name, node in group_nodes(model, "loss").items()}
    if gan := engine.prepare(build_gan(config, channels, image_size(config))):
        check_discriminator_input(gan, config, channels)
    if initialize is not None:
        initialize(tokenizer, gan)
    return TokenizerTask(tokenizer, losses, gan, data, config, engine, freeze)


def check_losses(config: DictConfig, channels: int) -> None:
    """Refuse a loss that cannot compare images of so many channels.

    Raises:
        UserError: If there is one.
    """
    model, is_class_map = config.model, target_is_class_map(config)
    target = f"class maps of {channels} classes" if is_class_map else f"images of {channels} channels"
    loss_classes = {name: find_component("loss", node.name).target for name, node in group_nodes(model, "loss").items()}
    for name, loss_class in loss_classes.items():
        expects_logits = isinstance(loss_class, ExpectsLogits) and loss_class.expects_logits
        supported = loss_class.channels if isinstance(loss_class, LimitedChannels) else (channels,)
        if expects_logits and not is_class_map:
            raise UserError(f"model.loss.{name}: compares class maps, not {target}; choose model/loss=[l1]")
        if channels not in supported or (is_class_map and isinstance(loss_class, LimitedChannels)):
            raise UserError(
                f"model.loss.{name}: compares images of {' or '.join(map(str, supported))} channels, not {target}; for "
                "class maps choose model/loss=[bce] model.discriminator=null model.adversary=null"
            )
        if expects_logits and model.get("discriminator") is not None:
            raise UserError(
                f"model.loss.{name}: trains the decoder to output logits, which a discriminator tells from a class map "
                "at once; choose model.discriminator=null model.adversary=null"
            )
