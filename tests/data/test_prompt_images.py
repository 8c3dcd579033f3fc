"""Images meet their placeholders, stay compressed, and are checked before training starts."""

import base64
import io
import json

import datasets
import numpy as np
import pyarrow as pa
import pytest
from PIL import Image
from pyarrow import parquet

from mmgrpo.data import read_prompts, rows_to_prompts
from mmgrpo.errors import DataError

RED, BLUE = (255, 0, 0), (0, 0, 255)
IMAGE, ASK = {"type": "image"}, {"type": "text", "text": "which?"}


def png(color, size=(5, 3)):
    stream = io.BytesIO()
    Image.new("RGB", size, color).save(stream, format="PNG")
    return stream.getvalue()


def colors(prompt):
    return [image.getpixel((0, 0)) for image in prompt.images]


def one(row):
    return rows_to_prompts([row], modality="vision")[0]


def write_row(folder, row):
    (folder / "a.jsonl").write_text(json.dumps(row) + "\n")
    return folder / "a.jsonl"


def error_of(row):
    with pytest.raises(DataError) as caught:
        one(row)
    return str(caught.value)


# -- where images come from ----------------------------------------------------------------------


@pytest.mark.parametrize("column", ["images", "image"])
@pytest.mark.parametrize("several", [True, False])
def test_paths_are_relative_to_the_data_file(tmp_path, column, several):
    (tmp_path / "pictures").mkdir()
    (tmp_path / "pictures" / "a.png").write_bytes(png(RED))
    value = ["pictures/a.png"] if several else "pictures/a.png"
    path = write_row(tmp_path, {"prompt": "what?", column: value})
    (prompt,) = read_prompts(path, modality="vision")
    assert colors(prompt) == [RED]
    assert prompt.columns == {}


@pytest.mark.parametrize(
    "value",
    [png(RED), {"bytes": png(RED), "path": None}, [png(RED)], Image.new("RGB", (2, 2), RED)],
)
def test_bytes_dictionaries_and_pil_images(value):
    assert colors(one({"prompt": "what?", "images": value})) == [RED]


def test_images_inside_a_saved_dataset_stay_compressed(tmp_path):
    features = datasets.Features(
        {"prompt": datasets.Value("string"), "images": datasets.List(datasets.Image())}
    )
    pictures = [Image.new("RGB", (300, 300), RED), Image.new("RGB", (300, 300), BLUE)]
    data = datasets.Dataset.from_dict({"prompt": ["x"], "images": [pictures]}, features=features)
    data.save_to_disk(tmp_path / "set")
    (prompt,) = read_prompts(tmp_path / "set", modality="vision")
    assert colors(prompt) == [RED, BLUE]
    assert sum(len(ref.source) for ref in prompt.images.refs) < 300 * 300


def test_images_inside_parquet(tmp_path):
    rows = [{"prompt": "x", "image": {"bytes": png(BLUE), "path": None}}]
    parquet.write_table(pa.Table.from_pylist(rows), tmp_path / "a.parquet")
    (prompt,) = read_prompts(tmp_path / "a.parquet", modality="vision")
    assert colors(prompt) == [BLUE]


def test_images_are_decoded_when_indexed_and_not_kept(tmp_path):
    (tmp_path / "a.png").write_bytes(png(RED))
    path = write_row(tmp_path, {"prompt": "x", "images": ["a.png"]})
    (prompt,) = read_prompts(path, modality="vision")
    (tmp_path / "a.png").write_bytes(png(BLUE))
    assert colors(prompt) == [BLUE]
    assert prompt.images[0] is not prompt.images[0]
    assert len(prompt.images[:1]) == 1
    assert prompt.images[-1].mode == "RGB"


def test_transparent_pixels_become_white():
    picture = Image.fromarray(np.array([[[9, 9, 9, 0], [9, 9, 9, 255]]], dtype=np.uint8), "RGBA")
    image = one({"prompt": "x", "images": picture}).images[0]
    assert [image.getpixel((0, 0)), image.getpixel((1, 0))] == [(255, 255, 255), (9, 9, 9)]


def test_the_image_column_can_be_left_to_the_rewards():
    (prompt,) = rows_to_prompts(
        [{"prompt": "x", "images": ["not there.png"]}], modality="image", image_column=None
    )
    assert prompt.columns == {"images": ["not there.png"]}


# -- placeholders --------------------------------------------------------------------------------


def user(*parts):
    return [{"role": "user", "content": list(parts)}]


def test_plain_text_gets_its_images_in_front():
    prompt = one({"prompt": "which?", "images": [png(RED), png(BLUE)]})
    assert prompt.content == user(IMAGE, IMAGE, ASK)
    assert colors(prompt) == [RED, BLUE]


