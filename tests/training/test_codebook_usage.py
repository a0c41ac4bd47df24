"""Codebook usage against a set of the codes that the last steps used."""

import torch

from vqf.training.codebook_usage import CodebookUsage


def test_usage_is_the_union_of_the_last_steps() -> None:
    generator = torch.Generator().manual_seed(0)
    counter, history = CodebookUsage(50, window=4), []
    for _ in range(20):
        micro_batches = [torch.randint(0, 50, (1, 2, 2), generator=generator) for _ in range(2)]
        for indices in micro_batches:
            counter.update(indices)
        history.append({int(code) for indices in micro_batches for code in indices.flatten()})
        used = set().union(*history[-4:])
        stats = counter.end_step()
        assert int(stats["dead_codes"]) == 50 - len(used)
        assert float(stats["usage"]) == torch.tensor(len(used) / 50)


def test_usage_after_a_resume_is_the_same() -> None:
    first, second = CodebookUsage(8), CodebookUsage(8)
    first.update(torch.tensor([[[1, 2]]]))
    first.end_step()
    second.load_state_dict(first.state_dict())
    assert second.end_step() == first.end_step()


def test_usage_vs_chance_is_1_for_random_codes_however_few_latents() -> None:
    generator = torch.Generator().manual_seed(0)
    for codes, latents in ((1000, 5), (1000, 200), (100, 500)):
        counter = CodebookUsage(codes, window=10)
        for _ in range(15):
            for _ in range(2):
                counter.update(torch.randint(0, codes, (1, 1, latents), generator=generator))
            stats = counter.end_step()
        assert abs(float(stats["usage_vs_chance"]) - 1) < 0.1
    dying = CodebookUsage(1000, window=10)
    for step in range(1, 15):
        dying.update(torch.arange(20).reshape(1, 4, 5))
        expected = (20 / 1000) / (1 - (1 - 1 / 1000) ** (20 * min(step, 10)))
        assert abs(float(dying.end_step()["usage_vs_chance"]) - expected) < 1e-3 * expected + 1e-3
