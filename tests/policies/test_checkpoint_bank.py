"""The bank of earlier states: what it keeps, which one it chooses, how it comes back."""

from collections import Counter

import pytest
import torch
from safetensors.torch import load, save
from torch import nn

from mmgrpo.errors import ConfigError
from mmgrpo.policies.checkpoint_bank import CheckpointBank


def network():
    return nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 1)).requires_grad_(True)


def set_to(model, value):
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(value)


def train(model, bank, updates):
    """After update n every weight is n; return the value of the reference after each."""
    seen = []
    for _ in range(updates):
        number = len(seen) + 1
        set_to(model, float(number))
        bank.update()
        seen.append(active_value(model, bank))
    return seen


def active_value(model, bank):
    with bank.active():
        (value,) = {float(p.detach().min()) for p in model.parameters()}
        assert {float(p.detach().max()) for p in model.parameters()} == {value}
    return value


def test_the_first_state_is_the_initial_one_and_the_network_comes_back():
    model = network()
    set_to(model, 0.0)
    bank = CheckpointBank(model, size=3, every=2)
    set_to(model, 5.0)
    assert active_value(model, bank) == 0.0
    assert all((p == 5.0).all() for p in model.parameters())
    assert len(bank) == 1


def test_it_keeps_the_newest_states_of_every_nth_update():
    model = network()
    set_to(model, 0.0)
    bank = CheckpointBank(model, size=3, every=2)
    seen = train(model, bank, 200)
    kept = [{0, 2, 4}, {2, 4, 6}, {4, 6, 8}]
    assert seen[0] == 0.0  # nothing else is there
    assert set(seen[3:5]) <= kept[0]
    assert set(seen[5:7]) <= kept[1]
    for number, value in enumerate(seen, start=1):
        newest = number // 2 * 2
        assert value in {max(newest - back, 0) for back in (0, 2, 4)}
    ages = Counter((n // 2 * 2 - value) // 2 for n, value in enumerate(seen, start=1) if n > 4)
    assert set(ages) == {0, 1, 2}
    assert all(45 < count < 90 for count in ages.values())  # 196 draws from three


def test_the_choice_holds_between_updates_and_follows_the_seed():
    chosen = []
    for seed in (0, 0, 1):
        model = network()
        set_to(model, 0.0)
        bank = CheckpointBank(model, size=4, every=1, seed=seed)
        chosen.append(train(model, bank, 40))
        assert active_value(model, bank) == chosen[-1][-1] == active_value(model, bank)
    assert chosen[0] == chosen[1] != chosen[2]


def test_a_bank_that_comes_back_from_a_file_goes_on_as_if_nothing_had_happened():
    model = network()
    set_to(model, 0.0)
    whole = CheckpointBank(model, size=3, every=2, seed=4)
    train(model, whole, 7)
    stored = load(save({k: v.clone() for k, v in whole.state_dict().items()}))
    again = CheckpointBank(model, size=3, every=2, seed=4)
    again.load_state_dict(stored)
    for _ in range(9):
        set_to(model, float(torch.rand(())))
        whole.update()
        again.update()
        assert active_value(model, again) == active_value(model, whole)
    assert len(again) == len(whole) == 3


def test_only_what_trains_is_kept():
    model = network()
    model[0].requires_grad_(False)
    bank = CheckpointBank(model)
    assert set(bank.state_dict()) == {"0/1.weight", "0/1.bias", "__updates__"}


def test_another_network_and_an_empty_bank_are_refused():
    bank = CheckpointBank(network())
    with pytest.raises(ConfigError, match="do not fit this network"):
        bank.load_state_dict(CheckpointBank(nn.Linear(2, 1)).state_dict())
    with pytest.raises(ConfigError, match="do not fit this network"):
        bank.load_state_dict({"__updates__": torch.tensor(3)})
    for options in ({"size": 0}, {"every": 0}):
        with pytest.raises(ConfigError, match="at least 1 state"):
            CheckpointBank(network(), **options)
