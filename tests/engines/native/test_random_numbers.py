from __future__ import annotations

import torch

from sdar_lm_eval.engines.native.random_numbers import DRAW, ORDER, philox, uniform


def test_philox_known_answers():
    # Random123, kat_vectors, philox4x32 with 10 rounds.
    cases = [
        ("00000000 00000000 00000000 00000000", "00000000 00000000", "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
        ("ffffffff ffffffff ffffffff ffffffff", "ffffffff ffffffff", "408f276d 41c83b0e a20bc7c6 6d5451fd"),
        ("243f6a88 85a308d3 13198a2e 03707344", "a4093822 299f31d0", "d16cfe09 94fdcceb 5001e420 24126ea1"),
    ]
    for counter, key, expected in cases:
        words = [torch.tensor([int(word, 16) for word in text.split()]) for text in (counter, key, expected)]
        assert torch.equal(philox(words[0], words[1]), words[2])


def test_numbers_depend_on_seed_place_step_and_purpose_alone():
    seeds = torch.tensor([[3], [-5], [3]])
    places = torch.arange(8).expand(3, 8)
    steps = torch.zeros(3, 8, dtype=torch.int64)
    numbers = uniform(seeds, places, steps, DRAW)
    assert torch.equal(numbers[0], numbers[2])
    assert not torch.equal(numbers[0], numbers[1])
    assert not torch.equal(numbers, uniform(seeds, places, steps + 1, DRAW))
    assert not torch.equal(numbers, uniform(seeds, places, steps, ORDER))
    alone = uniform(torch.tensor(3), torch.tensor(5), torch.tensor(0), DRAW)
    assert alone == numbers[0, 5]


def test_numbers_are_uniform():
    numbers = uniform(torch.tensor(7), torch.arange(100_000), torch.zeros(100_000, dtype=torch.int64), DRAW)
    assert numbers.min() >= 0
    assert numbers.max() < 1
    counts = torch.histc(numbers, bins=20, min=0, max=1)
    chi2 = ((counts - 5000) ** 2 / 5000).sum()
    assert chi2 < 43.8  # 19 degrees of freedom, p = 0.001; the numbers are fixed, so this cannot flicker
