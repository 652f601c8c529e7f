"""Shard folders: the same bytes whatever happened on the way, and what is damaged is found."""

import hashlib
import itertools
import json
import multiprocessing
import os
import shutil
import signal
from dataclasses import replace
from pathlib import Path

import pytest

from data_shards import store
from data_shards.build import (
    content_key,
    is_held_out,
    shard_inputs,
    tokenizer_inputs,
    train_tokenizer,
    verify_folder,
)
from data_shards.corpus import Corpus
from data_shards.errors import DamagedDataError, DataSettingError
from data_shards.store import MANIFEST, read_manifest
from data_shards.tokenizer import Tokenizer


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


def test_each_missing_task_is_done_again_and_no_other(folder, build, tmp_path):
    copy = tmp_path / "copy"
    for lost in ("tasks/00001.json", "shard_00002.bin", "held_out_00003.bin", MANIFEST):
        shutil.copytree(folder, copy, dirs_exist_ok=True)
        (copy / lost).unlink()
        (copy / ".shard_00001.bin.99999.tmp").write_bytes(b"left over")
        (copy / "tasks" / ".00001.json.99999.tmp").write_bytes(b"left over")
        redone = []
        build(copy, on_task=lambda done, total, result, redone=redone: redone.append(result.task.index))
        assert redone == ([] if lost == MANIFEST else [int(lost[-6]) if "json" in lost else int(lost[-5])])
        assert content_of(copy) == content_of(folder), lost


def test_a_task_of_another_key_is_done_again(folder, build, tmp_path):
    copy = Path(shutil.copytree(folder, tmp_path / "copy"))
    record = json.loads((copy / "tasks" / "00001.json").read_text())
    (copy / "tasks" / "00001.json").write_text(json.dumps(record | {"key": "0" * 16}))
    build(copy)
    assert content_of(copy) == content_of(folder)


@pytest.mark.parametrize("num_syncs", range(1, 13))
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
    """Builds and dies, as by a power cut, at the given fsync: five belong to each task."""
    left, fsync = [num_syncs], os.fsync

    def dying_fsync(descriptor: int) -> None:
        left[0] -= 1
        if left[0] == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        fsync(descriptor)

    os.fsync = dying_fsync
    build(folder)


def test_the_split_depends_on_the_document_alone(folder, build, documents, held_out_fraction, tokenizer_path, tmp_path):
    path = tmp_path / "reversed.txt"
    path.write_text("\n\n".join(reversed(documents)) + "\n", encoding="utf-8")
    other = build(tmp_path / "reversed", corpus=Corpus("made_up", str(path)))
    tokenizer = Tokenizer(tokenizer_path)
    for split in ("train", "held_out"):
        chosen = [d for d in documents if is_held_out(d, held_out_fraction) == (split == "held_out")]
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
        digest = hashlib.blake2b(text.encode(), digest_size=8, key=b"held_out").digest()
        assert is_held_out(text, 0.1) == (int.from_bytes(digest, "little") / 2**64 < 0.1)


def test_the_held_out_share_is_the_fraction_and_grows_by_inclusion():
    texts = [f"document {number}" for number in range(20_000)]
    small, large = ({t for t in texts if is_held_out(t, fraction)} for fraction in (0.05, 0.2))
    assert abs(len(small) - 1000) < 4 * (20_000 * 0.05 * 0.95) ** 0.5
    assert abs(len(large) - 4000) < 4 * (20_000 * 0.2 * 0.8) ** 0.5
    assert small < large
    assert not any(is_held_out(text, 0.0) for text in texts)


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


