"""The objectives that the paper compares, each against its formula worked token by token."""

import dataclasses
import math

import pytest
import torch
import torch.nn.functional as F

from model.batch import GlobalCounts, MicroBatch
from model.electra import Electra, replace
from model.losses import copy_mixture_nll, policy_gradient
from model.masking import Masking, MaskingRule, select_and_mask
from model.statistics import FIELDS, Statistics

COUNTS = GlobalCounts(masked=100.0, tokens=1000.0)
GENERATOR_PARTS = ("generator", "baseline")


def gradients(model: Electra, loss: torch.Tensor) -> dict[str, torch.Tensor]:
    model.zero_grad(set_to_none=True)
    loss.backward()
    return {name: parameter.grad for name, parameter in model.named_parameters()}


def sums_of(model: Electra, batch: MicroBatch, **arguments) -> dict[str, float]:
    return dict(zip(FIELDS, model(batch, COUNTS, **arguments)[1].tolist(), strict=True))


def corrupt(model: Electra, batch: MicroBatch) -> torch.Tensor:
    return replace(batch.token_ids_BT, batch.masking, model.generate(batch).predictions.sampled_N)


def originals(batch: MicroBatch) -> torch.Tensor:
    return batch.token_ids_BT.gather(1, batch.masking.positions_BM)


@pytest.fixture
def batch(build_batch) -> MicroBatch:
    """Some selected positions do not count."""
    batch = build_batch()
    batch.masking.weights_BM[1, 3:] = 0
    return batch


def generators_loss(model: Electra, batch: MicroBatch) -> float:
    nll_N = F.cross_entropy(model.generator_logits(batch), originals(batch).flatten(), reduction="none")
    return float((nll_N * batch.masking.weights_BM.flatten()).sum() / COUNTS.masked)


def test_electra_15_scores_the_selected_positions_alone(build_model, batch):
    model = build_model(name="electra_15")
    loss, _, logits_BT, is_replaced_BT = model(batch, COUNTS)
    expected = 0.0
    for row, positions in enumerate(batch.masking.positions_BM.tolist()):
        for position, weight in zip(positions, batch.masking.weights_BM[row].tolist(), strict=True):
            x = float(logits_BT[row, position])
            expected += weight * math.log1p(math.exp(-x if is_replaced_BT[row, position] else x))
    assert loss.item() == pytest.approx(generators_loss(model, batch) + 50 * expected / COUNTS.masked, rel=1e-5)
    assert sums_of(model, batch)["detected"] == 15


def predict(model: Electra, read_BT: torch.Tensor, batch: MicroBatch) -> torch.Tensor:
    """Log-probabilities of the main network at every position, ``(B, T, V)``."""
    hidden_NH = model.encode(read_BT, batch).flatten(0, 1)
    logits_NV = model.prediction_head.logits(hidden_NH, model.embeddings.token_table())
    return logits_NV.log_softmax(-1).view(*read_BT.shape, -1)


def test_replace_mlm_predicts_the_originals_at_the_selected_positions_from_samples(build_model, batch):
    model = build_model(name="replace_mlm", prediction_loss_weight=2.0)
    log_probabilities_BTV = predict(model, corrupt(model, batch), batch)
    expected = 0.0
    for row, positions in enumerate(batch.masking.positions_BM.tolist()):
        for position, weight in zip(positions, batch.masking.weights_BM[row].tolist(), strict=True):
            original = int(batch.token_ids_BT[row, position])
            expected -= weight * float(log_probabilities_BTV[row, position, original])
    loss, _, logits_BT, labels_BT = model(batch, COUNTS)
    assert float(loss) == pytest.approx(generators_loss(model, batch) + 2 * expected / COUNTS.masked, rel=1e-5)
    assert logits_BT is None
    assert labels_BT is None


def test_all_tokens_mlm_predicts_every_original_and_may_copy(build_model, batch):
    model = build_model(name="all_tokens_mlm")
    corrupted_BT = corrupt(model, batch)
    probabilities_BTV = predict(model, corrupted_BT, batch).exp()
    copy_BT = model.copy_gate(model.encode(corrupted_BT, batch)).sigmoid()
    expected, right = 0.0, 0
    for row in range(3):
        for t in range(24):
            mixture = (1 - copy_BT[row, t]) * probabilities_BTV[row, t]
            mixture[corrupted_BT[row, t]] += copy_BT[row, t]
            expected -= math.log(float(mixture[batch.token_ids_BT[row, t]]))
            right += int(mixture.argmax() == batch.token_ids_BT[row, t])
    loss = model(batch, COUNTS)[0]
    assert float(loss) == pytest.approx(generators_loss(model, batch) + expected / COUNTS.tokens, rel=1e-5)
    sums = sums_of(model, batch)
    assert (sums["predicted"], sums["prediction_correct"]) == (72, right)


