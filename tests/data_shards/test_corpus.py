"""Documents: each exactly once, in order, however the files are cut and packed."""

import gzip
import json
import lzma
import random
import zlib
from pathlib import Path

import pytest

from data_shards.corpus import Corpus, plan_tasks, read_documents
from data_shards.errors import DamagedDataError, DataSettingError

NASTY = (
    " \t\n\r\n\n"  # blank lines first
    "one\ntwo \r\nthree\n"
    "\n\n \t \n\r\n"
    "  żółw 東京 한국어 🦉\r\n\r\n"
    "after a carriage return\n\f\nafter a form feed\n\v\nafter a vertical tab\n"
    "\n"
    "\u3000\n一行\n\u3000\n二行\n\n"
    "no newline at the end"
)
NASTY_DOCUMENTS = [
    "one\ntwo \r\nthree",
    "żółw 東京 한국어 🦉",
    "after a carriage return",
    "after a form feed",
    "after a vertical tab",
    "一行",
    "二行",
    "no newline at the end",
]
NASTY_LINES = [line.strip() for line in NASTY.split("\n") if line.strip()]


def read(corpus: Corpus, task_bytes: int = 1 << 30) -> list[str]:
    return [text for task in plan_tasks(corpus, task_bytes) for text in read_documents(corpus, task)]


def write(path: Path, content: str | bytes) -> Path:
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


@pytest.mark.parametrize(
    ("documents", "expected"),
    [("blank_line", NASTY_DOCUMENTS), ("line", NASTY_LINES), ("file", [NASTY.strip()])],
)
def test_every_slice_size_yields_each_document_once_in_order(tmp_path, documents, expected):
    corpus = Corpus("c", str(write(tmp_path / "c.txt", NASTY)), documents=documents)
    for task_bytes in [*range(1, 201), 1 << 30]:
        assert read(corpus, task_bytes) == expected, task_bytes


def test_slices_of_random_texts_agree_with_a_plain_split(tmp_path):
    draw = random.Random(3)
    parts = ["a", "bc", "é", "\n", "\n", "\n\n", "\r\n", " ", "\t", "\f", "\v", "\u3000", "\u0085", "\x1c"]
    for _ in range(150):
        text = "".join(draw.choices(parts, k=draw.randint(1, 60)))
        expected, lines = [], []
        for line in [*text.split("\n"), ""]:
            if line.strip():
                lines.append(line)
            elif lines:
                expected.append("\n".join(lines).strip())
                lines = []
        corpus = Corpus("c", str(write(tmp_path / "c.txt", text)))
        for task_bytes in (1, 2, 3, 5, 7, 11, 16):
            assert read(corpus, task_bytes) == expected, (text, task_bytes)


@pytest.mark.parametrize("spaces", [4094, 4095, 4096, 4097, 9000])
def test_a_blank_line_of_any_length_ends_a_document(tmp_path, spaces):
    corpus = Corpus("c", str(write(tmp_path / "c.txt", f"one\n{' ' * spaces}\ntwo\n\nthree\n")))
    for task_bytes in range(spaces, spaces + 12):
        assert read(corpus, task_bytes) == ["one", "two", "three"], task_bytes


@pytest.mark.parametrize("spaces", [4094, 4095, 4096, 4097, 9000])
def test_spaces_at_the_end_of_a_line_do_not_end_a_document(tmp_path, spaces):
    corpus = Corpus("c", str(write(tmp_path / "c.txt", f"one\ntwo{' ' * spaces}\nthree\n")))
    for task_bytes in range(spaces, spaces + 12):
        assert len(read(corpus, task_bytes)) == 1, task_bytes


@pytest.mark.parametrize(("suffix", "pack"), [(".gz", gzip.compress), (".xz", lzma.compress)])
def test_compressed_files_are_one_task_with_the_same_documents(tmp_path, suffix, pack):
    corpus = Corpus("c", str(write(tmp_path / f"c.txt{suffix}", pack(NASTY.encode()))))
    assert len(plan_tasks(corpus, 1)) == 1
    assert read(corpus, 1) == NASTY_DOCUMENTS


def test_a_folder_is_read_to_its_depth_in_sorted_order_without_hidden_files(tmp_path):
    (tmp_path / "b").mkdir()
    for name in ("b/2.txt", "b/1.txt", "a.txt", ".hidden", "c.txt"):
        write(tmp_path / name, f"{name}\n")
    write(tmp_path / "empty.txt", "")
    assert read(Corpus("c", str(tmp_path))) == ["a.txt", "b/1.txt", "b/2.txt", "c.txt"]


def test_a_glob_reads_what_it_matches(tmp_path):
    for name in ("1.txt", "2.md", "3.txt"):
        write(tmp_path / name, name)
    assert read(Corpus("c", str(tmp_path / "*.txt"))) == ["1.txt", "3.txt"]


