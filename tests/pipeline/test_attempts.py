"""What an attempt leaves for the next one: its exit code with the reason, and the steps from which requeues went on."""

import json
from contextlib import nullcontext
from pathlib import Path

import pytest

from pipeline import attempts
from pipeline.attempts import EXIT_FILE, record_exit, refuse_to_start
from pipeline.config import Config
from pipeline.config_file import load_config
from pipeline.errors import (
    ConfigError,
    DamagedError,
    DoNotRequeueError,
    ElectraError,
    PeerLostError,
    StoppedByFile,
    StoppedEarly,
)
from pipeline.keys import science_of
from pipeline.stages import StageRecord, write_record
from tests.conftest import Electra

STOP_AT_STEP_3 = """
from pathlib import Path
from data_shards.loader import RowLoader
from pipeline import stopping
stopping._SECONDS_BETWEEN_LOOKS = 0.0
rows_at = RowLoader.rows_at
def touch_and_read(self, step, *rest):
    if step == 3:
        Path(stop_file).touch()
    return rows_at(self, step, *rest)
RowLoader.rows_at = touch_and_read
"""


@pytest.fixture
def exit_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv(EXIT_FILE, str(tmp_path / "exit"))
    return tmp_path / "exit"


@pytest.fixture
def config(config_path: Path) -> Config:
    return load_config(config_path)


def test_final_codes_are_recorded_in_one_line(exit_file: Path) -> None:
    record_exit(93, DoNotRequeueError("diverged\n  at step 7"))
    assert exit_file.read_text() == "93 diverged at step 7\n"
    assert list(exit_file.parent.iterdir()) == [exit_file]


def test_a_grave_code_wins_over_a_stop_in_either_order(exit_file: Path) -> None:
    record_exit(85, StoppedEarly("stopped"))
    record_exit(65, DamagedError("damaged"))
    assert exit_file.read_text() == "65 damaged\n"
    record_exit(85, StoppedEarly("stopped"))
    assert exit_file.read_text() == "65 damaged\n"


def test_a_stop_for_good_is_marked(exit_file: Path) -> None:
    record_exit(85, StoppedByFile("/run/STOP is there"))
    assert exit_file.read_text() == "85 held: /run/STOP is there\n"
    record_exit(85, StoppedEarly("another"))
    assert exit_file.read_text() == "85 held: /run/STOP is there\n"


@pytest.mark.parametrize(
    ("code", "error"),
    [(1, ElectraError("crash")), (75, PeerLostError("gone")), (85, StoppedEarly("")), (1, ValueError("bug"))],
)
def test_nothing_else_is_recorded(code: int, error: Exception, exit_file: Path) -> None:
    record_exit(code, error)
    assert not exit_file.exists()


def test_without_a_job_script_nothing_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(EXIT_FILE, raising=False)
    monkeypatch.chdir(tmp_path)
    record_exit(93, DoNotRequeueError("diverged"))
    assert not list(tmp_path.iterdir())


def test_a_place_that_cannot_be_written_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv(EXIT_FILE, str(tmp_path / "missing/exit"))
    monkeypatch.setattr(attempts.logger, "propagate", True)
    record_exit(78, ConfigError("wrong"))
    assert "missing/exit: No such file or directory; the job script has only srun's exit code" in caplog.text


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (
            ("train.keep_best=true", "train.held_out_every=5", "train.held_out_rows=0"),
            "train.held_out_rows=0 leaves none",
        ),
        (
            ("train.keep_best=true", "train.held_out_every=5", "data.held_out_fraction=0"),
            "held_out_fraction=0 leaves none",
        ),
        (("train.spike_rollbacks=2", "train.spike_threshold=null"), "train.spike_threshold=null none is found; set a"),
    ],
)
def test_safeguards_that_would_never_do_anything_are_refused(config_path: Path, overrides, said: str) -> None:
    """When training starts: what an earlier version ran with such keys can still be read."""
    config = load_config(config_path, overrides)
    with pytest.raises(ConfigError, match=said):
        refuse_to_start(config)
    refuse_to_start(load_config(config_path, overrides[:-1]))


def test_a_loss_that_would_follow_from_the_number_of_processes_is_refused(config_path: Path) -> None:
    """A run that has begun keeps its micro-batch."""
    config = load_config(config_path, ("recipe=released", "train.micro_batch_size=auto"))
    with pytest.raises(ConfigError, match=r"set train\.micro_batch_size to a number of rows"):
        refuse_to_start(config)
    other = science_of(load_config(config_path, ("train.micro_batch_size=auto",)), "pretrain")
    for science, begun in ((other, False), (science_of(config, "pretrain"), True)):  # it starts anew; it goes on
        inputs = {"science": json.loads(json.dumps(science))}
        write_record(config, StageRecord("pretrain", "failed", inputs, numerics={"micro_batch_rows": 4}))
        with nullcontext() if begun else pytest.raises(ConfigError, match="set train"):
            refuse_to_start(config)
    refuse_to_start(load_config(config_path, ("recipe=released", "train.micro_batch_size=4", "run.name=new")))
    refuse_to_start(load_config(config_path, ("train.micro_batch_size=auto", "run.name=new")))


