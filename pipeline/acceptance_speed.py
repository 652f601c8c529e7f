"""How fast an accepted cluster is: the wires between its processes, and each process's steps."""

import os
import statistics
import time

import torch
import torch.distributed as dist

from pipeline.acceptance import Check
from pipeline.acceptance_quick import agree_on_device
from pipeline.bench import Bench, KernelChoice, SyntheticRows
from pipeline.config import Config
from pipeline.cost import HARDWARE
from pipeline.devices import account_of, choose_kernels, differing_kernels, peak_flops
from pipeline.distributed import Process, init_process_group, processes_on_this_machine
from pipeline.launch import threads_per_process
from pipeline.meeting import GROUP_LIMIT, Meeting, collective
from pipeline.plan import make_plan
from pipeline.pretrain import choose_algorithms
from pipeline.tune import device_name, measure_link

_LEAST_OF_PUBLISHED = 0.5
_SLOW = 1.2  # times the median of all processes
_WARM_UP, _STEPS = 2, 6
_LONGEST_S = 60.0  # of the steps; one is measured in any case
_PATIENCE_S = 240.0


def bandwidth(config: Config, process: Process) -> list[Check]:
    """Bus bandwidth of an all-reduce of 64 MiB, by ``pipeline.measured.Link``'s definition."""
    if process.world_size == 1:
        return [Check("bandwidth", "OK", "one process: there is no link")]
    beside = processes_on_this_machine(process)
    with Meeting(process) as meeting:
        device, check = agree_on_device(meeting, config)
        if device is None:
            return [check]
        with collective(process, "an all-reduce of 64 MiB"):
            init_process_group(process, device, GROUP_LIMIT)
            link = measure_link(process.world_size, beside, device)
            dist.destroy_process_group()
        answers = meeting.exchange("the bandwidth", [link.bytes_per_s, link.latency_s])
    # The slowest counts: they have waited for each other, and differ by little.
    bytes_per_s, latency_s = min(answer[0] for answer in answers), max(answer[1] for answer in answers)
    numbers = {"bytes_per_s": bytes_per_s, "latency_s": latency_s, "processes": process.world_size}
    found = f"{bytes_per_s / 1e9:.3g} GB/s on the bus, {latency_s * 1e6:.0f} µs for one number"
    known = next((item for item in HARDWARE.values() if item.name in device_name(device)), None)
    if known is None or device == "cpu":
        return [Check("bandwidth", "OK", f"{found}; nothing is published to compare with", numbers=numbers)]
    expected = known.link[0] if process.world_size <= beside else min(known.link[0], beside * known.rail[0])
    found += f"; {expected / 1e9:.3g} expected of {known.name}"
    if bytes_per_s < _LEAST_OF_PUBLISHED * expected:
        remedy = "see with NCCL_DEBUG=INFO which adapters it takes; NCCL_SOCKET_IFNAME, NCCL_IB_HCA in slurm/site.env"
        return [Check("bandwidth", "WARNING", found, remedy, numbers)]
    return [Check("bandwidth", "OK", found, numbers=numbers)]


def mfu(config: Config, process: Process) -> list[Check]:
    """Steps of the configured model, on every process at once and each a model of its own: nobody waits for another."""
    threads = threads_per_process(config, processes_on_this_machine(process))
    torch.set_num_threads(threads)
    choose_algorithms(config.train.deterministic)
    plan, problem, seconds = make_plan(config, process.world_size), "", [0.0]
    rows = plan.micro_batch_rows
    with Meeting(process) as meeting:
        device, check = agree_on_device(meeting, config)
        if device is None:
            return [check]
        kernels = choose_kernels(config, device)
        differing = differing_kernels(meeting.exchange("choosing kernels", account_of(kernels), _PATIENCE_S))
        choice = KernelChoice("", kernels)
        init_process_group(Process(local_rank=process.local_rank), device)
        meeting.exchange("beginning together", os.getpid(), _PATIENCE_S)
        try:
            seconds = _time_steps(Bench(config, plan, choice, SyntheticRows(config), device), rows)
        except torch.OutOfMemoryError as error:
            problem = str(error).partition("\n")[0]
        peak, source = peak_flops(device, threads, config.train.precision)
        answers = meeting.exchange("measuring steps", [problem, statistics.median(seconds), peak], _PATIENCE_S)
    of_kernels = check_kernels(differing, config.kernels.backend)
    bad = [rank for rank, (problem, *_) in enumerate(answers) if problem]
    if bad:
        found = f"a micro-batch of {rows} rows: {meeting.name(bad)}: {answers[bad[0]][0]}"
        return [Check("steps", "FAILED", found, "lower train.micro_batch_size"), of_kernels]
    flops = rows * plan.sequence_length_tokens * plan.flops_per_token
    pcts = [100 * flops / (median_s * peak) for _, median_s, peak in answers]
    middle_s = statistics.median_low(median_s for _, median_s, _ in answers)
    slow = [rank for rank, (_, median_s, _) in enumerate(answers) if median_s > _SLOW * middle_s]
    found = (
        f"MFU {min(pcts):.1f} to {max(pcts):.1f} %, {middle_s * 1e3:.4g} ms for a micro-batch of {rows} rows, "
        f"{len(seconds)} steps; of {peak / 1e12:.3g} TFLOP/s ({source})"
    )
    numbers = {"mfu_pct": pcts, "micro_batch_s": [answer[1] for answer in answers], "nodes": meeting.nodes}
    if slow:
        remedy = "leave the node out with sbatch --exclude, or see who else is on it"
        return [Check("steps", "WARNING", f"{found}; slow: {meeting.name(slow)}", remedy, numbers), of_kernels]
    return [Check("steps", "OK", found, numbers=numbers), of_kernels]


def check_kernels(differing: dict[str, str], backend: str) -> Check:
    """Of operations that differ: pretraining leaves them to torch on every node, or ends if a backend is asked for."""
    if differing:
        found = "; ".join(f"{operation}: {how}" for operation, how in differing.items())
        state = "WARNING" if backend == "auto" else "FAILED"
        return Check("kernels", state, found, "mend that node, or leave it out with sbatch --exclude")
    return Check("kernels", "OK", "the same on every rank")


def _time_steps(bench: Bench, rows: int) -> list[float]:
    """Seconds of a micro-batch's forward and backward, one value a step."""
    began, seconds = time.monotonic(), []
    for number in range(_WARM_UP + _STEPS):
        micro_batch_s, _ = bench.step(rows)
        if number >= _WARM_UP or not seconds:
            seconds.append(micro_batch_s)
        if time.monotonic() - began > _LONGEST_S:
            break
    return seconds[1:] or seconds  # the first step warms up, and counts only if it is the only one
