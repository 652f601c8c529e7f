"""What a run that goes on from another one takes over, and what it refuses."""

import json
from pathlib import Path
from typing import Any

import pytest

from data_shards.loader import RowsBefore
from pipeline.config import Config
from pipeline.config_file import load_config
from pipeline.fork import read_by_parent, rows_before
from pipeline.keys import science_of
from pipeline.spikes import SkippedRows, add_skip
from pipeline.stages import StageRecord, stage_folder, write_record
from tests.conftest import Electra, read_journal


@pytest.fixture
def written(config_path: Path):
    """A config by its overrides; its pretrain stage has a record, with a key of each corpus's shards."""

    def write(name: str, *overrides: str, corpora: str, texts: str = "") -> Config:
        weights = dict(part.split("=") for part in corpora.split())
        listed = ", ".join(f"{{name: {name}, path: {name}.txt, weight: {weight}}}" for name, weight in weights.items())
        lines = config_path.read_text().splitlines()
        path = config_path.with_name(f"{name}.yaml")
        path.write_text("\n".join(f"  corpora: [{listed}]" if "corpora:" in line else line for line in lines))
        config = load_config(path, (f"run.name={name}", *overrides))
        shards = {corpus: f"{corpus}'s text{texts}" for corpus in weights}
        inputs = {"science": science_of(config, "pretrain"), "tokenizer": "its", "shards": shards}
        write_record(config, StageRecord("pretrain", "done", inputs))
        return config

    return write


def before(config: Config, read: dict[str, Any] | None) -> RowsBefore | None:
    corpora = sorted(config.data.corpora, key=lambda corpus: corpus.name)
    return rows_before([corpus.name for corpus in corpora], [corpus.weight for corpus in corpora], read)


def test_a_fork_goes_on_where_its_parent_stopped_to_read(written) -> None:
    parent = written("parent", corpora="books=3 web=1")
    same = written("same", "run.fork_from=parent@256", corpora="books=3 web=1")
    assert before(same, read_by_parent(same, {})) == RowsBefore(256, (1536, 512), (0, 1), (0.75, 0.25))
    add_skip(stage_folder(parent, "pretrain"), SkippedRows(200, 128))  # 128 steps' rows were left out before
    add_skip(stage_folder(parent, "pretrain"), SkippedRows(300, 10))
    assert before(same, read_by_parent(same, {})) == RowsBefore(384, (2304, 768), (0, 1), (0.75, 0.25))
    assert before(same, None) is None  # a run of its own, or a fork that began before this was kept


def test_a_corpus_keeps_its_count_and_its_number_through_forks_of_forks(written) -> None:
    written("parent", corpora="books=1 web=1")
    child = written("child", "run.fork_from=parent@128", "train.global_batch_size=16", corpora="art=1 web=1")
    read = read_by_parent(child, {})
    assert before(child, read) == RowsBefore(128, (0, 512), (2, 1), (0.5, 0.5))
    shorter = ("run.fork_from=child@192", "data.sequence_length=16")
    grandchild = written("grandchild", *shorter, corpora="art=1 books=1 code=2 web=1")
    # Of 64 steps of 16 rows half were art's. Books rested, all rows were twice as long, and code is new.
    last = before(grandchild, read_by_parent(grandchild, {"rows_before": read}))
    assert last == RowsBefore(192, (1024, 1024, 0, 2048), (2, 0, 3, 1), (0.5, 0.5, 0.4, 0.5))


def test_what_was_read_of_another_text_does_not_count(written) -> None:
    written("parent", corpora="books=1 web=1")
    child = written("child", "run.fork_from=parent@128", corpora="books=1 web=1", texts=" anew")
    assert before(child, read_by_parent(child, {})) == RowsBefore(128, (0, 0), (0, 1), (0.5, 0.5))
    paper = written("paper", "run.fork_from=parent@128", "data.layout=paper", corpora="books=1 web=1")
    assert read_by_parent(paper, {}) is None


def test_another_order_of_rows_is_said(written, caplog) -> None:
    written("parent", corpora="books=1")
    same = written("same", "run.fork_from=parent@128", "train.global_batch_size=4", corpora="books=1")
    other = written("other", "run.fork_from=parent@128", "run.seed=5", "data.sequence_length=16", corpora="books=1")
    with caplog.at_level("WARNING", logger="electra"):
        read_by_parent(same, {})
        assert not caplog.messages
        read_by_parent(other, {})
    assert "with another run.seed and data.sequence_length rows come in another order" in caplog.text


