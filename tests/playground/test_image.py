"""The image task: classifiers, the copying autoencoder, the pipeline folder and its base model."""

import json
from collections import Counter

import pytest
import torch
from diffusers import StableDiffusion3Pipeline
from transformers import (
    AutoImageProcessor,
    AutoModelForImageClassification,
    ResNetForImageClassification,
)

from mmgrpo.playground.classifier import (
    classifier_config,
    digit_accuracy,
    prepare,
    read_digits,
    to_rgb,
    train_classifier,
)
from mmgrpo.playground.digits import load_digits
from mmgrpo.playground.image import (
    DigitBook,
    Pretraining,
    all_prompts,
    build_image,
    is_held_out,
    pretrain,
)
from mmgrpo.playground.image_model import (
    DEFAULT_T5_TOKENS,
    NUM_CLIP_TOKENS,
    NUM_T5_TOKENS,
    build_pipeline,
    encode_prompts,
)
from mmgrpo.playground.pretraining import flow_matching_loss
from mmgrpo.playground.tiny_vae import copying_vae

SHORT = Pretraining(steps=2, batch_size=8)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    out = tmp_path_factory.mktemp("image")
    build_image(out, pretraining=SHORT, classifier_steps=2)
    return out


@pytest.fixture(scope="module")
def pipeline(folder):
    loaded = StableDiffusion3Pipeline.from_pretrained(folder / "model")
    loaded.set_progress_bar_config(disable=True)
    return loaded


def draw(pipeline, prompt, **options):
    settings = {"height": 8, "width": 16, "num_inference_steps": 2, "guidance_scale": 1.0}
    settings |= {"generator": torch.Generator().manual_seed(0), "output_type": "pt"} | options
    return pipeline(prompt, **settings).images


def test_reward_and_judge_learn_from_different_digits():
    train, _ = load_digits("train")
    judge, _ = load_digits("judge")
    assert not {x.tobytes() for x in train} & {x.tobytes() for x in judge}


def test_a_short_training_reads_unseen_digits():
    assert digit_accuracy(train_classifier("judge", seed=1, steps=150), "eval") > 0.9


def test_classifier_folder_reads_pictures_like_the_training_code(folder):
    model = AutoModelForImageClassification.from_pretrained(folder / "reward_classifier")
    processor = AutoImageProcessor.from_pretrained(folder / "reward_classifier")
    images = to_rgb(load_digits("eval")[0][:8])
    pictures = [image.permute(1, 2, 0).mul(255).byte().numpy() for image in images]
    pixels = processor(pictures, return_tensors="pt")
    torch.testing.assert_close(pixels["pixel_values"], prepare(images), atol=0.02, rtol=0)
    assert model.config.id2label[7] == "7"


def test_read_digits_keeps_the_order_of_the_places():
    model = ResNetForImageClassification(classifier_config()).eval()
    images = to_rgb(load_digits("eval")[0][:6])
    pairs = torch.cat([images[:3], images[3:]], dim=3)
    probabilities = read_digits(model, pairs)
    assert probabilities.shape == (3, 2, 10)
    torch.testing.assert_close(probabilities[:, 0], read_digits(model, images[:3])[:, 0])
    torch.testing.assert_close(probabilities[:, 1], read_digits(model, images[3:])[:, 0])


def test_vae_copies_pictures_and_latents():
    vae = copying_vae()
    gray = torch.rand(2, 1, 8, 16) * 2 - 1
    latents = vae.encode(gray.expand(-1, 3, -1, -1)).latent_dist
    torch.testing.assert_close(latents.sample(), gray, atol=1e-4, rtol=0)
    torch.testing.assert_close(
        vae.decode(3 * gray).sample, 3 * gray.expand(-1, 3, -1, -1), atol=1e-3, rtol=0
    )


