"""Task files, which files hold which split, and the checks over a whole task."""

import json
import logging
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline.errors import ConfigError, DamagedError
from pipeline.evaluation import tasks as tasks_module
from pipeline.evaluation.task_file import BUNDLED, TaskConfig, read_task_file
from pipeline.evaluation.tasks import Task, load_task_configs, load_tasks

HEAD = "name: t\nkind: classification\ntext: [text]\ntrain: train.tsv\ndev: dev.tsv\n"
Write = Callable[..., Path]


@pytest.fixture
def write(tmp_path: Path) -> Write:
    def write(name: str, content: str | bytes) -> Path:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content.encode() if isinstance(content, str) else content)
        return path

    return write


@pytest.fixture
def said(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> Iterator[pytest.LogCaptureFixture]:
    monkeypatch.setattr(tasks_module, "_SAID", set())
    monkeypatch.setattr(logging.getLogger("electra"), "propagate", True)
    with caplog.at_level(logging.INFO, logger="electra"):
        yield caplog


def load(*tasks: Path | str, data_dir: Path | None = None) -> list[Task]:
    return load_tasks(config(*tasks, data_dir=data_dir))


def config(*tasks: Path | str, data_dir: Path | None = None):
    return SimpleNamespace(evaluate=SimpleNamespace(tasks=tuple(map(str, tasks)), data_dir=data_dir))


def tsv(*rows: str) -> str:
    return "".join(row.replace("|", "\t") + "\n" for row in rows)


@pytest.fixture
def small(write: Write) -> Path:
    write("train.tsv", tsv("id|text|label", "x|one|a", "y|two|b"))
    write("dev.tsv", tsv("id|text|label", "z|three|a"))
    return write("t.yaml", HEAD)


def parquet(path: Path, columns: dict[str, list]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table(columns), path)
    return path


def test_every_bundled_task_is_valid() -> None:
    names = {path.stem for path in BUNDLED.glob("*.yaml")}
    glue = {"cola", "sst2", "mrpc", "stsb", "qqp", "mnli", "qnli", "rte", "wnli"}
    assert names == glue | {"squad1", "squad2", "chunk", "ner", "wnut17", "authorship", "continuation"}
    configs = {name: read_task_file(name)[0] for name in names}
    assert all(config.name == name for name, config in configs.items())
    assert {name for name, config in configs.items() if config.in_glue_average} == glue - {"wnli"}
    assert {name for name, config in configs.items() if config.mnli_init} == {"rte", "stsb", "mrpc"}
    assert {name for name, config in configs.items() if config.symmetric} == {"mrpc", "stsb"}
    assert [configs[name].recipe.epochs for name in ("rte", "stsb", "squad1", "squad2", "cola")] == [10, 10, 2, 2, None]
    assert configs["chunk"].tag_scheme == "bioes"
    submitted = {name for config in configs.values() for name in config.test}
    assert submitted == {"CoLA", "SST-2", "MRPC", "STS-B", "QQP", "MNLI-m", "MNLI-mm", "QNLI", "RTE", "WNLI", "AX"}
    for config in configs.values():
        if config.hub:
            assert set(config.hub.splits) == set(config.file_names()), config.name


def test_bundled_samples_are_found_beside_their_task_files_whatever_data_dir_is(tmp_path: Path) -> None:
    counts = [[len(task.examples(split)) for split in ("train", "dev")] for task in load("authorship", "continuation")]
    assert counts == [[1800, 460], [1658, 462]]
    (task,) = load("authorship", data_dir=tmp_path)
    assert len(task.classes() or ()) == 4


def test_a_task_like_another(write: Write, tmp_path: Path) -> None:
    write("mine.tsv", tsv("index|question|sentence|label", "0|q|s|entailment", "1|q|s|not_entailment"))
    write("QNLI/dev.tsv", tsv("index|question|sentence|label", "7|q|s|entailment"))
    path = write("mine.yaml", "like: qnli\ntrain: mine.tsv\nrecipe: {epochs: 5}\n")
    (task,) = load(path)
    assert (task.name, task.classes()) == ("qnli", ("entailment", "not_entailment"))
    assert [example.id for example in task.examples("dev")] == ["7"]
    assert task.config.recipe.epochs == 5
    other = write("folder/other.yaml", "like: ../mine.yaml\nname: other\nrecipe: {lr: 1e-4}\n")
    (task,) = load(other)  # its files lie where the other's do
    assert task.files["train"] == (tmp_path / "mine.tsv",)
    assert (task.config.recipe.epochs, task.config.recipe.lr) == (5, 1e-4)


def test_an_own_file_that_is_missing_is_not_taken_from_the_hub(write: Write, tmp_path: Path) -> None:
    write("QNLI/dev.tsv", tsv("index|question|sentence|label", "7|q|s|entailment"))
    parquet(tmp_path / "nyu-mll/glue/qnli/train.parquet", {"question": ["q"], "sentence": ["s"], "label": [0]})
    path = write("mine.yaml", "like: qnli\ntrain: mine.tsv\n")
    with pytest.raises(ConfigError, match=r"mine\.tsv, which is not there; put the data in place or .*data_dir$"):
        load(path, data_dir=tmp_path)
    assert load("qnli", data_dir=tmp_path)[0].files["train"][0].name == "train.parquet"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("- a\n- b\n", "content: a task file is a mapping"),
        ("name: t\nkind: [\n", r"t\.yaml:3: not valid YAML"),
        (HEAD + "name: u\n", r"t\.yaml:6: not valid YAML"),
        (HEAD + "lable: x\n", "unknown key lable: a task has like, name"),
        (HEAD.replace("dev: dev.tsv\n", ""), "dev: missing; add it"),
        (HEAD.replace("classification", "guessing"), "kind='guessing': Input should be 'classification'"),
        (HEAD.replace("name: t", "name: a/b"), "name='a/b': String should match"),
        (HEAD.replace("classification", "pair"), "kind pair needs 2 text fields, not 1"),
        (HEAD.replace("classification", "question_answering"), "question_answering needs 2 text fields, not 1"),
        (HEAD.replace("[text]", "[a, b]").replace("classification", "tagging"), "tagging needs 1 text field, not 2"),
        (HEAD + "metrics: [spearman]\n", "classification has no metric spearman; it has accuracy, f1, matthews"),
        (HEAD + "metrics: [f1, f1]\n", "metrics names one twice"),
        ("like: squad1\nmetrics: [best_f1]\n", "need no_answer: true"),
        (HEAD + "labels: [a, a]\n", "two or more different classes"),
        (HEAD + "labels: [a]\n", "two or more different classes"),
        (HEAD + "labels: [a, b]\npositive: c\n", "positive: 'c' is not one of labels"),
        (HEAD + "label_range: [0, 5]\n", "label_range is only for kind regression"),
        ("like: stsb\nlabel_range: [5, 0]\n", "label_range: 5 is not below 0"),
        (HEAD + "tag_scheme: bioes\n", "tag_scheme is only for kind tagging"),
        (HEAD + "no_answer: true\n", "no_answer is only for kind question_answering"),
        (HEAD + "symmetric: true\n", "symmetric is only for kind pair"),
        (HEAD + "columns: [a, label]\n", "columns has no text"),
        (HEAD + "also: {dev: x.tsv}\n", "two parts are called dev"),
        (HEAD + "test: {a/b: x.tsv}\n", "no slash"),
        ("like: squad2\ntest: {answered: x.json}\n", "no part can be called answered"),
        (HEAD + "hub: {path: p, splits: {tset: test}}\n", "hub.splits: there is no tset"),
        ("like: nonsense\n", r"t\.yaml: like: no task 'nonsense'"),
        ("like: t.yaml\n", "leads back to this file"),
        ("like: 5\n", "like: 5 is not a name"),
    ],
)
def test_a_wrong_task_file_is_refused_in_one_line(write: Write, content: str, message: str) -> None:
    path = write("t.yaml", content)
    with pytest.raises(ConfigError, match=message) as refused:
        read_task_file(str(path))
    assert len(str(refused.value).splitlines()) == 1
    assert "t.yaml" in str(refused.value)


