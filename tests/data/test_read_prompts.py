"""Every format gives the same prompts, and every bad row is named with its place."""

import json

import datasets
import pyarrow as pa
import pytest
from PIL import Image
from pyarrow import parquet

from mmgrpo.data import check_columns, read_prompts, rows_to_prompts
from mmgrpo.errors import ConfigError, DataError, UsageError

ROWS = [
    {"prompt": "1+1?", "answer": "2", "level": 1},
    {"prompt": [{"role": "user", "content": "2+2?"}], "answer": "4", "level": 2},
    {"prompt": "3+3?", "answer": "6", "level": 3},
]
TEXT_ROWS = [row for row in ROWS if isinstance(row["prompt"], str)]


def write_lines(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def read(path, modality="text", **options):
    return read_prompts(path, modality=modality, **options)


def error_of(path, modality="text", **options):
    with pytest.raises(DataError) as caught:
        read(path, modality, **options)
    message = str(caught.value)
    assert "\n" not in message
    assert message.endswith((".", "?"))
    return message


# -- formats ------------------------------------------------------------------------------------


def as_jsonl(folder):
    return write_lines(folder / "a.jsonl", TEXT_ROWS)


def as_json_array(folder):
    (folder / "a.json").write_text("\ufeff" + json.dumps(TEXT_ROWS, indent=1), encoding="utf-8")
    return folder / "a.json"


def as_json_lines(folder):
    return write_lines(folder / "a.json", TEXT_ROWS)


def as_parquet(folder):
    parquet.write_table(pa.Table.from_pylist(TEXT_ROWS), folder / "a.parquet")
    return folder / "a.parquet"


def as_saved_dataset(folder):
    datasets.Dataset.from_list(TEXT_ROWS).save_to_disk(folder / "set")
    return folder / "set"


def as_shards(folder):
    write_lines(folder / "train-00000.jsonl", TEXT_ROWS[:1])
    parquet.write_table(pa.Table.from_pylist(TEXT_ROWS[1:]), folder / "train-00001.parquet")
    return folder


@pytest.mark.parametrize(
    "write", [as_jsonl, as_json_array, as_json_lines, as_parquet, as_saved_dataset, as_shards]
)
def test_every_format_gives_the_same_prompts(tmp_path, write):
    prompts = read(write(tmp_path))
    assert [p.content for p in prompts] == [row["prompt"] for row in TEXT_ROWS]
    assert [p.index for p in prompts] == [0, 1]
    assert [p.columns for p in prompts] == [
        {"answer": "2", "level": 1},
        {"answer": "6", "level": 3},
    ]
    assert all(len(p.images) == 0 for p in prompts)


def test_limit_reads_only_the_first_rows(tmp_path):
    path = write_lines(tmp_path / "a.jsonl", ROWS)
    path.write_text(path.read_text() + "not json\n")
    assert len(read(path, limit=3)) == 3
    assert ":4:" in error_of(path)


def test_blank_lines_are_no_rows_but_count_as_lines(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('\n{"prompt": "x"}\n\n{"nothing": 1}\n')
    assert f"{path}:4:" in error_of(path)


def test_rows_in_memory_are_checked_alike():
    assert rows_to_prompts(ROWS, modality="text")[1].columns == {"answer": "4", "level": 2}
    with pytest.raises(DataError, match=r"^row 2: no prompt column 'prompt'"):
        rows_to_prompts([ROWS[0], {"promt": "x"}], modality="text")


def test_a_saved_set_of_splits_asks_for_one(tmp_path):
    split = datasets.Dataset.from_list(TEXT_ROWS)
    datasets.DatasetDict(train=split, test=split).save_to_disk(tmp_path / "set")
    assert "'" + str(tmp_path / "set" / "test") + "'" in error_of(tmp_path / "set")
    assert len(read(tmp_path / "set" / "train")) == 2


def test_a_folder_with_train_and_eval_files_is_refused(tmp_path):
    write_lines(tmp_path / "train.jsonl", TEXT_ROWS)
    write_lines(tmp_path / "eval.jsonl", TEXT_ROWS)
    assert "mixes the splits eval, train" in error_of(tmp_path)


# -- content ------------------------------------------------------------------------------------


def test_a_system_prompt_comes_first_and_makes_text_a_chat(tmp_path):
    path = write_lines(tmp_path / "a.jsonl", ROWS[:2])
    text, chat = read(path, system_prompt="Be brief.")
    system = {"role": "system", "content": "Be brief."}
    assert text.content == [system, {"role": "user", "content": "1+1?"}]
    assert chat.content == [system, {"role": "user", "content": "2+2?"}]


def test_two_system_messages_are_refused(tmp_path):
    chat = [{"role": "system", "content": "a"}, {"role": "user", "content": "b"}]
    path = write_lines(tmp_path / "a.jsonl", [{"prompt": chat}])
    assert ":1:" in error_of(path, system_prompt="Be brief.")


def test_the_messages_column_is_a_prompt_and_null_keys_vanish(tmp_path):
    rows = [
        {"messages": [{"role": "user", "content": "a", "name": "Ann"}], "k": 1},
        {"messages": [{"role": "user", "content": "b"}], "k": None},
    ]
    parquet.write_table(pa.Table.from_pylist(rows), tmp_path / "a.parquet")
    first, second = read(tmp_path / "a.parquet")
    assert first.content == [{"role": "user", "content": "a", "name": "Ann"}]
    assert second.content == [{"role": "user", "content": "b"}]
    assert second.columns == {"k": None}


def test_text_parts_are_joined_for_text_models(tmp_path):
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    path = write_lines(tmp_path / "a.jsonl", [{"prompt": [{"role": "user", "content": parts}]}])
    assert read(path)[0].content == [{"role": "user", "content": "ab"}]


def test_another_prompt_column(tmp_path):
    path = write_lines(tmp_path / "a.jsonl", [{"question": "x", "prompt": "y"}])
    (prompt,) = read(path, prompt_column="question")
    assert prompt.content == "x"
    assert prompt.columns == {"prompt": "y"}


# -- errors -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ('{"prompt": "x"', "not valid JSON"),
        ("[1, 2]", "expected a JSON object"),
        ('{"promt": "x"}', "no prompt column 'prompt'; did you mean 'promt'?"),
        ('{"prompt": null}', "is null"),
        ('{"prompt": "  "}', "the prompt is empty"),
        ('{"prompt": 5}', "expected text or a non-empty list of chat messages as prompt; got 5"),
        ('{"prompt": []}', "non-empty list"),
        ('{"prompt": ["x"]}', "message 1 must be an object"),
        ('{"prompt": [{"content": "x"}]}', "message 1 has no 'role'"),
        ('{"prompt": [{"role": "user"}]}', "message 1 has no 'content'"),
        ('{"prompt": [{"role": "user", "content": 3}]}', "content must be text or parts"),
        ('{"prompt": [{"role": 1, "content": "x"}]}', "role must be text"),
        (
            '{"prompt": [{"role": "user", "content": [{"type": "video"}]}]}',
            "a content part must be",
        ),
        ('{"prompt": [{"role": "user", "content": [{"type": "text"}]}]}', "needs 'text'"),
        (
            '{"prompt": [{"role": "user", "content": "x"}, {"role": "assistant", "content": "y"}]}',
            "last message is the assistant's",
        ),
        ('{"prompt": "x", "images": ["a.png"]}', "modality 'text' takes text prompts"),
        ('{"prompt": [{"role": "user", "content": [{"type": "image"}]}]}', "has an image"),
    ],
)
def test_a_bad_row_is_named_by_file_and_line(tmp_path, line, expected):
    path = tmp_path / "train.jsonl"
    path.write_text('{"prompt": "fine"}\n' + line + "\n")
    message = error_of(path)
    assert message.startswith(f"{path}:2: ")
    assert expected in message


