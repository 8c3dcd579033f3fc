"""UniRL's answers as decisions: what they are, and that they train like the pictures."""

from __future__ import annotations

import pytest
import torch
from fixtures_image_tokens import drawing_prompts, tiny_parts

from mmgrpo.config import load_config
from mmgrpo.core import Trajectories
from mmgrpo.errors import ConfigError
from mmgrpo.methods import load_method
from mmgrpo.policies.answered_payload import ANSWERS
from mmgrpo.policies.image_grammar import Kind
from mmgrpo.policies.image_tokens import ImageTokenPolicy
from mmgrpo.protocols import Request
from mmgrpo.rollout.image_tokens import ImageTokenEngine

ROOM = 4
GROUP = 3


@pytest.fixture(params=[0, 3])
def policy(request):
    return ImageTokenPolicy(tiny_parts(), plan_tokens=request.param)


def draw(policy, prompts=None, **options):
    settings = {"train_answers": True, "max_answer_tokens": ROOM, **options}
    engine = ImageTokenEngine(policy, **settings)
    prompts = drawing_prompts() if prompts is None else prompts
    return engine.generate(prompts, group_size=GROUP, seed=5)


def read_answers(policy, rollout, temperature=1.0):
    """Every answer token by whole rows: (row, column) -> (log-probability, entropy)."""
    allowed, layout = policy.grammar.allowed[Kind.ANSWER], policy.layout
    payload, found = rollout.trajectories.payload, {}
    pictures = policy.grammar.codes(payload.drawn.completion_ids) + layout.code_offset
    asked = [(i, n, question) for i, sample in enumerate(rollout.samples)
             for n, (question, _) in enumerate(sample.prompt.columns["questions"])]  # fmt: skip
    for (i, n, question), ids in zip(asked, payload.answers.completion_ids.tolist(), strict=True):
        before, after = (policy.tokenizer(text)["input_ids"] for text in ("of ", f"{question}="))
        read = [*before, layout.begin_id, *pictures[i].tolist(), layout.end_id, *after]
        written = []
        for k, token in enumerate(ids):
            logits = policy.model(input_ids=torch.tensor([read + ids[:k]])).logits[0, -1]
            log_p = (logits.masked_fill(~allowed, -torch.inf) / temperature).log_softmax(dim=-1)
            p = log_p[allowed]
            found[i, layout.room + n * ROOM + k] = (log_p[token], -(p.exp() * p).sum())
            written.append(token)
            if token in policy.answer_end_ids:
                break
        assert rollout.samples[i].self_answers[n] == policy.decode([written])[0]
    return found


@pytest.mark.parametrize("temperature", [1.0, 0.7])
@torch.no_grad()
def test_answers_are_decisions_behind_the_picture(policy, temperature):
    rollout = draw(policy, temperature=temperature)
    found, room = rollout.trajectories, policy.layout.room
    wanted = read_answers(policy, rollout, temperature)
    assert found.mask[:, room:].nonzero().tolist() == sorted(
        [i, column - room] for i, column in wanted
    )
    assert found.mask.shape[1] == room + 2 * ROOM
    assert set(found.segment[:, room:][found.mask[:, room:]].tolist()) == {ANSWERS}
    evaluation = policy.evaluate(found, Request(entropy=True))
    for values, of in [(found.old_log_prob, 0), (found.entropy, 1), (evaluation.log_prob, 0),
                       (evaluation.entropy, 1)]:  # fmt: skip
        for place, pair in wanted.items():
            assert values[place].item() == pytest.approx(pair[of].item(), abs=1e-5)
    assert rollout.cost.decisions == found.mask.sum()
    pictures = draw(policy, train_answers=False, ask_questions=True, temperature=temperature)
    own = pictures.trajectories.mask
    assert torch.equal(found.mask[:, : own.shape[1]], own)
    assert torch.equal(found.old_log_prob[:, : own.shape[1]], pictures.trajectories.old_log_prob)
    assert {len(s.self_answers) for s in rollout.samples} == {1, 2}


