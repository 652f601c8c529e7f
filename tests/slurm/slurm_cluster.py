"""A real two-node Slurm on one machine: munged, slurmctld and two slurmd of our own.

Everything lives in one short temporary folder: configuration, munge key and socket, state and logs. Ports are
chosen free, the munge socket is private, so that several clusters (parallel checkouts, a Slurm that already
runs here) do not meet, and no root rights are needed.
"""

from __future__ import annotations

import dataclasses
import getpass
import os
import random
import re
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path

PROGRAMS = (
    "munged",
    "munge",
    "slurmctld",
    "slurmd",
    "sbatch",
    "srun",
    "scontrol",
    "scancel",
    "sinfo",
    "squeue",
)
SEARCH_PATH = os.pathsep.join([os.environ.get("PATH", ""), "/usr/sbin", "/usr/local/sbin", "/sbin"])

# What a developer's shell or an outer job may have set, and what must not reach the jobs under test.
FOREIGN_VARIABLE = re.compile(
    r"(SLURM|SBATCH|SRUN|ELECTRA|MLFLOW|PMI|TORCHELASTIC)\w*"
    r"|MASTER_(ADDR|PORT)|(LOCAL_|NODE_)?RANK|(LOCAL_)?WORLD_SIZE"
)
ONE_RANK = ("--nodes=1", "--ntasks-per-node=1", "--gpus-per-node=1", "--cpus-per-task=1", "--time=10")
TWO_NODES = ("--nodes=2", *ONE_RANK[1:])
FINISHED = {
    "COMPLETED",
    "FAILED",
    "CANCELLED",
    "TIMEOUT",
    "NODE_FAIL",
    "OUT_OF_MEMORY",
    "BOOT_FAIL",
    "DEADLINE",
}

# KillWait, the scheduler's intervals and cred_expire are short to save waiting: cred_expire (120 s otherwise)
# is also how long Slurm holds a requeued job back. MinJobAge keeps finished jobs visible to scontrol.
SLURM_CONF = """\
ClusterName=electratest
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={ports[0]}
AuthType=auth/munge
AuthInfo=socket={root}/munge.socket,cred_expire={cred_expire_s}
SlurmUser={user}
SlurmdUser={user}
MpiDefault=none
MailProg=/bin/true
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerParameters=sched_interval=1,bf_interval=1
SlurmdParameters=config_overrides
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
JobRequeue=1
KillWait=15
MinJobAge=3600
ReturnToService=2
GresTypes=gpu
StateSaveLocation={root}/state
SlurmctldPidFile={root}/slurmctld.pid
SlurmctldLogFile={root}/slurmctld.log
SlurmdPidFile={root}/slurmd-%n.pid
SlurmdSpoolDir={root}/spool-%n
SlurmdLogFile={root}/slurmd-%n.log
NodeName=DEFAULT CPUs=4 RealMemory=8000 Gres=gpu:8 State=UNKNOWN
NodeName=n1 NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[1]}
NodeName=n2 NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[2]}
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
PartitionName=debug Nodes=n[1-2] Default=YES MaxTime=INFINITE State=UP PriorityTier=1
PartitionName=urgent Nodes=n[1-2] MaxTime=INFINITE State=UP PriorityTier=2
"""
GRES_CONF = "NodeName=n[1-2] Name=gpu File={root}/gpu[0-7]\n"  # slurmd asks that the files exist, no more


def missing_programs() -> list[str]:
    """The Slurm and munge programs that are not installed here."""
    return [name for name in PROGRAMS if shutil.which(name, path=SEARCH_PATH) is None]


def clean_environment(**extra: str) -> dict[str, str]:
    """This process's environment without variables of Slurm, MLflow, launchers and the scripts under test."""
    kept = {name: value for name, value in os.environ.items() if not FOREIGN_VARIABLE.fullmatch(name)}
    return kept | {"PATH": SEARCH_PATH} | extra


@dataclasses.dataclass(frozen=True)
class Job:
    """What is known of a finished job."""

    id: int
    state: str  # as in scontrol's JobState
    exit_code: int
    restarts: int
    run_time_s: int
    log: str  # stdout and stderr of the batch script and of its steps
    record: str  # scontrol's whole answer


