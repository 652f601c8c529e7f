"""What the machine is doing while a stage runs, by MLflow's own monitors: CPU, memory, disk, network, GPUs.

    <stage>/system.jsonl      one JSON object per sample: step (its number), unix_s, lineage, and each value by name

MLflow's own sampling thread stops for good at the first error of a server. This one writes to the run folder and
never talks to MLflow; the shipping process, which it lives in, ships the file.
"""

import json
import os
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from mlflow.entities import Metric

from pipeline.stages import STAGES, StageRecord, read_record_file
from pipeline.tracking_lines import Line

SAMPLES = "system.jsonl"
FIRST_METRIC = "system/cpu_utilization_percentage"
_INTERVAL_S = 30.0
_LONGEST_LINE_BYTES = 1 << 16
_OF_LINE = ("step", "unix_s", "lineage")


class Sampler(threading.Thread):
    """Samples until ``end``, or until something fails, which it says once."""

    def __init__(self, run_folder: Path, say: Callable[[str], None]):
        """MLflow's own variable MLFLOW_SYSTEM_METRICS_SAMPLING_INTERVAL changes the interval of 30 s."""
        super().__init__(name="system metrics", daemon=True)
        self._folder, self._say = run_folder, say
        self._interval_s = float(os.environ.get("MLFLOW_SYSTEM_METRICS_SAMPLING_INTERVAL") or _INTERVAL_S)
        self._over = threading.Event()
        self._monitors: list[Any] = []

    def run(self) -> None:
        """In the thread."""
        try:
            self._monitors = _monitors()
            self._collect()  # CPU time counts from the sample before
            while not self._over.wait(self._interval_s):
                self.sample()
        except Exception as error:  # whatever a driver comes up with, shipping goes on
            self._say(f"no more system metrics of this attempt: {type(error).__name__}: {error}")

    def sample(self) -> None:
        """Writes a line for the stage that runs now, if any."""
        values, stage = self._collect(), _running_stage(self._folder)
        if stage is None:
            return
        path = self._folder / stage.stage / SAMPLES
        line = {"step": _last_step(path) + 1, "unix_s": time.time(), "lineage": stage.lineage} | values
        with open(path, "a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")

    def _collect(self) -> dict[str, float]:
        values: dict[str, float] = {}
        for monitor in self._monitors:
            monitor.collect_metrics()
            values.update(monitor.aggregate_metrics() or {})
            monitor.clear_metrics()
        return values

    def end(self) -> None:
        """No sample is begun after this."""
        self._over.set()
        if self.is_alive():
            self.join(self._interval_s)


def points_of(line: Line) -> list[Metric]:
    """A sample by the names that MLflow's System metrics page looks for."""
    at_ms = int(line["unix_s"] * 1000)
    values = {name: value for name, value in line.items() if name not in _OF_LINE}
    return [Metric(f"system/{name}", float(value), at_ms, line["step"]) for name, value in values.items()]


def _monitors() -> list[Any]:
    """Imported here, where a library that is missing costs the samples and nothing else."""
    from mlflow.system_metrics.metrics.cpu_monitor import CPUMonitor
    from mlflow.system_metrics.metrics.disk_monitor import DiskMonitor
    from mlflow.system_metrics.metrics.gpu_monitor import GPUMonitor
    from mlflow.system_metrics.metrics.network_monitor import NetworkMonitor
    from mlflow.system_metrics.metrics.rocm_monitor import ROCMMonitor

    found: list[Any] = [CPUMonitor(), DiskMonitor(), NetworkMonitor()]
    for of_gpu in (GPUMonitor, ROCMMonitor):
        try:
            return [*found, of_gpu()]
        except (ImportError, RuntimeError):  # no library, or no device
            continue
    return found


def _running_stage(run_folder: Path) -> StageRecord | None:
    records = [read_record_file(run_folder / stage / "stage.json") for stage in STAGES]
    return next((record for record in records if record and record.state == "running"), None)


def _last_step(path: Path) -> int:
    """Steps count on after a requeue; what a crash of the machine has left of a line is cut off."""
    if not path.exists():
        return 0
    with open(path, "rb+") as file:
        begin = file.seek(max(0, path.stat().st_size - _LONGEST_LINE_BYTES))
        end = file.read()
        whole = end[: end.rfind(b"\n") + 1]
        file.truncate(begin + len(whole))
    lines = whole.splitlines()
    return int(json.loads(lines[-1])["step"]) if lines else 0
