"""Alarms: conditions on logged scalars that mean a tokenizer training fails, and which option helps.

Codes die, or the discriminator ruins reconstructions (CompVis/taming-transformers#44, #93;
thuanz123/enhancing-transformers#18).
"""

from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from vqf.registry import find_component
from vqf.terminal import log

PATIENCE = 5  # observations in a row before an alarm; one bad batch is no trend
GAN_PATIENCE = 25  # the same for a discriminator that cannot tell real from fake, which is normal at its start
ConfigNode = Mapping[str, Any]


@dataclass(frozen=True)
class Alarm:
    """A condition on logged scalars that warns once it has held for `patience` observations in a row."""

    name: str
    keys: tuple[str, ...]  # log keys; their values are the arguments of `condition`. Lines without them do not count
    condition: Callable[..., bool]
    message: str
    patience: int = PATIENCE


def build_alarms(model: ConfigNode) -> list[Alarm]:
    """Return the alarms for a `model` node."""
    alarms = codebook_alarms(model.get("quantizer") or {})
    adversary = model.get("adversary")
    return alarms if adversary is None else alarms + gan_alarms(adversary)


def codebook_alarms(quantizer: ConfigNode) -> list[Alarm]:
    """Return the alarms of a codebook; of a quantizer over others, such as `residual`, of its base."""
    key = "model.quantizer"
    while isinstance(quantizer.get("base"), Mapping):
        defaults = find_component("quantizer", quantizer["base"].get("name")).options  # a base holds what differs
        quantizer = {name: option.default for name, option in defaults.items()} | dict(quantizer["base"])
        key = f"{key}.base"
    hint = revival_hint(quantizer, key)
    size = next((option for option in ("codebook_size", "levels", "dim") if option in quantizer), "codebook_size")
    return [
        Alarm(
            "codes die",
            ("usage_vs_chance",),
            lambda usage_vs_chance: usage_vs_chance < 0.2,
            "codes die: fewer are used than a fifth of what random assignment would use ('usage_vs_chance' below 0.2; "
            f"'dead_codes' counts the others): {hint}, or fewer codes with {key}.{size}",
        ),
        Alarm(
            "collapse",
            ("perplexity",),
            lambda perplexity: perplexity < 2,
            f"codebook collapse: all latents use one or two codes (perplexity below 2): lower optimizer.lr, or {hint}",
        ),
    ]


def revival_hint(quantizer: ConfigNode, key: str = "model.quantizer") -> str:
    """Return which options of the quantizer at `key` revive dead codes."""
    if "revive" in quantizer:
        rate = quantizer["revive"] or 0
        init = f" {key}.init=kmeans" if quantizer.get("init") != "kmeans" else ""
        return f"revive them with {key}.revive={max(0.03, 3 * rate):g}{init}"
    if "diversity" in quantizer:
        return f"raise {key}.diversity or {key}.entropy, which pull towards all codes"
    if "kl_weight" in quantizer:
        return f"raise {key}.kl_weight, which pulls towards all codes"
    return "choose model/quantizer=ema, which revives dead codes"


def gan_alarms(adversary: ConfigNode) -> list[Alarm]:
    """Return the alarms of GAN training."""
    alarms = [
        Alarm(
            "discriminator wins",
            ("d_loss",),
            lambda loss: loss < 0.02,
            "the discriminator tells every reconstruction from its image (d_loss below 0.02), so the tokenizer learns "
            "nothing from it: lower model.adversary.weight, start later with model.adversary.start, or regularize it "
            "with +model/regularizer=[lecam]",
        ),
        Alarm(
            "discriminator knows nothing",
            ("logits_real", "logits_fake"),
            lambda real, fake: abs(real - fake) < 0.01,
            "the discriminator's logits are the same for images and reconstructions, so its loss stays at chance: "
            "raise optimizer.lr or model.discriminator.channels",
            GAN_PATIENCE,
        ),
    ]
    return [*alarms, adaptive_weight_alarm(adversary)] if adversary.get("adaptive") else alarms


def adaptive_weight_alarm(adversary: ConfigNode) -> Alarm:
    """Return the alarm of an adaptive weight λ at its limit or above 1,000."""
    limit = adversary["weight"] * adversary["max_weight"]
    if 0 < limit <= 1e3:
        problem = f"is at its limit, model.adversary.max_weight={adversary['max_weight']:g}"
        threshold, hint = 0.999 * limit, ""
    else:
        problem, threshold, hint = "is above 1,000", 1e3, ", or set model.adversary.max_weight=10"
    message = (
        f"the adaptive weight of the GAN loss {problem}: the discriminator gives almost no gradient. "
        f"Train it longer before its loss counts, with model.adversary.warmup{hint}"
    )
    return Alarm("adaptive weight", ("gan_weight",), lambda weight: weight >= threshold, message)


class AlarmMonitor:
    """Checks the alarms; one is raised again only after its condition has cleared."""

    def __init__(self, alarms: list[Alarm]) -> None:
        self.alarms = alarms
        self.recent = {alarm.name: deque[bool](maxlen=alarm.patience) for alarm in alarms}
        self.raised: set[str] = set()

    def state_dict(self) -> dict[str, Any]:
        recent = {name: list(observations) for name, observations in self.recent.items()}
        return {"recent": recent, "raised": sorted(self.raised)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Load a state; an empty one resets."""
        for name, recent in self.recent.items():
            recent.clear()
            recent.extend(state.get("recent", {}).get(name, ()))
        self.raised = set(state.get("raised", ()))

    def check(self, step: int, values: Mapping[str, float]) -> list[str]:
        """Observe one log line; logs and returns the messages of raised alarms."""
        messages = [f"step {step}: {alarm.message}" for alarm in self.alarms if self._raises(alarm, values)]
        for message in messages:
            log.warning("%s", message)
        return messages

    def _raises(self, alarm: Alarm, values: Mapping[str, float]) -> bool:
        if not all(key in values for key in alarm.keys):
            return False
        recent = self.recent[alarm.name]
        recent.append(alarm.condition(*(values[key] for key in alarm.keys)))
        if not any(recent):
            self.raised.discard(alarm.name)
        if alarm.name in self.raised or len(recent) < alarm.patience or not all(recent):
            return False
        self.raised.add(alarm.name)
        return True
