from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import chisquare

from sdar_lm_eval.engines.native import unmasking as u


def logits_of(*probabilities):
    return torch.tensor([probabilities]).log()


def filtered(probabilities, temperature=1.0, top_k=0, top_p=1.0):
    out = u.filtered_probabilities(
        logits_of(*probabilities), torch.tensor([temperature]), torch.tensor([top_k]), torch.tensor([top_p])
    )
    return out[0].tolist()


class TestDraw:
    def test_greedy_confidence_is_the_probability_at_temperature_1(self):
        token, confidence = u.draw_greedy(logits_of(0.2, 0.5, 0.3))
        assert token.tolist() == [1]
        assert confidence.tolist() == pytest.approx([0.5])

    def test_greedy_takes_the_lower_id_of_two_that_tie(self):
        assert u.draw_greedy(torch.tensor([[1.0, 3.0, 3.0]]))[0].tolist() == [1]

    def test_temperature_2_takes_square_roots(self):
        roots = [math.sqrt(0.64), math.sqrt(0.36)]
        assert filtered([0.64, 0.36], temperature=2.0) == pytest.approx([r / sum(roots) for r in roots])

    def test_top_k(self):
        assert filtered([0.1, 0.4, 0.3, 0.2], top_k=2) == pytest.approx([0, 4 / 7, 3 / 7, 0])

    def test_top_k_keeps_what_ties_with_the_kth(self):
        assert filtered([0.4, 0.2, 0.2, 0.2], top_k=2) == pytest.approx([0.4, 0.2, 0.2, 0.2])

    def test_top_k_beyond_the_vocabulary_is_off(self):
        assert filtered([0.1, 0.9], top_k=50) == pytest.approx([0.1, 0.9])

    def test_top_p_keeps_the_token_that_crosses_p(self):
        assert filtered([0.1, 0.5, 0.4], top_p=0.6) == pytest.approx([0, 5 / 9, 4 / 9])
        assert filtered([0.1, 0.5, 0.4], top_p=0.45) == pytest.approx([0, 1, 0])

    def test_top_p_counts_what_top_k_left(self):
        # top-k leaves (5/9, 4/9); 5/9 > 0.55, so the second is cut. Of the whole, 0.5 < 0.55 would have kept it.
        assert filtered([0.1, 0.5, 0.4], top_k=2, top_p=0.55) == pytest.approx([0, 1, 0])

    def test_settings_are_each_rows_own(self):
        out = u.filtered_probabilities(
            logits_of(0.1, 0.5, 0.4).repeat(3, 1),
            torch.ones(3), torch.tensor([0, 1, 0]), torch.tensor([1.0, 1.0, 0.6]),
        )  # fmt: skip
        expected = torch.tensor([[0.1, 0.5, 0.4], [0.0, 1.0, 0.0], [0.0, 5 / 9, 4 / 9]])
        torch.testing.assert_close(out, expected)

    def test_sampled_frequencies(self):
        probabilities = torch.tensor([[0.4, 0.0, 0.3, 0.3]]).repeat(20_000, 1)
        numbers = torch.rand(20_000, generator=torch.Generator().manual_seed(0))
        tokens, confidence = u.draw_sampled(probabilities, numbers)
        counts = torch.bincount(tokens, minlength=4)
        assert counts[1] == 0
        assert chisquare(counts[[0, 2, 3]], [8000, 6000, 6000]).pvalue > 0.001
        assert torch.equal(confidence, probabilities.gather(1, tokens[:, None])[:, 0])

    @given(
        st.lists(st.floats(0, 1), min_size=2, max_size=30).filter(lambda p: sum(p) > 0.01), st.integers(0, 2**24 - 1)
    )
    def test_a_token_of_probability_zero_is_never_drawn(self, weights, number):
        probabilities = torch.tensor([weights]) / sum(weights)
        token, confidence = u.draw_sampled(probabilities, torch.tensor([number * 2.0**-24]))
        assert confidence > 0
        token, _ = u.draw_sampled(probabilities, torch.tensor([1.0]))  # not in [0, 1), yet safe
        assert probabilities[0, token] > 0

    def test_entropy_in_nats(self):
        assert u.entropy(torch.tensor([[0.5, 0.5, 0.0], [1.0, 0.0, 0.0]])).tolist() == pytest.approx([math.log(2), 0])

    def test_repetition_penalty_divides_positive_and_multiplies_negative(self):
        logits = torch.tensor([[2.0, -2.0, 2.0]])
        seen = torch.tensor([[True, True, False]])
        assert u.penalize_repetition(logits, seen, torch.tensor([2.0])).tolist() == [[1.0, -4.0, 2.0]]


def kept(keys, count, masked):
    return u.select_first(torch.tensor([keys]), torch.tensor([count]), torch.tensor([masked])).nonzero()[:, 1].tolist()


ALL = [True] * 4


class TestSelect:
    def test_only_masked_positions_and_never_more_than_those(self):
        masked = [True, False, True, False]
        assert kept([-0.5, -0.95, -0.2, -0.9], 3, masked) == [0, 2]

    def test_the_left_one_of_two_that_tie(self):
        assert kept([-0.5, -0.5, -0.5, -0.5], 1, ALL) == [0]

    @given(st.data())
    def test_select_first_is_sorting(self, data):
        n = data.draw(st.integers(1, 16))
        keys = data.draw(st.lists(st.sampled_from([0.0, 0.1, 0.5, 0.9]), min_size=n, max_size=n))
        masked = data.draw(st.lists(st.booleans(), min_size=n, max_size=n))
        count = data.draw(st.integers(0, n))
        expected = sorted((i for i in range(n) if masked[i]), key=lambda i: (keys[i], i))[:count]
        assert kept(keys, count, masked) == sorted(expected)