@pytest.mark.parametrize("name", ["shard_00001.bin", "held_out_00000.idx"])
def test_verify_finds_a_flipped_bit_and_a_missing_file(folder, tmp_path, name):
    copy = Path(shutil.copytree(folder, tmp_path / "copy"))
    manifest = read_manifest(copy)
    assert verify_folder(copy, manifest) == []
    content = bytearray((copy / name).read_bytes())
    content[len(content) // 2] ^= 1
    (copy / name).write_bytes(content)
    assert verify_folder(copy, manifest) == [f"{copy / name}: content differs from the manifest's SHA-256"]
    (copy / name).unlink()
    assert verify_folder(copy, manifest) == [f"{copy / name}: missing"]


@pytest.mark.parametrize("damage", ["", "{", "[]", '{"shards": [{"name": "x"}]}', '{"shards": []}'])
def test_a_manifest_that_cannot_be_read_is_damaged(tmp_path, damage):
    (tmp_path / MANIFEST).write_text(damage)
    with pytest.raises(DamagedDataError, match=r"MANIFEST\.json: unreadable"):
        read_manifest(tmp_path)


def test_a_corpus_without_documents_is_damaged(build, tmp_path):
    (tmp_path / "blank.txt").write_text(" \n\n \n")
    with pytest.raises(DamagedDataError, match="corpus 'made_up' has no document to train on"):
        build(tmp_path / "shards", corpus=Corpus("made_up", str(tmp_path / "blank.txt")))
    assert not (tmp_path / "shards" / MANIFEST).exists()


def test_an_error_in_a_worker_process_reaches_the_caller(build, tmp_path):
    (tmp_path / "bad.txt").write_bytes(b"good\n\n" * 2000 + b"bad \xff\n")
    with pytest.raises(DamagedDataError, match=r"bad\.txt: byte 12004 is not UTF-8"):
        build(tmp_path / "shards", corpus=Corpus("made_up", str(tmp_path / "bad.txt")), num_workers=2)


def test_keys_depend_on_what_a_corpus_says_and_not_on_where_it_lies(corpus, settings):
    def key(corpus=corpus, digests=("d",), tokenizer="t", fraction=0.1, task_bytes=10):
        return content_key(shard_inputs(corpus, list(digests), tokenizer, fraction, task_bytes))

    assert key() == key(replace(corpus, name="other", path="/elsewhere"))
    changed = [
        key(replace(corpus, documents="line")), key(digests=("e",)), key(tokenizer="u"), key(fraction=0.2),
        key(task_bytes=11), key(replace(corpus, format="jsonl")),
    ]  # fmt: skip
    assert len({key(), *changed}) == 7

    def trained(settings=settings, weights=(1.0, 2.0), fraction=0.1):
        return content_key(tokenizer_inputs(settings, [corpus] * 2, list(weights), [["d"], ["e"]], fraction))

    assert len({trained(), trained(replace(settings, vocab_size=7)), trained(weights=(1, 1)), trained(fraction=0)}) == 4
    assert len(trained()) == 16


def test_held_out_documents_do_not_reach_the_tokenizer(corpus, settings, documents, held_out_fraction, tmp_path):
    """A sign that only a held-out document contains is unknown to the tokenizer."""
    secret = next(f"{n} ☃" for n in range(1000) if is_held_out(f"{n} ☃", held_out_fraction))
    path = tmp_path / "c.txt"
    path.write_text("\n\n".join([*documents, secret]), encoding="utf-8")
    for fraction, known in ((held_out_fraction, False), (0.0, True)):
        model = train_tokenizer(tmp_path / str(fraction), settings, [Corpus("c", str(path))], [1.0], fraction)
        assert (1 not in Tokenizer(model).encode("☃")) == known


def test_damaged_text_is_named_while_the_tokenizer_is_trained(settings, tmp_path):
    (tmp_path / "bad.txt").write_bytes(b"good text\n\n" * 50 + b"bad \xff\n")
    with pytest.raises(DamagedDataError, match=r"bad\.txt: byte 554 is not UTF-8"):
        train_tokenizer(tmp_path / "t", settings, [Corpus("c", str(tmp_path / "bad.txt"))], [1.0], 0.0)
    assert not (tmp_path / "t").exists()


def test_json_is_replaced_as_a_whole(tmp_path, monkeypatch):
    store.write_json(tmp_path / "a.json", {"ключ": 1})
    assert json.loads((tmp_path / "a.json").read_text(encoding="utf-8")) == {"ключ": 1}
    monkeypatch.setattr(os, "replace", lambda *_: (_ for _ in ()).throw(OSError("disk")))
    with pytest.raises(OSError, match="disk"):
        store.write_json(tmp_path / "a.json", {"ключ": 2})
    assert json.loads((tmp_path / "a.json").read_text(encoding="utf-8")) == {"ключ": 1}
