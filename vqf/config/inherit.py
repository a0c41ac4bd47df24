"""What a pipeline that acts on a run takes from that run, and what from the command line."""

from collections.abc import Sequence

from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import DictConfig, OmegaConf, open_dict

from vqf.config.untrusted import CLI_ONLY_KEYS

WHOLE_CONFIG_GROUPS = {"model", "experiment"}  # choices that decide every place


def inherit(config: DictConfig, run_config: DictConfig, keys: Sequence[str]) -> DictConfig:
    """Return `config` with some places taken from the config of a run, unless the command line names them.

    A group that is chosen (`data=folder`) replaces the run's node; a value that is set (`model.prior.layers=4`)
    changes the run's node; whatever is not named stays as the run had it, but for where files are written.

    Args:
        config: As composed for this command.
        run_config: As composed for the run, from its checkpoint.
        keys: Dotted keys, such as "data" and "model.prior".
    """
    result = config.copy()
    named = cli_keys()
    if WHOLE_CONFIG_GROUPS & set(named):
        return result
    with open_dict(result):
        for place in keys:
            if place not in named:
                OmegaConf.update(result, place, OmegaConf.select(run_config, place), merge=False, force_add=True)
                _drop_output_keys(result, place)
        for key in named:
            if any(key.startswith(f"{place}.") and place not in named for place in keys):
                OmegaConf.update(result, key, OmegaConf.select(config, key), merge=False, force_add=True)
    return result


def _drop_output_keys(config: DictConfig, config_key: str) -> None:
    """Take away where the run had files written, such as data.index: it may be somebody else's."""
    for word in CLI_ONLY_KEYS:
        if word.startswith(f"{config_key}.") and OmegaConf.select(config, word) is not None:
            OmegaConf.update(config, word, None)


def cli_keys() -> list[str]:
    """List the dotted keys that the command line sets; none outside of a Hydra job."""
    if not HydraConfig.initialized():
        return []
    overrides = OverridesParser.create().parse_overrides(list(HydraConfig.get().overrides.task))
    return [override.key_or_group.replace("/", ".") for override in overrides]