def test_text_without_images_stays_text():
    assert one({"prompt": "which?"}).content == "which?"


def test_markers_in_the_text_become_parts():
    prompt = one({"prompt": "a <image> b<image>", "images": [png(RED), png(BLUE)]})
    a, b = {"type": "text", "text": "a "}, {"type": "text", "text": " b"}
    assert prompt.content == user(a, IMAGE, b, IMAGE)


def test_parts_take_the_images_in_order_and_keep_their_own():
    chat = user(IMAGE, {"type": "image", "image": png(BLUE)}, ASK, IMAGE)
    prompt = one({"prompt": chat, "images": [png(RED), png((0, 9, 0))]})
    assert prompt.content == user(IMAGE, IMAGE, ASK, IMAGE)
    assert colors(prompt) == [RED, BLUE, (0, 9, 0)]


def test_parts_with_null_keys_from_a_table_are_plain(tmp_path):
    parts = [{"type": "image", "text": None}, {"type": "text", "text": "which?"}]
    rows = [{"prompt": user(*parts), "images": [png(RED)]}]
    parquet.write_table(pa.Table.from_pylist(rows), tmp_path / "a.parquet")
    (prompt,) = read_prompts(tmp_path / "a.parquet", modality="vision")
    assert prompt.content == user(IMAGE, ASK)


def test_images_go_to_the_first_user_message():
    chat = [{"role": "system", "content": "s"}, *user(ASK)]
    prompt = one({"prompt": chat, "images": [png(RED)]})
    assert prompt.content == [chat[0], *user(IMAGE, ASK)]


@pytest.mark.parametrize(
    ("prompt", "images", "counts"),
    [
        (user(IMAGE, ASK), [RED, BLUE], "1 image placeholders and the row has 2"),
        (user(IMAGE, IMAGE), [RED], "2 image placeholders and the row has 1"),
        (user(IMAGE), [], "1 image placeholders and the row has 0"),
        ("a <image> b <image>", [RED], "2 image placeholders and the row has 1"),
        ("a <image>", [], "1 image placeholders and the row has 0"),
    ],
)
def test_placeholders_and_images_must_agree(prompt, images, counts):
    assert counts in error_of({"prompt": prompt, "images": [png(color) for color in images]})


def test_images_need_a_user_message():
    chat = [{"role": "system", "content": "s"}]
    assert "no user message" in error_of({"prompt": chat, "images": [png(RED)]})


# -- images that cannot be used ------------------------------------------------------------------


def jpeg():
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    stream = io.BytesIO()
    Image.fromarray(noise).save(stream, format="JPEG")
    return stream.getvalue()


def flipped(data):
    middle = len(data) // 2
    return data[:middle] + bytes([data[middle] ^ 0xFF]) + data[middle + 1 :]


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("a.png", None, "does not exist"),
        ("a.png", b"no image", "no image format"),
        ("a.png", b"", "no image format"),
        ("a.png", png(RED, (64, 64))[:-20], "damaged"),
        ("a.png", flipped(png(RED, (64, 64))), "damaged"),
        ("a.jpg", jpeg()[: len(jpeg()) // 2], "damaged"),
    ],
)
def test_an_unusable_image_is_named_with_its_row(tmp_path, name, content, expected):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    (tmp_path / "fine.jpg").write_bytes(jpeg())
    path = tmp_path / "a.jsonl"
    rows = [{"prompt": "x", "images": ["fine.jpg"]}, {"prompt": "y", "images": [name]}]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(DataError) as caught:
        read_prompts(path, modality="vision")
    message = str(caught.value)
    assert message.startswith(f"{path}:2: image file '{tmp_path / name}'")
    assert expected in message
    assert "0x" not in message


def test_corrupt_bytes_are_named_without_being_printed():
    assert error_of({"prompt": "x", "images": [b"abc" * 1000]}).count("abc") == 0


@pytest.mark.parametrize("value", [5, [[png(RED)]], {"url": "x"}, ""])
def test_an_image_of_another_type(value):
    assert "an image must be a path, bytes" in error_of({"prompt": "x", "images": value})


def test_addresses_are_not_fetched():
    chat = user({"type": "image_url", "image_url": {"url": "https://host/a.png"}}, ASK)
    assert "local files" in error_of({"prompt": chat})


def test_a_bomb_is_an_error(monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    assert "damaged" in error_of({"prompt": "x", "images": [png(RED, (64, 64))]})


def test_base64_text_is_not_taken_for_an_image():
    text = base64.b64encode(png(RED)).decode()
    assert "does not exist" in error_of({"prompt": "x", "images": [text]})
