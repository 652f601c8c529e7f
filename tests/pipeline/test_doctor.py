"""`electra doctor`: each thing that can be wrong is named with what to do; nothing hangs or stays behind."""

import datetime
import fcntl
import http.server
import json
import os
import re
import shutil
import sqlite3
import ssl
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

import pytest

from pipeline import meeting
from pipeline.config import Config
from pipeline.config_file import load_config
from pipeline.distributed import Process
from pipeline.doctor import database, examine, gpus, machine, nodes, server, slurm, software, storage
from pipeline.doctor.checks import CallError, Check, ask, call, failure, ok, size, warning
from pipeline.doctor.examine import Report
from pipeline.doctor.gpus import Driver, Torch, given_gpus, judge, parse_cuda, parse_gpus
from pipeline.errors import ConfigError
from pipeline.plan import make_plan
from pipeline.slurm_step import meeting_place, nodes_of_step
from tests.conftest import REPOSITORY, Electra, free_port

# In the form of `nvidia-smi --query-gpu=… --format=csv,noheader,nounits`; put together by hand, from no machine.
H100 = "0, NVIDIA H100 80GB HBM3, 81559, 4, 550.54.15, Default, Disabled, Enabled, 0\n"
WORN = (
    "0, NVIDIA A100-SXM4-80GB, 81920, 9000, 535.104.05, Default, Enabled, Enabled, 0\n"
    "1, NVIDIA A100-SXM4-80GB, 81920, 4, 535.104.05, Prohibited, Disabled, Disabled, 3\n"
)
TITAN = "0, TITAN Xp, 12196, 7, 450.57, Default, [N/A], [N/A], [N/A]\n"
# Headers that others have recorded: Project-HAMi/HAMi#1903 and sgl-project/sglang#27487 on GitHub.
HEADER_580 = "| NVIDIA-SMI 580.119.02             Driver Version: 580.119.02     CUDA Version: 13.0     |"
HEADER_610 = "| NVIDIA-SMI 610.43.02              KMD Version: 610.43.02     CUDA UMD Version: 13.3     |"

CPU_BUILD, CUDA_BUILD = Torch("2.13.0+cpu"), Torch("2.13.0+cu130", cuda="13.0")


@pytest.fixture
def config(config_path: Path) -> Config:
    return load_config(config_path)


def by_name(checks: Iterator[Check] | list[Check]) -> dict[str, Check]:
    return {check.name: check for check in checks}


def states(checks: dict[str, Check]) -> dict[str, str]:
    return {name: check.state for name, check in checks.items() if check.state != "ok"}


# ---- asking


def test_question_that_raises_is_a_failure_with_what_it_said_before() -> None:
    def question() -> Iterator[Check]:
        yield ok("first", "fine")
        raise ValueError("no such thing\nand a long story")

    found = ask("second", question)
    assert [(check.name, check.state, check.value) for check in found] == [
        ("first", "ok", "fine"), ("second", "failure", "no such thing"),
    ]  # fmt: skip
    with pytest.raises(ValueError, match="no such thing"):
        ask("second", question, debug=True)


def test_foreseen_error_brings_its_own_remedy() -> None:
    def question() -> Iterator[Check]:
        raise ConfigError("x=3 is odd; make it even")
        yield

    assert ask("x", question) == [failure("x", "x=3 is odd", "make it even")]


def test_question_without_an_answer_is_left_behind() -> None:
    began = time.monotonic()
    (found,) = ask("slow", lambda: time.sleep(30) or [], limit_s=0.2)
    assert found.state == "failure" and "no answer within" in found.value and time.monotonic() - began < 5


@pytest.mark.parametrize(
    ("command", "limit_s", "said"),
    [
        (["sh", "-c", "echo sh: first >&2; echo 'sh: it is broken' >&2; exit 3"], 60, "sh: it is broken"),
        (["sleep", "30"], 0.3, "sleep has not answered within 0 s"),
        (["no-such-program"], 60, "no-such-program: No such file or directory"),
    ],
    ids=["fails", "hangs", "absent"],
)
def test_program_that_does_not_answer_is_named(command: list[str], limit_s: float, said: str) -> None:
    with pytest.raises(CallError) as error:
        call(*command, limit_s=limit_s)
    assert str(error.value) == said


# ---- GPUs


def test_what_the_driver_says_is_read() -> None:
    (gpu,) = parse_gpus(H100)
    assert (gpu.name, gpu.memory_bytes, gpu.driver) == ("NVIDIA H100 80GB HBM3", 81559 << 20, "550.54.15")
    assert (gpu.mig_mode, gpu.ecc_mode, gpu.uncorrected_errors) == ("Disabled", "Enabled", 0)
    (titan,) = parse_gpus(TITAN)
    assert (titan.mig_mode, titan.ecc_mode, titan.uncorrected_errors) == ("", "", None)
    assert parse_gpus("No devices were found\n") == ()
    assert (parse_cuda(HEADER_580), parse_cuda(HEADER_610), parse_cuda("")) == ("13.0", "13.3", "")


def test_good_gpus_are_good() -> None:
    torch = Torch("2.13.0+cu130", "13.0", names=("NVIDIA H100 80GB HBM3",) * 2, nccl="2.27.5")
    found = by_name(judge(torch, Driver("13.1", parse_gpus(H100)), {}, "auto"))
    assert not states(found)
    assert found["gpus"].value == "2 x NVIDIA H100 80GB HBM3" and found["NCCL"].value == "2.27.5"
    assert found["driver"].value == "550.54.15, for CUDA up to 13.1" and found["GPU memory"].value == "80 GiB"
    assert not states(
        by_name(judge(Torch("2", "11.0", names=("TITAN Xp",)), Driver("11.0", parse_gpus(TITAN)), {}, "auto"))
    )


def test_every_bad_setting_of_a_gpu_is_named_with_its_number() -> None:
    torch = Torch("2.13.0+cu121", "12.1", names=("NVIDIA A100-SXM4-80GB",) * 2)
    found = by_name(judge(torch, Driver("12.2", parse_gpus(WORN)), {}, "auto"))
    assert states(found) == dict.fromkeys(("GPUs in use", "compute mode", "MIG", "ECC", "memory errors"), "warning")
    assert found["MIG"].value.startswith("GPU 0: ") and found["memory errors"].value.startswith("GPU 1: ")
    assert all(found[name].remedy for name in states(found))


