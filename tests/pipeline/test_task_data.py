"""Rows of every kind of file, and what is wrong with them: file, row and reason."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline.errors import ConfigError, DamagedError
from pipeline.evaluation.task_file import TaskConfig
from pipeline.evaluation.tasks import Answer, Example, Question, TaggedSentence, Task

Read = Callable[..., list[Any]]
TAGGING = {"kind": "tagging", "text": ["0"], "label": "-1"}
FIELDS = {"kind": "tagging", "text": ["tokens"], "label": "tags"}
QA = {"kind": "question_answering"}
SCORES = {"kind": "regression", "label_range": [0, 5]}


@pytest.fixture
def read(tmp_path: Path) -> Read:
    """Writes a file and reads it as the training, or with ``split="T"`` as the test examples of a task."""

    def read(name: str, content: str | bytes | None = None, split: str = "train", **keys: Any) -> list[Any]:
        path = tmp_path / name
        if content is not None:
            path.write_bytes(content.encode() if isinstance(content, str) else content)
        about = {"name": "t", "kind": "classification", "train": name, "dev": name, "test": {"T": name}}
        config = TaskConfig.model_validate(about | ({} if "text" in keys or keys == QA else {"text": ["text"]}) | keys)
        return Task(config, {split: (path,)}).examples(split)

    return read


def tsv(*rows: str) -> str:
    return "".join(row.replace("|", "\t") + "\n" for row in rows)


def jsonl(*rows: Any) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


def squad(*questions: dict[str, Any], context: str = "The cat sat.") -> str:
    return json.dumps({"data": [{"title": "x", "paragraphs": [{"context": context, "qas": list(questions)}]}]})


def asked(**changes: Any) -> dict[str, Any]:
    return {"id": "q1", "question": "Who?", "answers": [{"text": "cat", "answer_start": 4}]} | changes


def test_tsv_takes_quotes_as_text(read: Read) -> None:
    content = "\ufeff" + tsv("text|more|label", 'say "hi|x|a', '"quoted"|y|b\r') + "\n"
    assert read("a.tsv", content) == [Example("0", ('say "hi',), "a"), Example("1", ('"quoted"',), "b")]


def test_columns_name_those_of_a_file_without_header(read: Read) -> None:
    keys = {"columns": ["source", "label", "mark", "text"], "id": "index"}
    assert read("a.tsv", tsv("g|1||One.", "g|0|*|Two."), **keys) == [
        Example("0", ("One.",), "1"),
        Example("1", ("Two.",), "0"),
    ]
    assert read("b.tsv", tsv("index|text", "7|Three."), split="T", **keys) == [Example("7", ("Three.",), None)]


def test_csv_takes_quotes_as_quotes(read: Read) -> None:
    content = 'text,label\n"one, ""two""\nthree",a\n\nfour,b\n'
    assert [example.texts[0] for example in read("a.csv", content)] == ['one, "two"\nthree', "four"]
    with pytest.raises(DamagedError, match=r"b\.csv:3: not CSV"):
        read("b.csv", 'text,label\none,a\n"two,b\n')


def test_json_and_its_lines(read: Read) -> None:
    rows = [{"text": "one", "label": True, "id": 5}, {"text": 2, "label": 1}]
    expected = [Example("5", ("one",), "true"), Example("1", ("2",), "1")]
    assert read("a.jsonl", jsonl(*rows) + "\n") == expected
    assert read("a.json", json.dumps(rows)) == expected


def test_parquet(read: Read, tmp_path: Path) -> None:
    table = pa.table({"text": ["one", "two"], "label": [0, 1], "other": [[1], [2]]})
    pq.write_table(table, tmp_path / "a.parquet")
    assert [example.label for example in read("a.parquet")] == ["0", "1"]
    features = {"info": {"features": {"label": {"names": ["no", "yes"], "_type": "ClassLabel"}}}}
    pq.write_table(table.replace_schema_metadata({"huggingface": json.dumps(features)}), tmp_path / "b.parquet")
    assert [example.label for example in read("b.parquet")] == ["no", "yes"]
    hub = {"path": "x", "fields": {"other": "label"}, "labels": ["nein", "ja"]}
    assert [example.label for example in read("b.parquet", hub=hub)] == ["nein", "ja"]
    pq.write_table(pa.table({"text": ["one", "two"], "label": [0.0, None]}), tmp_path / "c.parquet")
    with pytest.raises(DamagedError, match=r"c\.parquet: row 1: the label \(label\) is missing"):
        read("c.parquet", hub=hub)


def test_rows_are_counted_through_a_long_table(read: Read, tmp_path: Path) -> None:
    texts = ["one"] * 70_000  # more than are read at a time
    texts[66_000] = ""
    pq.write_table(pa.table({"text": texts, "label": ["a"] * len(texts)}), tmp_path / "a.parquet")
    with pytest.raises(DamagedError, match=r"a\.parquet: row 66000: text is empty"):
        read("a.parquet")


def test_numbers_of_classes_need_a_name(read: Read) -> None:
    hub = {"path": "x", "labels": ["a", "b"]}
    assert [example.label for example in read("a.jsonl", jsonl({"text": "one", "label": 1}), hub=hub)] == ["b"]
    with pytest.raises(DamagedError, match=r"a\.jsonl:1: label number 2 is none of the 2 classes a, b"):
        read("a.jsonl", jsonl({"text": "one", "label": 2}), hub=hub)
    with pytest.raises(DamagedError, match=r"a\.jsonl:1: the label \(label\) is missing"):
        read("a.jsonl", jsonl({"text": "one", "label": -1}), hub=hub)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.tsv", tsv("txt|label", "one|a"), r"a\.tsv: no column text; it has txt, label"),
        ("a.tsv", tsv("text|lable", "one|a"), r"a\.tsv: no column label; it has text, lable"),
        ("a.csv", "text\none\n", r"a\.csv: no column label; it has text"),
        ("a.tsv", "", r"a\.tsv: no examples in it; fetch"),
        ("a.tsv", tsv("text|label"), r"a\.tsv: no examples in it"),
        ("a.tsv", tsv("text|label", "one|a", "two"), r"a\.tsv:3: 1 cells, but there are 2 columns"),
        ("a.tsv", tsv("text|label", "one|a|b"), r"a\.tsv:2: 3 cells, but there are 2 columns"),
        ("a.tsv", tsv("text|label", "one|a", " |a"), r"a\.tsv:3: text is empty"),
        ("a.tsv", tsv("text|label", "one|"), r"a\.tsv:2: the label \(label\) is missing"),
        ("a.tsv", tsv("id|text|label", "x|one|a", "x|two|a"), r"a\.tsv:3: id 'x' occurs twice"),
        ("a.tsv", b"text\tlabel\ncaf\xe9\ta\n", r"a\.tsv:2: byte 3 is not UTF-8; convert"),
        ("a.jsonl", b'{"text": "caf\xe9"}\n', r"a\.jsonl:1: byte 13 is not UTF-8"),
        ("a.jsonl", '{"text": "one", "label": "a"}\n{"text"\n', r"a\.jsonl:2: not JSON"),
        ("a.jsonl", "[1]\n", r"a\.jsonl:1: a JSON object is wanted, not list"),
        ("a.jsonl", jsonl({"id": "x"}), r"a\.jsonl:1: no field text, label; the row has id"),
        ("a.jsonl", jsonl({"text": None, "label": "a"}), r"a\.jsonl:1: text is empty"),
        ("a.jsonl", jsonl({"text": ["one"], "label": "a"}), r"a\.jsonl:1: text is list, not a text"),
        ("a.jsonl", jsonl({"text": "one", "label": None}), r"a\.jsonl:1: the label \(label\) is missing"),
        ("a.jsonl", jsonl({"text": "one", "label": ["a"]}), r"a\.jsonl:1: label is list, not a class"),
        ("a.json", '[{"text": "one"}]', r"a\.json: object 0: no field label"),
        ("a.json", '{"text": "one"}', r"a\.json: not a list of objects"),
        ("a.json", '[\n{"text": ]', r"a\.json:2: not JSON"),
        ("a.parquet", "no parquet", r"a\.parquet: cannot be read as parquet"),
    ],
)
def test_wrong_rows_of_texts(read: Read, name: str, content: str | bytes, message: str) -> None:
    with pytest.raises(DamagedError, match=message) as refused:
        read(name, content)
    assert len(str(refused.value).splitlines()) == 1


def test_parquet_without_the_column(read: Read, tmp_path: Path) -> None:
    pq.write_table(pa.table({"sentence": ["one"], "label": [0]}), tmp_path / "a.parquet")
    with pytest.raises(DamagedError, match=r"a\.parquet: no column text; it has sentence, label"):
        read("a.parquet")


def test_labels_that_the_task_does_not_have(read: Read) -> None:
    with pytest.raises(DamagedError, match=r"a\.tsv:3: label 'c' is not among labels: a, b"):
        read("a.tsv", tsv("text|label", "one|a", "two|c"), labels=["a", "b"])


def test_a_file_of_a_kind_that_is_not_read(read: Read) -> None:
    with pytest.raises(ConfigError, match=r"a\.xlsx: files of this kind are not read; give \.tsv, \.csv"):
        read("a.xlsx", "x")


def test_scores(read: Read, tmp_path: Path) -> None:
    assert [e.label for e in read("a.tsv", tsv("text|label", "one|5.000", "two|0"), **SCORES)] == [5.0, 0.0]
    for value, reason in (
        ("high", "label 'high' is not a number"),
        ("nan", "label 'nan' is not a number"),
        ("inf", "label 'inf' is not a number"),
        ("5.5", "label 5.5 is outside label_range, 0 to 5"),
        ("-1", "label -1 is outside label_range"),
        ("", "is missing"),
    ):
        with pytest.raises(DamagedError, match=rf"a\.tsv:2: .*{reason}"):
            read("a.tsv", tsv("text|label", f"one|{value}"), **SCORES)
    assert read("a.tsv", tsv("text|label", "one|7"), kind="regression")[0].label == 7.0
    pq.write_table(pa.table({"text": ["one"], "label": [4.0]}), tmp_path / "a.parquet")
    assert read("a.parquet", **SCORES)[0].label == 4.0


def test_conll_columns(read: Read) -> None:
    content = "-DOCSTART- -X- O\n\n# NN B-NP\nCats NN I-NP\n\n \t\nrun\tVB\tB-VP\n\n\n"
    assert read("a.txt", content, **TAGGING) == [
        TaggedSentence("0", ("#", "Cats"), ("B-NP", "I-NP")),
        TaggedSentence("1", ("run",), ("B-VP",)),
    ]
    assert read("b.anything", "Cats\nrun\n", split="T", **TAGGING) == [TaggedSentence("0", ("Cats", "run"), None)]


def test_spaces_that_belong_to_a_word_stay_in_it(read: Read) -> None:
    content = "10\u00a0000 B-NUM\n\u3000  O\n"
    assert read("a.txt", content, **TAGGING) == [TaggedSentence("0", ("10\u00a0000", "\u3000"), ("B-NUM", "O"))]


def test_conll_u_has_comments_and_words_that_are_none(read: Read) -> None:
    lines = ["# text = x", "1-2|don't|_|_", "1|do|do|AUX", "2|n't|not|PART", "2.1|x|x|X", "", "# y", "1|#|#|SYM"]
    keys = {"kind": "tagging", "text": ["1"], "label": "3"}
    assert read("a.conllu", tsv(*lines), **keys) == [
        TaggedSentence("0", ("do", "n't"), ("AUX", "PART")),
        TaggedSentence("1", ("#",), ("SYM",)),
    ]


def test_tagged_sentences_of_tables(read: Read, tmp_path: Path) -> None:
    row = {"tokens": ["a", "b"], "tags": ["X", "Y"], "id": "s"}
    expected = [TaggedSentence("s", ("a", "b"), ("X", "Y"))]
    assert read("a.jsonl", jsonl(row), **FIELDS) == expected
    assert read("b.jsonl", jsonl(row | {"tags": [0, 1]}), hub={"path": "x", "labels": ["X", "Y"]}, **FIELDS) == expected
    table = pa.table({"tokens": [["a", "b"]], "tags": [[0, 1]], "id": ["s"]})
    names = {"names": ["X", "Y"], "_type": "ClassLabel"}
    for number, feature in enumerate(({"feature": names, "_type": "List"}, [names])):
        about = json.dumps({"info": {"features": {"tags": feature}}})
        pq.write_table(table.replace_schema_metadata({"huggingface": about}), tmp_path / f"{number}.parquet")
        assert read(f"{number}.parquet", **FIELDS) == expected
        fields = {"path": "x", "fields": {"tokens": "0", "tags": "-1"}}
        assert read(f"{number}.parquet", hub=fields, **TAGGING) == expected


@pytest.mark.parametrize(
    ("name", "content", "keys", "message"),
    [
        ("a.txt", "a X\nb\n\n", TAGGING, r"a\.txt:1: in this sentence line 2 has 1 column, but a word and its tag"),
        ("a.txt", "a X\n\nb Y\n", TAGGING | {"label": "2"}, r"a\.txt:1: .*line 1 has 2 columns, too few for 0, 2"),
        ("a.txt", "a X\n", FIELDS, r"a\.txt: 'tokens' is no column number"),
        ("a.txt", "\n\n", TAGGING, r"a\.txt: no examples"),
        ("a.txt", "a\t\n", TAGGING, r"a\.txt:1: number 0 of the tags is empty"),
        ("a.txt", b"a X\n\xe9 Y\n", TAGGING, r"a\.txt:2: byte 0 is not UTF-8"),
        ("a.jsonl", jsonl({"tokens": [], "tags": []}), FIELDS, r"a\.jsonl:1: a sentence without words"),
        ("a.jsonl", jsonl({"tokens": ["a"], "tags": ["X", "Y"]}), FIELDS, r"a\.jsonl:1: 1 words, but 2 tags"),
        ("a.jsonl", jsonl({"tokens": "a b", "tags": ["X"]}), FIELDS, r"a\.jsonl:1: the words are str, not a list"),
        ("a.jsonl", jsonl({"tokens": ["a"], "tags": [3]}), FIELDS, r"a\.jsonl:1: tag number 3 has no name"),
        ("a.jsonl", jsonl({"tokens": ["a", ""], "tags": ["X", "Y"]}), FIELDS, r"number 1 of the words is empty"),
    ],
)
def test_wrong_sentences(read: Read, name: str, content: str | bytes, keys: dict[str, Any], message: str) -> None:
    with pytest.raises((DamagedError, ConfigError), match=message):
        read(name, content, **keys)


def test_a_sentence_with_a_bad_line_is_skipped_whole(read: Read) -> None:
    sentences = read("a.txt", "a X\nb\nc Y\n\nd X\n", bad_rows="skip", **TAGGING)
    assert [sentence.words for sentence in sentences] == [("d",)]


def test_squad_files(read: Read) -> None:
    two = [{"text": "cat", "answer_start": 4}, {"text": "The cat", "answer_start": 0}]
    expected = [Question("q1", "Who?", "The cat sat.", (Answer("cat", 4), Answer("The cat", 0)))]
    assert read("a.json", squad(asked(answers=two)), **QA) == expected
    flat = {"id": "q1", "question": "Who?", "context": "The cat sat."}
    columns = {"answers": {"text": ["cat", "The cat"], "answer_start": [4, 0]}}
    assert read("a.jsonl", jsonl(flat | columns), **QA) == expected
    assert read("b.json", json.dumps([flat | columns]), **QA) == expected
    assert read("c.json", squad(asked(answers=[])), split="T", **QA) == [Question("q1", "Who?", "The cat sat.", ())]
    assert read("c.jsonl", jsonl(flat), split="T", **QA) == [Question("q1", "Who?", "The cat sat.", ())]


def test_questions_without_answer(read: Read) -> None:
    second = QA | {"no_answer": True, "text": ["question", "context"]}
    possible, impossible = asked(is_impossible=False), asked(id="q2", answers=[], is_impossible=True)
    assert [len(q.answers) for q in read("a.json", squad(possible, impossible), **second)] == [1, 0]
    flat = {"id": "q", "question": "Who?", "context": "x", "answers": {"text": [], "answer_start": []}}
    assert read("a.jsonl", jsonl(flat), **second)[0].answers == ()
    for question, reason in (
        (asked(is_impossible=True), "is_impossible, but it has answers"),
        (asked(answers=[], is_impossible=False), "it has no answer, but is not marked is_impossible"),
        (asked(answers=[]), "it has no answer, but is not marked is_impossible"),
    ):
        with pytest.raises(DamagedError, match=rf"b\.json: question 'q1': {reason}"):
            read("b.json", squad(question), **second)
    with pytest.raises(DamagedError, match=r"question 'q2': it has no answer, which SQuAD 1\.1 does not know"):
        read("c.json", squad(possible, impossible), **QA)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (squad(asked(answers=[{"text": "dog", "answer_start": 4}])), "question 'q1': answer 'dog' is not at answer_st"),
        (squad(asked(answers=[{"text": "cat", "answer_start": -8}])), "answer 'cat' is not at answer_start -8"),
        (squad(asked(answers=[{"text": "cat"}])), "the answers do not have a text and an answer_start each"),
        (squad(asked(answers=[{"text": "", "answer_start": 1}])), "answer '' at 1 is not a text and a number"),
        (squad(asked(id=None)), r"a\.json: question 0 \(counted from 0\): a question without id"),
        (squad(asked(), asked()), "question 'q1': id 'q1' occurs twice"),
        (squad(asked(question=" ")), "question 'q1': question is empty"),
        (squad(asked(question=None)), "question 'q1': it has no text under the key question"),
        (squad(asked(), context=""), "question 'q1': context is empty"),
        (squad(), r"a\.json: no examples"),
        ('{"data": 5}', r"a\.json: not in SQuAD's layout"),
        ('{"data": [{"paragraphs": [{"qas": [{}]}]}]}', r"not in SQuAD's layout .*'context'"),
        ('{"data": [\n', r"a\.json:2: not JSON"),
        (b'{"data": "\xe9"}', r"a\.json:1: byte 10 is not UTF-8"),
        ("[{}]", r"object 0: no field question, context, answers; the row has none"),
    ],
)
def test_wrong_questions(read: Read, content: str | bytes, message: str) -> None:
    with pytest.raises(DamagedError, match=message):
        read("a.json", content, **QA)
