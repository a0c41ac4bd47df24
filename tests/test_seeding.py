import torch

from vqf.seeding import hash_fraction, hash_seed, seeded_generator


def test_hashes_never_change():
    assert hash_seed(0, 0, 0) == 3051931488724851722
    assert hash_seed("order", 7, 1) == 3644892208163129044


def test_neighbors_and_permuted_parts_give_different_numbers():
    numbers = {hash_seed(*parts) for parts in [(a, b, c) for a in range(8) for b in range(8) for c in range(8)]}
    assert len(numbers) == 512
    assert hash_seed(1, 23) != hash_seed(12, 3)
    assert all(0 <= number < 2**63 for number in numbers)


def test_neighboring_generators_are_unrelated():
    draws = torch.stack([torch.rand(64, generator=seeded_generator(0, 0, index)) for index in range(64)])
    correlation = torch.corrcoef(draws) - torch.eye(64)
    assert correlation.abs().max() < 0.6
    assert abs(draws.mean() - 0.5) < 0.02
    assert torch.equal(draws[3], torch.rand(64, generator=seeded_generator(0, 0, 3)))


def test_fractions_are_uniform_and_never_change():
    places = torch.tensor([hash_fraction(f"{i}.png") for i in range(4000)])
    counts = torch.histc(places, 10, 0, 1)
    assert ((counts - 400) ** 2 / 400).sum() < 27.9  # 9 degrees of freedom, 0.1 %
    assert hash_fraction("1F600") == 0.6490090250449931
    assert 0 <= hash_fraction("bad\udcff.png") < 1
