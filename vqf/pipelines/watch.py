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


@dataclass(frozen=True)
class Alarm:
    """A condition on a logged number, and what to say when it has held for `PATIENCE` looks in a row."""

    key: str  # the number that it looks at
    holds: Callable[[float], bool]
    words: str


ALARMS = (
    Alarm(
        "discriminator",
        lambda loss: loss < 0.02,
        "the discriminator tells every reconstruction from its image (its loss is below 0.02), so the generator learns "
        "nothing from it: lower model.adversary.weight, start later with model.adversary.start, "
        "or hold it back with +model/regularizer=[lecam]",
    ),
    Alarm(
        "gan_weight",
        lambda weight: weight > 1e3,
        "the adaptive weight of the GAN term is above 1,000: the discriminator gives almost no gradient. "
        "Give it time before it counts with model.adversary.warmup, or set model.adversary.clamp=10",
    ),
    Alarm(
        "validation/usage",
        lambda usage: usage < 0.2,
        "less than a fifth of the codebook is in use on held-out pictures: choose model/quantizer=ema, which revives "
        "dead codes, or fewer codes with model.quantizer.codebook_size",
    ),
    Alarm(
        "perplexity",
        lambda perplexity: perplexity < 2,
        "every latent falls on one or two codes (perplexity below 2): lower optimizer.lr, "
        "or choose model/quantizer=ema",
    ),
)


class Watch:
    """Looks at the numbers of a run and raises each alarm once, until its condition has gone again."""

    def __init__(self, alarms: tuple[Alarm, ...] = ALARMS) -> None:
        self.alarms = alarms
        self.recent = {alarm.key: deque[bool](maxlen=PATIENCE) for alarm in alarms}
        self.raised: set[str] = set()

    def state(self) -> dict[str, Any]:
        """Return what a resumed run must know to raise the same alarms."""
        return {"recent": {key: list(each) for key, each in self.recent.items()}, "raised": sorted(self.raised)}

    def load(self, state: Mapping[str, Any]) -> None:
        """Go on from what `state` gave, or from nothing."""
        for key, recent in self.recent.items():
            recent.clear()
            recent.extend(state.get("recent", {}).get(key, ()))
        self.raised = set(state.get("raised", ()))

    def look(self, step: int, values: Mapping[str, float]) -> list[str]:
        """Take in the numbers of one look; logs and returns the alarms that they raise."""
        said = [
            f"step {step}: {alarm.words}"
            for alarm in self.alarms
            if alarm.key in values and self._raises(alarm, values)
        ]
        for line in said:
            log.warning("%s", line)
        return said

    def _raises(self, alarm: Alarm, values: Mapping[str, float]) -> bool:
        recent = self.recent[alarm.key]
        recent.append(alarm.holds(values[alarm.key]))
        if not any(recent):
            self.raised.discard(alarm.key)
        if alarm.key in self.raised or len(recent) < PATIENCE or not all(recent):
            return False
        self.raised.add(alarm.key)
        return True