def test_mlm_predicts_the_originals_from_the_masked_rows_with_one_network(build_model, batch):
    model = build_model(name="mlm")
    assert not [name for name, _ in model.named_parameters() if name.startswith(GENERATOR_PARTS)]
    log_probabilities_BTV = predict(model, batch.masking.generator_ids_BT, batch)
    nll_BT = -log_probabilities_BTV.gather(2, batch.token_ids_BT[..., None]).squeeze(2)
    nll_BM = nll_BT.gather(1, batch.masking.positions_BM) * batch.masking.weights_BM
    assert float(model(batch, COUNTS)[0]) == pytest.approx(float(nll_BM.sum()) / COUNTS.masked, rel=1e-5)
    shows_mask_BM = batch.masking.generator_ids_BT.gather(1, batch.masking.positions_BM) == 4
    sums = sums_of(model, batch)
    assert sums["concealed_nll"] == pytest.approx(float((nll_BM * shows_mask_BM).sum()), rel=1e-5)
    assert sums["masked"] == sums["detected"] == 0


def test_the_copy_mixture_is_a_distribution():
    draw = torch.Generator().manual_seed(0)
    logits_NV = torch.randn(1, 7, generator=draw).expand(7, -1).double()
    gate_N, input_N = torch.full((7,), 0.4).double(), torch.full((7,), 2)
    nll_N, _ = copy_mixture_nll(logits_NV, gate_N, input_N, torch.arange(7))
    assert float((-nll_N).exp().sum()) == pytest.approx(1.0, abs=1e-12)
    certain, _ = copy_mixture_nll(logits_NV, torch.full((7,), 800.0).double(), input_N, input_N)
    assert certain.abs().max() < 1e-12  # no overflow where the gate is sure


def test_the_policy_gradient_is_that_of_the_expected_reward():
    """Summed over all samples with their probabilities, whatever the baseline."""
    logits_V = torch.randn(6, generator=torch.Generator().manual_seed(1)).double().requires_grad_()
    reward_V = torch.tensor([0.1, 2.0, 0.7, 0.3, 1.1, 0.05]).double()
    for baseline_logit in (-3.0, 0.0, 2.0):
        log_probability_V = logits_V.log_softmax(0)
        policy_V, _ = policy_gradient(log_probability_V, reward_V, torch.full((6,), baseline_logit).double())
        expected_loss = (log_probability_V.detach().exp() * policy_V).sum()
        (found,) = torch.autograd.grad(expected_loss, logits_V)
        (wanted,) = torch.autograd.grad(-(logits_V.softmax(0) * reward_V).sum(), logits_V)
        torch.testing.assert_close(found, wanted)


def test_the_baseline_learns_the_reward():
    logit = torch.zeros(1).double().requires_grad_()
    reward = torch.tensor([0.35]).double()
    optimizer = torch.optim.SGD([logit], lr=4.0)
    for _ in range(300):
        optimizer.zero_grad()
        policy_gradient(torch.zeros(1), reward, logit)[1].sum().backward()
        optimizer.step()
    assert float(-F.logsigmoid(logit)) == pytest.approx(0.35, abs=1e-4)


