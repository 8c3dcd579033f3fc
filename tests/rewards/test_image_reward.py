"""ImageReward: the converted weights against BLIP written out plainly, and the contract."""

import math

import pytest
import torch
from contract import Case, check_contract
from PIL import Image
from safetensors.torch import load_file, save_file
from torch.nn import functional as F

from mmgrpo.errors import ConfigError
from mmgrpo.rewards import image_reward_weights as weights
from mmgrpo.rewards.image_reward import ImageReward, prepared
from mmgrpo.scoring.load import load_reward

SEEN, WORDS, LAYERS, PATCH, SIDE, VOCABULARY = 128, 64, 2, 8, 16, 40
"""Two heads of 64 in the picture encoder, one in the text encoder."""


def linear(tensors, name, inputs, outputs, generator):
    tensors[f"{name}.weight"] = torch.randn(outputs, inputs, generator=generator) / inputs**0.5
    tensors[f"{name}.bias"] = 0.1 * torch.randn(outputs, generator=generator)


def norm(tensors, name, width, generator):
    tensors[f"{name}.weight"] = 1 + 0.1 * torch.randn(width, generator=generator)
    tensors[f"{name}.bias"] = 0.1 * torch.randn(width, generator=generator)


def published(seed=0):
    """Random tensors under the names of ``ImageReward.pt``."""
    g, t = torch.Generator().manual_seed(seed), {}
    vision, text = "blip.visual_encoder", "blip.text_encoder"
    t[f"{vision}.cls_token"] = torch.randn(1, 1, SEEN, generator=g)
    t[f"{vision}.pos_embed"] = torch.randn(1, (SIDE // PATCH) ** 2 + 1, SEEN, generator=g)
    t[f"{vision}.patch_embed.proj.weight"] = torch.randn(SEEN, 3, PATCH, PATCH, generator=g) / 14
    t[f"{vision}.patch_embed.proj.bias"] = torch.zeros(SEEN)
    for layer in range(LAYERS):
        block = f"{vision}.blocks.{layer}"
        norm(t, f"{block}.norm1", SEEN, g)
        norm(t, f"{block}.norm2", SEEN, g)
        linear(t, f"{block}.attn.qkv", SEEN, 3 * SEEN, g)
        linear(t, f"{block}.attn.proj", SEEN, SEEN, g)
        linear(t, f"{block}.mlp.fc1", SEEN, 4 * SEEN, g)
        linear(t, f"{block}.mlp.fc2", 4 * SEEN, SEEN, g)
    norm(t, f"{vision}.norm", SEEN, g)
    t[f"{text}.embeddings.word_embeddings.weight"] = torch.randn(VOCABULARY, WORDS, generator=g)
    t[f"{text}.embeddings.position_embeddings.weight"] = torch.randn(48, WORDS, generator=g)
    t[f"{text}.embeddings.position_ids"] = torch.arange(48)[None]
    norm(t, f"{text}.embeddings.LayerNorm", WORDS, g)
    for layer in range(LAYERS):
        block = f"{text}.encoder.layer.{layer}"
        for kind, width in (("attention", WORDS), ("crossattention", SEEN)):
            linear(t, f"{block}.{kind}.self.query", WORDS, WORDS, g)
            linear(t, f"{block}.{kind}.self.key", width, WORDS, g)
            linear(t, f"{block}.{kind}.self.value", width, WORDS, g)
            linear(t, f"{block}.{kind}.output.dense", WORDS, WORDS, g)
            norm(t, f"{block}.{kind}.output.LayerNorm", WORDS, g)
        linear(t, f"{block}.intermediate.dense", WORDS, 4 * WORDS, g)
        linear(t, f"{block}.output.dense", 4 * WORDS, WORDS, g)
        norm(t, f"{block}.output.LayerNorm", WORDS, g)
    linear(t, "blip.vision_proj", SEEN, 8, g)
    linear(t, "blip.text_proj", WORDS, 8, g)
    widths = (WORDS, *weights.HEAD_WIDTHS)
    for number, place in enumerate(weights.HEAD_PLACES):
        linear(t, f"mlp.layers.{place}", widths[number], widths[number + 1], g)
    return t


class Plain:
    """BLIP's two encoders and the head, from the published tensors, one head dimension of 64."""

    def __init__(self, tensors):
        self.t = tensors

    def linear(self, name, x):
        return F.linear(x, self.t[f"{name}.weight"], self.t[f"{name}.bias"])

    def norm(self, name, x, eps):
        weight, bias = self.t[f"{name}.weight"], self.t[f"{name}.bias"]
        centred = x - x.mean(-1, keepdim=True)
        return centred / (centred.pow(2).mean(-1, keepdim=True) + eps).sqrt() * weight + bias

    @staticmethod
    def attend(q, k, v):
        parts = []
        for start in range(0, q.shape[-1], 64):
            head = slice(start, start + 64)
            scores = q[:, head] @ k[:, head].T / math.sqrt(64)
            parts.append(scores.softmax(-1) @ v[:, head])
        return torch.cat(parts, dim=-1)

    def see(self, pixels):
        name = "blip.visual_encoder"
        patches = F.conv2d(
            pixels[None],
            self.t[f"{name}.patch_embed.proj.weight"],
            self.t[f"{name}.patch_embed.proj.bias"],
            stride=PATCH,
        )[0]
        x = torch.cat([self.t[f"{name}.cls_token"][0], patches.flatten(1).T])
        x = x + self.t[f"{name}.pos_embed"][0]
        for layer in range(LAYERS):
            block = f"{name}.blocks.{layer}"
            q, k, v = self.linear(f"{block}.attn.qkv", self.norm(f"{block}.norm1", x, 1e-6)).chunk(
                3, dim=-1
            )
            x = x + self.linear(f"{block}.attn.proj", self.attend(q, k, v))
            inner = F.gelu(self.linear(f"{block}.mlp.fc1", self.norm(f"{block}.norm2", x, 1e-6)))
            x = x + self.linear(f"{block}.mlp.fc2", inner)
        return self.norm(f"{name}.norm", x, 1e-6)

    def __call__(self, pixels, ids):
        """The raw score; ``ids`` without padding."""
        seen, name = self.see(pixels), "blip.text_encoder"
        x = self.t[f"{name}.embeddings.word_embeddings.weight"][ids]
        x = x + self.t[f"{name}.embeddings.position_embeddings.weight"][: len(ids)]
        x = self.norm(f"{name}.embeddings.LayerNorm", x, 1e-12)
        for layer in range(LAYERS):
            block = f"{name}.encoder.layer.{layer}"
            for kind, source in (("attention", None), ("crossattention", seen)):
                own = f"{block}.{kind}"
                other = x if source is None else source
                q = self.linear(f"{own}.self.query", x)
                k, v = (self.linear(f"{own}.self.{n}", other) for n in ("key", "value"))
                y = self.linear(f"{own}.output.dense", self.attend(q, k, v))
                x = self.norm(f"{own}.output.LayerNorm", x + y, 1e-12)
            y = F.gelu(self.linear(f"{block}.intermediate.dense", x))
            x = self.norm(
                f"{block}.output.LayerNorm", x + self.linear(f"{block}.output.dense", y), 1e-12
            )
        x = x[0]
        for place in weights.HEAD_PLACES:
            x = self.linear(f"mlp.layers.{place}", x)
        return x.item()


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """The published file, a tokenizer, and the folder made of them."""
    from transformers import BertTokenizer

    root = tmp_path_factory.mktemp("image_reward")
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "red", "blue", "cat", "dog"]
    vocabulary = {word: number for number, word in enumerate(words)}
    BertTokenizer(vocab=vocabulary).save_pretrained(root / "bert")
    torch.save(published(), root / "ImageReward.pt")
    weights.convert(root / "ImageReward.pt", root / "bert", root / "folder")
    return root


def picture(seed, size=(24, 20)):
    generator = torch.Generator().manual_seed(seed)
    pixels = torch.randint(0, 256, (size[1] // 4, size[0] // 4, 3), generator=generator)
    return Image.fromarray(pixels.to(torch.uint8).numpy()).resize(size, Image.Resampling.BICUBIC)


PICTURES = [picture(seed) for seed in range(4)]
PROMPTS = ["a red cat", "a blue dog", "a cat", "a red blue cat dog"]


def test_scores_are_those_of_blip_written_out(files):
    reward, plain = ImageReward(str(files / "folder"), device="cpu"), Plain(published())
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "red", "blue", "cat", "dog"]
    expected = [
        (plain(prepared(image, SIDE), [words.index(w) for w in ["[CLS]", *text.split(), "[SEP]"]])
         - 0.16717362830052426) / 1.0333394966054072
        for image, text in zip(PICTURES, PROMPTS, strict=True)
    ]  # fmt: skip
    assert max(expected) - min(expected) > 0.01
    assert reward(images=PICTURES, prompts=PROMPTS) == pytest.approx(expected, abs=1e-4)


def test_pictures_are_resized_cut_and_normalised():
    half = Image.new("RGB", (40, 20), "red")
    half.paste("blue", (0, 0, 10, 20))  # outside the middle square
    pixels = prepared(half, SIDE)
    assert pixels.shape == (3, SIDE, SIDE)
    mean, std = (
        torch.tensor([0.48145466, 0.4578275, 0.40821073]),
        torch.tensor([0.26862954, 0.26130258, 0.27577711]),
    )
    red = (torch.tensor([1.0, 0.0, 0.0]) - mean) / std
    torch.testing.assert_close(pixels[:, :, 4:].mean(dim=(1, 2)), red, atol=1e-3, rtol=0)


def test_long_prompts_are_cut_after_35_tokens(files):
    reward = ImageReward(str(files / "folder"), device="cpu")
    texts = ["a " * 33 + "cat", "a " * 33 + "cat dog red", "a " * 32 + "cat"]
    cut, longer, other = reward(images=[PICTURES[0]] * 3, prompts=texts)
    assert cut == pytest.approx(longer, abs=1e-6)
    assert abs(cut - other) > 1e-4


def test_bfloat16_is_near_float32_and_the_head_stays_float32(files):
    exact = ImageReward(str(files / "folder"), device="cpu")
    coarse = ImageReward(str(files / "folder"), dtype="bfloat16", device="cpu")
    wanted = exact(images=PICTURES, prompts=PROMPTS)
    scores = coarse(images=PICTURES, prompts=PROMPTS)
    assert scores != wanted
    assert scores == pytest.approx(wanted, abs=0.1 * (max(wanted) - min(wanted)) + 0.02)
    network = coarse._loaded[0]
    assert {p.dtype for p in network.head.parameters()} == {torch.float32}
    assert {p.dtype for p in network.text.parameters()} == {torch.bfloat16}


def test_contract(files):
    reward = ImageReward(str(files / "folder"), device="cpu", batch_size=3)
    scores = reward(images=PICTURES, prompts=PROMPTS)
    better, worse = scores.index(max(scores)), scores.index(min(scores))
    check_contract(Case(reward, PICTURES, {"prompts": PROMPTS}, better=better, worse=worse))


def test_swapped_arguments_are_caught(files):
    reward = ImageReward(str(files / "folder"), device="cpu")
    with pytest.raises((TypeError, AttributeError)):
        reward(PROMPTS, PICTURES)
    with pytest.raises(ValueError, match=r"shorter|longer"):
        reward(images=PICTURES, prompts=PROMPTS[:2])


@pytest.mark.parametrize(
    ("missing", "message"),
    [
        ("config.json", r"has no config\.json\.$"),
        ("model.safetensors", r"has no model\.safetensors\.$"),
        ("tokenizer.json", r"has no tokenizer\.json or vocab\.txt\.$"),
    ],
)
def test_a_missing_file_is_one_sentence_at_the_start(files, tmp_path, missing, message):
    for file in (files / "folder").iterdir():
        if file.name != missing:
            tmp_path.joinpath(file.name).write_bytes(file.read_bytes())
    with pytest.raises(ConfigError, match=message):
        load_reward({"name": "image_reward", "options": {"path": str(tmp_path)}})


def test_other_weights_and_files_are_refused(files, tmp_path):
    for file in (files / "folder").iterdir():
        tmp_path.joinpath(file.name).write_bytes(file.read_bytes())
    tensors = load_file(tmp_path / "model.safetensors")
    save_file(
        {n: t for n, t in tensors.items() if n != "head.7.bias"}, tmp_path / "model.safetensors"
    )
    with pytest.raises(ConfigError, match=r"does not fit its config\.json.*head\.7\.bias"):
        ImageReward(str(tmp_path))(images=PICTURES, prompts=PROMPTS)
    cases = [
        ({"extra.weight": torch.zeros(1)}, "'extra.weight' is no tensor of ImageReward"),
        ({"mlp.layers.9.weight": torch.zeros(1)}, "has, beside those .* 'head.9.weight'"),
    ]
    for more, message in cases:
        torch.save(published() | more, tmp_path / "other.pt")
        with pytest.raises(ConfigError, match=message):
            weights.convert(tmp_path / "other.pt", files / "bert", tmp_path / "out")
    less = {n: t for n, t in published().items() if n != "mlp.layers.7.bias"}
    torch.save(less, tmp_path / "other.pt")
    with pytest.raises(ConfigError, match=r"lacks the tensor 'head\.7\.bias'"):
        weights.convert(tmp_path / "other.pt", files / "bert", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_pickle_is_refused(files, tmp_path):
    torch.save({"weights": torch.nn.Linear(1, 1)}, tmp_path / "evil.pt")
    with pytest.raises(Exception, match=r"Weights only|weights_only"):
        weights.convert(tmp_path / "evil.pt", files / "bert", tmp_path / "out")


def test_a_bad_dtype():
    with pytest.raises(ConfigError, match="unknown dtype 'bfloat'; did you mean 'bfloat16'"):
        ImageReward("x", dtype="bfloat")
