"""Cuts of a rollout: several ranks, played by threads, choose what one would choose."""

import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mmgrpo.core.collective import LOCAL, Collective
from mmgrpo.core.trajectories import Trajectories
from mmgrpo.errors import RewardError
from mmgrpo.protocols import Prompt, Sample
from mmgrpo.trainer.batches import choose_groups, micro_batches, minibatches, trained
from mmgrpo.trainer.distributed import together
from mmgrpo.trainer.parts import Collected


class Ranks:
    """A meeting point for threads that play ranks."""

    def __init__(self, size):
        self.values, self.barrier = [None] * size, threading.Barrier(size)


class ThreadCollective(Collective):
    def __init__(self, ranks, rank):
        self.ranks, self.rank, self.size = ranks, rank, len(ranks.values)

    def _exchange(self, value):
        self.ranks.values[self.rank] = value
        self.ranks.barrier.wait(10)
        found = list(self.ranks.values)
        self.ranks.barrier.wait(10)
        return found

    def sum(self, value):
        return torch.stack(self._exchange(value)).sum(dim=0)

    def gather(self, value):
        return torch.cat(self._exchange(value))


def on_ranks(size, work):
    """``work(collective)`` of every rank, results in rank order."""
    ranks = Ranks(size)
    with ThreadPoolExecutor(size) as pool:
        return list(pool.map(lambda rank: work(ThreadCollective(ranks, rank)), range(size)))


def rollout(groups, reward=None):
    """One sample per entry of ``groups``."""
    group = torch.tensor(groups)
    rewards = torch.arange(len(groups)).float() if reward is None else torch.tensor(reward)
    samples = [
        Sample(Prompt(index, "x"), completion=str(place)) for place, index in enumerate(groups)
    ]
    mask = torch.ones(len(groups), 2, dtype=torch.bool)
    return Collected(Trajectories(group=group, mask=mask, rewards={"r": rewards}), samples)


# -- minibatches --------------------------------------------------------------------------------


@settings(deadline=None, max_examples=30)
@given(st.integers(1, 9), st.integers(1, 5), st.integers(0, 10**6), st.data())
def test_minibatches_are_a_partition_into_whole_groups(groups, count, seed, data):
    sizes = data.draw(st.lists(st.integers(1, 4), min_size=groups, max_size=groups))
    group = torch.cat([torch.full((n,), 10 * i + 3) for i, n in enumerate(sizes)])
    parts = minibatches(group, count, seed, LOCAL)
    assert len(parts) == count
    assert torch.equal(torch.cat(parts).sort().values, torch.arange(len(group)))
    owners = [set(group[rows].tolist()) for rows in parts]
    assert sum(len(owner) for owner in owners) == groups
    assert all(torch.equal(rows, rows.sort().values) for rows in parts)
    per_part = [len(owner) for owner in owners]
    assert max(per_part) - min(per_part) <= 1


def test_the_deal_depends_on_the_seed():
    group = torch.arange(40)
    deals = {tuple(minibatches(group, 4, seed, LOCAL)[0].tolist()) for seed in range(8)}
    assert len(deals) == 8