class Cluster:
    """Starts, feeds and stops the daemons. Use as a context manager.

    Args:
        cred_expire_s: See ``SLURM_CONF``.
        has_gpus: Whether the nodes pretend to have some; a Slurm without knows no such thing.
    """

    def __init__(self, cred_expire_s: int = 8, has_gpus: bool = True):
        # A short path, since it holds a socket: their names end at 107 bytes.
        self.root = Path(tempfile.mkdtemp(prefix="slurm-", dir="/tmp"))
        self.env = clean_environment(SLURM_CONF=str(self.root / "slurm.conf"))
        self._cred_expire_s, self._has_gpus = cred_expire_s, has_gpus
        self._daemons: list[subprocess.Popen] = []  # in the order of their start

    def __enter__(self) -> Cluster:
        try:
            self._write_configuration()
            self._start_daemons()
        except BaseException:
            self.stop()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    # ---- daemons

    def _write_configuration(self) -> None:
        host = socket.gethostname().split(".")[0]
        conf = SLURM_CONF.format(
            root=self.root,
            host=host,
            user=getpass.getuser(),
            ports=free_ports(3),
            cred_expire_s=self._cred_expire_s,
        )
        if not self._has_gpus:
            conf = conf.replace("GresTypes=gpu\n", "").replace(" Gres=gpu:8", "")
        (self.root / "slurm.conf").write_text(conf)
        (self.root / "gres.conf").write_text(GRES_CONF.format(root=self.root) if self._has_gpus else "")
        for number in range(8):
            (self.root / f"gpu{number}").touch()
        (self.root / "state").mkdir()
        key = self.root / "munge.key"
        key.touch(mode=0o600)
        key.write_bytes(os.urandom(128))
        self.root.chmod(0o755)  # clients of another user must reach the munge socket

    def _start_daemons(self) -> None:
        places = {
            "socket": "socket",
            "key-file": "key",
            "pid-file": "pid",
            "log-file": "log",
            "seed-file": "seed",
        }
        options = [f"--{option}={self.root}/munge.{suffix}" for option, suffix in places.items()]
        self._start("munged", "--foreground", *options)
        self._wait_for("munge", "-n", options[0])
        self._start("slurmctld", "-D")
        for node in ("n1", "n2"):
            self._start("slurmd", "-D", "-N", node)
        self._wait_for("sinfo", "-h", "-o", "%D %t", answer="2 idle")

    def _wait_for(self, *command: str, answer: str = "") -> None:
        def ready() -> bool:
            if dead := [daemon.args[0] for daemon in self._daemons if daemon.poll() is not None]:
                raise RuntimeError(f"{', '.join(dead)} ended at its start\n{self._report()}")
            done = subprocess.run(command, env=self.env, capture_output=True, text=True)
            return done.returncode == 0 and answer in done.stdout

        wait_until(ready, 120, self._report)

    def _program(self, name: str) -> str:
        return shutil.which(name, path=SEARCH_PATH) or name

    def _start(self, program: str, *arguments: str) -> None:
        with (self.root / "daemons.out").open("a") as output:
            process = subprocess.Popen(
                [self._program(program), *arguments], env=self.env, cwd=self.root, start_new_session=True,
                stdin=subprocess.DEVNULL, stdout=output, stderr=output,
            )  # fmt: skip
        self._daemons.append(process)

    def lose_node(self, name: str) -> None:
        """Kills a node's slurmd and all that runs on the node, as when its power fails, and says so to Slurm.

        Slurm would notice by itself after SlurmdTimeout, five minutes.
        """
        (daemon,) = (daemon for daemon in self._daemons if daemon.args[-2:] == ["-N", name])
        tasks = [pid for pid in self._processes() if f"SLURMD_NODENAME={name}".encode() in proc(pid, "environ")]
        parents = {int(proc(pid, "stat").rpartition(b")")[2].split()[1]) for pid in tasks}
        keepers = [pid for pid in parents if proc(pid, "cmdline").startswith(b"slurmstepd")]
        for pid in [daemon.pid, *keepers, *tasks]:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        daemon.wait()
        self._daemons.remove(daemon)
        self.command("scontrol", "update", f"NodeName={name}", "State=DOWN", "Reason=lost")

    def bring_back_node(self, name: str) -> None:
        """Starts the slurmd of a lost node again."""
        self._start("slurmd", "-D", "-N", name)
        self.command("scontrol", "update", f"NodeName={name}", "State=RESUME")

    def _processes(self) -> list[int]:
        """Processes that belong to this cluster's jobs."""
        mark = f"SLURM_CONF={self.root}/slurm.conf".encode()
        pids = [int(path.name) for path in Path("/proc").iterdir() if path.name.isdigit()]
        return [pid for pid in pids if mark in proc(pid, "environ")]

    def _report(self) -> str:
        logs = [*sorted(self.root.glob("*.log")), self.root / "daemons.out"]
        return "\n".join(f"== {log.name}\n{log.read_text(errors='replace')[-2000:]}" for log in logs if log.exists())

    def stop(self) -> None:
        """Cancels the jobs, then ends the daemons that this object started, and no other process."""
        complete = len(self._daemons) == 4 and all(daemon.poll() is None for daemon in self._daemons)
        if complete and (jobs := self.command("squeue", "-h", "-o", "%A", check=False).split()):
            self.command("scancel", *jobs, check=False)
            wait_until(lambda: not self.command("squeue", "-h", check=False).strip(), 30, required=False)
        for daemon in reversed(self._daemons):
            daemon.terminate()
            try:
                daemon.wait(timeout=10)
            except subprocess.TimeoutExpired:
                daemon.kill()
                daemon.wait()
        self._daemons.clear()
        shutil.rmtree(self.root, ignore_errors=True)

    # ---- jobs

    def command(self, *command: str, check: bool = True, **options: object) -> str:
        """Runs a Slurm command and returns its standard output."""
        done = subprocess.run(command, env=self.env, capture_output=True, text=True, timeout=60, **options)
        if check and done.returncode:
            raise AssertionError(f"{' '.join(command)} ended with {done.returncode}: {done.stderr}")
        return done.stdout

    def submit(
        self,
        script: Path | str,
        *arguments: str,
        flags: Sequence[str] = (),
        cwd: Path,
        env: Mapping[str, str] | None = None,
    ) -> int:
        """Runs `sbatch FLAGS SCRIPT ARGUMENTS` in cwd; returns the job id."""
        command = ["sbatch", "--parsable", *flags, str(script), *arguments]
        done = subprocess.run(
            command, env=self.env | dict(env or {}), cwd=cwd, capture_output=True, text=True, timeout=60
        )
        assert done.returncode == 0, f"{' '.join(command)} ended with {done.returncode}: {done.stderr}"
        return int(done.stdout.strip().split(";")[0])

    def fields(self, job: int) -> tuple[dict[str, str], str]:
        """The fields of `scontrol show job` as a dictionary, and its whole text."""
        record = self.command("scontrol", "show", "job", str(job))
        return dict(re.findall(r"(?m)^ *(StdOut)=(.*)$", record) + re.findall(r"(\w+)=(\S*)", record)), record

    def wait(self, job: int, timeout_s: float = 300) -> Job:
        """Waits for the end of a job. A job that does not end in time is cancelled and its log shown."""
        deadline = time.monotonic() + timeout_s
        while True:
            fields, record = self.fields(job)
            if fields["JobState"] in FINISHED:
                return self._finished(job, fields, record)
            if time.monotonic() > deadline:
                self.command("scancel", "--full", "--signal=KILL", str(job), check=False)
                self.command("scancel", str(job), check=False)
                raise AssertionError(f"job {job} did not end in {timeout_s:.0f} s\n{record}\n{read_log(record)}")
            time.sleep(0.2)

    def run(self, script: Path | str, *arguments: str, timeout_s: float = 300, **options: object) -> Job:
        """submit and wait."""
        return self.wait(self.submit(script, *arguments, **options), timeout_s)

    def submit_pipeline(self, checkout: Path, *arguments: str, cwd: Path) -> list[int]:
        """Runs slurm/pipeline.sh with one rank per stage; the ids of its three jobs in order."""
        small = "--nodes=1 --ntasks-per-node=1 --cpus-per-task=1 --time=10"
        stages = ("tokenize", "pretrain", "evaluate")
        env = self.env | {f"ELECTRA_{stage.upper()}_SBATCH": small for stage in stages}
        command = [checkout / "slurm/pipeline.sh", *arguments]
        done = subprocess.run(command, env=env, cwd=cwd, capture_output=True, text=True, timeout=60)
        assert done.returncode == 0, done.stderr
        lines = [line.split() for line in done.stdout.splitlines()]
        assert tuple(line[0] for line in lines) == stages
        return [int(line[1]) for line in lines]

    def _finished(self, job: int, fields: Mapping[str, str], record: str) -> Job:
        code, _, number = fields["ExitCode"].partition(":")  # "78:0", or "0:15" when a signal ended it
        clock = re.fullmatch(r"(\d+):(\d+):(\d+)", fields["RunTime"])  # thousands of days when it never ran
        return Job(
            id=job,
            state=fields["JobState"],
            exit_code=int(code) or (128 + int(number) if int(number) else 0),
            restarts=int(fields["Restarts"]),
            run_time_s=3600 * int(clock[1]) + 60 * int(clock[2]) + int(clock[3]) if clock else 0,
            log=read_log(record),
            record=record,
        )