def test_a_fork_keeps_what_its_parent_had_read(shared_config: Path, electra: Electra) -> None:
    steps = ["train.checkpoint_every=2", "train.held_out_rows=0"]
    electra("run", shared_config, "run.name=parent", "train.steps=4", *steps)
    half = ["run.fork_from=parent@2", "train.global_batch_size=4", "train.micro_batch_size=4"]
    child = ["run", shared_config, "run.name=child", "train.steps=6", *half, *steps]
    electra(*child)
    out = shared_config.parent / "out"
    folder = out / "runs/child/pretrain"
    read = json.loads((folder / "checkpoints/step_00000006/state.json").read_text())["rows_before"]
    assert read == {"step": 2, "corpora": {"made_up": {"number": 0, "rows": 16, "window_share": 1.0}}}
    losses = [entry["train/total_loss"] for entry in read_journal(out, "child")]
    (folder / "stage.json").write_text((folder / "stage.json").read_text().replace('"done"', '"stopped"'))
    (folder / "checkpoints/step_00000006").rename(folder / "away")
    (out / "runs/parent").rename(out / "runs/elsewhere")  # its own checkpoints say what it read
    electra(*child)
    assert [entry["train/total_loss"] for entry in read_journal(out, "child")] == losses


def test_a_parents_score_is_not_its_forks(shared_config: Path, electra: Electra) -> None:
    """Of another loss it would be the best for ever, and of other rows it would be the only one."""
    keys = ["train.steps=4", "train.checkpoint_every=2", "train.held_out_every=2", "train.keep_best=true"]
    electra("run", shared_config, "run.name=cheap", *keys)
    other = ["run.name=dear", "run.fork_from=cheap@2", "objective.discriminator_loss_weight=500"]
    electra("run", shared_config, *other, *keys, "train.keep_checkpoints=1")
    runs = shared_config.parent / "out/runs"
    (left,) = (runs / "dear/pretrain/checkpoints").glob("step_*")
    first = runs / "cheap/pretrain/checkpoints/step_00000002"
    scores = [json.loads((folder / "state.json").read_text())["score"] for folder in (first, left)]
    assert left.name == "step_00000004" and 0 < 2 * scores[0] < scores[1]


def test_a_fork_needs_its_parent_once(shared_config: Path, electra: Electra) -> None:
    """The parent may train on, and remove the checkpoint."""
    steps = ["train.checkpoint_every=2", "train.held_out_rows=0"]
    electra("run", shared_config, "run.name=mother", "train.steps=4", *steps)
    child = ["run", shared_config, "run.name=daughter", "train.steps=6", "run.fork_from=mother@2", *steps]
    assert "stopped at step 2" in electra(*child, "train.stop_after_seconds=0.001", code=85).stderr
    runs = shared_config.parent / "out/runs"
    (runs / "mother").rename(runs / "gone")
    assert "restored step 2 from" in electra(*child).stderr
    (runs / "gone").rename(runs / "mother")
    electra(*child, "run.name=unbroken")
    losses = [
        [entry["train/total_loss"] for entry in read_journal(runs.parent, name)] for name in ("daughter", "unbroken")
    ]
    assert losses[0] == losses[1] and len(losses[0]) == 6


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("model.attention_heads=4", "that run has model.attention_heads=2, this one 4"),
        ("model.activation=gelu_tanh", "that run has model.activation=gelu"),
    ],
)
def test_what_shapes_do_not_show_is_compared(
    shared_config: Path, electra: Electra, override: str, message: str
) -> None:
    parent = ["run", shared_config, "run.name=shapes", "train.steps=2", "train.checkpoint_every=2"]
    electra(*parent, "train.held_out_rows=0")
    name = f"run.name=shapes-{override.partition('=')[2]}"
    child = ["run", shared_config, name, "run.fork_from=shapes@2", "train.steps=4"]
    assert message in electra(*child, override, code=78).stderr


def test_the_switch_between_two_stages_stays_where_it_was(shared_config: Path, electra: Electra) -> None:
    two_stage = ["objective.training=two_stage", "model.generator_width=1", "train.held_out_rows=0"]
    parent = ["run", shared_config, "run.name=stages", "train.steps=4", "train.checkpoint_every=1", *two_stage]
    electra(*parent, "train.keep_checkpoints=9")
    child = ["run", shared_config, "run.name=longer", "run.fork_from=stages@4", "train.steps=6", *two_stage]
    refused = electra(*child, code=78).stderr
    assert "that run's first stage has 2 steps, this one's 3, and 4 updates are made" in refused
    assert "set objective.generator_steps=2" in refused
    electra(*child, "objective.generator_steps=2")
    earlier = ["run", shared_config, "run.name=earlier", "run.fork_from=stages@2", "train.steps=6", *two_stage]
    electra(*earlier)  # before the discriminator has learned anything it may still be moved
