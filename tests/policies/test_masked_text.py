"""Masked diffusion: likelihoods against plain calls of the model, and against enumeration."""

import itertools
import json
import math

import pytest
import torch
from fixtures_masked import tiny_masked
from safetensors.torch import save_file

from mmgrpo.core.masked_diffusion import MaskedRule, elbo_views, path_views
from mmgrpo.core.trajectories import Trajectories
from mmgrpo.errors import MethodError, ModelError
from mmgrpo.methods import load_method
from mmgrpo.policies.llada import convert_llada
from mmgrpo.policies.masked_text import MaskedTextPolicy
from mmgrpo.protocols import Prompt, Request
from mmgrpo.rollout.masked_text import MaskedEngine

PROMPTS = [Prompt(3, "ab"), Prompt(8, "cdefa")]
WIDTH = 4
CLOSE = {"rtol": 0, "atol": 2e-6}
RULES = {
    "path": MaskedRule(),
    "elbo": MaskedRule("elbo", draws=5),
    "sites": MaskedRule("sites"),
}


@pytest.fixture(scope="module")
def policy():
    return MaskedTextPolicy(tiny_masked())


def draw(policy, *, prompts=PROMPTS, group_size=3, seed=1, **options):
    engine = MaskedEngine(policy, **{"max_new_tokens": WIDTH, **options})
    return engine.generate(prompts, group_size=group_size, seed=seed)


def moved(policy, size):
    """The policy, its weights away from its reference."""
    noise = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in policy.model.parameters():
            parameter.add_(size * torch.randn(parameter.shape, generator=noise))
    return policy


def conditionals(policy, prompt, response):
    """``[L, V]`` log-probabilities at every place of a response (-1: hidden), from a plain call."""
    ids = policy.tokenizer(prompt)["input_ids"]
    mask = policy.mask_id
    row = torch.tensor([[*ids, *(mask if t < 0 else t for t in response)]])
    seen = torch.zeros(1, 1, row.shape[1], row.shape[1])
    with torch.no_grad():
        logits = policy.model(row, attention_mask=seen).logits[0, len(ids) :].clone()
    logits[:, mask] = -torch.inf
    return logits.log_softmax(dim=-1)


def test_the_model_sees_both_sides(policy):
    left, right = (
        conditionals(policy, "ab", [-1, 0, 1, 2]),
        conditionals(policy, "ab", [-1, 0, 1, 3]),
    )
    assert not torch.allclose(left[0], right[0], atol=1e-3)


@pytest.mark.parametrize("rule", RULES.values(), ids=RULES)
@pytest.mark.parametrize("order", ["random", "confidence"])
def test_evaluation_repeats_the_rollout(policy, rule, order):
    """In any batch, whatever stands beside a row."""
    trajectories = draw(policy, rule=rule, order=order, num_steps=3).trajectories
    for rows in ([0], [4, 1], [5, 3, 2, 1, 0]):
        part = trajectories.select(torch.tensor(rows))
        torch.testing.assert_close(policy.evaluate(part).log_prob, part.old_log_prob, **CLOSE)


def test_the_path_is_the_product_of_what_was_sampled(policy):
    rollout = draw(policy, num_steps=2)
    payload, old = rollout.trajectories.payload, rollout.trajectories.old_log_prob
    for row, sample in enumerate(rollout.samples):
        response = payload.response_ids[row].tolist()
        for token in rollout.trajectories.mask[row].nonzero().squeeze(1).tolist():
            (view,) = payload.scored[row, :, token].nonzero()
            hidden = payload.hidden[row, int(view)]
            seen = [-1 if h else t for t, h in zip(response, hidden.tolist(), strict=True)]
            found = conditionals(policy, sample.prompt.content, seen)[token, response[token]]
            torch.testing.assert_close(old[row, token], found, **CLOSE)


class Recording(MaskedEngine):
    """Keeps the log-probability that each token had when it was drawn."""

    def __init__(self, *arguments, **options):
        super().__init__(*arguments, **options)
        self.drawn = 0.0

    def _sample(self, encoded, prompt_row, ids, candidates, uniforms):
        found, log_prob = super()._sample(encoded, prompt_row, ids, candidates, uniforms)
        self.drawn = self.drawn + log_prob * candidates
        return found, log_prob


@pytest.mark.parametrize(("steps", "block"), [(4, None), (2, None), (2, 2)])
def test_the_path_has_the_probabilities_that_it_was_drawn_with(policy, steps, block):
    engine = Recording(policy, max_new_tokens=WIDTH, num_steps=steps, block=block)
    found = engine.generate(PROMPTS, group_size=3, seed=1).trajectories
    torch.testing.assert_close(found.old_log_prob, engine.drawn * found.mask, **CLOSE)


