"""What a backward pass is thought to need, beside what torch's allocator was asked for."""

from types import SimpleNamespace

import pytest
import torch
from fixtures_runs import document, weight_bytes
from fixtures_tokens import trajectories_of
from torch.profiler import ProfilerActivity, profile

from mmgrpo.build import train
from mmgrpo.config import load_config
from mmgrpo.config.layer_shape import LayerShape, layer_shape, read_layer_shape
from mmgrpo.playground.tokenizer import build_tokenizer
from mmgrpo.policies.autoregressive import AutoregressivePolicy
from mmgrpo.protocols import Prompt
from mmgrpo.trainer import activations
from mmgrpo.trainer.activations import (
    MicroBatch,
    activation_bytes,
    available_memory,
    choose_checkpointing,
    kept_values,
    training_bytes,
)

WIDE = {"hidden_size": 128, "intermediate_size": 512, "num_attention_heads": 4}
MANY_HEADS = {"hidden_size": 128, "intermediate_size": 128, "num_attention_heads": 16}


def measured_peak(call):
    """Most bytes that were allocated at the same time during a call."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
        call()
    events = [e for e in seen.profiler.kineto_results.events() if e.name() == "[memory]"]
    now = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        now += event.nbytes()
        peak = max(peak, now)
    return peak


def make_policy(sizes, *, layers=4, vocabulary=300, **options):
    from transformers import Qwen2Config, Qwen2ForCausalLM

    tokenizer = build_tokenizer()
    config = Qwen2Config(
        **sizes, num_hidden_layers=layers, num_key_value_heads=2, vocab_size=vocabulary,
        max_position_embeddings=1024, bos_token_id=None, eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    torch.manual_seed(0)
    model = Qwen2ForCausalLM(config)
    return AutoregressivePolicy((model, tokenizer), reference="none", **options)


LORA = {"lora": {"rank": 4, "alpha": 8.0}}
MANY_ROWS = {"sizes": MANY_HEADS, "prompt": 256, "completion": 8, "rows": 32, "groups": 1}
CASES = {
    "packed": {},
    "packed, long prompts": {"prompt": 256, "completion": 16},
    "packed, one prompt of many": MANY_ROWS,
    "packed, checkpointing": {"gradient_checkpointing": True},
    "shared prompts": {"pack": False},
    "shared long prompts": {"prompt": 256, "completion": 16, "pack": False},
    "shared long prompts, many heads": {
        "sizes": MANY_HEADS, "prompt": 256, "completion": 16, "pack": False,
    },
    "a prompt laid out for many": {**MANY_ROWS, "pack": False},
    "no shared prompts": {"share_prompts": False},
    "attention more than the MLP": {"sizes": MANY_HEADS},
    "more layers": {"layers": 12},
    "a large vocabulary": {"vocabulary": 40000},
    "bfloat16": {"dtype": "bfloat16"},
    "LoRA": LORA,
    "bfloat16 and LoRA": {"dtype": "bfloat16", **LORA},
    "checkpointing": {"gradient_checkpointing": True, "pack": False},
    "checkpointing, more layers": {"gradient_checkpointing": True, "layers": 12},
    "checkpointing and LoRA": {"gradient_checkpointing": True, **LORA},
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_the_estimate_is_within_a_factor_of_two_of_the_measured_peak(case):
    given = {"rows": 8, "groups": 2, "prompt": 48, "completion": 48, "sizes": WIDE, **CASES[case]}
    names = ("rows", "groups", "prompt", "completion", "sizes")
    rows, groups, length, width, sizes = (given.pop(name) for name in names)
    policy = make_policy(sizes, **given)
    prompts = [Prompt(index, "a" * length) for index in range(groups)]
    owners = [row * groups // rows for row in range(rows)]
    batch = trajectories_of(policy, prompts, owners, length=width)
    batch = batch.replace(mask=torch.ones_like(batch.mask))

    def step():
        policy.evaluate(batch).log_prob.sum().backward()

    step()  # the gradients are there from now on
    shape = layer_shape(policy.model.config.to_dict())
    estimate = activation_bytes(
        shape,
        MicroBatch(rows, rows * width, groups, length),
        logits=rows * width * shape.vocabulary,
        element=policy.model.dtype.itemsize,
        shares_prompts=given.get("share_prompts", True),
        packed=policy.packs_rows,
        checkpointing=given.get("gradient_checkpointing", False),
    )
    assert 0.5 < estimate / measured_peak(step) < 2


SHAPE = LayerShape(layers=10, hidden=64, inner=256, queries=64, keys=32, vocabulary=1000)
BATCH = MicroBatch(rows=8, decisions=8 * 100, prompts=2, prompt_tokens=50)
PLAIN = {"logits": 1000, "element": 4, "shares_prompts": True}


def choose(available, beside=0, **changes):
    return choose_checkpointing(
        SHAPE, BATCH, **{**PLAIN, **changes}, beside=beside, available=available
    )


def test_checkpointing_starts_where_the_memory_ends():
    plain = activation_bytes(SHAPE, BATCH, **PLAIN)
    again = activation_bytes(SHAPE, BATCH, **PLAIN, checkpointing=True)
    assert again < plain / 3
    enough = int(plain / activations.SHARE) + 2
    assert not choose(enough).on
    assert choose(enough - 10).on
    assert choose(enough, beside=10).on
    assert "lower trainer.micro_batch_size" not in choose(enough - 10).reason
    assert "lower trainer.micro_batch_size" in choose(again).reason
    assert "8 samples with prompts of 50 tokens would need about" in choose(again).reason


def test_checkpointing_stays_off_where_it_saves_nothing():
    """It gives up shared prompts: with one layer and long prompts that is more than it saves."""
    shape = LayerShape(layers=1, hidden=64, inner=256, queries=64, keys=64, vocabulary=10)
    batch = MicroBatch(rows=64, decisions=64, prompts=1, prompt_tokens=1000)
    decision = choose_checkpointing(shape, batch, **PLAIN, beside=0, available=1)
    assert not decision.on
    assert "checkpointing would not help" in decision.reason


def test_what_is_counted():
    assert kept_values(SHAPE) == 6 * 64 + 3 * 64 + 2 * 32 + 4 * 256
    assert training_bytes(10, 4) == 10 * (4 + 8)
    assert training_bytes(10, 2) == 10 * (2 + 4 + 8)
    more = MicroBatch(rows=8, decisions=8 * 200, prompts=2, prompt_tokens=100)
    none = {**PLAIN, "logits": 0}
    assert activation_bytes(SHAPE, more, **none) == 2 * activation_bytes(SHAPE, BATCH, **none)


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({"n_layer": 3, "n_embd": 8, "n_head": 2, "vocab_size": 9, "n_inner": None},
         LayerShape(3, 8, 32, 8, 8, 9)),
        ({"text_config": {"num_hidden_layers": 3, "hidden_size": 8, "num_attention_heads": 4,
                          "num_key_value_heads": 1, "head_dim": 6, "intermediate_size": 20,
                          "vocab_size": 9}, "vocab_size": 1},
         LayerShape(3, 8, 20, 24, 6, 9)),
        ({"hidden_size": 8, "num_attention_heads": 4, "vocab_size": 9}, None),
        ({"num_hidden_layers": 3, "hidden_size": 8, "num_attention_heads": 4, "vocab_size": 9,
          "num_experts": 8}, None),
        ({}, None),
    ],
    ids=["gpt2", "multimodal", "no layers", "experts", "nothing"],
)  # fmt: skip
def test_the_shape_is_read_from_the_names_that_families_use(config, expected):
    assert layer_shape(config) == expected


def test_a_folder_without_a_shape_has_none(tmp_path):
    assert read_layer_shape(tmp_path) is None
    (tmp_path / "config.json").write_text("{")
    assert read_layer_shape(tmp_path) is None
    (tmp_path / "config.json").write_text(
        '{"n_layer": 3, "n_embd": 8, "n_head": 2, "vocab_size": 9}'
    )
    assert read_layer_shape(tmp_path) == LayerShape(3, 8, 32, 8, 8, 9)


def test_weights_are_counted():
    policy = make_policy(WIDE)
    shape = layer_shape(policy.model.config.to_dict())
    actual = sum(value.numel() for value in policy.model.parameters())
    assert 0.98 < shape.weights / actual < 1.02  # biases and norms are left out


def test_memory_that_cannot_be_asked_is_unknown():
    free = available_memory(torch.device("cpu"))
    assert free is not None
    assert free > 2**20
    assert available_memory(SimpleNamespace(type="mps")) is None


@pytest.mark.parametrize("modality", ["text", "vision"])
def test_a_run_has_the_same_bytes_either_way(models, tmp_path, modality):
    """So that a run may be resumed where there is more memory, or less."""
    for name, on in (("on", True), ("off", False)):
        changes = {"model": {"gradient_checkpointing": on}, "trainer": {"steps": 2}}
        train(load_config(document(models, modality, tmp_path / name, **changes)))
    assert weight_bytes(tmp_path / "on") == weight_bytes(tmp_path / "off")
