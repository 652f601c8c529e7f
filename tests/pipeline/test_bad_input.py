"""What users, disks and clusters get wrong: the exit code, one message with value, constraint and remedy, no loss."""

import gzip
import json
import os
from pathlib import Path
from unittest.mock import Mock

import pytest

from tests.conftest import Electra, read_journal


def corpora(path: Path) -> str:
    return f'data.corpora=[{{"name": "c", "path": "{path}"}}]'


def test_missing_config(electra: Electra) -> None:
    assert "no such config file" in electra("run", "absent.yaml", code=78).stderr


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["optimizer.lr=.inf"], "optimizer.lr=inf: input should be a finite number"),
        (["optimizer.betas=[1.5, 0.9]"], "optimizer.betas.0=1.5: input should be less than 1"),
        (["data.corpora=text.txt"], "data.corpora='text.txt': must be a list"),
        (["launch.processes=0"], "launch.processes=0: "),
        (["tracking.uri=bogus://x"], "tracking.uri='bogus://x': has characters or a form that are not allowed"),
        (["run.name=a/b"], "run.name='a/b': has characters or a form that are not allowed"),
        (["run.fork_from=../x@1"], "run.fork_from='../x@1': has characters or a form"),
        (
            ["evaluate.max_length=1000", "evaluate.tasks=[x]"],
            "evaluate.max_length=1000 exceeds model.max_pos",
        ),
        (["train=5"], "train=5: must be a section with keys"),
    ],
)
def test_wrong_values_are_one_line_each(
    config_path: Path, electra: Electra, overrides: list[str], message: str
) -> None:
    refused = electra("config", config_path, *overrides, code=78).stderr
    assert message in refused
    assert len(refused.strip().splitlines()) == 1, refused


def test_unknown_command_and_option(electra: Electra) -> None:
    electra("rnu", code=64)
    electra("run", "--plam", "x.yaml", code=64)


def test_missing_corpus(config_path: Path, electra: Electra) -> None:
    refused = electra("run", config_path, corpora(Path("/nowhere/text")), code=78).stderr
    assert "no file at '/nowhere/text'" in refused


def test_empty_corpus(config_path: Path, electra: Electra, tmp_path: Path) -> None:
    (tmp_path / "empty.txt").touch()
    assert "is empty" in electra("run", config_path, corpora(tmp_path / "empty.txt"), code=65).stderr


def test_corpus_that_is_not_utf_8(config_path: Path, electra: Electra, tmp_path: Path) -> None:
    (tmp_path / "latin.txt").write_bytes("un café\n".encode("latin-1") * 50)
    refused = electra("run", config_path, corpora(tmp_path / "latin.txt"), code=65).stderr
    assert "latin.txt: byte 6 is not UTF-8" in refused
    assert "iconv" in refused