def test_held_out_numbers_use_every_digit_equally():
    held_out = [number for number in range(100) if is_held_out(number)]
    assert len(held_out) == 20
    assert set(Counter(number // 10 for number in held_out).values()) == {2}
    assert set(Counter(number % 10 for number in held_out).values()) == {2}


def test_rows_of_training_and_evaluation_are_disjoint(folder):
    rows = [
        [json.loads(line) for line in (folder / f"{split}.jsonl").read_text().splitlines()]
        for split in ("train", "eval")
    ]
    answers = [{row["answer"] for row in part} for part in rows]
    assert [len(part) for part in answers] == [80, 20]
    assert not answers[0] & answers[1]
    for row in rows[0] + rows[1]:
        assert row["prompt"] == f"the number {row['answer']}"
        assert row["labels"] == [int(digit) for digit in row["answer"]]


def test_prompts_are_distinguishable():
    states, pooled = encode_prompts(build_pipeline(0), all_prompts())
    assert states.shape == (101, NUM_CLIP_TOKENS + NUM_T5_TOKENS, 64)
    assert not states[:, NUM_CLIP_TOKENS:].any()
    for table in (states.flatten(1), pooled):
        distances = torch.cdist(table, table) + 100 * torch.eye(len(table))
        assert distances.min() > 0.05
    # Digit 4 has the same token state as in 44 at either place, and only its own place shows it.
    torch.testing.assert_close(states[42][:4], states[44][:4])
    assert not torch.allclose(states[42][4], states[44][4])


def test_digits_are_drawn_as_asked_when_none_is_wrong():
    book = DigitBook(*load_digits("train"))
    canvases = book.draw(torch.tensor([42, 7]), 0.0, torch.Generator().manual_seed(0))
    pixels, labels = load_digits("train")
    known = {x.tobytes(): label for x, label in zip(pixels, labels, strict=True)}
    places = ((canvases[:, 0] + 1) * 127.5).round().byte().numpy()
    read = [[known[place[:, i : i + 8].tobytes()] for i in (0, 8)] for place in places]
    assert read == [[4, 2], [0, 7]]


def test_wrong_digits_appear_at_the_stated_rate():
    digits = (torch.arange(20) % 10).numpy()
    pictures = digits[:, None, None].repeat(8, axis=1).repeat(8, axis=2).astype("uint8")
    canvases = DigitBook(pictures, digits).draw(
        torch.full((4000,), 42), 0.2, torch.Generator().manual_seed(0)
    )
    right = ((canvases[:, 0, 0, 0] + 1) * 127.5).round() == 4
    assert right.float().mean().item() == pytest.approx(1 - 0.2 * 0.9, abs=0.03)


def test_plain_diffusers_loads_the_folder_and_samples(pipeline):
    images = draw(pipeline, ["the number 42", "the number 07"], max_sequence_length=NUM_T5_TOKENS)
    assert images.shape == (2, 3, 8, 16)
    assert images.isfinite().all()
    assert not torch.equal(images[0], images[1])
    picture = draw(pipeline, "the number 42", output_type="pil")[0]
    assert picture.size == (16, 8)


def test_leaving_out_the_third_encoder_changes_nothing(folder, pipeline):
    two_encoders = StableDiffusion3Pipeline.from_pretrained(
        folder / "model", text_encoder_3=None, tokenizer_3=None
    )
    two_encoders.set_progress_bar_config(disable=True)
    for length in (NUM_T5_TOKENS, DEFAULT_T5_TOKENS):
        with_t5 = draw(pipeline, "the number 42", max_sequence_length=length)
        without = draw(two_encoders, "the number 42", max_sequence_length=length)
        torch.testing.assert_close(with_t5, without)


def test_latents_decode_to_the_pixels_they_stand_for(pipeline):
    latents = draw(pipeline, "the number 42", output_type="latent")
    assert latents.shape == (1, 1, 8, 16)
    vae = pipeline.vae.config
    pixels = (latents / vae.scaling_factor + vae.shift_factor) / 2 + 0.5
    expected = pixels.clamp(0, 1).expand(-1, 3, -1, -1)
    torch.testing.assert_close(draw(pipeline, "the number 42"), expected, atol=1e-3, rtol=0)


def test_the_same_seed_gives_the_same_model():
    pipelines = [build_pipeline(seed) for seed in (3, 3, 4)]
    for seed, made in zip((3, 3, 4), pipelines, strict=True):
        torch.manual_seed(torch.randint(0, 1000, ()).item())
        pretrain(made, SHORT, seed=seed)
    weights = [made.transformer.proj_out.weight for made in pipelines]
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])


def test_pretraining_reduces_the_loss():
    made = build_pipeline(0)
    states, pooled = encode_prompts(made, all_prompts())
    numbers = torch.arange(32)
    clean = DigitBook(*load_digits("train")).draw(numbers, 0.0, torch.Generator().manual_seed(1))

    @torch.no_grad()
    def loss():
        generator = torch.Generator().manual_seed(2)
        batch = (clean, states[numbers], pooled[numbers], generator)
        return flow_matching_loss(made.transformer, *batch).item()

    before = loss()
    pretrain(made, Pretraining(steps=30, batch_size=16, ema_decay=0.5), seed=0)
    assert loss() < 0.8 * before
    assert not made.transformer.training


@pytest.mark.slow
def test_the_base_model_draws_some_numbers_right_and_many_wrong(tmp_path):
    build_image(tmp_path)
    made = StableDiffusion3Pipeline.from_pretrained(tmp_path / "model")
    made.set_progress_bar_config(disable=True)
    judge = AutoModelForImageClassification.from_pretrained(tmp_path / "judge_classifier").eval()
    images = draw(
        made,
        all_prompts()[:100],
        num_inference_steps=10,
        num_images_per_prompt=4,
        max_sequence_length=NUM_T5_TOKENS,
    )
    numbers = torch.arange(100).repeat_interleave(4)
    digits = torch.stack([numbers // 10, numbers % 10], dim=1)
    right = (read_digits(judge, images).argmax(-1) == digits).all(dim=1)
    assert 0.4 < right.float().mean().item() < 0.7