def test_the_number_of_further_bad_rows_is_told(tmp_path):
    path = write_lines(tmp_path / "a.jsonl", [{"promt": "x"}] * 5 + [{"prompt": "y"}])
    assert "(4 more rows are bad)" in error_of(path)


def test_bad_utf8_is_named_by_line(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(b'{"prompt": "x"}\n{"prompt": "\xff"}\n')
    assert "a.jsonl:2: expected UTF-8" in error_of(tmp_path / "a.jsonl")


def test_a_bad_parquet_row_is_named_by_number(tmp_path):
    parquet.write_table(pa.table({"prompt": ["x", None, "y"]}), tmp_path / "a.parquet")
    assert f"{tmp_path / 'a.parquet'} row 2:" in error_of(tmp_path / "a.parquet")


def test_a_row_beyond_the_first_table_batch_has_its_number(tmp_path):
    parquet.write_table(pa.table({"prompt": ["x"] * 999 + [""]}), tmp_path / "a.parquet")
    assert "row 1000:" in error_of(tmp_path / "a.parquet")


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("a.jsonl", b"", "holds no rows"),
        ("a.json", b"[", "not valid JSON"),
        ("a.json", b"[]", "holds no rows"),
        ("a.csv", b"prompt\nx\n", "suffix '.csv'"),
        ("a.parquet", b"PAR1 is not enough", "not a readable Parquet file"),
    ],
)
def test_a_file_that_holds_no_data(tmp_path, name, content, expected):
    (tmp_path / name).write_bytes(content)
    message = error_of(tmp_path / name)
    assert name in message
    assert expected in message


def test_a_missing_file_names_the_nearest(tmp_path):
    write_lines(tmp_path / "train.jsonl", ROWS)
    assert "did you mean 'train.jsonl'?" in error_of(tmp_path / "trian.jsonl")
    assert "does not exist" in error_of(tmp_path / "nowhere" / "trian.jsonl")


def test_an_empty_folder(tmp_path):
    assert "no .jsonl" in error_of(tmp_path)


def test_image_generators_take_plain_text_only(tmp_path):
    path = write_lines(tmp_path / "a.jsonl", ROWS)
    assert ":2: the image generator's prompt must be text; got chat" in error_of(path, "image")
    with pytest.raises(ConfigError, match="system prompt"):
        read(path, "image", system_prompt="x")
    with pytest.raises(ConfigError, match="did you mean 'vision'"):
        read(path, "visoin")


def test_columns_that_a_reward_needs():
    prompts = rows_to_prompts([*ROWS, {"prompt": "x", "anwser": "1"}], modality="text")
    check_columns(prompts[:3], {"answer", "level"}, "r")
    with pytest.raises(DataError, match=r"reward 'r'.*'answer', which row 4.*mean 'anwser'"):
        check_columns(prompts, {"answer"}, "r")


def test_every_error_ends_the_command_with_2(tmp_path):
    with pytest.raises(UsageError) as caught:
        read(tmp_path / "x.jsonl")
    assert caught.value.exit_code == 2


def test_reading_text_does_not_import_torch_or_datasets(tmp_path):
    import subprocess
    import sys

    path = as_jsonl(tmp_path)
    code = (
        "import sys; from mmgrpo.data import read_prompts\n"
        f"read_prompts({str(path)!r}, modality='text')\n"
        "assert not {'torch', 'datasets', 'transformers', 'pyarrow'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_null_images_are_no_images(tmp_path):
    Image.new("RGB", (2, 2)).save(tmp_path / "a.png")
    path = write_lines(tmp_path / "a.jsonl", [{"prompt": "x", "images": None, "image": []}])
    assert len(read(path)[0].images) == 0