@torch.no_grad()
def test_paths_of_one_order_sum_to_one(policy):
    """Over all responses of two tokens that are unmasked from right to left, without the mask."""
    tokens = [token for token in range(11) if token != policy.mask_id]
    responses = torch.tensor(list(itertools.product(tokens, repeat=2)))
    rows = torch.zeros(len(responses), dtype=torch.int64)
    views = path_views(torch.tensor([[1, 0]]).expand_as(responses), rows + 2, 2)
    encoded = policy.encode([Prompt(3, "ab")], max_new_tokens=2)
    payload = policy.masked_payload(encoded, rows, responses, 1.0, views, by_token=True)
    every = Trajectories(group=rows, mask=payload.decisions(), payload=payload)
    total = policy.evaluate(every).log_prob.sum(dim=1).exp().sum()
    assert total.item() == pytest.approx(1, abs=1e-5)


def test_sites_are_each_token_given_the_others(policy):
    rollout = draw(policy, rule=RULES["sites"])
    old = rollout.trajectories.old_log_prob
    for row, sample in enumerate(rollout.samples):
        response = rollout.trajectories.payload.response_ids[row].tolist()
        for token in rollout.trajectories.mask[row].nonzero().squeeze(1).tolist():
            others = [-1 if place == token else t for place, t in enumerate(response)]
            found = conditionals(policy, sample.prompt.content, others)[token, response[token]]
            torch.testing.assert_close(old[row, token], found, **CLOSE)


def test_the_mean_over_random_views_is_the_elbo(policy):
    """Against the exact expectation over all masks: sum over sizes l of 1/l times the hidden."""
    trajectories = draw(policy, prompts=PROMPTS[:1], group_size=1, seed=2).trajectories
    length = int(trajectories.lengths[0])
    assert length >= 2
    response = trajectories.payload.response_ids[0].tolist()
    exact = 0.0
    for size in range(1, length + 1):
        subsets = list(itertools.combinations(range(length), size))
        terms = []
        for subset in subsets:
            seen = [-1 if place in subset else t for place, t in enumerate(response)]
            log_p = conditionals(policy, "ab", seen)
            terms.append(sum(float(log_p[place, response[place]]) for place in subset) / size)
        exact += sum(terms) / len(terms)
    rule = MaskedRule("elbo", draws=2000)
    many = draw(policy, prompts=PROMPTS[:1], group_size=1, seed=2, rule=rule).trajectories
    found = many.old_log_prob[0].double()
    error = float(found.std() / len(found) ** 0.5)
    assert abs(float(found.mean()) - exact) < 4 * error
    assert error < 0.05 * abs(exact)


def plain_elbo(policy, trajectories, row, prompt):
    """``[K]``: L / l times the log-probabilities of the l hidden tokens of each view."""
    payload = trajectories.payload
    response, length = payload.response_ids[row].tolist(), ends(payload.response_ids[row])
    found = []
    for hidden in payload.hidden[row].tolist():
        places = [place for place, h in enumerate(hidden) if h]
        assert 0 < len(places) <= length
        assert max(places) < length
        seen = [-1 if h else t for t, h in zip(response, hidden, strict=True)]
        log_p = conditionals(policy, prompt, seen)
        scores = [float(log_p[place, response[place]]) for place in places]
        found.append(length / len(places) * sum(scores))
    return torch.tensor(found)


def ends(ids):
    """Tokens up to the first end token, which counts."""
    return ids.tolist().index(8) + 1 if 8 in ids else len(ids)


def test_a_view_is_its_hidden_tokens_times_how_rarely_they_hide(policy):
    rollout = draw(policy, rule=RULES["elbo"])
    for row, sample in enumerate(rollout.samples):
        found = plain_elbo(policy, rollout.trajectories, row, sample.prompt.content)
        torch.testing.assert_close(rollout.trajectories.old_log_prob[row], found, rtol=0, atol=2e-5)


def test_vrpo_llada_is_dpo_on_elbos_from_plain_calls():
    """softplus(-beta (B_w - B_w,ref - B_l + B_l,ref)) - 0.05 B_w / L, B the mean of eight views."""
    method = load_method("vrpo-llada")
    policy = moved(MaskedTextPolicy(tiny_masked(), reference="copy"), 0.05)
    rollout = draw(policy, rule=method.rollout.masked)
    assert rollout.trajectories.mask.shape == (6, 8)
    prompts = [sample.prompt.content for sample in rollout.samples]

    def elbos():
        rows = enumerate(prompts)
        return [float(plain_elbo(policy, rollout.trajectories, *row).mean()) for row in rows]

    mine = elbos()
    with policy.reference():
        reference = elbos()
        ref_log_prob = policy.evaluate(rollout.trajectories).log_prob
    losses = []
    for better, worse in ((1, 2), (3, 5)):
        margin = mine[better] - reference[better] - mine[worse] + reference[worse]
        assert abs(margin) > 0.05
        length = ends(rollout.trajectories.payload.response_ids[better])
        losses.append(math.log1p(math.exp(-0.2 * margin)) - 0.05 * mine[better] / length)
    prepared = method.prepare(
        rollout.trajectories.replace(
            ref_log_prob=ref_log_prob,
            rewards={"score": torch.tensor([0.5, 0.9, 0.1, 1.0, 0.6, 0.2])},
        )
    )
    found = method.loss(policy.evaluate(prepared).log_prob, prepared).loss
    assert found.item() == pytest.approx(sum(losses) / 2, abs=2e-5)


