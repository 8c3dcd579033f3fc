"""Images of the data, and samples of the reference, in the place of the policy's own."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from fixtures_flow import SIZE, sd3_pipeline
from PIL import Image

from mmgrpo.core.diffusion import MatchingRule
from mmgrpo.errors import ConfigError
from mmgrpo.methods import load_method
from mmgrpo.policies.flow import FlowPolicy
from mmgrpo.protocols import Prompt
from mmgrpo.rollout.by_reference import ByReference
from mmgrpo.rollout.flow import FlowEngine
from mmgrpo.rollout.stored import StoredEngine

pytest.importorskip("diffusers")
PROMPTS = [Prompt(7, "draw 42"), Prompt(3, "red circle")]
RULE = MatchingRule(draws=3, shared=True)


def picture(prompt, column):
    """Another image for each row and column."""
    stream = np.random.default_rng(prompt.index + (100 if column == "bad" else 0))
    return Image.fromarray(stream.integers(0, 256, (SIZE, SIZE, 3), dtype=np.uint8))


def flow_engine(policy, **options):
    return FlowEngine(
        policy, num_steps=4, height=SIZE, width=SIZE, kernel="ode", matching=RULE, **options
    )


def noise_of(trajectories):
    return trajectories.target + trajectories.payload.clean[:, None]


@pytest.fixture(scope="module")
def tuned():
    """A policy that has moved away from its reference."""
    policy = FlowPolicy(sd3_pipeline(), max_prompt_tokens=3, reference="copy")
    with torch.no_grad():
        policy.network.proj_out.bias.add_(0.3)
    return policy


# -- encoding -------------------------------------------------------------------------------------


def test_an_image_and_its_latent_are_what_the_autoencoder_makes_of_them(tuned):
    pipe, image = tuned.pipe, picture(PROMPTS[0], "good")
    pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1)[None] / 127.5 - 1
    with torch.no_grad():
        wanted = (pipe.vae.encode(pixels).latent_dist.mean - 0.06) * 1.5
    found = tuned.family.from_images([image], height=SIZE, width=SIZE, device=tuned.device)
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-5)
    assert found.shape == (1, *tuned.family.latent_shape(SIZE, SIZE))
    with torch.no_grad():
        seen = pipe.vae.decode(pipe.vae.encode(pixels).latent_dist.mean).sample
    wanted = ((seen[0] / 2 + 0.5).clamp(0, 1) * 255).round().permute(1, 2, 0).numpy()
    again = np.asarray(tuned.family.decode(found)[0]).astype(float)
    assert np.abs(again - wanted).max() <= 1


def test_images_of_another_size_are_resized(tuned):
    small = picture(PROMPTS[0], "good").resize((5, 9))
    found = tuned.family.from_images([small], height=SIZE, width=SIZE, device=tuned.device)
    assert found.shape[1:] == tuned.family.latent_shape(SIZE, SIZE)


def test_the_playgrounds_autoencoder_copies_there_and_back():
    from mmgrpo.playground.tiny_vae import copying_vae

    pipe = sd3_pipeline()
    pipe.vae = copying_vae(scaling_factor=1.3, shift_factor=-0.2)
    family = FlowPolicy(pipe, max_prompt_tokens=3).family
    pixels = 1.8 * torch.rand(2, 1, 8, 16, generator=torch.Generator().manual_seed(0)) - 0.9
    latents = (pixels + 0.2) * 1.3
    again = family.from_images(family.decode(latents), height=8, width=16, device=latents.device)
    assert (again - latents).abs().max() < 1.3 / 120  # 8 bits a pixel


# -- pairs of the data ----------------------------------------------------------------------------


def test_two_stored_images_are_a_pair_with_one_noise(tuned):
    engine = StoredEngine(flow_engine(tuned), picture, preferred="good", rejected="bad")
    rollout = engine.generate(PROMPTS, group_size=2, seed=5, version=4)
    t = rollout.trajectories
    assert t.group.tolist() == [7, 7, 3, 3]
    assert t.pairs.tolist() == [[0, 1], [2, 3]]
    assert t.version.tolist() == [4] * 4
    assert rollout.cost.forwards == 0
    wanted = [picture(p, column) for p in PROMPTS for column in ("good", "bad")]
    assert [s.image.tobytes() for s in rollout.samples] == [i.tobytes() for i in wanted]
    clean = tuned.family.from_images(wanted, height=SIZE, width=SIZE, device=tuned.device)
    assert torch.equal(t.payload.clean, clean)
    noise = noise_of(t)
    torch.testing.assert_close(noise[0], noise[1])
    assert torch.equal(t.sigma[0], t.sigma[1])
    assert not torch.allclose(noise[0], noise[2])


def test_their_log_probability_is_minus_the_error_of_the_velocity(tuned):
    engine = StoredEngine(flow_engine(tuned), picture, preferred="good", rejected="bad")
    t = engine.generate(PROMPTS, group_size=2, seed=5).trajectories
    found = tuned.evaluate(t).log_prob
    encoded = tuned.encode(PROMPTS)
    for row, draw in [(0, 0), (1, 2), (3, 1)]:
        sigma, clean = t.sigma[row, draw], t.payload.clean[row]
        noise = noise_of(t)[row, draw]
        state = (1 - sigma) * clean + sigma * noise
        velocity = tuned.velocity(state[None], sigma[None], encoded, torch.tensor([row // 2]))
        error = ((velocity[0] - (noise - clean)) ** 2).mean()
        torch.testing.assert_close(found[row, draw], -error, rtol=1e-4, atol=1e-6)


def test_the_method_trains_the_pairs_of_the_data_whatever_the_rewards_say(tuned):
    engine = StoredEngine(flow_engine(tuned), picture, preferred="good", rejected="bad")
    t = engine.generate(PROMPTS, group_size=2, seed=5).trajectories
    t = t.replace(rewards={"any": torch.tensor([0.0, 1.0, 0.5, 0.5])})
    prepared = load_method("diffusion-dpo", pairs="given").prepare(t)
    assert prepared.advantage[:, 0].tolist() == [1, -1, 1, -1]
    assert prepared.mask.all()


# -- samples beside the data's images -------------------------------------------------------------


def test_samples_take_the_place_of_rejected_images(tuned):
    flow = flow_engine(tuned)
    engine = StoredEngine(flow, picture, preferred="good")
    rollout = engine.generate(PROMPTS, group_size=3, seed=5)
    t, drawn = rollout.trajectories, flow.generate(PROMPTS, group_size=2, seed=5)
    assert t.group.tolist() == [7, 7, 7, 3, 3, 3]
    assert t.pairs.tolist() == [[0, 1], [0, 2], [3, 4], [3, 5]]
    assert torch.equal(t.payload.clean[[1, 2, 4, 5]], drawn.trajectories.payload.clean)
    noise = noise_of(t)
    for row in (1, 2):
        torch.testing.assert_close(noise[row], noise[0])
    assert rollout.cost.forwards == drawn.cost.forwards
    assert [sample.prompt.index for sample in rollout.samples] == t.group.tolist()
    assert torch.equal(tuned.evaluate(t).log_prob != 0, t.mask)


def test_the_reference_draws_and_the_policy_comes_back(tuned):
    flow = flow_engine(tuned)
    ours = flow.generate(PROMPTS, group_size=2, seed=5).trajectories.payload.clean
    with tuned.reference():
        wanted = flow.generate(PROMPTS, group_size=2, seed=5).trajectories.payload.clean
    by_reference = ByReference(flow, tuned)
    found = by_reference.generate(PROMPTS, group_size=2, seed=5).trajectories.payload.clean
    assert torch.equal(found, wanted)
    assert not torch.allclose(found, ours)
    again = flow.generate(PROMPTS, group_size=2, seed=5).trajectories.payload.clean
    assert torch.equal(again, ours)
    mixed = StoredEngine(flow, picture, preferred="good", drawn=by_reference)
    clean = mixed.generate(PROMPTS, group_size=3, seed=5).trajectories.payload.clean
    assert torch.equal(clean[[1, 2, 4, 5]], wanted)


# -- refusals -------------------------------------------------------------------------------------


@pytest.mark.parametrize(("rejected", "size"), [("bad", 3), ("bad", 1), (None, 1)])
def test_groups_that_do_not_fit_are_refused(tuned, rejected, size):
    engine = StoredEngine(flow_engine(tuned), picture, preferred="good", rejected=rejected)
    with pytest.raises(ConfigError, match=f"group_size is {size}"):
        engine.generate(PROMPTS, group_size=size, seed=0)


def test_a_method_on_denoising_steps_is_refused(tuned):
    plain = FlowEngine(tuned, num_steps=4, height=SIZE, width=SIZE)
    with pytest.raises(ConfigError, match="no denoising steps"):
        StoredEngine(plain, picture, preferred="good")
