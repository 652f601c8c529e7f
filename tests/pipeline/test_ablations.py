"""The paper's comparisons: equal FLOPs on paper, and every variant trains from the command line."""

import math
from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest

from pipeline.config_file import load_configs
from pipeline.plan import make_plan
from tests.conftest import REPOSITORY, Electra, read_journal

FILES = sorted((REPOSITORY / "configs" / "ablations").glob("*.yaml"), key=lambda path: path.stem)
VARIANTS = [(path, config.run.variant) for path in FILES for config in load_configs(path)]
STEPS = 30

SMALLEST = (
    "model.size=tiny", "model.hidden_layers=2", "model.hidden_size=64", "model.attention_heads=4",
    "model.feed_forward_size=128", "model.embedding_size=48", "model.dropout=0", "model.attention_dropout=0",
    "model.initializer_range=0.06", "data.sequence_length=32", "data.num_workers=1", "tokenizer.vocab_size=500",
    "train.flops=null", f"train.steps={STEPS}", "train.global_batch_size=8", "train.micro_batch_size=4",
    "train.precision=fp32", "train.log_every=5", f"train.checkpoint_every={STEPS}", "train.held_out_rows=16",
    "optimizer.lr=2e-3", "optimizer.warmup_steps=5", "optimizer.bias_correction=true",
    "launch.device=cpu", "launch.processes=1", "launch.threads_per_process=1", "tracking.uri=none",
)  # fmt: skip
"""A few steps on the bundled sample in place of a million on Wikipedia; what a variant sets would lose to these."""


def test_every_comparison_of_the_paper_has_a_file() -> None:
    names = ["generator_size", "layout", "objectives", "recipe", "sharing", "training"]
    assert [path.stem for path in FILES] == names
    assert [load_configs(path)[0].run.name.split("-")[0] for path in FILES] == names


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_variants_cost_the_same(path: Path) -> None:
    configs = load_configs(path)
    small = make_plan(load_configs(REPOSITORY / "configs" / "small.yaml")[0], 1)
    for config in configs:
        plan = make_plan(config, 1)
        assert plan.flops_total == pytest.approx(config.train.flops, rel=0.005)
        assert plan.flops_total == pytest.approx(small.flops_total, rel=0.005)
        assert config.model_dump(exclude={"run", "train"}) != configs[0].model_dump(exclude={"run", "train"}) or (
            config is configs[0]
        )


def test_overrides_of_these_tests_leave_the_comparisons_as_they_are() -> None:
    mine = {override.split("=")[0] for override in SMALLEST}
    for path in FILES:
        compared = [config.flat() for config in load_configs(path)]
        different = {key for flat in compared for key in flat if flat[key] != compared[0][key]}
        assert not mine & different - {"train.steps"}


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, electra: Electra) -> Callable[[Path], Path]:
    """Trains a file's variants by one command, when the first of them is asked for. Returns the run.dir."""
    folder = tmp_path_factory.mktemp("ablations")
    corpora = f'data.corpora=[{{name: kjv, path: "{REPOSITORY}/data_shards/sample/*.txt.xz"}}]'

    @cache
    def run(path: Path) -> Path:
        electra("run", path, *SMALLEST, f"run.dir={folder}", corpora)
        return folder

    return run


@pytest.mark.parametrize(("path", "variant"), VARIANTS, ids=[f"{path.stem}-{variant}" for path, variant in VARIANTS])
def test_variant_trains(path: Path, variant: str, trained: Callable[[Path], Path]) -> None:
    journal = read_journal(trained(path), f"{path.stem}-{variant}")
    assert [entry["step"] for entry in journal] == [5, 10, 15, 20, 25, 30]
    losses = [entry["train/total_loss"] for entry in journal]
    assert all(math.isfinite(loss) for loss in losses)
    stages = [losses[:3], losses[3:]] if variant == "two_stage" else [losses]  # another network's loss after half
    assert all(stage[-1] < stage[0] for stage in stages)


def test_text_is_tokenized_once_for_each_layout(trained: Callable[[Path], Path]) -> None:
    folders = [trained(path) for path in FILES]
    assert len(list((folders[0] / "shards").glob("kjv-*"))) == 2  # packed, and paper
    assert len(list((folders[0] / "tokenizers").iterdir())) == 1