def test_adversarial_training_rewards_the_generator_with_the_discriminators_loss(build_model, batch):
    model = build_model(training="adversarial", sharing="none", discriminator_loss_weight=50.0)
    generated = model.generate(batch)
    sampled_N = generated.predictions.sampled_N
    corrupted_BT = replace(batch.token_ids_BT, batch.masking, sampled_N)
    logits_BT = model.discriminate(corrupted_BT, batch).detach()
    bce_BT = F.binary_cross_entropy_with_logits(
        logits_BT, (corrupted_BT != batch.token_ids_BT).float(), reduction="none"
    )
    reward_N = bce_BT.gather(1, batch.masking.positions_BM).flatten()
    log_p_N = model.generator_logits(batch).log_softmax(-1).gather(1, sampled_N[:, None]).squeeze(1)
    baseline_N = -F.logsigmoid(model.baseline(generated.hidden_NG)).detach()
    policy = -((reward_N - baseline_N) * log_p_N * generated.weights_N).sum() / COUNTS.masked
    wanted = gradients(model, policy)
    found = gradients(model, model(batch, COUNTS)[0])
    for name, gradient in wanted.items():
        if name.startswith("generator"):
            torch.testing.assert_close(found[name], gradient, rtol=1e-4, atol=1e-8, msg=name)
    assert found["baseline.weight"].abs().sum() > 0
    joint = build_model(sharing="none")
    joint.load_state_dict({name: value for name, value in model.state_dict().items() if "baseline" not in name})
    for name, gradient in gradients(joint, joint(batch, COUNTS)[0]).items():
        if name.startswith(("discriminator", "embeddings")):  # the discriminator learns as ever
            torch.testing.assert_close(found[name], gradient, msg=name)
    sums = sums_of(model, batch)
    assert sums["reward"] == pytest.approx(float((reward_N * generated.weights_N).sum()), rel=1e-5)


@pytest.mark.parametrize("sharing", ["none", "gdes"])
@pytest.mark.parametrize("name", ["electra", "replace_mlm", "all_tokens_mlm"])
def test_in_two_stages_the_resting_network_has_gradients_of_zero(build_model, batch, name, sharing):
    model = build_model(name=name, training="two_stage", sharing=sharing, generator_width=1.0)
    both = gradients(model, model(batch, COUNTS)[0])
    for trains in ("generator", "discriminator"):
        found = gradients(model, model(batch, COUNTS, trains)[0])
        for parameter, gradient in found.items():
            learns = parameter.startswith("generator") == (trains == "generator")
            torch.testing.assert_close(
                gradient, both[parameter] if learns else torch.zeros_like(gradient), msg=f"{trains}: {parameter}"
            )
    assert sums_of(model, batch, trains="generator")["tokens"] == 0
    assert sums_of(model, batch, trains="discriminator") == pytest.approx(sums_of(model, batch) | {"resting": 15})


def test_gradient_disentangled_tables_start_as_the_generators_and_part_from_them(build_model, batch):
    model = build_model(sharing="gdes")
    generators, own = model.generator_embeddings, model.embeddings
    assert not own.token_difference.weight.any()
    assert not own.position_difference.weight.any()
    assert torch.equal(own.token_table(), generators.token.weight)
    own.token_type.load_state_dict(generators.token_type.state_dict())
    arguments = (batch.token_ids_BT, batch.positions_BT, batch.token_types_BT)
    torch.testing.assert_close(own(*arguments), generators(*arguments))
    model.objective = model.objective.model_copy(update={"generator_loss_weight": 0.0})
    found = gradients(model, model(batch, COUNTS)[0])
    for name, gradient in found.items():  # the discriminator's loss moves the differences, never the common tables
        assert (gradient.abs().sum() > 0) == (not name.startswith("generator")), name
    with torch.no_grad():
        own.token_difference.weight.normal_()
    torch.testing.assert_close(own.token_table(), generators.token.weight + own.token_difference.weight)


def test_with_everything_shared_there_is_one_encoder(build_model, batch):
    model = build_model(sharing="all", generator_width=1.0)
    assert {name.split(".")[0] for name, _ in model.named_parameters()} == {
        "embeddings", "generator_head", "discriminator", "discriminator_head",
    }  # fmt: skip
    for weights in ((1.0, 0.0), (0.0, 50.0)):
        model.objective = model.objective.model_copy(
            update={"generator_loss_weight": weights[0], "discriminator_loss_weight": weights[1]}
        )
        found = gradients(model, model(batch, COUNTS)[0])
        assert found["discriminator.layers.0.feed_forward_in.weight"].abs().sum() > 0


def test_token_and_position_tables_alone_can_be_shared(build_model, batch):
    model = build_model(shared_tables="token_and_position")
    own = {name for name, _ in model.named_parameters() if name.startswith("generator_embeddings.")}
    assert {name.removeprefix("generator_embeddings.") for name in own} == {
        "token_type.weight", "layer_norm.weight", "layer_norm.bias",
    }  # fmt: skip
    found = gradients(model, model(batch, COUNTS)[0])
    assert all(found[name].abs().sum() > 0 for name in own | {"embeddings.token.weight", "embeddings.position.weight"})


