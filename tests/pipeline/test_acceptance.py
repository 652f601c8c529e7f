"""Acceptance of a cluster: what a part finds in one process and in several, and what the report makes of it."""

import json
import math
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from pipeline import acceptance, acceptance_drill, acceptance_quick, acceptance_speed, meeting
from pipeline.acceptance import MEANT_TO_DIE, PARTS, Check, make_report, run_part, to_markdown
from pipeline.acceptance_quick import quick
from pipeline.config import Config
from pipeline.config_file import load_config
from pipeline.devices import differing_kernels
from pipeline.distributed import Process, resolve_device
from pipeline.errors import ElectraError
from pipeline.goodput import Attempt
from pipeline.measured import Link
from pipeline.meeting import Meeting
from tests.conftest import REPOSITORY, Electra, clean_environment, free_port


@pytest.fixture(autouse=True)
def tests_stay_as_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    """A part may leave marks on its process, which here is that of all tests."""
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR"):
        monkeypatch.setenv(name, "")  # so that what is set is taken back
        monkeypatch.delenv(name)
    monkeypatch.setattr(meeting, "ignore_stop_signals", lambda: None)


@pytest.fixture
def config(config_path: Path) -> Config:
    return load_config(config_path)


def by_name(checks: list[Check]) -> dict[str, Check]:
    return {check.name: check for check in checks}


