"""The token engine: what it draws, when it stops, and that its numbers are the policy's."""

import pytest
import torch
from fixtures_tokens import text_prompts, tiny_text

from mmgrpo.errors import ConfigError, DataError
from mmgrpo.policies.autoregressive import AutoregressivePolicy
from mmgrpo.protocols import Prompt, Request
from mmgrpo.rollout.autoregressive import AutoregressiveEngine

EOS = 256
LENGTH = 14


@pytest.fixture(scope="module")
def policy():
    return eager_to_end(AutoregressivePolicy(tiny_text()))


def eager_to_end(policy, by=3.0):
    """Make the end likely, so that lengths vary."""
    policy.model.get_output_embeddings().register_forward_hook(
        lambda module, args, output: output.index_add(
            -1, torch.tensor([EOS]), output.new_full((*output.shape[:-1], 1), by)
        )
    )
    return policy


def generate(policy, prompts=None, *, group_size=5, seed=0, max_new_tokens=LENGTH, **options):
    engine = AutoregressiveEngine(policy, max_new_tokens=max_new_tokens, **options)
    return engine.generate(prompts or text_prompts(), group_size=group_size, seed=seed)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"temperature": 0.6},
        {"temperature": 1.5},
        {"temperature": 0},
        {"top_k": 5, "temperature": 0.8},
        {"top_p": 0.7, "min_p": 0.01},
        {"max_rows": 4},
    ],
)
def test_the_kept_log_probs_and_entropies_are_those_of_an_evaluation(policy, options):
    found = generate(policy, **options).trajectories
    again = policy.evaluate(found, Request(entropy=True))
    torch.testing.assert_close(found.old_log_prob, again.log_prob, atol=1e-5, rtol=0)
    torch.testing.assert_close(found.entropy, again.entropy, atol=1e-5, rtol=0)
    assert found.old_log_prob.dtype == torch.float32
    assert len(set(found.lengths.tolist())) > 1 or options == {"temperature": 0}
    assert (found.old_log_prob[~found.mask] == 0).all()


def test_log_probs_can_enter_a_gradient(policy):
    found = generate(policy).trajectories
    log_prob = policy.evaluate(found).log_prob
    (log_prob - found.old_log_prob).exp().mul(found.entropy).sum().backward()
    policy.network.zero_grad()


def rows_of(rollout):
    """(prompt index, sample number) -> text."""
    counts, result = {}, {}
    for sample in rollout.samples:
        number = counts[sample.prompt.index] = counts.get(sample.prompt.index, -1) + 1
        result[sample.prompt.index, number] = sample.completion
    return result


def test_a_sample_depends_on_its_prompt_and_number_alone(policy):
    whole = rows_of(generate(policy))
    prompts = text_prompts()
    assert rows_of(generate(policy)) == whole
    assert rows_of(generate(policy, prompts[::-1])) == whole
    assert rows_of(generate(policy, max_rows=4)) == whole
    for prompt in prompts:
        alone = rows_of(generate(policy, [prompt], group_size=3))
        assert alone == {key: whole[key] for key in alone}
    assert rows_of(generate(policy, seed=1)) != whole
    assert len(set(whole.values())) > 0.7 * len(whole)


def test_a_shorter_limit_only_cuts(policy):
    whole, cut = generate(policy), generate(policy, max_new_tokens=5)
    for long, short in zip(
        whole.trajectories.payload.completion_ids.tolist(),
        cut.trajectories.payload.completion_ids.tolist(),
        strict=True,
    ):
        assert long[:5] == short


def test_greedy_completions_are_those_of_transformers(policy):
    found = generate(policy, group_size=1, temperature=0).trajectories
    for row, prompt in enumerate(text_prompts()):
        encoded = policy.encode([prompt], max_new_tokens=LENGTH)
        expected = policy.model.generate(
            encoded.ids, attention_mask=encoded.mask.long(), max_new_tokens=LENGTH, do_sample=False
        )[0, encoded.ids.shape[1] :]
        count = int(found.lengths[row])
        assert found.payload.completion_ids[row, :count].tolist() == expected.tolist()


def first_tokens(policy, **options):
    prompt = text_prompts()[:1]
    found = generate(policy, prompt, group_size=4000, max_new_tokens=1, **options)
    state = policy.begin(policy.encode(prompt, max_new_tokens=1))
    return found.trajectories.payload.completion_ids[:, 0], state.logits[0]


