"""GenEval with a stand-in detector that knows plain shapes, and with real tiny detectors."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from contract import Case, check_contract
from PIL import Image, ImageDraw
from tiny_clip import build, picture

from mmgrpo.errors import ConfigError
from mmgrpo.rewards import object_detection
from mmgrpo.rewards.image_geneval import BLANK, ImageGeneval, cut_out
from mmgrpo.rewards.object_detection import Detection, Detector, box_around, iou, without_overlap
from mmgrpo.rewards.shape_finding import COLOURS, dominant_colour
from mmgrpo.scoring.load import load_reward

CLASSES = {0: "disc", 1: "box"}


@pytest.fixture(scope="module")
def yolos(tmp_path_factory):
    """A random YOLOS folder: a real detector, without the knowledge."""
    from transformers import YolosConfig, YolosForObjectDetection
    from transformers.models.yolos.image_processing_pil_yolos import YolosImageProcessorPil

    folder = tmp_path_factory.mktemp("yolos")
    torch.manual_seed(0)
    config = YolosConfig(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16,
        image_size=[32, 32], patch_size=8, num_detection_tokens=6, id2label=CLASSES,
        label2id={name: index for index, name in CLASSES.items()},
    )  # fmt: skip
    model = YolosForObjectDetection(config)
    torch.nn.init.normal_(model.vit.embeddings.detection_tokens)  # zeros: all boxes alike
    model.save_pretrained(folder)
    processor = YolosImageProcessorPil(size={"height": 32, "width": 32}, do_pad=False)
    processor.save_pretrained(folder)
    return str(folder)


def scene(*things, size=(120, 80)):
    """A picture of (class, colour, left, top, side)."""
    image = Image.new("RGB", size, "white")
    pen = ImageDraw.Draw(image)
    for name, colour, left, top, side in things:
        draw = pen.ellipse if name == "disc" else pen.rectangle
        draw((left, top, left + side, top + side), fill=COLOURS[colour])
    return image


def see(image, classes, threshold):
    """A perfect detector of discs and boxes; small ones are found with less confidence."""
    from mmgrpo.rewards.shape_finding import find_shapes

    kinds = {"circle": "disc", "square": "box"}
    found = []
    for shape in find_shapes(np.asarray(image)):
        name, half = kinds.get(shape.name), shape.area**0.5 / 2
        if name in classes:
            box = (shape.x - half, shape.y - half, shape.x + half, shape.y + half)
            found.append(Detection(name, min(1.0, half / 10), box))
    found = [d for d in found if d.score > threshold]
    return sorted(found, key=lambda d: -d.score)


@pytest.fixture
def reward(yolos):
    def made(**options):
        built = ImageGeneval(yolos, device="cpu", **options)
        built.detector.detect = see
        return built

    return made


RED, BLUE = ("disc", "red", 10, 20, 24), ("box", "blue", 80, 20, 22)
LEFT = [{"class": "disc", "color": "red", "count": 1},
        {"class": "box", "color": "blue", "count": 1, "position": ["right of", 0]}]  # fmt: skip


@pytest.mark.parametrize(
    ("things", "share"),
    [
        ([RED, BLUE], 1.0),
        ([RED], 3 / 7),
        ([("disc", "red", 80, 20, 24), ("box", "blue", 10, 20, 22)], 6 / 7),
        ([("disc", "green", 10, 20, 24), BLUE], 6 / 7),
        ([], 0.0),
    ],
)
def test_conditions_of_a_picture(reward, things, share):
    image = scene(*things)
    assert reward(reduce="share")(images=[image], include=[LEFT]) == [pytest.approx(share)]
    assert reward()(images=[image], include=[LEFT]) == [float(share == 1.0)]


def test_counting_needs_more_confidence(reward):
    small = scene(
        ("disc", "red", 5, 20, 12), ("disc", "red", 40, 20, 12), ("disc", "red", 80, 20, 24)
    )
    two = [{"class": "disc", "count": 2}]
    assert reward()(images=[small], include=[two]) == [0.0]
    assert reward()(images=[small], include=[two], tag=["counting"]) == [0.0]
    assert reward()(images=[small], include=[two], tag=["two_object"]) == [1.0]
    assert reward(counting_threshold=0.3)(images=[small], include=[two]) == [1.0]
    unwanted = [[{"class": "disc", "count": 3}]]
    one = [[{"class": "disc"}]]
    assert reward()(images=[small], include=one, exclude=unwanted) == [0.0]
    assert reward()(images=[small], include=one, exclude=unwanted, tag=["counting"]) == [1.0]


def test_classes_and_colours_that_are_not_known(reward):
    image = scene(RED)
    with pytest.raises(ValueError, match="unknown class 'disk'; did you mean 'disc'"):
        reward()(images=[image], include=[[{"class": "disk"}]])
    with pytest.raises(ValueError, match="unknown color 'gray'"):
        reward()(images=[image], include=[[{"class": "disc", "color": "gray"}]])
    assert reward()(images=[image], include=[None]) == [None]


def test_swapped_arguments_are_caught(reward):
    with pytest.raises((TypeError, ValueError)):
        reward()(images=[LEFT], include=[scene(RED, BLUE)])


def test_contract(reward):
    pictures = [scene(RED, BLUE), scene(RED), scene(BLUE), scene(), scene(RED, BLUE)]
    columns = {"include": [LEFT] * 4 + [None], "prompts": ["x"] * 5}
    check_contract(Case(reward(reduce="share"), pictures, columns, low=0.0, high=1.0))


def test_colours_are_named_by_clip(yolos, tmp_path):
    build(tmp_path)
    judged = ImageGeneval(yolos, str(tmp_path), device="cpu")
    everywhere = Detection("disc", 1.0, (0, 0, 40, 40))
    judged._named["disc"] = judged.clip.texts(
        ["a picture of red", "", "", "a picture of green", "a picture of blue", "", "", "", "", ""]
    )
    for colour in ("red", "green", "blue"):
        assert judged._colours(picture(colour, seed=9), [everywhere], "disc") == [colour]
    del judged._named["disc"]
    judged._colours(picture("red"), [everywhere], "disc")
    texts = [f"a photo of a red{middle}" for middle in (" disc", "-colored disc", " object")]
    mean = judged.clip.texts(texts).mean(dim=0)
    torch.testing.assert_close(judged._named["disc"][0], mean / mean.norm())


def test_what_is_outside_a_mask_does_not_count():
    image = scene(RED)
    mask = torch.zeros(80, 120, dtype=torch.bool)
    mask[20:30, 15:25] = True
    cut = cut_out(image, Detection("disc", 1.0, box_around(mask), mask))
    assert cut.size == (10, 10)
    wide = np.asarray(cut_out(image, Detection("disc", 1.0, (0, 0, 40, 40), mask)))
    assert tuple(wide[0, 0]) == BLANK
    assert tuple(wide[25, 20]) == COLOURS["red"]
    pixels = np.asarray(image)
    assert dominant_colour(pixels, None, ("red", "white")) == "white"
    assert dominant_colour(pixels, mask.numpy(), ("red", "white")) == "red"
    assert dominant_colour(pixels, ~(pixels >= 0).any(axis=-1), ("red",)) is None


def test_overlapping_objects():
    boxes = [(0, 0, 10, 10), (0, 0, 10, 5), (20, 0, 30, 10)]
    assert iou(boxes[0], boxes[1]) == 0.5
    assert iou(boxes[0], boxes[2]) == 0.0
    assert iou((1, 1, 1, 1), (1, 1, 1, 1)) == 0.0
    found = [Detection("disc", 1 - 0.1 * n, box) for n, box in enumerate(boxes)]
    assert without_overlap(found, 1.0) == found
    assert without_overlap(found, 0.5) == [found[0], found[2]]
    assert without_overlap(found, 0.51) == found
    apart = [found[0], Detection("box", 0.5, boxes[0])]
    assert without_overlap(apart, 0.1) == apart


# -- real detectors --------------------------------------------------------------------------------


def test_a_yolos_folder_gives_what_the_model_says(yolos):
    from transformers import AutoImageProcessor, YolosForObjectDetection

    detector = Detector("image_geneval", yolos, "cpu")
    assert detector.classes == ["disc", "box"]
    image = scene(RED, BLUE)
    found = detector.detect(image, ["disc", "box"], 0.0)
    model = YolosForObjectDetection.from_pretrained(yolos).eval()
    pixels = AutoImageProcessor.from_pretrained(yolos)(images=image, return_tensors="pt")
    with torch.inference_mode():
        said = model(**pixels)
    scores, labels = said.logits[0].softmax(-1)[:, :-1].max(-1)
    order = scores.argsort(descending=True).tolist()
    assert [d.score for d in found] == pytest.approx(scores[order].tolist())
    assert [d.name for d in found] == [CLASSES[label] for label in labels[order].tolist()]
    x, y, width, height = (said.pred_boxes[0, order[0]] * torch.tensor([120, 80, 120, 80])).tolist()
    assert found[0].box == pytest.approx(
        (x - width / 2, y - height / 2, x + width / 2, y + height / 2), abs=1e-3
    )
    middle = scores.median().item()
    some = detector.detect(image, ["disc", "box"], middle)
    assert 0 < len(some) < len(found)
    only = detector.detect(image, ["disc"], 0.0)
    assert only == [d for d in found if d.name == "disc"]


def test_owlv2_is_asked_in_words(tmp_path):
    from transformers import CLIPTokenizer, Owlv2Config, Owlv2ForObjectDetection, Owlv2Processor
    from transformers.models.owlv2.image_processing_pil_owlv2 import Owlv2ImageProcessorPil

    torch.manual_seed(0)
    letters = sorted(set("a photo of a zebra".replace(" ", "")))
    tokens = [*letters, *(f"{x}</w>" for x in letters), "<|startoftext|>", "<|endoftext|>"]
    tokenizer = CLIPTokenizer(vocab={t: n for n, t in enumerate(tokens)}, merges=[],
                              model_max_length=16, pad_token="<|endoftext|>")  # fmt: skip
    common = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1,
              "num_attention_heads": 2}  # fmt: skip
    config = Owlv2Config(
        text_config={**common, "vocab_size": len(tokens), "bos_token_id": len(tokens) - 2,
                     "eos_token_id": len(tokens) - 1, "pad_token_id": 0},
        vision_config={**common, "image_size": 32, "patch_size": 8}, projection_dim=16,
    )  # fmt: skip
    Owlv2ForObjectDetection(config).save_pretrained(tmp_path)
    size = {"height": 32, "width": 32}
    Owlv2Processor(Owlv2ImageProcessorPil(size=size), tokenizer).save_pretrained(tmp_path)
    detector = Detector("image_geneval", str(tmp_path), "cpu")
    assert detector.classes is None
    found = detector.detect(scene(RED), ["zebra", "a"], 0.0)
    assert {d.name for d in found} <= {"zebra", "a"}
    assert len(found) == 16
    assert [d.score for d in found] == sorted((d.score for d in found), reverse=True)
    assert ImageGeneval(str(tmp_path), device="cpu")(
        images=[scene(RED)], include=[[{"class": "zebra"}]]
    ) in ([0.0], [1.0])


def test_masks_become_boxes(yolos):
    """The segmenter's kind, with stand-ins for the model and its processor."""
    mask = torch.zeros(2, 8, 10)
    mask[0, 2:5, 3:9] = 1
    mask[1, 7, 0] = 1

    class Processor:
        def __call__(self, images, return_tensors):
            assert images.size == (10, 8)
            return type("Batch", (dict,), {"to": lambda self, device: self})()

        def post_process_instance_segmentation(self, _outputs, *, target_sizes, **_options):
            assert target_sizes == [(8, 10)]
            infos = [{"label_id": 1, "score": 0.4}, {"label_id": 0, "score": 0.9}]
            return [{"segmentation": mask, "segments_info": infos}]

    def model():
        return None

    model.config = type("Config", (), {"id2label": CLASSES})
    detector = Detector("image_geneval", yolos, "cpu")
    detector.kind, detector._parts = object_detection.KINDS[2], (model, Processor())
    found = detector.detect(Image.new("RGB", (10, 8)), ["disc", "box"], 0.3)
    assert [(d.name, d.score, d.box) for d in found] == [
        ("disc", 0.9, (0.0, 7.0, 1.0, 8.0)),
        ("box", 0.4, (3.0, 2.0, 9.0, 5.0)),
    ]
    assert found[1].mask.sum() == 18


@pytest.mark.parametrize(
    "missing", ["config.json", "model.safetensors", "preprocessor_config.json"]
)
def test_a_missing_file_is_one_sentence_at_the_start(yolos, tmp_path, missing):
    for file in Path(yolos).iterdir():
        if file.name != missing:
            tmp_path.joinpath(file.name).write_bytes(file.read_bytes())
    with pytest.raises(
        ConfigError, match=rf"^image_geneval: '.*' has no {missing.replace('.', '[.]')}"
    ):
        load_reward({"name": "image_geneval", "options": {"detector": str(tmp_path)}})


def test_other_models_and_options_are_refused(yolos, tmp_path):
    for file in Path(yolos).iterdir():
        tmp_path.joinpath(file.name).write_bytes(file.read_bytes())
    tmp_path.joinpath("config.json").write_text(json.dumps({"model_type": "clip"}))
    with pytest.raises(ConfigError, match="type 'clip', which is no detector"):
        ImageGeneval(str(tmp_path))
    with pytest.raises(ConfigError, match="did you mean 'share'"):
        ImageGeneval(yolos, reduce="shares")
    with pytest.raises(ConfigError, match=r"has no config\.json"):
        ImageGeneval(yolos, clip=str(tmp_path / "none"))