def test_a_reference_reads_the_same_views(policy):
    """Common random numbers: the same weights give a difference of exactly 0 for any draw."""
    held = MaskedTextPolicy(tiny_masked(), reference="copy")
    trajectories = draw(held, rule=RULES["elbo"]).trajectories
    with held.reference():
        reference = held.evaluate(trajectories).log_prob
    assert torch.equal(held.evaluate(trajectories).log_prob, reference)


def test_a_sample_depends_on_its_own_name_only(policy):
    whole, alone = draw(policy), draw(policy, prompts=PROMPTS[1:])
    texts = [sample.completion for sample in whole.samples if sample.prompt.index == 8]
    assert texts == [sample.completion for sample in alone.samples]
    other = [sample.completion for sample in draw(policy, seed=2).samples]
    assert other != [sample.completion for sample in whole.samples]
    assert [s.completion for s in draw(policy, group_size=5).samples][:3] == [
        s.completion for s in whole.samples
    ][:3]


def test_the_mask_is_never_sampled_and_the_end_ends(policy):
    rollout = draw(policy, group_size=40)
    payload, mask = rollout.trajectories.payload, rollout.trajectories.mask
    assert not (payload.response_ids == policy.mask_id).any()
    for row, sample in enumerate(rollout.samples):
        ids = payload.response_ids[row].tolist()
        length = ids.index(8) + 1 if 8 in ids else WIDTH
        assert mask[row].tolist() == [place < length for place in range(WIDTH)]
        assert sample.length == length
        assert sample.truncated == (8 not in ids)
        assert rollout.trajectories.old_log_prob[row, length:].abs().sum() == 0


@pytest.mark.parametrize(("steps", "block"), [(4, None), (2, None), (2, 2), (3, 2)])
@pytest.mark.parametrize("order", ["random", "confidence"])
def test_a_response_takes_as_many_calls_as_steps(policy, steps, block, order):
    before = policy.forwards
    rollout = draw(policy, num_steps=steps, block=block, order=order)
    assert policy.forwards - before == steps + 1  # and one call for all the path's views
    assert rollout.cost.forwards == steps + 1


@pytest.mark.parametrize("order", ["random", "confidence"])
def test_blocks_are_completed_from_left_to_right(policy, order):
    payload = draw(policy, num_steps=4, block=2, order=order).trajectories.payload
    shown = payload.hidden.sum(dim=1)  # in how many states each token was hidden
    assert bool((shown[:, :2].amax(dim=1) < shown[:, 2:].amin(dim=1)).all())


def test_the_variance_of_a_preference_falls_as_published(policy):
    """Shared noise far below independent noise; more levels below more masks of one level."""
    held = moved(MaskedTextPolicy(tiny_masked(), reference="copy"), 0.002)
    base = draw(held, prompts=PROMPTS[1:], group_size=1, seed=4).trajectories
    payload, length = base.payload, base.lengths

    def read(names, rule):
        """``[B]`` estimates of one response, B draws of the noise."""
        count = len(names)
        rows = torch.zeros(count, dtype=torch.int64)
        views = elbo_views(WIDTH, length[rows], names, rule)
        many = held.masked_payload(
            payload.prompts, rows, payload.response_ids[rows], 1.0, views, by_token=False
        )
        mask = torch.ones(count, rule.draws, dtype=torch.bool)
        batch = Trajectories(group=rows, mask=mask, payload=many)
        return held.evaluate(batch).log_prob.mean(dim=1)

    @torch.no_grad()
    def spread(draws, masks, *, shared):
        """Variance of B_theta - B_ref."""
        rule = MaskedRule("elbo", draws=draws, masks_per_time=masks)
        mine = read([(number, 0) for number in range(150)], rule)
        with held.reference():
            other = read([(number, 0 if shared else 1) for number in range(150)], rule)
        return float((mine - other).var())

    best = spread(4, 1, shared=True)
    assert 20 * best < spread(4, 1, shared=False)
    assert best < spread(4, 4, shared=True)
    assert best < spread(1, 1, shared=True)


