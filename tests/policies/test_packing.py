"""Packed rows: the same numbers as one row per completion, from the tokens that are there."""

import pytest
import torch
from fixtures_tokens import (
    gradients,
    image_prompts,
    relative_error,
    text_prompts,
    tiny_text,
    tiny_vision,
    trajectories_of,
    with_moved_adapter,
)

from mmgrpo.policies import packed_kernels, ragged
from mmgrpo.policies.autoregressive import AutoregressivePolicy
from mmgrpo.policies.multimodal import VisionLanguagePolicy
from mmgrpo.policies.packed_attention import NAME, attend_within, attends_to_all, can_pack
from mmgrpo.policies.packed_kernels import flex_attention, merged_attention, padded_attention
from mmgrpo.policies.packing import Layout
from mmgrpo.protocols import Request

LORA = {"rank": 4, "alpha": 8.0}
FAMILIES = {
    "qwen2": (AutoregressivePolicy, tiny_text, text_prompts),
    "qwen3": (AutoregressivePolicy, tiny_text, text_prompts),
    "llama": (AutoregressivePolicy, tiny_text, text_prompts),
    "gpt2": (AutoregressivePolicy, tiny_text, text_prompts),
    "qwen2_vl": (VisionLanguagePolicy, tiny_vision, image_prompts),
    "qwen3_vl": (VisionLanguagePolicy, tiny_vision, image_prompts),
}
OPTIONS = {
    "all weights": {},
    "LoRA": {"lora": LORA},
    "checkpointing": {"gradient_checkpointing": True},
    "LoRA, checkpointing": {"lora": LORA, "gradient_checkpointing": True},
}
ROWS = [2, 0, 0, 1, 2, 2, 1, 0]
ENTROPY = Request(entropy=True)


def make_policy(family="qwen2", **options):
    kind, build, prompts = FAMILIES[family]
    policy = with_moved_adapter(kind(build(family), reference="none", **options))
    return policy, prompts()


def tokens_read(policy, call):
    """Tokens that the embedding sees during a call."""
    seen = []
    hook = policy.model.get_input_embeddings().register_forward_hook(
        lambda _, args, __: seen.append(args[0].numel())
    )
    call()
    hook.remove()
    return sum(seen)


def check(policy, batch):
    """Packed results and gradients are the plain ones'."""
    assert policy._kernel is merged_attention
    found, plain = policy.evaluate(batch, ENTROPY), policy.evaluate_plain(batch, ENTROPY)
    assert relative_error([found.log_prob], [plain.log_prob]) < 1e-5
    assert relative_error([found.entropy], [plain.entropy]) < 1e-5
    assert relative_error(gradients(policy, found), gradients(policy, plain)) < 1e-5


@pytest.mark.parametrize(
    ("family", "options"),
    [(family, "all weights") for family in FAMILIES]
    + [("qwen2", "LoRA"), ("qwen2", "checkpointing")]
    + [(family, "LoRA, checkpointing") for family in ("qwen2", "llama", "qwen2_vl")],
)
def test_packed_rows_have_the_plain_results_and_gradients(family, options):
    policy, prompts = make_policy(family, **OPTIONS[options])
    check(policy, trajectories_of(policy, prompts, ROWS, temperature=0.7))


def masks(batch):
    """Decisions that are left out in different ways."""
    mask = batch.mask
    first, holes, idle = mask.clone(), mask.clone(), mask.clone()
    first[:, 1:] = False
    holes[:, 1:3] = False
    holes[2, 0] = False
    idle[:3] = False
    return {
        "first tokens": first,
        "holes": holes,
        "idle rows": idle,
        "equal lengths": torch.ones_like(mask),
        "one token in a row": first | (mask & (torch.arange(len(mask)) == 1)[:, None]),
    }


@pytest.mark.parametrize("case", ["first tokens", "holes", "idle rows", "one token in a row"])
def test_every_choice_of_decisions_can_be_packed(case):
    policy, prompts = make_policy()
    batch = trajectories_of(policy, prompts, ROWS)
    check(policy, batch.replace(mask=masks(batch)[case]))


@pytest.mark.parametrize("rows", [[0], [1, 1, 1, 1], [0, 1, 2], [2, 2, 0, 0]])
def test_any_number_of_rows_shares_a_prompt(rows):
    policy, prompts = make_policy()
    batch = trajectories_of(policy, prompts, rows)
    check(policy, batch)
    check(policy, batch.replace(mask=torch.ones_like(batch.mask)))


def test_prompts_of_one_length_can_be_packed():
    policy, prompts = make_policy()
    prompts = [prompts[0]] * 3
    batch = trajectories_of(policy, prompts, ROWS)
    check(policy, batch)
    check(policy, batch.replace(mask=torch.ones_like(batch.mask)))


