"""Shard folders: the same bytes whatever happened on the way, and what is damaged is found."""

import errno
import hashlib
import itertools
import json
import multiprocessing
import os
import re
import shutil
import signal
import threading
import time
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import data_shards.build as build_module
from data_shards import shards, store, tasks
from data_shards.build import Progress, Share
from data_shards.corpus import Corpus, Task
from data_shards.digest import corpus_digest
from data_shards.errors import DamagedDataError, DataError, DataSettingError
from data_shards.keys import content_key, shard_inputs, tokenizer_inputs
from data_shards.sampling import is_held_out, sample_paragraphs
from data_shards.store import MANIFEST, Layout, read_manifest
from data_shards.tasks import FolderJob, run_task
from data_shards.tokenizer import Tokenizer
from data_shards.tokenizer_files import install, train
from data_shards.workers import WorkerPool

HOST = os.uname().nodename.partition(".")[0]


def content_of(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def test_the_folder_holds_what_the_readme_lists(folder):
    num_tasks = len(list((folder / "tasks").iterdir()))
    assert num_tasks > 3
    expected = {MANIFEST} | {f"tasks/{task:05d}.json" for task in range(num_tasks)}
    for name in ("shard", "held_out"):
        expected |= {f"{name}_{task:05d}{suffix}" for task in range(num_tasks) for suffix in (".bin", ".idx")}
    assert set(content_of(folder)) == expected


def test_two_workers_write_the_same_bytes_as_one(folder, build, tmp_path):
    assert content_of(build(tmp_path / "two", num_workers=2)) == content_of(folder)


def test_each_missing_task_is_done_again_and_no_other(folder, build, tmp_path, monkeypatch):
    copy, redone = tmp_path / "copy", []
    monkeypatch.setattr(build_module, "run_task", lambda job, task: redone.append(task.index) or run_task(job, task))
    for lost in ("tasks/00001.json", "shard_00002.bin", "held_out_00003.bin", "cut/shard_00001.bin", MANIFEST):
        shutil.copytree(folder, copy, dirs_exist_ok=True)
        if lost.startswith("cut/"):
            os.truncate(copy / Path(lost).name, 10)
        else:
            (copy / lost).unlink()
        (copy / f".shard_00001.bin.{HOST}~{dead_process()}.tmp").write_bytes(b"left over")
        (copy / "tasks" / f".00001.json.{HOST}~{dead_process()}.tmp").write_bytes(b"left over")
        redone.clear()
        build(copy)
        assert redone == ([] if lost == MANIFEST else [int(lost[-6]) if "json" in lost else int(lost[-5])])
        assert content_of(copy) == content_of(folder), lost


def dead_process() -> int:
    """Id of a process that is no more."""
    process = multiprocessing.get_context("fork").Process(target=int)
    process.start()
    process.join()
    assert process.pid
    return process.pid


@pytest.mark.parametrize("num_parts", [2, 3, 7])
def test_every_share_alone_and_all_together_write_the_same_bytes(folder, build, tmp_path, num_parts):
    """Whoever is left does everything; those who come later find it done."""
    together = tmp_path / "together"
    for part in range(num_parts):
        assert content_of(build(tmp_path / str(part), share=Share(part, num_parts))) == content_of(folder)
    context = multiprocessing.get_context("fork")
    shares = [Share(part, num_parts) for part in range(num_parts)]
    processes = [context.Process(target=build, args=(together,), kwargs={"share": share}) for share in shares]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
        assert process.exitcode == 0
    assert content_of(together) == content_of(folder)


def test_shares_begin_with_different_tasks_and_cover_all():
    tasks = [Task(index, (), 0) for index in range(11)]
    orders = [[task.index for task in Share(part, 3).in_order(tasks)] for part in range(3)]
    assert [order[:3] for order in orders] == [[0, 3, 6], [1, 4, 7], [2, 5, 8]]
    assert all(sorted(order) == list(range(11)) for order in orders)
    assert [task.index for task in Share().in_order(tasks)] == list(range(11))


def test_a_task_in_other_hands_is_left_until_its_owner_is_silent(folder, build, tmp_path, monkeypatch):
    copy, slept = Path(shutil.copytree(folder, tmp_path / "copy")), []
    (copy / "tasks" / "00002.json").unlink()
    elsewhere = copy / ".shard_00002.bin.othernode~17.tmp"
    elsewhere.write_bytes(b"ids")

    def sleep(seconds: float) -> None:
        slept.append(seconds)
        if len(slept) == 1:
            elsewhere.write_bytes(b"more ids")
        clock[0] += 30.0

    clock = [time.monotonic()]
    monkeypatch.setattr(time, "monotonic", lambda: clock[0])
    monkeypatch.setattr(time, "sleep", sleep)
    build(copy)
    assert len(slept) == 3  # 30 s after the first look it had grown; 60 s after the second it had not
    elsewhere.unlink()
    assert content_of(copy) == content_of(folder)


def test_a_full_disk_ends_the_task_and_leaves_nothing(folder, build, tmp_path, monkeypatch):
    class FullDisk(shards.ShardWriter):
        def _write_pending(self) -> None:
            raise OSError(errno.ENOSPC, "No space left on device", str(self.prefix))

    with monkeypatch.context() as patch:
        patch.setattr(tasks, "ShardWriter", FullDisk)
        with pytest.raises(OSError, match="No space left"):
            build(tmp_path / "full")
    assert [path for path in (tmp_path / "full").rglob("*") if path.is_file()] == []
    assert content_of(build(tmp_path / "full")) == content_of(folder)


def test_a_killed_worker_is_named_and_nothing_done_is_lost(folder, build, tmp_path):
    bait = tmp_path / "kills"
    bait.touch()
    with pytest.raises(DataError, match=r"a worker process was killed.*lower data\.num_workers"):
        build(tmp_path / "shards", tokenizer=DyingFolder(bait), num_workers=2)


class DyingFolder:
    """Stands for a tokenizer's folder; the worker that is given it dies."""

    def __init__(self, bait: Path):
        self.bait = bait

    def __reduce__(self):
        return _die_in_a_worker, (str(self.bait), os.getpid())

    def __hash__(self) -> int:
        return 0


def test_workers_left_by_a_stop_are_gone_with_all_that_serves_them():
    before = set(threading.enumerate())
    began = time.monotonic()
    with suppress(KeyError), WorkerPool(2) as pool:
        pool.submit(time.sleep, 60)
        raise KeyError
    assert set(threading.enumerate()) <= before  # one still at work when the interpreter ends may raise there
    assert time.monotonic() - began < 30


def _die_in_a_worker(bait: str, parent: int) -> str:
    if os.getpid() != parent:
        os.kill(os.getpid(), signal.SIGKILL)
    return bait


def test_a_task_of_another_key_is_done_again(folder, build, tmp_path):
    copy = Path(shutil.copytree(folder, tmp_path / "copy"))
    record = json.loads((copy / "tasks" / "00001.json").read_text())
    (copy / "tasks" / "00001.json").write_text(json.dumps(record | {"key": "0" * 16}))
    build(copy)
    assert content_of(copy) == content_of(folder)


@pytest.mark.parametrize("num_syncs", range(1, 16))
def test_a_build_killed_anywhere_ends_with_the_same_bytes(folder, build, tmp_path, num_syncs):
    killed = multiprocessing.get_context("fork").Process(
        target=build_until_killed, args=(build, tmp_path / "killed", num_syncs)
    )
    killed.start()
    killed.join()
    assert killed.exitcode == -signal.SIGKILL
    with pytest.raises(DataSettingError, match="no finished shards"):
        read_manifest(tmp_path / "killed")
    assert content_of(build(tmp_path / "killed")) == content_of(folder)


def build_until_killed(build, folder: Path, num_syncs: int) -> None:
    """Builds and dies, as by a power cut, at the given fsync: several belong to each task."""
    left, fsync = [num_syncs], os.fsync

    def dying_fsync(descriptor: int) -> None:
        left[0] -= 1
        if left[0] == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        fsync(descriptor)

    os.fsync = dying_fsync
    build(folder)


def test_the_split_depends_on_the_document_alone(
    folder, build, documents, held_out_fraction, tokenizer_folder, tmp_path
):
    path = tmp_path / "reversed.txt"
    path.write_text("\n\n".join(reversed(documents)) + "\n", encoding="utf-8")
    other = build(tmp_path / "reversed", corpus=Corpus("made_up", str(path)))
    tokenizer = Tokenizer(tokenizer_folder)
    for split in ("train", "held_out"):
        chosen = [d for d in documents if is_held_out(d.encode(), held_out_fraction) == (split == "held_out")]
        expected = [tokenizer.normalize(document) for document in chosen]
        assert sorted(texts_of(folder, split, tokenizer)) == sorted(expected)
        assert sorted(texts_of(other, split, tokenizer)) == sorted(expected)
    assert 10 < read_manifest(folder).num_documents("held_out") < 80


def texts_of(folder: Path, split: str, tokenizer: Tokenizer) -> list[str]:
    texts = []
    for shard in read_manifest(folder).shards:
        if shard.split == split:
            ids = memoryview((folder / f"{shard.name}.bin").read_bytes()).cast("H").tolist()
            ends = [0, *(i + 1 for i, token in enumerate(ids) if token == 3)]
            texts += [tokenizer.decode(ids[a : b - 1]) for a, b in itertools.pairwise(ends)]
    return texts


def test_the_split_is_the_hash_of_the_text_that_the_readme_gives():
    for number in range(500):
        text = f"документ {number}"
        digest = hashlib.sha256(b"held_out" + text.encode()).digest()
        assert is_held_out(text.encode(), 0.1) == (int.from_bytes(digest[:8], "little") / 2**64 < 0.1)


def test_the_held_out_share_is_the_fraction_and_grows_by_inclusion():
    texts = [f"document {number}" for number in range(20_000)]
    small, large = ({t for t in texts if is_held_out(t.encode(), fraction)} for fraction in (0.05, 0.2))
    assert abs(len(small) - 1000) < 4 * (20_000 * 0.05 * 0.95) ** 0.5
    assert abs(len(large) - 4000) < 4 * (20_000 * 0.2 * 0.8) ** 0.5
    assert small < large
    assert not any(is_held_out(text.encode(), 0.0) for text in texts)


def test_the_manifest_gives_each_files_sha256_and_counts(folder, corpus):
    manifest = read_manifest(folder)
    assert manifest.key == content_key(manifest.inputs)
    assert manifest.dtype == "uint16"
    for shard in manifest.shards:
        for suffix, digest in ((".bin", shard.bin_sha256), (".idx", shard.idx_sha256)):
            assert hashlib.sha256((folder / f"{shard.name}{suffix}").read_bytes()).hexdigest() == digest
    size_bytes = sum(path.stat().st_size for path in folder.glob("*.bin"))
    assert manifest.num_tokens("train") + manifest.num_tokens("held_out") == size_bytes // 2
    assert manifest.num_documents("train") + manifest.num_documents("held_out") == 200


@pytest.mark.parametrize("damage", ["", "{", "[]", '{"shards": [{"name": "x"}]}', '{"shards": []}'])
def test_a_manifest_that_cannot_be_read_is_damaged(tmp_path, damage):
    (tmp_path / MANIFEST).write_text(damage)
    with pytest.raises(DamagedDataError, match=r"MANIFEST\.json: unreadable"):
        read_manifest(tmp_path)


@pytest.mark.parametrize(
    "change",
    [{"dtype": "foo"}, {"layout": {"name": "weird"}}, {"format_version": 99}, {"counts": {"documents": None}},
     {"special": {"pad": "0", "unk": 1, "cls": 2, "sep": 3, "mask": 4}}],
    ids=str,
)  # fmt: skip
def test_a_manifest_with_impossible_values_is_damaged(folder, tmp_path, change):
    content = json.loads((folder / MANIFEST).read_text())
    (tmp_path / MANIFEST).write_text(json.dumps(content))
    assert read_manifest(tmp_path) == read_manifest(folder)
    (tmp_path / MANIFEST).write_text(json.dumps(content | change))
    with pytest.raises(DamagedDataError, match=r"MANIFEST\.json: unreadable"):
        read_manifest(tmp_path)


def test_a_corpus_without_documents_is_damaged(build, tmp_path):
    (tmp_path / "blank.txt").write_text(" \n\n \n")
    with pytest.raises(DamagedDataError, match="corpus 'made_up' has no document to train on"):
        build(tmp_path / "shards", corpus=Corpus("made_up", str(tmp_path / "blank.txt")))
    assert not (tmp_path / "shards" / MANIFEST).exists()


def test_an_error_in_a_worker_process_reaches_the_caller(build, tmp_path):
    (tmp_path / "bad.txt").write_bytes(b"good\n\n" * 2000 + b"bad \xff\n\n" * 30)
    with pytest.raises(DamagedDataError, match=r"bad\.txt: byte 12004 is not UTF-8"):
        build(tmp_path / "shards", corpus=Corpus("made_up", str(tmp_path / "bad.txt")), num_workers=2)


def test_keys_depend_on_what_a_corpus_says_and_not_on_where_it_lies(corpus, settings):
    def key(corpus=corpus, digest="d", tokenizer="t", fraction=0.1, task_bytes=10, layout=Layout()):  # noqa: B008
        return content_key(shard_inputs(corpus, digest, tokenizer, fraction, task_bytes, layout))

    assert key() == key(replace(corpus, name="other", path="/elsewhere"))
    changed = [
        key(replace(corpus, documents="line")), key(digest="e"), key(tokenizer="u"), key(fraction=0.2),
        key(task_bytes=11), key(replace(corpus, format="jsonl")), key(layout=Layout("paper", 128, 1)),
        key(layout=Layout("paper", 128, 2)),
    ]  # fmt: skip
    assert len({key(), *changed}) == 9

    def trained(settings=settings, weights=(1.0, 2.0), fraction=0.1):
        texts = [(corpus, weight, digest) for weight, digest in zip(weights, "de", strict=True)]
        return content_key(tokenizer_inputs(settings, texts, fraction))

    others = [trained(replace(settings, vocab_size=7)), trained(weights=(1, 1)), trained(fraction=0)]
    assert len({trained(), *others, trained(replace(settings, sample_seed=1))}) == 5
    assert len(trained()) == 16


def test_held_out_documents_do_not_reach_the_tokenizer(corpus, settings, documents, held_out_fraction, tmp_path):
    """A sign that only a held-out document contains is unknown to the tokenizer."""
    secret = next(f"{n} ☃" for n in range(1000) if is_held_out(f"{n} ☃".encode(), held_out_fraction))
    path = tmp_path / "c.txt"
    path.write_text("\n\n".join([*documents, secret]), encoding="utf-8")
    for fraction, known in ((held_out_fraction, False), (0.0, True)):
        sample = sample_paragraphs([Corpus("c", str(path))], [1.0], 1 << 20, 0, fraction)
        install(tmp_path / str(fraction), train(settings, sample))
        assert (1 not in Tokenizer(tmp_path / str(fraction)).encode("☃")) == known


@pytest.mark.parametrize(("lines", "is_error"), [(3000, True), (30_000, False)])
def test_damage_here_and_there_is_told_at_once_and_judged_at_the_end(tokenizer_folder, tmp_path, lines, is_error):
    path = tmp_path / "text.txt"
    damaged = range(0, 3000, 20)
    path.write_bytes(b"".join((b"caf\xe9" if n in damaged else b"word") + b" one two\n" for n in range(lines)))
    job, inputs = job_of(path, tokenizer_folder)
    told: list[Progress] = []
    if is_error:
        with pytest.raises(DamagedDataError, match=r"byte 3 is not UTF-8; 150 of 3,000 documents have such errors and"):
            build_module.build_folder(job, inputs, 4096, 1, on_progress=told.append, interval_s=0)
    else:
        manifest = build_module.build_folder(job, inputs, 4096, 1, on_progress=told.append, interval_s=0)
        assert manifest.num_documents() == lines
    first = next(progress for progress in told if progress.damage)
    assert 1 < first.tasks_done < first.tasks == told[-1].tasks_done
    assert re.match(r"\S+: byte 3 is not UTF-8; 1\d\d of 2,\d+ documents .* at most 1% may in a corpus$", first.damage)
    assert bool(told[-1].damage) == is_error


def test_text_that_changed_is_not_taken_for_damage_of_the_one_before(tokenizer_folder, tmp_path):
    path = tmp_path / "text.txt"
    path.write_bytes(b"word one two\n" * 1000 + b"caf\xe9 one two\n" * 200)
    job, inputs = job_of(path, tokenizer_folder)
    with pytest.raises(DamagedDataError, match=r"byte 13003 is not UTF-8"):
        build_module.build_folder(job, inputs, 4096, 1)
    assert list((job.folder / "tasks").iterdir())
    with pytest.raises(DamagedDataError, match="the text changed while it was tokenized"):
        build_module.build_folder(job, inputs, 4096, 1, is_unchanged=lambda: False)
    assert not list((job.folder / "tasks").iterdir())


def job_of(path: Path, tokenizer_folder: Path) -> tuple[FolderJob, dict[str, Any]]:
    corpus = Corpus("latin", str(path), documents="line")
    inputs = shard_inputs(corpus, corpus_digest(corpus, None), "tokenizer", 0.0, 4096, Layout())
    return FolderJob(path.parent / "folder", corpus, content_key(inputs), tokenizer_folder, 0.0, Layout()), inputs


def test_damaged_text_is_named_while_the_tokenizer_is_trained(settings, tmp_path):
    (tmp_path / "bad.txt").write_bytes(b"good text\n\n" * 50 + b"bad \xff\n\n" * 51)
    with pytest.raises(DamagedDataError, match=r"bad\.txt: byte 554 is not UTF-8; 51 of 101 documents"):
        train(settings, sample_paragraphs([Corpus("c", str(tmp_path / "bad.txt"))], [1.0], 1 << 20, 0, 0.0))


def test_what_reading_met_with_is_in_the_manifest(build, tmp_path):
    (tmp_path / "text.txt").write_bytes(b"good\n\n \n" * 2000 + b"bad \xff\n")
    manifest = read_manifest(build(tmp_path / "shards", corpus=Corpus("made_up", str(tmp_path / "text.txt"))))
    assert manifest.counts == {
        "documents": 2001, "text_bytes": 4 * 2000 + len("bad \ufffd".encode()), "encoding_errors": 1, "empty": 0,
        "cut": 0,
    }  # fmt: skip


def test_json_is_replaced_as_a_whole(tmp_path, monkeypatch):
    store.write_json(tmp_path / "a.json", {"ключ": 1})
    assert json.loads((tmp_path / "a.json").read_text(encoding="utf-8")) == {"ключ": 1}
    monkeypatch.setattr(os, "replace", lambda *_: (_ for _ in ()).throw(OSError("disk")))
    with pytest.raises(OSError, match="disk"):
        store.write_json(tmp_path / "a.json", {"ключ": 2})
    assert json.loads((tmp_path / "a.json").read_text(encoding="utf-8")) == {"ключ": 1}
