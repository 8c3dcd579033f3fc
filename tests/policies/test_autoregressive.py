"""The text policy: its log-probabilities against a plain forward of each row by itself."""

import pytest
import torch
from fixtures_tokens import (
    TEXT_FAMILIES,
    distributions,
    gradients,
    relative_error,
    text_prompts,
    tiny_text,
    trajectories_of,
    with_moved_adapter,
)

from mmgrpo.core.trajectories import Trajectories
from mmgrpo.errors import DataError, MethodError, ModelError
from mmgrpo.policies import token_logits
from mmgrpo.policies.autoregressive import AutoregressivePolicy
from mmgrpo.protocols import Prompt, Request

RAGGED = [0, 0, 0, 1, 2, 2]
LORA = {"rank": 4, "alpha": 8.0, "targets": None, "dropout": 0.0}
ROUNDING = 1e-5
"""Float32 sums in another order."""


def make_policy(family="qwen2", *, lora=None, **options):
    return with_moved_adapter(AutoregressivePolicy(tiny_text(family), lora=lora, **options))


@pytest.mark.parametrize("lora", [None, LORA], ids=["full", "lora"])
@pytest.mark.parametrize("family", TEXT_FAMILIES)
def test_log_probs_and_entropies_are_those_of_each_row_alone(family, lora):
    policy = make_policy(family, lora=lora)
    trajectories = trajectories_of(policy, text_prompts(), RAGGED, temperature=0.7)
    found = policy.evaluate(trajectories, Request(entropy=True))
    assert found.log_prob.dtype == found.entropy.dtype == torch.float32
    for row, mask in enumerate(trajectories.mask):
        log_p = distributions(policy.network, trajectories, row)
        ids = trajectories.payload.completion_ids[row]
        expected = log_p.gather(1, ids[:, None]).squeeze(1) * mask
        entropy = -(log_p.exp() * log_p).sum(dim=1) * mask
        torch.testing.assert_close(found.log_prob[row], expected, atol=ROUNDING, rtol=0)
        torch.testing.assert_close(found.entropy[row], entropy, atol=ROUNDING, rtol=0)


@pytest.mark.parametrize("lora", [None, LORA], ids=["full", "lora"])
@pytest.mark.parametrize("family", TEXT_FAMILIES)
def test_the_shared_prompt_gives_the_values_and_gradients_of_the_repeated_one(family, lora):
    policy = make_policy(family, lora=lora, pack=False)
    trajectories = trajectories_of(policy, text_prompts(), RAGGED)
    shared = policy.evaluate(trajectories, Request(entropy=True))
    plain = policy.evaluate_plain(trajectories, Request(entropy=True))
    assert policy._shares_prompts
    assert policy._selective
    torch.testing.assert_close(shared.log_prob, plain.log_prob, atol=ROUNDING, rtol=0)
    assert relative_error(gradients(policy, shared), gradients(policy, plain)) < ROUNDING


def test_a_prompt_is_read_once_per_evaluation_and_the_head_where_it_counts():
    policy = make_policy(pack=False)
    trajectories = trajectories_of(policy, text_prompts(), RAGGED)
    read, head = [], []
    policy.model.get_input_embeddings().register_forward_hook(
        lambda module, args, output: read.append(tuple(args[0].shape))
    )
    policy.model.get_output_embeddings().register_forward_hook(
        lambda module, args, output: head.append(output.shape[:-1].numel())
    )
    policy.evaluate(trajectories)
    longest = int(trajectories.payload.prompts.mask.sum(dim=1).max())
    assert read == [(3, longest), (6, 8)]
    assert [count for count in head if count] == [6, int(trajectories.mask[:, 1:].sum())]
    assert policy.forwards == 2


