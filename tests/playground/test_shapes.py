"""The shapes task: scenes in words and pictures, the codec, the pipeline folder, its verifiers."""

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
from mmgrpo.playground.shapes_codec import LATENTS, encode, train_codec
from mmgrpo.playground.shapes_drawing import (
    COUNTS,
    RELATIONS,
    SIZE,
    Group,
    Scene,
    all_groups,
    compose,
    draw_cell,
    equal_scenes,
    pair_scenes,
    render,
    spoiled,
)
from mmgrpo.scoring.load import load_reward

SCENES = equal_scenes() + pair_scenes()
ASSETS = Path(mmgrpo.playground.__file__).parent / "assets"


def rewards():
    """The reward and the judge of the quickstart, which demand every condition here."""
    config = load_config("quickstart/shapes")
    specs = [config.rewards[0], config.eval.judge]
    options = [{**spec.options, "reduce": "all"} for spec in specs]
    return [
        load_reward({"name": spec.name, "options": given}).fn
        for spec, given in zip(specs, options, strict=True)
    ]


@pytest.fixture(scope="module")
def shipped():
    pipeline = StableDiffusion3Pipeline.from_pretrained(ASSETS / "shapes/model")
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def sample(pipeline, scenes, steps=10):
    return pipeline(
        [scene.prompt for scene in scenes], height=SIZE, width=SIZE, num_inference_steps=steps,
        guidance_scale=1.0, output_type="pil", max_sequence_length=NUM_T5_TOKENS,
        generator=torch.Generator().manual_seed(0),
    ).images  # fmt: skip


@torch.no_grad()
def decode(pipeline, latents):
    return pipeline.image_processor.postprocess(pipeline.vae.decode(latents).sample)


def test_prompts_and_their_conditions():
    assert len(SCENES) == len({scene.prompt for scene in SCENES}) == 315
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


def test_held_out_prompts_are_of_every_sort():
    asked = asked_scenes()
    kept = [scene for number, scene in enumerate(asked) if is_held_out(number)]
    assert len({scene.prompt for scene in asked}) == len(asked)
    groups = {group for scene in kept for group in scene.groups}
    assert {group.shape for group in groups} == {"circle", "square", "triangle"}
    assert {group.colour for group in groups} == {"red", "green", "blue"}
    assert {group.count for group in groups} == {*COUNTS}
    assert {scene.relation for scene in kept} == {None, *RELATIONS}


def test_what_is_drawn_meets_its_conditions_and_no_others():
    some = SCENES[::3]
    pictures = [Image.fromarray(render(scene)) for scene in some]
    assert {picture.size for picture in pictures} == {(SIZE, SIZE)}
    include = [scene.row["include"] for scene in some]
    for verifier in rewards():
        assert verifier(images=pictures, include=include) == [1.0] * len(some)
        assert sum(verifier(images=pictures, include=include[1:] + include[:1])) == 0


def test_reward_and_judge_are_different_verifiers():
    """A smear in a free quarter is no shape to the one, and unknown to the other."""
    drawn = [Group("circle", "red"), Group("square", "blue"), None, None]
    pixels = compose(drawn).copy()
    pixels[20:28, 20:28] = (120, 120, 60)
    scene = Scene((drawn[0], drawn[1]), "left of")
    asked = {"images": [Image.fromarray(pixels)], "include": [scene.row["include"]]}
    templates, finder = rewards()
    assert finder(**asked) == [1.0]
    assert templates(**asked) == [0.0]


