"""The shapes task: scenes in words and pictures, the coloured pipeline folder, and its recipe."""

import json
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import StableDiffusion3Pipeline
from PIL import Image

import mmgrpo.playground
from mmgrpo.config import load_config
from mmgrpo.playground.flow_pretraining import Pretraining
from mmgrpo.playground.image_model import build_pipeline, encode_prompts
from mmgrpo.playground.shapes import (
    NUM_CLIP_TOKENS,
    NUM_T5_TOKENS,
    SHAPES,
    WORDS,
    PictureBook,
    asked_scenes,
    build_clip_tokenizer,
    build_shapes,
    is_held_out,
)
from mmgrpo.playground.shapes_drawing import (
    COLOURS,
    COUNTS,
    OPPOSITE,
    SIZE,
    Group,
    Scene,
    all_groups,
    all_scenes,
    render,
    spoiled,
    template,
)
from mmgrpo.playground.tiny_vae import copying_vae
from mmgrpo.scoring.load import load_reward

SCENES = all_scenes()
ASSETS = Path(mmgrpo.playground.__file__).parent / "assets"


def rewards():
    """The reward and the judge of the quickstart."""
    config = load_config("quickstart/shapes")
    specs = [config.rewards[0], config.eval.judge]
    return [load_reward({"name": s.name, "options": s.options}).fn for s in specs]


def test_prompts_and_their_conditions():
    assert len(SCENES) == 315
    assert len({scene.prompt for scene in SCENES}) == 315
    two = Scene((Group("circle", "red", 2),))
    assert two.row == {
        "prompt": "two red circles",
        "include": [{"class": "circle", "color": "red", "count": 2}],
    }
    pair = Scene((Group("square", "blue"), Group("triangle", "green")), "left of")
    assert pair.row == {
        "prompt": "a blue square left of a green triangle",
        "include": [
            {"class": "square", "color": "blue", "count": 1, "position": ["left of", 1]},
            {"class": "triangle", "color": "green", "count": 1},
        ],
    }


def test_pairs_and_equal_shapes_are_asked_for_alike():
    asked = asked_scenes()
    assert len(asked) == len({scene.prompt for scene in asked}) == 54
    assert sum(scene.relation is None for scene in asked) == 27
    assert Counter(s.relation for s in asked if s.relation) == pytest.approx(
        dict.fromkeys(OPPOSITE, 27 / 4), abs=1
    )


def test_held_out_prompts_are_of_every_sort():
    kept = [scene for number, scene in enumerate(asked_scenes()) if is_held_out(number)]
    assert len(kept) == 11
    assert {group.shape for scene in kept for group in scene.groups} == {
        "circle",
        "square",
        "triangle",
    }
    assert {scene.relation for scene in kept} == {scene.relation for scene in SCENES}
    assert {group.count for scene in kept for group in scene.groups} == {*COUNTS}


def test_what_is_drawn_meets_its_conditions_and_no_others():
    some = SCENES[::5]
    pictures = [Image.fromarray(render(scene)) for scene in some]
    assert {picture.size for picture in pictures} == {(SIZE, SIZE)}
    include = [scene.row["include"] for scene in some]
    reward, judge = rewards()
    assert np.mean(reward(images=pictures, include=include)) > 0.97
    assert np.mean(judge(images=pictures, include=include)) > 0.97
    others = include[1:] + include[:1]
    assert np.mean(judge(images=pictures, include=others)) < 0.05


def test_reward_and_judge_are_different_verifiers():
    """A gray smear in a free quarter is no shape to the one, and unknown to the other."""
    scene = Scene((Group("circle", "red"), Group("square", "blue")), "left of")
    pixels = render(scene).copy()
    assert not pixels[12:, 12:].any()
    pixels[15:21, 15:21] = (120, 120, 60)
    asked = {"images": [Image.fromarray(pixels)], "include": [scene.row["include"]]}
    reward, judge = rewards()
    assert reward(**asked) == [1.0]
    assert judge(**asked) == [0.0]


def test_drawings_of_the_judge_are_what_quarters_show():
    shown = {template(None).tobytes(), *(template(group).tobytes() for group in all_groups())}
    assert len(shown) == 10
    picture = render(Scene((Group("triangle", "green", 3),)))
    quarters = [picture[y : y + 12, x : x + 12].tobytes() for y in (0, 12) for x in (0, 12)]
    assert set(quarters) == {
        template(None).tobytes(),
        template(Group("triangle", "green")).tobytes(),
    }


def test_shapes_never_touch_the_border_or_each_other():
    for scene in SCENES[2::7]:
        picture = render(scene).astype(int)
        border = np.concatenate([picture[0], picture[-1], picture[:, 0], picture[:, -1]])
        assert border.max() < 30  # of 220: a shape may cover a corner of a pixel there


def test_nothing_is_spoiled_at_rate_zero_and_much_at_rate_one():
    rng = np.random.default_rng(0)
    assert all(spoiled(scene, 0.0, rng) == scene for scene in SCENES)
    scene = Scene((Group("circle", "red", 2),))
    made = [spoiled(scene, 1.0, rng).groups[0] for _ in range(900)]
    for counts in (Counter(g.shape for g in made), Counter(g.colour for g in made)):
        assert all(count == pytest.approx(300, abs=60) for count in counts.values())
    pair = Scene((Group("circle", "red"), Group("square", "blue")), "above")
    turned = Counter(spoiled(pair, 1.0, rng).relation for _ in range(400))
    assert set(turned) == {"above", "below"}
    assert turned["below"] == pytest.approx(200, abs=50)