@pytest.mark.parametrize("pack", [True, False])
def test_only_masked_in_decisions_are_answered(pack):
    policy = make_policy(pack=pack)
    trajectories = trajectories_of(policy, text_prompts(), RAGGED)
    every = policy.evaluate(trajectories).log_prob
    mask = trajectories.mask.clone()
    mask[:, 1::3] = False  # tokens of tools, or not worth training
    mask[3] = False
    mask[:, 7:] = False
    found = policy.evaluate(trajectories.replace(mask=mask), Request(entropy=True))
    torch.testing.assert_close(found.log_prob, every * mask, atol=ROUNDING, rtol=0)
    assert (found.entropy[~mask] == 0).all()
    first = torch.zeros_like(mask)
    first[:, 0] = True
    found = policy.evaluate(trajectories.replace(mask=first)).log_prob
    torch.testing.assert_close(found, every * first, atol=ROUNDING, rtol=0)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_batch_without_any_decision_is_zero_and_has_a_zero_gradient(checkpointing):
    policy = make_policy(gradient_checkpointing=checkpointing)
    trajectories = trajectories_of(policy, text_prompts(), RAGGED)
    empty = trajectories.replace(mask=torch.zeros_like(trajectories.mask))
    found = policy.evaluate(empty, Request(entropy=True))
    assert (found.log_prob == 0).all()
    assert all((g == 0).all() for g in gradients(policy, found))


def test_rows_keep_their_values_when_selected_split_and_joined():
    policy = make_policy()
    trajectories = trajectories_of(policy, text_prompts(), RAGGED, temperature=0.7)
    whole = policy.evaluate(trajectories).log_prob
    rows = torch.tensor([5, 3, 3])
    part = trajectories.select(rows)
    assert len(part.payload.prompts) == 2
    torch.testing.assert_close(policy.evaluate(part).log_prob, whole[rows], atol=1e-5, rtol=0)
    other = trajectories_of(policy, text_prompts()[:1], [0, 0], length=4, temperature=1.5)
    joined = Trajectories.cat([part, other])
    expected = torch.cat([whole[rows], torch.zeros(2, whole.shape[1])])
    expected[3:, :4] = policy.evaluate(other).log_prob
    torch.testing.assert_close(policy.evaluate(joined).log_prob, expected, atol=1e-5, rtol=0)


def test_padding_shared_by_all_selected_prompts_is_dropped():
    policy = make_policy()
    trajectories = trajectories_of(policy, text_prompts(), RAGGED)
    part = trajectories.select(trajectories.group == 7)
    assert part.payload.prompts.ids.shape == (1, 4)
    assert part.payload.prompts.mask.all()


def test_what_lies_after_a_completion_does_not_matter():
    policy = make_policy()
    trajectories = trajectories_of(policy, text_prompts(), RAGGED)
    payload = trajectories.payload
    changed = payload.completion_ids.masked_fill(~trajectories.mask, 5)
    payload = type(payload)(payload.prompts, payload.prompt_row, changed, payload.temperature)
    torch.testing.assert_close(
        policy.evaluate(trajectories.replace(payload=payload)).log_prob,
        policy.evaluate(trajectories).log_prob,
    )


def test_a_large_softmax_in_pieces_is_the_same(monkeypatch):
    policy = make_policy()
    trajectories = trajectories_of(policy, text_prompts(), RAGGED)
    whole = policy.evaluate(trajectories, Request(entropy=True))
    expected = gradients(policy, whole)
    monkeypatch.setattr(token_logits, "CHUNK_ELEMENTS", 5 * 266)
    pieces = policy.evaluate(trajectories, Request(entropy=True))
    torch.testing.assert_close(pieces.log_prob, whole.log_prob)
    torch.testing.assert_close(pieces.entropy, whole.entropy)
    assert relative_error(gradients(policy, pieces), expected) < 1e-6


@pytest.mark.parametrize("lora", [None, LORA], ids=["full", "lora"])
def test_gradient_checkpointing_changes_neither_values_nor_gradients(lora):
    given = {"lora": lora, "pack": False}
    policies = [make_policy(**given, gradient_checkpointing=on) for on in (False, True)]
    results = []
    for policy in policies:
        trajectories = trajectories_of(policy, text_prompts(), RAGGED)
        evaluation = policy.evaluate(trajectories, Request(entropy=True))
        results.append((evaluation.log_prob, gradients(policy, evaluation)))
    (log_prob, grads), (again, grads_again) = results
    torch.testing.assert_close(again, log_prob, atol=ROUNDING, rtol=0)
    assert relative_error(grads_again, grads) < ROUNDING
    assert any(getattr(m, "gradient_checkpointing", False) for m in policies[1].model.modules())
    with torch.no_grad():  # then a cache is possible
        before = policies[1].forwards
        policies[1].evaluate(trajectories)
        assert policies[1].forwards == before + 2