@pytest.mark.parametrize("world", [2, 4])
@pytest.mark.parametrize("count", [1, 2, 3])
def test_ranks_deal_as_one_process_would(world, count):
    group = torch.arange(12).repeat_interleave(2) + 100
    whole = [group[rows] for rows in minibatches(group, count, 5, LOCAL)]
    shares = group.chunk(world)

    def deal(collective):
        mine = shares[collective.rank]
        return [mine[rows] for rows in minibatches(mine, count, 5, collective)]

    dealt = on_ranks(world, deal)
    for number in range(count):
        assert torch.equal(torch.cat([ranks[number] for ranks in dealt]), whole[number])
    if 12 // world % count == 0:
        assert {len(part) for ranks in dealt for part in ranks} == {24 // world // count}


# -- dynamic sampling ---------------------------------------------------------------------------


def test_groups_with_spread_come_first_in_the_order_of_the_draw():
    merged = rollout([0, 0, 1, 1, 2, 2, 3, 3, 4, 4])
    spread = torch.tensor([False] * 2 + [True] * 2 + [False] * 2 + [True] * 4)
    kept = choose_groups(merged, spread, 3, LOCAL)
    assert kept.trajectories.group.tolist() == [1, 1, 3, 3, 4, 4]
    assert [sample.prompt.index for sample in kept.samples] == [1, 1, 3, 3, 4, 4]
    filled = choose_groups(merged, spread, 4, LOCAL)
    assert filled.trajectories.group.tolist() == [0, 0, 1, 1, 3, 3, 4, 4]


@settings(deadline=None, max_examples=20)
@given(st.lists(st.booleans(), min_size=12, max_size=12), st.integers(1, 6))
def test_ranks_choose_as_one_process_would(flags, count):
    """Two rounds of six groups; rank r holds the r-th third of each round."""
    spread = torch.tensor(flags)
    whole = choose_groups(rollout(list(range(12))), spread, count, LOCAL)
    ids = torch.arange(12).view(2, 3, 2)

    def choose(collective):
        mine = ids[:, collective.rank].flatten()
        return choose_groups(rollout(mine.tolist()), spread[mine], count, collective)

    chosen = on_ranks(3, choose)
    kept = [
        group
        for one in chosen
        for group, on in zip(
            one.trajectories.group.tolist(), one.trajectories.mask[:, 0], strict=True
        )
        if on
    ]
    assert sorted(kept) == sorted(whole.trajectories.group.tolist())
    assert len(kept) == count


def test_a_rank_without_a_chosen_group_keeps_a_row_that_says_nothing():
    def choose(collective):
        mine = rollout([0, 0] if collective.rank == 0 else [1, 1])
        return choose_groups(mine, torch.full((2,), collective.rank == 0), 1, collective)

    first, second = on_ranks(2, choose)
    assert first.trajectories.mask.all()
    assert len(second.trajectories) == len(second.samples) == 1
    assert not second.trajectories.mask.any()
    assert second.trajectories.rewards["r"].isnan().all()


# -- rows ---------------------------------------------------------------------------------------


def test_micro_batches_cover_every_row_once():
    batch = rollout([0] * 7).trajectories
    for size in (None, 1, 3, 7, 100):
        pieces = micro_batches(batch, size)
        assert torch.equal(torch.cat(tuple(pieces)), torch.arange(7))
        assert max(map(len, pieces)) <= (size or 7)


def test_micro_batches_may_keep_groups_whole():
    batch = rollout([4, 4, 2, 2, 2, 7, 9]).trajectories
    cut = {
        size: [piece.tolist() for piece in micro_batches(batch, size, whole_groups=True)]
        for size in (1, 3, 4, 5, None)
    }
    assert cut[1] == [[2, 3, 4], [0, 1], [5], [6]]
    assert cut[3] == [[2, 3, 4], [0, 1, 5], [6]]
    assert cut[5] == [[0, 1, 2, 3, 4], [5, 6]]
    assert cut[None] == [[0, 1, 2, 3, 4, 5, 6]]


def test_trained_leaves_out_rows_without_decisions():
    batch = rollout([0, 1, 2, 3]).trajectories
    mask = batch.mask.clone()
    mask[1] = mask[2, 0] = False
    batch = batch.replace(mask=mask)
    assert trained(batch, torch.tensor([1, 2, 3])).group.tolist() == [2, 3]
    for rows in (torch.tensor([1]), torch.tensor([], dtype=torch.int64)):
        blank = trained(batch, rows)
        assert len(blank) == 1
        assert not blank.mask.any()


# -- errors -------------------------------------------------------------------------------------


def test_a_reward_that_fails_on_one_rank_fails_on_all():
    def work(collective):
        def score():
            if collective.rank == 1:
                raise RewardError("mine")
            return 1

        with pytest.raises(RewardError) as caught:
            together(collective, score)
        return str(caught.value)

    other, own = on_ranks(2, work)
    assert own == "mine"
    assert "another process" in other
    assert on_ranks(2, lambda c: together(c, lambda: c.rank)) == [0, 1]