def test_driver_of_an_older_cuda_fails() -> None:
    driver = Driver("12.2", parse_gpus(H100))
    found = by_name(judge(Torch("2.13.0+cu130", "13.0", names=("H100",)), driver, {}, "auto"))
    assert found["CUDA"].state == "failure" and "the driver runs 12.2 at most" in found["CUDA"].value
    assert by_name(judge(Torch("2", "12.8", names=("H100",)), driver, {}, "auto"))["CUDA"].state == "ok"


@pytest.mark.parametrize(
    ("torch", "driver", "environment", "setting", "state", "words"),
    [
        (CPU_BUILD, None, {}, "auto", "ok", "no GPU: runs on the CPU"),
        (CPU_BUILD, None, {"SLURM_GPUS_ON_NODE": "0"}, "auto", "ok", "no GPU"),
        (CPU_BUILD, None, {"SLURM_JOB_GPUS": "0,1"}, "auto", "failure", "=0,1, but torch 2.13.0+cpu is a build"),
        (CPU_BUILD, None, {"CUDA_VISIBLE_DEVICES": "3"}, "auto", "failure", "CUDA_VISIBLE_DEVICES=3"),
        (CPU_BUILD, Driver("13.0", parse_gpus(H100)), {}, "auto", "failure", "nvidia-smi sees 1 x NVIDIA H100"),
        (CUDA_BUILD, Driver("13.0", parse_gpus(H100)), {"CUDA_VISIBLE_DEVICES": ""}, "auto", "ok", "no GPU is to be"),
        (CUDA_BUILD, None, {"CUDA_VISIBLE_DEVICES": "-1", "SLURM_JOB_GPUS": "0"}, "auto", "failure", "hides them"),
        (CUDA_BUILD, Driver("13.0", parse_gpus(H100)), {}, "auto", "failure", "for CUDA 13.0 can use none"),
        (CUDA_BUILD, None, {}, "cuda", "failure", "launch.device=cuda, but torch"),
    ],
)  # fmt: skip
def test_torch_without_a_gpu(
    torch: Torch, driver: Driver | None, environment: dict, setting: str, state: str, words: str
) -> None:
    found = by_name(judge(torch, driver, environment, setting))["gpus"]
    assert (found.state, bool(found.remedy)) == (state, state != "ok") and words in found.value


NO_DEVICES = ("No devices were found", 6)
NO_DRIVER = (
    "NVIDIA-SMI has failed because it couldn't communicate with the NVIDIA driver. Make sure that the latest NVIDIA "
    "driver is installed and running.", 9,
)  # fmt: skip
MISMATCH = ("Failed to initialize NVML: Driver/library version mismatch", 18)


@pytest.mark.parametrize(
    ("said", "given", "device", "states_of_each"),
    [
        (NO_DEVICES, "", "auto", {"driver": "ok", "gpus": "ok"}),
        (NO_DRIVER, "", "auto", {"driver": "ok", "gpus": "ok"}),
        (MISMATCH, "", "auto", {"driver": "warning", "gpus": "ok"}),
        (NO_DRIVER, "0", "auto", {"driver": "failure", "gpus": "failure"}),
        (NO_DEVICES, "", "cuda", {"driver": "failure", "gpus": "failure"}),
        (MISMATCH, "0", "cpu", {"gpus": "ok"}),
    ],
)
def test_driver_that_fails_matters_where_gpus_are_to_be(
    said: tuple[str, int], given: str, device: Any, states_of_each: dict[str, str], config: Config,
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path,
) -> None:  # fmt: skip
    program = tmp_path / "nvidia-smi"
    program.write_text(f'#!/bin/sh\necho "{said[0]}"\nexit {said[1]}\n')
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.setenv("SLURM_JOB_GPUS", given)
    monkeypatch.setattr(gpus, "look_through_torch", lambda: CUDA_BUILD)
    launch = config.launch.model_copy(update={"device": device})
    found = by_name(ask("gpus", gpus.check_gpus, config.model_copy(update={"launch": launch})))
    assert {name: check.state for name, check in found.items()} == states_of_each
    assert device == "cpu" or said[0] in found["driver"].value


def test_what_a_gpu_does_not_say_is_unknown_and_what_is_broken_is_named() -> None:
    hidden = "0, NVIDIA A100, [Insufficient Permissions], [Insufficient Permissions], 550.54, , [N/A], [N/A], 0\n"
    lost = "1, NVIDIA A100, [Unknown Error], 4, 550.54, Default, Disabled, [Unknown Error], [GPU requires reset]\n"
    first, second = parse_gpus(hidden + lost)
    assert (first.memory_bytes, first.used_bytes, first.mig_mode, first.problem) == (None, None, "", "")
    assert (second.memory_bytes, second.used_bytes, second.uncorrected_errors) == (None, 4 << 20, None)
    torch = Torch("2", "12.1", names=("NVIDIA A100",) * 2)
    found = by_name(judge(torch, Driver("12.4", (first, second)), {}, "auto"))
    assert states(found) == {"GPU state": "failure"}
    assert found["GPU state"].value == "GPU 1: Unknown Error, GPU requires reset"
    assert found["GPU memory"].value == "unknown" and "GPU settings" not in found


@pytest.mark.parametrize(
    ("count", "environment", "words"),
    [
        (7, {"SLURM_GPUS_ON_NODE": "8", "CUDA_VISIBLE_DEVICES": "0,1,2,3,4,5,6,7"}, "of 8 by SLURM_GPUS_ON_NODE"),
        (7, {"SLURM_GPUS_ON_NODE": "8", "SLURM_STEP_TASKS_PER_NODE": "8(x2)"}, "of 8 by SLURM_GPUS_ON_NODE and 8 by"),
        (7, {}, "of 8 by nvidia-smi"),
        (1, {"SLURM_GPUS_ON_NODE": "2", "SLURM_STEP_TASKS_PER_NODE": "2", "CUDA_VISIBLE_DEVICES": "0,1"}, "of 2 by"),
        (8, {"SLURM_GPUS_ON_NODE": "8", "SLURM_STEP_TASKS_PER_NODE": "1(x2)"}, ""),
        (1, {"SLURM_GPUS_ON_NODE": "8", "SLURM_STEP_TASKS_PER_NODE": "8", "CUDA_VISIBLE_DEVICES": "0"}, ""),
        (2, {"CUDA_VISIBLE_DEVICES": "0,1"}, ""),  # the user's own choice
    ],
)
def test_gpu_that_torch_does_not_see_is_missed(count: int, environment: dict[str, str], words: str) -> None:
    driver = Driver("13.1", parse_gpus("".join(H100.replace("0,", f"{index},", 1) for index in range(8))))
    torch = Torch("2", "13.0", names=("NVIDIA H100",) * count)
    found = by_name(judge(torch, driver, environment, "auto"))["gpus"]
    assert (found.state, bool(found.remedy)) == (("failure", True) if words else ("ok", False))
    assert f"{count} x NVIDIA H100" in found.value and words in found.value


