"""Scorers: which of several samples is kept.

Rejection sampling as in Generating Diverse High-Fidelity Images with VQ-VAE-2, https://arxiv.org/abs/1906.00446,
section 3.3: what a judge likes better is shown. It buys quality with variety.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from vqf.errors import UserError
from vqf.networks.perceptual import LITE_SCALE, LITE_SHIFT, efficientnet_lite_classifier
from vqf.protocols import ScoredSamples
from vqf.registry import register

IMAGENET_CLASSES = 1000
INPUT_SIZE = 260  # what EfficientNet-Lite2 was trained on


@register("scorer", "likelihood")
class LikelihoodScorer:
    """How likely the prior itself calls a sample: log p per token, in nats.

    It favours what is plain: flat images are likely ones.
    """

    @torch.no_grad()
    def __call__(self, samples: ScoredSamples) -> Tensor:
        """Return (B,) in nats per token.

        Raises:
            UserError: If samples are larger than what the prior models at once.
        """
        if samples.prefix is None:
            raise UserError("scorer=likelihood: these images are larger than what the prior has learned")
        logits = samples.prior(samples.tokens, samples.prefix)
        chosen = logits.float().log_softmax(-1).gather(-1, samples.tokens[..., None])
        return chosen[..., 0].mean(1)


@register("scorer", "imagenet")
class ImageNetScorer:
    """How sure EfficientNet-Lite2 is that a sample is of its class: log p of the label, in nats.

    As section 4.4 of the paper of VQGAN does with another classifier. For priors that are conditioned on the 1,000
    classes of ImageNet in the order of their folders' names.
    """

    def __init__(self) -> None:
        self.network = efficientnet_lite_classifier("lite2")

    @torch.no_grad()
    def __call__(self, samples: ScoredSamples) -> Tensor:
        """Return (B,) in nats.

        Raises:
            UserError: If samples have no label among those classes.
        """
        if samples.labels is None or len(samples.classes) != IMAGENET_CLASSES:
            raise UserError(
                f"scorer=imagenet: the prior has {len(samples.classes)} classes, not ImageNet's {IMAGENET_CLASSES:,}"
            )
        network = self.network.to(samples.images.device)
        images = F.interpolate(samples.images.float(), size=(INPUT_SIZE, INPUT_SIZE), mode="bicubic", antialias=True)
        scores = network(images * LITE_SCALE + LITE_SHIFT).log_softmax(-1)
        return scores.gather(1, samples.labels[:, None])[:, 0]
