"""The next-scale task: codes that can be read, the build, and the folder that ships."""

import json

import pytest
import torch
from transformers import AutoModelForImageClassification

from mmgrpo.config.paths import locate
from mmgrpo.playground.classifier import read_digits
from mmgrpo.playground.digits import load_digits
from mmgrpo.playground.image import NUM_NUMBERS, DigitBook, is_held_out, prompt_row
from mmgrpo.playground.image_scales import SHAPE, Pretraining, build_image_scales, build_model
from mmgrpo.playground.tiny_scale_vq import spread_codes
from mmgrpo.policies.image_scales import ImageScalesPolicy
from mmgrpo.protocols import Prompt
from mmgrpo.rollout.image_scales import ImageScalesEngine

SHORT = Pretraining(steps=2, batch_size=4, vq_steps=6)


@pytest.fixture(scope="module")
def shipped():
    return ImageScalesPolicy(locate("playground:image_scales/model"))


@pytest.fixture(scope="module")
def judge():
    folder = locate("playground:image/judge_classifier")
    model = AutoModelForImageClassification.from_pretrained(folder).eval()

    def judged(images, numbers):
        pixels = torch.stack(
            [
                torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8).view(8, 16, 3)
                for image in images
            ]
        )
        digits = torch.stack([numbers // 10, numbers % 10], dim=1)
        with torch.no_grad():
            read = read_digits(model, pixels.permute(0, 3, 1, 2) / 255.0).argmax(-1)
        return (read == digits).all(1).float().mean().item()

    return judged


def test_a_build_is_complete_and_reproducible(tmp_path):
    lines = []
    for name in ("one", "two"):
        build_image_scales(tmp_path / name, settings=SHORT, progress=lines.append)
    files = sorted(p.relative_to(tmp_path / "one") for p in (tmp_path / "one").rglob("*.*"))
    names = {"config.json", "model.safetensors", "train.jsonl", "eval.jsonl"}
    assert {p.name for p in files} == names
    for file in files:
        assert (tmp_path / "one" / file).read_bytes() == (tmp_path / "two" / file).read_bytes()
    rows = {
        split: [json.loads(line) for line in (tmp_path / "one" / f"{split}.jsonl").open()]
        for split in ("train", "eval")
    }
    assert [len(rows["train"]), len(rows["eval"])] == [80, 20]
    assert all(is_held_out(int(row["answer"])) for row in rows["eval"])
    build_image_scales(tmp_path / "three", settings=SHORT, seed=1)
    file = "model/model.safetensors"
    assert (tmp_path / "one" / file).read_bytes() != (tmp_path / "three" / file).read_bytes()


def test_what_ships_is_small_and_of_the_build(shipped):
    parameters = sum(p.numel() for p in shipped.model.transformer.parameters())
    parameters += sum(p.numel() for p in shipped.quantiser.parameters())
    assert 4e5 < parameters < 7e5
    assert shipped.model.shape == SHAPE
    assert SHAPE.room == 43


def test_the_codebook_starts_where_the_codes_are():
    quantiser = build_model(0).quantiser
    generator = torch.Generator().manual_seed(0)
    numbers = torch.randint(0, NUM_NUMBERS, (64,), generator=generator)
    canvases = DigitBook(*load_digits("train")).draw(numbers, 0.0, generator)
    latent = quantiser.encoder(canvases.expand(-1, 3, -1, -1))

    def error():
        wanted, codes, _ = next(iter(quantiser.residuals(latent)))
        return float((wanted - quantiser.codebook(codes)).square().mean().detach())

    before = error()
    spread_codes(quantiser, canvases, seed=0)
    assert error() < before / 20


def test_pictures_survive_their_codes(shipped, judge):
    """The judge reads drawn numbers from their codes nearly as well as from their pixels."""
    generator = torch.Generator().manual_seed(0)
    numbers = torch.randint(0, NUM_NUMBERS, (200,), generator=generator)
    canvases = DigitBook(*load_digits("eval")).draw(numbers, 0.0, generator)
    codes = shipped.quantiser.encode(canvases.expand(-1, 3, -1, -1))
    assert len(codes.unique()) > SHAPE.num_codes / 2
    assert judge(shipped.draw(codes), numbers) > 0.8
    coarse = codes.clone()
    coarse[:, 11:] = codes[torch.randperm(200, generator=generator), 11:]
    assert judge(shipped.draw(coarse), numbers) < 0.8  # the last scale is not idle


def test_the_base_draws_what_is_asked_for_about_every_second_time(shipped, judge):
    numbers = torch.arange(0, NUM_NUMBERS, 5)
    prompts = [Prompt(int(n), str(prompt_row(int(n))["prompt"])) for n in numbers]
    rollout = ImageScalesEngine(shipped).generate(prompts, group_size=8, seed=3)
    images = [sample.image for sample in rollout.samples]
    assert 0.3 < judge(images, numbers.repeat_interleave(8)) < 0.7
