"""Groups that are announced as soon as they are decoded, while others are not yet."""

import numpy as np
import pytest
import torch
from flow_drawing import PROMPTS, draw

from mmgrpo.core.diffusion import Suffix
from mmgrpo.protocols import Prompt

OPTIONS = [
    {},
    {"max_rows": 3},
    {"suffix": Suffix(strides=(1, 2)), "selection": {"kind": "window", "width": 2}},
]
THREE = [*PROMPTS, Prompt(2, "blue square")]


def pixels(samples):
    return np.stack([np.asarray(sample.image, dtype=np.int64) for sample in samples])


@pytest.fixture
def events(policy, monkeypatch):
    """What happened: the number of latents of each decoder call, and announced groups."""
    seen = []
    plain = type(policy.family).decode

    def decode(latents):
        seen.append(len(latents))
        return plain(policy.family, latents)

    monkeypatch.setattr(policy.family, "decode", decode)
    return seen


@pytest.mark.parametrize("options", OPTIONS, ids=["plain", "few rows", "strata"])
def test_announcing_changes_no_sample_and_no_decision(policy, options):
    groups = []
    plain = draw(policy, decode=True, prompts=THREE, **options)
    told = draw(policy, decode=True, prompts=THREE, on_samples=groups.append, **options)
    assert [[s.prompt.index for s in group] for group in groups] == [
        [prompt.index] * (len(told.samples) // 3) for prompt in THREE
    ]
    announced = [sample for group in groups for sample in group]
    assert all(one is other for one, other in zip(announced, told.samples, strict=True))
    assert torch.equal(told.trajectories.payload.latents, plain.trajectories.payload.latents)
    assert torch.equal(told.trajectories.old_log_prob, plain.trajectories.old_log_prob)
    assert np.abs(pixels(told.samples) - pixels(plain.samples)).max() <= 1  # a rounding


def test_each_group_is_announced_before_the_next_is_decoded(policy, events):
    draw(policy, decode=True, prompts=THREE, on_samples=lambda group: events.append("told"))
    assert events == [4, "told", 4, "told", 4, "told"]


def test_unannounced_groups_are_decoded_together(policy, events):
    draw(policy, decode=True, prompts=THREE)
    assert events == [12]
