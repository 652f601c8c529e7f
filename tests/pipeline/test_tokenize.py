"""The tokenize stage as its users meet it: killed, out of space, with several processes at once."""

import json
import os
import random
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from data_shards.build import Progress, Share
from data_shards.keys import content_key, tokenizer_inputs
from data_shards.tokenizer_files import TokenizerSettings
from pipeline import tokenize
from pipeline.config_file import load_config
from pipeline.keys import science_of
from pipeline.tokenize import corpora_of, tokenize_inputs
from tests.conftest import Electra, clean_environment, command, make_text

TASK_BYTES = 100_000


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Some 6 MB of text: sixty tasks of two seconds in all."""
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text("\n".join(make_text(1000, seed=seed) for seed in range(18)), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def arguments(text: Path, shared_config: Path) -> list[str]:
    return [
        str(shared_config), f'data.corpora=[{{"name": "text", "path": "{text}"}}]', f"data.task_bytes={TASK_BYTES}",
        "run.name=tokenized",
    ]  # fmt: skip


@pytest.fixture(scope="module")
def uninterrupted(arguments: list[str], electra: Electra, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """The shards of a run by one process that nothing happened to."""
    run_dir = tmp_path_factory.mktemp("uninterrupted")
    electra("tokenize", *arguments, f"run.dir={run_dir}", "data.num_workers=1")
    return content_of(run_dir)


def content_of(run_dir: Path) -> dict[str, bytes]:
    """Every file of tokenizers and shards."""
    roots = [run_dir / "shards", run_dir / "tokenizers"]
    return {str(p.relative_to(run_dir)): p.read_bytes() for root in roots for p in root.rglob("*") if p.is_file()}


def start(*arguments: object, new_session: bool = False, **environment: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        command("tokenize", *arguments), env=clean_environment(**environment), stderr=subprocess.PIPE, text=True,
        start_new_session=new_session,
    )  # fmt: skip


def num_records(run_dir: Path) -> int:
    return len(list(run_dir.glob("shards/*/tasks/*.json")))


def test_killed_five_times_at_random_it_ends_with_the_same_bytes(arguments, uninterrupted, electra, tmp_path):
    run_dir, draw = f"run.dir={tmp_path}", random.Random(3)
    num_tasks = sum("/tasks/" in name for name in uninterrupted)
    assert num_tasks > 50
    kills = [0, *sorted(draw.sample(range(1, num_tasks // 2), 4))]  # the first while the tokenizer is made
    for num_workers, after_records in zip((2, 2, 3, 2, 1), kills, strict=True):
        process = start(*arguments, run_dir, f"data.num_workers={num_workers}", new_session=True)
        while num_records(tmp_path) < after_records:
            assert process.poll() is None, "it ended before it was killed"
            time.sleep(0.002)
        time.sleep(draw.uniform(0, 2.0 if after_records == 0 else 0.05))
        os.kill(process.pid, signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL
        process.stderr.close()
        wait_until_gone(process.pid)
    assert num_records(tmp_path) < num_tasks
    electra("tokenize", *arguments, run_dir, "data.num_workers=2")
    assert content_of(tmp_path) == uninterrupted


@pytest.mark.parametrize("number", [signal.SIGUSR2, signal.SIGTERM])
def test_a_signal_to_every_process_stops_it_with_what_is_done_kept(arguments, uninterrupted, electra, tmp_path, number):
    process = start(*arguments, f"run.dir={tmp_path}", "data.num_workers=2", new_session=True)
    while num_records(tmp_path) < 3:
        assert process.poll() is None, "it ended before it was stopped"
        time.sleep(0.002)
    os.killpg(process.pid, number)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 85, said
    assert "finished tasks are kept" in said
    assert 3 <= num_records(tmp_path) < sum("/tasks/" in name for name in uninterrupted)
    assert "Traceback" not in said
    wait_until_gone(process.pid)
    electra("tokenize", *arguments, f"run.dir={tmp_path}", "data.num_workers=2")
    assert content_of(tmp_path) == uninterrupted


def test_a_stop_does_not_wait_for_a_long_task_nor_for_the_tokenizer(arguments, uninterrupted, text, tmp_path):
    import gzip

    packed = gzip.compress(text.read_bytes() * 8, 1)
    for name in ("long", "other"):
        (tmp_path / f"{name}.txt.gz").write_bytes(packed)
    (model,) = (content for name, content in uninterrupted.items() if name.endswith("/tokenizer.model"))
    (tmp_path / "tokenizer.model").write_bytes(model)
    long = [arguments[0], f'data.corpora=[{{"name": "long", "path": "{tmp_path}/*.gz"}}]', "data.num_workers=2"]
    trained, given = "tokenizer.vocab_size=1000", f"tokenizer.path={tmp_path}/tokenizer.model"
    for moment, tokenizer in (
        ("1/digests", trained),  # while it looks at the text
        ("2/runs/*/tokenize/stage.json", trained),  # while it trains the tokenizer
        ("3/shards/*/.shard_*.tmp", given),  # while it encodes, which need not wait half a minute for a tokenizer
    ):
        process = start(*long, tokenizer, f"run.dir={tmp_path}/{moment[0]}", new_session=True)
        while not list(tmp_path.glob(moment)):
            assert process.poll() is None, process.communicate()
            time.sleep(0.01)
        time.sleep(0.3)
        began = time.monotonic()
        process.send_signal(signal.SIGTERM)
        _, said = process.communicate(timeout=60)
        assert process.returncode == 85, said
        assert time.monotonic() - began < 30  # one task takes longer
        wait_until_gone(process.pid)


def test_text_that_changes_meanwhile_is_published_under_no_key(arguments, text, electra, tmp_path):
    own = tmp_path / "own.txt"
    own.write_bytes(text.read_bytes())
    mine = [arguments[0], f'data.corpora=[{{"name": "own", "path": "{own}"}}]', f"run.dir={tmp_path}/out",
            f"data.task_bytes={TASK_BYTES}", "data.num_workers=1"]  # fmt: skip
    process = start(*mine)
    while num_records(tmp_path / "out") < 3:
        assert process.poll() is None
        time.sleep(0.002)
    with open(own, "a", encoding="utf-8") as file:
        file.write("\n\nOne more.\n")
    _, said = process.communicate(timeout=60)
    assert process.returncode == 65, said
    assert "the text changed while it was tokenized" in said
    assert not list(tmp_path.glob("out/shards/*/MANIFEST.json"))
    assert num_records(tmp_path / "out") == 0
    electra("tokenize", *mine)


def test_a_late_element_of_an_array_does_not_undo_what_is_done(arguments, electra, tmp_path, monkeypatch):
    from pipeline import chain
    from pipeline.distributed import Process
    from pipeline.errors import StoppedEarly

    mine = [*arguments[1:], f"run.dir={tmp_path}", "data.num_workers=1"]
    config = load_config(arguments[0], tuple(mine))

    def overtaken(*_) -> None:
        electra("tokenize", arguments[0], *mine)
        raise StoppedEarly("stopped")

    monkeypatch.setitem(chain._STORIES, "tokenize", overtaken)
    with pytest.raises(StoppedEarly):
        chain.execute_stage(config, chain.decide(config, "tokenize"), Process())
    record = json.loads((tmp_path / "runs/tokenized/tokenize/stage.json").read_text())
    assert record["state"] == "done"
    assert record["output"]


def session_of(process: Path) -> int:
    """Session of a process by its folder in /proc; 0 when it is gone."""
    try:
        return int((process / "stat").read_text().rpartition(")")[2].split()[3])
    except (FileNotFoundError, ProcessLookupError):
        return 0


def wait_until_gone(session: int) -> None:
    """Until no process of a session is left."""
    deadline = time.monotonic() + 20
    while any(session_of(path) == session for path in Path("/proc").glob("[0-9]*")):
        assert time.monotonic() < deadline, "a worker outlives its parent"
        time.sleep(0.05)


def test_a_full_disk_is_said_and_with_space_the_same_command_goes_on(arguments, uninterrupted, electra, tmp_path):
    with small_disk(tmp_path / "disk") as grow:
        run_dir = f"run.dir={tmp_path / 'disk'}"
        said = electra("tokenize", *arguments, run_dir, "data.num_workers=2", code=1).stderr
        assert "No space left on device" in said
        assert "free space" in said
        assert 0 < num_records(tmp_path / "disk") < sum("/tasks/" in name for name in uninterrupted)
        grow()
        electra("tokenize", *arguments, run_dir, "data.num_workers=2")
        assert content_of(tmp_path / "disk") == uninterrupted


@contextmanager
def small_disk(folder: Path) -> Iterator:
    """A file system of 2 MiB; yields what makes it large."""
    folder.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", folder], capture_output=True, text=True)
    if mounted.returncode:
        reason = f"needs the right to mount a tmpfs: {mounted.stderr.strip()}"
        pytest.fail(reason) if os.environ.get("ELECTRA_REQUIRE_ALL") == "1" else pytest.skip(reason)
    try:
        yield lambda: subprocess.run(["mount", "-o", "remount,size=64m", folder], check=True)
    finally:
        subprocess.run(["umount", folder], check=True)


def test_processes_of_an_array_share_the_work(arguments, uninterrupted, tmp_path):
    """Three members without a word between them; each ends when all is there."""
    array = {"SLURM_ARRAY_TASK_COUNT": "3", "SLURM_ARRAY_TASK_MIN": "4", "SLURM_ARRAY_TASK_MAX": "8"}
    members = [
        start(*arguments, f"run.dir={tmp_path}", "data.num_workers=1", **array, SLURM_ARRAY_TASK_ID=str(number))
        for number in (4, 6, 8)
    ]
    for member in members:
        _, said = member.communicate(timeout=120)
        assert member.returncode == 0, said
        assert "tokenize: done" in said or "up to date" in said
    assert content_of(tmp_path) == uninterrupted


def test_adding_a_corpus_or_changing_a_weight_tokenizes_nothing_again(
    arguments, uninterrupted, electra, corpus_path, tmp_path
):
    (tokenizer,) = {Path(name).parent for name in uninterrupted if name.startswith("tokenizers/")}
    for name in (name for name in uninterrupted if name.startswith("tokenizers/")):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(uninterrupted[name])
    given = [f"run.dir={tmp_path}", f"tokenizer.path={tmp_path / tokenizer / 'tokenizer.model'}"]
    electra("tokenize", *arguments, *given)
    before = {path: path.stat().st_mtime_ns for path in tmp_path.glob("shards/*/*")}
    assert before
    two = f'data.corpora=[{{"name": "text", "path": "{arguments[1].split(chr(34))[-2]}", "weight": 3}}, ' \
          f'{{"name": "more", "path": "{corpus_path}"}}]'  # fmt: skip
    said = electra("tokenize", arguments[0], two, *arguments[2:3], *given, "run.name=two").stderr
    assert "tokens are there already" in said
    assert {path: path.stat().st_mtime_ns for path in before} == before
    assert len(list(tmp_path.glob("shards/*/MANIFEST.json"))) == 2


@pytest.fixture(scope="module")
def halves(corpus_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., str]:
    """Two corpora as an override, in an order, with weights."""
    folder, text = tmp_path_factory.mktemp("halves"), corpus_path.read_text()
    (folder / "a.txt").write_text(text[: len(text) // 2])
    (folder / "b.txt").write_text(text[len(text) // 2 :])

    def override(order: str = "ab", **weights: float) -> str:
        about = [{"name": name, "path": f"{folder}/{name}.txt", "weight": weights.get(name, 1)} for name in order]
        return f"data.corpora={json.dumps(about)}"

    return override


def tokenizers_in(run_dir: Path) -> set[str]:
    return {path.name for path in (run_dir / "tokenizers").iterdir()}


def test_the_order_of_the_corpora_does_not_matter_to_the_tokenizer(electra, config_path, halves):
    electra("tokenize", config_path, halves("ab", b=2))
    (folder,) = (config_path.parent / "out/tokenizers").iterdir()
    said = electra("tokenize", config_path, halves("ba", b=2), "run.name=other").stderr
    assert "tokens are there already" in said and tokenizers_in(config_path.parent / "out") == {folder.name}
    # One that was made when the order mattered, under the key of the other order, is used as it is.
    config = load_config(config_path, (halves("ab", b=2),))
    digests = tokenize_inputs(config, Share())["text"]
    settings = TokenizerSettings("sentencepiece_unigram", 300, True, 0.9995, 256 * 2**20)
    texts = list(zip(corpora_of(config), (1.0, 2.0), digests.values(), strict=True))
    orders = {"ab": texts, "ba": texts[::-1]}
    keys = {order: content_key(tokenizer_inputs(settings, texts, 0.05)) for order, texts in orders.items()}
    (order,) = (order for order, key in keys.items() if key != folder.name)
    folder.rename(folder.with_name(keys[order]))
    said = electra("tokenize", config_path, halves(order, b=2), "run.name=third").stderr
    assert "tokens are there already" in said and tokenizers_in(config_path.parent / "out") == {keys[order]}


def test_a_weight_is_science_of_a_tokenizer_that_is_trained_on_several_corpora(electra, config_path, halves):
    run = config_path.parent / "out/runs/tiny/tokenize/stage.json"
    electra("tokenize", config_path, halves())
    assert "run     changed: data.corpora.a.weight: 1.0 -> 3.0" in plan(electra, config_path, halves(a=3))
    assert "reuse   up to date" in plan(electra, config_path, halves("ba"))
    record = json.loads(run.read_text())  # of an earlier version
    assert [record["inputs"]["science"].pop(f"data.corpora.{name}.weight") for name in "ab"] == [1, 1]
    run.write_text(json.dumps(record))
    assert "reuse   up to date" in plan(electra, config_path, halves())
    electra("pretrain", config_path, halves(), "train.steps=1")
    refused = electra("run", config_path, halves(a=3), "train.steps=1", code=78).stderr
    assert "data.corpora.a.weight: 1.0 -> 3.0" in refused
    given = f"tokenizer.path={record['output']['tokenizer']}/tokenizer.model"
    science = [science_of(load_config(config_path, (halves(a=a), given)), "tokenize") for a in (1, 3)]
    assert science[0] == science[1]


def plan(electra: Electra, *arguments: object) -> str:
    return electra("run", *arguments, "--until", "tokenize", "--plan").stdout


def test_progress_has_speed_and_time_left(arguments, electra, tmp_path):
    said = electra("tokenize", *arguments, f"run.dir={tmp_path}", "data.num_workers=1").stderr
    lines = [line for line in said.splitlines() if " tasks, " in line]
    assert lines
    assert all("MB/s" in line and "tokens/s" in line for line in lines)
    assert lines[-1].endswith("done")


def test_more_damage_than_may_be_is_a_warning_once_while_the_rest_may_make_up_for_it(caplog):
    show = tokenize._ProgressLine("web")
    for tasks_done in range(1, 4):
        show(Progress(tasks_done, 4, 0, 0, 0, 0, 1.0, damage="a.txt: byte 3 is not UTF-8; 101 of 900 documents"))
    warnings = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert warnings == [
        "web: a.txt: byte 3 is not UTF-8; 101 of 900 documents; an error unless the rest makes up for it"
    ]
    last = tokenize._ProgressLine("web")
    last(Progress(4, 4, 0, 0, 0, 0, 1.0, damage="too late"))
    assert "too late" not in caplog.text


def test_every_format_and_kind_of_tokenizer_from_the_command_line(electra, shared_config, corpus_path, tmp_path):
    """A WordPiece vocabulary, lines of jsonl, and the paper's rows."""
    words = sorted(set(corpus_path.read_text().lower().replace(".", " ").split()))
    (tmp_path / "vocab.txt").write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", ".", *words]) + "\n")
    documents = corpus_path.read_text().split("\n\n")
    (tmp_path / "text.jsonl").write_text("".join(json.dumps({"body": document}) + "\n" for document in documents))
    arguments = [
        f'data.corpora=[{{"name": "j", "path": "{tmp_path}/text.jsonl", "format": "jsonl", "text_column": "body"}}]',
        "tokenizer.kind=wordpiece", f"tokenizer.path={tmp_path}/vocab.txt", f"run.dir={tmp_path}/out",
    ]  # fmt: skip
    electra("run", shared_config, *arguments, "train.steps=2", "run.name=wordpiece")
    paper = ["data.layout=paper", "train.steps=2", "run.name=paper"]
    electra("run", shared_config, *arguments, *paper)
    (manifest,) = (
        json.loads(path.read_text())
        for path in tmp_path.glob("out/shards/*/MANIFEST.json")
        if json.loads(path.read_text())["layout"]["name"] == "paper"
    )
    assert manifest["layout"] == {"name": "paper", "row_tokens": 32, "seed": 1}
