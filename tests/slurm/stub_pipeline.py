"""Stands in for `python -m pipeline` where a test asks what the job scripts do, not what the program does.

Writes one JSON file per process into the working directory and obeys overrides that start with "stub.":
    stub.check=N     --check fails with N        stub.exit=N    exits with N
    stub.reason=TEXT what rank 0 leaves in ELECTRA_EXIT_FILE with a final code; empty: it leaves nothing
    stub.says=TEXT   what it prints
    stub.lose=N      in the first N starts of an allocation the last rank is killed, and the others notice
    stub.first=N     exits with N, in the job's first attempt only
    stub.hold=true   in the first attempt: waits for SIGUSR2 or SIGTERM, then exits 85
    stub.hang=true   in the first attempt: goes on until it is killed
    stub.straggle=S  the other ranks would outlive rank 0 by S seconds, but for SIGTERM
    stub.fail_stage=STAGE   that stage exits 1 (`shards`: the copying of shards)
"""

import json
import os
import signal
import sys
import time
from pathlib import Path
from typing import NoReturn

stage, config, *arguments = sys.argv[1:]
if "--stages" in arguments:
    sys.exit(print("tokenize\npretrain\nevaluate"))
stub = dict(argument[len("stub.") :].split("=", 1) for argument in arguments if argument.startswith("stub."))
in_step = "SLURM_STEP_ID" in os.environ
rank = int(os.environ["SLURM_PROCID"]) if in_step else 0
attempt = int(os.environ.get("SLURM_RESTART_COUNT", "0"))

element = f"-element{os.environ['SLURM_ARRAY_TASK_ID']}" if "SLURM_ARRAY_TASK_ID" in os.environ else ""
name = "check" + element if "--check" in arguments else f"{stage}-attempt{attempt}-rank{rank}{element}"
seen = {
    "argv": sys.argv[1:],
    "cwd": os.getcwd(),
    "code": __file__,
    "python_path": sys.path,
    "env": dict(os.environ),
}
Path(f"{name}.json.part").write_text(json.dumps(seen))
stopped_by = []
for number in (signal.SIGUSR2, signal.SIGTERM):
    signal.signal(number, lambda received, _frame: stopped_by.append(signal.Signals(received).name))
Path(f"{name}.json.part").rename(f"{name}.json")  # from here on a signal is handled

if "--check" in arguments:
    if code := int(stub.get("check", "0")):
        print("stub: the check refuses", file=sys.stderr)
    sys.exit(code)


def leave(code: int) -> NoReturn:
    """Exits as the program does, whose rank 0 speaks for all."""
    if rank == 0 and code in (64, 65, 78, 85, 93) and (reason := stub.get("reason", "because")):
        Path(os.environ["ELECTRA_EXIT_FILE"]).write_text(f"{code} {reason}\n")
    sys.exit(code)


sys.stdout.write(f"stub {stage} rank {rank} attempt {attempt} {stub.get('says', '')}\n")  # in one piece
sys.stdout.flush()
if stub.get("fail_stage") == stage:
    sys.exit(1)
while attempt == 0 and "hang" in stub:
    time.sleep(1)
if attempt == 0 and "hold" in stub:
    while not stopped_by:
        time.sleep(0.05)
    print(f"stub stopped by {stopped_by[0]}", flush=True)
    Path(f"{name}.stopped").touch()
    patience = time.monotonic() + 10
    while (
        len(list(Path().glob(f"{stage}-*.stopped"))) < int(os.environ.get("SLURM_NTASKS", "1"))
        and time.monotonic() < patience
    ):
        time.sleep(0.05)  # as the program, whose ranks agree: srun would end the others
    leave(85)
if stage == "pretrain" and "lose" in stub:
    survived = Path(f"survived-{os.environ['MASTER_PORT']}")
    if rank == int(os.environ["SLURM_NTASKS"]) - 1:
        with Path(f"starts-attempt{attempt}").open("a+") as starts:
            starts.write("start\n")
            starts.seek(0)
            if len(starts.readlines()) <= int(stub["lose"]):
                os.kill(os.getpid(), signal.SIGKILL)
        survived.touch()
    while not survived.exists():
        if stopped_by:
            sys.exit(75)
        time.sleep(0.05)
if rank > 0 and "straggle" in stub:
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    Path(f"{name}.ready").touch()
    time.sleep(float(stub["straggle"]))
while rank == 0 and "straggle" in stub and len(list(Path().glob("*.ready"))) < int(os.environ["SLURM_NTASKS"]) - 1:
    time.sleep(0.05)
leave(int(stub["first"]) if attempt == 0 and "first" in stub else int(stub.get("exit", "0")))