@pytest.mark.parametrize("checkpointing", [False, True])
def test_dropout_is_off_in_every_mode(checkpointing):
    model, tokenizer = tiny_text("gpt2", resid_pdrop=0.5, embd_pdrop=0.5, attn_pdrop=0.5)
    policy = AutoregressivePolicy((model, tokenizer), gradient_checkpointing=checkpointing)
    trajectories = trajectories_of(policy, text_prompts(), RAGGED)
    policy.network.train()
    first = policy.evaluate(trajectories).log_prob
    with torch.no_grad():
        policy.network.train()
        torch.testing.assert_close(policy.evaluate(trajectories).log_prob, first, atol=1e-5, rtol=0)


def test_attention_dropout_is_off_too():
    model, tokenizer = tiny_text("qwen2", attention_dropout=0.5)
    policy = AutoregressivePolicy((model, tokenizer), gradient_checkpointing=True)
    trajectories = trajectories_of(policy, text_prompts(), RAGGED)
    torch.testing.assert_close(
        policy.evaluate(trajectories).log_prob, policy.evaluate(trajectories).log_prob
    )


def test_bfloat16_weights_still_have_a_float32_softmax():
    exact = make_policy()
    rough = make_policy(dtype="bfloat16")
    trajectories = trajectories_of(exact, text_prompts(), RAGGED)
    found = rough.evaluate(trajectories).log_prob
    assert {p.dtype for p in rough.network.parameters()} == {torch.bfloat16}
    assert found.dtype == torch.float32
    assert len(torch.unique(found)) > 0.9 * int(trajectories.mask.sum())
    error = (found - exact.evaluate(trajectories).log_prob).abs().max()
    assert 0 < error < 0.15


def test_the_reference_of_an_adapter_is_the_base_model():
    policy = make_policy(lora=LORA)
    base = AutoregressivePolicy(tiny_text(), reference="none")
    trajectories = trajectories_of(policy, text_prompts(), RAGGED)
    assert policy.has_reference
    assert not base.has_reference
    with policy.reference():
        found = policy.evaluate(trajectories).log_prob
    torch.testing.assert_close(found, base.evaluate(trajectories).log_prob, atol=1e-5, rtol=0)
    assert (found - policy.evaluate(trajectories).log_prob).abs().max() > 0.01


def test_a_divergence_is_refused():
    policy = make_policy()
    trajectories = trajectories_of(policy, text_prompts(), RAGGED)
    with pytest.raises(MethodError, match="k1, k2 or k3"):
        policy.evaluate(trajectories, Request(divergence="exact"))


# Shortcuts that a model does not allow


def test_a_model_whose_logits_mix_positions_gets_all_of_them():
    model, tokenizer = tiny_text()
    forward = model.forward

    def mixing(*args, **kwargs):
        output = forward(*args, **kwargs)
        output.logits = output.logits - 0.5 * output.logits[:, :1]
        return output

    mixing.__signature__ = __import__("inspect").signature(forward)
    model.forward = mixing
    policy = AutoregressivePolicy((model, tokenizer))
    assert not policy._selective
    trajectories = trajectories_of(policy, text_prompts()[:1], [0, 0])
    log_p = distributions(model, trajectories, 1)
    ids, mask = trajectories.payload.completion_ids[1], trajectories.mask[1]
    torch.testing.assert_close(
        policy.evaluate_plain(trajectories).log_prob[1],
        log_p.gather(1, ids[:, None]).squeeze(1) * mask,
        atol=1e-5,
        rtol=0,
    )


