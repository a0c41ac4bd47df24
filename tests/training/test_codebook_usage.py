"""The usage window against a set of what the last steps used."""

import torch

from vqf.training.codebook_usage import CodebookUsage


def test_the_window_is_the_union_of_its_steps() -> None:
    generator = torch.Generator().manual_seed(0)
    window, history = CodebookUsage(50, window=4), []
    for _ in range(20):
        pieces = [torch.randint(0, 50, (1, 2, 2), generator=generator) for _ in range(2)]
        for piece in pieces:
            window.update(piece)
        history.append({int(code) for piece in pieces for code in piece.flatten()})
        used = set().union(*history[-4:])
        stats = window.end_step()
        assert int(stats["dead_codes"]) == 50 - len(used)
        assert float(stats["usage"]) == torch.tensor(len(used) / 50)


def test_a_resumed_window_reports_the_same() -> None:
    first, second = CodebookUsage(8), CodebookUsage(8)
    first.update(torch.tensor([[[1, 2]]]))
    first.end_step()
    second.load_state_dict(first.state_dict())
    assert second.end_step() == first.end_step()


def test_spread_is_1_for_latents_that_fall_by_chance_however_few_they_are() -> None:
    generator = torch.Generator().manual_seed(0)
    for codes, latents in ((1000, 5), (1000, 200), (100, 500)):
        window = CodebookUsage(codes, window=10)
        for _ in range(15):
            for _ in range(2):
                window.update(torch.randint(0, codes, (1, 1, latents), generator=generator))
            stats = window.end_step()
        assert abs(float(stats["usage_vs_chance"]) - 1) < 0.1
    dying = CodebookUsage(1000, window=10)
    for step in range(1, 15):
        dying.update(torch.arange(20).reshape(1, 4, 5))
        expected = (20 / 1000) / (1 - (1 - 1 / 1000) ** (20 * min(step, 10)))
        assert abs(float(dying.end_step()["usage_vs_chance"]) - expected) < 1e-3 * expected + 1e-3