def test_truncated_gzip(config_path: Path, electra: Electra, corpus_path: Path, tmp_path: Path) -> None:
    content = gzip.compress(corpus_path.read_bytes())
    (tmp_path / "cut.txt.gz").write_bytes(content[: len(content) // 2])
    refused = electra("run", config_path, corpora(tmp_path / "cut.txt.gz"), code=65).stderr
    assert "cut.txt.gz: cannot be decompressed to its end" in refused


def test_vocabulary_larger_than_the_text_can_train(config_path: Path, electra: Electra) -> None:
    refused = electra("run", config_path, "tokenizer.vocab_size=60000", code=78).stderr
    assert "tokenizer.vocab_size=60000: this text can train at most" in refused


def test_shards_of_another_tokenizer(config_path: Path, electra: Electra) -> None:
    out = config_path.parent / "out"
    electra("tokenize", config_path)
    (tokenizer,) = out.glob("tokenizers/*/tokenizer.model")
    electra("tokenize", config_path, "run.name=second", "tokenizer.vocab_size=200")
    other = next(path for path in out.glob("tokenizers/*/tokenizer.model") if path != tokenizer)
    refused = electra(
        "tokenize", config_path, "run.name=third", f"tokenizer.path={other}", f"data.shards_dir={out / 'shards'}",
        "data.held_out_fraction=0.1", code=78,
    ).stderr  # fmt: skip
    assert "was written with another tokenizer" in refused
    tokenizer.write_bytes(other.read_bytes())
    assert "written with another tokenizer" in electra("pretrain", config_path, "--check", code=78).stderr


def test_tokenizer_that_is_none(config_path: Path, electra: Electra, tmp_path: Path) -> None:
    damaged = tmp_path / "damaged.model"
    damaged.write_bytes(b"no model")
    for arguments in (["run"], ["tokenize", "--check"]):
        command, *flags = arguments
        assert "no such file" in electra(command, config_path, "tokenizer.path=/nowhere.model", *flags, code=78).stderr
        refused = electra(command, config_path, f"tokenizer.path={damaged}", *flags, code=65).stderr
        assert "not a sentencepiece model" in refused
        refused = electra(command, config_path, f"tokenizer.path={config_path}", *flags, code=78).stderr
        assert ".yaml is not read; give a sentencepiece model" in refused
    assert (
        "set tokenizer.path to BERT's vocab.txt"
        in electra("run", config_path, "tokenizer.kind=wordpiece", code=78).stderr
    )
    refused = electra("run", config_path, "tokenizer.path=/vocab.txt", code=78).stderr
    assert "set tokenizer.kind=wordpiece" in refused


def test_shard_cut_short(config_path: Path, electra: Electra) -> None:
    electra("tokenize", config_path)
    (shard,) = config_path.parent.glob("out/shards/*/shard_00000.bin")
    os.truncate(shard, shard.stat().st_size - 100)
    for arguments in (["pretrain", config_path, "--check"], ["pretrain", config_path]):
        assert "the manifest says" in electra(*arguments, code=65).stderr


def test_flipped_byte_in_a_shard_is_found_by_verify(config_path: Path, electra: Electra) -> None:
    electra("tokenize", config_path)
    (shard,) = config_path.parent.glob("out/shards/*/shard_00000.bin")
    assert "shards agree" in electra("shards", "verify", shard.parent).stdout
    content = bytearray(shard.read_bytes())
    content[50] ^= 1
    shard.write_bytes(content)
    refused = electra("shards", "verify", shard.parent, code=65).stderr
    assert "content differs" in refused
    assert f"delete {shard.parent} and run `electra tokenize` again" in refused


def test_too_few_rows_for_one_batch(config_path: Path, electra: Electra) -> None:
    electra("tokenize", config_path)
    big = ["train.global_batch_size=100000", "train.micro_batch_size=auto"]
    assert "too few rows" in electra("pretrain", config_path, *big, "--check", code=78).stderr


def test_no_permission_in_run_dir(config_path: Path, electra: Electra, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    refused = electra("run", config_path, f"run.dir={tmp_path / 'file' / 'runs'}", code=1).stderr
    assert "Not a directory" in refused
    assert "check the path, its permissions and the free space" in refused
    if os.geteuid() != 0:  # root may write anywhere
        closed = tmp_path / "closed"
        closed.mkdir(mode=0o500)
        assert "Permission denied" in electra("run", config_path, f"run.dir={closed / 'runs'}", code=1).stderr


def test_file_system_that_fills_up_while_saving(config_path: Path, electra: Electra) -> None:
    electra("run", config_path, "train.steps=5")
    checkpoints = config_path.parent / "out/runs/tiny/pretrain/checkpoints"
    limited = "import resource\nresource.setrlimit(resource.RLIMIT_FSIZE, (60 << 10, 60 << 10))"
    said = electra("run", config_path, "run.name=full", "train.steps=5", code=1, first=limited).stderr
    assert "checkpoint of step 5: " in said
    assert "earlier checkpoints are intact" in said
    assert [path.name for path in checkpoints.glob("step_*")] == ["step_00000005"]
    assert not list((config_path.parent / "out/runs/full/pretrain/checkpoints").glob("step_*"))
    electra("run", config_path, "run.name=full", "train.steps=5")  # with space, the same command goes on
    assert len(read_journal(config_path.parent / "out", "full")) == 5


def test_too_little_space_is_known_before_the_first_step(config_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from pipeline import pretrain
    from pipeline.config_file import load_config
    from pipeline.errors import ConfigError
    from pipeline.plan import make_plan

    monkeypatch.setattr(pretrain, "free_bytes", lambda path: 1000)
    with pytest.raises(ConfigError, match=r"0\.00 GiB free, but .*keep_every keep need .* set run\.dir"):
        control = Mock(is_first=True, broadcast=lambda problem: problem)
        pretrain._check_disk(config_path.parent, make_plan(load_config(config_path), 1), control)


def test_processes_that_would_run_other_kernels_run_torchs(config_path: Path, caplog) -> None:
    """In this attempt: each tries again what the first one chose."""
    from model.kernels.select import find, select_kernels
    from pipeline.config_file import load_config
    from pipeline.devices import agree_on_kernels, kept_kernels, kernels_to_keep
    from pipeline.errors import ConfigError

    chosen = select_kernels("reference")
    config = load_config(config_path)

    def gather(mine):
        return [("n1", *mine[1:]), mine, ("n2", chosen.names | {"attention": "triton"}, chosen.reasons)]

    assert agree_on_kernels(config, chosen, Mock(gather=lambda mine: [mine] * 3)) == chosen
    agreed = agree_on_kernels(config, chosen, Mock(gather=gather))
    assert agreed.names == chosen.names | {"attention": "torch"}
    assert agreed.attention is find("attention", "torch") and agreed.embed is chosen.embed
    why = chosen.reasons["attention"]
    how = f"rank 2 on n2 has triton ({why}) and rank 0 on n1 reference ({why})"
    assert f"kernel of attention: {how}; all take torch until the next attempt" in caplog.text
    others = {operation: name for operation, name in chosen.names.items() if operation != "attention"}
    assert kernels_to_keep(config, agreed, None) == others
    numerics = {"device": "cpu", "kernels": agreed.names, "kernels_kept": chosen.names}
    assert kernels_to_keep(config, agreed, kept_kernels(numerics, "cpu")) == chosen.names
    assert kept_kernels(numerics, "cuda") is None
    asked = load_config(config_path, ("kernels.backend=triton",))
    with pytest.raises(ConfigError, match=r"for attention, rank 2 on n2 has triton .* mend that node"):
        agree_on_kernels(asked, chosen, Mock(gather=gather))
    assert kernels_to_keep(asked, chosen, dict.fromkeys(chosen.names, "torch")) == chosen.names


def test_missing_task_data_and_unknown_task(config_path: Path, electra: Electra, write_task) -> None:
    task = write_task()
    (task.parent / "first_word_dev.jsonl").unlink()
    electra("run", config_path, "train.steps=2", "--until", "pretrain")
    refused = electra("evaluate", config_path, "train.steps=2", f'evaluate.tasks=["{task}"]', code=78).stderr
    assert "first_word_dev.jsonl, which is not there" in refused
    assert "no task 'nonsense'" in electra(
        "evaluate", config_path, "train.steps=2", 'evaluate.tasks=["nonsense"]', code=78
    ).stderr  # fmt: skip
    row = {"id": "x", "text": "bada", "label": "c"}
    (task.parent / "first_word_dev.jsonl").write_text(json.dumps(row) + "\n")
    refused = electra("evaluate", config_path, "train.steps=2", f'evaluate.tasks=["{task}"]', code=78).stderr
    assert "only the dev file has c" in refused
    (task.parent / "first_word_dev.jsonl").write_text('{"id": "x"}\n')
    refused = electra("evaluate", config_path, "train.steps=2", f'evaluate.tasks=["{task}"]', code=65).stderr
    assert "first_word_dev.jsonl:1: no field text, label; the row has id" in refused


def test_evaluate_without_tasks(config_path: Path, electra: Electra) -> None:
    electra("run", config_path, "train.steps=2")
    assert "evaluate.tasks is empty" in electra("evaluate", config_path, "train.steps=2", code=78).stderr


def test_damaged_final_checkpoint_is_named_with_the_remedy(config_path: Path, electra: Electra, write_task) -> None:
    arguments = [config_path, "train.steps=5", f'evaluate.tasks=["{write_task()}"]']
    electra("run", *arguments, "--until", "pretrain")
    weights = config_path.parent / "out/runs/tiny/pretrain/checkpoints/step_00000005/weights.safetensors"
    content = bytearray(weights.read_bytes())
    content[-9] ^= 1
    weights.write_bytes(content)
    assert "content differs from its SHA-256" in electra("run", *arguments, code=65).stderr


def test_corpus_in_a_form_that_is_not_read(config_path: Path, electra: Electra, tmp_path: Path) -> None:
    (tmp_path / "text.txt.bz2").write_bytes(b"x")
    assert "files of this kind are not read" in electra("run", config_path, corpora(tmp_path), code=78).stderr


def test_fp16_on_cpu(config_path: Path, electra: Electra) -> None:
    refused = electra("run", config_path, "train.precision=fp16", code=78).stderr
    assert "fp16 needs a GPU" in refused
    assert "use bf16 or fp32" in refused


def test_gpu_that_is_not_there(config_path: Path, electra: Electra) -> None:
    electra("tokenize", config_path)
    refused = electra("pretrain", config_path, "launch.device=cuda", "--check", code=78, CUDA_VISIBLE_DEVICES="").stderr
    assert "finds no usable GPU" in refused
    given = electra(
        "pretrain",
        config_path,
        "launch.device=auto",
        "--check",
        code=78,
        CUDA_VISIBLE_DEVICES="",
        SLURM_GPUS_ON_NODE="8",
    ).stderr
    assert "the job was given GPUs (8)" in given


def test_nan_is_skipped_counted_and_ends_in_93(config_path: Path, electra: Electra) -> None:
    # A learning rate that throws the weights out of range: every later step has inf or NaN.
    arguments = ["run", config_path, "optimizer.lr=1e38", "train.steps=30", "train.max_skipped_steps=4",
                 "train.checkpoint_every=1", "optimizer.warmup_steps=0"]  # fmt: skip
    ended = electra(*arguments, code=93).stderr
    assert "5 steps with NaN or inf, more than train.max_skipped_steps=4" in ended
    assert "the update is skipped (1 so far)" in ended
    entries = read_journal(config_path.parent / "out", "tiny")
    skipped_from = next(entry["step"] for entry in entries if entry["train/skipped_steps"])
    steps = [int(path.name[5:]) for path in (config_path.parent / "out/runs/tiny/pretrain/checkpoints").glob("step_*")]
    assert steps
    assert max(steps) < skipped_from, "a checkpoint was written after a step that was skipped"


def test_text_lost_in_short_shards_is_said(config_path: Path, electra: Electra, tmp_path: Path) -> None:
    folder = tmp_path / "many"
    folder.mkdir()
    for number in range(60):
        (folder / f"{number:02d}.txt").write_text(f"a few words in file number {number} and some more of them " * 5)
    arguments = [corpora(folder), "tokenizer.vocab_size=40", "data.held_out_fraction=0", "train.steps=1"]
    said = "% of the tokens lie in rows"
    assert said not in electra("run", config_path, *arguments).stderr  # small files share a shard
    assert said in electra("run", config_path, *arguments, "run.name=short", "data.task_bytes=1024").stderr