def test_a_task_file_that_is_not_utf_8(write: Write) -> None:
    with pytest.raises(ConfigError, match=r"t\.yaml: byte 6 is not UTF-8"):
        read_task_file(str(write("t.yaml", b"name: \xe9")))


def test_metrics_and_fields_follow_the_kind() -> None:
    qa = TaskConfig.model_validate({"name": "q", "kind": "question_answering", "train": "a", "dev": "b"})
    assert (qa.text, qa.label, qa.metrics) == (("question", "context"), "answers", ("exact", "f1"))
    score = {"name": "s", "kind": "regression", "train": "a", "dev": "b", "text": ["x"]}
    assert TaskConfig.model_validate(score).metrics == ("spearman", "pearson")


def test_tasks_that_cannot_be_loaded(small: Path, write: Write, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"evaluate\.tasks is empty"):
        load()
    with pytest.raises(ConfigError, match=r"no task 'nonsense' .*; bundled are authorship, chunk, cola"):
        load("nonsense")
    with pytest.raises(ConfigError, match="two tasks have the same name among t, t"):
        load(small, write("again.yaml", HEAD))
    with pytest.raises(ConfigError, match=r"CoLA/train\.tsv, which is not there; .*electra evaluate CONFIG --prefetch"):
        load("cola", data_dir=tmp_path)
    (tmp_path / "dev.tsv").unlink()
    with pytest.raises(ConfigError, match=r"dev\.tsv, which is not there; put the data .* set evaluate\.data_dir$"):
        load(small)
    assert [task.name for task in load_task_configs(config(small, "cola"))] == ["t", "cola"]


