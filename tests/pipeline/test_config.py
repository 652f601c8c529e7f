"""Presets, YAML, overrides, errors, keys and the plan."""

import subprocess
import sys
from pathlib import Path

import pytest

from pipeline.config import Config
from pipeline.config_file import dump_yaml, known_keys, load_config, load_configs
from pipeline.errors import ConfigError, UsageError
from pipeline.keys import EXECUTION, NUMERICS, SCIENCE, science_of
from pipeline.plan import make_plan
from tests.conftest import REPOSITORY, Electra

PRESETS = sorted((REPOSITORY / "configs").glob("*.yaml"))


@pytest.mark.parametrize("path", PRESETS, ids=lambda path: path.stem)
@pytest.mark.parametrize("world_size", [1, 3, 8])
def test_preset_parses_and_plans(path: Path, world_size: int) -> None:
    plan = make_plan(load_config(path), world_size)
    rows = plan.micro_batch_rows * (plan.accumulation_steps * world_size - plan.idle_micro_batches_per_step)
    assert rows == plan.global_batch_rows
    assert plan.flops_total > 0


@pytest.mark.parametrize("name", ["large", "large_1750k"])
@pytest.mark.parametrize("world_size", [8, 16, 64, 128])
def test_large_fills_every_device(name: str, world_size: int) -> None:
    plan = make_plan(load_config(REPOSITORY / "configs" / f"{name}.yaml"), world_size)
    assert plan.micro_batch_rows * plan.accumulation_steps * world_size == 2048
    assert plan.idle_micro_batches_per_step == 0
    assert plan.micro_batch_rows * 512 <= 32768
    assert plan.tokens_per_step == 2**20


def test_large_numbers_are_the_papers() -> None:
    config = load_config(REPOSITORY / "configs" / "large.yaml")
    plan = make_plan(config, 64)
    assert f"{plan.parameters_trained / 1e6:.1f}" == "354.7"
    assert f"{plan.parameters_discriminator / 1e6:.1f}" == "335.1"
    assert f"{plan.flops_per_step:.3e}" == "2.275e+15"
    assert (f"{plan.flops_total:.2e}", f"{plan.flops_paper_total:.2e}") == ("9.10e+20", "7.12e+20")
    assert f"{plan.total_tokens:.2e}" == "4.19e+11"
    weights = {corpus.name: corpus.weight for corpus in config.data.corpora}
    assert weights == {
        "wikipedia": 2.78, "bookscorpus": 1.09, "giga5": 4.75, "clueweb": 4.30, "common_crawl": 19.97,
    }  # fmt: skip


def test_published_hyperparameters() -> None:
    # (layers, hidden, heads, ffn, embedding, generator hidden, mask, length, batch, lr, steps), paper table 6.
    published = {
        "small": (12, 256, 4, 1024, 128, 64, 0.15, 128, 128, 5e-4, 1_000_000),
        "small_plus_plus": (12, 256, 4, 1024, 128, 256, 0.15, 512, 128, 5e-4, 4_000_000),
        "base": (12, 768, 12, 3072, 768, 256, 0.15, 512, 256, 2e-4, 766_000),
        "large": (24, 1024, 16, 4096, 1024, 256, 0.25, 512, 2048, 2e-4, 400_000),
        "large_1750k": (24, 1024, 16, 4096, 1024, 256, 0.25, 512, 2048, 2e-4, 1_750_000),
    }
    for name, expected in published.items():
        config = load_config(REPOSITORY / "configs" / f"{name}.yaml")
        model = config.model
        assert expected == (
            model.hidden_layers, model.hidden_size, model.attention_heads, model.feed_forward_size,
            model.embedding_size, model.generator.hidden_size, config.objective.mask_fraction,
            config.data.sequence_length, config.train.global_batch_size, config.optimizer.lr, config.train.steps,
        )  # fmt: skip
        assert config.optimizer.warmup_steps == 10_000
        assert (config.optimizer.eps, config.optimizer.bias_correction) == (1e-6, False)


def test_reading_back_a_resolved_config_gives_the_same(config_path: Path, tmp_path: Path) -> None:
    config = load_config(config_path, ("optimizer.lr=5e-4",))
    resolved = tmp_path / "resolved.yaml"
    resolved.write_text(dump_yaml(config))
    assert load_config(resolved) == config


def test_yaml_is_version_1_2(config_path: Path) -> None:
    text = config_path.read_text().replace("lr: 5e-4", "lr: 3e-4").replace("name: tiny", "name: 'no'")
    config_path.write_text(text)
    config = load_config(config_path)
    assert config.optimizer.lr == 3e-4
    assert config.run.name == "no"
    assert load_config(config_path, ("tracking.experiment=12:30",)).tracking.experiment == "12:30"