def test_a_batch_that_is_cut_moved_or_joined_says_the_same(policy):
    found = draw(policy).trajectories
    whole = policy.evaluate(found)
    rows = torch.tensor([4, 0, 5])
    few = policy.evaluate(found.select(rows)).log_prob
    torch.testing.assert_close(few, whole.log_prob[rows], rtol=0, atol=2e-6)
    halves = [found.select(torch.arange(3)), found.select(torch.arange(3, 6))]
    again = Trajectories.cat([half.to(torch.device("cpu")) for half in halves])
    torch.testing.assert_close(policy.evaluate(again).log_prob, whole.log_prob, rtol=0, atol=2e-6)
    alone = draw(policy, drawing_prompts()[1:]).trajectories
    width = policy.layout.room + ROOM
    assert torch.equal(alone.mask, found.mask[3:, :width])
    torch.testing.assert_close(
        alone.old_log_prob, found.old_log_prob[3:, :width], rtol=0, atol=2e-6
    )


def test_every_answer_has_random_numbers_of_its_own():
    policy = ImageTokenPolicy(tiny_parts())
    ids = torch.full((3, policy.layout.room), policy.layout.code_offset)
    names, several = [(4, 0), (4, 1), (9, 0)], [["a", "b"]] * 3
    asked = policy.answering().ask(ids, several, names)
    assert len({question.index for question in asked}) == 6
    alone = policy.answering().ask(ids[1:2], several[:1], names[1:2])
    assert [question.index for question in alone] == [q.index for q in asked[2:4]]


def test_on_policy_the_loss_is_minus_the_advantage_at_pictures_and_answers(policy):
    """The clipped objective at ratio 1: d loss / d log p = -A / (T_i N) at both."""
    rollout = draw(policy)
    rewards = torch.tensor([1.0, 0.0, 0.0, 0.0, 0.5, 1.0])
    prepared = load_method("unirl").prepare(
        rollout.trajectories.replace(rewards={"self_answer": rewards})
    )
    log_prob = policy.evaluate(prepared).log_prob
    assert ((log_prob - prepared.old_log_prob).exp() - 1)[prepared.mask].abs().max() < 1e-5
    leaf = log_prob.detach().requires_grad_()
    (gradient,) = torch.autograd.grad(load_method("unirl").loss(leaf, prepared).loss, leaf)
    a = torch.cat([(g - g.mean()) / (g.std() + 1e-6) for g in rewards.split(3)])
    wanted = -(a / prepared.mask.sum(dim=1) / 6)[:, None] * prepared.mask
    torch.testing.assert_close(gradient, wanted, rtol=1e-4, atol=1e-7)
    answers = prepared.segment == ANSWERS
    assert (gradient[answers & prepared.mask].abs() > 0).any()


def test_gradients_reach_the_weights_through_answers_alone(policy):
    found = draw(policy).trajectories
    only = found.replace(mask=found.mask & (found.segment == ANSWERS))
    (gradient,) = torch.autograd.grad(
        policy.evaluate(only).log_prob.sum(), [policy.model.lm_head.weight]
    )
    codes = slice(policy.layout.code_offset, policy.layout.code_offset + policy.layout.num_codes)
    assert gradient.norm() > 0
    assert gradient[codes].norm() == 0  # no code may stand in an answer


def test_who_is_not_asked_has_no_answers_to_train():
    base = {
        "modality": "image_tokens", "method": "unirl", "run_dir": "r", "model": {"path": "m"},
        "data": {"train": "d"}, "rewards": "self_answer",
        "trainer": {"steps": 1, "learning_rate": 0.1},
    }  # fmt: skip
    with pytest.raises(ConfigError, match="nothing is asked"):
        load_config({**base, "rollout": {"train_answers": True}})
    load_config({**base, "rollout": {"train_answers": True, "ask_questions": True}})