def test_gradients_reach_the_weights_once_per_decision(policy):
    """Padding a batch with other rows does not change a row's gradient."""
    trajectories = draw(policy).trajectories
    parameter = policy.model.model.layers[0].self_attn.q_proj.weight
    found = []
    for rows in ([1], [1, 4]):
        part = trajectories.select(torch.tensor(rows))
        (gradient,) = torch.autograd.grad(policy.evaluate(part).log_prob[0].sum(), parameter)
        found.append(gradient)
    torch.testing.assert_close(*found, rtol=1e-4, atol=1e-6)


def test_payloads_join_and_move(policy):
    one, other = (draw(policy, prompts=[prompt]).trajectories for prompt in PROMPTS)
    both = Trajectories.cat([one, other]).to(torch.device("cpu"))
    found = policy.evaluate(both).log_prob
    torch.testing.assert_close(found[:3], one.old_log_prob, **CLOSE)
    torch.testing.assert_close(found[3:], other.old_log_prob, **CLOSE)
    shorter = draw(policy, prompts=PROMPTS[:1], max_new_tokens=2).trajectories
    with pytest.raises(ValueError, match="cannot be joined"):
        Trajectories.cat([shorter, other])


def test_entropy_belongs_to_tokens(policy):
    trajectories = draw(policy).trajectories
    entropy = policy.evaluate(trajectories, Request(entropy=True)).entropy
    assert bool((entropy[trajectories.mask] > 0).all())
    views = draw(policy, rule=RULES["elbo"]).trajectories
    with pytest.raises(MethodError, match="no entropy"):
        policy.evaluate(views, Request(entropy=True))


def test_a_tokenizer_without_a_mask_is_refused():
    model, tokenizer = tiny_masked()
    tokenizer.mask_token = None
    with pytest.raises(ModelError, match="mask token"):
        MaskedTextPolicy((model, tokenizer))


# -- published weights --------------------------------------------------------------------------


def test_llada_s_weights_become_a_llama(tmp_path):
    """The converted folder computes what the renamed tensors compute."""
    model, tokenizer = tiny_masked(seed=3)
    source = tmp_path / "llada"
    tokenizer.save_pretrained(source)
    inner = {
        "input_layernorm": "attn_norm", "post_attention_layernorm": "ff_norm",
        "self_attn.q_proj": "q_proj", "self_attn.k_proj": "k_proj", "self_attn.v_proj": "v_proj",
        "self_attn.o_proj": "attn_out", "mlp.gate_proj": "ff_proj", "mlp.up_proj": "up_proj",
        "mlp.down_proj": "ff_out",
    }  # fmt: skip
    tensors = {
        "model.transformer.wte.weight": model.model.embed_tokens.weight,
        "model.transformer.ln_f.weight": model.model.norm.weight,
        "model.transformer.ff_out.weight": model.lm_head.weight,
    }
    for number, layer in enumerate(model.model.layers):
        for mine, theirs in inner.items():
            weight = layer.get_submodule(mine).weight
            tensors[f"model.transformer.blocks.{number}.{theirs}.weight"] = weight
    save_file({k: v.detach().clone() for k, v in tensors.items()}, source / "model.safetensors")
    config = {
        "block_type": "llama", "n_heads": 2, "n_kv_heads": 2, "n_layers": 2, "d_model": 16,
        "mlp_hidden_size": 32, "embedding_size": 11, "max_sequence_length": 64,
        "rms_norm_eps": model.config.rms_norm_eps, "rope_theta": 10000.0, "eos_token_id": 8,
        "torch_dtype": "float32",
    }  # fmt: skip
    (source / "config.json").write_text(json.dumps(config))
    converted = MaskedTextPolicy(str(convert_llada(source, tmp_path / "llama")))
    original = MaskedTextPolicy((model, tokenizer))
    torch.testing.assert_close(
        conditionals(converted, "ab", [-1, 2, -1]), conditionals(original, "ab", [-1, 2, -1])
    )
    with pytest.raises(ModelError, match="exists"):
        convert_llada(source, tmp_path / "llama")
    (source / "config.json").write_text(json.dumps({**config, "include_bias": True}))
    with pytest.raises(ModelError, match="include_bias"):
        convert_llada(source, tmp_path / "other")
    assert not (tmp_path / "other").exists()


@pytest.mark.parametrize("name", RULES)
def test_a_model_without_an_end_writes_to_the_last_place(name, monkeypatch):
    policy = MaskedTextPolicy(tiny_masked())
    monkeypatch.setattr(type(policy), "eos_ids", ())
    trajectories = draw(policy, rule=RULES[name]).trajectories
    assert trajectories.truncated.all()
    assert trajectories.old_log_prob.isfinite().all()
