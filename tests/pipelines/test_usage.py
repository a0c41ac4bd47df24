"""The usage window against a set of what the last steps used."""

import torch

from vqf.pipelines.usage import UsageWindow


def test_the_window_is_the_union_of_its_steps() -> None:
    generator = torch.Generator().manual_seed(0)
    window, history = UsageWindow(50, window=4), []
    for _ in range(20):
        pieces = [torch.randint(0, 50, (1, 2, 2), generator=generator) for _ in range(2)]
        for piece in pieces:
            window.see(piece)
        history.append({int(code) for piece in pieces for code in piece.flatten()})
        used = set().union(*history[-4:])
        stats = window.tick()
        assert int(stats["dead"]) == 50 - len(used)
        assert float(stats["usage"]) == torch.tensor(len(used) / 50)


def test_a_resumed_window_reports_the_same() -> None:
    first, second = UsageWindow(8), UsageWindow(8)
    first.see(torch.tensor([[[1, 2]]]))
    first.tick()
    second.load_state_dict(first.state_dict())
    assert second.tick() == first.tick()
