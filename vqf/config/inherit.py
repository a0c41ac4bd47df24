"""Which options a pipeline takes from its `run=`."""

from collections.abc import Sequence

from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import DictConfig, OmegaConf, open_dict

from vqf.config.untrusted import CLI_ONLY_KEYS

ABSENT = object()  # an option that an older run does not have
WHOLE_CONFIG_GROUPS = {"model", "experiment"}  # their presets set every key


def inherit(config: DictConfig, run_config: DictConfig, keys: Sequence[str]) -> DictConfig:
    """Copy `config` with the nodes at `keys` from a run's config, unless the command line sets them.

    A component chosen there (`data=folder`) replaces the run's node, an option (`model.prior.layers=4`) changes it.
    Output paths are reset.
    """
    result = config.copy()
    set_keys = cli_keys()
    if WHOLE_CONFIG_GROUPS & set(set_keys):
        return result
    with open_dict(result):
        for key in keys:
            if key not in set_keys and (value := OmegaConf.select(run_config, key, default=ABSENT)) is not ABSENT:
                OmegaConf.update(result, key, value, merge=False, force_add=True)
                _drop_output_keys(result, key)
        for option in set_keys:
            if any(option.startswith(f"{key}.") and key not in set_keys for key in keys):
                OmegaConf.update(result, option, OmegaConf.select(config, option), merge=False, force_add=True)
    return result


def _drop_output_keys(config: DictConfig, config_key: str) -> None:
    """Somebody else's run must not choose where to write."""
    for key in CLI_ONLY_KEYS:
        if key.startswith(f"{config_key}.") and OmegaConf.select(config, key) is not None:
            OmegaConf.update(config, key, None)


def cli_keys() -> list[str]:
    """Dotted keys that the command line sets."""
    if not HydraConfig.initialized():
        return []
    overrides = OverridesParser.create().parse_overrides(list(HydraConfig.get().overrides.task))
    return [override.key_or_group.replace("/", ".") for override in overrides]
