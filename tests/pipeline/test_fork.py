"""What a run that goes on from another one takes over, and what it refuses."""

import json
from pathlib import Path

import pytest

from data_shards.loader import RowsBefore
from pipeline.config import Config
from pipeline.config_file import load_config
from pipeline.errors import DamagedError
from pipeline.fork import rows_before
from pipeline.keys import science_of
from pipeline.spikes import SkippedRows, add_skip
from pipeline.stages import StageRecord, stage_folder, write_record
from tests.conftest import Electra, read_journal


@pytest.fixture
def written(config_path: Path):
    """A config by its overrides; its pretrain stage has a record."""

    def write(name: str, *overrides: str, corpora: str = "") -> Config:
        text = config_path.read_text()
        if corpora:
            parts = (part.split("=") for part in corpora.split())
            listed = ", ".join(f"{{name: {name}, path: {name}.txt, weight: {weight}}}" for name, weight in parts)
            text = "\n".join(
                f"  corpora: [{listed}]" if line.startswith("  corpora:") else line for line in text.splitlines()
            )
        path = config_path.with_name(f"{name}.yaml")
        path.write_text(text)
        config = load_config(path, (f"run.name={name}", *overrides))
        write_record(config, StageRecord("pretrain", "done", {"science": science_of(config, "pretrain")}))
        return config

    return write


def test_a_run_of_its_own_has_read_nothing(written) -> None:
    assert rows_before(written("own")) is None


def test_a_fork_goes_on_where_its_parent_stopped_to_read(written) -> None:
    parent = written("parent", corpora="books=3 web=1")
    same = written("same", "run.fork_from=parent@256", corpora="books=3 web=1")
    assert rows_before(same) == RowsBefore(256, (1536, 512), (0, 1))
    add_skip(stage_folder(parent, "pretrain"), SkippedRows(200, 128))  # 128 steps' rows were left out before
    add_skip(stage_folder(parent, "pretrain"), SkippedRows(300, 10))
    assert rows_before(same) == RowsBefore(384, (2304, 768), (0, 1))
    halved = written("halved", "run.fork_from=parent@256", "data.sequence_length=64", corpora="books=1 web=1")
    assert rows_before(halved) == RowsBefore(384, (1152, 384), (0, 1))


def test_a_new_corpus_does_not_change_how_the_others_are_keyed(written) -> None:
    written("parent", corpora="books=1 web=1")
    child = written("child", "run.fork_from=parent@128", "train.global_batch_size=16", corpora="art=1 web=1")
    assert rows_before(child) == RowsBefore(128, (0, 512), (2, 1))
    grandchild = written("grandchild", "run.fork_from=child@192", corpora="art=1 books=1 code=1 web=1")
    # 64 steps of 16 rows, half of them art's; books was left where it was
    assert rows_before(grandchild) == RowsBefore(192, (512, 512, 0, 1024), (2, 0, 3, 1))


def test_what_was_read_is_kept_once_the_fork_has_a_checkpoint(written, tmp_path: Path) -> None:
    written("parent", corpora="books=1 web=1")
    child = written("child", "run.fork_from=parent@128", corpora="books=1 web=1")
    read = rows_before(child)
    folder = stage_folder(child, "pretrain")
    step = folder / "checkpoints/step_00000130"
    step.mkdir(parents=True)
    (step / "MANIFEST.json").touch()
    (stage_folder(child, "pretrain").parents[1] / "parent/pretrain/stage.json").unlink()
    assert rows_before(child) == read is not None
    (folder / "rows_before.json").write_text('{"step": 1')
    with pytest.raises(DamagedError, match=r"rows_before.json: unreadable"):
        rows_before(child)
    (folder / "rows_before.json").unlink()  # as in a fork made before there was such a file
    assert rows_before(child) is None


def test_rows_made_in_another_way_are_not_counted(written) -> None:
    written("parent", corpora="books=1")
    assert rows_before(written("child", "run.fork_from=parent@128", "data.layout=paper", corpora="books=1")) is None


def test_a_fork_with_another_batch_trains_on_rows_that_its_parent_did_not(
    shared_config: Path, electra: Electra
) -> None:
    steps = ["train.checkpoint_every=2", "train.held_out_rows=0"]
    electra("run", shared_config, "run.name=parent", "train.steps=4", *steps)
    half = ["run.fork_from=parent@2", "train.global_batch_size=4", "train.micro_batch_size=4"]
    electra("run", shared_config, "run.name=child", "train.steps=6", *half, *steps)
    folder = shared_config.parent / "out/runs/child/pretrain"
    content = (folder / "rows_before.json").read_text()
    assert json.loads(content) == {"step": 2, "corpora": {"made_up": {"number": 0, "rows": 16}}}
    losses = [entry["train/total_loss"] for entry in read_journal(shared_config.parent / "out", "child")]
    (folder / "stage.json").write_text((folder / "stage.json").read_text().replace('"done"', '"stopped"'))
    for later in ("step_00000006",):
        (folder / "checkpoints" / later).rename(folder / later)
    electra("run", shared_config, "run.name=child", "train.steps=6", *half, *steps)
    again = [entry["train/total_loss"] for entry in read_journal(shared_config.parent / "out", "child")]
    assert again == losses and (folder / "rows_before.json").read_text() == content


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
