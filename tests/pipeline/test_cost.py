"""The model of a step against numbers worked out by hand, and what an estimate says of its inputs."""

import json
import time
from pathlib import Path
from typing import Any

import pytest

from pipeline.config import Config
from pipeline.config_file import load_config
from pipeline.cost import HARDWARE, Estimate, published_figures
from pipeline.errors import ConfigError
from pipeline.measured import Link, Measurement, MicroBatchTime, make_estimate, work_of, write_measurement
from pipeline.plan import make_plan
from tests.conftest import REPOSITORY, Electra

LARGE = REPOSITORY / "configs" / "large.yaml"
H200 = HARDWARE["h200"]


def estimate_of(config: Config, world_size: int, **options: Any) -> Estimate:
    return make_estimate(config, make_plan(config, world_size), **options)


def large(*overrides: str) -> Config:
    return load_config(LARGE, overrides)


def stage(number: int, tmp_path: Path, **settings: Any) -> str:
    path = tmp_path / f"stage{number}.json"
    path.write_text(json.dumps({"zero_optimization": {"stage": number, **settings}}))
    return f"deepspeed.config={path}"


def test_one_gpu_takes_the_flops_over_the_rate_that_is_reached(tmp_path):
    found = estimate_of(large(stage(0, tmp_path)), 1, hardware="h200")
    plan = make_plan(large(), 1)
    assert found.compute_s == pytest.approx(plan.flops_per_step / (0.4 * 790e12))
    assert found.update_s == pytest.approx(28 * plan.parameters_trained / 4.3e12)
    assert found.reduce_exposed_s == found.reduce_hidden_s == found.gather_s == found.exchange_s == 0
    assert found.tokens_per_s == pytest.approx(145_600, rel=0.01)  # 0.4 of 790 TFLOP/s at 2.17 GFLOP a token
    assert found.device_hours == pytest.approx(24 * found.days) == pytest.approx(800, rel=0.01)


@pytest.mark.parametrize(
    ("number", "reduced", "gathered", "shares"),
    # Bytes a parameter on the ring of 8, in fp32: all-reduce 8, reduce-scatter 4, each of 2 micro-batches from
    # stage 2 on; bf16 weights once, or before both passes of each micro-batch.
    [(0, 8, 0, 1), (1, 8, 2, 8), (2, 16, 2, 8), (3, 8, 8, 8)],
)
def test_what_each_stage_sends(tmp_path, number, reduced, gathered, shares):
    config = large(
        "train.global_batch_size=1024", "train.micro_batch_size=64", stage(number, tmp_path, overlap_comm=False)
    )
    plan = make_plan(config, 8)
    assert plan.accumulation_steps == 2
    found = estimate_of(config, 8, hardware="h200")
    second_per_byte = plan.parameters_trained * 7 / 8 / 350e9
    latencies = {0: 1, 1: 1, 2: 2, 3: 2}[number] * 4e-5
    assert found.reduce_exposed_s == pytest.approx(reduced * second_per_byte + latencies)
    assert found.gather_s == pytest.approx(gathered * second_per_byte + {0: 0, 1: 1, 2: 1, 3: 4}[number] * 4e-5)
    assert found.update_s == pytest.approx(28 * plan.parameters_trained / 4.3e12 / shares)


def test_what_overlaps_is_hidden_behind_the_backward_pass(tmp_path):
    plain = estimate_of(large(stage(1, tmp_path, overlap_comm=False)), 8, hardware="h200")
    overlapped = estimate_of(large(stage(1, tmp_path, overlap_comm=True)), 8, hardware="h200")
    assert (overlapped.reduce_exposed_s, overlapped.reduce_hidden_s) == (0, plain.reduce_exposed_s)
    assert plain.step_s - overlapped.step_s == pytest.approx(plain.reduce_exposed_s)


def test_few_gpus_a_node_share_few_rails():
    plan = make_plan(large(), 64)
    assert published_figures(H200, large(), plan, 4).link_bytes_per_s == 4 * 43.75e9
    assert published_figures(H200, large(), plan, 8).link_bytes_per_s == 350e9
    assert published_figures(H200, large(), plan, 64).link_bytes_per_s == 350e9


