"""The adversarial objectives against their formulas, and their schedule."""

import math

import pytest
import torch

from vqf.losses.adversarial import Hinge, LeastSquares, NonSaturating, Vanilla


def logits() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(4, 1, 3, 3, generator=generator).double() * 2, torch.randn(
        4, 1, 3, 3, generator=generator
    ).double()


def test_hinge_is_its_formula() -> None:
    real, fake = logits()
    loss = sum(max(0.0, 1 - x) for x in real.flatten().tolist()) / real.numel()
    loss += sum(max(0.0, 1 + x) for x in fake.flatten().tolist()) / fake.numel()
    assert float(Hinge(10).discriminator_loss(real, fake)) == pytest.approx(loss / 2, rel=1e-12)
    assert float(Hinge(10).generator_loss(fake)) == pytest.approx(-float(fake.mean()), rel=1e-12)


def test_vanilla_is_binary_cross_entropy() -> None:
    real, fake = logits()
    loss = -sum(math.log(1 / (1 + math.exp(-x))) for x in real.flatten().tolist()) / real.numel()
    loss -= sum(math.log(1 - 1 / (1 + math.exp(-x))) for x in fake.flatten().tolist()) / fake.numel()
    assert float(Vanilla(10).discriminator_loss(real, fake)) == pytest.approx(loss / 2, rel=1e-12)


def test_non_saturating_is_binary_cross_entropy_with_the_targets_the_right_way_round() -> None:
    """torch's loss with targets: images 1, reconstructions 0; for the generator, reconstructions 1."""
    real, fake = logits()
    entropy = torch.nn.functional.binary_cross_entropy_with_logits
    expected = entropy(real, torch.ones_like(real)) + entropy(fake, torch.zeros_like(fake))
    torch.testing.assert_close(NonSaturating(10).discriminator_loss(real, fake), expected, rtol=1e-12, atol=0)
    torch.testing.assert_close(NonSaturating(10).generator_loss(fake), entropy(fake, torch.ones_like(fake)))


def test_least_squares_is_its_formula() -> None:
    real, fake = logits()
    loss = sum((x - 1) ** 2 for x in real.flatten().tolist()) + sum(x**2 for x in fake.flatten().tolist())
    assert float(LeastSquares(10).discriminator_loss(real, fake)) == pytest.approx(loss / real.numel() / 2, rel=1e-12)
    loss = sum((x - 1) ** 2 for x in fake.flatten().tolist()) / fake.numel()
    assert float(LeastSquares(10).generator_loss(fake)) == pytest.approx(loss / 2, rel=1e-12)


def test_a_perfect_discriminator_loses_nothing() -> None:
    """LlamaGen#84: swapped arguments reward the worst discriminator."""
    real, fake = torch.full((3,), 20.0), torch.full((3,), -20.0)
    for objective in (Hinge(10), Vanilla(10), NonSaturating(10)):
        assert float(objective.discriminator_loss(real, fake)) < 1e-6
        assert float(objective.discriminator_loss(fake, real)) > 10
    assert float(LeastSquares(10).discriminator_loss(torch.ones(3), torch.zeros(3))) == 0
    assert float(LeastSquares(10).discriminator_loss(torch.zeros(3), torch.ones(3))) == 1


def test_adaptive_weight_is_the_papers_lambda() -> None:
    reconstruction, adversarial = torch.randn(3, 4, 3, 3), torch.randn(3, 4, 3, 3)
    expected = 0.8 * float(reconstruction.norm()) / (float(adversarial.norm()) + 1e-4)
    assert float(Hinge(10).adaptive_weight(reconstruction, adversarial)) == pytest.approx(expected, rel=1e-6)
    assert float(Hinge(10).adaptive_weight(reconstruction, torch.zeros(1))) == pytest.approx(0.8 * 1e4)
    assert float(Hinge(10, adaptive=False, weight=0.3).adaptive_weight(reconstruction, adversarial)) == pytest.approx(
        0.3
    )


@pytest.mark.parametrize(("start", "first"), [(0, 0), (0.25, 25), (30, 30), (1, 1)])
def test_start_counts_steps_or_is_a_share(start: float, first: int) -> None:
    assert Hinge(100, start=start).start_step == first


def test_ramp_rises_once_the_objective_has_begun() -> None:
    objective = Vanilla(100, start=10, ramp_steps=4)
    assert [objective.weight_at(step) for step in (9, 10, 12, 14, 99)] == pytest.approx([0, 0.2, 0.6, 1.0, 1.0])
    assert Hinge(100, start=10).weight_at(10) == 1.0


def test_a_warm_up_lets_the_discriminator_learn_before_it_counts() -> None:
    objective = Hinge(100, start=10, warmup=5)
    assert objective.start_step == 10
    assert [objective.weight_at(step) for step in (10, 14, 15)] == [0.0, 0.0, 1.0]


def test_a_negative_start_is_refused() -> None:
    with pytest.raises(ValueError, match=r"start=-1: must be a number from 0 to"):
        Hinge(100, start=-1)


def test_the_saturating_generator_minimizes_the_papers_log() -> None:
    _, fake = logits()
    expected = sum(math.log(1 - 1 / (1 + math.exp(-x))) for x in fake.flatten().tolist()) / fake.numel()
    assert float(Vanilla(10, saturating=True).generator_loss(fake)) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("objective", [Hinge, Vanilla])
@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"max_weight": -1.0}, "max_weight=-1.0: must be a number from 0 to inf"),
        ({"weight": -0.8}, "weight=-0.8: must be a number of at least 0"),
        ({"delta": -1.0}, "delta=-1.0: must be a number above 0"),
        ({"delta": 0.0}, "delta=0.0: must be a number above 0"),
        ({"max_weight": math.nan}, "max_weight=nan"),
        ({"warmup": -0.5}, "warmup=-0.5: must be a number from 0 to"),
    ],
)
def test_options_that_turn_the_objective_around_are_refused(
    objective: type, options: dict[str, float], words: str
) -> None:
    with pytest.raises(ValueError, match=words):
        objective(100, **options)
