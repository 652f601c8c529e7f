"""Files with several variants: what each resolves to, what is refused, and the commands on such a file."""

import json
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from click.testing import CliRunner

from pipeline.cli import cli
from pipeline.config_file import dump_yaml, load_config, load_configs
from pipeline.distributed import RENDEZVOUS
from pipeline.errors import ConfigError
from pipeline.launch import Children
from tests.conftest import Electra, clean_environment, command, free_port, read_journal
from tests.forking import Forked

VARIANTS = """
variants:
  plain: {}
  wide: {model.generator_width: 1, optimizer.lr: 1e-3}
  mlm: {objective.name: mlm, train.steps: 6}
"""


@pytest.fixture
def comparison(config_path: Path) -> Path:
    config_path.write_text(config_path.read_text().replace("steps: 20", "steps: 4") + VARIANTS)
    return config_path


def append(path: Path, text: str) -> Path:
    path.write_text(path.read_text() + text)
    return path


def line_of(path: Path, text: str) -> int:
    return next(number for number, line in enumerate(path.read_text().splitlines(), 1) if text in line)


def test_each_variant_is_a_run_of_its_own(comparison: Path) -> None:
    configs = load_configs(comparison)
    assert [config.run.name for config in configs] == ["tiny-plain", "tiny-wide", "tiny-mlm"]
    assert [config.run.variant for config in configs] == ["plain", "wide", "mlm"]
    plain, wide, mlm = configs
    assert (plain.model.generator_width, wide.model.generator_width, wide.optimizer.lr) == (0.5, 1.0, 1e-3)
    assert (mlm.objective.name, mlm.objective.sharing, mlm.train.steps) == ("mlm", "none", 6)
    assert plain.run_folder.name == "tiny-plain"


def test_override_goes_over_the_variant_and_the_variant_over_the_file(comparison: Path) -> None:
    plain, wide, mlm = load_configs(comparison, ("optimizer.lr=2e-3", "run.name=other"))
    assert plain.optimizer.lr == wide.optimizer.lr == 2e-3
    assert [config.train.steps for config in (plain, wide, mlm)] == [4, 4, 6]
    assert mlm.run.name == "other-mlm"


def test_one_variant_is_chosen_by_name(comparison: Path) -> None:
    chosen = load_configs(comparison, ("run.variant=wide",))
    assert [config.run.name for config in chosen] == ["tiny-wide"]
    assert load_config(comparison, ("run.variant=wide",)) == chosen[0]
    with pytest.raises(ConfigError, match=r"has 3 variants; choose .* run\.variant=: plain, wide, mlm"):
        load_config(comparison)
    with pytest.raises(ConfigError, match=r"run\.variant=wise: .*tiny\.yaml has no such variant; .* plain, wide, mlm"):
        load_configs(comparison, ("run.variant=wise",))


@pytest.mark.parametrize("name", ["null", "0.10", "007", "1_8", "true"])
def test_name_that_yaml_would_read_as_something_else(config_path: Path, tmp_path: Path, name: str) -> None:
    append(config_path, f'variants:\n  other: {{}}\n  "{name}": {{}}\n')
    config = load_config(config_path, (f"run.variant={name}",))
    assert (config.run.variant, config.run.name) == (name, f"tiny-{name}")
    resolved = tmp_path / "resolved.yaml"
    resolved.write_text(dump_yaml(config))
    assert load_config(resolved, (f"run.variant={name}",)) == config


def test_empty_choice_is_no_choice_of_all(comparison: Path, config_path: Path) -> None:
    for path in (comparison, config_path):
        with pytest.raises(ConfigError, match=r"run\.variant is empty; give the name of a variant"):
            load_configs(path, ("run.variant=",))


def test_variants_may_share_keys_by_a_merge(config_path: Path) -> None:
    append(config_path, "variants:\n  a: &a {train.steps: 3}\n  b: {<<: *a, run.seed: 2}\n  c:\n    <<: *a\n")
    assert [config.train.steps for config in load_configs(config_path)] == [3, 3, 3]
    config_path.write_text(config_path.read_text().replace("steps: 3", "steps: 0"))
    with pytest.raises(ConfigError, match=rf":{line_of(config_path, '<<: *a, run')}: variant b: train\.steps=0"):
        load_configs(config_path, ("run.variant=b",))