def test_shapes_stand_where_the_prompt_says():
    def filled(scene):
        cells = render(scene).reshape(2, SIZE // 2, 2, SIZE // 2, 3).max(axis=(1, 3, 4)) > 0
        return cells.astype(int).tolist()

    three = Scene((Group("circle", "red", 3),))
    assert filled(three) == [[1, 1], [1, 0]]
    pair = (Group("square", "red"), Group("square", "blue"))
    red, blue = (draw_cell(group) for group in pair)
    beside, above = [[1, 1], [0, 0]], [[1, 0], [1, 0]]
    for relation, cells, first in (
        ("left of", beside, red), ("right of", beside, blue),
        ("above", above, red), ("below", above, blue),
    ):  # fmt: skip
        scene = Scene(pair, relation)
        assert filled(scene) == cells
        assert (render(scene)[: SIZE // 2, : SIZE // 2] == first).all()


def test_drawings_do_not_touch_their_edges_and_differ():
    drawn = [draw_cell(group).astype(int) for group in (None, *all_groups())]
    for cell in drawn:
        assert np.concatenate([cell[0], cell[-1], cell[:, 0], cell[:, -1]]).max() == 0
    for number, cell in enumerate(drawn):
        for other in drawn[:number]:
            assert np.sqrt(((cell - other) ** 2).mean()) > 15  # of 255


def test_nothing_is_spoiled_at_rate_zero_and_much_at_rate_one():
    rng = np.random.default_rng(0)
    assert all(spoiled(scene, 0.0, rng) == scene for scene in SCENES)
    scene = Scene((Group("circle", "red", 2),))
    made = [spoiled(scene, 1.0, rng).groups[0] for _ in range(900)]
    for counts in (
        Counter(g.shape for g in made), Counter(g.colour for g in made),
        Counter(g.count for g in made),
    ):  # fmt: skip
        assert all(count == pytest.approx(300, abs=60) for count in counts.values())
    pair = Scene((Group("circle", "red"), Group("square", "blue")), "above")
    turned = Counter(spoiled(pair, 1.0, rng).relation for _ in range(800))
    assert all(turned[relation] == pytest.approx(200, abs=50) for relation in RELATIONS)


def test_each_word_is_one_token_and_every_prompt_fits(tmp_path):
    tokenizer = build_clip_tokenizer()
    tokenizer.save_pretrained(tmp_path)
    loaded = type(tokenizer).from_pretrained(tmp_path)
    ids = [loaded(scene.prompt)["input_ids"] for scene in SCENES]
    assert [len(row) for row in ids] == [len(s.prompt.split()) + 2 for s in SCENES]
    assert max(map(len, ids)) <= NUM_CLIP_TOKENS - 2
    assert len({tuple(row) for row in ids}) == len(SCENES)
    assert {word for scene in SCENES for word in scene.prompt.split()} == {*WORDS}


def test_prompts_are_distinguishable():
    pipeline = build_pipeline(0, SHAPES)
    states, pooled = encode_prompts(pipeline, [s.prompt for s in SCENES], NUM_T5_TOKENS)
    assert states.shape == (315, NUM_CLIP_TOKENS + NUM_T5_TOKENS, 64)
    assert not states[:, NUM_CLIP_TOKENS:].any()
    distances = torch.cdist(states.flatten(1), states.flatten(1)) + 100 * torch.eye(315)
    assert distances.min() > 0.05
    assert pooled.shape == (315, 64)


def test_the_codec_learns_and_standardises():
    short, longer = (train_codec(seed=0, steps=steps) for steps in (2, 40))
    pictures = np.stack([render(scene) for scene in SCENES[::5]])

    def error(codec):
        decoded = codec.decode(encode(codec, pictures)).sample.permute(0, 2, 3, 1)
        return (decoded - (torch.from_numpy(pictures) / 127.5 - 1)).square().mean().item()

    assert error(longer) < 0.5 * error(short)
    latents = encode(longer, pictures)
    assert latents.shape == (len(pictures), *LATENTS)
    scaled = (latents - longer.config.shift_factor) * longer.config.scaling_factor
    assert scaled.mean().item() == pytest.approx(0.0, abs=0.3)
    assert scaled.std().item() == pytest.approx(1.0, abs=0.3)


def test_pictures_of_a_scene_are_picked(shipped):
    asked = [Scene((Group("circle", "red", 2),)), Scene((Group("square", "blue", 3),))]
    book = PictureBook(shipped.vae, asked, 0.0, seed=0)
    rows = torch.tensor([0, 1, 0, 1])
    latents = book.draw(rows, torch.Generator().manual_seed(0))
    assert latents.shape == (4, *LATENTS)
    decoded = decode(shipped, latents)
    include = [asked[row].row["include"] for row in rows]
    for verifier in rewards():
        assert verifier(images=decoded, include=include) == [1.0] * 4


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    out = tmp_path_factory.mktemp("shapes")
    build_shapes(out, pretraining=Pretraining(steps=2, batch_size=8), codec_steps=2)
    return out


def test_the_folder_is_loaded_by_plain_diffusers(folder):
    pipeline = StableDiffusion3Pipeline.from_pretrained(folder / "model")
    pipeline.set_progress_bar_config(disable=True)
    images = sample(pipeline, [SCENES[0], SCENES[-1]], steps=2)
    assert [image.size for image in images] == [(SIZE, SIZE)] * 2
    assert images[0].tobytes() != images[1].tobytes()


@pytest.mark.parametrize("place", ["built", "shipped"])
def test_rows_of_training_and_evaluation_are_disjoint(folder, place):
    where = folder if place == "built" else ASSETS / "shapes"
    train, held_out = (
        [json.loads(line) for line in (where / f"{split}.jsonl").read_text().splitlines()]
        for split in ("train", "eval")
    )
    assert not {r["prompt"] for r in train} & {r["prompt"] for r in held_out}
    assert sorted(r["prompt"] for r in train + held_out) == sorted(
        scene.prompt for scene in asked_scenes()
    )
    assert len(held_out) == sum(is_held_out(number) for number in range(len(asked_scenes())))


def test_the_drawings_are_shipped(folder):
    for where in (folder, ASSETS / "shapes"):
        files = sorted((where / "templates").iterdir())
        assert len(files) == 10
        for file in files:
            colour, _, shape = file.stem.partition("-")
            expected = draw_cell(Group(shape, colour) if shape else None)
            assert (np.asarray(Image.open(file)) == expected).all()


def test_the_codec_keeps_what_both_verifiers_see(shipped):
    some = SCENES[1::3]
    latents = encode(shipped.vae, np.stack([render(scene) for scene in some]))
    decoded = decode(shipped, latents)
    include = [scene.row["include"] for scene in some]
    for verifier in rewards():
        assert np.mean(verifier(images=decoded, include=include)) >= 0.95


def test_the_base_model_is_often_right_and_often_wrong_to_both_verifiers(shipped):
    asked = asked_scenes() * 3
    images = sample(shipped, asked)
    include = [scene.row["include"] for scene in asked]
    found, compared = (np.array(verify(images=images, include=include)) for verify in rewards())
    assert 0.25 < found.mean() < 0.7
    assert 0.25 < compared.mean() < 0.7
    assert (found == compared).mean() > 0.9