def test_task_with_a_gpu_of_its_own_misses_none() -> None:
    torch, environment = Torch("2", "13.0", names=("H100",)), {"SLURM_GPUS_ON_NODE": "8"}
    driver = Driver("13.1", parse_gpus(H100))  # a cgroup shows it no other
    assert by_name(judge(torch, driver, environment, "auto"))["gpus"].state == "failure"
    environment["SLURM_STEP_TASKS_PER_NODE"] = "8(x2)"
    assert by_name(judge(torch, driver, environment, "auto"))["gpus"].state == "ok"


def test_nobody_gives_gpus_by_an_empty_list() -> None:
    assert given_gpus({"CUDA_VISIBLE_DEVICES": "", "SLURM_GPUS_ON_NODE": "0"}) == ""
    assert given_gpus({"SLURM_GPUS_ON_NODE": "8"}) == "SLURM_GPUS_ON_NODE=8"


# ---- software


@pytest.mark.parametrize(
    ("asked", "state", "words"),
    [
        ("numpy>=1.26", "ok", ""),
        ("numpy>=99", "failure", "where >=99 is needed"),
        ("no-such-package>=1", "failure", "not installed"),
    ],
)
def test_packages_are_held_against_their_floors(asked: str, state: str, words: str) -> None:
    from packaging.requirements import Requirement

    found = software.check_package(Requirement(asked))
    assert found.state == state and words in found.value
    assert found.remedy == ("" if state == "ok" else f"pip install '{asked}'")


def test_optional_packages_may_be_absent(monkeypatch: pytest.MonkeyPatch) -> None:
    from packaging.requirements import Requirement

    def absent(name: str) -> str:
        raise software.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(software.metadata, "version", absent)
    assert software.check_package(Requirement("transformers>=5")).state == "ok"
    assert software.check_package(Requirement("deepspeed>=1")).state == "failure"
    monkeypatch.setattr(software.metadata, "version", lambda _: "1.0")
    old = software.check_package(Requirement("transformers>=5"))
    assert (old.state, old.value) == ("warning", "1.0, where >=5 is needed") and old.remedy


def test_what_compiles_kernels_is_looked_for(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "cache"))
    assert not states(by_name(software.check_compiler(is_needed=True)))
    monkeypatch.setenv("CC", "no-such-compiler")
    assert "CC=no-such-compiler is not there" in by_name(software.check_compiler(is_needed=True))["compiler"].value
    monkeypatch.delenv("CC")
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(software.sysconfig, "get_paths", lambda: {"include": str(tmp_path)})
    found = by_name(software.check_compiler(is_needed=True))
    assert states(found) == {"compiler": "failure", "Python.h": "failure"}
    assert not (tmp_path / "cache").exists()


def test_cache_that_cannot_be_written_to_is_a_warning() -> None:
    found = software.check_cache("cache", Path("/proc/nothing"), "SOME_CACHE")
    assert found.state == "warning" and "SOME_CACHE" in found.remedy


def test_apex_of_another_project_is_a_warning(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "apex").mkdir()
    (tmp_path / "apex" / "__init__.py").touch()
    monkeypatch.syspath_prepend(tmp_path)
    found = by_name(software.check_kernels({"warnings": [], "kernels": [], "device": "cpu"}, None))["apex"]
    assert found.state == "warning" and "another project of that name" in found.value
    assert found.remedy.startswith("replace it: pip uninstall apex")


# ---- machine


def test_memory_limit_is_the_smallest_above(tmp_path: Path) -> None:
    inner = tmp_path / "slurm" / "job_1"
    inner.mkdir(parents=True)
    (inner / "memory.max").write_text("max\n")
    (inner.parent / "memory.max").write_text(f"{8 << 30}\n")
    assert machine.cgroup_limit_bytes("0::/slurm/job_1\n", tmp_path) == 8 << 30
    old = tmp_path / "memory" / "slurm"
    old.mkdir(parents=True)
    (old / "memory.limit_in_bytes").write_text("4096\n")
    (tmp_path / "memory" / "memory.limit_in_bytes").write_text("9223372036854771712\n")
    assert machine.cgroup_limit_bytes("3:cpu:/x\n2:memory:/slurm\n", tmp_path) == 4096
    assert machine.cgroup_limit_bytes("2:memory:/\n", tmp_path) is None