def test_nothing_to_train_is_no_error():
    policy, prompts = make_policy()
    batch = trajectories_of(policy, prompts, ROWS)
    found = policy.evaluate(batch.replace(mask=torch.zeros_like(batch.mask)), ENTROPY)
    assert not found.log_prob.any()
    assert not any(gradient.any() for gradient in gradients(policy, found))


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("family", ["qwen2", "qwen2_vl"])
def test_the_network_reads_each_prompt_once_and_no_padding(family, checkpointing):
    policy, prompts = make_policy(family, gradient_checkpointing=checkpointing)
    batch = trajectories_of(policy, prompts, ROWS)
    expected = batch.payload.prompts.mask.sum() + (batch.mask.sum(dim=1) - 1).sum()
    calls = policy.forwards
    assert tokens_read(policy, lambda: policy.evaluate(batch)) == expected
    assert policy.forwards == calls + 1
    assert tokens_read(policy, lambda: policy.evaluate_plain(batch)) > 2 * expected


def test_a_model_with_a_shared_vision_tower_sees_each_image_once():
    policy, prompts = make_policy("qwen2_vl")
    batch = trajectories_of(policy, prompts, ROWS)
    seen = []
    policy.model.base_model.visual.register_forward_hook(lambda _, __, out: seen.append(1))
    policy.evaluate(batch)
    assert seen == [1]


def test_the_switch_gives_the_old_way():
    policy, prompts = make_policy(pack=False)
    assert policy._kernel is None
    batch = trajectories_of(policy, prompts, ROWS)
    calls = policy.forwards
    policy.evaluate(batch)
    assert policy.forwards == calls + 2  # prompts, completions
    assert make_policy(share_prompts=False)[0]._kernel is None


def test_afterwards_the_model_has_its_own_attention_again():
    policy, prompts = make_policy("qwen2_vl", gradient_checkpointing=True)
    batch = trajectories_of(policy, prompts, ROWS)
    text, vision = policy.model.config.text_config, policy.model.config.vision_config
    policy.evaluate(batch).log_prob.sum().backward()
    layout = Layout(torch.tensor([3]), torch.tensor([2]), torch.tensor([0]))
    found = []
    with (
        pytest.raises(RuntimeError, match="0 of 2 layers"),
        attend_within(layout, policy.model, padded_attention),
    ):
        found += [vision._attn_implementation, text._attn_implementation]
    assert found == ["sdpa", NAME]
    assert text._attn_implementation == "sdpa"


# -- models that cannot ---------------------------------------------------------------------------


def test_a_model_with_a_sliding_window_is_not_packed():
    window = {"use_sliding_window": True, "sliding_window": 40, "max_window_layers": 1}
    policy = AutoregressivePolicy(tiny_text(**window), reference="none")
    assert "sliding_attention" in policy.model.config.layer_types
    assert policy._kernel is None
    batch = trajectories_of(policy, text_prompts(), ROWS)
    found, plain = policy.evaluate(batch).log_prob, policy.evaluate_plain(batch).log_prob
    assert relative_error([found], [plain]) < 1e-5


def test_a_window_that_is_off_does_not_count():
    model, _ = tiny_text()
    config = model.config
    assert attends_to_all(config)
    config.sliding_window, config.use_sliding_window = 8, False
    assert attends_to_all(config)
    config.use_sliding_window = True
    assert not attends_to_all(config)


@pytest.mark.parametrize(
    "changes",
    [
        {"layer_types": ["full_attention", "chunked_attention"]},
        {"is_causal": False},
        {"use_bidirectional_attention": True},
        {"attn_logit_softcapping": 50.0},
    ],
    ids=lambda changes: next(iter(changes)),
)
def test_what_a_short_text_would_not_show_is_refused(changes):
    model, _ = tiny_text()
    assert can_pack(model)
    for name, value in changes.items():
        setattr(model.config, name, value)
    assert not can_pack(model)


@pytest.mark.parametrize("told", [{}, {"softcap": 30.0}, {"s_aux": torch.ones(4)}], ids=str)
def test_an_attention_that_is_told_more_is_not_replaced(told, monkeypatch):
    model, tokenizer = tiny_text(attn_implementation="eager")
    attention = type(model.model.layers[0].self_attn)
    plain = attention.forward
    monkeypatch.setattr(attention, "forward", lambda *args, **kw: plain(*args, **kw, **told))
    policy = AutoregressivePolicy((model, tokenizer), reference="none")
    assert (policy._kernel is None) == bool(told)


def test_a_model_whose_late_tokens_see_ahead_is_not_packed(monkeypatch):
    from transformers.models.qwen2 import modeling_qwen2

    plain = modeling_qwen2.create_causal_mask
    monkeypatch.setattr(
        modeling_qwen2,
        "create_causal_mask",
        lambda **given: plain(**given, or_mask_function=lambda b, h, q, k: q > 50),
    )
    assert AutoregressivePolicy(tiny_text(), reference="none")._kernel is None


def test_a_kernel_that_fails_gives_way_to_the_next(monkeypatch):
    def broken(*_):
        raise RuntimeError("no kernel image is available")

    def wrong(query, key, value, layout, scale):
        return 1.01 * merged_attention(query, key, value, layout, 1.5 * scale)

    monkeypatch.setitem(packed_kernels.FAST, "cpu", (broken, wrong))
    assert AutoregressivePolicy(tiny_text(), reference="none")._kernel is padded_attention


