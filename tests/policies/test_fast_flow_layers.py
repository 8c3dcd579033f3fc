"""Networks of image and video models keep their values and gradients with faster layers."""

import pytest
import torch
from fixtures_diffusion import sd15_pipeline, sdxl_pipeline
from fixtures_flow import flux_pipeline, sd3_pipeline
from fixtures_scales import tiny_scales
from fixtures_tokens import relative_error
from fixtures_video import wan_pipeline

from mmgrpo.policies import products
from mmgrpo.policies.adapters import trainable_parameters
from mmgrpo.policies.flow import FlowPolicy
from mmgrpo.policies.image_scales import ImageScalesPolicy
from mmgrpo.protocols import Prompt
from mmgrpo.rollout.image_scales import ImageScalesEngine

PIPELINES = {
    "sd3": sd3_pipeline,
    "flux": flux_pipeline,
    "sd15": sd15_pipeline,
    "sdxl": sdxl_pipeline,
    "wan": wan_pipeline,
}
PROMPTS = [Prompt(0, "draw the number 42"), Prompt(1, "red circle")]


@pytest.fixture
def called(monkeypatch):
    """Shapes of the products that were not left to PyTorch; none is too small."""
    monkeypatch.setattr(products, "WORTH", 1)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    shapes, plain = [], products.multiply
    monkeypatch.setattr(
        products, "multiply", lambda x, *rest: (shapes.append(x.shape), plain(x, *rest))[1]
    )
    return shapes


def velocity_and_gradients(policy):
    generator = torch.Generator().manual_seed(3)
    size = 16
    latents = torch.randn(3, *policy.family.latent_shape(size, size), generator=generator)
    found = policy.velocity(
        latents, torch.tensor([0.9, 0.5, 0.2]), policy.encode(PROMPTS), torch.tensor([0, 1, 1])
    )
    upstream = torch.randn(found.shape, generator=generator)
    trained = list(trainable_parameters(policy.network).values())
    grads = torch.autograd.grad((found * upstream).sum(), trained, allow_unused=True)
    return found.detach(), [torch.zeros(1) if grad is None else grad for grad in grads]


@pytest.mark.parametrize("lora", [None, {"rank": 2, "alpha": 4.0}], ids=["full", "lora"])
@pytest.mark.parametrize("family", PIPELINES)
def test_a_flow_network_keeps_its_values_and_gradients(family, lora, called):
    options = {} if lora is None else {"lora": lora}
    plain = velocity_and_gradients(FlowPolicy(PIPELINES[family](), fast_layers=False, **options))
    assert not called
    fast = velocity_and_gradients(FlowPolicy(PIPELINES[family](), **options))
    assert called
    torch.testing.assert_close(fast[0], plain[0], atol=1e-5, rtol=1e-5)
    assert relative_error(fast[1], plain[1]) < 1e-5


def test_a_next_scale_network_keeps_its_values_and_gradients(called):
    policies = [ImageScalesPolicy(tiny_scales(), fast_layers=on) for on in (False, True)]
    prompts = [Prompt(0, "1"), Prompt(1, "2")]
    drawn = ImageScalesEngine(policies[0]).generate(prompts, group_size=2, seed=0).trajectories

    def evaluated(policy):
        found = policy.evaluate(drawn).log_prob
        weight = torch.linspace(0.5, 2.0, found.numel()).view_as(found)
        trained = list(trainable_parameters(policy.network).values())
        return found.detach(), torch.autograd.grad((found * weight).sum(), trained)

    plain = evaluated(policies[0])
    assert not called
    fast = evaluated(policies[1])
    assert called
    torch.testing.assert_close(fast[0], plain[0], atol=1e-5, rtol=1e-5)
    assert relative_error(fast[1], plain[1]) < 1e-5