def test_repeated_key_is_an_error(config_path: Path) -> None:
    config_path.write_text(config_path.read_text() + "\ntracking: {uri: auto}\n")
    with pytest.raises(ConfigError, match=r"tiny\.yaml: not valid YAML: line \d+: .*duplicate key"):
        load_config(config_path)


def test_unknown_key_names_file_line_and_nearest(config_path: Path) -> None:
    config_path.write_text(config_path.read_text().replace("  log_every: 1", "  log_evry: 1"))
    line = config_path.read_text().splitlines().index("  log_evry: 1") + 1
    with pytest.raises(ConfigError, match=rf"tiny\.yaml:{line}: unknown key train\.log_evry; .* train\.log_every"):
        load_config(config_path)


def test_unknown_override_names_the_argument(config_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"argument 'train\.stesp=3': unknown key train\.stesp; .* train\.steps"):
        load_config(config_path, ("train.stesp=3",))
    with pytest.raises(ConfigError, match=r"unknown key trian"):
        load_config(config_path, ("trian.steps=3",))


def test_wrong_value_names_place_value_and_constraint(config_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"argument 'train\.steps=0': train\.steps=0: .*greater than or equal to 1"):
        load_config(config_path, ("train.steps=0",))
    with pytest.raises(ConfigError, match=r"train\.precision='half': .*'fp32', 'bf16' or 'fp16'"):
        load_config(config_path, ("train.precision=half",))


def test_batch_that_does_not_divide(config_path: Path, electra: Electra) -> None:
    assert "not a multiple" in electra("run", config_path, "train.micro_batch_size=3", code=78).stderr
    with pytest.raises(ConfigError, match=r"global_batch_size=8 is not a multiple of train\.micro_batch_size=3"):
        load_config(config_path, ("train.micro_batch_size=3",))


def test_override_without_equals_sign_is_wrong_usage(config_path: Path) -> None:
    with pytest.raises(UsageError, match=r"'train\.steps': an override is section\.key=value"):
        load_config(config_path, ("train.steps",))