def test_file_without_variants_has_none_to_choose(config_path: Path) -> None:
    assert [config.run.name for config in load_configs(config_path)] == ["tiny"]
    with pytest.raises(ConfigError, match=r"run\.variant=wide: .*tiny\.yaml has no variants; leave it out"):
        load_config(config_path, ("run.variant=wide",))


def test_resolved_config_of_a_variant_reads_back_as_it_is(comparison: Path, tmp_path: Path) -> None:
    config = load_config(comparison, ("run.variant=mlm",))
    resolved = tmp_path / "resolved.yaml"
    resolved.write_text(dump_yaml(config))
    assert "variants" not in resolved.read_text()
    assert load_configs(resolved) == [config]


def test_path_in_a_variant_resolves_against_the_file(config_path: Path) -> None:
    append(config_path, "variants:\n  other: {tokenizer.path: there/tokenizer.model}\n")
    assert load_config(config_path).tokenizer.path == config_path.parent / "there/tokenizer.model"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("variants:\n  a: {train.stesp: 3}\n", r":{line}: variant a: unknown key train\.stesp; .* train\.steps"),
        ("variants:\n  a: {train.steps: 0}\n", r":{line}: variant a: train\.steps=0: .*greater than or equal to 1"),
        ("variants:\n  a: {objective.sharing: all}\n", r":{line}: variant a: objective\.sharing=all needs networks of"),
        ("variants:\n  a: {train: {steps: 3}}\n", r":{line}: variant a: train is a section; write train\.KEY: value"),
        ("variants:\n  a: {run.variant: b}\n", r":{line}: variant a: run\.variant is the variant's own name"),
        ("variants:\n  a: {run.name: tiny-b}\n", r":{line}: variant a: run\.name follows from the file's run\.name"),
        ("variants:\n  a: {run.dir: other}\n", r":{line}: variant a: run\.dir is one for all variants"),
        ("variants:\n  A: {}\n  a: {}\n", r":\d+: variants A and a differ in case only"),
        ("variants:\n  null: {}\n", r":{line}: variants\.None: YAML reads this name as None.* put it in quotes"),
        ("variants:\n  1_8: {}\n", r":{line}: variants\.18: YAML reads this name as 18.* put it in quotes"),
        ('variants:\n  1: {}\n  "1": {}\n', r":{line}: variants\.1: YAML reads this name as 1, .* put it in quotes"),
        ("variants:\n  a: 3\n", r":{line}: variant a=3 must be a mapping of keys"),
        ("variants:\n  a/b: {}\n", r":{line}: variant 'a/b' becomes part of a run's name"),
        ("variants: [a]\n", r"variants=\['a'\] must be a mapping of names"),
        ("variants:\n", r"variants=None must be a mapping of names"),
    ],
)
def test_wrong_variant_names_its_place(config_path: Path, text: str, message: str) -> None:
    append(config_path, text)
    line = line_of(config_path, "variants:") + 1
    with pytest.raises(ConfigError, match=rf"tiny\.yaml.*{message.replace('{line}', str(line))}"):
        load_configs(config_path)


def test_config_shows_the_variants_side_by_side(comparison: Path, electra: Electra) -> None:
    table = electra("config", comparison).stdout.splitlines()
    assert [line.split()[0] for line in table] == ["variant", "plain", "wide", "mlm"]
    assert table[2].endswith("model.generator_width=1.0 optimizer.lr=0.001")
    assert "objective.name=mlm objective.sharing=none" in table[3]
    assert table[3].split()[1] == "6"
    both = json.loads(electra("config", comparison, "--json").stdout)
    assert [entry["config"]["run"]["variant"] for entry in both] == ["plain", "wide", "mlm"]
    assert [entry["plan"]["steps"] for entry in both] == [4, 4, 6]
    assert "variant: wide" in electra("config", comparison, "run.variant=wide").stdout
    for shown in ("config", "status"):  # a list for a file with variants, also of one
        assert len(json.loads(electra(shown, comparison, "run.variant=wide", "--json").stdout)) == 1