@pytest.fixture
def together(monkeypatch: pytest.MonkeyPatch):
    """Runs a function as several ranks at once, each in a thread; returns what each returned or raised."""
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("MASTER_PORT", str(free_port()))

    def run(world_size: int, ask) -> list:
        outcomes: list = [None] * world_size

        def be(rank: int) -> None:
            try:
                outcomes[rank] = ask(Process(rank, rank, world_size))
            except ElectraError as error:
                outcomes[rank] = error

        threads = [threading.Thread(target=be, args=(rank,)) for rank in range(world_size)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        return outcomes

    return run


def test_one_process_passes_quickly_and_leaves_nothing(electra: Electra, config_path: Path) -> None:
    done = electra("acceptance", "--quick", config_path)
    lines = done.stdout.splitlines()
    assert [line.split("  ")[0] for line in lines if not line.startswith("WARNING")].count("OK") >= 8
    assert "FAILED" not in done.stdout
    assert not list((config_path.parent / "out" / "acceptance").iterdir())


def test_file_of_several_runs_is_taken_by_its_first(electra: Electra, config_path: Path) -> None:
    text = config_path.read_text()
    config_path.write_text(text + "variants: {one: {run.seed: 1}, two: {launch.device: cuda}}\n")
    electra("acceptance", config_path, "--check")
    config_path.write_text(text + "variants: {one: {launch.device: cuda}, two: {run.seed: 2}}\n")
    assert "no usable GPU" in electra("acceptance", config_path, "--check", code=78).stderr


def test_what_cannot_work_is_refused(electra: Electra, config_path: Path) -> None:
    assert "--part slow: there are quick" in electra("acceptance", config_path, "--part", "slow", code=64).stderr
    assert "no usable GPU" in electra("acceptance", config_path, "--check", "launch.device=cuda", code=78).stderr


def test_a_failed_check_is_one_line_and_exit_code_1(electra: Electra, config_path: Path, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    done = electra("acceptance", "--quick", config_path, f"run.dir={tmp_path / 'file'}", code=1)
    (line,) = (line for line in done.stdout.splitlines() if line.startswith("FAILED"))
    assert line.split()[1] == "run.dir" and "set run.dir to storage" in line
    assert done.stderr == "electra: quick: FAILED: run.dir\n"


def test_full_disk_fails_before_the_run_would(config: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(acceptance_quick, "free_bytes", lambda path: 1 << 20)
    check = by_name(quick(config, Process()))["free space"]
    assert check.state == "FAILED" and check.numbers["free_bytes"] < check.numbers["needed_bytes"]


def test_checkpoints_that_are_there_need_no_more_space(config: Config) -> None:
    whole = by_name(quick(config, Process()))["free space"].numbers["needed_bytes"]
    for step in (5, 10):
        folder = config.run_folder / "pretrain" / "checkpoints" / f"step_{step:08d}"
        folder.mkdir(parents=True)
        (folder / "MANIFEST.json").touch()
    assert by_name(quick(config, Process()))["free space"].numbers["needed_bytes"] == whole / 2  # of three and one more


@pytest.mark.parametrize(
    ("odd", "kind", "state"),
    [
        (["cuda", "V100", ""], "cuda", "WARNING"),
        (["cpu", "CPU", ""], None, "FAILED"),
        ([None, "none", "no usable GPU"], None, "FAILED"),
    ],
)
def test_odd_device_is_named(odd: list, kind: str | None, state: str, config: Config) -> None:
    class Three:
        name = Meeting.name
        nodes = ("n1", "n2", "n3")

        def exchange(self, topic: str, own: list) -> list:
            return [["cuda", "H200", ""], odd, ["cuda", "H200", ""]]

    own_kind = resolve_device(config.launch.device)
    found, check = acceptance_quick.agree_on_device(Three(), config)  # type: ignore[arg-type]
    assert check.state == state and check.found.startswith("n2 (rank 1): ")
    assert found == (own_kind if kind else None)


def test_node_without_git_has_no_other_commit() -> None:
    class Two:
        name = Meeting.name
        nodes = ("n1", "n2")
        commit = "none"

        def exchange(self, topic: str, own: dict) -> list:
            return [own | {"commit": "abc"}, own | {"commit": self.commit}]

    two = Two()
    assert acceptance_quick._check_versions(two).state == "OK"  # type: ignore[arg-type]
    two.commit = "def"
    check = acceptance_quick._check_versions(two)  # type: ignore[arg-type]
    assert check.state == "FAILED" and "commit abc, but def on n2 (rank 1)" in check.found


def test_wrong_product_is_noticed(config: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    multiply = torch.Tensor.__matmul__

    def flips_a_bit(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        product = multiply(a, b)
        if product.dim() == 2:
            product[3, 5] += 1
        return product

    monkeypatch.setattr(torch.Tensor, "__matmul__", flips_a_bit)
    assert by_name(quick(config, Process()))["product"].state == "FAILED"


def test_those_who_do_not_come_are_named(together) -> None:
    def come(process: Process) -> Meeting | None:
        return None if process.rank == 2 else Meeting(process, patience_s=15)

    outcomes = together(4, come)
    assert "1 of 4 processes have not come within 15 s: rank 2;" in str(outcomes[0])
    assert all(isinstance(outcomes[rank], ElectraError) and not str(outcomes[rank]) for rank in (1, 3))


def test_who_falls_silent_is_named_with_its_node(together) -> None:
    def come(process: Process) -> list[int] | None:
        met = Meeting(process)
        met.nodes = [f"n{rank}" for rank in range(process.world_size)]
        return None if process.rank == 1 else met.exchange("counting", process.rank, patience_s=1)

    outcomes = together(3, come)
    assert "no answer for 1 s while counting: n1 (rank 1)" in str(outcomes[0]) and not str(outcomes[2])


def test_values_come_back_in_rank_order_and_rank_0_leaves_last(together) -> None:
    def ask(process: Process) -> tuple[list, float]:
        with Meeting(process) as met:
            values = met.exchange("values", [process.rank, "x"])
            time.sleep(0.5 * process.rank)
            left_at = time.monotonic()
        return values, time.monotonic() if process.rank == 0 else left_at

    outcomes = together(3, ask)
    assert [values for values, _ in outcomes] == [[[0, "x"], [1, "x"], [2, "x"]]] * 3
    assert outcomes[0][1] > max(outcomes[1][1], outcomes[2][1])


def test_odd_version_slow_rank_and_wrong_clock_are_named(together, monkeypatch: pytest.MonkeyPatch) -> None:
    def ask(process: Process) -> list[Check]:
        met = Meeting(process)
        met.nodes = ["n1", "n1", "n2"]
        exchange = met.exchange

        def lie(topic: str, value, *rest):
            if process.rank == 2:
                value = value | {"torch": "1.0"} if topic == "versions" else value
                value = [True, 1e3] if topic == "products" else value
                value = value + 60 if topic.startswith("reading clocks") else value
            return exchange(topic, value, *rest)

        met.exchange = lie  # type: ignore[method-assign]
        return [
            acceptance_quick._check_versions(met), acceptance_quick._check_clocks(met),
            *acceptance_quick._check_products(met, "cpu"),
        ]  # fmt: skip

    outcomes = together(3, ask)
    assert outcomes[0] == outcomes[2]  # so that all ranks exit alike
    checks = by_name(outcomes[0])
    assert checks["versions"].state == "FAILED" and "but 1.0 on n2 (rank 2)" in checks["versions"].found
    assert checks["clocks"].state == "WARNING" and "n2 (rank 2)" in checks["clocks"].found
    assert checks["speed"].state == "WARNING" and "n2 (rank 2)" in checks["speed"].found
    assert checks["product"].state == "OK"


def write_part(config: Config, part: str, state: str = "OK") -> None:
    folder = acceptance.folder_of(config) / "parts"
    folder.mkdir(parents=True, exist_ok=True)
    check = {"name": f"{part} check", "state": state, "found": "a | b", "remedy": "", "numbers": {"nodes": ["n1"]}}
    (folder / f"{part}.json").write_text(json.dumps({"part": part, "seconds": 1.0, "checks": [check]}))


def test_report_fails_for_a_failed_check_and_for_a_part_without_a_result(config: Config) -> None:
    for part in PARTS:
        if part != MEANT_TO_DIE:
            write_part(config, part, "WARNING" if part == "mfu" else "OK")
    report = make_report(config, 1.0, 2)
    assert report["passed"] and "warnings: mfu check" in report["summary"]
    page = to_markdown(report)
    assert page.startswith("# Acceptance: PASSED") and "| a / b |" in page and "2 on n1" in page

    write_part(config, "parity", "FAILED")
    assert "failed: parity check" in make_report(config, 1.0, 2)["summary"]
    (acceptance.folder_of(config) / "parts" / "parity.json").unlink()
    report = make_report(config, 1.0, 2)
    assert not report["passed"] and report["missing"] == ["parity"] and "NO RESULT" in to_markdown(report)


def test_part_keeps_why_it_could_not_go_on(config: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(config: Config, process: Process) -> list[Check]:
        raise ElectraError("no wires")

    monkeypatch.setattr(acceptance_quick, "quick", refuse)
    monkeypatch.setattr(acceptance.signal, "alarm", lambda seconds: 0)
    with pytest.raises(ElectraError, match="quick: FAILED: quick"):
        run_part(config, Process(), "quick")
    assert make_report(config, 1.0, 1)["parts"]["quick"]["checks"][0]["found"] == "no wires"


def test_first_part_that_fails_is_the_last(electra: Electra, config_path: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    done = electra(
        "acceptance", config_path, f"run.dir={out}", "model.hidden_size=1048576", "model.attention_heads=16384", code=1
    )
    assert "FAILED   free space" in done.stdout and "acceptance, bandwidth" not in done.stdout
    report = json.loads((out / "acceptance" / "report.json").read_text())
    assert not report["passed"] and report["missing"] == ["bandwidth", "mfu", "data", "unbroken", "resumed", "parity"]
    assert done.stdout.splitlines()[-1].startswith("FAILED: 9 checks in ")


@pytest.mark.parametrize(
    ("resumed", "first_steps", "state"), [("aa", (0, 8), "OK"), ("bb", (0, 8), "FAILED"), ("aa", (0,), "FAILED")]
)
def test_resume_passes_only_with_equal_weights_after_a_kill(
    resumed: str, first_steps: tuple[int, ...], state: str, config: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    attempts = [Attempt(number, "", 0.0, 0.0, first, 9) for number, first in enumerate(first_steps, 1)]
    digests = {"killed": resumed, "unbroken": "aa"}
    monkeypatch.setattr(acceptance_drill, "run_as_rank", lambda *_, **__: None)
    monkeypatch.setattr(acceptance_drill, "read_attempts", lambda folder: attempts)
    monkeypatch.setattr(
        acceptance_drill, "_digests", lambda run: {"weights.safetensors": digests[run.run.name], "optimizer.st": "cc"}
    )
    (check,) = acceptance_drill.resumed(config, Process())
    assert check.state == state
    assert ("not equal to the unbroken run: weights.safetensors" in check.found) == (resumed == "bb")


@pytest.mark.parametrize(("lost", "state"), [(0.0, "OK"), (0.02, "FAILED"), (math.nan, "FAILED")])
def test_a_stage_that_loses_gradients_fails_parity(
    lost: float, state: str, config: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(acceptance_drill, "init_process_group", lambda *_: None)
    monkeypatch.setattr(acceptance_drill, "choose_algorithms", lambda _: None)
    monkeypatch.setattr(acceptance_drill, "Control", lambda *_: None)
    monkeypatch.setattr(acceptance_drill.dist, "destroy_process_group", lambda: None)
    asked = []

    def losses(settings: Config, *_: object) -> list[float]:
        asked.append(Path(str(settings.deepspeed.config)).stem)
        return [10.0, 9.0 + (lost if asked[-1] == "zero2" else 0.0)]

    monkeypatch.setattr(acceptance_drill, "_losses", losses)
    (check,) = acceptance_drill.parity(config, Process())
    assert asked == ["zero0", "zero1", "zero2", "zero3"] and check.state == state


@pytest.mark.parametrize(("bytes_per_s", "state"), [(300e9, "OK"), (30e9, "WARNING")])
def test_slow_wires_are_a_warning(
    bytes_per_s: float, state: str, together, config: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    link = Link(processes=2, processes_per_machine=2, bytes_per_s=bytes_per_s, latency_s=2e-5)
    monkeypatch.setattr(acceptance_speed, "agree_on_device", lambda *_: ("cuda", None))
    monkeypatch.setattr(acceptance_speed, "init_process_group", lambda *_: None)
    monkeypatch.setattr(acceptance_speed, "measure_link", lambda *_: link)
    monkeypatch.setattr(acceptance_speed, "device_name", lambda _: "NVIDIA H200")
    monkeypatch.setattr(acceptance_speed.dist, "destroy_process_group", lambda: None)
    outcomes = together(2, lambda process: acceptance_speed.bandwidth(config, process))
    assert outcomes[0] == outcomes[1] and [check.state for check in outcomes[0]] == [state]


def test_steps_and_parity_are_measured_here(electra: Electra, config_path: Path) -> None:
    for part, names in (("mfu", ["steps", "kernels"]), ("parity", ["ZeRO parity"])):
        done = electra("acceptance", config_path, "--part", part)
        found = json.loads((config_path.parent / "out" / "acceptance" / "parts" / f"{part}.json").read_text())
        assert [item["name"] for item in found["checks"]] == names and all(name in done.stdout for name in names)
        numbers = found["checks"][0]["numbers"]
        if part == "mfu":
            assert 0 < numbers["mfu_pct"][0] < 200  # of a peak that is measured, on a machine that does other things
        else:
            assert len(numbers["losses"]["0"]) == 10 and numbers["relative"]["3"] < 1e-4


def test_kernels_that_differ_are_a_warning() -> None:
    alike = [["n1", {"attention": "triton"}, {"attention": "fastest"}]] * 2
    sick = ["n2", {"attention": "torch"}, {"attention": "always there; triton's attention fails"}]
    differing = differing_kernels([*alike, sick])
    check = acceptance_speed.check_kernels(differing, "auto")
    assert acceptance_speed.check_kernels(differing, "apex").state == "FAILED", "pretraining would refuse it"
    assert check.state == "WARNING" and "rank 2 on n2 has torch (always there; triton's attention fails)" in check.found
    assert acceptance_speed.check_kernels(differing_kernels(alike), "apex").state == "OK"


@pytest.mark.distributed
def test_two_processes_of_torchrun(config_path: Path) -> None:
    command = [
        sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m", "pipeline",
        "acceptance", "--quick", str(config_path),
    ]  # fmt: skip
    done = subprocess.run(command, env=clean_environment(), cwd=REPOSITORY, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert "2 on 1 nodes" in done.stdout and "right on all 2 by gloo" in done.stdout
