"""The in-process engine under the conformance kit, on text and on images."""

import pytest
import torch
from engines.engine_conformance import EngineConformance
from fixtures_tokens import image_prompts, text_prompts, tiny_text, tiny_vision

from mmgrpo.policies.autoregressive import AutoregressivePolicy
from mmgrpo.policies.multimodal import VisionLanguagePolicy
from mmgrpo.rollout.autoregressive import AutoregressiveEngine


def likely_to_end(network, by=3.0):
    """Make the end token likelier, so that some completions of a random model end."""
    network.get_output_embeddings().register_forward_hook(
        lambda module, args, output: output.index_add(
            -1, torch.tensor([256]), output.new_full((*output.shape[:-1], 1), by)
        )
    )


class NativeConformance(EngineConformance):
    @pytest.fixture
    def make_engine(self):
        return AutoregressiveEngine


class TestText(NativeConformance):
    @pytest.fixture(scope="class")
    @classmethod
    def policy(cls):
        policy = AutoregressivePolicy(tiny_text())
        likely_to_end(policy.model)
        return policy

    @pytest.fixture
    def prompts(self):
        return text_prompts()


class TestVision(NativeConformance):
    @pytest.fixture(scope="class")
    @classmethod
    def policy(cls):
        policy = VisionLanguagePolicy(tiny_vision())
        likely_to_end(policy.model)
        return policy

    @pytest.fixture
    def prompts(self):
        return image_prompts()