def proc(pid: int, file: str) -> bytes:
    """A file of /proc; empty when the process is gone."""
    with suppress(OSError):
        return Path(f"/proc/{pid}/{file}").read_bytes()
    return b""


def read_log(record: str) -> str:
    """The text of the StdOut file that a job record names; empty when there is none."""
    path = re.search(r"(?m)^ *StdOut=(.*)$", record)
    return Path(path[1]).read_text(errors="replace") if path and Path(path[1]).is_file() else ""


def free_ports(count: int) -> list[int]:
    """Free TCP ports above the scripts' rendezvous ports (10000 to 29999) and below the ephemeral ones."""
    ports: list[int] = []
    for port in random.SystemRandom().sample(range(30001, 32700), 200):
        with socket.socket() as probe:
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                continue
        ports.append(port)
        if len(ports) == count:
            return ports
    raise RuntimeError("no free ports between 30001 and 32699")


def wait_until(condition, timeout_s: float, report=lambda: "", required: bool = True) -> None:
    """Polls until the condition holds; raises with the report's text when it does not in time."""
    deadline = time.monotonic() + timeout_s
    while not condition():
        if time.monotonic() > deadline:
            if required:
                raise TimeoutError(f"not ready after {timeout_s:.0f} s\n{report()}")
            return
        time.sleep(0.2)
