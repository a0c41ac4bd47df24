"""Scorers choose the best of several samples.

Generating Diverse High-Fidelity Images with VQ-VAE-2, https://arxiv.org/abs/1906.00446, section 3.3.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from vqf.errors import UserError
from vqf.networks.perceptual import LITE_SCALE, LITE_SHIFT, efficientnet_lite_classifier
from vqf.protocols import ScoredSamples
from vqf.registry import register

IMAGENET_CLASSES = 1000
INPUT_SIZE = 260  # pixels, as EfficientNet-Lite2 was trained


@register("scorer", "likelihood")
class LikelihoodScorer:
    """The mean log p of a token under the prior, in nats; it favors flat images."""

    @torch.no_grad()
    def __call__(self, samples: ScoredSamples) -> Tensor:
        """Score samples, (B,).

        Raises:
            UserError: If the prior has no likelihood, or the images are larger than those of its training.
        """
        if not samples.prior.likelihood:
            raise UserError("scorer=likelihood: this prior has no likelihood; choose scorer=imagenet, or candidates=1")
        if samples.prefix is None:
            raise UserError("scorer=likelihood: these images are larger than those that the prior was trained on")
        logits = samples.prior(samples.tokens, samples.prefix)
        chosen = logits.float().log_softmax(-1).gather(-1, samples.tokens[..., None])
        return chosen[..., 0].mean(1)


@register("scorer", "imagenet")
class ImageNetScorer:
    """The log p of a sample's label under EfficientNet-Lite2, in nats.

    The classes must be the 1,000 of ImageNet, in the order of their folder names.
    """

    def __init__(self) -> None:
        self.network = efficientnet_lite_classifier("lite2")

    @torch.no_grad()
    def __call__(self, samples: ScoredSamples) -> Tensor:
        """Score samples, (B,).

        Raises:
            UserError: If the samples have no labels, or other classes.
        """
        if samples.labels is None or len(samples.classes) != IMAGENET_CLASSES:
            raise UserError(
                f"scorer=imagenet: the prior has {len(samples.classes)} classes, not ImageNet's {IMAGENET_CLASSES:,}"
            )
        network = self.network.to(samples.images.device)
        images = F.interpolate(samples.images.float(), size=(INPUT_SIZE, INPUT_SIZE), mode="bicubic", antialias=True)
        scores = network(images * LITE_SCALE + LITE_SHIFT).log_softmax(-1)
        return scores.gather(1, samples.labels[:, None])[:, 0]
