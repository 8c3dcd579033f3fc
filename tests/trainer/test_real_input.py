"""Models and data of other code: trained by the packaged configurations, opened by others."""

import json

import pytest
import torch
from fixtures_flow import SIZE, sd3_pipeline
from fixtures_runs import REWARDS, metrics_of
from safetensors.torch import load_file

from mmgrpo import build
from mmgrpo.cli.main import main
from mmgrpo.config import load_config


def own_tokenizer():
    """A byte-level BPE as the tokenizers library trains it; nothing of ours in it."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300, special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False,
    )  # fmt: skip
    core.train_from_iterator(["how many apples are there if I buy 3 and eat 1?"], trainer)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core, eos_token="<|im_end|>", pad_token="<|endoftext|>"
    )
    tokenizer.chat_template = (
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    return tokenizer


@pytest.fixture(scope="module")
def qwen(tmp_path_factory):
    from transformers import Qwen2Config, Qwen2ForCausalLM

    folder, tokenizer = tmp_path_factory.mktemp("theirs") / "qwen", own_tokenizer()
    torch.manual_seed(3)
    config = Qwen2Config(
        vocab_size=320, hidden_size=32, intermediate_size=64, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=2048,
        tie_word_embeddings=True, eos_token_id=tokenizer.eos_token_id, pad_token_id=None,
    )  # fmt: skip
    Qwen2ForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def questions(tmp_path_factory):
    """Chat rows with columns that no reward of ours asks for."""
    file = tmp_path_factory.mktemp("data") / "mine.jsonl"
    rows = [
        {
            "prompt": [{"role": "user", "content": f"How much is {n} and {n}? Größe ✓"}],
            "answer": str(2 * n),
            "source": {"book": "mine", "page": n},
            "difficulty": n / 10,
            "tags": None if n % 2 else ["easy"],
        }
        for n in range(8)
    ]
    file.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    return file


def train_gsm8k(qwen, questions, run_dir, *more):
    return main([
        "train", "configs/text/qwen2.5-0.5b-gsm8k.yaml", f"model.path={qwen}",
        f"data.train={questions}", f"data.eval={questions}", f"run_dir={run_dir}",
        f"rewards.1.name={REWARDS}:spread", "rollout.prompts_per_step=4", "rollout.group_size=4",
        "rollout.max_new_tokens=6", "trainer.steps=2", "trainer.learning_rate=1e-3",
        "eval.prompts=2", *more,
    ])  # fmt: skip


def logits_of(model, tokenizer):
    text = tokenizer.apply_chat_template([{"role": "user", "content": "1 and 1?"}], tokenize=False)
    with torch.no_grad():
        return model(**tokenizer(text, return_tensors="pt")).logits


def policy_of(config_name, checkpoint, *overrides):
    config = load_config(config_name, overrides)
    return build.load_policy(config, build.make_method(config), checkpoint)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_qwen2_of_other_code_trains_and_opens_with_transformers(qwen, questions, tmp_path, dtype):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    assert train_gsm8k(qwen, questions, tmp_path / "run", f"model.dtype={dtype}") == 0
    rows = metrics_of(tmp_path / "run")
    assert [row["step"] for row in rows] == [0, 1, 2]
    assert rows[2]["grad_norm"] > 0
    checkpoint = tmp_path / "run" / "checkpoints" / "step_000002"
    model = AutoModelForCausalLM.from_pretrained(checkpoint / "hf")
    tokenizer = AutoTokenizer.from_pretrained(checkpoint / "hf")
    assert model.dtype == getattr(torch, dtype)
    state = load_file(checkpoint / "state.safetensors")
    name = "model.layers.0.mlp.down_proj.weight"
    trained = model.get_parameter(name)
    assert torch.equal(trained, state[f"optimizer/weight/{name}"].to(trained.dtype))
    first = AutoModelForCausalLM.from_pretrained(qwen).get_parameter(name)
    assert not torch.equal(trained.float(), first)
    exact = "speed.fast_layers=false"  # the others add in another order
    policy = policy_of(
        "text/qwen2.5-0.5b-gsm8k", checkpoint, f"model.dtype={dtype}", f"model.path={qwen}", exact
    )
    policy.model.eval()
    expected = logits_of(policy.model, policy.tokenizer)
    assert torch.equal(logits_of(model, tokenizer), expected)


def test_its_lora_opens_with_peft(qwen, questions, tmp_path):
    from peft import AutoPeftModelForCausalLM

    more = ("model.dtype=float32", "model.lora={rank: 2}", "model.gradient_checkpointing=false")
    assert train_gsm8k(qwen, questions, tmp_path / "run", *more) == 0
    checkpoint = tmp_path / "run" / "checkpoints" / "step_000002"
    model = AutoPeftModelForCausalLM.from_pretrained(checkpoint / "hf").eval()
    policy = policy_of("text/qwen2.5-0.5b-gsm8k", checkpoint, *more, f"model.path={qwen}")
    expected = logits_of(policy.network, policy.tokenizer)
    torch.testing.assert_close(logits_of(model, policy.tokenizer), expected, rtol=1e-6, atol=1e-6)
    with model.disable_adapter():
        assert not torch.allclose(logits_of(model, policy.tokenizer), expected, atol=1e-4)


# -- images -------------------------------------------------------------------------------------


ABSENT = {"text_encoder_3": None, "tokenizer_3": None}
"""Diffusers wants to be told which parts a pipeline without T5 has not."""


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory):
    folder = tmp_path_factory.mktemp("theirs") / "sd3"
    sd3_pipeline(seed=5).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def prompts(tmp_path_factory):
    file = tmp_path_factory.mktemp("data") / "prompts.jsonl"
    rows = [{"caption": f"draw the number {n}", "id": n} for n in (1, 2, 3, 42)]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def train_sd35(pipeline, prompts, run_dir, *more):
    return main([
        "train", "configs/image/sd3.5-medium-lora.yaml", f"model.path={pipeline}",
        f"data.train={prompts}", f"data.eval={prompts}", "data.prompt_column=caption",
        f"rewards={REWARDS}:brightness", f"eval.judge={REWARDS}:brightness", f"run_dir={run_dir}",
        "model.dtype=float32", f"rollout.height={SIZE}", f"rollout.width={SIZE}",
        "rollout.num_steps=3", "rollout.prompts_per_step=2", "rollout.group_size=4",
        "trainer.steps=2", "trainer.learning_rate=1e-2", "eval.num_steps=2", "eval.prompts=2",
        *more,
    ])  # fmt: skip


def velocity_of(network):
    generator = torch.Generator().manual_seed(0)

    def noise(*shape):
        return torch.randn(shape, generator=generator)

    with torch.no_grad():
        return network(
            hidden_states=noise(2, 4, SIZE // 2, SIZE // 2),
            encoder_hidden_states=noise(2, 6, 32),
            pooled_projections=noise(2, 16),
            timestep=torch.tensor([900.0, 300.0]),
        ).sample


def test_a_pipeline_of_other_code_trains_and_opens_with_diffusers(pipeline, prompts, tmp_path):
    from diffusers import StableDiffusion3Pipeline

    more = ("model.dtype=float32", "model.lora=null", "trainer.ema_decay=null")
    assert train_sd35(pipeline, prompts, tmp_path / "run", *more) == 0
    checkpoint = tmp_path / "run" / "checkpoints" / "step_000002"
    pipe = StableDiffusion3Pipeline.from_pretrained(checkpoint / "hf", **ABSENT)
    policy = policy_of("image/sd3.5-medium-lora", checkpoint, f"model.path={pipeline}", *more)
    assert torch.equal(velocity_of(pipe.transformer), velocity_of(policy.network))
    first = StableDiffusion3Pipeline.from_pretrained(pipeline, **ABSENT).transformer
    assert not torch.allclose(velocity_of(first), velocity_of(pipe.transformer), atol=1e-4)
    pipe.set_progress_bar_config(disable=True)
    image = pipe("draw the number 2", num_inference_steps=2, height=SIZE, width=SIZE).images[0]
    assert image.size == (SIZE, SIZE)


def test_its_adapter_opens_with_peft_and_with_diffusers(pipeline, prompts, tmp_path):
    from diffusers import StableDiffusion3Pipeline
    from peft import PeftModel

    more = ("model.dtype=float32", "trainer.ema_decay=null")
    assert train_sd35(pipeline, prompts, tmp_path / "run", *more) == 0
    checkpoint = tmp_path / "run" / "checkpoints" / "step_000002"
    policy = policy_of("image/sd3.5-medium-lora", checkpoint, f"model.path={pipeline}", *more)
    expected = velocity_of(policy.network)

    def fresh():
        return StableDiffusion3Pipeline.from_pretrained(pipeline, **ABSENT)

    assert not torch.allclose(velocity_of(fresh().transformer), expected, atol=1e-4)
    by_peft = PeftModel.from_pretrained(fresh().transformer, checkpoint / "hf")
    torch.testing.assert_close(velocity_of(by_peft), expected, rtol=1e-5, atol=1e-6)
    pipe = fresh()
    pipe.load_lora_weights(checkpoint / "hf")
    torch.testing.assert_close(velocity_of(pipe.transformer), expected, rtol=1e-5, atol=1e-6)


def test_the_average_is_what_is_evaluated_and_exported(pipeline, prompts, tmp_path):
    more = ("trainer.ema_decay=0.5", "model.lora=null")
    assert train_sd35(pipeline, prompts, tmp_path / "run", *more) == 0
    checkpoint = tmp_path / "run" / "checkpoints" / "step_000002"
    state = load_file(checkpoint / "state.safetensors")
    exported = load_file(checkpoint / "hf/transformer/diffusion_pytorch_model.safetensors")
    averages = {k.removeprefix("ema/"): v for k, v in state.items() if k.startswith("ema/")}
    averages.pop("__updates__")
    assert len(averages) > 10
    for name, value in averages.items():
        assert torch.equal(exported[name], value)
    assert any(
        not torch.equal(state[f"optimizer/weight/{name}"], value)
        for name, value in averages.items()
    )
    config = load_config(tmp_path / "run" / "config.yaml")
    again = build.evaluate(config, checkpoint)
    last = metrics_of(tmp_path / "run")[-1]
    assert again["eval/success"] == last["eval/success"]


def test_vision_weights_open_with_transformers(models, tmp_path):
    from fixtures_runs import document
    from transformers import AutoModelForImageTextToText

    doc = document(models, "vision", tmp_path / "run", trainer={"steps": 1})
    config = load_config(doc)
    build.train(config)
    checkpoint = tmp_path / "run" / "checkpoints" / "step_000001"
    model = AutoModelForImageTextToText.from_pretrained(checkpoint / "hf")
    policy = build.load_policy(config, build.make_method(config), checkpoint)
    for name, parameter in policy.network.named_parameters():
        assert torch.equal(parameter, model.get_parameter(name))