def test_a_model_that_continues_a_cache_wrongly_reads_prompts_once_per_completion(caplog):
    model, tokenizer = tiny_text()
    forward = model.forward

    def forgetful(*args, past_key_values=None, attention_mask=None, **kwargs):
        if past_key_values is not None:
            attention_mask = attention_mask.clone()
            attention_mask[:, : -kwargs["input_ids"].shape[1]] = 0
        return forward(
            *args, past_key_values=past_key_values, attention_mask=attention_mask, **kwargs
        )

    forgetful.__signature__ = __import__("inspect").signature(forward)
    model.forward = forgetful
    policy = AutoregressivePolicy((model, tokenizer), pack=False)
    assert "once per completion" in caplog.text
    trajectories = trajectories_of(policy, text_prompts(), RAGGED)
    assert torch.equal(
        policy.evaluate(trajectories).log_prob, policy.evaluate_plain(trajectories).log_prob
    )


def test_a_model_without_a_cache_that_groups_can_share_is_refused():
    from transformers import MambaConfig, MambaForCausalLM

    _, tokenizer = tiny_text()
    config = MambaConfig(
        vocab_size=len(tokenizer), hidden_size=16, state_size=4, num_hidden_layers=1
    )
    with pytest.raises(ModelError, match="MambaForCausalLM has no key-value cache"):
        AutoregressivePolicy((MambaForCausalLM(config), tokenizer))


# Encoding


def test_prompts_are_rendered_and_padded_on_the_left():
    policy = make_policy()
    prompts = text_prompts()
    encoded = policy.encode(prompts, max_new_tokens=8)
    texts = [
        policy.tokenizer.decode(ids[mask])
        for ids, mask in zip(encoded.ids, encoded.mask, strict=True)
    ]
    assert texts == [
        "2+2=",
        "<|user|>What is 17 + 25? Think first.<|assistant|>",
        "a longer piece of plain text: ",
    ]
    assert encoded.mask[:, -1].all()
    assert (encoded.ids[~encoded.mask] == policy.pad_id).all()


def test_plain_text_gets_the_tokenizers_special_tokens_and_a_chat_does_not():
    model, tokenizer = tiny_text()
    from tokenizers.processors import TemplateProcessing

    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<|system|> $A", special_tokens=[("<|system|>", 258)]
    )
    policy = AutoregressivePolicy((model, tokenizer))
    chat = [{"role": "user", "content": "b"}]
    encoded = policy.encode([Prompt(0, "a"), Prompt(1, chat)], max_new_tokens=1)
    assert policy.tokenizer.decode(encoded.ids[0][encoded.mask[0]]) == "<|system|>a"
    assert policy.tokenizer.decode(encoded.ids[1]) == "<|user|>b<|assistant|>"


@pytest.mark.parametrize(
    ("prompt", "options", "message"),
    [
        (Prompt(5, "x" * 153), {}, "Row 5: the prompt has 153 tokens, and at most 152 fit"),
        (Prompt(5, "x" * 11), {"max_prompt_tokens": 10}, "11 tokens, and at most 10 fit"),
        (Prompt(5, ""), {}, "Row 5: the prompt is empty"),
        (Prompt(5, "a", images=("an image",)), {}, "Row 5: the prompt has images"),
        (Prompt(5, [{"content": "a"}]), {}, "Row 5: the chat template refuses it"),
    ],
)
def test_a_prompt_that_cannot_be_used_is_named(prompt, options, message):
    policy = make_policy(**options)
    for refuse in (
        lambda: policy.encode([Prompt(0, "fine"), prompt], max_new_tokens=8),
        lambda: policy.check([Prompt(0, "fine"), prompt], room=8),
    ):
        with pytest.raises(DataError, match=message):
            refuse()
    assert len(policy.encode([Prompt(5, "x" * 10)], max_new_tokens=8)) == 1


def test_a_chat_needs_a_template():
    model, tokenizer = tiny_text()
    tokenizer.chat_template = None
    policy = AutoregressivePolicy((model, tokenizer))
    with pytest.raises(ModelError, match=r"Row 3 is a chat, .* no chat template"):
        policy.encode(text_prompts(), max_new_tokens=8)


def test_the_end_comes_from_the_generation_config_or_else_from_the_tokenizer():
    policy = make_policy()
    assert policy.eos_ids == (256,)
    policy.model.generation_config.eos_token_id = [256, 41]
    assert policy.eos_ids == (256, 41)
    policy.model.generation_config.eos_token_id = None
    assert policy.eos_ids == (256,)