def test_the_file_stop_keeps_all_from_starting(config: Config) -> None:
    refuse_to_start(config)
    config.run_folder.mkdir(parents=True)
    (config.run_folder / "STOP").touch()
    with pytest.raises(StoppedByFile, match="STOP is there: remove it to go on"):
        refuse_to_start(config)
    with pytest.raises(StoppedByFile, match=r"^$"):  # one of them says it
        refuse_to_start(config, rank=1)


class Slurm:
    """Starts of jobs, and how far a run's checkpoints have come."""

    def __init__(self, config: Config, monkeypatch: pytest.MonkeyPatch):
        self._config, self._monkeypatch = config, monkeypatch

    def start(self, restart: int, job: str = "7", rank: int = 0) -> None:
        self._monkeypatch.setenv("SLURM_JOB_ID", job)
        self._monkeypatch.setenv("SLURM_RESTART_COUNT", str(restart))
        refuse_to_start(self._config, rank)

    def save(self, step: int) -> None:
        folder = self._config.run_folder / f"pretrain/checkpoints/step_{step:08d}"
        folder.mkdir(parents=True)
        (folder / "MANIFEST.json").touch()


@pytest.fixture
def slurm(config: Config, monkeypatch: pytest.MonkeyPatch) -> Slurm:
    return Slurm(config, monkeypatch)


def test_three_requeues_without_progress_end_the_job(slurm: Slurm, config: Config) -> None:
    slurm.save(40)
    for restart in (0, 1, 2):
        slurm.start(restart)
    with pytest.raises(DoNotRequeueError, match="job 7 was requeued 3 times in a row and is still at step 40") as ended:
        slurm.start(3)
    assert "log.txt" in str(ended.value)
    slurm.start(3, rank=1)  # one of them says it
    slurm.start(0, job="8")
    slurm.start(1, job="8")
    assert json.loads((config.run_folder / "pretrain/requeues.json").read_text()) == {"job": "8", "steps": {"1": 40}}


def test_progress_begins_the_count_anew(slurm: Slurm) -> None:
    slurm.start(1)
    slurm.start(2)
    slurm.save(10)
    slurm.start(3)
    slurm.start(4)
    with pytest.raises(DoNotRequeueError, match="still at step 10"):
        slurm.start(5)


def test_starts_in_one_allocation_count_once(slurm: Slurm) -> None:
    """Three that counted would end in 93."""
    for _ in range(5):
        slurm.start(1)
    slurm.start(2)


def test_an_unreadable_count_begins_anew(
    slurm: Slurm, config: Config, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    slurm.start(1)
    path = config.run_folder / "pretrain/requeues.json"
    path.write_text("{")
    monkeypatch.setattr(attempts.logger, "propagate", True)
    slurm.start(2)
    assert "requeues are counted from zero" in caplog.text
    assert json.loads(path.read_text())["steps"] == {"2": 0}


def test_the_command_line_records_how_it_ended(electra: Electra, tmp_path: Path) -> None:
    electra("pretrain", tmp_path / "missing.yaml", code=78, ELECTRA_EXIT_FILE=str(tmp_path / "exit"))
    assert (tmp_path / "exit").read_text().startswith("78 ") and "missing.yaml" in (tmp_path / "exit").read_text()
    electra("pretrain", "--unknown", code=64, ELECTRA_EXIT_FILE=str(tmp_path / "exit"))
    assert (tmp_path / "exit").read_text().startswith("64 No such option")


def test_a_stop_file_ends_a_run_with_all_saved_and_holds_it(
    electra: Electra, shared_config: Path, tmp_path: Path
) -> None:
    arguments = [str(shared_config), "run.name=held", "train.steps=8", "train.held_out_rows=0"]
    electra("tokenize", *arguments)
    folder = shared_config.parent / "out/runs/held"
    rank = {"RANK": "0", "WORLD_SIZE": "1"}
    stops = f"stop_file = {str(folder / 'STOP')!r}\n{STOP_AT_STEP_3}"
    electra("pretrain", *arguments, first=stops, code=85, ELECTRA_EXIT_FILE=str(tmp_path / "exit"), **rank)
    recorded = (tmp_path / "exit").read_text()
    assert recorded.startswith("85 held: stopped at step") and "STOP is there" in recorded
    saved = list((folder / "pretrain/checkpoints").glob("step_*"))
    assert len(saved) == 1

    for more in ([], ["--check"]):
        done = electra("pretrain", *arguments, *more, code=85, **rank)
        assert "STOP is there: remove it to go on" in done.stderr
    (folder / "STOP").unlink()
    electra("pretrain", *arguments, **rank)
    assert json.loads((folder / "pretrain/stage.json").read_text())["output"]["checkpoint_step"] == 8
