"""Rewards with a CLIP of transformers, against the same model called by hand."""

import importlib.util
import itertools
import shutil

import pytest
import torch
from contract import Case, check_contract
from safetensors.torch import save_file
from tiny_clip import TOWN, build, model_features, picture

from mmgrpo.errors import ConfigError, MissingExtraError
from mmgrpo.rewards.image_aesthetic import ImageAesthetic
from mmgrpo.rewards.image_clip import ImageClip
from mmgrpo.rewards.image_pickscore import ImagePickscore

PICTURES = [picture(colour, seed=100) for colour in ("red", "blue", "green", "red", "gray")]
PROMPTS = [f"a picture of {colour}" for colour in ("red", "red", "green", "blue", "red")]


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    folder = tmp_path_factory.mktemp("clip")
    model, processor, tokenizer = build(folder)
    return str(folder), model, processor, tokenizer


@pytest.fixture(scope="module")
def features(clip):
    """Unit embeddings, every picture and text passed through the network alone."""
    _, model, processor, tokenizer = clip
    both = []
    with torch.no_grad():
        for image, prompt in zip(PICTURES, PROMPTS, strict=True):
            pixels = processor(images=image, return_tensors="pt")["pixel_values"]
            text = tokenizer(prompt, return_tensors="pt")
            both.append(torch.cat(model_features(model, pixels, text)))
    return torch.stack(both)


def test_clip_is_the_cosine(clip, features):
    expected = (features[:, 0] * features[:, 1]).sum(dim=1).tolist()
    for batch_size in (64, 2):
        score = ImageClip(clip[0], batch_size=batch_size)(images=PICTURES, prompts=PROMPTS)
        assert score == pytest.approx(expected, abs=1e-5)
    chats = [[{"role": "user", "content": prompt}] for prompt in PROMPTS]
    assert ImageClip(clip[0])(images=PICTURES, prompts=chats) == pytest.approx(expected, abs=1e-5)


def test_pickscore_is_the_scaled_cosine_over_26(clip, features):
    scale = clip[1].logit_scale.exp().item()
    expected = [scale * (a @ b).item() / 26 for a, b in features]
    score = ImagePickscore(clip[0])(images=PICTURES, prompts=PROMPTS)
    assert score == pytest.approx(expected, abs=1e-5)


def test_the_model_finds_the_colour_it_was_trained_on(clip):
    score = ImageClip(clip[0])
    for colour in TOWN:
        prompts = [f"a picture of {colour}"] * len(TOWN)
        scores = score(images=[picture(other, 100) for other in TOWN], prompts=prompts)
        assert list(TOWN)[scores.index(max(scores))] == colour


def test_a_prompt_longer_than_the_context_is_cut(clip):
    long = " ".join(["a picture of red"] * 30)
    assert len(ImageClip(clip[0])(images=PICTURES[:1], prompts=[long])) == 1


def head(tmp_path, dims, prefix=True, suffix=".safetensors"):
    generator = torch.Generator().manual_seed(3)
    tensors = {}
    for number, (inner, outer) in enumerate(itertools.pairwise(dims)):
        name = f"layers.{2 * number}." if prefix else ""
        tensors[f"{name}weight"] = torch.randn(outer, inner, generator=generator)
        tensors[f"{name}bias"] = torch.randn(outer, generator=generator)
    path = tmp_path / f"head{suffix}"
    (save_file if suffix == ".safetensors" else torch.save)(tensors, path)
    return str(path), tensors


@pytest.mark.parametrize("suffix", [".safetensors", ".pth"])
def test_aesthetic_is_the_head_on_the_unit_embedding(clip, features, tmp_path, suffix):
    path, tensors = head(tmp_path, (12, 8, 1), suffix=suffix)
    network = torch.nn.Sequential(
        torch.nn.Linear(12, 8), torch.nn.Dropout(0.2), torch.nn.Linear(8, 1)
    )
    network.load_state_dict({name.removeprefix("layers."): t for name, t in tensors.items()})
    with torch.no_grad():
        expected = network.eval()(features[:, 0])[:, 0].tolist()
    assert ImageAesthetic(path, clip[0])(images=PICTURES) == pytest.approx(expected, abs=1e-4)


