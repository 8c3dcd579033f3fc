"""Vision-language policies against the model's own forward of each row by itself."""

import pytest
import torch
from fixtures_tokens import (
    VISION_FAMILIES,
    canvas,
    distributions,
    image_prompts,
    relative_error,
    tiny_text,
    tiny_vision,
    trajectories_of,
)

from mmgrpo.errors import DataError, ModelError
from mmgrpo.policies.adapters import trainable_parameters
from mmgrpo.policies.multimodal import VisionLanguagePolicy
from mmgrpo.protocols import Prompt, Request
from mmgrpo.rollout.autoregressive import AutoregressiveEngine

RAGGED = [0, 0, 1, 1, 1, 2]
ROUNDING = 1e-5
"""Float32 sums in another order."""


def make_policy(family="qwen2_vl", **options):
    return VisionLanguagePolicy(tiny_vision(family), **options)


def inputs_of(processor, prompt):
    """What the processor makes of one prompt, without ids and mask."""
    text = processor.apply_chat_template(prompt.content, add_generation_prompt=True, tokenize=False)
    encoded = processor(text=[text], images=list(prompt.images) or None, return_tensors="pt")
    return {k: v for k, v in encoded.items() if k not in ("input_ids", "attention_mask")}


def gradients(policy, log_prob):
    weight = torch.linspace(0.5, 2.0, log_prob.numel()).view_as(log_prob)
    trained = list(trainable_parameters(policy.network).values())
    return torch.autograd.grad((log_prob * weight).sum(), trained)


@pytest.mark.parametrize("family", VISION_FAMILIES)
def test_log_probs_are_those_of_the_models_own_forward(family):
    """The model finds image features and three-dimensional positions of each row by itself."""
    policy, prompts = make_policy(family), image_prompts()
    trajectories = trajectories_of(policy, prompts, RAGGED, temperature=0.7)
    found = policy.evaluate(trajectories).log_prob
    for row, number in enumerate(RAGGED):
        inputs = inputs_of(policy.processing, prompts[number])
        log_p = distributions(policy.model, trajectories, row, **inputs)
        log_p[:, policy.forbidden] = -torch.inf
        log_p = log_p.log_softmax(-1)
        ids = trajectories.payload.completion_ids[row]
        expected = log_p.gather(1, ids[:, None]).squeeze(1) * trajectories.mask[row]
        torch.testing.assert_close(found[row], expected, atol=ROUNDING, rtol=0)


@pytest.mark.parametrize("lora", [None, {"rank": 2, "alpha": 4.0}], ids=["full", "lora"])
@pytest.mark.parametrize("family", VISION_FAMILIES)
def test_the_shared_prompt_gives_the_gradients_of_the_repeated_one(family, lora):
    policy = make_policy(family, lora=lora, train_vision=lora is None)
    trajectories = trajectories_of(policy, image_prompts(), RAGGED)
    shared = policy.evaluate(trajectories).log_prob
    plain = policy.evaluate_plain(trajectories).log_prob
    assert policy._shares_prompts
    assert policy._selective
    torch.testing.assert_close(shared, plain, atol=ROUNDING, rtol=0)
    assert relative_error(gradients(policy, shared), gradients(policy, plain)) < ROUNDING


def test_positions_of_images_matter_here():
    """Otherwise the tests above would not notice plain positions."""
    policy = make_policy()
    prompts = policy.encode(image_prompts(), max_new_tokens=4)
    positions = policy._positions(prompts, prompts.inputs())
    assert positions.shape[0] == 3
    assert not torch.equal(positions[1], positions[2])
    trajectories = trajectories_of(policy, image_prompts(), RAGGED)
    before = policy.evaluate(trajectories).log_prob
    policy._positions = lambda prompts, inputs: super(VisionLanguagePolicy, policy)._positions(
        prompts, inputs
    )
    assert (policy.evaluate(trajectories).log_prob - before).abs().max() > 1e-3