def test_own_tables_are_as_wide_as_the_generator_unless_the_config_says_otherwise(build_model):
    def width(**changes) -> int:
        return build_model(sharing="none", **changes).generator_embeddings.token.embedding_dim

    assert width() == 8
    assert build_model(sharing="none").generator.embeddings_project is None
    assert width(generator_embedding_size=20) == 20
    assert width(training="two_stage", generator_width=1.0) == 12
    assert build_model().generator_embeddings is None


def test_samples_that_meet_at_a_position_are_averaged_as_ids():
    ids = torch.arange(10, 20)[None]
    positions, weights = torch.tensor([[3, 5, 3, 7, 7, 7]]), torch.tensor([[1.0, 1, 1, 1, 0, 1]])
    found = replace(ids, Masking(positions, weights, ids), torch.tensor([40, 41, 43, 5, 999, 8]))
    assert found.tolist() == [[10, 11, 12, 41, 14, 41, 16, 6, 18, 19]]  # (40 + 43) // 2; (5 + 8) // 2


def test_both_copies_of_a_position_count_in_the_generators_loss(build_model, build_batch):
    batch = build_batch()
    keys = torch.arange(3)
    rule = MaskingRule(24, 1.0, 4, (0, 2, 3, 4), with_replacement=True)
    masking = select_and_mask(batch.token_ids_BT, keys, rule)
    assert (masking.positions_BM.sort().values.diff() == 0).any()
    model, batch = build_model(), dataclasses.replace(batch, masking=masking)
    assert sums_of(model, batch)["masked"] == 72
    nll_N = F.cross_entropy(model.generator_logits(batch), originals(batch).flatten())
    assert sums_of(model, batch)["generator_nll"] == pytest.approx(72 * float(nll_N), rel=1e-5)


def test_every_selected_position_can_be_labelled_replaced(build_model, batch):
    model = build_model(label_rule="selected")
    labels_BT = model(batch, COUNTS)[3]
    expected_BT = torch.zeros_like(labels_BT)
    for row, positions in enumerate(batch.masking.positions_BM.tolist()):
        for position, weight in zip(positions, batch.masking.weights_BM[row].tolist(), strict=True):
            expected_BT[row, position] |= weight > 0
    assert torch.equal(labels_BT, expected_BT)
    assert sums_of(model, batch)["replaced"] <= expected_BT.sum()


@pytest.mark.parametrize("name", ["electra", "replace_mlm"])
def test_a_control_draws_from_its_distribution_without_weights(build_model, build_batch, name):
    model = build_model(name=name, generator="unigram")
    assert not [parameter for parameter, _ in model.named_parameters() if parameter.startswith(GENERATOR_PARTS)]
    with pytest.raises(AssertionError, match="set_control"):
        model.generate(build_batch())
    shares_V = torch.arange(50.0)
    shares_V[:5] = 0
    model.set_control((shares_V / shares_V.sum()).log())
    assert model.bfloat16().generate(build_batch()).predictions.nll_N.dtype == torch.float32
    model.float()
    batch = build_batch(rows=200)
    predictions = model.generate(batch).predictions
    sampled_N, original_N = predictions.sampled_N, originals(batch).flatten()
    torch.testing.assert_close(predictions.nll_N, -(shares_V / shares_V.sum())[original_N].log())
    assert torch.equal(predictions.is_correct_N, original_N == 49)
    assert sampled_N.min() >= 5
    mean = float((shares_V * torch.arange(50.0)).sum() / shares_V.sum())
    assert abs(sampled_N.double().mean() - mean) < 5 * float(sampled_N.double().std()) / len(sampled_N) ** 0.5


def test_the_generators_dropout_can_be_its_own(build_model, batch):
    model = build_model(dropout=0.3, attention_dropout=0.3, generator_dropout=0.0).train()
    other = dataclasses.replace(batch, seed=batch.seed + 1)
    assert torch.equal(model.generator_logits(batch), model.generator_logits(other))
    assert not torch.equal(model.encode(batch.token_ids_BT, batch), model.encode(batch.token_ids_BT, other))