def test_tokens_are_drawn_by_their_probability(policy):
    drawn, logits = first_tokens(policy, temperature=0.7)
    expected = (logits / 0.7).softmax(-1) * len(drawn)
    counts = torch.bincount(drawn, minlength=len(expected))
    often = expected > 10
    chi2 = ((counts - expected)[often].square() / expected[often]).sum()
    degrees = int(often.sum())
    assert degrees > 10
    assert chi2 < degrees + 4 * (2 * degrees) ** 0.5


def test_top_k_draws_from_the_k_likeliest(policy):
    drawn, logits = first_tokens(policy, top_k=3)
    assert set(drawn.tolist()) == set(logits.topk(3).indices.tolist())


def test_a_completion_ends_with_its_end_token_or_is_truncated(policy):
    rollout = generate(policy)
    found = rollout.trajectories
    for row, count in enumerate(found.lengths.tolist()):
        ids = found.payload.completion_ids[row]
        assert (ids[: count - 1] != EOS).all()
        assert bool(ids[count - 1] == EOS) != bool(found.truncated[row])
        assert found.truncated[row] == (count == LENGTH and ids[count - 1] != EOS)
        assert found.mask[row].tolist() == [True] * count + [False] * (len(ids) - count)
        assert (ids[count:] == policy.pad_id).all()
        assert rollout.samples[row].truncated == found.truncated[row]
    assert 0 < int(found.truncated.sum()) < len(found)


def test_every_end_of_a_list_ends(policy):
    policy.model.generation_config.eos_token_id = [EOS, 65]
    try:
        found = generate(policy, group_size=60).trajectories
    finally:
        policy.model.generation_config.eos_token_id = EOS
    last = found.payload.completion_ids.gather(1, found.lengths[:, None] - 1).squeeze(1)
    assert set(last[~found.truncated].tolist()) == {EOS, 65}


def test_a_stop_string_ends_a_completion_and_stays_in_it(policy):
    rollout = generate(policy, stop=("q", "z1"), group_size=200)
    stopped = [sample for sample in rollout.samples if sample.completion.endswith("q")]
    assert len(stopped) > 5
    assert not any(sample.truncated for sample in stopped)
    assert not any("q" in sample.completion[:-1] for sample in rollout.samples)


def test_a_stop_string_over_several_tokens_is_seen():
    model, tokenizer = tiny_text()
    script = tokenizer("say </answer> done")["input_ids"]
    policy = AutoregressivePolicy((model, tokenizer))
    calls = iter(range(100))

    def dictate(module, args, output):
        return torch.full_like(output, -50).index_fill(
            -1, torch.tensor([script[next(calls) % len(script)]]), 0.0
        )

    model.get_output_embeddings().register_forward_hook(dictate)
    whole = generate(policy, text_prompts()[:1], group_size=1, stop=("swer> d",))
    assert whole.samples[0].completion == "say </answer> d"
    assert not whole.samples[0].truncated


def test_reasoning_tags_survive_in_the_text_and_special_tokens_do_not(policy):
    ids = policy.tokenizer("<think>1</think><answer>2</answer><|end|>")["input_ids"]
    assert policy.decode([ids]) == ["<think>1</think><answer>2</answer>"]
    assert all("<|" not in sample.completion for sample in generate(policy).samples)


def test_the_batch_shrinks_and_its_cost_is_counted(policy):
    sizes = []
    hook = policy.model.get_input_embeddings().register_forward_hook(
        lambda module, args, output: sizes.append(len(args[0]))
    )
    rollout = generate(policy)
    hook.remove()
    alive = [int((rollout.trajectories.lengths > t).sum()) for t in range(1, LENGTH)]
    assert sizes == [3, *(count for count in alive if count)]
    assert rollout.cost.forwards == len(sizes)
    assert rollout.cost.decisions == int(rollout.trajectories.mask.sum())
    assert rollout.cost.backwards == 0


def test_waiting_rows_take_the_places_of_finished_ones(policy):
    sizes = []
    hook = policy.model.get_input_embeddings().register_forward_hook(
        lambda module, args, output: sizes.append(tuple(args[0].shape))
    )
    rollout = generate(policy, group_size=20, max_rows=8)
    hook.remove()
    decoded = [rows for rows, tokens in sizes if tokens == 1]
    assert max(decoded) == 8
    lengths = rollout.trajectories.lengths
    in_batches = sum(int(part.max()) - 1 for part in lengths.split(8))
    assert len(decoded) < 0.85 * in_batches
    assert rows_of(rollout) == rows_of(generate(policy, group_size=20))
    again = policy.evaluate(rollout.trajectories).log_prob
    torch.testing.assert_close(rollout.trajectories.old_log_prob, again, atol=1e-5, rtol=0)


