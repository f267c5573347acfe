"""The order of the data is a function of (seed, position), however it is cut."""

import pytest
import torch

from ddpm_fast.data.order import DataOrder, epoch_order


@pytest.mark.parametrize("num_rows", [1, 2, 3, 4, 5, 97, 1797])
def test_an_epoch_meets_every_row_once(num_rows):
    order = epoch_order(num_rows, seed=3, epoch=2)
    assert order.dtype == torch.int64
    assert torch.equal(order.sort().values, torch.arange(num_rows))


def test_epochs_and_seeds_differ_and_repeat():
    """Seeds that agree in their lower 32 bits too."""
    seen = set()
    for seed in (0, 1, 2**32, 2**63 - 1):
        for epoch in (0, 1, 2, 1000):
            order = epoch_order(50, seed=seed, epoch=epoch)
            assert torch.equal(order, epoch_order(50, seed=seed, epoch=epoch))
            seen.add(tuple(order.tolist()))
    assert len(seen) == 16


def test_orders_are_uniform():
    """How often row r comes first in 4,000 epochs of 8: chi-squared with 7 degrees of freedom
    passes 24.3 once in a thousand seeds, and this seed is fixed.
    """
    firsts = torch.stack([epoch_order(8, seed=11, epoch=e)[0] for e in range(4000)])
    counts = torch.bincount(firsts, minlength=8).double()
    assert ((counts - 500) ** 2 / 500).sum() < 24.3


@pytest.mark.parametrize("num_rows", [1, 3, 10, 64])
@pytest.mark.parametrize("count", [1, 4, 7, 64])
def test_any_split_gives_the_same_rows(num_rows, count):
    epochs = [epoch_order(num_rows, seed=5, epoch=e) for e in range(200 // num_rows + 70)]
    whole = torch.cat(epochs)
    order = DataOrder(num_rows, 5)
    for position in range(0, 200, count):
        rows = order.rows(position, count)
        assert torch.equal(rows, whole[position : position + count])


def test_any_position_can_be_asked_for_first_and_in_any_order():
    order = DataOrder(10, 5)
    asked = [(95, 12), (0, 3), (8, 25), (95, 12), (1, 1)]
    answers = [order.rows(*one) for one in asked]
    for one, answer in zip(asked, answers, strict=True):
        assert torch.equal(DataOrder(10, 5).rows(*one), answer)
    assert torch.equal(answers[0], answers[3])


def test_ranks_find_their_own_part():
    """Two ranks of 4 a step see what one rank of 8 sees."""
    whole = DataOrder(10, 5).rows(24, 8)
    halves = [DataOrder(10, 5).rows(24 + 4 * rank, 4) for rank in range(2)]
    assert torch.equal(torch.cat(halves), whole)


def test_only_two_epochs_are_kept_in_memory():
    order = DataOrder(10, 5)
    for position in range(0, 1000, 4):
        order.rows(position, 4)
    assert len(order._epochs) <= 2
