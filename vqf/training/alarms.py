"""Alarms in words: what goes wrong in the training of tokenizers, and which option to turn.

Users of VQGAN complain of two things first: codes that die, and reconstructions ruined when the discriminator starts
(CompVis/taming-transformers#44, #93; thuanz123/enhancing-transformers#18). Both show in the numbers before they show
in the images.
"""

from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from vqf.terminal import log

PATIENCE = 5  # looks in a row before an alarm; one bad batch is no trend
GAN_PATIENCE = 25  # the same, where a discriminator that has just begun is no trend either
ConfigNode = Mapping[str, Any]


@dataclass(frozen=True)
class Alarm:
    """A condition on logged numbers, and what to say when it has held for `patience` looks in a row."""

    name: str
    keys: tuple[str, ...]  # the numbers that it looks at; a look without them does not count
    condition: Callable[..., bool]
    message: str
    patience: int = PATIENCE


def build_alarms(model: ConfigNode) -> list[Alarm]:
    """Return the alarms for a model, whose words name options that it has."""
    found = codebook_alarms(model.get("quantizer") or {})
    adversary = model.get("adversary")
    return found if adversary is None else found + gan_alarms(adversary)


def codebook_alarms(quantizer: ConfigNode) -> list[Alarm]:
    """Return what can go wrong with codes."""
    cure = revival_hint(quantizer)
    return [
        Alarm(
            "codes die",
            ("usage_vs_chance", "usage"),
            lambda usage_vs_chance, usage: usage_vs_chance < 0.2,
            "less than a fifth of the codes are in use that as many latents would use by chance ('dead_codes' "
            "counts the "
            f"others): {cure}, or fewer codes with model.quantizer.codebook_size",
        ),
        Alarm(
            "collapse",
            ("perplexity",),
            lambda perplexity: perplexity < 2,
            f"every latent falls on one or two codes (perplexity below 2): lower optimizer.lr, or {cure}",
        ),
    ]


def revival_hint(quantizer: ConfigNode) -> str:
    """Say what brings codes back, by the options that a quantizer has."""
    if "revive" in quantizer:
        now = quantizer["revive"] or 0
        start = " model.quantizer.init=kmeans" if quantizer.get("init") != "kmeans" else ""
        return f"revive them with model.quantizer.revive={max(0.03, 3 * now):g}{start}"
    if "kl_weight" in quantizer:
        return "raise model.quantizer.kl_weight, which pulls towards all codes"
    return "choose model/quantizer=ema, which revives dead codes"


def gan_alarms(adversary: ConfigNode) -> list[Alarm]:
    """Return what can go wrong between the two players."""
    weak = "Give it time before it counts with model.adversary.warmup"
    found = [
        Alarm(
            "discriminator wins",
            ("d_loss",),
            lambda loss: loss < 0.02,
            "the discriminator tells every reconstruction from its image (its loss is below 0.02), so the generator "
            "learns nothing from it: lower model.adversary.weight, start later with model.adversary.start, "
            "or hold it back with +model/regularizer=[lecam]",
        ),
        Alarm(
            "discriminator knows nothing",
            ("logits_real", "logits_fake"),
            lambda real, fake: abs(real - fake) < 0.01,
            "the discriminator's logits are the same for images and reconstructions, so its loss stays where chance "
            "has it: raise optimizer.lr or model.discriminator.channels",
            GAN_PATIENCE,
        ),
    ]
    if not adversary.get("adaptive"):
        return found
    limit = adversary["weight"] * adversary["max_weight"]
    if 0 < limit <= 1e3:
        limit_word = f"model.adversary.max_weight={adversary['max_weight']:g}"
        words = f"the adaptive weight of the GAN term is at its limit, {limit_word}"
        bound, cure = 0.999 * limit, ""
    else:
        words, bound, cure = (
            "the adaptive weight of the GAN term is above 1,000",
            1e3,
            ", or set model.adversary.max_weight=10",
        )
    words = f"{words}: the discriminator gives almost no gradient. {weak}{cure}"
    return [*found, Alarm("adaptive weight", ("gan_weight",), lambda weight: weight >= bound, words)]


class AlarmMonitor:
    """Looks at the numbers of a run and raises each alarm once, until its condition has gone again."""

    def __init__(self, alarms: list[Alarm]) -> None:
        self.alarms = alarms
        self.recent = {alarm.name: deque[bool](maxlen=alarm.patience) for alarm in alarms}
        self.raised: set[str] = set()

    def state_dict(self) -> dict[str, Any]:
        """Return what a resumed run must know to raise the same alarms."""
        return {"recent": {name: list(each) for name, each in self.recent.items()}, "raised": sorted(self.raised)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from what `state_dict` gave, or from nothing."""
        for name, recent in self.recent.items():
            recent.clear()
            recent.extend(state.get("recent", {}).get(name, ()))
        self.raised = set(state.get("raised", ()))

    def check(self, step: int, values: Mapping[str, float]) -> list[str]:
        """Take in the numbers of one look; logs and returns the alarms that they raise."""
        said = [f"step {step}: {alarm.message}" for alarm in self.alarms if self._raises(alarm, values)]
        for line in said:
            log.warning("%s", line)
        return said

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
