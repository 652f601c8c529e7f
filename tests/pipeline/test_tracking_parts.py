"""What ships a run, part by part: lines of a growing file, system metrics, what may be shown."""

import json
import os
from pathlib import Path

import pytest
from mlflow.entities import Metric

from pipeline.config_file import load_config
from pipeline.errors import ConfigError, DamagedError, UsageError
from pipeline.redaction import redact, redact_arguments, user_info, without_secrets, without_user_info
from pipeline.stages import StageRecord
from pipeline.tracking import shipper_environment
from pipeline.tracking_lineage import forked_from, stage_tags
from pipeline.tracking_lines import MOST_METRICS, Line, Tail
from pipeline.tracking_notes import command_of
from pipeline.tracking_system import SAMPLES, Sampler, points_of


def write(path: Path, steps: range, tail: str = "") -> None:
    """As training does at a resume: a new file takes the place of the old one."""
    aside = path.with_suffix(".new")
    aside.write_text("".join(json.dumps({"step": step}) + "\n" for step in steps) + tail)
    os.replace(aside, path)


def read(tail: Tail) -> list[int]:
    return [line["step"] for lines, _ in tail.batches(lambda line: []) for line in lines]


def test_each_line_is_read_once_and_a_new_file_from_its_begin(tmp_path: Path) -> None:
    path = tmp_path / "journal.jsonl"
    tail = Tail(path)
    assert read(tail) == []
    write(path, range(3), '{"step": 3')
    assert read(tail) == [0, 1, 2]  # the last line is still being written
    with open(path, "a") as file:
        file.write('}\n{"step": 4}\n')
    assert read(tail) == [3, 4]
    assert read(tail) == []
    write(path, range(2))
    assert read(tail) == [0, 1]


def test_lines_that_were_not_shipped_come_again(tmp_path: Path) -> None:
    path = tmp_path / "journal.jsonl"
    write(path, range(30))

    def hundred(line: Line) -> list[Metric]:
        return [Metric(f"m{n}", 0.0, 0, line["step"]) for n in range(100)]

    tail, shipped = Tail(path), []
    with pytest.raises(ConnectionError):
        for lines, points in tail.batches(hundred):
            assert len(points) <= MOST_METRICS
            if shipped:
                raise ConnectionError
            shipped += [line["step"] for line in lines]
    assert shipped == list(range(10))
    with pytest.raises(ConnectionError):
        for _ in tail.batches(lambda line: []):
            raise ConnectionError
    assert read(tail) == list(range(10, 30))


def test_a_long_file_is_never_in_memory_as_a_whole(tmp_path: Path) -> None:
    path = tmp_path / "journal.jsonl"
    write(path, range(2500))
    tail = Tail(path)
    assert [len(lines) for lines, _ in tail.batches(lambda line: [])] == [1000, 1000, 500]  # MLflow holds them already
    assert read(tail) == []


def test_a_damaged_line_is_named(tmp_path: Path) -> None:
    path = tmp_path / "journal.jsonl"
    write(path, range(2), "{}}\n")
    with pytest.raises(DamagedError, match=r"journal\.jsonl: a line is not JSON"):
        read(Tail(path))


