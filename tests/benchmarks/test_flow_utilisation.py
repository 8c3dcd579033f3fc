"""What the benchmark of the flow models' steps counts and times."""

import sys
import time
from pathlib import Path

import pytest
import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

import flow_utilisation
from flow_shapes import CLIP_TOKENS, SHAPES, build_policy
from flow_utilisation import Case, make_trainer, measure_parts, outside, state_flops

from mmgrpo.protocols import Prompt
from mmgrpo.trainer.parts import State

RESOLUTION, TOKENS = 64, 16
"""Latents are an eighth of the pixels, and four of them a token."""
TEXT = {"tiny-sd3": CLIP_TOKENS + 8, "tiny-flux": 8}
WIDTH = 32
CASE = Case("tiny-sd3", "cpu", "float32", RESOLUTION, 3, 4, 1, 0, checkpointing=False)


def attention_flops(name, lora):
    """Two products of every pair of tokens in each attention; SD3.5's dual one sees no text.

    That one is in the first layer and gets no adapter, so nothing before it wants a gradient.
    """
    joint, dual = {"tiny-sd3": (2, 1), "tiny-flux": (3, 0)}[name]
    joint, dual = (4 * WIDTH * joint * (TEXT[name] + TOKENS) ** 2, 4 * WIDTH * dual * TOKENS**2)
    return joint + dual, 3 * joint + (dual if lora else 3 * dual)


def layer_flops(policy):
    """Sum over the layers of one pass: forward, and forward and backward.

    A product in the forward pass is one more for each of its factors that wants a gradient.
    """
    found = [0, 0]

    def count(layer, args, out):
        places = out.numel() // layer.weight.shape[0]
        products = 2 * layer.weight.numel() * places
        found[0] += products
        found[1] += products * (1 + args[0].requires_grad + layer.weight.requires_grad)

    for layer in policy.network.modules():
        if isinstance(layer, nn.Linear | nn.Conv2d):
            layer.register_forward_hook(count)
    prompts = policy.encode([Prompt(0, "the number 42")])
    latents = torch.randn(1, *policy.family.latent_shape(RESOLUTION, RESOLUTION))
    policy.velocity(latents, torch.tensor([0.5]), prompts, torch.tensor([0]))
    return found


@pytest.mark.parametrize("lora", [0, 4])
@pytest.mark.parametrize("name", TEXT)
def test_operations_are_those_of_the_layers_and_of_attention(name, lora):
    case = CASE._replace(shape=name, lora=lora)
    policy = build_policy(SHAPES[name], device="cpu", dtype="float32", lora=lora)
    expected = zip(layer_flops(policy), attention_flops(name, lora), strict=True)
    assert state_flops(case, policy) == tuple(sum(parts) for parts in expected)


@pytest.mark.parametrize(
    ("name", "billions"), [("sd3.5-medium", (2.2, 2.5)), ("flux.1-dev", (11.85, 11.95))]
)
def test_the_published_shapes_have_the_published_size(name, billions):
    policy = build_policy(SHAPES[name], device="meta", dtype="bfloat16", lora=0)
    parameters = list(policy.network.parameters())
    assert billions[0] < sum(p.numel() for p in parameters) / 1e9 < billions[1]
    assert {(p.dtype, p.device.type) for p in parameters} == {(torch.bfloat16, "meta")}


def test_scoring_is_outside_the_network_and_in_neither_part(monkeypatch):
    def slow(prompts, **columns):
        time.sleep(0.5)
        return [float(place) for place in range(len(prompts))]

    monkeypatch.setattr(flow_utilisation, "spread", slow)
    trainer, state = make_trainer(CASE), State()
    found = measure_parts(trainer, state, "cpu", repeats=1)
    assert {part: one.states for part, one in found.items()} == {"rollout": 12, "update": 8}
    assert all(0 < one.seconds < 0.4 for one in found.values())
    assert 0.5 < outside(trainer, state, "cpu", repeats=1) < 1


@pytest.mark.parametrize("name", TEXT)
def test_a_run_prints_its_case_and_three_lines(name, monkeypatch, capsys):
    options = f"--shape {name} --device cpu --resolution {RESOLUTION} --steps 3 --samples 4"
    monkeypatch.setenv("ACCELERATE_USE_CPU", "1")  # so that it is as before afterwards
    monkeypatch.setattr(sys, "argv", ["x", *f"{options} --repeats 1 --threads 1".split()])
    flow_utilisation.main()
    case, rollout, update, step = capsys.readouterr().out.splitlines()
    trained = {"tiny-sd3": "every weight trains,", "tiny-flux": "LoRA of rank 4, activations"}
    assert case.startswith(f"{name}, 64 px, 3 steps, 4 images, {trained[name]}")
    assert "s, 12 states, " in rollout
    assert "s, 8 states, " in update
    assert all(line.endswith("%") and "MFU" in line for line in (rollout, update))
    assert step.startswith("step: outside the network's forward and backward passes ")


def test_without_a_gpu_nothing_is_measured(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(sys, "argv", ["x", "--shape", "flux.1-dev"])
    flow_utilisation.main()
    assert capsys.readouterr().out == "not measured: no GPU here\n"
