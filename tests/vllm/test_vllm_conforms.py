"""vLLM under the conformance kit: in this process, on text, with an adapter and on images."""

import pytest
import torch
from engines.engine_conformance import EngineConformance
from fixtures_tokens import _awake, image_prompts, text_prompts, tiny_text
from transformers import AutoConfig, AutoModelForImageTextToText
from vllm_server import Server

from mmgrpo.config.paths import locate
from mmgrpo.policies.autoregressive import AutoregressivePolicy
from mmgrpo.policies.loading import load_processor, save_processor
from mmgrpo.policies.multimodal import VisionLanguagePolicy
from mmgrpo.rollout.vllm_engine import vllm_engine

pytestmark = pytest.mark.vllm

HEADS = {"hidden_size": 64, "num_attention_heads": 2, "num_key_value_heads": 1}
"""vLLM's attention on CPUs wants heads of at least 32."""
PLACE = {"dtype": "float32", "lora_rank": None, "url": None, "folder": None, "options": {}}


ENDS = [256, *range(ord("a"), ord("z") + 1)]
"""Many tokens end a completion, so that some of a random model's do."""


def save_text(folder, *, tied=False):
    """A tiny random model, as a folder."""
    model, tokenizer = tiny_text(**HEADS, tie_word_embeddings=tied)
    model.generation_config.eos_token_id = ENDS
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def save_vision(folder):
    """A random model of the playground's shape, and its processor, as a folder."""
    from transformers import Qwen2VLVideoProcessor  # needs torchvision

    shape = locate("playground:vision/model")
    torch.manual_seed(0)
    config = AutoConfig.from_pretrained(shape)
    config.vision_config.rope_parameters["rope_theta"] = 10000.0  # the only one that vLLM knows
    model = AutoModelForImageTextToText.from_config(config)
    model = _awake(model.float(), load_processor(shape).tokenizer)
    model.generation_config.eos_token_id = ENDS
    model.save_pretrained(folder)
    processor = load_processor(shape)
    save_processor(processor, folder)
    images = processor.image_processor
    # The playground's folders have none, and vLLM wants one although there are no videos.
    Qwen2VLVideoProcessor(
        patch_size=images.patch_size,
        merge_size=images.merge_size,
        temporal_patch_size=images.temporal_patch_size,
    ).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def text_folder(tmp_path_factory):
    return save_text(tmp_path_factory.mktemp("text"))


def write_run(work, model, modality="text"):
    """A configuration for `mmgrpo serve`."""
    data = locate(f"playground:{modality}/train.jsonl")
    file = work / "run.yaml"
    file.write_text(
        f"modality: {modality}\nmodel: {{path: {model}}}\ndata: {{train: {data}}}\n"
        "rewards: exact_answer\ntrainer: {steps: 1, learning_rate: 1.0e-3}\n"
    )
    return file


class VllmConformance(EngineConformance):
    @pytest.fixture(scope="class")
    @classmethod
    def place(cls):
        return PLACE

    @pytest.fixture
    def make_engine(self, folder, place):
        def make(policy, **settings):
            return vllm_engine(policy, model=str(folder), **place, **settings)

        return make


class TestText(VllmConformance):
    @pytest.fixture(scope="class")
    @classmethod
    def folder(cls, text_folder):
        return text_folder

    @pytest.fixture(scope="class")
    @classmethod
    def policy(cls, text_folder):
        return AutoregressivePolicy(text_folder)

    @pytest.fixture
    def prompts(self):
        return text_prompts()


class TestTiedEmbeddings(TestText):
    """The head is the embedding, and in no checkpoint."""

    @pytest.fixture(scope="class")
    @classmethod
    def folder(cls, tmp_path_factory):
        return save_text(tmp_path_factory.mktemp("tied"), tied=True)

    @pytest.fixture(scope="class")
    @classmethod
    def policy(cls, folder):
        return AutoregressivePolicy(folder)


class TestAdapter(TestText):
    @pytest.fixture(scope="class")
    @classmethod
    def place(cls):
        return {**PLACE, "lora_rank": 4}

    @pytest.fixture(scope="class")
    @classmethod
    def policy(cls, text_folder):
        return AutoregressivePolicy(text_folder, lora={"rank": 4, "alpha": 8.0}, reference="none")


class TestVision(VllmConformance):
    draws = 400

    @pytest.fixture(scope="class")
    @classmethod
    def folder(cls, tmp_path_factory):
        return save_vision(tmp_path_factory.mktemp("vision"))

    @pytest.fixture(scope="class")
    @classmethod
    def policy(cls, folder):
        return VisionLanguagePolicy(folder, train_vision=True)

    @pytest.fixture
    def prompts(self):
        return image_prompts()


class TestServer(TestText):
    """The same weights, through HTTP and a shared folder."""

    @pytest.fixture(scope="class")
    @classmethod
    def place(cls, text_folder, tmp_path_factory):
        folder = tmp_path_factory.mktemp("server")
        server = Server(write_run(folder, text_folder), log=folder / "vllm.log")
        yield {**PLACE, "url": server.url, "folder": str(folder / "weights")}
        server.kill()


class TestServerWithAdapter(TestAdapter):
    @pytest.fixture(scope="class")
    @classmethod
    def place(cls, text_folder, tmp_path_factory):
        folder = tmp_path_factory.mktemp("server")
        run = write_run(folder, text_folder)
        server = Server(run, "model.lora.rank=4", log=folder / "vllm.log")
        yield {**PLACE, "lora_rank": 4, "url": server.url}
        server.kill()


class TestServerWithImages(TestVision):
    @pytest.fixture(scope="class")
    @classmethod
    def place(cls, folder, tmp_path_factory):
        work = tmp_path_factory.mktemp("server")
        server = Server(write_run(work, folder, "vision"), log=work / "vllm.log")
        yield {**PLACE, "url": server.url}
        server.kill()