def test_a_small_micro_batch_takes_as_long_as_its_launches():
    one, two = (estimate_of(large(f"train.micro_batch_size={rows}"), 1, hardware="h200") for rows in (1, 2))
    assert one.compute_s == pytest.approx(2 * two.compute_s)  # twice as many micro-batches of equal time


def test_what_is_not_measured_says_so(electra: Electra):
    shown = json.loads(electra("config", LARGE, "--world-size", 64, "--json").stdout)["estimate"]
    assert shown["basis"] == "modelled, not measured"
    assert shown["hardware"] == "H200"
    assert {item["origin"] for item in shown["inputs"]} == {"derived", "assumed"}
    assert all(item["source"] for item in shown["inputs"])
    assert shown["device_hours"] == pytest.approx(64 * 24 * shown["days"])
    lines = electra("config", LARGE, "--world-size", 64).stdout
    assert "modelled, not measured: H200" in lines
    assert "GPU hours" in lines


def measurement(config: Config, **changes: Any) -> Measurement:
    plan = make_plan(config, 1)
    times = [
        MicroBatchTime(kernels=f"kernels.backend={name}", rows=rows, seconds=seconds * scale, runs=3, peak_gib=1)
        for name, scale in (("torch", 1), ("reference", 2))
        for rows, seconds in ((1, 0.10), (2, 0.16), (8, 0.40))
    ]
    values = {
        "device": "A Processor",
        "device_kind": "cpu",
        "work": work_of(config),
        "flops_per_token": plan.flops_per_token,
        "parameters": plan.parameters_trained,
        "processes_beside": 1,
        "threads": 1,
        "micro_batches": times,
        "auto_kernels": "kernels.backend=torch",
        "update_s": 0.02,
        "row_s": 1e-3,
        "rows_from": "synthetic",
        "torch": "2",
        "commit": None,
        "unix_s": time.time(),
    }
    return Measurement.model_validate(values | changes)


@pytest.mark.parametrize(
    ("rows", "backend", "seconds", "origin"),
    [
        (2, "auto", 0.16, "measured"),
        (2, "reference", 0.32, "measured"),
        (4, "auto", 0.24, "derived"),  # a third of the way from 2 to 8
        (16, "auto", 0.40 + 8 * 0.30 / 7, "derived"),  # on the line from 1 to 8
    ],
)
def test_a_measurement_is_read_between_its_sizes(config_path, rows, backend, seconds, origin):
    overrides = (f"train.micro_batch_size={rows}", f"kernels.backend={backend}", "train.global_batch_size=16")
    config = load_config(config_path, overrides)
    write_measurement(config, measurement(config))
    found = estimate_of(config, 1)
    assert found.hardware == "A Processor"
    assert found.compute_s == pytest.approx(16 / rows * seconds)
    assert found.step_s == pytest.approx(found.compute_s + 0.02 + 16e-3)
    assert found.inputs[0].origin == origin
    assert found.basis == ("modelled from measurements" if origin == "measured" else "modelled, 2 of 3 inputs measured")


def test_two_processes_need_a_link(config_path):
    config = load_config(config_path)
    write_measurement(config, measurement(config))
    assert estimate_of(config, 2).hardware == "H200"  # nothing measured fits, and the estimate says what it took
    link = Link(processes=2, processes_per_machine=2, bytes_per_s=1e9, latency_s=1e-3)
    write_measurement(config, measurement(config, processes_beside=2, link=link, update_s=0.03))
    found = estimate_of(config, 2)
    assert found.hardware == "A Processor"
    assert found.reduce_exposed_s == pytest.approx(4 * make_plan(config, 2).parameters_trained / 1e9 + 1e-3)
    assert found.update_s == pytest.approx(0.015)
    assert estimate_of(config, 1).update_s == 0.02  # the one that was measured alone
    assert estimate_of(config, 2, gpus_per_node=1).hardware == "H200"  # between machines nothing was measured
    wires = link.model_copy(update={"processes_per_machine": 1})
    write_measurement(config, measurement(config, device="Two Processors", link=wires))
    assert estimate_of(config, 2, gpus_per_node=1).hardware == "Two Processors"