# -- kernels --------------------------------------------------------------------------------------

LAYOUTS = {
    "ragged": ([3, 5, 2], [4, 1, 7, 2, 3], [0, 0, 0, 2, 2]),
    "equal": ([3, 3], [4, 4, 4, 4], [0, 0, 1, 1]),
    "equal prompts": ([3, 3], [1, 5, 4], [0, 0, 1]),
    "no completions": ([4, 2], [], []),
    "one of each": ([2], [3], [0]),
    "very uneven": ([40, 2], [1, 1, 30, 2, 1, 60], [0, 0, 0, 1, 1, 1]),
}
layouts = pytest.mark.parametrize("sizes", LAYOUTS.values(), ids=LAYOUTS)


def dense_mask(prompts, rows, owner):
    """``[S, S]`` bool: what each token sees, written down sequence by sequence."""
    names = [("prompt", i) for i, n in enumerate(prompts) for _ in range(n)]
    names += [("row", i) for i, n in enumerate(rows) for _ in range(n)]

    def sees(i, j):
        if names[i] == names[j]:
            return j <= i
        return names[i][0] == "row" and names[j] == ("prompt", owner[names[i][1]])

    return torch.tensor([[sees(i, j) for j in range(len(names))] for i in range(len(names))])


def make_layout(prompts, rows, owner):
    return Layout(*(torch.tensor(each, dtype=torch.int64) for each in (prompts, rows, owner)))


def states(sizes, heads=4, dtype=torch.float64):
    generator = torch.Generator().manual_seed(0)
    count = sum(sizes[0]) + sum(sizes[1])
    return [
        (4 * torch.randn(count, n, 8, generator=generator, dtype=dtype)).requires_grad_()
        for n in (heads, 2, 2)
    ]


def dense_attention(query, key, value, mask, scale):
    key, value = (x.repeat_interleave(query.shape[1] // x.shape[1], dim=1) for x in (key, value))
    scores = torch.einsum("ihd,jhd->hij", query, key) * scale
    probs = scores.masked_fill(~mask, -torch.inf).softmax(dim=-1)
    return torch.einsum("hij,jhd->ihd", probs, value)


@layouts
def test_the_mask_of_flex_attention_is_the_dense_mask(sizes):
    expected, layout = dense_mask(*sizes), make_layout(*sizes)
    places = torch.arange(len(expected))
    assert torch.equal(layout.sees(places[:, None], places), expected)
    mask_mod = layout.blocks.mask_mod
    assert torch.equal(mask_mod(0, 0, places[:, None], places), expected)


@layouts
@pytest.mark.parametrize("call", [0, ragged.CALL], ids=["many rectangles", "few rectangles"])
@pytest.mark.parametrize("heads", [2, 4])
@pytest.mark.parametrize("kernel", [merged_attention, padded_attention])
def test_a_kernel_has_the_results_and_gradients_of_dense_attention(
    kernel, heads, call, sizes, monkeypatch
):
    monkeypatch.setattr(ragged, "CALL", call)
    given = states(sizes, heads)
    expected = dense_attention(*given, dense_mask(*sizes), 0.3)
    found = kernel(*given, make_layout(*sizes), 0.3)
    grad = torch.randn_like(expected)
    pairs = zip(
        [found, *torch.autograd.grad(found, given, grad)],
        [expected, *torch.autograd.grad(expected, given, grad)],
        strict=True,
    )
    for ours, theirs in pairs:
        assert relative_error([ours], [theirs]) < 1e-12


@layouts
def test_flex_attention_has_the_results_of_dense_attention(sizes):
    given = [x.detach() for x in states(sizes, dtype=torch.float32)]  # no gradients on a CPU
    expected = dense_attention(*given, dense_mask(*sizes), 0.3)
    assert relative_error([flex_attention(*given, make_layout(*sizes), 0.3)], [expected]) < 1e-5


def test_rows_are_stable_where_scores_are_far_apart():
    sizes = LAYOUTS["very uneven"]
    given = [(100 * x.detach()).requires_grad_() for x in states(sizes, dtype=torch.float32)]
    found = merged_attention(*given, make_layout(*sizes), 1.0)
    assert all(x.isfinite().all() for x in torch.autograd.grad(found.sum(), given))


def test_half_precision_is_near_the_whole_one():
    sizes = LAYOUTS["ragged"]
    given = states(sizes, dtype=torch.float32)
    half = [x.detach().bfloat16().requires_grad_() for x in given]
    layout = make_layout(*sizes)
    expected = merged_attention(*(x.float() for x in half), layout, 0.3)
    found = merged_attention(*half, layout, 0.3)
    assert relative_error([found.float()], [expected]) < 0.01
    grads = (torch.autograd.grad(x.float().sum(), half) for x in (found, expected))
    ours, theirs = ([x.float() for x in each] for each in grads)
    assert relative_error(ours, theirs) < 0.02