def test_the_first_aesthetic_head_is_one_layer(clip, features, tmp_path):
    path, tensors = head(tmp_path, (12, 1), prefix=False)
    expected = (features[:, 0] @ tensors["weight"][0] + tensors["bias"]).tolist()
    assert ImageAesthetic(path, clip[0])(images=PICTURES) == pytest.approx(expected, abs=1e-4)


def test_layers_come_in_the_order_of_their_numbers(clip, tmp_path):
    dims = (12, 9, 8, 7, 6, 5, 1)
    path, _ = head(tmp_path, dims)
    assert [weight.shape[1] for weight, _ in ImageAesthetic(path, clip[0]).head] == list(dims[:-1])


@pytest.mark.parametrize(
    ("dims", "message"), [((12, 8), "do not give one number"), ((9, 1), "takes 9 .* has 12")]
)
def test_a_head_that_does_not_fit(clip, tmp_path, dims, message):
    path, _ = head(tmp_path, dims)
    with pytest.raises(ConfigError, match=message):
        ImageAesthetic(path, clip[0])(images=PICTURES)


def test_other_weights_are_no_head(clip, tmp_path):
    save_file({"mlp.weight": torch.zeros(1, 12)}, tmp_path / "x.safetensors")
    with pytest.raises(ConfigError, match=r"'mlp\.weight', expected"):
        ImageAesthetic(str(tmp_path / "x.safetensors"), clip[0])


@pytest.mark.parametrize(
    ("missing", "message"),
    [
        ("config.json", r"has no config\.json"),
        ("model.safetensors", r"has no model\.safetensors or model\.safetensors\.index\.json"),
        ("preprocessor_config.json", r"has no preprocessor_config\.json or processor_config\.json"),
        ("tokenizer.json", r"has no tokenizer\.json or vocab\.json"),
    ],
)
@pytest.mark.parametrize("reward", [ImageClip, ImagePickscore])
def test_a_missing_file_is_one_sentence_at_the_start(clip, tmp_path, missing, message, reward):
    folder = shutil.copytree(clip[0], tmp_path / "copy")
    (folder / missing).unlink()
    (folder / "vocab.json").unlink(missing_ok=True)
    with pytest.raises(ConfigError, match=rf"image_\w+: '.*copy' {message}\.$"):
        reward(str(folder))


def test_missing_paths(clip, tmp_path):
    with pytest.raises(ConfigError, match=r"no\.safetensors' does not exist; expected .* head"):
        ImageAesthetic("no.safetensors", clip[0])
    with pytest.raises(ConfigError, match=r"expected a file with the weights of .* ViT-B-32"):
        ImageClip("no.safetensors", "ViT-B-32")
    path, _ = head(tmp_path, (12, 1))
    with pytest.raises(ConfigError, match="is a file: give its 'architecture'"):
        ImageClip(path)


def test_an_absent_open_clip_names_the_extra(monkeypatch, tmp_path):
    path, _ = head(tmp_path, (12, 1))
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(MissingExtraError, match=r"open_clip_torch.*mmgrpo\[clip\]"):
        ImageClip(path, "ViT-B-32")


@pytest.mark.parametrize("reward", [ImageClip, ImagePickscore])
def test_contract(clip, reward):
    columns = {"prompts": PROMPTS}
    check_contract(Case(reward(clip[0], batch_size=3), PICTURES, columns, low=-4.0, high=4.0))


def test_aesthetic_contract(clip, features, tmp_path):
    path, _ = head(tmp_path, (12, 8, 1))
    reward = ImageAesthetic(path, clip[0])
    scores = reward(images=PICTURES)
    better, worse = scores.index(max(scores)), scores.index(min(scores))
    check_contract(Case(reward, PICTURES, better=better, worse=worse))
