"""What a pipeline that acts on a run takes from that run, and what from the command line."""

from collections.abc import Sequence

from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import DictConfig, OmegaConf, open_dict

from vqf.config.untrusted import OWN_WORDS

WHOLE = {"model", "experiment"}  # choices that decide every place


def inherit(config: DictConfig, run: DictConfig, places: Sequence[str]) -> DictConfig:
    """Return `config` with some places taken from the config of a run, unless the command line names them.

    A group that is chosen (`data=folder`) replaces the run's node; a value that is set (`model.prior.layers=4`)
    changes the run's node; whatever is not named stays as the run had it, but for where files are written.

    Args:
        config: As composed for this command.
        run: As composed for the run, from its checkpoint.
        places: Dotted keys, such as "data" and "model.prior".
    """
    result = config.copy()
    named = given()
    if WHOLE & set(named):
        return result
    with open_dict(result):
        for place in places:
            if place not in named:
                OmegaConf.update(result, place, OmegaConf.select(run, place), merge=False, force_add=True)
                _forget_places(result, place)
        for key in named:
            if any(key.startswith(f"{place}.") and place not in named for place in places):
                OmegaConf.update(result, key, OmegaConf.select(config, key), merge=False, force_add=True)
    return result


def _forget_places(config: DictConfig, place: str) -> None:
    """Take away where the run had files written, such as data.index: it may be somebody else's."""
    for word in OWN_WORDS:
        if word.startswith(f"{place}.") and OmegaConf.select(config, word) is not None:
            OmegaConf.update(config, word, None)


def given() -> list[str]:
    """List the dotted keys that the command line sets; none outside of a Hydra job."""
    if not HydraConfig.initialized():
        return []
    overrides = OverridesParser.create().parse_overrides(list(HydraConfig.get().overrides.task))
    return [override.key_or_group.replace("/", ".") for override in overrides]
