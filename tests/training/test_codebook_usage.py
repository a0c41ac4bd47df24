"""Codebook usage against a set of the codes that the last steps used."""

import torch

from tests.support.layouts import raster
from vqf.tokens.layout import TokenLayout
from vqf.training.codebook_usage import CodebookUsage


def test_usage_is_the_union_of_the_last_steps() -> None:
    generator = torch.Generator().manual_seed(0)
    counter, history = CodebookUsage(raster((2, 2), 50), window=4), []
    for _ in range(20):
        micro_batches = [torch.randint(0, 50, (1, 4), generator=generator) for _ in range(2)]
        for tokens in micro_batches:
            counter.update(tokens)
        history.append({int(code) for tokens in micro_batches for code in tokens.flatten()})
        used = set().union(*history[-4:])
        stats = counter.end_step()
        assert int(stats["dead_codes"]) == 50 - len(used)
        assert float(stats["usage"]) == torch.tensor(len(used) / 50)


def test_usage_after_a_resume_is_the_same() -> None:
    first, second = CodebookUsage(raster((1, 2), 8)), CodebookUsage(raster((1, 2), 8))
    first.update(torch.tensor([[1, 2]]))
    first.end_step()
    second.load_state_dict(first.state_dict())
    assert second.end_step() == first.end_step()


def test_usage_vs_chance_is_1_for_random_codes_however_few_latents() -> None:
    generator = torch.Generator().manual_seed(0)
    for codes, latents in ((1000, 5), (1000, 200), (100, 500)):
        counter = CodebookUsage(raster((1, latents), codes), window=10)
        for _ in range(15):
            for _ in range(2):
                counter.update(torch.randint(0, codes, (1, latents), generator=generator))
            stats = counter.end_step()
        assert abs(float(stats["usage_vs_chance"]) - 1) < 0.1
    dying = CodebookUsage(raster((4, 5), 1000), window=10)
    for step in range(1, 15):
        dying.update(torch.arange(20)[None])
        expected = (20 / 1000) / (1 - (1 - 1 / 1000) ** (20 * min(step, 10)))
        assert abs(float(dying.end_step()["usage_vs_chance"]) - expected) < 1e-3 * expected + 1e-3


def test_several_codebooks_are_counted_apart() -> None:
    generator, sizes = torch.Generator().manual_seed(0), (50, 20)
    layout = TokenLayout(((2, 2),), sizes, 8)
    counter = CodebookUsage(layout, window=3)
    alone = [CodebookUsage(raster((2, 2), size), window=3) for size in sizes]
    for _ in range(6):
        tokens = torch.randint(0, 20, (2, 4, 2), generator=generator)
        counter.update(tokens.flatten(1))
        for k, each in enumerate(alone):
            each.update(tokens[:, :, k])
        stats, expected = counter.end_step(), [each.end_step() for each in alone]
        for k, values in enumerate(expected):
            assert {key: stats[f"{key}/{k}"] for key in values} == values
        assert int(stats["dead_codes"]) == sum(int(values["dead_codes"]) for values in expected)
        for key in ("usage", "usage_vs_chance"):
            assert torch.equal(stats[key], torch.stack([values[key] for values in expected]).mean())


def test_usage_vs_chance_of_a_huge_codebook() -> None:
    """The codes lie 2^20 apart: their lowest bits alone would tell none of them from another."""
    generator = torch.Generator().manual_seed(0)
    random, dying = (CodebookUsage(raster((1, 2000), 2**40), window=10) for _ in range(2))
    for _ in range(15):
        random.update(torch.randint(0, 2**20, (1, 2000), generator=generator) << 20)
        dying.update((torch.arange(2000) % 20 << 20)[None])
        alive, dead = random.end_step(), dying.end_step()
    assert alive.keys() == dead.keys() == {"usage_vs_chance"}
    assert abs(float(alive["usage_vs_chance"]) - 1) < 0.1
    assert float(dead["usage_vs_chance"]) < 0.01
