"""Documents: each exactly once, in order, however the files are cut, packed and damaged."""

import gzip
import json
import lzma
import random
import re
import sys
import zlib
from pathlib import Path

import pytest
import zstandard

from data_shards import borders, documents, streams
from data_shards.corpus import Corpus, Slice, Task, plan_tasks
from data_shards.documents import Counts, read_documents, refuse_other_encoding
from data_shards.errors import DamagedDataError
from data_shards.sampling import sample_paragraphs

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

LANGUAGES = [
    "The quick brown fox.\nIt jumps over the lazy dog.",
    "다람쥐 헌 쳇바퀴에 타고파.\n한국어 문장입니다.",
    "いろはにほへと　ちりぬるを。\n日本語の文章。",
    "Съешь же ещё этих мягких французских булок.\nДа выпей чаю.",
    "天地玄黄，宇宙洪荒。\n中文句子。",
]


def zstd(data: bytes) -> bytes:
    """Two frames with a skippable one between them, as pzstd writes."""
    half = len(data) // 2
    pack = zstandard.ZstdCompressor().compress
    return pack(data[:half]) + b"\x50\x2a\x4d\x18\x04\x00\x00\x00note" + pack(data[half:])


def gzip_members(data: bytes) -> bytes:
    return gzip.compress(data[: len(data) // 2]) + gzip.compress(data[len(data) // 2 :])


def xz_streams(data: bytes) -> bytes:
    return lzma.compress(data[: len(data) // 2]) + lzma.compress(data[len(data) // 2 :])


PACKERS = {"": bytes, ".gz": gzip_members, ".zst": zstd, ".xz": xz_streams}


def read(corpus: Corpus, task_bytes: int = 1 << 30, counts: Counts | None = None) -> list[str]:
    counts = Counts() if counts is None else counts
    return [text for task in plan_tasks(corpus, task_bytes) for text in read_documents(corpus, task, counts)]


def write(path: Path, content: str | bytes) -> Path:
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def twin(text: str, way: str, longest_bytes: int = 1 << 62) -> tuple[list[str], Counts]:
    """What should be read, line by line and without haste."""
    if way == "line":
        found = text.split("\n")
        found = found[:-1] if found[-1] == "" else found
    elif way == "file":
        found = [text]
    else:
        found, lines = [], []
        for line in [*text.split("\n"), ""]:
            if line.strip():
                lines.append(line)
            elif lines:
                found.append("\n".join(lines))
                lines = []
    counts, result = Counts(), []
    for document in found:
        parts = cut(document.strip(), longest_bytes)
        counts.empty += not document.strip()
        counts.cut += len(parts) > 1
        result += parts
    counts.documents = len(result)
    return result, counts


def cut(document: str, longest_bytes: int) -> list[str]:
    """Parts of a stripped document, one character at a time."""
    parts = []
    while len(document.encode()) > longest_bytes:
        size = white = fits = 0
        for index, character in enumerate(document):
            if size > longest_bytes:
                break
            fits = index
            if character.isspace() and size >= longest_bytes - longest_bytes // 16:
                white = index
            size += len(character.encode())
        parts.append(document[: white or fits].rstrip())
        document = document[white or fits :].lstrip()
    return [*parts, document] if document else parts


@pytest.fixture
def tiny_blocks(monkeypatch):
    """Sets the size of a block and of the longest document, which texts of a test would never reach."""

    def set_sizes(block_bytes: int, longest_bytes: int) -> None:
        monkeypatch.setattr(borders, "BLOCK_BYTES", block_bytes)
        monkeypatch.setattr(documents, "LONGEST_DOCUMENT_BYTES", longest_bytes)

    return set_sizes


def test_white_space_is_what_python_says():
    white = [chr(code) for code in range(sys.maxunicode) if chr(code).isspace()]
    assert sorted(white) == sorted([chr(b) for b in borders._NARROW_WHITE] + [w.decode() for w in borders._WIDE_WHITE])
    for character in white:
        assert borders._WHITE.fullmatch(character.encode()), character
        assert character == "\n" or borders._BORDER.fullmatch(f"\n{character}\n".encode()), character


@pytest.mark.parametrize(
    ("way", "expected"),
    [("blank_line", NASTY_DOCUMENTS), ("line", NASTY_LINES), ("file", [NASTY.strip()])],
)
def test_every_slice_size_yields_each_document_once_in_order(tmp_path, way, expected):
    corpus = Corpus("c", str(write(tmp_path / "c.txt", NASTY)), documents=way)
    for task_bytes in [*range(1, 201), 1 << 30]:
        counts = Counts()
        assert read(corpus, task_bytes, counts) == expected, task_bytes
        assert counts == twin(NASTY, way)[1], task_bytes


MARK = "\ufeff"


@pytest.mark.parametrize("suffix", ["", ".gz"])
@pytest.mark.parametrize("way", ["blank_line", "line", "file"])
@pytest.mark.parametrize("text", [NASTY, "\none\n\ntwo", "one", "", "\n\n", f"o{MARK}\n\n{MARK}ne", " \n\u3000\n한"])
def test_a_byte_order_mark_is_not_text(tmp_path, monkeypatch, way, text, suffix):
    corpus = Corpus(
        "c", str(write(tmp_path / f"c.txt{suffix}", PACKERS[suffix]((MARK + text).encode()))), documents=way
    )
    for block_bytes in (1, 2, 5, 1 << 20):
        monkeypatch.setattr(borders, "BLOCK_BYTES", block_bytes)
        for task_bytes in [*range(1, 30), 1 << 30]:
            counts = Counts()
            assert read(corpus, task_bytes, counts) == twin(text, way)[0], task_bytes
            assert counts == twin(text, way)[1], task_bytes


def test_the_place_of_an_error_counts_the_byte_order_mark(tmp_path):
    content = MARK.encode() + b"caf\xe9\n" + b"fine\n" * 200
    corpus, counts = Corpus("c", str(write(tmp_path / "c.txt", content)), documents="line"), Counts()
    assert read(corpus, counts=counts)[0] == "caf\ufffd"
    assert counts.examples == [f"{corpus.path}: byte 6 is not UTF-8"]


def test_jsonl_with_a_byte_order_mark(tmp_path):
    corpus = Corpus("c", str(write(tmp_path / "c.jsonl", MARK + '{"text": "one"}\n{"text": "two"}\n')), format="jsonl")
    for task_bytes in range(1, 50):
        assert read(corpus, task_bytes) == ["one", "two"]


PARTS = [
    "a",
    "bc",
    "é",
    "🦉",
    "東",
    "あ",
    "\n",
    "\n",
    "\n\n",
    "\r\n",
    " ",
    "\t",
    "\f",
    "\v",
    "\u3000",
    "\u0085",
    "\x1c",
]


@pytest.mark.parametrize("way", ["blank_line", "line", "file"])
@pytest.mark.parametrize("seed", range(4))
def test_random_texts_read_as_by_the_plain_twin(tmp_path, tiny_blocks, way, seed):
    draw = random.Random(seed)
    for _ in range(120):
        parts = PARTS if draw.random() < 0.7 else draw.sample(PARTS, 3)
        text = "".join(draw.choices(parts, k=draw.randint(1, 80)))
        longest_bytes = draw.choice([16, 32, 48, 1 << 20])
        expected, expected_counts = twin(text, way, longest_bytes)
        corpus = Corpus("c", str(write(tmp_path / "c.txt", text)), documents=way)
        for task_bytes in (1, 2, 3, 5, 7, 11, 16, 33, 1 << 30):
            tiny_blocks(draw.choice([1, 2, 3, 7, 20, 1 << 20]), longest_bytes)
            counts = Counts()
            assert read(corpus, task_bytes, counts) == expected, (text, task_bytes, longest_bytes, borders.BLOCK_BYTES)
            assert counts == expected_counts, (text, task_bytes, longest_bytes, borders.BLOCK_BYTES)
            marked = Corpus("c", str(write(tmp_path / "marked.txt", MARK + text)), documents=way)
            assert read(marked, task_bytes) == expected, (text, task_bytes, longest_bytes, borders.BLOCK_BYTES)


@pytest.mark.parametrize("way", ["blank_line", "line", "file"])
@pytest.mark.parametrize("white", [" ", "\u3000", "\t\u3000", "\n "])
def test_long_runs_of_white_space_are_like_short_ones(tmp_path, tiny_blocks, way, white):
    for run in (1, 15, 16, 17, 40, 200):
        text = f"{white * run}one{white * run}two\n{white * run}\nthree{white * run}"
        expected, expected_counts = twin(text, way, 16)
        corpus = Corpus("c", str(write(tmp_path / "c.txt", text)), documents=way)
        for task_bytes in (1, 7, 50, 300, 1 << 30):
            tiny_blocks(4, 16)
            counts = Counts()
            assert read(corpus, task_bytes, counts) == expected, (run, task_bytes)
            assert counts == expected_counts


@pytest.mark.parametrize("spaces", [4094, 4095, 4096, 4097, 9000])
@pytest.mark.parametrize("white", [" ", "\u3000"])
def test_a_blank_line_of_any_length_ends_a_document(tmp_path, spaces, white):
    corpus = Corpus("c", str(write(tmp_path / "c.txt", f"one\n{white * spaces}\ntwo\n\nthree\n")))
    for task_bytes in range(spaces * len(white.encode()) - 2, spaces * len(white.encode()) + 12):
        assert read(corpus, task_bytes) == ["one", "two", "three"], task_bytes


@pytest.mark.parametrize("spaces", [4094, 4095, 4096, 4097, 9000])
def test_spaces_at_the_end_of_a_line_do_not_end_a_document(tmp_path, spaces):
    corpus = Corpus("c", str(write(tmp_path / "c.txt", f"one\ntwo{' ' * spaces}\nthree\n")))
    for task_bytes in range(spaces, spaces + 12):
        assert len(read(corpus, task_bytes)) == 1, task_bytes


@pytest.mark.parametrize("way", ["blank_line", "line"])
def test_a_slice_without_a_document_reads_nothing_after_its_end(tmp_path, monkeypatch, way):
    path = str(write(tmp_path / "c.txt", "x" * 5000))
    corpus = Corpus("c", path, documents=way)
    read_to = []
    monkeypatch.setattr(borders, "BLOCK_BYTES", 64)

    class Spy:
        def __init__(self, file):
            self.file = file

        def seek(self, offset):
            self.file.seek(offset)

        def read(self, size):
            block = self.file.read(size)
            read_to.append(self.file.tell())
            return block

    way_of_reading = borders.WAYS[way]
    with open(path, "rb", buffering=0) as file:
        assert way_of_reading.first_start(Spy(file), 1000, 2000) is None  # type: ignore[arg-type]
    assert 1900 < max(read_to) <= 2000
    assert list(read_documents(corpus, Task(0, (Slice(path, 1000, 2000),), 1000), Counts())) == []


@pytest.mark.parametrize("way", ["blank_line", "line", "file"])
def test_an_endless_document_is_read_in_parts_with_bounded_memory(tmp_path, tiny_blocks, way):
    import tracemalloc

    tiny_blocks(1 << 16, 1 << 18)
    with open(tmp_path / "c.txt", "wb") as file:
        for _ in range(64):
            file.write("много слов подряд ".encode() * 8000)
    corpus, counts = Corpus("c", str(tmp_path / "c.txt"), documents=way), Counts()
    tracemalloc.start()
    words = sum(text.count(" ") + 1 for text in read_documents(corpus, plan_tasks(corpus, 1 << 40)[0], counts))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert words == 64 * 8000 * 3
    assert counts.cut == 1
    assert counts.documents > 50
    assert peak < 8 << 20 < (tmp_path / "c.txt").stat().st_size


@pytest.mark.parametrize("way", ["blank_line", "line", "file"])
def test_endless_white_space_takes_no_memory(tmp_path, tiny_blocks, way):
    import tracemalloc

    tiny_blocks(1 << 16, 1 << 18)
    corpus = Corpus("c", str(write(tmp_path / "c.txt", "one" + " " * (12 << 20) + "two")), documents=way)
    tracemalloc.start()
    found = list(read_documents(corpus, Task(0, (Slice(corpus.path, 0, -1),), 1), Counts()))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert found == ["one", "two"]
    assert peak < 6 << 20


@pytest.mark.parametrize("suffix", PACKERS)
@pytest.mark.parametrize("way", ["blank_line", "line", "file"])
def test_text_in_any_language_and_packing(tmp_path, suffix, way):
    text = "\n\n".join(LANGUAGES * 3)
    corpus = Corpus("c", str(write(tmp_path / f"c.txt{suffix}", PACKERS[suffix](text.encode()))), documents=way)
    for task_bytes in (1, 17, 100, 1 << 30):
        assert read(corpus, task_bytes) == twin(text, way)[0], task_bytes
    assert len(plan_tasks(corpus, 1)) == 1 or not suffix


@pytest.mark.parametrize("suffix", PACKERS)
def test_jsonl_yields_the_text_field_of_each_line_for_every_slice_size(tmp_path, suffix):
    texts = [*LANGUAGES, "one\n\ntwo", " ", "żółw 한국어", "", "three"]
    lines = [json.dumps({"id": n, "body": text}, ensure_ascii=n % 2 == 0) for n, text in enumerate(texts)]
    content = "\n".join([*lines, "", json.dumps({"body": None})]).encode()
    path = write(tmp_path / f"c.jsonl{suffix}", PACKERS[suffix](content))
    corpus = Corpus("c", str(path), format="jsonl", text_column="body")
    expected = [*LANGUAGES, "one\n\ntwo", "żółw 한국어", "three"]
    for task_bytes in [*range(1, 201, 1 if not suffix else 99), 1 << 30]:
        counts = Counts()
        assert read(corpus, task_bytes, counts) == expected, task_bytes
        assert (counts.documents, counts.empty) == (8, 3)


@pytest.mark.parametrize(
    "line",
    ['{"body": "x"}', "[1, 2]", '"text"', "3", "null", '{"text": "cut', "[" * 200000, '{"text": "' + "x" * 500],
)
def test_a_bad_jsonl_line_is_named_by_file_and_byte(tmp_path, monkeypatch, line):
    monkeypatch.setattr(documents, "LONGEST_JSON_LINE_BYTES", 300000 if line.startswith("[[") else 300)
    good = '{"text": "fine"}\n'
    path = write(tmp_path / "c.jsonl", good + line + ("" if line.endswith("xx") else "\n"))
    with pytest.raises(DamagedDataError, match=rf"c\.jsonl: the line at byte {len(good)} .*'text'") as error:
        read(Corpus("c", str(path), format="jsonl"))
    assert error.value.exit_code == 65


def test_long_texts_of_records_are_cut_too(tmp_path, tiny_blocks):
    text = " ".join(f"слово{n}" for n in range(100))
    corpus = Corpus("c", str(write(tmp_path / "c.jsonl", json.dumps({"text": text}))), format="jsonl")
    tiny_blocks(1 << 20, 64)
    counts = Counts()
    assert read(corpus, counts=counts) == cut(text, 64)
    assert counts.cut == 1


def test_half_a_surrogate_pair_is_replaced_and_counted(tmp_path):
    lines = ['{"text": "fine"}\n'] * 199 + ['{"text": "a\\ud83eb \\ud83e\\udd89"}\n']
    counts = Counts()
    corpus = Corpus("c", str(write(tmp_path / "c.jsonl", "".join(lines))), format="jsonl")
    assert read(corpus, counts=counts)[-1] == "a\ufffdb 🦉"
    assert counts.encoding_errors == 1
    assert counts.examples == [f"{corpus.path}: the line at byte {199 * len(lines[0])} holds half of a surrogate pair"]


def damaged_text(num_documents: int, damaged: set[int], separator: str) -> bytes:
    words = [b"caf\xe9 \xe4" if n in damaged else "café".encode() for n in range(num_documents)]
    return separator.encode().join(words)


@pytest.mark.parametrize(("way", "separator"), [("blank_line", "\n\n"), ("line", "\n")])
@pytest.mark.parametrize("suffix", PACKERS)
def test_a_few_bytes_that_are_not_utf8_are_replaced_and_counted(tmp_path, way, separator, suffix):
    content = damaged_text(1000, {5, 400, 777}, separator)
    path = write(tmp_path / f"c.txt{suffix}", PACKERS[suffix](content))
    counts = Counts()
    found = read(Corpus("c", str(path), documents=way), 3000, counts)
    assert found == ["caf\ufffd \ufffd" if n in {5, 400, 777} else "café" for n in range(1000)]
    assert (counts.documents, counts.encoding_errors) == (1000, 3)
    places = [match.start() for match in re.finditer(rb"\xe9", content)]
    assert counts.examples == [f"{path}: byte {place} is not UTF-8" for place in places]


@pytest.mark.parametrize("way", ["blank_line", "line", "file"])
@pytest.mark.parametrize("suffix", PACKERS)
def test_a_file_in_another_encoding_is_damaged(tmp_path, way, suffix):
    content = damaged_text(1000, set(range(7, 1000, 9)), "\n\n")
    path = write(tmp_path / f"c.txt{suffix}", PACKERS[suffix](content))
    counts = Counts()
    place = rf"c\.txt{suffix}: byte {content.index(0xE9)} is not UTF-8"
    limit = "1% may in a corpus" if way == "file" else "10% may in a task"  # a single document is not many
    message = f"{place}; .*at most {limit}; .*iconv -f LATIN1 -t UTF-8"
    with pytest.raises(DamagedDataError, match=message) as error:
        read(Corpus("c", str(path), documents=way), counts=counts)
        refuse_other_encoding(counts)  # of a corpus; as one document it is not many
    assert error.value.exit_code == 65
    assert len(counts.examples) == (1 if way == "file" else 5)


def test_the_share_of_damaged_documents_is_that_of_the_corpus(tmp_path):
    """Damage that lies in one of its tasks is no other encoding."""
    corpus = Corpus("c", str(write(tmp_path / "c.txt", damaged_text(500, set(range(99)), "\n"))), documents="line")
    counts = Counts()
    assert len(read(corpus, counts=counts)) == 500
    with pytest.raises(DamagedDataError, match="99 of 500 documents"):
        refuse_other_encoding(counts)
    refuse_other_encoding(counts + Counts(documents=9400))
    with pytest.raises(DamagedDataError, match="198 of 1,000 documents"):
        read(corpus, counts=counts)


def test_a_damaged_document_is_no_reason_not_to_train_a_tokenizer(tmp_path):
    """A slice that is sampled may hold few documents."""
    content = b"\n".join([b"caf\xe9 " + b"x " * 2**19, *[b"word " * 2**17] * 3])
    corpus = Corpus("c", str(write(tmp_path / "c.txt", content)), documents="line")
    assert len(list(sample_paragraphs([corpus], [1.0], 2**25, 0, 0.0))) == 4


def test_jsonl_bytes_that_are_not_utf8(tmp_path):
    content = b'{"text": "ok"}\n' * 200 + b'{"text": "caf\xe9"}\n'
    corpus, counts = Corpus("c", str(write(tmp_path / "c.jsonl", content)), format="jsonl"), Counts()
    assert read(corpus, counts=counts)[-1] == "caf\ufffd"
    assert counts.examples == [f"{corpus.path}: byte {content.index(0xE9)} is not UTF-8"]


def test_counts_add_up_and_survive_json():
    one = Counts(1, 2, 3, 4, 5, ["a", "b", "c"])
    both = one + Counts(10, 20, 30, 40, 50, ["d", "e", "f"])
    assert both == Counts(11, 22, 33, 44, 55, ["a", "b", "c", "d", "e"])
    assert Counts(**json.loads(json.dumps(both.to_dict()))) == both
    assert one.examples == ["a", "b", "c"]


ROWS = [*LANGUAGES, "one\n\ntwo", None, " 둘 ", "", "three"]
ROWS_READ = [*LANGUAGES, "one\n\ntwo", "둘", "three"]


def write_table(path: Path, values=ROWS) -> Path:
    import pyarrow
    import pyarrow.parquet

    table = pyarrow.table({"body": values, "n": list(range(len(values)))})
    if path.suffix == ".parquet":
        pyarrow.parquet.write_table(table, path)
    else:
        with pyarrow.ipc.new_stream(path, table.schema) as writer:
            writer.write_table(table)
    return path


@pytest.mark.parametrize("kind", ["parquet", "arrow"])
@pytest.mark.parametrize("name", ["c", "part [0-9] *? {a}"])
def test_tables_yield_the_rows_that_have_text(tmp_path, kind, name):
    (tmp_path / name).mkdir()
    path = write_table(tmp_path / name / f"{name}.{kind}")
    counts = Counts()
    corpus = Corpus("c", str(path), format=kind, text_column="body")
    assert read(corpus, 1, counts) == ROWS_READ
    assert (counts.documents, counts.empty) == (8, 2)


def test_a_folder_of_tables_is_read_in_order(tmp_path):
    for n in range(3):
        write_table(tmp_path / f"{n}.parquet", [f"text {n}"])
    corpus = Corpus("c", str(tmp_path), format="parquet", text_column="body")
    assert read(corpus) == read(corpus, 1) == ["text 0", "text 1", "text 2"]


VALUES = [(3, "an int"), (0.5, "a float"), (True, "a bool"), (["x"], "a list"), ([], "a list"), ({"a": 1}, "a dict")]


@pytest.mark.parametrize(("value", "kind"), VALUES)
@pytest.mark.parametrize("format_", ["jsonl", "parquet", "arrow"])
def test_values_that_are_not_text_are_refused_not_spelled_out(tmp_path, value, kind, format_):
    path = tmp_path / f"c.{format_}"
    if format_ == "jsonl":
        write(path, "".join(json.dumps({"body": row}) + "\n" for row in (None, value)))
    else:
        write_table(path, [None, value])
    with pytest.raises(DamagedDataError, match=rf"c\.{format_}: .* holds {kind}, not text; set text_column"):
        read(Corpus("c", str(path), format=format_, text_column="body"))


@pytest.mark.parametrize("kind", ["parquet", "arrow"])
def test_tables_without_rows_have_no_documents(tmp_path, kind):
    import pyarrow

    (tmp_path / "_metadata").write_bytes(b"")
    write_table(tmp_path / f"a.{kind}", pyarrow.array([], pyarrow.string()))
    corpus = Corpus("c", str(tmp_path), format=kind, text_column="body")
    assert read(corpus) == []
    write_table(tmp_path / f"b.{kind}", ["text"])
    assert read(corpus) == ["text"]


def test_a_row_group_without_rows(tmp_path):
    import pyarrow
    import pyarrow.parquet

    empty = pyarrow.table({"text": pyarrow.array([], pyarrow.string())})
    with pyarrow.parquet.ParquetWriter(tmp_path / "c.parquet", empty.schema) as writer:
        writer.write_table(empty)
        writer.write_table(pyarrow.table({"text": ["one", "two"]}))
    assert read(Corpus("c", str(tmp_path), format="parquet")) == ["one", "two"]


def test_table_text_that_is_not_utf8_is_replaced_and_counted(tmp_path):
    values = [b"fine"] * 199 + [b"caf\xe9"]
    corpus = Corpus("c", str(write_table(tmp_path / "c.parquet", values)), format="parquet", text_column="body")
    counts = Counts()
    assert read(corpus, counts=counts)[-1] == "caf\ufffd"
    assert counts.examples == [f"{corpus.path}: row 199: byte 3 is not UTF-8"]


def test_parquet_without_the_column_names_the_columns_it_has(tmp_path):
    with pytest.raises(DamagedDataError, match="no column 'text'; it has body, n"):
        read(Corpus("c", str(write_table(tmp_path / "c.parquet")), format="parquet"))


@pytest.mark.parametrize("kind", ["parquet", "arrow"])
def test_a_table_cut_short_is_damaged(tmp_path, kind):
    whole = write_table(tmp_path / f"c.{kind}").read_bytes()
    path = write(tmp_path / f"cut.{kind}", whole[: len(whole) // 2])
    with pytest.raises(DamagedDataError, match=rf"cut\.{kind}: cannot be read as {kind}"):
        read(Corpus("c", str(path), format=kind, text_column="body"))


def test_an_arrow_stream_that_ends_between_two_batches_is_damaged(tmp_path):
    import pyarrow

    table = pyarrow.table({"body": ["one", "two", "three"]})
    with pyarrow.ipc.new_stream(tmp_path / "a.arrow", table.schema) as writer:
        writer.write_table(table, max_chunksize=1)
    whole = (tmp_path / "a.arrow").read_bytes()
    *_, last, end = (match.start() for match in re.finditer(b"\xff\xff\xff\xff", whole))
    corpus = Corpus("c", str(tmp_path / "a.arrow"), format="arrow", text_column="body")
    assert read(corpus) == ["one", "two", "three"]
    for cut in (end, last):
        (tmp_path / "a.arrow").write_bytes(whole[:cut])
        with pytest.raises(DamagedDataError, match=r"cannot be read as arrow \(a stream without the mark at its end"):
            read(corpus)


@pytest.mark.parametrize("way", ["blank_line", "file"])
@pytest.mark.parametrize("suffix", [".gz", ".xz", ".zst"])
@pytest.mark.parametrize("damage", ["cut", "flipped", "not compressed"])
def test_a_damaged_compressed_file_is_named(tmp_path, way, suffix, damage):
    text = "\n\n".join(f"document {zlib.crc32(bytes([n % 256, n // 256]))}" for n in range(2000)).encode()
    pack = {".gz": gzip.compress, ".xz": lzma.compress, ".zst": zstandard.ZstdCompressor(write_checksum=True).compress}
    packed = bytearray(pack[suffix](text))
    if damage == "cut":
        packed = packed[: len(packed) // 2]
    elif damage == "flipped":
        packed[len(packed) // 2] ^= 0xFF
    else:
        packed = bytearray(text)
    corpus = Corpus("c", str(write(tmp_path / f"c{suffix}", bytes(packed))), documents=way)
    with pytest.raises(DamagedDataError, match=rf"c\{suffix}: cannot be decompressed") as error:
        read(corpus)
    assert error.value.exit_code == 65


@pytest.mark.parametrize("suffix", PACKERS)
def test_a_disk_error_passes_through(tmp_path, suffix):
    corpus = Corpus("c", str(tmp_path / f"gone.txt{suffix}"))
    with pytest.raises(FileNotFoundError):
        list(read_documents(corpus, Task(0, (Slice(corpus.path, 0, -1),), 1), Counts()))


A, B = "\n\n".join(f"one {n}" for n in range(99)).encode(), b"\n\ntwo"


@pytest.mark.parametrize("suffix", [".gz", ".xz", ".zst"])
@pytest.mark.parametrize(
    "damage", ["no bytes", "junk", "header of the second", "cut in the second", "cut before its end"]
)
def test_what_follows_the_first_stream_is_not_passed_over(tmp_path, suffix, damage):
    pack = {".gz": gzip.compress, ".xz": lzma.compress, ".zst": zstandard.ZstdCompressor().compress}[suffix]
    first, second = pack(A), bytearray(pack(B))
    flipped = bytes([second[0] ^ 0xFF]) + second[1:]
    packed = {
        "no bytes": b"",
        "junk": first + b"junk, and more of it than a header has",
        "header of the second": first + flipped,
        "cut in the second": first + second[:8],
        "cut before its end": first + second[:-1],
    }[damage]
    write(tmp_path / "a.txt", "fine")
    write(tmp_path / f"c{suffix}", bytes(packed))
    with pytest.raises(DamagedDataError, match=rf"c\{suffix}: cannot be decompressed to its end") as error:
        read(Corpus("c", str(tmp_path)))
    assert error.value.exit_code == 65


@pytest.mark.parametrize("place", range(12))
def test_every_byte_of_a_later_xz_header_counts(tmp_path, place):
    second = bytearray(lzma.compress(B))
    second[place] ^= 1
    path = write(tmp_path / "c.xz", lzma.compress(A) + bytes(second))
    with pytest.raises(DamagedDataError, match=r"c\.xz: cannot be decompressed"):
        read(Corpus("c", str(path)))


@pytest.mark.parametrize("read_bytes", [1, 3, 4, 1 << 16])
@pytest.mark.parametrize(("between", "after"), [(0, 0), (4, 0), (8, 4), (0, 200_000), (2, 0), (3, 4), (0, 1)])
def test_xz_streams_may_have_padding_by_four_zeros(tmp_path, monkeypatch, read_bytes, between, after):
    monkeypatch.setattr(streams, "_READ_BYTES", read_bytes)
    packed = lzma.compress(A) + bytes(between) + lzma.compress(B) + bytes(after)
    corpus = Corpus("c", str(write(tmp_path / "c.xz", packed)), documents="file")
    if between % 4 or after % 4:
        with pytest.raises(DamagedDataError, match="padding after a stream is not a multiple of four bytes"):
            read(corpus)
    else:
        assert read(corpus) == [(A + B).decode()]


def test_an_xz_file_that_begins_with_padding_is_damaged(tmp_path):
    path = write(tmp_path / "c.xz", bytes(4) + lzma.compress(A))
    with pytest.raises(DamagedDataError, match=r"c\.xz: cannot be decompressed"):
        read(Corpus("c", str(path)))


def test_a_long_text_from_few_bytes_is_unpacked_in_pieces(tmp_path):
    import tracemalloc

    path = write(tmp_path / "c.xz", lzma.compress(b"a word of text\n" * (4 << 20), preset=0))
    tracemalloc.start()
    with streams.open_stream(str(path)) as file:
        size = sum(map(len, iter(lambda: file.read(1 << 16), b"")))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert size == 15 * (4 << 20)
    assert peak < 2 << 20


@pytest.mark.parametrize("suffix", [".GZ", ".Xz", ".ZST"])
def test_endings_in_capitals_are_endings(tmp_path, suffix):
    text = "\n\n".join(LANGUAGES)
    packed = PACKERS[suffix.lower()](text.encode())
    corpus = Corpus("c", str(write(tmp_path / f"C.TXT{suffix}", packed)))
    assert read(corpus, 10) == LANGUAGES
    assert len(plan_tasks(corpus, 10)) == 1