def test_paths_resolve_against_where_they_stand(config_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config_path.write_text(config_path.read_text().replace(f"dir: {config_path.parent / 'out'}", "dir: here"))
    assert load_config(config_path).run.dir == config_path.parent / "here"
    monkeypatch.chdir("/tmp")
    assert load_config(config_path, ("run.dir=there",)).run.dir == Path("/tmp/there")
    corpora = '[{"name": "x", "path": "text/*.txt"}]'
    config = load_config(config_path, (f"data.corpora={corpora}",))
    assert config.data.corpora[0].path == "/tmp/text/*.txt"


def test_size_sets_published_values_and_a_file_only_the_difference(config_path: Path) -> None:
    config_path.write_text(config_path.read_text().split("model:")[0] + "model: {size: base, hidden_layers: 3}\n"
                           + "train: {steps: 1, global_batch_size: 1}\noptimizer: {lr: 1e-3}\n")  # fmt: skip
    model = load_config(config_path).model
    assert (model.hidden_layers, model.hidden_size, model.generator.hidden_size) == (3, 768, 256)


def test_another_size_takes_the_dimensions_of_a_resolved_config_along(tmp_path: Path) -> None:
    resolved = tmp_path / "resolved.yaml"
    resolved.write_text(dump_yaml(load_config(SMALL, ("model.feed_forward_size=512", "run.name=x"))))
    small, base = load_config(resolved), load_config(resolved, ("model.hidden_layers=12", "model.size=base"))
    assert (small.model.hidden_size, base.model.hidden_size) == (256, 768)
    assert base.model.feed_forward_size == 512  # not the size's own: it was meant
    assert load_config(resolved, ("model.size=base", "model.hidden_size=264")).model.hidden_size == 264
    assert load_config(resolved, ("model.size=small",)) == small
    resolved.write_text(
        resolved.read_text() + "variants:\n  a: {model.size: base}\n  b: {model.generator_width: 0.25}\n"
    )
    one, other = load_configs(resolved, ("model.size=base",))
    assert (one.model, other.model.generator_width) == (base.model, 0.25)
    assert load_config(resolved, ("run.variant=a",)).model == base.model


@pytest.mark.parametrize(
    ("of_file", "change", "follows"),
    [
        ("recipe=fixed", "recipe=released", ("with_replacement", "micro_batch", "embeddings")),
        ("recipe=released", "recipe=fixed", ("distinct", "global", "embeddings")),
        ("objective.name=mlm", "objective.name=electra", ("distinct", "global", "embeddings")),
        ("objective.name=electra", "objective.name=mlm", ("distinct", "global", "none")),
        ("objective.training=two_stage", "objective.training=joint", ("distinct", "global", "embeddings")),
        ("objective.generator=network", "objective.generator=unigram", ("distinct", "global", "none")),
    ],
)
def test_what_follows_from_a_key_of_a_resolved_config_changes_with_it(
    tmp_path: Path, of_file: str, change: str, follows: tuple[str, str, str]
) -> None:
    resolved = tmp_path / "resolved.yaml"
    equal = "model.generator_width=1"  # for two_stage
    resolved.write_text(dump_yaml(load_config(SMALL, (of_file, equal))))
    changed = load_config(resolved, (change,))
    assert changed == load_config(SMALL, (of_file, equal, change))
    objective = changed.objective
    assert (objective.position_sampling, objective.loss_normalization, objective.sharing) == follows
    key, _, value = change.partition("=")
    resolved.write_text(f"{resolved.read_text()}variants: {{other: {{{key}: {value}}}}}\n")
    assert load_config(resolved, ("run.variant=other",)).objective == objective


def test_what_was_set_beside_a_key_of_a_resolved_config_stays(tmp_path: Path) -> None:
    resolved = tmp_path / "resolved.yaml"
    resolved.write_text(dump_yaml(load_config(SMALL, ("objective.loss_normalization=micro_batch",))))
    released = load_config(resolved, ("objective.position_sampling=distinct", "recipe=released")).objective
    assert (released.position_sampling, released.loss_normalization) == ("distinct", "micro_batch")
    assert load_config(resolved, ("recipe=fixed", "objective.name=electra")) == load_config(resolved)
    with pytest.raises(ConfigError, match="recipe='paper': "):
        load_config(resolved, ("recipe=paper",))
    resolved.write_text(dump_yaml(load_config(SMALL, ("objective.name=mlm",))))
    assert load_config(resolved, ("objective={name: electra, sharing: none}",)).objective.sharing == "none"
    resolved.write_text(dump_yaml(load_config(SMALL, ("objective.sharing=gdes", "model.generator_width=1"))))
    assert load_config(resolved, ("objective.training=two_stage",)).objective.sharing == "gdes"


def test_every_key_stands_in_exactly_one_list() -> None:
    listed = [key for keys in (*SCIENCE.values(), NUMERICS, EXECUTION) for key in keys]
    assert sorted(listed) == sorted(known_keys())


def test_every_key_has_a_description() -> None:
    def check(schema: type, prefix: str = "") -> None:
        for name, field in schema.model_fields.items():  # type: ignore[attr-defined]
            kind = field.annotation
            if isinstance(kind, type) and hasattr(kind, "model_fields"):
                check(kind, f"{prefix}{name}.")
            else:
                assert field.description, f"{prefix}{name}"

    check(Config)


def test_paths_and_names_of_corpora_are_not_science(config_path: Path) -> None:
    config = load_config(config_path)
    moved = load_config(config_path, ('data.corpora=[{"name": "made_up", "path": "/elsewhere"}]',))
    assert science_of(config, "tokenize") == science_of(moved, "tokenize")
    weighted = load_config(config_path, ('data.corpora=[{"name": "made_up", "path": "/elsewhere", "weight": 2}]',))
    assert science_of(config, "tokenize") == science_of(weighted, "tokenize")
    assert science_of(config, "pretrain") != science_of(weighted, "pretrain")


SMALL = REPOSITORY / "configs" / "small.yaml"


def without_steps(config_path: Path) -> Path:
    config_path.write_text(config_path.read_text().replace("  steps: 20\n", ""))
    return config_path


@pytest.mark.parametrize("training", ["joint", "two_stage"])
def test_budget_of_flops_says_how_many_steps(training: str) -> None:
    given = ("train.flops=2e17", f"objective.training={training}", "model.generator_width=1")
    config = load_config(SMALL, ("train.steps=null", *given))
    plan = make_plan(config, 8)
    assert plan.flops_at(config.train.steps - 1) < 2e17 <= plan.flops_total == plan.flops_at(plan.steps)
    assert plan.flops_total == pytest.approx(2e17, rel=1e-4)
    last = plan.flops_total - plan.flops_at(plan.steps - 1)
    assert (last == pytest.approx(plan.flops_at(1), rel=1e-3)) == (training == "joint")
    assert plan.flops_paper_at(plan.steps) == plan.flops_paper_total


def test_budget_and_steps_that_agree_are_a_resolved_config(config_path: Path, tmp_path: Path) -> None:
    config = load_config(without_steps(config_path), ("train.flops=1e10",))
    resolved = tmp_path / "resolved.yaml"
    resolved.write_text(dump_yaml(config))
    assert f"steps: {config.train.steps}" in resolved.read_text() and "flops: 1" in resolved.read_text()
    assert load_config(resolved) == config


def test_budget_and_steps_that_disagree_are_refused(config_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"train\.steps=20 is not what train\.flops=1e\+10 pays for, \d+ steps; set "
                                          r"train\.flops=null to choose the steps"):  # fmt: skip
        load_config(config_path, ("train.flops=1e10",))
    assert load_config(config_path, ("train.flops=1e10", "train.flops=null")).train.steps == 20


def test_neither_budget_nor_steps_names_both(config_path: Path) -> None:
    without_steps(config_path)
    for overrides in ((), ("train.steps=null",)):
        with pytest.raises(ConfigError, match=r"train\.steps: missing; .* train\.steps=….* train\.flops, a budget"):
            load_config(config_path, overrides)


@pytest.mark.parametrize(
    ("given", "problem"),
    [
        ("train.flops=0", r"train\.flops=0: .*greater than 0"),
        ("train.flops='1e9'", r"train\.flops='1e9': must be a number, written without quotes"),
        ("train.flops=many", r"train\.flops='many': must be a number"),
        ("train.flops=true", r"train\.flops=True: must be a number"),
        ("train.flops=.inf", r"train\.flops=inf: .*finite number"),
        ("train.flops=1e308", r"train\.flops=1e\+308: .*less than"),
        ("train.flops=1e25", r"argument .*: train\.flops=1e\+25 pays for \S+ steps, more than the 1,000,000,000"),
        ("train.steps=2000000000", r"train\.steps=2000000000: .*less than or equal to 1000000000"),
    ],
)
def test_budget_that_is_none(config_path: Path, given: str, problem: str) -> None:
    with pytest.raises(ConfigError, match=problem) as refused:
        load_config(without_steps(config_path), (given, "objective.training=two_stage", "model.generator_width=1"))
    assert "train.steps: missing" not in str(refused.value)


def test_budget_may_be_a_whole_number(config_path: Path) -> None:
    whole, real = (load_config(without_steps(config_path), (f"train.flops={text}",)) for text in (10**10, 1e10))
    assert whole == real


def test_budget_that_ends_in_the_first_stage_is_refused(config_path: Path) -> None:
    given = ("train.flops=1e8", "objective.training=two_stage", "model.generator_width=1")
    with pytest.raises(ConfigError, match=r"objective\.generator_steps=1000 leaves no step of train\.steps=\d+ to"):
        load_config(without_steps(config_path), (*given, "objective.generator_steps=1000"))


def test_resumed_run_keeps_its_automatic_micro_batch(config_path: Path) -> None:
    config = load_config(config_path, ("train.micro_batch_size=auto",))
    assert make_plan(config, 1).micro_batch_rows == 8
    assert make_plan(config, 4).micro_batch_rows == 2
    assert make_plan(config, 4, micro_batch_rows=8).micro_batch_rows == 8


@pytest.mark.parametrize("module", ["pipeline.config", "pipeline.config_file", "pipeline.plan", "pipeline.chain"])
def test_light_modules_import_nothing_heavy(module: str) -> None:
    heavy = {"torch", "deepspeed", "mlflow", "transformers", "datasets"}
    code = f"import sys, {module}; print(sorted({heavy} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_help_imports_nothing_but_click() -> None:
    code = "import sys\nfrom pipeline.cli import main\nsys.argv=['electra','--help']\n" \
           "try: main()\nexcept SystemExit: pass\n" \
           "print({'torch','pydantic','numpy','sentencepiece'} & set(sys.modules))"  # fmt: skip
    done = subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True, text=True, check=True)
    assert "pretrain" in done.stdout
    assert done.stdout.strip().endswith("set()")


def test_stages_of_a_config_are_those_of_run(electra, config_path):
    shown = [
        electra("config", config_path, "--stages", *tasks).stdout.split() for tasks in ([], ["evaluate.tasks=[cola]"])
    ]
    assert shown == [["tokenize", "pretrain"], ["tokenize", "pretrain", "evaluate"]]


def test_config_command_prints_the_arithmetic(electra: Electra) -> None:
    shown = electra("config", REPOSITORY / "configs" / "large.yaml", "--world-size", 64).stdout
    for text in ("354.7M", "335.1M", "2.275e+15", "64 micro-batches of 32 rows", "7.118e+20 in the paper's count",
                 "disk for checkpoints"):  # fmt: skip
        assert text in shown