def test_unknown_variant_ends_a_command_with_the_names(comparison: Path, electra: Electra) -> None:
    assert "it has plain, wide, mlm" in electra("pretrain", comparison, "run.variant=x", code=78).stderr


def test_commands_do_every_variant_and_a_rerun_does_what_is_left(comparison: Path, electra: Electra) -> None:
    out = comparison.parent / "out"
    electra("tokenize", comparison)
    assert len(list((out / "shards").glob("made_up-*"))) == 1
    for stage in ("tokenize", "pretrain"):
        electra(stage, comparison, "--check")

    # What no variant can be is found before the first one starts.
    wrong = electra("pretrain", comparison, "objective.sharing=all", "model.generator_width=1", code=78)
    assert "variant mlm: objective.sharing=all needs two networks" in wrong.stderr
    assert not (out / "runs/tiny-plain/pretrain").exists()

    stopped = electra("pretrain", comparison, "train.stop_after_seconds=0.001", code=85)
    assert "variant plain ended with exit code 85; not run: wide, mlm" in stopped.stderr
    electra("pretrain", comparison)
    assert [len(read_journal(out, f"tiny-{name}")) for name in ("plain", "wide", "mlm")] == [4, 4, 6]

    states = json.loads(electra("status", comparison, "--json").stdout)
    assert [state["run"] for state in states] == ["tiny-plain", "tiny-wide", "tiny-mlm"]
    assert all(state["rerun"]["pretrain"].startswith("reuse") for state in states)
    assert electra("status", comparison).stdout.count("\nrun tiny-") == 2
    staged = electra("shards", "stage", comparison, "--to", out / "local").stdout
    assert staged.count("made_up-") == 1  # the variants share one folder
    plan = electra("run", comparison, "--plan").stdout
    assert plan.count("pretrain  reuse") == 3 and "tiny-wide:" in plan
    assert electra("run", comparison).stderr.count("pretrain: up to date, at step") == 3


def test_ranks_started_by_others_do_the_variants_in_turn(
    comparison: Path, electra: Electra, start_electra: Callable[..., Forked]
) -> None:
    """As under srun: the processes exist already, and each variant needs fresh ones."""
    comparison.write_text("\n".join(line for line in comparison.read_text().splitlines() if "  wide:" not in line))
    electra("tokenize", comparison)
    arguments = ["pretrain", comparison, "train.micro_batch_size=2"]
    rendezvous = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    sizes = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "OMP_NUM_THREADS": "1"}
    ranks = [start_electra(*arguments, **rendezvous, **sizes, RANK=rank, LOCAL_RANK=rank) for rank in "01"]
    assert [rank.wait() for rank in ranks] == [0, 0]
    for name, steps in (("plain", 4), ("mlm", 6)):
        assert len(read_journal(comparison.parent / "out", f"tiny-{name}")) == steps


