"""Entropy control against the paper's numbers, torch's Adam, and the definition of a mean."""

import math
import threading

import pytest
import torch

from mmgrpo.core import Trajectories
from mmgrpo.core.collective import Collective
from mmgrpo.core.entropy_control import EntropyControl


def batch(segment, mask=None):
    segment = torch.tensor(segment)
    mask = torch.ones_like(segment, dtype=torch.bool) if mask is None else torch.tensor(mask)
    return Trajectories(group=torch.arange(len(segment)), mask=mask.bool(), segment=segment)


def feed(control, entropies, collective=None):
    """One update in which segment s was found to have the s-th entropy; None: it was not met."""
    met = [(s, h) for s, h in enumerate(entropies) if h is not None]
    found = batch([[s for s, _ in met]])
    control.observe(found, torch.tensor([[h for _, h in met]]))
    return control.update(*([] if collective is None else [collective]))


def test_the_first_step_of_the_paper():
    """H = 7.5 above the target 7: the gradient is -.5, Adam's first step is its learning rate."""
    control = EntropyControl([7.0], learning_rate=5e-5)
    assert control.coefficients.tolist() == [0.0]
    report = feed(control, [7.5])
    assert control.coefficients.item() == pytest.approx(5.0e-5, rel=1e-6)
    assert report["entropy/segment_0"] == 7.5
    assert report["entropy_coefficient/segment_0"] == control.coefficients.item()
    below = EntropyControl([7.0], learning_rate=5e-5)
    feed(below, [6.9])
    assert below.coefficients.item() == pytest.approx(-5.0e-5, rel=1e-6)


def test_it_is_adam_on_the_surrogate():
    targets, rate = torch.tensor([2.0, 7.0], dtype=torch.float64), 0.03
    control = EntropyControl(targets.tolist(), learning_rate=rate, limit=10.0)
    psi = torch.zeros(2, dtype=torch.float64, requires_grad=True)
    adam = torch.optim.Adam([psi], lr=rate)
    generator = torch.Generator().manual_seed(0)
    for _ in range(20):
        entropy = (targets + torch.randn(2, generator=generator)).float()
        feed(control, entropy.tolist())
        adam.zero_grad()
        (-psi.sinh() * (entropy.double() - targets)).sum().backward()
        adam.step()
        torch.testing.assert_close(control.coefficients, psi.detach().sinh(), rtol=1e-9, atol=0)


def test_alpha_is_clamped_and_psi_follows():
    control = EntropyControl([1.0], learning_rate=0.1, limit=5e-3)
    for _ in range(5):
        feed(control, [3.0])
    assert control.coefficients.item() == pytest.approx(5e-3, rel=1e-12)
    for _ in range(40):  # from the bound it comes back: psi did not run away
        feed(control, [0.0])
    assert control.coefficients.item() == pytest.approx(-5e-3, rel=1e-12)
    assert control.state_dict()["psi"].item() == pytest.approx(math.asinh(-5e-3))


def test_a_segment_that_was_not_met_stays():
    one, two = EntropyControl([1.0, 2.0]), EntropyControl([1.0, 2.0])
    for control in (one, two):
        feed(control, [3.0, 3.0])
    report = feed(one, [None, 4.0])
    assert set(report) == {"entropy/segment_1", "entropy_coefficient/segment_1"}
    feed(two, [0.5, 4.0])
    assert one.coefficients[1] == two.coefficients[1]
    assert one.coefficients[0] == pytest.approx(5e-5, rel=1e-6)
    assert one.coefficients[0] != two.coefficients[0]


def test_the_weights_make_the_means_of_the_segments():
    control = EntropyControl([1.0, 2.0], learning_rate=0.1, limit=1.0)
    feed(control, [3.0, 1.0])
    alpha = control.coefficients
    found = batch([[0, 0, 1, 1], [0, 1, 1, 2]], [[1, 1, 1, 0], [1, 1, 1, 1]])
    entropy = torch.tensor([[1.0, 2.0, 3.0, 99.0], [4.0, 5.0, 6.0, 7.0]])
    weight = control.weigh(found).entropy_weight
    value = (weight * entropy)[found.mask].sum().double()
    expected = alpha[0] * (1 + 2 + 4) / 3 + alpha[1] * (3 + 5 + 6) / 3
    assert value.item() == pytest.approx(expected.item(), rel=1e-6)
    assert weight[0, 3] == 0  # masked
    assert weight[1, 3] == 0  # a segment without target


def test_masked_entropies_are_never_read():
    control = EntropyControl([1.0])
    control.observe(batch([[0, 0]], [[1, 0]]), torch.tensor([[2.0, torch.nan]]))
    assert control.update()["entropy/segment_0"] == 2.0


def test_a_restored_state_continues_bit_for_bit():
    whole, cut = EntropyControl([1.0, 2.0]), EntropyControl([1.0, 2.0])
    for entropies in ([1.5, 1.0], [1.2, 2.5]):
        feed(whole, entropies)
        feed(cut, entropies)
    fresh = EntropyControl([1.0, 2.0])
    fresh.load_state_dict(cut.state_dict())
    for control in (whole, fresh):
        feed(control, [0.3, 4.0])
    assert {k: v.tolist() for k, v in whole.state_dict().items()} == {
        k: v.tolist() for k, v in fresh.state_dict().items()
    }


class Pair(Collective):
    """One of two ranks, played by two threads."""

    size = 2

    def __init__(self, rank, places, barrier):
        self.rank, self.places, self.barrier = rank, places, barrier

    def sum(self, value):
        self.places[self.rank] = value
        self.barrier.wait()
        total = self.places[0] + self.places[1]
        self.barrier.wait()
        return total


def test_two_ranks_are_one():
    segment = [[0, 1, 1], [0, 0, 1], [1, 1, 1]]
    entropy = torch.tensor([[1.0, 2.0, 3.0], [4.0, 5.0, 6.0], [7.0, 8.0, 9.0]])
    whole = EntropyControl([2.0, 2.0])
    ranks, places, barrier = [EntropyControl([2.0, 2.0]) for _ in range(2)], [None] * 2, None
    barrier = threading.Barrier(2, timeout=10)
    weights = [None, None]

    def work(rank, rows):
        collective = Pair(rank, places, barrier)
        for _ in range(3):
            part = ranks[rank].weigh(batch([segment[i] for i in rows]), collective)
            ranks[rank].observe(part, entropy[rows])
            ranks[rank].update(collective)
            weights[rank] = part.entropy_weight

    threads = [threading.Thread(target=work, args=a) for a in ((0, [0]), (1, [1, 2]))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for _ in range(3):
        found = whole.weigh(batch(segment))
        whole.observe(found, entropy)
        whole.update()
    for control in ranks:
        assert control.coefficients.tolist() == whole.coefficients.tolist()
    assert torch.equal(torch.cat(weights), found.entropy_weight)


def test_segments_are_needed():
    blank = Trajectories(group=torch.zeros(1, dtype=torch.int64), mask=torch.ones(1, 2).bool())
    with pytest.raises(ValueError, match=r"needs trajectories.segment"):
        EntropyControl([1.0]).weigh(blank)
