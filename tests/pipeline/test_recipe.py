"""The two recipes: what each sets, and what the released one makes of the losses."""

import pytest
import torch

from model.batch import GlobalCounts
from model.electra import Electra
from model.kernels.select import select_kernels
from pipeline.batches import MicroBatches, open_rows
from pipeline.config_file import load_config
from pipeline.distributed import Process
from pipeline.errors import ConfigError
from pipeline.keys import science_of
from pipeline.plan import make_plan
from pipeline.pretrain import with_counts
from pipeline.stages import shard_folders
from pipeline.tokenize import load_tokenize_output


@pytest.mark.parametrize(
    ("overrides", "sampling", "normalization"),
    [
        ([], "distinct", "global"),
        (["recipe=fixed"], "distinct", "global"),
        (["recipe=released"], "with_replacement", "micro_batch"),
        (["recipe=released", "objective.loss_normalization=global"], "with_replacement", "global"),
    ],
)
def test_a_recipe_sets_what_is_not_given(config_path, overrides, sampling, normalization):
    objective = load_config(config_path, tuple(overrides)).objective
    assert (objective.position_sampling, objective.loss_normalization) == (sampling, normalization)
    assert objective.mask_token_share == 0.85


def test_an_unknown_recipe_is_refused(config_path):
    with pytest.raises(ConfigError, match="recipe='paper'"):
        load_config(config_path, ("recipe=paper",))


def test_released_losses_are_means_of_the_micro_batches_own_means(shared_config, electra):
    run = ("run.name=recipe", "data.layout=paper", "objective.loss_normalization=micro_batch")
    electra("tokenize", shared_config, *run)
    config = load_config(shared_config, run)
    tokenized = load_tokenize_output(config)
    folders, weights = shard_folders(config, tokenized, warns=False)
    plan = make_plan(config, 1, tokenized["vocab_size"])
    source = MicroBatches(config, plan, Process(), open_rows(config, folders, weights), "cpu")
    batches = [batch for _, batch in source.of_step(0)]
    assert len({batch.num_tokens for batch in batches}) > 1  # padding differs, so the two means do too
    model = Electra(config.model, config.objective, plan.vocab_size, select_kernels("torch")).eval()
    whole = GlobalCounts(float(sum(b.num_masked for b in batches)), sum(b.num_tokens for b in batches))
    with torch.no_grad():
        own = [model(b, GlobalCounts(float(b.num_masked), b.num_tokens))[0] for b in batches]
        released = [model(b, counts)[0] for b, counts in with_counts(config, plan, batches, whole)]
        fixed = load_config(shared_config, ("data.layout=paper",))
        pooled = [model(b, counts)[0] for b, counts in with_counts(fixed, plan, batches, whole)]
    assert float(sum(released)) == pytest.approx(float(torch.stack(own).mean()), rel=1e-6)
    assert abs(float(sum(pooled)) - float(sum(released))) > 1e-4


def test_where_losses_are_means_of_micro_batches_their_size_is_part_of_the_method(config_path):
    def differs(*overrides: str) -> bool:
        sizes = (load_config(config_path, (*overrides, f"train.micro_batch_size={size}")) for size in (2, 4))
        first, second = (science_of(config, "pretrain") for config in sizes)
        return first != second

    assert not differs()
    assert differs("recipe=released")
