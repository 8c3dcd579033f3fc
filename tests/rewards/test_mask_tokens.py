"""The mask reward: the paper's numbers, the four format conditions, and the files it reads."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from contract import Case, check_contract
from PIL import Image
from safetensors.torch import save_file

from mmgrpo.core.mask_codec import MaskCodec, MaskCodecConfig
from mmgrpo.errors import ConfigError, ModelError
from mmgrpo.rewards.mask_files import load_codec, read_mask
from mmgrpo.rewards.mask_tokens import Answer, MaskTokens, iou, mask_reward, read_answer

CONFIG = MaskCodecConfig(canvas=(4, 6), num_codes=8, num_slots=32, latent=3, hidden=4, stride=1)
FORM = (True, True, True, True)
LEFT = np.arange(24).reshape(4, 6) % 6 < 3
TRUTH = {"size": [4, 6], "counts": [0, 12, 12]}
"""The left half: down the columns, the first twelve pixels."""


def write_codec(folder, codec):
    folder.mkdir(parents=True, exist_ok=True)
    fields = {**codec.config.__dict__}
    (folder / "config.json").write_text(json.dumps(fields))
    save_file(codec.state_dict(), folder / "model.safetensors")
    return str(folder)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A codec whose code 0 is the left half, 1 the upper half, 2 everything; others add nothing."""
    codec = MaskCodec(CONFIG)
    for parameter in codec.parameters():
        parameter.data.zero_()
    shapes = [LEFT, np.arange(24).reshape(4, 6) < 12, np.ones((4, 6), dtype=bool)]
    plane = torch.tensor(np.stack(shapes)).float().flatten(1) * 2 - 1
    codec.decoder[0].weight.data[:3] = torch.eye(3) * 10
    codec.decoder[2].weight.data[:, :3] = plane.T
    codec.codebooks[0, :3] = torch.eye(3)
    return write_codec(tmp_path_factory.mktemp("masks") / "codec", codec.requires_grad_(False))


def written(*codes):
    return CONFIG.text(codes)


def test_the_published_example():
    values = [
        mask_reward(Answer(FORM, n, []), overlap, length_weight=1e-3, limit=32)
        for n, overlap in ((12, 0.80), (20, 0.86))
    ]
    assert values == pytest.approx([1.2200, 1.2720], abs=1e-12)


@pytest.mark.parametrize(
    ("text", "form", "count"),
    [
        ("<mask><m1><m2></mask>", (1, 1, 1, 1), 2),
        ("sure: <mask><m1></mask>!", (1, 1, 1, 1), 1),
        ("<mask><mask><m1></mask>", (0, 1, 1, 0), 7),
        ("<mask><m1></mask></mask>", (1, 0, 1, 1), 1),
        ("<mask>" + "<m1>" * 32 + "</mask>", (1, 1, 1, 1), 32),
        ("<mask>" + "<m1>" * 33 + "</mask>", (1, 1, 0, 1), 33),
        ("<mask><m1>a<m2></mask>", (1, 1, 1, 0), 3),
        ("<mask><m1> <m2></mask>", (1, 1, 1, 0), 3),
        ("<mask><m8></mask>", (1, 1, 1, 0), 1),
        ("<mask></mask>", (1, 1, 0, 0), 0),
        ("<mask><m1>", (1, 0, 0, 0), 0),
        ("<m1></mask>", (0, 1, 0, 0), 0),
        ("</mask><m1><mask>", (1, 1, 0, 0), 0),
        ("", (0, 0, 0, 0), 0),
    ],
)
def test_the_four_format_conditions(folder, text, form, count):
    answer = read_answer(text, CONFIG)
    assert answer.form == tuple(map(bool, form))
    assert answer.num_tokens == count
    valid = all(form)
    (score,) = MaskTokens(folder)([text], mask=[TRUTH])
    if not valid:
        assert score == pytest.approx(0.1 * sum(form))
        assert MaskTokens(folder, measure="iou")([text], mask=[TRUTH]) == [0.0]
    else:
        assert score > 0.4