def test_a_failing_sampler_says_so_and_ends(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_SYSTEM_METRICS_SAMPLING_INTERVAL", "0.01")
    stage = StageRecord("pretrain", "running", {})
    (tmp_path / "pretrain").mkdir()
    (tmp_path / "pretrain/stage.json").write_text(json.dumps(vars(stage) | {"fingerprint": ""}))
    (tmp_path / "pretrain" / SAMPLES).write_text('{"step": 8}\n{"step": 9, "un')  # of an attempt that lost its machine
    said: list[str] = []
    sampler = Sampler(tmp_path, said.append)

    def lose_driver() -> None:
        raise OSError("the driver is gone")

    def write_one() -> None:
        Sampler.sample(sampler)
        monkeypatch.setattr(sampler, "sample", lose_driver)

    monkeypatch.setattr(sampler, "sample", write_one)
    sampler.start()
    sampler.join(60)
    assert said == ["no more system metrics of this attempt: OSError: the driver is gone"]
    _, line = [json.loads(text) for text in (tmp_path / "pretrain" / SAMPLES).read_text().splitlines()]
    assert line["lineage"] == stage.lineage
    points = {point.key: point for point in points_of(line)}
    assert points["system/cpu_utilization_percentage"].step == 9
    assert points["system/system_memory_usage_megabytes"].value > 0
    sampler.end()


def test_a_fork_leads_to_the_run_it_came_from(config_path: Path) -> None:
    config = load_config(config_path, ("run.fork_from=parent@3",))
    assert forked_from(config) == {"electra.forked_from": "parent@3"}
    parent = config.run.dir / "runs/parent"
    parent.mkdir(parents=True)
    (parent / "mlflow.json").write_text('{"runs": {"pretrain": "abc"}}')
    assert forked_from(config)["electra.forked_from_run_id"] == "abc"


def test_slurm_jobs_of_all_attempts_are_kept() -> None:
    record = StageRecord("pretrain", "running", {}, environment={"git": "abc-dirty", "slurm": {"SLURM_JOB_ID": "12"}})
    tags = stage_tags(record, {"electra.slurm_job_ids": "11"})
    assert tags["electra.slurm_job_ids"] == "11,12"
    assert stage_tags(record, tags)["electra.slurm_job_ids"] == "11,12"
    assert (tags["mlflow.source.git.commit"], tags["mlflow.source.git.dirty"]) == ("abc", "true")


def test_secrets_are_taken_out_of_what_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_abcdefgh")
    uri = "https://me:p%40ssword@host/x"
    text = f"no answer of {uri}/api, p%40ssword, p@ssword, with hf_abcdefgh, and of http://you:secret@there/y"
    assert without_secrets(text, uri) == ("no answer of https://host/x/api, ***, ***, with ***, and of http://there/y")


def test_a_command_is_recorded_without_passwords() -> None:
    arguments = ["run", "a.yaml", "tracking.uri=postgresql://me:p/w@db/x?password=y", "data.x=[{u: 'http://a:b@c'}]"]
    assert redact_arguments(arguments) == [
        "run",
        "a.yaml",
        "tracking.uri=postgresql://db/x",
        "data.x=[{u: 'http://c'}]",
    ]


def test_user_and_password_leave_the_uri_of_a_server(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_PASSWORD", raising=False)
    environment = shipper_environment("https://me:p%40ss@host:80/x")
    assert environment["ELECTRA_TRACKING_URI"] == "https://host:80/x"
    assert (environment["MLFLOW_TRACKING_USERNAME"], environment["MLFLOW_TRACKING_PASSWORD"]) == ("me", "p@ss")
    database = "postgresql://me:pw@host/db"  # its client takes them from the URI alone
    assert shipper_environment(database)["ELECTRA_TRACKING_URI"] == database
    assert "MLFLOW_TRACKING_PASSWORD" not in shipper_environment(database)


def test_a_password_may_begin_like_a_port() -> None:
    uri = "postgresql://u:123/456@host/db"
    assert user_info(uri) == ("u", "123/456")
    assert without_user_info(f"no answer of {uri}, {uri}") == "no answer of postgresql://host/db, postgresql://host/db"


def test_a_path_may_have_an_at_sign() -> None:
    uri = "https://host:80/teams/a@b?x=c@d"
    assert user_info(uri) is None
    assert shipper_environment(uri)["ELECTRA_TRACKING_URI"] == uri
    assert redact(uri) == "https://host:80/teams/a@b"
    assert without_user_info(f"see {uri} and http://me:pw@host/a@b") == f"see {uri} and http://host/a@b"
    secret = "https://me:pw@host/teams/a@b"
    assert user_info(secret) == ("me", "pw")
    assert shipper_environment(secret)["ELECTRA_TRACKING_URI"] == redact(secret) == "https://host/teams/a@b"
    assert redact("me:pw@proxy:3128") == "proxy:3128"


@pytest.mark.parametrize(
    "override",
    [
        "tracking.uri=postgres://host/db?user=u&password=hunter222",
        "tracking.uri='https://me:hunter222@host",
        "tracking.uri=me:hunter222@host",
        "tracking.uri:https://me:hunter222@host",
    ],
)
def test_no_password_in_a_message_about_an_argument(override: str, config_path: Path) -> None:
    with pytest.raises((ConfigError, UsageError), match=r"tracking\.uri.*host") as raised:
        load_config(config_path, (override,))
    assert "hunter222" not in str(raised.value)


def test_the_command_of_any_stage_leads_to_the_whole_run() -> None:
    recorded = {"command": "electra pretrain --debug my.yaml run.name=a 'data.corpora=[{name: b, path: c d}]'"}
    assert command_of(recorded) == "electra run my.yaml run.name=a 'data.corpora=[{name: b, path: c d}]'"
    assert command_of({"command": "electra run --until pretrain --force pretrain my.yaml"}) == "electra run my.yaml"
    assert command_of({}) is None
