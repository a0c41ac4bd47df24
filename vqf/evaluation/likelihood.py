"""The numbers of a prior: a likelihood where its loss is one."""

from collections.abc import Mapping
from typing import Any

from omegaconf import DictConfig

from vqf.protocols import Prior
from vqf.registry import find_component

PRIOR_DIRECTIONS = {"nats_per_token": False, "loss": False}  # whether higher is better, of priors of all kinds


def prior_scalars(prior: Prior, loss: float) -> dict[str, float]:
    """The validation numbers of a prior with this mean loss; the first one is what a sweep minimizes.

    Nats per token, and those of a uniform distribution; where the loss is no likelihood, the loss alone.
    """
    if not prior.likelihood:
        return {"loss": loss}
    return {"nats_per_token": loss, "uniform_nats": prior.layout.uniform_nats}


def prior_directions(config: DictConfig) -> dict[str, bool]:
    """Whether higher is better, for the number by which a checkpoint of the prior of a config is chosen."""
    prior: Any = find_component("prior", config.model.prior.name, "model.prior").target
    return {"nats_per_token" if prior.likelihood else "loss": False}


def objective(scalars: Mapping[str, float]) -> float:
    """The number that a sweep over priors minimizes."""
    return scalars["nats_per_token"] if "nats_per_token" in scalars else scalars["loss"]