def test_a_batch_of_weight_zero_moves_nothing_under_any_objective(build_model, batch):
    for changes in ({"name": "electra_15"}, {"name": "replace_mlm"}, {"name": "all_tokens_mlm"}, {"name": "mlm"},
                    {"training": "adversarial"}, {"sharing": "gdes"}):  # fmt: skip
        model = build_model(**changes)
        loss, sums, _, _ = model(dataclasses.replace(batch, weight=0.0), COUNTS)
        assert not sums.any()
        for name, gradient in gradients(model, loss).items():
            assert gradient is not None, name
            assert not gradient.any(), name


def policy_by_hand(model: Electra, batch: MicroBatch, logits_NV: torch.Tensor) -> torch.Tensor:
    generated = model.generate(batch)
    corrupted, sampled_N = model.corrupt(generated, batch), generated.predictions.sampled_N
    bce_BT = model.discriminator_loss(corrupted, batch, COUNTS).bce_BT
    reward_N = bce_BT.gather(1, batch.masking.positions_BM).flatten()
    baseline_N = -F.logsigmoid(model.baseline(generated.hidden_NG)).detach()
    log_p_N = logits_NV.log_softmax(-1).gather(1, sampled_N[:, None]).squeeze(1)
    return -((reward_N - baseline_N) * log_p_N * generated.weights_N).sum() / COUNTS.masked


@pytest.mark.parametrize("changes", [{"temperature": 2.0}, {"disallow_correct": True}])
def test_the_policy_is_the_distribution_that_is_sampled(build_model, batch, changes):
    model = build_model(training="adversarial", sharing="none", discriminator_loss_weight=0.0, **changes)
    logits_NV = model.generator_logits(batch) / changes.get("temperature", 1.0)
    if "disallow_correct" in changes:
        logits_NV = logits_NV.scatter(1, originals(batch).view(-1, 1), -torch.inf)
    wanted = gradients(model, policy_by_hand(model, batch, logits_NV))
    found = gradients(model, model(batch, COUNTS)[0])
    for name in (name for name in wanted if name.startswith("generator")):
        torch.testing.assert_close(found[name], wanted[name], rtol=1e-4, atol=1e-8, msg=name)


def test_the_policy_loss_does_not_train_the_baseline():
    logit_N = torch.zeros(3, requires_grad=True)
    policy_N, _ = policy_gradient(torch.zeros(3, requires_grad=True), torch.ones(3), logit_N)
    assert torch.autograd.grad(policy_N.sum(), logit_N, allow_unused=True) == (None,)


def with_replacement(batch: MicroBatch) -> MicroBatch:
    rule = MaskingRule(24, 1.0, 4, (0, 2, 3, 4), with_replacement=True)
    return dataclasses.replace(batch, masking=select_and_mask(batch.token_ids_BT, torch.arange(3), rule))


def test_samples_that_were_averaged_have_no_reward(build_model, build_batch):
    model, batch = build_model(training="adversarial"), with_replacement(build_batch())
    generated = model.generate(batch)
    read_BT = model.corrupt(generated, batch).token_ids_BT
    stands_N = read_BT.gather(1, batch.masking.positions_BM).flatten() == generated.predictions.sampled_N
    assert 0 < stands_N.sum() < 72
    assert sums_of(model, batch)["rewarded"] == stands_N.sum()


def test_electra_15_counts_a_position_as_often_as_it_is_drawn(build_model, build_batch):
    model, batch = build_model(name="electra_15", generator_loss_weight=0.0), with_replacement(build_batch())
    loss, _, logits_BT, labels_BT = model(batch, COUNTS)
    bce_BT = F.binary_cross_entropy_with_logits(logits_BT, labels_BT.float(), reduction="none")
    torch.testing.assert_close(loss, 50 * bce_BT.gather(1, batch.masking.positions_BM).sum() / COUNTS.masked)
    assert sums_of(model, batch)["detected"] == 72


def test_borrowed_tables_give_what_the_lender_gives(build_model, batch):
    model = build_model(shared_tables="token_and_position")
    own = model.generator_embeddings
    own.token_type.load_state_dict(model.embeddings.token_type.state_dict())
    arguments = (batch.token_ids_BT, batch.positions_BT, batch.token_types_BT)
    assert torch.equal(own(*arguments), model.embeddings(*arguments))
    assert own.token_table() is model.embeddings.token.weight