@pytest.mark.parametrize(
    ("override", "reason"),
    [
        ("data.layout=paper", "measured for another work: data.layout=packed and not paper"),
        ("train.activation_checkpointing=true", "train.activation_checkpointing=False and not True"),
        ("launch.device=cuda", "measured on cpu and not launch.device=cuda"),
        ("launch.threads_per_process=2", "measured with 1 thread(s) and not launch.threads_per_process=2"),
    ],
)
def test_a_measurement_of_other_work_is_passed_over_and_why_is_said(config_path, electra: Electra, override, reason):
    config = load_config(config_path)
    write_measurement(config, measurement(config))
    fits = electra("config", config_path, "launch.device=cpu", "launch.threads_per_process=1", "--json")
    assert (json.loads(fits.stdout)["estimate"]["hardware"], fits.stderr) == ("A Processor", "")
    other = electra("config", config_path, override, "--json")
    assert json.loads(other.stdout)["estimate"]["hardware"] == "H200"
    (line,) = other.stderr.strip().splitlines()
    assert "passed over for published figures of an H200" in line
    assert reason in line


@pytest.mark.parametrize("size", [0, -5, "many", True, 0.5, None])
def test_a_bucket_is_a_whole_number_of_elements(tmp_path, size):
    config = large(stage(1, tmp_path, reduce_bucket_size=size))
    with pytest.raises(ConfigError, match=rf"reduce_bucket_size={size!r} must be a whole number of elements"):
        estimate_of(config, 2, hardware="h200")
    assert estimate_of(large(stage(1, tmp_path, reduce_bucket_size=5e8)), 2, hardware="h200").step_s > 0


def test_overlap_is_a_truth_or_left_to_deepspeed(tmp_path):
    with pytest.raises(ConfigError, match="overlap_comm='no' must be true, false or null"):
        estimate_of(large(stage(3, tmp_path, overlap_comm="no")), 8, hardware="h200")
    hidden = [
        estimate_of(large(stage(number, tmp_path, overlap_comm=None)), 8, hardware="h200").reduce_hidden_s
        for number in (1, 2, 3)
    ]
    assert hidden[:2] == [0, 0]
    assert hidden[2] > 0


def test_a_known_gpu_needs_no_measured_link(config_path):
    config = load_config(config_path, ("launch.device=cuda",))
    write_measurement(config, measurement(config, device="NVIDIA H200", device_kind="cuda"))
    found = estimate_of(config, 16)
    assert found.hardware == "NVIDIA H200"
    assert found.basis == "modelled, 3 of 5 inputs measured"
    assert found.data_s == 0  # made by a thread while the GPU works


def test_what_does_not_fit_is_refused(config_path, electra: Electra, tmp_path):
    config = load_config(config_path)
    absent, damaged = tmp_path / "absent.json", tmp_path / "damaged.json"
    assert "no such file; `electra tune CONFIG` writes one" in refused(electra, config_path, "--measured", absent)
    damaged.write_text('[{"device": "x"')
    assert f"{damaged}: not what `electra tune` writes" in refused(electra, config_path, "--measured", damaged)
    damaged.write_text(json.dumps([measurement(config).model_dump(mode="json") | {"row_s": -1}]))
    assert "0.row_s: Input should be greater" in refused(electra, config_path, "--measured", damaged)
    assert "no measurement" in refused(electra, config_path, "--hardware", "measured")
    path = write_measurement(config, measurement(config))
    other = refused(electra, config_path, "train.precision=bf16", "--measured", path)
    assert "train.precision=fp32 and not bf16; run `electra tune` with this config" in other
    assert "torchrun --nproc-per-node=2" in refused(electra, config_path, "--world-size", 2, "--measured", path)


def refused(electra: Electra, *arguments: object) -> str:
    message = electra("config", *arguments, code=78).stderr
    assert len(message.strip().splitlines()) == 1
    return message


def test_unknown_hardware_and_two_answers_are_wrong_usage(config_path, electra: Electra):
    unknown = electra("config", config_path, "--hardware", "h2000", code=64).stderr
    assert "--hardware h2000: not known; choose one of h200, h100, measured" in unknown
    both = electra("config", config_path, "--hardware", "h100", "--measured", "x.json", code=64).stderr
    assert "leave one out" in both
