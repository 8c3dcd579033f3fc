"""LoRA, references and the moving average."""

import pytest
import torch
from fixtures_tokens import tiny_text, tiny_vision
from safetensors.torch import load, save
from torch import nn

from mmgrpo.errors import ConfigError
from mmgrpo.policies.adapters import (
    Ema,
    add_lora,
    has_adapter,
    linear_layers,
    make_reference,
    trainable_parameters,
)
from mmgrpo.policies.weights import swapped


def small_network():
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))


def move(network, seed=1):
    """Change every trainable parameter, as an optimiser would."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in trainable_parameters(network).values():
            parameter.add_(torch.randn(parameter.shape, generator=generator))


def test_only_the_adapter_trains_and_the_first_output_is_the_bases():
    x = torch.randn(5, 3)
    network = small_network()
    before = network(x)
    wrapped = add_lora(network, rank=2, alpha=4.0, seed=0)
    assert has_adapter(wrapped)
    assert not has_adapter(network)
    assert all("lora_" in name for name in trainable_parameters(wrapped))
    torch.testing.assert_close(wrapped(x), before)


def test_the_update_is_alpha_over_rank_times_the_product():
    network = nn.Sequential(nn.Linear(3, 4))
    x, before = torch.randn(5, 3), None
    before = network(x)
    wrapped = add_lora(network, rank=2, alpha=6.0, targets=["0"], seed=0)
    move(wrapped)
    a, b = trainable_parameters(wrapped).values()
    torch.testing.assert_close(wrapped(x), before + 6.0 / 2 * x @ a.T @ b.T)


@pytest.mark.parametrize("init", ["default", "gaussian"])
def test_the_seed_decides_the_adapter_and_leaves_the_global_generator_alone(init):
    def first(seed):
        return next(
            iter(
                trainable_parameters(
                    add_lora(small_network(), rank=2, alpha=2, init=init, seed=seed)
                ).values()
            )
        )

    state = torch.get_rng_state()
    torch.manual_seed(5)
    expected = torch.rand(1)
    network = small_network()
    torch.manual_seed(5)
    add_lora(network, rank=2, alpha=2, init=init, seed=3)
    assert torch.rand(1) == expected
    torch.set_rng_state(state)
    torch.testing.assert_close(first(3), first(3))
    assert not torch.equal(first(3), first(4))


def test_the_gaussian_init_has_standard_deviation_one_over_rank():
    network = nn.Sequential(nn.Linear(4000, 4))
    a, b = trainable_parameters(
        add_lora(network, rank=8, alpha=8, targets=["0"], init="gaussian", seed=0)
    ).values()
    assert a.std().item() == pytest.approx(1 / 8, rel=0.02)
    assert b.abs().max() == 0


def test_all_linear_layers_but_the_head_are_targets():
    model, _ = tiny_text()
    assert linear_layers(model) == [
        "down_proj", "gate_proj", "k_proj", "o_proj", "q_proj", "up_proj", "v_proj",
    ]  # fmt: skip


def test_layers_outside_the_part_are_told_apart_by_whole_names():
    model, _ = tiny_vision("qwen2_5_vl")  # its vision tower has a gate_proj too
    names = linear_layers(model, within=model.get_decoder())
    assert "model.language_model.layers.0.mlp.gate_proj" in names
    assert not any("visual" in name or "lm_head" in name for name in names)
    wrapped = add_lora(model, rank=2, alpha=2, within=model.get_decoder())
    assert not any("visual" in name for name in trainable_parameters(wrapped))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rank": 0}, "at least 1; got 0"),
        ({"dropout": 0.1}, "dropout must be 0; got 0.1"),
        ({"init": "gausian"}, "did you mean 'gaussian'"),
        ({"targets": ["q_prok"]}, "'q_prok' is no linear layer of .*did you mean 'q_proj'"),
    ],
)
def test_wrong_options_are_named(options, message):
    model, _ = tiny_text()
    with pytest.raises(ConfigError, match=message):
        add_lora(model, **{"rank": 2, "alpha": 2, **options})


def lora_network():
    wrapped = add_lora(small_network(), rank=2, alpha=4, seed=0)
    move(wrapped, seed=9)
    return wrapped


@pytest.mark.parametrize(
    ("make", "kind", "expected"),
    [
        (small_network, "copy", "start"),
        (small_network, "auto", "start"),
        (lora_network, "copy", "start"),
        (lora_network, "adapter_off", "base"),
        (lora_network, "auto", "base"),
        (lora_network, "ema", "start"),
    ],
)
def test_a_reference_answers_with_its_weights_and_gives_the_networks_back(make, kind, expected):
    network, x = make(), torch.randn(5, 3)
    start = network(x)
    if expected == "base":
        with network.disable_adapter():
            start = network(x)
    reference = make_reference(kind, network)
    move(network)
    present = network(x)
    assert reference.available
    with reference.active():
        torch.testing.assert_close(network(x), start)
        with reference.active():
            torch.testing.assert_close(network(x), start)
        torch.testing.assert_close(network(x), start)
    assert torch.equal(network(x), present)
    with pytest.raises(ZeroDivisionError), reference.active():
        raise ZeroDivisionError
    assert torch.equal(network(x), present)
    assert all(p.requires_grad for p in trainable_parameters(network).values())


def test_a_gradient_taken_across_a_reference_call_is_that_of_the_present_weights():
    network, x = small_network(), torch.randn(5, 3)
    reference = make_reference("copy", network)
    move(network)
    expected = torch.autograd.grad(network(x).square().sum(), list(network.parameters()))
    loss = network(x).square().sum()
    with reference.active(), torch.no_grad():
        network(x)
    for found, value in zip(
        torch.autograd.grad(loss, list(network.parameters())), expected, strict=True
    ):
        assert torch.equal(found, value)


def test_a_copy_holds_the_trainable_parameters_only_and_can_be_refreshed():
    network = lora_network()
    reference = make_reference("copy", network)
    assert reference.state_dict().keys() == trainable_parameters(network).keys()
    move(network)
    x = torch.randn(5, 3)
    reference.refresh()
    present = network(x)
    move(network, seed=2)
    with reference.active():
        torch.testing.assert_close(network(x), present)


@pytest.mark.parametrize("kind", ["none", "adapter_off", "copy", "ema"])
def test_a_reference_survives_a_checkpoint(kind):
    network, x = lora_network(), torch.randn(5, 3)
    reference = make_reference(kind, network, decay=0.5)
    move(network)
    reference.update()
    saved = save(reference.state_dict())
    restored = make_reference(kind, network, decay=0.5)
    restored.load_state_dict(load(saved))
    if kind == "none":
        assert not reference.available
        with pytest.raises(ConfigError, match="reference 'none'"):
            reference.active()
        return
    move(network, seed=2)
    reference.update()
    restored.update()
    with reference.active():
        expected = network(x)
    with restored.active():
        assert torch.equal(network(x), expected)


def test_wrong_references_are_named():
    with pytest.raises(ConfigError, match="did you mean 'copy'"):
        make_reference("copi", small_network())
    with pytest.raises(ConfigError, match="needs a LoRA adapter"):
        make_reference("adapter_off", small_network())
    reference = make_reference("copy", small_network())
    with pytest.raises(ConfigError, match="trains 4 tensors, and 2 were saved"):
        reference.load_state_dict(make_reference("copy", nn.Linear(2, 2)).state_dict())


def follow(decays):
    """The average of the values 1, 2, 3, ... after a start at 0."""
    average = 0.0
    for value, decay in enumerate(decays, start=1):
        average = decay * average + (1 - decay) * value
    return average


@pytest.mark.parametrize(
    ("warmup", "decays"), [(False, [0.9] * 4), (True, [1 / 10, 2 / 11, 3 / 12, 4 / 13])]
)
def test_the_average_follows_its_recursion(warmup, decays):
    network = nn.Linear(1, 1, bias=False)
    nn.init.zeros_(network.weight)
    ema = Ema(network, 0.9, warmup=warmup)
    for value in range(1, 5):
        nn.init.constant_(network.weight, value)
        ema.update()
    with ema.applied():
        assert network.weight.item() == pytest.approx(follow(decays))
    assert network.weight.item() == 4


def test_the_warm_up_ends_at_the_decay():
    network = nn.Linear(1, 1, bias=False)
    ema = Ema(network, 0.2)
    with torch.no_grad():
        network.weight.fill_(0.0)
    for _ in range(9):
        ema.update()
    before = ema.state_dict()["weight"].item()
    with torch.no_grad():
        network.weight.fill_(1.0)
    ema.update()
    assert ema.state_dict()["weight"].item() == pytest.approx(0.2 * before + 0.8)


def test_the_average_is_float32_and_applied_in_the_networks_dtype():
    network = small_network().bfloat16()
    ema = Ema(network, 0.5)
    assert {v.dtype for n, v in ema.state_dict().items() if n != "__updates__"} == {torch.float32}
    with ema.applied():
        assert {p.dtype for p in network.parameters()} == {torch.bfloat16}


@pytest.mark.parametrize("decay", [-0.1, 1.0])
def test_a_decay_outside_its_range_is_refused(decay):
    with pytest.raises(ConfigError, match=f"got {decay}"):
        Ema(small_network(), decay)


def test_sharded_parameters_are_swapped_in_place(tmp_path):
    """FSDP2 keeps its own view of a shard's storage, so the storage must stay."""
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import distribute_tensor

    network = small_network()
    values = {name: torch.full_like(p, 2.0) for name, p in network.named_parameters()}
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        mesh = init_device_mesh("cpu", (1,))
        for module in (network[0], network[2]):
            for name, parameter in list(module.named_parameters(recurse=False)):
                setattr(module, name, nn.Parameter(distribute_tensor(parameter.data, mesh)))
        before = {name: p.to_local().clone() for name, p in network.named_parameters()}
        storage = {name: p.to_local().data_ptr() for name, p in network.named_parameters()}
        with swapped(network, values):
            for name, parameter in network.named_parameters():
                assert parameter.to_local().data_ptr() == storage[name]
                assert (parameter.to_local() == 2.0).all()
        for name, parameter in network.named_parameters():
            assert torch.equal(parameter.to_local(), before[name])
    finally:
        dist.destroy_process_group()