def test_images_go_through_the_vision_tower_once_per_prompt():
    policy = make_policy()
    trajectories = trajectories_of(policy, image_prompts(), RAGGED)
    patches = []
    policy.model.model.visual.register_forward_pre_hook(
        lambda module, args, kwargs: patches.append(
            len(args[0] if args else kwargs["hidden_states"])
        ),
        with_kwargs=True,
    )
    grids = [f["image_grid_thw"].prod(-1).sum() for f in trajectories.payload.prompts.features[:2]]
    policy.evaluate(trajectories)
    assert patches == [sum(grids)]
    policy.evaluate(trajectories.select(trajectories.group == 2))
    assert patches[1:] == [grids[1]]


def test_the_kept_log_probs_are_those_of_an_evaluation_and_each_sample_is_its_own():
    policy = make_policy()
    engine = AutoregressiveEngine(policy, max_new_tokens=10, temperature=0.8)
    prompts = image_prompts()
    rollout = engine.generate(prompts, group_size=3, seed=0)
    found = rollout.trajectories
    again = policy.evaluate(found, Request(entropy=True))
    torch.testing.assert_close(found.old_log_prob, again.log_prob, atol=1e-5, rtol=0)
    torch.testing.assert_close(found.entropy, again.entropy, atol=1e-5, rtol=0)
    alone = engine.generate(prompts[1:2], group_size=3, seed=0)
    assert [s.completion for s in alone.samples] == [s.completion for s in rollout.samples[3:6]]
    assert len(found.payload.prompts) == 3


def test_placeholders_are_never_sampled_however_likely():
    policy = make_policy()
    placeholder = int(policy.forbidden[0])
    policy.model.get_output_embeddings().register_forward_hook(
        lambda module, args, output: output.index_fill(-1, torch.tensor([placeholder]), 100.0)
    )
    engine = AutoregressiveEngine(policy, max_new_tokens=10)
    found = engine.generate(image_prompts(), group_size=4, seed=0).trajectories
    assert not torch.isin(found.payload.completion_ids, policy.forbidden).any()
    again = policy.evaluate(found, Request(entropy=True))
    torch.testing.assert_close(found.old_log_prob, again.log_prob, atol=1e-5, rtol=0)
    assert found.old_log_prob.isfinite().all()
    assert found.entropy.isfinite().all()
    again.entropy.sum().backward()
    assert all(p.grad.isfinite().all() for p in trainable_parameters(policy.network).values())


def test_the_vision_tower_trains_only_on_request():
    def trains(policy):
        names = trainable_parameters(policy.network)
        return any("visual" in n for n in names), any("language_model" in n for n in names)

    lora = {"rank": 2, "alpha": 2.0}
    assert trains(make_policy()) == (False, True)
    assert trains(make_policy(train_vision=True)) == (True, True)
    assert trains(make_policy(lora=lora)) == (False, True)
    assert trains(make_policy(lora=lora, train_vision=True)) == (True, True)


@pytest.mark.parametrize("family", VISION_FAMILIES)
def test_counting_tokens_needs_no_pixels(family):
    policy = make_policy(family)
    for prompt in image_prompts():
        assert policy._count_tokens(prompt) == len(policy._encode(prompt).ids)


def ask(*parts):
    return [{"role": "user", "content": [{"type": "text", "text": "Look:"}, *parts]}]


IMAGE = {"type": "image"}


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        (Prompt(6, ask(IMAGE)), "Row 6: the messages have 1 image parts and the row has 0"),
        (
            Prompt(6, ask(IMAGE), images=(canvas(16, 16), canvas(16, 16))),
            "the messages have 1 image parts and the row has 2",
        ),
        (Prompt(6, "a <|image_pad|> b"), "Row 6: .*image"),
        (Prompt(6, "no placeholder", images=(canvas(16, 16),)), "Row 6: .* 0 .*image"),
        (
            Prompt(6, ask(IMAGE, {"type": "text", "text": "<|video_pad|>"}), (canvas(16, 16),)),
            "Row 6",
        ),
        (
            Prompt(6, ask(*[IMAGE] * 9), images=(canvas(32, 32),) * 9),
            "Row 6: the prompt has 1[0-9][0-9] tokens, and at most 152 fit",
        ),
    ],
)
def test_a_prompt_whose_images_do_not_fit_is_named(prompt, message):
    policy = make_policy()
    with pytest.raises(DataError, match=message):
        policy.encode([*image_prompts(), prompt], max_new_tokens=8)