@pytest.mark.parametrize("name", ["electra", "replace_mlm"])
def test_a_control_scores_rows_with_fewer_tokens_than_positions(build_model, build_batch, name):
    model, batch = build_model(name=name, generator="unigram"), build_batch()
    shares_V = torch.ones(50)
    shares_V[[0, 2, 3, 4]] = 0
    model.set_control((shares_V / shares_V.sum()).log())
    ids_BT = batch.token_ids_BT.clone()
    ids_BT[0, 3:] = 0
    masking = select_and_mask(ids_BT, torch.arange(3), MaskingRule(6, 0.85, 4, (0, 2, 3, 4)))
    batch = dataclasses.replace(batch, token_ids_BT=ids_BT, masking=masking, is_unscored_BT=ids_BT == 0)
    loss, sums, _, _ = model(batch, COUNTS)
    assert sums.isfinite().all()
    assert all(gradient.isfinite().all() for gradient in gradients(model, loss).values())


@pytest.mark.parametrize(
    ("changes", "trains"),
    [
        ({}, "both"),
        ({"name": "electra_15"}, "both"),
        ({"name": "replace_mlm", "prediction_loss_weight": 3.0}, "both"),
        ({"name": "mlm", "prediction_loss_weight": 3.0}, "both"),
        ({"name": "all_tokens_mlm"}, "both"),
        ({"training": "adversarial"}, "both"),
        ({"training": "two_stage", "generator_width": 1.0}, "generator"),
        ({"training": "two_stage", "generator_width": 1.0}, "discriminator"),
        ({"generator": "uniform"}, "both"),
        ({"generator": "uniform", "name": "replace_mlm"}, "both"),
    ],
)
def test_the_total_loss_that_is_logged_is_the_one_that_is_trained(build_model, batch, changes, trains):
    model = build_model(generator_loss_weight=0.3, **changes)
    model.set_control(torch.zeros(50).log_softmax(0))
    objective, counts = model.objective, GlobalCounts(float(batch.num_masked), batch.num_tokens)
    loss, sums, _, _ = model(batch, counts, trains)
    metrics = Statistics(sums).metrics(
        objective.generator_loss_weight, objective.discriminator_loss_weight, objective.prediction_loss_weight
    )
    assert metrics["train/total_loss"] == pytest.approx(float(loss), rel=1e-5)


def test_the_total_loss_of_an_adversarial_generator_where_samples_meet(build_model, batch):
    model = build_model(training="adversarial", generator_loss_weight=0.3)
    masking = select_and_mask(batch.token_ids_BT, torch.arange(3), MaskingRule(20, 0.85, 4, (0, 2, 3, 4), True))
    batch = dataclasses.replace(batch, masking=masking)
    loss, sums, _, _ = model(batch, GlobalCounts(float(batch.num_masked), batch.num_tokens))
    found = dict(zip(FIELDS, sums.tolist(), strict=True))
    assert 0 < found["rewarded"] < found["masked"]
    assert Statistics(sums).metrics(0.3, 50.0)["train/total_loss"] == pytest.approx(float(loss), rel=1e-5)


def test_what_a_control_says_is_scored_and_not_trained_on(build_model, batch):
    model = build_model(generator="uniform")
    model.set_control(torch.zeros(50).log_softmax(0))
    metrics = Statistics(model(batch, COUNTS)[1]).metrics(1.0, 50.0)
    assert metrics["train/generator_mlm_loss"] == pytest.approx(math.log(50))
    assert metrics["train/total_loss"] == pytest.approx(50 * metrics["train/discriminator_rtd_loss"])


def test_a_lucky_sample_is_no_replacement_even_where_it_is_labelled_as_one(build_model, build_batch):
    sums = sums_of(build_model(label_rule="selected", temperature=1e4), build_batch(rows=200))
    assert sums["replaced"] < sums["detected_replaced"] == 200 * 6


def test_logits_are_handed_on_in_fp32_in_half_precision(build_model):
    model = build_model(name="all_tokens_mlm").bfloat16()
    assert model.copy_gate(torch.zeros(1, 2, 16).bfloat16()).dtype == torch.float32
    assert build_model(training="adversarial").bfloat16().baseline(torch.zeros(3, 8).bfloat16()).dtype == torch.float32
