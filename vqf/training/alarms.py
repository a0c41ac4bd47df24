"""Alarms in words: what goes wrong in the training of tokenizers, and which option to turn.

Users of VQGAN complain of two things first: codes that die, and reconstructions ruined when the discriminator starts
(CompVis/taming-transformers#44, #93; thuanz123/enhancing-transformers#18). Both show in the numbers before they show
in the pictures.
"""

from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from vqf.terminal import log

PATIENCE = 5  # looks in a row before an alarm; one bad batch is no trend
LESSONS = 25  # the same, where a discriminator that has just begun is no trend either
Node = Mapping[str, Any]


@dataclass(frozen=True)
class Alarm:
    """A condition on logged numbers, and what to say when it has held for `patience` looks in a row."""

    name: str
    keys: tuple[str, ...]  # the numbers that it looks at; a look without them does not count
    holds: Callable[..., bool]
    words: str
    patience: int = PATIENCE


def alarms(model: Node) -> list[Alarm]:
    """Return the alarms for a model, whose words name options that it has."""
    found = codebook_alarms(model.get("quantizer") or {})
    adversary = model.get("adversary")
    return found if adversary is None else found + game_alarms(adversary)


def codebook_alarms(quantizer: Node) -> list[Alarm]:
    """Return what can go wrong with codes."""
    cure = revival(quantizer)
    return [
        Alarm(
            "codes die",
            ("spread", "usage"),
            lambda spread, usage: spread < 0.2,
            "less than a fifth of the codes are in use that as many latents would use by chance ('dead' counts the "
            f"others): {cure}, or fewer codes with model.quantizer.codebook_size",
        ),
        Alarm(
            "collapse",
            ("perplexity",),
            lambda perplexity: perplexity < 2,
            f"every latent falls on one or two codes (perplexity below 2): lower optimizer.lr, or {cure}",
        ),
    ]


def revival(quantizer: Node) -> str:
    """Say what brings codes back, by the options that a quantizer has."""
    if "revive" in quantizer:
        now = quantizer["revive"] or 0
        start = " model.quantizer.start=kmeans" if quantizer.get("start") != "kmeans" else ""
        return f"revive them with model.quantizer.revive={max(0.03, 3 * now):g}{start}"
    if "kl_weight" in quantizer:
        return "raise model.quantizer.kl_weight, which pulls towards all codes"
    return "choose model/quantizer=ema, which revives dead codes"


def game_alarms(adversary: Node) -> list[Alarm]:
    """Return what can go wrong between the two players."""
    weak = "Give it time before it counts with model.adversary.warmup"
    found = [
        Alarm(
            "discriminator wins",
            ("discriminator",),
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
            LESSONS,
        ),
    ]
    if not adversary.get("adaptive"):
        return found
    limit = adversary["weight"] * adversary["clamp"]
    if 0 < limit <= 1e3:
        words = f"the adaptive weight of the GAN term is at its limit, model.adversary.clamp={adversary['clamp']:g}"
        bound, cure = 0.999 * limit, ""
    else:
        words, bound, cure = (
            "the adaptive weight of the GAN term is above 1,000",
            1e3,
            ", or set model.adversary.clamp=10",
        )
    words = f"{words}: the discriminator gives almost no gradient. {weak}{cure}"
    return [*found, Alarm("adaptive weight", ("gan_weight",), lambda weight: weight >= bound, words)]


class Watch:
    """Looks at the numbers of a run and raises each alarm once, until its condition has gone again."""

    def __init__(self, alarms: list[Alarm]) -> None:
        self.alarms = alarms
        self.recent = {alarm.name: deque[bool](maxlen=alarm.patience) for alarm in alarms}
        self.raised: set[str] = set()

    def state(self) -> dict[str, Any]:
        """Return what a resumed run must know to raise the same alarms."""
        return {"recent": {name: list(each) for name, each in self.recent.items()}, "raised": sorted(self.raised)}

    def load(self, state: Mapping[str, Any]) -> None:
        """Go on from what `state` gave, or from nothing."""
        for name, recent in self.recent.items():
            recent.clear()
            recent.extend(state.get("recent", {}).get(name, ()))
        self.raised = set(state.get("raised", ()))

    def look(self, step: int, values: Mapping[str, float]) -> list[str]:
        """Take in the numbers of one look; logs and returns the alarms that they raise."""
        said = [f"step {step}: {alarm.words}" for alarm in self.alarms if self._raises(alarm, values)]
        for line in said:
            log.warning("%s", line)
        return said

    def _raises(self, alarm: Alarm, values: Mapping[str, float]) -> bool:
        if not all(key in values for key in alarm.keys):
            return False
        recent = self.recent[alarm.name]
        recent.append(alarm.holds(*(values[key] for key in alarm.keys)))
        if not any(recent):
            self.raised.discard(alarm.name)
        if alarm.name in self.raised or len(recent) < alarm.patience or not all(recent):
            return False
        self.raised.add(alarm.name)
        return True