def test_a_processor_that_does_not_count_is_checked():
    """Older processors leave it to the model, whose error names no row."""
    policy = make_policy()
    processor = policy.processing

    def uncounted(text, images, **options):
        encoded = processor(text=[text[0]], images=images, **options)
        encoded["input_ids"] = encoded["input_ids"].clamp(max=200)
        return encoded

    uncounted.image_processor = processor.image_processor
    uncounted.apply_chat_template = processor.apply_chat_template
    uncounted.chat_template = processor.chat_template
    policy.processing = uncounted
    with pytest.raises(DataError, match="Row 4: the prompt has 0 image tokens, and its 1 images"):
        policy._encode(image_prompts()[0])


def test_the_start_refuses_wrong_counts_and_long_prompts():
    policy = make_policy()
    policy.check(image_prompts(), room=8)
    with pytest.raises(DataError, match="1 image parts and the row has 2"):
        policy.check([Prompt(6, ask(IMAGE), images=(canvas(16, 16),) * 2)], room=8)
    with pytest.raises(DataError, match=r"Row 6: the prompt has 1\d\d tokens"):
        policy.check([Prompt(6, ask(*[IMAGE] * 9), images=(canvas(32, 32),) * 9)], room=8)


def test_plain_text_with_placeholders_and_images_works():
    policy = make_policy()
    marker = "<|vision_start|><|image_pad|><|vision_end|>"
    prompt = Prompt(0, f"{marker}digit?", images=(canvas(16, 24),))
    encoded = policy.encode([prompt], max_new_tokens=4)
    assert int((encoded.ids == policy.forbidden[0]).sum()) == 6


@pytest.fixture
def folder(tmp_path):
    model, processor = tiny_vision()
    model.save_pretrained(tmp_path / "model")
    processor.tokenizer.save_pretrained(tmp_path / "model")
    processor.image_processor.save_pretrained(tmp_path / "model")
    return tmp_path / "model"


@pytest.mark.parametrize("lora", [None, {"rank": 2, "alpha": 2.0}], ids=["full", "lora"])
def test_a_folder_loads_exports_and_loads_again(folder, tmp_path, lora):
    policy = VisionLanguagePolicy(folder, lora=lora)
    trajectories = trajectories_of(policy, image_prompts(), RAGGED)
    with torch.no_grad():
        for parameter in trainable_parameters(policy.network).values():
            parameter.add_(0.05)
    expected = policy.evaluate(trajectories).log_prob
    policy.export(tmp_path / "out")
    again = VisionLanguagePolicy(folder, lora=lora)
    assert (again.evaluate(trajectories).log_prob - expected).abs().max() > 0.01
    again.load_export(tmp_path / "out")
    torch.testing.assert_close(again.evaluate(trajectories).log_prob, expected)
    if lora is None:
        whole = VisionLanguagePolicy(tmp_path / "out")
        torch.testing.assert_close(whole.evaluate(trajectories).log_prob, expected)
        encoded = whole.encode(image_prompts(), max_new_tokens=4)
        assert torch.equal(encoded.ids, trajectories.payload.prompts.ids)


def test_a_folder_without_an_image_processor_is_refused(folder):
    (folder / "preprocessor_config.json").unlink()
    with pytest.raises(ModelError, match="image processor"):
        VisionLanguagePolicy(folder)


def test_a_text_model_is_not_a_vision_model(tmp_path):
    model, tokenizer = tiny_text()
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    with pytest.raises(ModelError) as caught:
        VisionLanguagePolicy(tmp_path)
    assert "\n" not in str(caught.value)
