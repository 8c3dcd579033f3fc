"""The video task: the copying autoencoder, the clips, the pipeline folder and its base model."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
from diffusers import WanPipeline

from mmgrpo.playground.digits import load_digits
from mmgrpo.playground.image import DigitBook
from mmgrpo.playground.tiny_video_vae import copying_video_vae
from mmgrpo.playground.video import (
    MOTIONS,
    VIDEO_PRETRAINING,
    all_prompts,
    animate,
    build_video,
    draw,
    is_held_out,
    pretrain,
)
from mmgrpo.playground.video_model import (
    DIRECTIONS,
    LATENT_MEAN,
    LATENT_STD,
    NUM_FRAMES,
    NUM_TOKENS,
    SIZE,
    build_pipeline,
    encode_prompts,
)
from mmgrpo.rewards.video_digits_motion import VideoDigitsMotion

SHORT = replace(VIDEO_PRETRAINING, steps=12, batch_size=8)
RIGHT, LEFT, DOWN, UP = range(4)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    out = tmp_path_factory.mktemp("video")
    build_video(out, pretraining=SHORT, classifier_steps=150)
    return out


def sample(pipeline, prompt, **options):
    size = {"height": SIZE, "width": SIZE, "num_inference_steps": 2, "guidance_scale": 1.0}
    latents = torch.randn(1, 1, NUM_FRAMES, SIZE, SIZE, generator=torch.Generator().manual_seed(0))
    return pipeline(prompt, latents=latents, **{**size, **options}).frames


def test_the_autoencoder_copies_both_ways():
    vae = copying_video_vae()
    clips = torch.rand(2, 1, 5, 8, 12) * 2 - 1  # it encodes 4 k + 1 frames
    with torch.no_grad():
        latents = vae.encode(clips.expand(-1, 3, -1, -1, -1)).latent_dist.mode()
        decoded = vae.decode(clips).sample
    torch.testing.assert_close(latents, clips, rtol=0, atol=1e-4)
    torch.testing.assert_close(decoded, clips.expand(-1, 3, -1, -1, -1), rtol=0, atol=1e-4)
    red = torch.tensor([1.0, -1.0, -1.0]).view(1, 3, 1, 1, 1).expand(1, 3, 1, 4, 4)
    with torch.no_grad():
        mean = vae.encode(red).latent_dist.mode()
    torch.testing.assert_close(mean, torch.full((1, 1, 1, 4, 4), -1 / 3), rtol=0, atol=1e-4)


def test_a_picture_crosses_the_middle_a_quarter_a_frame():
    pictures = torch.full((4, 8, 8), 255, dtype=torch.uint8)
    clips = animate(pictures, torch.arange(4))
    assert clips.shape == (4, 1, NUM_FRAMES, SIZE, SIZE)
    assert set(clips.unique().tolist()) == {-1.0, 1.0}
    axis = torch.arange(SIZE).float() + 0.5
    ink = (clips[:, 0] + 1) / 2
    x = (ink.sum(dim=2) * axis).sum(dim=-1) / ink.sum(dim=(2, 3))
    y = (ink.sum(dim=3) * axis).sum(dim=-1) / ink.sum(dim=(2, 3))
    forth, middle = [4.0, 8.0, 12.0], [8.0] * 3
    assert x.tolist() == [forth, forth[::-1], middle, middle]
    assert y.tolist() == [middle, middle, forth, forth[::-1]]
    assert (ink.sum(dim=(2, 3)) == 64).all()


def test_clips_show_what_was_asked_when_nothing_is_wrong():
    pixels, labels = load_digits("train")
    book, known = DigitBook(pixels, labels), {}
    for picture, label in zip(pixels, labels, strict=True):
        known[picture.tobytes()] = label
    clips = draw(book, torch.arange(len(MOTIONS)), 0.0, torch.Generator().manual_seed(0))
    for clip, (digit, way) in zip(clips[:, 0], MOTIONS, strict=True):
        row, column = {"right": (4, 0), "left": (4, 8), "down": (0, 4), "up": (8, 4)}[way]
        first = clip[0, row : row + 8, column : column + 8]
        assert known[((first + 1) * 127.5).round().byte().numpy().tobytes()] == digit


def test_digits_and_directions_are_wrong_at_the_stated_rate():
    digits = torch.arange(20) % 10
    pictures = (10 * digits + 5).byte()[:, None, None].expand(20, 8, 8).contiguous().numpy()
    book = DigitBook(pictures, digits.numpy())
    asked = MOTIONS.index((4, "right"))
    clips = draw(book, torch.full((6000,), asked), 0.3, torch.Generator().manual_seed(0))
    starts_left = clips[:, 0, 0, 8, 0] > -1
    assert starts_left.float().mean().item() == pytest.approx(1 - 0.3 * 3 / 4, abs=0.02)
    shades = ((clips[:, 0, 0].amax(dim=(1, 2)) + 1) * 127.5).round().long() // 10
    assert (shades == 4).float().mean().item() == pytest.approx(1 - 0.3 * 9 / 10, abs=0.02)


def test_prompts_are_distinguishable():
    states = encode_prompts(build_pipeline(0), all_prompts())
    assert states.shape == (len(MOTIONS) + 1, NUM_TOKENS, 32)
    distances = torch.cdist(states.flatten(1), states.flatten(1))
    assert (distances + 100 * torch.eye(len(states))).min() > 0.5


def test_rows_of_training_and_evaluation_are_disjoint(folder):
    rows = [
        [json.loads(line) for line in (folder / f"{split}.jsonl").read_text().splitlines()]
        for split in ("train", "eval")
    ]
    motions = [{(row["digit"], row["direction"]) for row in part} for part in rows]
    assert [len(part) for part in motions] == [30, 10]
    assert motions[0] | motions[1] == set(MOTIONS)
    assert {digit for digit, _ in motions[1]} == set(range(10))
    assert {way for _, way in motions[1]} == set(DIRECTIONS)
    assert sum(map(is_held_out, MOTIONS)) == 10
    for row in rows[0] + rows[1]:
        assert row["prompt"] == f"the digit {row['digit']} moves {row['direction']}"


def test_plain_diffusers_loads_the_folder_and_samples(folder):
    pipeline = WanPipeline.from_pretrained(folder / "model")
    pipeline.set_progress_bar_config(disable=True)
    short = sample(pipeline, "the digit 7 moves right", max_sequence_length=NUM_TOKENS)
    assert short.shape == (1, NUM_FRAMES, SIZE, SIZE, 3)
    latents = sample(
        pipeline, "the digit 7 moves right", max_sequence_length=NUM_TOKENS, output_type="latent"
    )
    pixels = ((latents * LATENT_STD + LATENT_MEAN) / 2 + 0.5).clamp(0, 1)
    expected = pixels[:, 0, ..., None].expand(-1, -1, -1, -1, 3)
    torch.testing.assert_close(torch.from_numpy(short), expected, atol=1e-3, rtol=0)


def test_the_classifiers_read_the_training_clips(folder):
    """The reward and the judge agree with how the clips were made."""
    book = DigitBook(*load_digits("eval"))
    clips = draw(book, torch.arange(len(MOTIONS)), 0.0, torch.Generator().manual_seed(0))
    videos = WanPipeline.from_pretrained(folder / "model").video_processor.postprocess_video(
        clips.expand(-1, 3, -1, -1, -1), output_type="pil"
    )
    digits, ways = zip(*MOTIONS, strict=True)
    wrong = ways[1:] + ways[:1]
    for role in ("reward", "judge"):
        check = VideoDigitsMotion(str(folder / f"{role}_classifier"), reduce="all_correct")
        right = check(videos=videos, digit=list(digits), direction=list(ways))
        assert sum(right) / len(right) > 0.8
        assert sum(check(videos=videos, digit=list(digits), direction=list(wrong))) == 0


def test_the_same_seed_gives_the_same_model():
    pipelines = [build_pipeline(seed) for seed in (3, 3, 4)]
    for seed, made in zip((3, 3, 4), pipelines, strict=True):
        torch.manual_seed(torch.randint(0, 1000, ()).item())
        pretrain(made, SHORT, seed=seed)
    weights = [made.transformer.proj_out.weight for made in pipelines]
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])
