"""`electra tune` as a user runs it, and what becomes of a candidate that does not fit."""

import json
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch

from pipeline.bench import peak_bytes, reset_peak, resident_bytes
from pipeline.config_file import load_config
from pipeline.errors import ConfigError
from pipeline.keys import science_of
from pipeline.measured import read_measurements
from pipeline.tune import Race
from tests.conftest import Electra, free_port

SIZES = (1, 2, 4, 8)


def measured_file(run_dir: Path) -> Path:
    (path,) = (run_dir / "measured").glob("*.json")
    return path


def test_the_last_line_is_what_to_paste_and_the_estimate_reads_the_rest(config_path, electra: Electra, tmp_path):
    small_buckets = tmp_path / "zero1.json"
    small_buckets.write_text('{"zero_optimization": {"stage": 1, "reduce_bucket_size": 1000000}}')
    own = f"deepspeed.config={small_buckets}"
    done = electra("tune", config_path, own, "--seconds", 5)
    overrides = done.stdout.strip().splitlines()[-1].split()
    assert [text.partition("=")[0] for text in overrides] == ["train.micro_batch_size", "kernels.backend"]
    before, after = load_config(config_path, (own,)), load_config(config_path, (own, *overrides))
    for stage in ("tokenize", "pretrain"):
        assert science_of(before, stage) == science_of(after, stage)

    assert "rows are synthetic" in done.stderr
    (found,) = read_measurements(measured_file(tmp_path / "out"))
    assert (found.rows_from, found.link, found.processes_beside) == ("synthetic", None, 1)
    table = [line for line in done.stderr.splitlines() if line.startswith("train.micro_batch_size=")]
    assert len(table) == len(found.micro_batches) == len({time.rows for time in found.micro_batches})
    assert {time.kernels for time in found.micro_batches} == {found.auto_kernels} == {"kernels.backend=torch"}
    assert "not measured: kernels.backend=triton does not work here" in done.stderr
    assert "reference" not in done.stderr
    assert sum(line.endswith("*") for line in table) == 1
    fastest = min(found.micro_batches, key=lambda time: -(-8 // time.rows) * time.seconds)
    assert overrides == [f"train.micro_batch_size={fastest.rows}", fastest.kernels]

    shown = json.loads(electra("config", config_path, own, *overrides, "--json").stdout)["estimate"]
    assert (shown["hardware"], shown["basis"]) == (found.device, "modelled from measurements")
    assert shown["compute_s"] == pytest.approx(8 / fastest.rows * fastest.seconds)
    given = electra("config", config_path, own, *overrides, "--json", "--measured", measured_file(tmp_path / "out"))
    assert json.loads(given.stdout)["estimate"] == shown


def test_two_processes_measure_at_once_and_what_lies_between_them(shared_config, electra: Electra, start_electra):
    name, run_dir = "run.name=tuned", shared_config.parent / "out"
    electra("tokenize", shared_config, name)
    rendezvous = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1"}
    rendezvous["MASTER_PORT"] = str(free_port())
    tune = ("tune", shared_config, name, "--seconds", 2)
    ranks = [start_electra(*tune, RANK=rank, LOCAL_RANK=rank, **rendezvous) for rank in "01"]
    codes = [rank.wait(200) for rank in ranks]
    assert codes == [0, 0], [(rank.folder / "err").read_text() for rank in ranks]
    said = [(rank.folder / "out").read_text() for rank in ranks]
    assert said[0].strip().splitlines()[-1].startswith("train.micro_batch_size=")
    assert "train.micro_batch_size" not in said[1]
    (found,) = read_measurements(measured_file(run_dir))
    assert found.link
    assert (found.link.processes, found.link.processes_per_machine, found.processes_beside) == (2, 2, 2)
    assert found.rows_from == "shards"
    assert {time.rows for time in found.micro_batches} <= {1, 2, 4}  # two processes leave none idle
    shown = json.loads(electra("config", shared_config, name, "--world-size", 2, "--json").stdout)["estimate"]
    assert shown["hardware"] == found.device
    assert shown["reduce_exposed_s"] > 0


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["train.precision=fp16"], "train.precision=fp16 needs a GPU"),
        (["launch.device=cuda"], "launch.device=cuda, but PyTorch"),
    ],
)
@pytest.mark.skipif(torch.cuda.is_available(), reason="about machines without a GPU")
def test_what_cannot_run_here_is_refused(config_path, electra: Electra, overrides, message):
    assert message in electra("tune", config_path, *overrides, code=78).stderr


def test_one_process_is_measured_and_a_damaged_file_refused_before_that(config_path, electra: Electra, tmp_path):
    said = electra("tune", config_path, "launch.processes=2", "--seconds", 0).stderr
    assert "one process is measured, not 2; torchrun --nproc-per-node=2" in said
    assert "train.micro_batch_size=1 kernels.backend=torch: the fastest is the largest size that there was time" in said
    path = measured_file(tmp_path / "out")
    path.write_text(path.read_text()[:100])
    refused = electra("tune", config_path, "--seconds", 1000, code=78).stderr
    assert f"{path}: not what `electra tune` writes" in refused


@pytest.mark.parametrize("seconds", ["nan", "inf"])
def test_a_time_without_end_is_wrong_usage(config_path, electra: Electra, seconds):
    refused = electra("tune", config_path, "--seconds", seconds, code=64).stderr
    assert f"--seconds {seconds}: must be a finite number" in refused


class Choice:
    overrides = "kernels.backend=torch"


class FakeBench:
    """A device with room for so many rows."""

    choice = Choice()
    last_step_s = 0.001

    def __init__(self, room: int = 4) -> None:
        self.room, self.rebuilt, self.ran = room, 0, []

    def step(self, rows: int) -> tuple[float, float]:
        activations = torch.zeros(rows)
        if rows > self.room:
            self.left_behind = weakref.ref(activations)
            raise torch.OutOfMemoryError("out of memory\nTried to allocate")
        self.ran.append(rows)
        return 0.001 * (2 + rows), 0.001

    def rebuild(self) -> None:
        assert self.left_behind() is None, "the error's traceback still holds what the step had"
        self.rebuilt += 1

    def reset_peak(self) -> None:
        pass

    def peak_gib(self) -> float:
        return 0.0


def test_the_end_of_memory_ends_the_search_and_the_engine_starts_anew():
    bench: Any = FakeBench()
    candidates = Race([bench], [*SIZES, 16], 5, "cpu").run()
    assert [candidate.rows for candidate in candidates] == [1, 2, 4]
    assert bench.rebuilt == 1
    assert all(len(candidate.micro_batch_s) >= 3 for candidate in candidates)
    assert bench.ran[-1] == 4  # the others take a third longer for a row


def test_nothing_fits():
    bench: Any = FakeBench(room=0)
    with pytest.raises(ConfigError, match="a micro-batch of 1 rows does not fit"):
        Race([bench], list(SIZES), 0.5, "cpu").run()


def test_too_large_a_micro_batch_for_the_free_memory_is_not_tried(monkeypatch):
    bench: Any = FakeBench()
    bench.peak_gib = lambda: 1.0
    monkeypatch.setattr("pipeline.tune.free_memory_bytes", lambda: 2 * 2**30)
    assert [candidate.rows for candidate in Race([bench], list(SIZES), 0.5, "cpu").run()] == [1]


def test_peaks_are_those_of_the_last_step():
    reset_peak("cpu")
    before = resident_bytes("cpu")
    large = torch.ones(25_000_000)
    assert peak_bytes("cpu") - before > 90e6
    del large
    reset_peak("cpu")
    assert peak_bytes("cpu") - before < 50e6