def test_ranks_of_each_variant_meet_at_a_port_of_their_own(comparison: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A fast rank would join the variant before, whose rank 0 may still be leaving, and wait for nobody."""
    ports = []
    monkeypatch.setattr(Children, "run", lambda _, arguments, environment: ports.append(environment["MASTER_PORT"]))
    monkeypatch.setenv("MASTER_PORT", "29000")
    assert CliRunner().invoke(cli, ["pretrain", str(comparison)]).exit_code == 0
    monkeypatch.setenv("TORCHELASTIC_USE_AGENT_STORE", "True")
    assert CliRunner().invoke(cli, ["pretrain", str(comparison)]).exit_code == 0
    assert ports == ["29000", "10009", "11018", *["29000"] * 3]


def test_torchrun_does_the_variants_in_turn(comparison: Path, electra: Electra) -> None:
    """Its store outlives the processes of a variant."""
    comparison.write_text("\n".join(line for line in comparison.read_text().splitlines() if "  wide:" not in line))
    electra("tokenize", comparison)
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m", "pipeline"]
    done = subprocess.run(
        [*torchrun, "pretrain", str(comparison)], env=clean_environment(), capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stderr
    for name, steps in (("plain", 4), ("mlm", 6)):
        assert len(read_journal(comparison.parent / "out", f"tiny-{name}")) == steps


def children_of(process: subprocess.Popen) -> str:
    return Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text()


def test_a_signal_while_a_variant_starts_exits_85(comparison: Path) -> None:
    environment = clean_environment(RANK="0", LOCAL_RANK="0", WORLD_SIZE="1")
    process = subprocess.Popen(command("pretrain", comparison), env=environment, stderr=subprocess.PIPE, text=True)
    while not children_of(process):
        assert process.poll() is None
        time.sleep(0.002)
    process.send_signal(signal.SIGUSR2)  # the child's interpreter has not even started
    _, said = process.communicate(timeout=120)
    assert (process.returncode, "not run: wide, mlm" in said) == (85, True)


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """The commands for the variants; they are noted in place of being run, and take a hundred seconds each."""
    noted: list[list[str]] = []
    monotonic = time.monotonic

    def run(_: Children, arguments: list[str], environment: dict[str, str]) -> int:
        assert f"run.variant={environment[RENDEZVOUS]}" in arguments
        noted.append(arguments)
        monkeypatch.setattr("time.monotonic", lambda: monotonic() + 100 * len(noted))
        return 0

    monkeypatch.setattr(Children, "run", run)
    return noted


def test_stages_are_each_variants_own(comparison: Path, calls: list[list[str]]) -> None:
    comparison.write_text(comparison.read_text().replace("train.steps: 6", "evaluate.tasks: [first_word.yaml]"))
    runner = CliRunner()
    plan = runner.invoke(cli, ["run", str(comparison), "--plan"]).output
    assert [line for line in plan.splitlines() if line.startswith("evaluate")] == ["evaluate  wait    after pretrain"]
    assert "tiny-mlm" in plan.partition("evaluate")[0]
    plan = runner.invoke(cli, ["run", str(comparison), "--plan", "--until", "tokenize"]).output
    assert (plan.count("tokenize  run"), plan.count("pretrain")) == (3, 0)

    assert runner.invoke(cli, ["run", str(comparison), "--force", "evaluate"]).exit_code == 0
    assert ["--force" in arguments for arguments in calls] == [False, False, True]
    calls.clear()
    assert runner.invoke(cli, ["run", str(comparison), "--until", "pretrain", "--force", "pretrain"]).exit_code == 0
    assert [arguments[-4:] for arguments in calls] == [["--until", "pretrain", "--force", "pretrain"]] * 3
    calls.clear()
    refused = runner.invoke(cli, ["run", str(comparison), "--until", "pretrain", "--force", "evaluate"])
    assert "that stage is not among those to run" in refused.output and not calls


def test_time_that_is_allowed_counts_over_all_variants(comparison: Path, calls: list[list[str]]) -> None:
    assert CliRunner().invoke(cli, ["pretrain", str(comparison), "train.stop_after_seconds=150"]).exit_code == 0
    settings = [load_config(comparison, tuple(arguments[2:])).train.stop_after_seconds for arguments in calls]
    first, second, third = (setting or 0 for setting in settings)
    assert 50 < first <= 150 and 0.001 <= second <= 50 and third == 0.001
    calls.clear()
    CliRunner().invoke(cli, ["tokenize", str(comparison), "train.stop_after_seconds=150"])
    assert not any("0.001" in argument for arguments in calls for argument in arguments)


@pytest.mark.parametrize(("told_at", "code", "said"), [("plain", 85, "not run: wide, mlm"), ("mlm", 0, "")])
def test_stop_after_the_last_variant_is_no_stop(
    comparison: Path, monkeypatch: pytest.MonkeyPatch, told_at: str, code: int, said: str
) -> None:
    def run(children: Children, arguments: list[str], environment: dict[str, str]) -> int:
        del environment
        children.told_to_stop = f"run.variant={told_at}" in arguments
        return 0

    monkeypatch.setattr(Children, "run", run)
    result = CliRunner().invoke(cli, ["pretrain", str(comparison)])
    assert (getattr(result.exception, "exit_code", 0), said in str(result.exception)) == (code, True)
