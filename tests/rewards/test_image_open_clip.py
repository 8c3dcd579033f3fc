"""Rewards with open_clip, against its model called by hand; and its torchvision, where unfit."""

import importlib.util
import json
import subprocess
import sys

import pytest
import torch
from contract import Case, check_contract
from PIL import Image
from safetensors.torch import save_file
from tiny_clip import model_features, picture, train

from mmgrpo.errors import ConfigError
from mmgrpo.rewards.image_clip import ImageClip
from mmgrpo.rewards.image_hps import ImageHps
from mmgrpo.rewards.torchvision_shim import ensure_torchvision

needs_open_clip = pytest.mark.skipif(
    importlib.util.find_spec("open_clip") is None, reason="open_clip_torch is not installed"
)
TOWER = {"layers": 1, "width": 16}
DESCRIPTION = {
    "embed_dim": 12,
    "vision_cfg": {**TOWER, "image_size": 16, "patch_size": 8, "head_width": 8},
    "text_cfg": {**TOWER, "context_length": 77, "vocab_size": 49408, "heads": 2},
}
PICTURES = [picture(colour, seed=100) for colour in ("red", "blue", "green", "red")]
PROMPTS = [f"a picture of {colour}" for colour in ("red", "red", "green", "blue")]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """Paths of weights (safetensors and a checkpoint as HPS has it) and of their description."""
    ensure_torchvision()
    import open_clip

    folder = tmp_path_factory.mktemp("open_clip")
    description = folder / "tiny-clip.json"
    description.write_text(json.dumps(DESCRIPTION))
    open_clip.add_model_config(description)
    torch.manual_seed(0)
    model, _, prepare = open_clip.create_model_and_transforms("tiny-clip")
    tokenize = open_clip.get_tokenizer("tiny-clip")
    train(model, lambda images: torch.stack([prepare(image) for image in images]), tokenize)
    save_file(model.state_dict(), folder / "weights.safetensors")
    torch.save({"epoch": 1, "state_dict": model.state_dict()}, folder / "weights.pt")
    return folder, model, prepare, tokenize


@needs_open_clip
@pytest.mark.parametrize("file", ["weights.safetensors", "weights.pt"])
@pytest.mark.parametrize("reward", [ImageClip, ImageHps])
def test_the_score_is_the_cosine(tiny, file, reward):
    folder, model, prepare, tokenize = tiny
    expected = []
    with torch.no_grad():
        for image, prompt in zip(PICTURES, PROMPTS, strict=True):
            pair = model_features(model, prepare(image)[None], tokenize([prompt]))
            expected.append((pair[0] @ pair[1].T).item())
    score = reward(str(folder / file), str(folder / "tiny-clip.json"), batch_size=3)
    assert score(images=PICTURES, prompts=PROMPTS) == pytest.approx(expected, abs=1e-5)


@needs_open_clip
def test_hps_pads_where_clip_crops(tiny):
    """What differs beside the middle square is seen by the one and not by the other."""
    folder, *_ = tiny
    wide = [Image.new("RGB", (48, 16), colour) for colour in ("blue", "red")]
    for image in wide:
        image.paste((40, 160, 60), (16, 0, 32, 16))
    paths = str(folder / "weights.safetensors"), str(folder / "tiny-clip.json")
    prompts = ["a picture of red"] * 2
    blue, red = ImageClip(*paths)(images=wide, prompts=prompts)
    assert blue == pytest.approx(red, abs=1e-6)
    blue, red = ImageHps(*paths)(images=wide, prompts=prompts)
    assert abs(blue - red) > 1e-3


@needs_open_clip
@pytest.mark.parametrize("reward", [ImageClip, ImageHps])
def test_contract(tiny, reward):
    folder, *_ = tiny
    score = reward(str(folder / "weights.safetensors"), str(folder / "tiny-clip.json"))
    check_contract(Case(score, PICTURES, {"prompts": PROMPTS}, low=-1.0, high=1.0))


@needs_open_clip
def test_unknown_architectures(tiny, tmp_path):
    weights = str(tiny[0] / "weights.safetensors")
    with pytest.raises(ConfigError, match="'ViTH-14'; did you mean 'ViT-H-14'"):
        ImageHps(weights, "ViTH-14")
    (tmp_path / "other.json").write_text("{}")
    for path in ("no.json", str(tmp_path / "other.json")):
        with pytest.raises(ConfigError, match="JSON file with embed_dim, vision_cfg and text_cfg"):
            ImageClip(weights, path)


def test_a_missing_weight_file_says_which_is_expected():
    with pytest.raises(ConfigError, match=r"image_hps: 'HPS\.pt' does not exist; .* ViT-H-14"):
        ImageHps("HPS.pt")


UNFIT = """
import torch

@torch.library.register_fake("torchvision::nms")
def nms(dets, scores, iou_threshold): ...

@torch.library.register_fake("torchvision::qnms")
def qnms(dets, scores, iou_threshold): ...
"""


@pytest.mark.parametrize(
    ("source", "code", "expected"),
    [
        (UNFIT, "import torchvision", "torchvision::nms does not exist"),
        (UNFIT, "ensure_torchvision(); import torchvision; torchvision.qnms", ""),
        ("fits = 1", "ensure_torchvision(); import torchvision; torchvision.fits", ""),
        ("raise RuntimeError('other')", "ensure_torchvision()", "RuntimeError: other"),
    ],
)
def test_a_torchvision_without_its_operators_is_imported(tmp_path, source, code, expected):
    """As it is on PyPI beside a torch for the CPU: it describes operators that are not there."""
    (tmp_path / "torchvision.py").write_text(source)
    start = "from mmgrpo.rewards.torchvision_shim import ensure_torchvision"
    path = f"import sys; sys.path.insert(0, {str(tmp_path)!r})"
    done = subprocess.run(
        [sys.executable, "-c", f"{path}\n{start}\n{code}"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode == 0) == (expected == "")
    assert expected in done.stderr
