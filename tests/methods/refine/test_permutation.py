"""Permutations of channels for N:M, compared with all possible permutations."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from prunus.methods.patterns import Pattern
from prunus.methods.refine.permutation import assign, deal, kept_score


def scores(rows: int, columns: int, seed: int = 0) -> torch.Tensor:
    """Scores whose channels differ much, except between neighbours."""
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(rows, columns, generator=generator) * torch.linspace(0.1, 3, columns) ** 2


@given(st.integers(1, 6), st.integers(1, 6), st.integers(1, 8), st.integers(0, 99), st.data())
@settings(deadline=None, max_examples=60)
def test_every_order_holds_every_channel_once_and_assign_makes_none_worse(
    rows, groups, m, seed, data
):
    pattern = Pattern(data.draw(st.integers(0, m)), m)
    score_OI = scores(rows, groups * m, seed)
    dealt_I = deal(score_OI, pattern)
    assigned_I = assign(score_OI, pattern, dealt_I)
    for order_I in (dealt_I, assigned_I):
        assert torch.equal(order_I.sort().values, torch.arange(groups * m))
    assert kept_score(score_OI, pattern, assigned_I) >= kept_score(score_OI, pattern, dealt_I) * (
        1 - 1e-6
    )


def test_channels_are_dealt_out_in_turn():
    score_OI = torch.tensor([[1.0, 9.0, 8.0, 2.0, 7.0, 3.0, 6.0, 0.0]])
    assert deal(score_OI, Pattern(2, 4)).tolist() == [1, 4, 5, 0, 2, 6, 3, 7]


def test_sorted_channels_gain_much_and_come_near_the_best_order():
    pattern, score_OI = Pattern(2, 4), scores(5, 8)
    best = max(
        kept_score(score_OI, pattern, torch.tensor([*first, *(set(range(8)) - set(first))]))
        for first in itertools.combinations(range(8), 4)
    )
    plain = kept_score(score_OI, pattern, torch.arange(8))
    found = kept_score(score_OI, pattern, assign(score_OI, pattern, deal(score_OI, pattern)))
    assert plain < 0.95 * best
    assert found > 0.99 * best


def test_one_exchange_is_the_best_of_all():
    """With one place per group, all assignments can be tried."""
    pattern, score_OI = Pattern(1, 2), scores(4, 8, seed=3)
    order_GM = torch.arange(8).view(4, 2)

    def exchanged(order_GM: torch.Tensor, place: int) -> torch.Tensor:
        trials = []
        for moved in itertools.permutations(order_GM[:, place].tolist()):
            trial_GM = order_GM.clone()
            trial_GM[:, place] = torch.tensor(moved)
            trials.append(trial_GM)
        return max(trials, key=lambda trial: kept_score(score_OI, pattern, trial.flatten()))

    expected = exchanged(exchanged(order_GM, 0), 1)
    found = assign(score_OI, pattern, order_GM.flatten())
    assert kept_score(score_OI, pattern, found) == kept_score(score_OI, pattern, expected.flatten())


def test_only_n_of_m_has_groups():
    with pytest.raises(ValueError, match=r"give a pattern such as 2:4"):
        deal(scores(2, 8), Pattern())
    with pytest.raises(ValueError, match="no multiple of 4"):
        deal(scores(2, 6), Pattern(2, 4))
