"""Sums: the area under the curve agrees with scikit-learn, and micro-batches add up."""

import pytest
import torch
from sklearn.metrics import log_loss, precision_score, recall_score, roc_auc_score

from model.kernels.detection import COUNTS, reference_detect
from model.statistics import FIELDS, Statistics, count_ordered_pairs, generator_sums, pair_sums


@pytest.mark.parametrize("levels", [1, 2, 5, 10_000])
@pytest.mark.parametrize("share", [0.02, 0.5, 0.9])
def test_ordered_pairs_give_the_area_under_the_curve_with_ties(levels, share):
    draw = torch.Generator().manual_seed(levels)
    positive = torch.rand(800, generator=draw) < share
    noise = torch.rand(800, generator=draw)
    scores = ((noise + 0.3 * positive) * levels).floor() - levels / 2
    ordered, pairs = count_ordered_pairs(scores, positive, ~positive)
    assert pairs == positive.sum() * (~positive).sum()
    assert float(ordered / pairs) == pytest.approx(roc_auc_score(positive, scores), abs=1e-12)


@pytest.mark.parametrize("positive", [torch.ones(5, dtype=torch.bool), torch.zeros(5, dtype=torch.bool)])
def test_one_class_alone_has_no_pairs(positive):
    assert [float(x) for x in count_ordered_pairs(torch.arange(5.0), positive, ~positive)] == [0.0, 0.0]


def test_what_is_neither_positive_nor_negative_is_in_no_pair():
    scores, positive = torch.tensor([3.0, 9.0, 1.0, 2.0, -5.0]), torch.tensor([True, False, False, True, False])
    negative = torch.tensor([False, False, True, False, False])  # 9 and -5 are padding
    assert [float(x) for x in count_ordered_pairs(scores, positive, negative)] == [2.0, 2.0]


def test_pairs_are_counted_exactly_beyond_the_range_of_float32():
    scores = torch.arange(20_000.0)
    positive = torch.arange(20_000) >= 10_000
    assert [float(x) for x in count_ordered_pairs(scores, positive, ~positive)] == [1e8, 1e8]


def detection_sums(arrays: dict[str, torch.Tensor], scored_BT: torch.Tensor) -> dict[str, torch.Tensor]:
    logits_BT, labels_BT = arrays["logits_BT"], arrays["is_replaced_BT"]
    sums_6 = reference_detect(logits_BT, labels_BT, scored_BT).sums
    return dict(zip(COUNTS, sums_6, strict=True)) | pair_sums(logits_BT, labels_BT, scored_BT)


def collect(seed: int, weight: float = 1.0) -> tuple[Statistics, dict[str, torch.Tensor]]:
    draw = torch.Generator().manual_seed(seed)
    arrays = {
        "nll_N": torch.rand(12, generator=draw),
        "is_correct_N": torch.rand(12, generator=draw) < 0.4,
        "weights_N": (torch.arange(12) < 10).float() * weight,
        "is_concealed_N": (torch.rand(12, generator=draw) < 0.85).float(),
        "logits_BT": torch.randn(3, 20, generator=draw),
        "is_replaced_BT": torch.rand(3, 20, generator=draw) < 0.3,
    }
    scored_BT = torch.full((3, 20), weight)
    sums = generator_sums(**{name: value for name, value in arrays.items() if not name.endswith("BT")})
    sums |= detection_sums(arrays, scored_BT)
    sums |= {"tokens": scored_BT.sum(), "replaced": (scored_BT * arrays["is_replaced_BT"]).sum()}
    return Statistics.of("cpu", sums), arrays


def test_metrics_are_what_their_names_say():
    statistics, arrays = collect(1)
    metrics = statistics.metrics(1.0, 50.0)
    counted = slice(0, 10)
    nll, hidden = arrays["nll_N"][counted], arrays["is_concealed_N"][counted].bool()
    labels, scores = arrays["is_replaced_BT"].flatten(), arrays["logits_BT"].flatten()
    guesses = scores > 0
    bce = log_loss(labels, scores.double().sigmoid())
    expected = {
        "train/generator_mlm_loss": nll.mean(),
        "train/mask_token_loss": nll[hidden].mean(),
        "train/discriminator_rtd_loss": bce,
        "train/total_loss": nll.mean() + 50 * bce,
        "train/generator_accuracy": arrays["is_correct_N"][counted].float().mean(),
        "train/discriminator_accuracy": (guesses == labels).float().mean(),
        "train/discriminator_auc": roc_auc_score(labels, scores),
        "train/discriminator_precision": precision_score(labels, guesses),
        "train/discriminator_recall": recall_score(labels, guesses),
        "train/replaced_fraction": labels.float().mean(),
    }
    assert metrics == pytest.approx({name: float(value) for name, value in expected.items()}, rel=1e-6)


def test_sums_of_micro_batches_add_up():
    (first, a), (second, b) = collect(1), collect(2)
    total = Statistics.zeros() + first + second
    assert torch.equal(total.sums, first.sums + second.sums)
    metrics = total.metrics(1.0, 1.0)
    labels, scores = (torch.cat([x[name].flatten() for x in (a, b)]) for name in ("is_replaced_BT", "logits_BT"))
    assert metrics["train/discriminator_rtd_loss"] == pytest.approx(
        log_loss(labels, scores.double().sigmoid()), rel=1e-6
    )


def test_weight_zero_counts_nothing_and_nothing_counted_has_no_ratio():
    assert not collect(1, weight=0.0)[0].sums.any()
    assert Statistics.zeros().metrics(1.0, 50.0) == {}


def test_there_is_one_sum_for_each_field():
    assert collect(1)[0].sums.shape == (len(FIELDS),)
    assert collect(1)[0].sums.dtype == torch.float64


def test_recall_is_over_the_tokens_that_are_scored():
    _, arrays = collect(1)
    scored_BT = (torch.arange(60).view(3, 20) % 3 > 0).float()
    every = {"tokens": torch.tensor(60.0), "replaced": arrays["is_replaced_BT"].sum()}
    metrics = Statistics.of("cpu", detection_sums(arrays, scored_BT) | every).metrics(1.0, 1.0)
    counted = scored_BT.bool()
    labels, guesses = arrays["is_replaced_BT"][counted], arrays["logits_BT"][counted] > 0
    assert metrics["train/discriminator_recall"] == pytest.approx(recall_score(labels, guesses))
    assert metrics["train/replaced_fraction"] == pytest.approx(float(arrays["is_replaced_BT"].float().mean()))