def test_too_little_memory_fails_with_what_is_needed(config: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    assert by_name(machine.check_memory(config, 1, is_gpu=False))["memory"].state == "ok"
    monkeypatch.setattr(machine, "cgroup_limit_bytes", lambda *_: 1 << 20)
    found = by_name(machine.check_memory(config, 1, is_gpu=True))["memory"]
    assert found.state == "failure" and found.value.startswith("1.0 MiB allowed by its cgroup, the run needs some 4")


def test_job_of_the_doctor_gets_the_memory_of_a_node_as_pretraining_does() -> None:
    """Else the limit that it finds is DefMemPerCPU's, and no run's."""
    asked = {
        script: re.findall(r"(?m)^#SBATCH --mem=(.*)$", (REPOSITORY / "slurm" / script).read_text())
        for script in ("doctor.sh", "pretrain_base.sh", "pretrain_large.sh")
    }
    assert set(map(tuple, asked.values())) == {("0",)}


def test_open_files_are_held_against_the_shards(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine.resource, "getrlimit", lambda _: (1024, 5000))
    assert by_name(machine.check_limits(100))["open files"].state == "ok"
    assert by_name(machine.check_limits(4900))["open files"].state == "failure"
    monkeypatch.setattr(machine.resource, "getrlimit", lambda _: (1024, 1024))
    assert by_name(machine.check_limits(0))["open files"].state == "warning"


def test_infiniband_wants_locked_memory() -> None:
    assert machine.judge_locked_memory(65536, []).state == "ok"
    assert machine.judge_locked_memory(65536, ["mlx5_0"]).state == "warning"
    assert machine.judge_locked_memory(machine.resource.RLIM_INFINITY, ["mlx5_0"]).state == "ok"


@pytest.mark.parametrize(
    ("variable", "value", "state"),
    [
        ("GLOO_SOCKET_IFNAME", "ib0", "ok"),
        ("GLOO_SOCKET_IFNAME", "ib", "failure"),
        ("NCCL_SOCKET_IFNAME", "ib", "ok"),
        ("NCCL_SOCKET_IFNAME", "=ib", "failure"),
        ("NCCL_SOCKET_IFNAME", "^docker,lo", "ok"),
        ("NCCL_SOCKET_IFNAME", "hsn,eth", "ok"),
        ("NCCL_SOCKET_IFNAME", "hsn", "failure"),
    ],
)
def test_interfaces_that_are_named_must_be_there(variable: str, value: str, state: str) -> None:
    found = machine.judge_interface(variable, value, ["lo", "eth0", "ib0"])
    assert found.state == state and ("eth0, ib0, lo" in found.value) == (state == "failure")


@pytest.mark.parametrize(
    ("environment", "names"),
    [
        ({}, set()),
        ({"RANK": "0", "WORLD_SIZE": "8"}, {"launcher"}),
        ({"RANK": "0", "TORCHELASTIC_RUN_ID": "1"}, set()),
        ({"RANK": "0", "SLURM_PROCID": "1", "SLURM_STEP_ID": "0"}, {"launcher"}),
        ({"RANK": "1", "SLURM_PROCID": "1", "SLURM_STEP_ID": "0"}, set()),
        ({"MASTER_ADDR": "n9"}, {"MASTER_ADDR"}),
        ({"MASTER_ADDR": "n1"}, set()),
    ],
)
def test_what_a_launcher_left_is_named(environment: dict[str, str], names: set[str]) -> None:
    assert by_name(machine.check_leftovers(environment, ["n1", "n2"])).keys() == names


def test_more_threads_than_cores_are_a_warning() -> None:
    assert by_name(machine.check_threads({"OMP_NUM_THREADS": "9"}, 4, 1))["threads"].state == "warning"
    assert by_name(machine.check_threads({"SLURM_JOB_ID": "1"}, 1, 1))["threads"].state == "warning"
    assert by_name(machine.check_threads({}, 4, 1))["threads"].state == "ok"


def test_temporary_folder_that_is_not_there_is_a_warning(tmp_path: Path) -> None:
    found = by_name(machine.check_folders({"TMPDIR": str(tmp_path / "absent")}, needs_hub=False))["TMPDIR"]
    assert found.state == "warning" and "cannot be used; Python takes" in found.value


# ---- Slurm

# Fields as slurm/_common.sh and the tests' own Slurm (22.05) know them, shortened by hand.
JOB = (
    "JobId=7 JobName=x Requeue={requeue} Restarts=1 BatchFlag=1 TimeLimit=02:00:00 StartTime=2026-01-01T10:00:00 "
    "EndTime=2026-01-01T12:00:00 NumNodes=2 NumCPUs=32 NumTasks=16 TRES=cpu=32,node=2,billing=32,gres/gpu=16"
)


def at(clock: str) -> float:
    return time.mktime(time.strptime(f"2026-01-01T{clock}", "%Y-%m-%dT%H:%M:%S"))


@pytest.mark.parametrize(
    ("requeue", "tasks", "clock", "odd"),
    [
        ("1", "16", "11:00:00", set()),
        ("1", "2", "11:00:00", set()),  # one task a node, to look at the nodes
        ("1", "8", "11:00:00", {"tasks"}),
        ("0", "16", "11:58:00", {"requeue", "time limit"}),
    ],
)
def test_job_is_judged_by_its_record(requeue: str, tasks: str, clock: str, odd: set[str]) -> None:
    environment = {"SLURM_JOB_ID": "7", "SLURM_STEP_NUM_TASKS": tasks}
    found = by_name(slurm.judge_job(JOB.format(requeue=requeue), environment, 120.0, at(clock)))
    assert states(found).keys() == odd
    assert found["job"].value == f"7: 2 nodes, 16 tasks, 16 GPUs in all; this step has {tasks} tasks"


@pytest.mark.parametrize(
    ("record", "gpus"),
    [
        ("NumNodes=2 TRES=cpu=32,node=2,gres/gpu=16,gres/gpu:a100=16 TresPerNode=gres/gpu:a100:8", 16),
        ("NumNodes=2 ReqTRES=cpu=1 AllocTRES=cpu=32,gres/gpu:a100=16", 16),
        ("NumNodes=2 TRES=cpu=32,node=2,billing=32 TresPerNode=gres/gpu:8", 16),
        ("NumNodes=1 TRES=cpu=32 TresPerNode=gres/gpu:4g.20gb:2,gres/nvme:1", 2),
        ("NumNodes=3 TRES=cpu=32 TresPerNode=gres:gpu", 3),
        ("NumNodes=2 TRES=cpu=32,node=2,billing=32", 0),
    ],
)
def test_gpus_of_a_job_are_those_of_all_its_nodes(record: str, gpus: int) -> None:
    fields = dict(field.split("=", 1) for field in record.split())
    assert slurm.count_gpus(fields) == gpus


def test_without_slurms_commands_the_first_node_is_still_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    for listed, first in (("gpu[007-009,12],x1", "gpu007"), ("a1,b2", "a1"), ("solo", "solo")):
        monkeypatch.setenv("SLURM_STEP_NODELIST", listed)
        assert nodes_of_step() == [first]
    monkeypatch.setenv("SLURM_JOB_ID", "99999")
    place = meeting_place()
    assert place["MASTER_ADDR"] == "solo" and 10_000 <= int(place["MASTER_PORT"]) < 30_000
    monkeypatch.delenv("SLURM_STEP_NODELIST")
    assert nodes_of_step() == []


# ---- storage


def test_good_run_dir_is_good_and_nothing_is_left(config: Config) -> None:
    found = by_name([*storage.check_run_dir(config), *storage.check_space(config), *storage.check_corpora(config)])
    assert not states(found) and {"writing", "locks", "clock", "space", "inodes", "corpus made_up"} < found.keys()
    assert not config.run.dir.exists() and not list(config.run.dir.parent.glob(".electra*"))


def test_run_dir_that_cannot_be_written_to_fails(config: Config) -> None:
    other = config.model_copy(update={"run": config.run.model_copy(update={"dir": Path("/proc/runs")})})
    found = by_name(storage.check_run_dir(other))
    assert states(found) == {"writing": "failure"} and found["file system"].value.startswith("proc")


def test_file_system_without_locks_is_a_warning(config: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    def none(*_: Any) -> None:
        raise OSError(38, "Function not implemented")

    monkeypatch.setattr(storage.fcntl, "flock", none)
    found = by_name(storage.check_run_dir(config))["locks"]
    assert found.state == "warning" and found.value == "none (ENOSYS)" and "-o flock" in found.remedy
    monkeypatch.setattr(storage.fcntl, "flock", lambda *_: None)  # as on a node that keeps locks to itself
    assert by_name(storage.check_run_dir(config))["locks"].value == "two processes can hold one lock"


def test_clock_that_is_not_the_file_systems_is_a_warning(config: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    late = time.time
    monkeypatch.setattr(storage.time, "time", lambda: late() + 60)
    found = by_name(storage.check_run_dir(config))["clock"]
    assert found.state == "warning" and found.value.startswith("-60.")


def test_full_disk_fails_with_what_is_needed(config: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(storage, "free_bytes", lambda _: 1 << 10)
    found = by_name(storage.check_space(config))["space"]
    assert found.state == "failure" and found.value.startswith("1.0 KiB free, checkpoints need")
    corpus = Path(str(config.data.corpora[0].path)).stat().st_size
    assert storage.shard_bytes(config, 2) == corpus * 2 // 4
    assert size(make_plan(config, 1).disk_bytes) in found.value


def test_kind_of_a_file_system_is_that_of_the_longest_mount() -> None:
    mounts = "dev / ext4 rw 0 0\nx /proc nfs4 rw 0 0\ny /proc/sys lustre rw 0 0\nz /pro xfs rw 0 0\n"
    kinds = [storage.file_system(Path(path), mounts) for path in ("/proc/sys/kernel", "/proc/1", "/usr")]
    assert kinds == ["lustre", "nfs4", "ext4"]


def test_missing_text_matters_until_there_are_shards(config: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    corpus = config.data.corpora[0].model_copy(update={"path": "/no/text"})
    other = config.model_copy(update={"data": config.data.model_copy(update={"corpora": (corpus,)})})
    (found,) = ask("corpora", storage.check_corpora, other)
    assert found.state == "failure" and "/no/text" in found.value and found.remedy
    monkeypatch.setattr(storage, "read_record", lambda *_: type("Record", (), {"state": "done"}))
    (found,) = ask("corpora", storage.check_corpora, other)
    assert found.state == "ok" and "not needed: its shards are done" in found.value


def test_files_that_the_config_names_must_be_seen(config: Config, tmp_path: Path) -> None:
    train = config.train.model_copy(update={"initial_discriminator": tmp_path / "absent"})
    data = config.data.model_copy(update={"shards_dir": Path("/proc/shards"), "local_dir": tmp_path / "local"})
    found = by_name(storage.check_inputs(config.model_copy(update={"train": train, "data": data})))
    assert states(found) == {"train.initial_discriminator": "failure", "data.shards_dir": "failure"}
    assert found["data.local_dir"].state == "ok"


# ---- MLflow


class Mlflow(http.server.BaseHTTPRequestHandler):
    """As much of a server as is asked: it lets in who knows the secret."""

    wanted = ""
    experiments = 200
    leads_to = ""
    page = ""
    stage = "active"
    needs_certificate = False
    asked: ClassVar[list[str]] = []

    def do_GET(self) -> None:
        self.asked.append(self.path)
        status, text = 404, "nothing"
        if self.leads_to:
            self.send_response(302)
            self.send_header("Location", self.leads_to)
            self.end_headers()
            return
        if self.path == "/health":
            status, text = 200, "OK"
        elif self.path == "/version":
            status, text = 200, "2.9.1"
        elif self.path.startswith("/api/2.0/mlflow/experiments/get-by-name"):
            is_let_in = self.headers.get("Authorization", "") == self.wanted
            if self.needs_certificate:
                is_let_in = is_let_in and bool(self.connection.getpeercert())
            status = self.experiments if is_let_in else 401
            experiment = {"experiment_id": "7", "lifecycle_stage": self.stage}
            answer = {"error_code": "RESOURCE_DOES_NOT_EXIST"} if status == 404 else {"experiment": experiment}
            text = self.page or json.dumps(answer)
        self.send_response(status)
        self.end_headers()
        self.wfile.write(text.encode())

    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture
def mlflow(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[str]:
    for name in [*filter(re.compile("MLFLOW_|SSL_CERT_").match, os.environ), "REQUESTS_CA_BUNDLE", "CURL_CA_BUNDLE"]:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    (tmp_path / "home" / ".mlflow").mkdir(parents=True)
    monkeypatch.setattr(Mlflow, "wanted", "")
    monkeypatch.setattr(Mlflow, "asked", [])
    monkeypatch.setenv("no_proxy", "127.0.0.1,localhost")
    listener = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Mlflow)
    threading.Thread(target=listener.serve_forever, daemon=True).start()
    yield f"127.0.0.1:{listener.server_address[1]}"
    listener.shutdown()
    listener.server_close()


def test_server_is_asked_for_health_version_and_experiment(mlflow: str, monkeypatch: pytest.MonkeyPatch) -> None:
    found = by_name(server.check_server(f"http://{mlflow}/", "electra"))
    assert found["mlflow server"] == ok("mlflow server", f"http://{mlflow}/; experiment 'electra' is there")
    assert (
        states(found) == {"mlflow versions": "warning"}
        and "server 2.9.1, the client 3" in found["mlflow versions"].value
    )
    monkeypatch.setattr(Mlflow, "experiments", 404)
    assert by_name(server.check_server(f"http://{mlflow}", "a b"))["mlflow server"].value.endswith("will be made")


@pytest.mark.parametrize("way", ["token", "variables", "uri", "file", "both", "netrc"])
def test_credentials_are_sent_and_never_shown(way: str, mlflow: str, monkeypatch: pytest.MonkeyPatch) -> None:
    uri = f"http://{mlflow}"
    password_of_file = "another1" if way == "both" else "hunter222"
    if way in ("file", "both"):
        write_credentials(f"[mlflow]\nmlflow_tracking_username = ada\nmlflow_tracking_password = {password_of_file}\n")
    monkeypatch.setattr(Mlflow, "wanted", "Basic YWRhOmh1bnRlcjIyMg==")  # ada:hunter222
    if way == "token":
        monkeypatch.setenv("MLFLOW_TRACKING_TOKEN", "hunter222")
        monkeypatch.setattr(Mlflow, "wanted", "Bearer hunter222")
    elif way == "variables":
        monkeypatch.setenv("MLFLOW_TRACKING_USERNAME", "ada")
        monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", "hunter222")
    elif way == "both":
        monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", "hunter222")
    elif way == "netrc":
        (Path.home() / ".netrc").write_text("machine 127.0.0.1 login ada password hunter222\n")
    elif way == "uri":
        uri = f"http://ada:hunter222@{mlflow}"
        monkeypatch.setenv("MLFLOW_TRACKING_USERNAME", "bob")  # the URI goes before it, as where the run is shipped
        monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", "secret99")
    good = list(server.check_server(uri, "electra"))
    monkeypatch.setattr(Mlflow, "wanted", "Bearer another")
    bad = list(server.check_server(uri, "electra"))
    assert by_name(good)["mlflow server"].state == "ok"
    assert by_name(bad)["mlflow server"].value == f"http://{mlflow} refuses the credentials given (401)"
    assert "hunter222" not in str(good + bad)


def write_credentials(text: str) -> None:
    (Path.home() / ".mlflow" / "credentials").write_text(text)


@pytest.mark.parametrize(
    "text",
    [
        "[mlflow]\nmlflow_tracking_username = ada\nmlflow_tracking_password = hunter%%222\n",
        "[mlflow]\nMLFLOW_TRACKING_USERNAME: ada\n",
        "[other]\nmlflow_tracking_username = ada\n",
        "",
    ],
)
def test_credentials_file_is_read_as_mlflow_reads_it(text: str, mlflow: str) -> None:
    from mlflow.utils.credentials import read_mlflow_creds

    write_credentials(text)
    own = server._read_credentials(Path(server._CREDENTIALS).expanduser())
    assert (own.get("mlflow_tracking_username"), own.get("mlflow_tracking_password")) == tuple(read_mlflow_creds())


@pytest.mark.parametrize("text", ["hunter222\n", "[mlflow]\nmlflow_tracking_password = %hunter222\n"])
def test_broken_credentials_file_is_named_without_what_it_says(text: str, mlflow: str) -> None:
    write_credentials(text)
    (found,) = ask("mlflow server", server.check_server, f"http://{mlflow}", "electra")
    assert found.state == "failure" and ".mlflow/credentials: MLflow's client cannot read it" in found.value
    assert "[mlflow]" in found.remedy and "hunter222" not in str(found) and not Mlflow.asked


@pytest.mark.parametrize(
    ("variable", "value"), [("MLFLOW_TRACKING_AUTH", "kubernetes"), ("MLFLOW_TRACKING_AWS_SIGV4", "true")]
)
def test_server_is_not_judged_where_the_client_signs_its_requests(
    variable: str, value: str, mlflow: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Mlflow, "wanted", "a signature")
    monkeypatch.setenv(variable, value)
    (found,) = server.check_server(f"http://{mlflow}", "electra")
    assert found.state == "ok" and f"not asked, {variable}" in found.value


def make_certificate(folder: Path) -> Path:
    """A certificate for localhost that vouches for itself, with its key, as one file."""
    from cryptography import x509
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    key, now = ec.generate_private_key(ec.SECP256R1()), datetime.datetime.now(datetime.UTC)
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "localhost")])
    usage = dict.fromkeys(
        ("content_commitment", "key_encipherment", "data_encipherment", "key_agreement", "crl_sign", "encipher_only",
         "decipher_only"), False,
    )  # fmt: skip
    certificate = (
        x509.CertificateBuilder(name, name, key.public_key(), x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(days=1))
        .not_valid_after(now + datetime.timedelta(days=1))
        .add_extension(x509.SubjectAlternativeName([x509.DNSName("localhost")]), critical=False)
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
        .add_extension(x509.KeyUsage(digital_signature=True, key_cert_sign=True, **usage), critical=True)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
        .sign(key, hashes.SHA256())
    )
    form = (serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    path = folder / "localhost.pem"
    path.write_bytes(key.private_bytes(*form) + certificate.public_bytes(serialization.Encoding.PEM))
    return path


@pytest.fixture
def over_tls(mlflow: str, tmp_path: Path) -> Iterator[tuple[str, Path]]:
    """The same server behind TLS, that asks a client for a certificate where it has one; with the certificate."""
    path, context = make_certificate(tmp_path), ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(path)
    context.load_verify_locations(path)
    context.verify_mode = ssl.CERT_OPTIONAL
    listener = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Mlflow)
    listener.socket = context.wrap_socket(listener.socket, server_side=True)
    threading.Thread(target=listener.serve_forever, daemon=True).start()
    yield f"https://localhost:{listener.server_address[1]}", path
    listener.shutdown()
    listener.server_close()


@pytest.mark.parametrize(
    ("variable", "state"),
    [
        ("", "failure"),
        ("SSL_CERT_FILE", "failure"),  # which Python's own store heeds, and MLflow's client does not
        ("REQUESTS_CA_BUNDLE", "ok"),
        ("CURL_CA_BUNDLE", "ok"),
        ("MLFLOW_TRACKING_SERVER_CERT_PATH", "ok"),
    ],
)
def test_certificates_are_those_of_mlflows_client(
    variable: str, state: str, over_tls: tuple[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    uri, certificate = over_tls
    if variable:
        monkeypatch.setenv(variable, str(certificate))
    found = by_name(server.check_server(uri, "electra"))["mlflow server"]
    assert found.state == state and (state == "ok" or "certificate verify failed" in found.value)


@pytest.mark.filterwarnings("ignore:Unverified HTTPS request")
def test_tls_without_verification_is_mlflows_setting(
    over_tls: tuple[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    uri, certificate = over_tls
    monkeypatch.setenv("MLFLOW_TRACKING_INSECURE_TLS", "true")
    assert by_name(server.check_server(uri, "electra"))["mlflow server"].state == "ok"
    monkeypatch.setenv("MLFLOW_TRACKING_SERVER_CERT_PATH", str(certificate))
    (found,) = ask("mlflow server", server.check_server, uri, "electra")
    assert found.state == "failure" and "exclude each other" in found.value


def test_client_certificate_is_shown(over_tls: tuple[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    uri, certificate = over_tls
    monkeypatch.setenv("REQUESTS_CA_BUNDLE", str(certificate))
    monkeypatch.setattr(Mlflow, "needs_certificate", True)
    assert by_name(server.check_server(uri, "electra"))["mlflow server"].state == "failure"
    monkeypatch.setenv("MLFLOW_TRACKING_CLIENT_CERT_PATH", str(certificate))
    assert by_name(server.check_server(uri, "electra"))["mlflow server"].state == "ok"


def test_deleted_experiment_of_a_server_is_a_failure(mlflow: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Mlflow, "stage", "deleted")
    found = by_name(server.check_server(f"http://{mlflow}", "electra"))["mlflow server"]
    assert found.state == "failure" and found.value == f"http://{mlflow}: experiment 'electra' is deleted"
    assert f"MLFLOW_TRACKING_URI=http://{mlflow} mlflow experiments restore -x 7, or" in found.remedy


def test_server_that_leads_in_circles_is_a_failure(mlflow: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Mlflow, "leads_to", "/again")
    (found,) = server.check_server(f"http://{mlflow}", "electra")
    assert found.state == "failure" and "leads on and on" in found.value and len(Mlflow.asked) < 10


def test_nothing_is_sent_to_another_server(mlflow: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Mlflow, "leads_to", f"http://{mlflow.replace('127.0.0.1', 'localhost')}/login?next=%2F")
    (found,) = server.check_server(f"http://ada:hunter222@{mlflow}", "electra")
    assert found.state == "failure" and f"leads on to {Mlflow.leads_to.partition('?')[0]}," in found.value
    assert found.remedy and not [path for path in Mlflow.asked if path.startswith("/login")]


@pytest.mark.parametrize("page", ["<html>Log in</html>", "[]", '"experiment"'])
def test_page_that_is_no_experiment_is_a_failure(page: str, mlflow: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Mlflow, "page", page)
    (found,) = server.check_server(f"http://{mlflow}", "electra")
    assert found.state == "failure" and "answers with something else" in found.value


def test_server_that_is_not_there_is_named_with_a_proxy_in_its_way(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    uri = f"http://ada:hunter222@127.0.0.1:{free_port()}"
    (found,) = server.check_server(uri, "electra")
    assert found.state == "failure" and "refused" in found.value and "see whether this node reaches it" in found.remedy
    monkeypatch.delenv("no_proxy")
    monkeypatch.delenv("NO_PROXY", raising=False)
    for scheme in ("http://", ""):
        monkeypatch.setenv("http_proxy", f"{scheme}me:secret9@127.0.0.1:{free_port()}")
        (found,) = server.check_server("http://mlflow.invalid:5000", "electra")
        assert f"goes through the proxy {scheme}127.0.0.1:" in found.remedy and "no_proxy" in found.remedy
        assert "hunter222" not in str(found) and "secret9" not in str(found)


@pytest.fixture(scope="module")
def database_of_mlflow(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """MLflow's own file, with an experiment that is deleted."""
    from mlflow.store.tracking.sqlalchemy_store import SqlAlchemyStore

    folder = tmp_path_factory.mktemp("mlflow")
    store = SqlAlchemyStore(f"sqlite:///{folder}/mlflow.db", str(folder))
    store.delete_experiment(store.create_experiment("electra"))
    store.engine.dispose()
    return folder / "mlflow.db"


@pytest.fixture
def sqlite_path(database_of_mlflow: Path, tmp_path: Path) -> Path:
    return Path(shutil.copy(database_of_mlflow, tmp_path))


def test_sqlite_file_is_opened_and_locked(sqlite_path: Path, tmp_path: Path) -> None:
    assert server.check_sqlite(tmp_path / "absent.db", "Default").value.endswith("will be made")
    (tmp_path / "empty.db").touch()
    assert server.check_sqlite(tmp_path / "empty.db", "Default").value.endswith("is empty and will be filled")
    found = server.check_sqlite(sqlite_path, "Default")
    assert found == ok("mlflow file", f"{sqlite_path} can be written to, its schema is that of this MLflow")
    connection = sqlite3.connect(sqlite_path, isolation_level=None)
    connection.execute("begin exclusive")
    assert server.check_sqlite(sqlite_path, "Default").state == "warning"
    connection.close()
    sqlite_path.write_bytes(b"no database" * 100)
    assert server.check_sqlite(sqlite_path, "Default").state == "failure"


def test_deleted_experiment_of_a_file_is_a_failure(sqlite_path: Path) -> None:
    found = server.check_sqlite(sqlite_path, "electra")
    assert (found.state, found.value) == ("failure", f"sqlite:///{sqlite_path}: experiment 'electra' is deleted")
    assert f"MLFLOW_TRACKING_URI=sqlite:///{sqlite_path} mlflow experiments restore -x 1, or" in found.remedy


def test_schema_that_mlflow_refuses_is_a_failure(sqlite_path: Path) -> None:
    from mlflow.exceptions import MlflowException
    from mlflow.store.db.utils import _get_latest_schema_revision
    from mlflow.store.tracking.sqlalchemy_store import SqlAlchemyStore

    revisions, head = database.read_revisions(), _get_latest_schema_revision()
    (before,) = revisions[head].before
    connection = sqlite3.connect(sqlite_path, isolation_level=None)
    for schema, remedy in ((before, f"mlflow db upgrade sqlite:///{sqlite_path}"), ("abc", "install the MLflow that")):
        connection.execute("update alembic_version set version_num = ?", (schema,))
        found = server.check_sqlite(sqlite_path, "Default")
        assert found.state == "failure" and f"has schema {schema}, where MLflow" in found.value and head in found.value
        assert remedy in found.remedy
        with pytest.raises(MlflowException, match=f"out-of-date database schema .found version {schema}"):
            SqlAlchemyStore(f"sqlite:///{sqlite_path}", str(sqlite_path.parent))
    connection.execute("drop table alembic_version")
    connection.close()
    assert server.check_sqlite(sqlite_path, "Default").state == "failure"


def test_schema_that_mlflow_migrates_by_itself_is_a_warning() -> None:
    revisions = database.read_revisions()
    (head,) = revisions.keys() - set().union(*(revision.before for revision in revisions.values()))
    every = set().union(*(revision.tables for revision in revisions.values()))
    (first,) = (name for name, revision in revisions.items() if not revision.before)
    for tables, state in ((every, "failure"), (every - {"logged_models"}, "warning")):
        found = database.judge_schema(first, tables, Path("/mlflow.db"))
        assert found is not None and found.state == state and "mlflow db upgrade sqlite:////mlflow.db" in found.remedy
    assert database.judge_schema(head, every, Path("/mlflow.db")) is None


# ---- several nodes


def test_equal_answers_are_one_line_and_odd_ones_are_named() -> None:
    def of(version: str, room: str) -> list[Check]:
        return [ok("torch", version, difference="failure"), ok("TMPDIR", room), ok("python", "3.11")]

    answers = {f"n{number}": of("2.13", "/tmp") for number in (1, 2, 3)} | {"n4": of("2.12", "/scratch")}
    answers["n4"] = [*answers["n4"], warning("clocks", "+9 s", "NTP")]
    report = Report(list(answers), nodes.compare(answers))
    assert report.exit_code == 78
    assert list(report.lines()) == [
        "OK       torch                            n1, n2, n3: 2.13",
        "FAILURE  torch                            n4: 2.12, and 2.13 on the others; make the nodes alike (one "
        "environment, slurm/site.env), or leave it out with sbatch --exclude",
        "OK       TMPDIR                           n1, n2, n3: /tmp",
        "OK       TMPDIR                           n4: /scratch",
        "OK       python                           3.11 (4 nodes)",
        "WARNING  clocks                           n4: +9 s; NTP",
        "4 nodes examined: 4 OK, 1 warning, 1 failure",
    ]
    assert report.to_dict()["checks"][3] == {
        "name": "torch", "node": "n4", "state": "failure", "value": "2.12, and 2.13 on the others",
        "remedy": "make the nodes alike (one environment, slurm/site.env), or leave it out with sbatch --exclude",
    }  # fmt: skip


def test_many_nodes_are_not_all_named() -> None:
    assert nodes.name_nodes([f"n{number}" for number in range(20)]) == "n0, n1, n2, n3, n4, n5, n6, n7 and 12 more"


@pytest.fixture
def together(monkeypatch: pytest.MonkeyPatch):
    """Runs a function as several ranks on nodes n0, n1, …, each in a thread; returns what each returned."""
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("MASTER_PORT", str(free_port()))
    monkeypatch.setattr(meeting, "ignore_stop_signals", lambda: None)
    monkeypatch.setattr(meeting, "node_name", lambda: f"n{threading.current_thread().name}")

    def run(world_size: int, ask) -> list:
        outcomes: list = [None] * world_size

        def be(rank: int) -> None:
            outcomes[rank] = ask(Process(rank, 0, world_size))

        threads = [threading.Thread(target=be, args=(rank,), name=str(rank)) for rank in range(world_size)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        return outcomes

    return run


def test_node_that_does_not_see_the_folder_is_found(together, config: Config, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(nodes, "VISIBLE_WITHIN_S", 0.3)
    (tmp_path / "other").mkdir()

    def be(process: Process) -> list[Check]:
        folder = tmp_path / "other" / "runs" if process.rank == 2 else tmp_path / "runs"
        own = config.model_copy(update={"run": config.run.model_copy(update={"dir": folder})})
        with meeting.Meeting(process, 30) as those:
            return nodes.check_together(those, own)

    found = [by_name(checks) for checks in together(3, be)]
    assert [states(checks) for checks in found] == [{}, {}, {"shared folder": "failure"}]
    assert "what n0 writes there is not seen" in found[2]["shared folder"].value
    assert sorted(path.name for path in tmp_path.iterdir() if path.is_dir()) == ["other"]


def test_lock_that_does_not_hold_elsewhere_is_a_warning(together, config: Config, monkeypatch) -> None:
    flock = fcntl.flock
    monkeypatch.setattr(nodes.fcntl, "flock", lambda file, how: None)  # every node has locks of its own

    def be(process: Process) -> list[Check]:
        with meeting.Meeting(process, 30) as those:
            return nodes.check_together(those, config)

    found = [by_name(checks) for checks in together(2, be)]
    assert states(found[1]) == {"locks": "warning"} and "n0 holds does not hold here" in found[1]["locks"].value
    monkeypatch.setattr(nodes.fcntl, "flock", flock)
    assert [states(by_name(checks)) for checks in together(2, be)] == [{}, {}]


def test_clock_that_is_off_is_named_by_how_much() -> None:
    assert nodes.judge_clock(-1.9)[0].state == "ok"
    (found,) = nodes.judge_clock(7.25)
    assert (found.state, found.value) == ("warning", "+7.2 s from the other nodes'")


def test_node_that_never_comes_is_named_and_the_report_is_still_made(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("MASTER_PORT", str(free_port()))
    monkeypatch.setattr(meeting, "ignore_stop_signals", lambda: None)
    monkeypatch.setattr(examine, "JOIN_S", 3.0)
    monkeypatch.setattr(examine, "find_process", lambda *_: Process(0, 0, 2))
    monkeypatch.setattr(examine, "examine_node", lambda *_: ([ok("python", "3.11")], {}))
    shown: list[examine.Report] = []
    report, code = examine.examine(None, shown.append)
    assert report is not None and shown == [report] and code == 78
    first, second, last = report.lines()
    assert first.startswith("FAILURE  processes") and "1 of 2 processes have not come within" in first
    assert "python" in second and last == "1 node examined: 1 OK, 0 warnings, 1 failure"


# ---- the command


def test_machine_is_examined_with_a_config(electra: Electra, config_path: Path) -> None:
    report = json.loads(electra("doctor", config_path, "--json", RANK="3", WORLD_SIZE="8").stdout)
    checks = {check["name"]: check for check in report["checks"]}
    assert checks.keys() > {"python", "torch", "deepspeed imports", "memory", "run.dir", "shards", "mlflow server"}
    assert not [check for check in checks.values() if check["state"] == "failure"] and report["exit_code"] == 0
    assert checks["launcher"]["state"] == "warning" and "RANK=3 WORLD_SIZE=8" in checks["launcher"]["value"]
    assert all(check["remedy"] for check in checks.values() if check["state"] != "ok")
    assert {"torch", "device", "devices", "kernels", "warnings"} < report.keys()


def test_what_is_wrong_ends_in_78_and_is_named(electra: Electra, config_path: Path) -> None:
    arguments = ("data.corpora=[{name: made_up, path: /no/text}]", "run.dir=/proc/runs")
    done = electra("doctor", config_path, *arguments, code=78, GLOO_SOCKET_IFNAME="ib9", SLURM_JOB_GPUS="0")
    failed = [line[9:41].strip() for line in done.stdout.splitlines() if line.startswith("FAILURE")]
    assert failed == ["GLOO_SOCKET_IFNAME", "writing", "space", "corpora"]  # launch.device=cpu: GPUs are not asked for
    assert done.stderr.endswith(f"electra: doctor: {', '.join(failed)}\n")


def test_broken_torch_is_a_failure_among_others(electra: Electra, config_path: Path, tmp_path: Path) -> None:
    (tmp_path / "torch").mkdir()
    (tmp_path / "torch" / "__init__.py").write_text("raise ImportError('libcudart.so.13: cannot open')\n")
    said = electra("doctor", config_path, code=78, PYTHONPATH=f"{tmp_path}:{REPOSITORY}").stdout
    (line,) = (line for line in said.splitlines() if line[9:15] == "torch ")
    assert line.startswith("FAILURE") and "cannot be imported: libcudart.so.13: cannot open; install it again" in line
    assert "OK       writing" in said and "1 node examined" in said