def test_decoded_masks_are_compared_with_the_truth(folder):
    """Left, upper and whole against left: 12/12, 6/18 and 12/24 pixels."""
    texts = [written(0), written(1), written(2), written(0, 7, 7)]
    overlaps = [1.0, 1 / 3, 1 / 2, 1.0]
    truth = [TRUTH] * 4
    assert MaskTokens(folder, measure="iou")(texts, mask=truth) == pytest.approx(overlaps)
    assert MaskTokens(folder, measure="success")(texts, mask=truth) == [1.0, 0.0, 1.0, 1.0]
    assert MaskTokens(folder, measure="tokens")(texts, mask=truth) == [1.0, 1.0, 1.0, 3.0]
    lengths = [31, 31, 31, 29]
    expected = [0.4 + 0.01 * n + x for n, x in zip(lengths, overlaps, strict=True)]
    found = MaskTokens(folder, length_weight=0.01)(texts, mask=truth)
    assert found == pytest.approx(expected)


def test_the_reward_keeps_its_contract(folder):
    texts = [written(0), written(1), written(2, 3), "<mask>no", written(0, 5)]
    columns = {"mask": [TRUTH, TRUTH, TRUTH, TRUTH, None]}
    case = Case(MaskTokens(folder), texts, columns, low=0.0, high=1.431, made="completions")
    check_contract(case)


def test_iou_by_counting():
    rng = np.random.default_rng(0)
    for _ in range(20):
        one, two = rng.random((2, 5, 7)) > 0.6
        pixels = [{(r, c) for r in range(5) for c in range(7) if m[r, c]} for m in (one, two)]
        assert iou(one, two) == len(pixels[0] & pixels[1]) / len(pixels[0] | pixels[1])
    assert iou(np.zeros((2, 2), bool), np.zeros((2, 2), bool)) == 1.0


def test_run_lengths_and_pictures_give_the_same_mask(tmp_path, folder):
    Image.fromarray(LEFT.astype(np.uint8) * 255).save(tmp_path / "left.png")
    assert np.array_equal(read_mask(TRUTH, tmp_path), LEFT)
    assert np.array_equal(read_mask("left.png", tmp_path), LEFT)
    reward = MaskTokens(folder, measure="iou", root=str(tmp_path))
    assert reward([written(0)], mask=["left.png"]) == [1.0]
    row_of_three = read_mask({"size": [2, 3], "counts": [1, 2, 3]}, tmp_path)
    assert row_of_three.tolist() == [[False, True, False], [True, False, False]]


def test_a_larger_truth_is_compared_at_its_own_size(folder):
    truth = {"size": [16, 24], "counts": [0, 192, 192]}
    assert MaskTokens(folder, measure="iou")([written(0)], mask=[truth]) == [1.0]


@pytest.mark.parametrize(
    "truth",
    [
        5,
        {"size": [2, 2]},
        {"size": [2, 2], "counts": [1, 2]},
        {"size": [1, 1], "counts": [2, -1]},
    ],
)
def test_an_unreadable_truth_raises_even_for_an_invalid_answer(folder, truth):
    with pytest.raises(ValueError, match="mask"):
        MaskTokens(folder)(["nothing"], mask=[truth])
    with pytest.raises(OSError, match=r"no\.png"):
        MaskTokens(folder)(["nothing"], mask=["no.png"])


def test_a_missing_or_unfit_codec_is_one_sentence(tmp_path, folder):
    with pytest.raises(ConfigError, match=r"not a mask codec folder \(no config\.json\)\.$"):
        MaskTokens(str(tmp_path / "nowhere"))
    (tmp_path / "half").mkdir()
    fields = Path(folder, "config.json").read_text()
    (tmp_path / "half/config.json").write_text(fields)
    with pytest.raises(ConfigError, match=r"no model\.safetensors"):
        MaskTokens(str(tmp_path / "half"))
    other = MaskCodec(MaskCodecConfig(canvas=(4, 6), latent=2)).requires_grad_(False)
    save_file(other.state_dict(), tmp_path / "half/model.safetensors")
    with pytest.raises(ModelError, match="cannot be read") as caught:
        load_codec(tmp_path / "half")
    assert "\n" not in str(caught.value)
    with pytest.raises(ConfigError, match="did you mean 'iou'"):
        MaskTokens(folder, measure="io")