@pytest.mark.parametrize("family", ["gemma2", "gpt2", "granite"])
def test_so_they_do_in_other_families_or_wait(family):
    policy = eager_to_end(AutoregressivePolicy(tiny_text(family)), by=1.5)
    rollout = generate(policy, group_size=6, max_rows=5, stop=("q",))
    assert rows_of(rollout) == rows_of(generate(policy, group_size=6, stop=("q",)))
    again = policy.evaluate(rollout.trajectories).log_prob
    torch.testing.assert_close(rollout.trajectories.old_log_prob, again, atol=1e-5, rtol=0)


def test_the_padding_of_rows_that_left_is_dropped():
    policy = eager_to_end(AutoregressivePolicy(tiny_text(), fast_decoding=False))
    widths = []
    forward = policy.model.forward

    def watched(*args, **kwargs):
        widths.append(kwargs["attention_mask"].shape[1])
        return forward(*args, **kwargs)

    policy.model.forward = watched
    try:
        generate(policy, group_size=30, max_rows=4)
    finally:
        policy.model.forward = forward
    longest = int(policy.encode(text_prompts(), max_new_tokens=LENGTH).mask.sum(dim=1).max())
    assert max(widths) <= longest + 2 * LENGTH


def test_groups_and_versions_are_filled(policy):
    engine = AutoregressiveEngine(policy, max_new_tokens=4)
    found = engine.generate(text_prompts(), group_size=2, seed=0, version=6).trajectories
    assert found.group.tolist() == [7, 7, 3, 3, 11, 11]
    assert found.version.tolist() == [6] * 6
    assert len(found.payload.prompts) == 3


def test_an_engine_for_evaluation_does_not_disturb_the_training_one(policy):
    training = AutoregressiveEngine(policy, max_new_tokens=LENGTH, temperature=0.7)
    held_out = AutoregressiveEngine(policy, max_new_tokens=6, temperature=0)
    before = training.generate(text_prompts(), group_size=2, seed=3).trajectories
    held_out.generate(text_prompts(), group_size=1, seed=0)
    after = training.generate(text_prompts(), group_size=2, seed=3).trajectories
    assert torch.equal(before.old_log_prob, after.old_log_prob)
    torch.testing.assert_close(
        policy.evaluate(before).log_prob, before.old_log_prob, atol=1e-5, rtol=0
    )


def test_gradient_checkpointing_does_not_disturb_sampling(policy):
    checkpointing = eager_to_end(AutoregressivePolicy(tiny_text(), gradient_checkpointing=True))
    found = generate(checkpointing).trajectories
    evaluation = checkpointing.evaluate(found)
    torch.testing.assert_close(found.old_log_prob, evaluation.log_prob, atol=1e-5, rtol=0)
    evaluation.log_prob.sum().backward()
    assert rows_of(generate(checkpointing)) == rows_of(generate(policy))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_new_tokens": 0}, "max_new_tokens must be at least 1; got 0"),
        ({"max_new_tokens": 160}, "context of 160 tokens must also hold the prompt"),
        ({"temperature": -1.0}, "temperature must be at least 0; got -1.0"),
        ({"temperature": float("nan")}, "temperature must be at least 0; got nan"),
        ({"top_p": 0.0}, r"top_p must be in \(0, 1\]; got 0.0"),
        ({"top_k": -3}, "top_k must be at least 0; got -3"),
        ({"min_p": 1.0}, r"min_p must be in \[0, 1\); got 1.0"),
        ({"stop": ("a", "")}, "stop must be non-empty strings"),
        ({"max_rows": 0}, "max_rows must be at least 1; got 0"),
    ],
)
def test_settings_out_of_range_are_refused_at_the_start(policy, options, message):
    with pytest.raises(ConfigError, match=message):
        AutoregressiveEngine(policy, **{"max_new_tokens": 4, **options})


def test_a_prompt_without_room_for_the_completion_is_named(policy):
    engine = AutoregressiveEngine(policy, max_new_tokens=20)
    with pytest.raises(DataError, match="Row 8: the prompt has 141 tokens, and at most 140 fit"):
        engine.generate([Prompt(8, "x" * 141)], group_size=2, seed=0)