def test_data_dir_goes_before_the_task_files_folder(small: Path, write: Write, tmp_path: Path) -> None:
    there = write("there/train.tsv", tsv("text|label", "one|a", "two|b"))
    (task,) = load(small, data_dir=tmp_path / "there")
    assert task.files == {"train": (there,), "dev": (tmp_path / "dev.tsv",)}


def test_another_ending_and_shards_stand_in(small: Path, write: Write, tmp_path: Path) -> None:
    (tmp_path / "dev.tsv").unlink()
    write("dev.jsonl", '{"text": "three", "label": "a", "id": 5}\n')
    (tmp_path / "train.tsv").unlink()
    for number, label in enumerate("ab"):
        parquet(tmp_path / f"train-0000{number}-of-00002.parquet", {"text": [f"t{number}"], "label": [label]})
    (task,) = load(small)
    assert [(example.id, example.texts) for example in task.examples("train")] == [("0", ("t0",)), ("1", ("t1",))]
    assert [example.id for example in task.examples("dev")] == ["5"]
    (tmp_path / "train-00000-of-00002.parquet").unlink()
    with pytest.raises(DamagedError, match="1 of 2 shards are in"):
        load(small)


@pytest.mark.parametrize("folder", ["nyu-mll/glue/mnli", "glue/mnli/data", "mnli", "nyu-mll/glue/data/mnli"])
def test_the_hubs_own_layout(folder: str, tmp_path: Path) -> None:
    columns = {"premise": ["p1", "p2"], "hypothesis": ["h1", "h2"], "label": [0, 2], "idx": [10, 11]}
    parquet(tmp_path / folder / "train-00000-of-00001.parquet", columns)
    parquet(tmp_path / folder / "validation_matched.parquet", columns)
    rows = [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]
    (tmp_path / folder / "validation_mismatched.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    parquet(tmp_path / folder / "test_matched.parquet", columns | {"label": [-1, -1]})
    parquet(tmp_path / folder.replace("mnli", "ax") / "test.parquet", {**columns, "label": [-1, -1]})
    if folder.startswith("nyu"):  # of another configuration, and nothing to mnli
        parquet(tmp_path / "nyu-mll/glue/test_mismatched.parquet", columns)
    (task,) = load("mnli", data_dir=tmp_path)
    assert task.parts() == ["dev", "mismatched"]
    assert task.tests() == ["MNLI-m", "AX"]
    for split in ("train", "dev", "mismatched"):
        assert [(e.id, e.texts, e.label) for e in task.examples(split)] == [
            ("10", ("p1", "h1"), "entailment"),
            ("11", ("p2", "h2"), "contradiction"),
        ]
    assert [example.label for example in task.examples("AX")] == [None, None]


def test_a_hub_dataset_without_configuration_may_be_data_dir_itself(tmp_path: Path) -> None:
    answers = [{"text": ["b"], "answer_start": [2]}]
    columns = {"id": ["x"], "question": ["q"], "context": ["a b"], "answers": answers}
    for split in ("train", "validation"):
        parquet(tmp_path / "data" / f"{split}-00000-of-00001.parquet", columns)
    (task,) = load("squad1", data_dir=tmp_path)
    assert task.examples("dev")[0].answers[0].start == 2


def test_two_datasets_in_one_place_are_refused(tmp_path: Path) -> None:
    answers = [{"text": ["b"], "answer_start": [2]}, {"text": [], "answer_start": []}]
    columns = {"id": ["x", "y"], "question": ["q", "r"], "context": ["a b", "a b"], "answers": answers}
    folder = tmp_path / "rajpurkar/squad_v2"
    for split in ("train", "validation"):
        parquet(folder / f"{split}-00000-of-00001.parquet", columns)
    (task,) = load("squad2", data_dir=folder)
    task.check()
    with pytest.raises(
        ConfigError, match=r"squad1 and squad2 would both read .*, which cannot be both rajpurkar/squad "
    ):
        load("squad1", "squad2", data_dir=folder)
    for split in ("train", "validation"):
        parquet(tmp_path / f"rajpurkar/squad/{split}.parquet", {name: values[:1] for name, values in columns.items()})
    assert len(load("squad1", "squad2", data_dir=tmp_path)) == 2
    (task,) = load("squad2", data_dir=tmp_path / "rajpurkar/squad")
    with pytest.raises(ConfigError, match=r"no_answer: true, but every question has an answer, as in SQuAD 1\.1"):
        task.check()


def test_parts_that_are_not_there_are_said_once(small: Path, write: Write, said: pytest.LogCaptureFixture) -> None:
    small.write_text(HEAD + "also: {more: more.tsv, other: other.tsv}\ntest: {T: test.tsv}\n")
    write("other.tsv", tsv("text|label", "four|b"))
    for _ in range(2):
        (task,) = load(small)
    assert (task.parts(), task.tests()) == (["dev", "other"], [])
    assert set(task.files) == {"train", "dev", "other"}
    assert [record.getMessage() for record in said.records] == [
        "evaluate: task t: no file for more, T; scored and predicted without"
    ]


def test_examples_are_read_once(small: Path) -> None:
    (task,) = load(small)
    assert task.examples("dev") is task.examples("dev")
    assert [(e.id, e.texts, e.label) for e in task.examples("train")] == [("x", ("one",), "a"), ("y", ("two",), "b")]
    assert task.classes() == ("a", "b")
    assert task.kind == "classification"


def test_the_digest_follows_content_and_meaning_not_places(small: Path, write: Write, tmp_path: Path) -> None:
    before = load(small)[0].digest()
    for name in ("train.tsv", "dev.tsv"):
        (tmp_path / "moved").mkdir(exist_ok=True)
        (tmp_path / "moved" / name.replace("train", "learn")).write_bytes((tmp_path / name).read_bytes())
    moved = write("moved/t.yaml", HEAD.replace("train.tsv", "learn.tsv"))
    assert load(moved)[0].digest() == before
    seen = {before}
    for change in ("metrics: [f1]\n", "positive: a\n", "labels: [b, a]\n", "recipe: {epochs: 4}\n", "id: other\n"):
        small.write_text(HEAD + change)
        seen.add(load(small)[0].digest())
    small.write_text(HEAD + "test: {T: test.tsv}\n")
    write("test.tsv", tsv("text", "five"))
    seen.add(load(small)[0].digest())
    write("test.tsv", tsv("text", "six"))
    seen.add(load(small)[0].digest())
    assert len(seen) == 8
    small.write_text(HEAD)
    write("dev.tsv", tsv("id|text|label", "z|three|b"))
    assert load(small)[0].digest() not in seen


def test_classes(small: Path, write: Write) -> None:
    small.write_text(HEAD + "labels: [b, c, a]\n")
    assert load(small)[0].classes() == ("b", "c", "a")
    small.write_text(HEAD + "positive: c\n")
    with pytest.raises(ConfigError, match="positive: 'c' is not among a, b"):
        load(small)[0].check()
    small.write_text(HEAD)
    write("train.tsv", tsv("text|label", "one|a", "two|a"))
    with pytest.raises(DamagedError, match=r"train\.tsv: one class only, a;"):
        load(small)[0].check()


def test_a_class_that_only_dev_has(small: Path, write: Write) -> None:
    write("dev.tsv", tsv("id|text|label", "y|two|b", "z|three|c"))
    with pytest.raises(ConfigError, match=r"dev\.tsv: only the dev file has c \(first: example z\); train has a, b"):
        load(small)[0].examples("dev")
    write("dev.tsv", tsv("text|label", "three|b"))  # the other way round is nothing wrong
    load(small)[0].check()


def test_a_tag_that_only_dev_has_is_a_warning(write: Write, said: pytest.LogCaptureFixture) -> None:
    write("train.txt", "a B-X\nb I-X\n\nc O\n")
    write("dev.txt", "a B-X\nb I-Y\n\nb I-Y\n")
    path = write("t.yaml", 'name: t\nkind: tagging\ntrain: train.txt\ndev: dev.txt\ntext: ["0"]\nlabel: "-1"\n')
    (task,) = load(path)
    task.check()
    assert task.classes() == ("B-X", "I-X", "O")
    assert len(task.examples("dev")) == 2
    assert "has tags that train lacks, never to be right: I-Y (2)" in said.text


def test_bad_rows_are_skipped_and_counted_but_not_in_a_test_file(
    small: Path, write: Write, said: pytest.LogCaptureFixture
) -> None:
    rows = ("id|text|label", "1|one|a", "2|cut", "3||b", "4|four|b", "4|again|b", "5|five|")
    write("train.tsv", tsv(*rows))
    with pytest.raises(DamagedError, match=r"train\.tsv:3: 2 cells, but there are 3 columns; correct the file"):
        load(small)[0].check()
    small.write_text(HEAD + "bad_rows: skip\ntest: {T: test.tsv}\n")
    write("test.tsv", tsv("id|text", "1|one", "2|", "3"))
    (task,) = load(small)
    assert [example.id for example in task.examples("train")] == ["1", "4"]
    assert "4 rows of train are left out (bad_rows: skip), the first is" in said.text
    assert "train.tsv:3: 2 cells" in said.text
    with pytest.raises(DamagedError, match=r"test\.tsv:4: 1 cell, but there are 2 columns|test\.tsv:4: "):
        task.examples("T")
    write("test.tsv", tsv("id|text", "1|one", "2|"))
    (task,) = load(small)
    assert [example.texts for example in task.examples("T")] == [("one",), ("",)]  # each row has to be predicted