def test_jsonl_yields_the_text_field_of_each_line_for_every_slice_size(tmp_path):
    texts = ["one\n\ntwo", " ", "żółw 한국어", "", "three"]
    lines = [json.dumps({"id": n, "body": text}, ensure_ascii=n % 2 == 0) for n, text in enumerate(texts)]
    path = write(tmp_path / "c.jsonl", "\n".join([*lines, "", json.dumps({"body": None})]))
    corpus = Corpus("c", str(path), format="jsonl", text_column="body")
    for task_bytes in range(1, 201):
        assert read(corpus, task_bytes) == ["one\n\ntwo", "żółw 한국어", "three"], task_bytes


@pytest.mark.parametrize(
    "line",
    ['{"body": "x"}', "[1, 2]", '"text"', "3", "null", '{"text": "cut', '{"text": "half a pair \\ud83e"}'],
)
def test_a_bad_jsonl_line_is_named_by_file_and_byte(tmp_path, line):
    good = '{"text": "fine"}\n'
    path = write(tmp_path / "c.jsonl", good + line + "\n")
    with pytest.raises(DamagedDataError, match=rf"c\.jsonl: the line at byte {len(good)} ") as error:
        read(Corpus("c", str(path), format="jsonl"))
    assert error.value.exit_code == 65


def test_parquet_yields_the_rows_that_have_text(tmp_path):
    corpus = Corpus("c", str(write_parquet(tmp_path / "c.parquet")), format="parquet", text_column="body")
    assert len(plan_tasks(corpus, 1)) == 1
    assert read(corpus, 1) == ["one\n\ntwo", "둘", "three"]


def test_parquet_without_the_column_names_the_columns_it_has(tmp_path):
    with pytest.raises(DamagedDataError, match="no column 'text'; it has body, n"):
        read(Corpus("c", str(write_parquet(tmp_path / "c.parquet")), format="parquet"))


def test_a_parquet_file_cut_short_is_damaged(tmp_path):
    whole = write_parquet(tmp_path / "c.parquet").read_bytes()
    path = write(tmp_path / "cut.parquet", whole[:-20])
    with pytest.raises(DamagedDataError, match=r"cut\.parquet: cannot be read as parquet"):
        read(Corpus("c", str(path), format="parquet", text_column="body"))


def write_parquet(path: Path) -> Path:
    import pyarrow
    import pyarrow.parquet

    rows = {"body": ["one\n\ntwo", None, " 둘 ", "", "three"], "n": [1, 2, 3, 4, 5]}
    pyarrow.parquet.write_table(pyarrow.table(rows), path)
    return path


@pytest.mark.parametrize("name", ["missing.txt", "nothing/*.txt"])
def test_a_path_without_files_is_a_wrong_setting(tmp_path, name):
    with pytest.raises(DataSettingError, match=r"no file at .* \(corpus 'c'\)") as error:
        plan_tasks(Corpus("c", str(tmp_path / name)), 1)
    assert error.value.exit_code == 78


def test_an_empty_file_is_damaged_data(tmp_path):
    with pytest.raises(DamagedDataError, match=r"c\.txt: every file of corpus 'c' is empty") as error:
        plan_tasks(Corpus("c", str(write(tmp_path / "c.txt", ""))), 1)
    assert error.value.exit_code == 65


@pytest.mark.parametrize("documents", ["blank_line", "line", "file"])
@pytest.mark.parametrize("task_bytes", [5, 1 << 30])
def test_bytes_that_are_not_utf8_are_named_by_file_and_byte(tmp_path, documents, task_bytes):
    content = "żółw\n\nline two\n\n".encode() + b"caf\xe9 au lait\n"
    corpus = Corpus("c", str(write(tmp_path / "c.txt", content)), documents=documents)
    message = rf"c\.txt: byte {content.index(0xE9)} is not UTF-8"
    with pytest.raises(DamagedDataError, match=message) as error:
        read(corpus, task_bytes)
    assert error.value.exit_code == 65


@pytest.mark.parametrize("documents", ["blank_line", "file"])
@pytest.mark.parametrize("suffix", [".gz", ".xz"])
@pytest.mark.parametrize("damage", ["cut", "flipped", "not compressed"])
def test_a_damaged_compressed_file_is_named(tmp_path, documents, suffix, damage):
    text = "\n\n".join(f"document {zlib.crc32(bytes([n % 256, n // 256]))}" for n in range(2000)).encode()
    packed = bytearray((gzip if suffix == ".gz" else lzma).compress(text))
    if damage == "cut":
        packed = packed[: len(packed) // 2]
    elif damage == "flipped":
        packed[len(packed) // 2] ^= 0xFF
    else:
        packed = bytearray(text)
    corpus = Corpus("c", str(write(tmp_path / f"c{suffix}", bytes(packed))), documents=documents)
    with pytest.raises(DamagedDataError, match=rf"c\{suffix}: cannot be decompressed") as error:
        read(corpus)
    assert error.value.exit_code == 65
