"""The classifier's score against a computation by hand with the same network."""

import pytest
import torch
from PIL import Image
from transformers import ResNetConfig, ResNetForImageClassification
from transformers.models.vit.image_processing_pil_vit import ViTImageProcessorPil

from mmgrpo.errors import ConfigError
from mmgrpo.rewards.classifier_score import ClassifierScore

CELL = 8
MEAN, STD = 0.5, 0.25


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("classifier")
    torch.manual_seed(0)
    config = ResNetConfig(
        embedding_size=8, hidden_sizes=[8], depths=[1], num_labels=4, layer_type="basic"
    )
    model = ResNetForImageClassification(config)
    with torch.no_grad():
        model.classifier[-1].weight.mul_(20)
    model.save_pretrained(path)
    ViTImageProcessorPil(
        size={"height": CELL, "width": CELL}, image_mean=[MEAN] * 3, image_std=[STD] * 3
    ).save_pretrained(path)
    return path


def picture(seed, cells=2, rows=1):
    generator = torch.Generator().manual_seed(seed)
    pixels = torch.randint(0, 256, (CELL * rows, CELL * cells, 3), generator=generator)
    return Image.fromarray(pixels.to(torch.uint8).numpy())


def probabilities(folder, image, rows=1, columns=2):
    """Softmax per cell, by slicing the pixel array."""
    model = ResNetForImageClassification.from_pretrained(folder).eval()
    pixels = torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8)
    pixels = (
        pixels.view(rows, CELL, columns, CELL, 3).permute(0, 2, 4, 1, 3).reshape(-1, 3, CELL, CELL)
    )
    with torch.no_grad():
        return model((pixels / 255.0 - MEAN) / STD).logits.softmax(dim=-1)


def test_mean_and_product_are_those_of_the_right_classes(folder):
    images, labels = [picture(0), picture(1)], [[1, 2], [3, 0]]
    right = [
        probabilities(folder, image)[[0, 1], wanted]
        for image, wanted in zip(images, labels, strict=True)
    ]
    mean = ClassifierScore(str(folder))(images=images, labels=labels)
    product = ClassifierScore(str(folder), reduce="product")(images=images, labels=labels)
    assert mean == pytest.approx([r.mean().item() for r in right], abs=1e-5)
    assert product == pytest.approx([r.prod().item() for r in right], abs=1e-5)
    assert abs(mean[0] - mean[1]) > 1e-3


def test_all_correct_is_the_argmax_in_every_cell(folder):
    image = picture(2)
    best = probabilities(folder, image).argmax(dim=1).tolist()
    score = ClassifierScore(str(folder), reduce="all_correct")
    half = [best[0], (best[1] + 1) % 4]
    assert score(images=[image] * 2, labels=[best, half]) == [1.0, 0.0]


def test_cells_are_read_row_by_row_in_any_batch_size(folder):
    images = [picture(seed, cells=3, rows=2) for seed in range(3)]
    labels = [[0, 1, 2, 3, 0, 1]] * 3
    expected = [
        probabilities(folder, image, 2, 3)[range(6), labels[0]].mean().item() for image in images
    ]
    for batch_size in (1, 4, 256):
        score = ClassifierScore(str(folder), grid=[2, 3], batch_size=batch_size)
        assert score(images=images, labels=labels) == pytest.approx(expected, abs=1e-5)


def test_one_cell_takes_a_bare_label_and_any_size(folder):
    score = ClassifierScore(str(folder), grid=[1, 1])
    values = score(images=[picture(0).resize((50, 30)).convert("L")], labels=[2])
    assert 0 <= values[0] <= 1


def test_null_labels_are_not_applicable(folder):
    score = ClassifierScore(str(folder))
    values = score(images=[picture(0), picture(1)], labels=[None, [1, 1]])
    assert values[0] is None
    assert values[1] is not None
    assert score(images=[picture(0)], labels=[None]) == [None]


@pytest.mark.parametrize("labels", [[1], [1, 2, 3], [1, 4], [-1, 0], [1, "2"]])
def test_bad_labels_are_our_failure(folder, labels):
    with pytest.raises(ValueError, match="labels"):
        ClassifierScore(str(folder))(images=[picture(0)], labels=[labels])


def test_a_missing_folder_or_reduction_is_found_at_once(folder, tmp_path):
    with pytest.raises(ConfigError, match="not a model folder"):
        ClassifierScore(str(tmp_path))
    with pytest.raises(ConfigError, match="did you mean 'product'"):
        ClassifierScore(str(folder), reduce="produkt")