def test_each_word_is_one_token_and_every_prompt_fits(tmp_path):
    tokenizer = build_clip_tokenizer()
    tokenizer.save_pretrained(tmp_path)
    loaded = type(tokenizer).from_pretrained(tmp_path)
    ids = [loaded(scene.prompt)["input_ids"] for scene in SCENES]
    assert [len(row) for row in ids] == [len(s.prompt.split()) + 2 for s in SCENES]
    assert max(map(len, ids)) <= NUM_CLIP_TOKENS - 2
    assert len({tuple(row) for row in ids}) == len(SCENES)
    assert {word for scene in SCENES for word in scene.prompt.split()} == {*WORDS}


def test_the_coloured_vae_copies_pictures_and_latents():
    vae = copying_vae(channels=3)
    pictures = torch.rand(2, 3, 24, 24) * 2 - 1
    latents = vae.encode(pictures).latent_dist
    torch.testing.assert_close(latents.sample(), pictures, atol=1e-4, rtol=0)
    torch.testing.assert_close(vae.decode(2 * pictures).sample, 2 * pictures, atol=2e-3, rtol=0)


def test_prompts_are_distinguishable():
    pipeline = build_pipeline(0, SHAPES)
    states, pooled = encode_prompts(pipeline, [s.prompt for s in SCENES], NUM_T5_TOKENS)
    assert states.shape == (315, NUM_CLIP_TOKENS + NUM_T5_TOKENS, 64)
    assert not states[:, NUM_CLIP_TOKENS:].any()
    distances = torch.cdist(states.flatten(1), states.flatten(1)) + 100 * torch.eye(315)
    assert distances.min() > 0.05
    assert pooled.shape == (315, 64)


def test_pictures_of_a_scene_are_picked():
    book = PictureBook(SCENES[:2], 0.0, seed=0)
    drawn = book.draw(torch.tensor([0, 1, 0]), torch.Generator().manual_seed(0))
    assert drawn.shape == (3, 3, SIZE, SIZE)
    assert drawn.min() == -1.0
    for picture, scene in zip(drawn, (SCENES[0], SCENES[1], SCENES[0]), strict=True):
        brightest = ((picture + 1) * 127.5).flatten(1).max(dim=1).values
        assert brightest.tolist() == pytest.approx(COLOURS[scene.groups[0].colour], abs=0.01)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    out = tmp_path_factory.mktemp("shapes")
    build_shapes(out, pretraining=[Pretraining(steps=2, batch_size=8)] * 2)
    return out


def test_the_folder_is_loaded_by_plain_diffusers(folder):
    pipeline = StableDiffusion3Pipeline.from_pretrained(folder / "model")
    pipeline.set_progress_bar_config(disable=True)
    images = pipeline(
        ["a red circle", "two blue squares"], height=SIZE, width=SIZE, num_inference_steps=2,
        guidance_scale=1.0, output_type="pt", max_sequence_length=NUM_T5_TOKENS,
        generator=torch.Generator().manual_seed(0),
    ).images  # fmt: skip
    assert images.shape == (2, 3, SIZE, SIZE)
    assert images.isfinite().all()
    assert not torch.equal(images[0], images[1])


@pytest.mark.parametrize("place", ["built", "shipped"])
def test_rows_of_training_and_evaluation_are_disjoint(folder, place):
    where = folder if place == "built" else ASSETS / "shapes"
    rows = [
        [json.loads(line) for line in (where / f"{split}.jsonl").read_text().splitlines()]
        for split in ("train", "eval")
    ]
    assert [len(part) for part in rows] == [43, 11]
    assert not {r["prompt"] for r in rows[0]} & {r["prompt"] for r in rows[1]}
    assert sorted(r["prompt"] for part in rows for r in part) == sorted(
        s.prompt for s in asked_scenes()
    )


def test_the_drawings_are_shipped(folder):
    for where in (folder, ASSETS / "shapes"):
        files = sorted((where / "judge_templates").iterdir())
        assert len(files) == 10
        for file in files:
            colour, _, shape = file.stem.partition("-")
            expected = template(Group(shape, colour) if shape else None)
            assert (np.asarray(Image.open(file)) == expected).all()


@pytest.mark.slow
def test_the_shipped_base_model_draws_some_scenes_right_and_many_wrong():
    asked = asked_scenes() * 3
    pipeline = StableDiffusion3Pipeline.from_pretrained(ASSETS / "shapes/model")
    pipeline.set_progress_bar_config(disable=True)
    images = pipeline(
        [scene.prompt for scene in asked], height=SIZE, width=SIZE, num_inference_steps=10,
        guidance_scale=1.0, output_type="pil", max_sequence_length=NUM_T5_TOKENS,
        generator=torch.Generator().manual_seed(0),
    ).images  # fmt: skip
    _, judge = rewards()
    right = judge(images=images, include=[scene.row["include"] for scene in asked])
    assert 0.25 < np.mean(right) < 0.7
