"""The image-token engine: complete pictures, plans, and answers about the model's own pictures."""

import pytest
import torch
from fixtures_image_tokens import CODES, GRID, drawing_prompts, tiny_parts

from mmgrpo.errors import DataError
from mmgrpo.policies.image_tokens import ImageTokenPolicy
from mmgrpo.protocols import Prompt
from mmgrpo.rollout.image_tokens import ImageTokenEngine

CELLS = GRID[0] * GRID[1]


def engine_of(plan=0, **options):
    return ImageTokenEngine(ImageTokenPolicy(tiny_parts(), plan_tokens=plan), **options)


def draw(engine, prompts=None, **options):
    prompts = drawing_prompts() if prompts is None else prompts
    return engine.generate(prompts, **{"group_size": 5, "seed": 1, **options})


def decoded(policy, codes):
    """The picture as the decoder itself makes it: the nearest entry of an entry is that entry."""
    entries = policy.decoder.quantize.embedding(codes).view(1, *GRID, -1).permute(0, 3, 1, 2)
    pixels = policy.decoder.decode(entries).sample[0]
    return ((pixels + 1) * 127.5).round().clamp(0, 255).to(torch.uint8).permute(1, 2, 0)


@torch.no_grad()
@pytest.mark.parametrize("plan", [0, 3])
def test_every_sample_is_a_plan_and_a_whole_picture(plan):
    engine = engine_of(plan)
    rollout, layout = draw(engine), engine.policy.layout
    found = rollout.trajectories
    assert not found.truncated.any()
    codes = range(layout.code_offset, layout.code_offset + CODES)
    lengths = set()
    for i, sample in enumerate(rollout.samples):
        ids = found.payload.completion_ids[i].tolist()
        begin = ids.index(layout.begin_id) + 1 if plan else 0
        text, inside = ids[: max(begin - 1, 0)], ids[begin : begin + CELLS]
        assert len(text) <= plan
        assert all(token in codes for token in inside)
        assert sample.completion == (engine.policy.decode([text])[0] if plan else None)
        wanted = decoded(engine.policy, torch.tensor(inside) - layout.code_offset)
        assert torch.equal(torch.frombuffer(bytearray(sample.image.tobytes()), dtype=torch.uint8)
                           .view(wanted.shape), wanted)  # fmt: skip
        forced = plan and len(text) == plan  # then the picture's beginning was no choice
        mask, segment = found.mask[i].tolist(), found.segment[i].tolist()
        on = [True] * begin + [True] * CELLS
        if forced:
            on[plan] = False
        assert mask[: len(on)] == on
        assert not any(mask[len(on) :])
        assert segment[begin : begin + CELLS] == [1] * CELLS
        plan_segments = [s for s, m in zip(segment[:begin], mask, strict=False) if m]
        assert plan_segments == [0] * sum(on[:begin])
        assert sample.length == sum(on)
        lengths.add(len(text))
    assert not plan or len(lengths) > 1  # some plans end by themselves, some are cut


def test_a_sample_does_not_depend_on_the_batch_it_is_in():
    engine = engine_of(3)
    together, alone = draw(engine), draw(engine, drawing_prompts()[1:])
    ids, other = (r.trajectories.payload.completion_ids[-5:] for r in (together, alone))
    width = min(ids.shape[1], other.shape[1])
    assert torch.equal(ids[:, :width], other[:, :width])


def test_waiting_rows_change_nothing():
    whole, few = draw(engine_of(3)), draw(engine_of(3, max_rows=3))
    for one, two in zip(whole.samples, few.samples, strict=True):
        assert one.completion == two.completion
        assert one.image.tobytes() == two.image.tobytes()


@torch.no_grad()
def test_self_answers_are_what_the_model_says_greedily():
    engine = engine_of(0, ask_questions=True, max_answer_tokens=4)
    policy, rollout = engine.policy, draw(engine)
    layout, ids = policy.layout, rollout.trajectories.payload.completion_ids
    never = [i for i, token in policy.tokenizer.added_tokens_decoder.items() if token.special]
    never += list(range(len(policy.tokenizer), policy.model.config.vocab_size))
    end = policy.tokenizer.eos_token_id
    for row, sample in zip(ids.tolist(), rollout.samples, strict=True):
        questions = [question for question, _ in sample.prompt.columns["questions"]]
        assert len(sample.self_answers) == len(questions)
        for question, answer in zip(questions, sample.self_answers, strict=True):
            before, after = (
                policy.tokenizer(text)["input_ids"] for text in ("of ", f"{question}=")
            )
            read = [*before, layout.begin_id, *row, layout.end_id, *after]
            written = []
            while len(written) < 4:
                logits = policy.model(input_ids=torch.tensor([read + written])).logits[0, -1]
                logits[[i for i in never if i != end]] = -torch.inf
                written.append(int(logits.argmax()))
                if written[-1] == end:
                    break
            assert answer == policy.decode([written])[0]


def test_who_is_not_asked_says_nothing_and_questions_are_needed():
    assert all(sample.self_answers == () for sample in draw(engine_of()).samples)
    for columns in ({}, {"questions": []}, {"questions": 3}, {"questions": [["only one"]]}):
        prompts = [Prompt(0, "a cat", columns=columns, source="data.jsonl:1")]
        with pytest.raises(DataError, match=r"data.jsonl:1: rollout.ask_questions needs the col"):
            draw(engine_of(ask_questions=True), prompts)


@pytest.mark.parametrize("options", [{}, {"max_rows": 3}])
def test_groups_are_told_of_where_nothing_is_asked(options):
    told = []
    engine = engine_of(3, **options)
    assert engine.announces
    rollout, plain = draw(engine, on_samples=told.append), draw(engine)
    assert [len(group) for group in told] == [5, 5]
    order = {4: 0, 9: 1}
    told.sort(key=lambda group: order[group[0].prompt.index])
    for found in ([s for group in told for s in group], rollout.samples):
        for one, two in zip(found, plain.samples, strict=True):
            assert one.completion == two.completion
            assert one.image.tobytes() == two.image.tobytes()
    assert not engine_of(0, ask_questions=True).announces
