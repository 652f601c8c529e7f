"""Replaced token detection: labels, losses, gradients, sampling, dropout and the walls between pieces."""

import dataclasses
import math

import pytest
import torch
import torch.nn.functional as F
from scipy import stats

from model.batch import GlobalCounts, MicroBatch
from model.electra import Electra
from model.kernels.attention import Packing, reference_attention
from model.kernels.dropout import dropout_at, dropout_keys, reference_dropout
from model.kernels.vocabulary import uniform
from model.masking import Masking
from model.statistics import FIELDS

COUNTS = GlobalCounts(masked=100.0, tokens=1000.0)


def without_masked_positions(batch: MicroBatch) -> MicroBatch:
    rows = len(batch.token_ids_BT)
    masking = Masking(torch.zeros(rows, 0, dtype=torch.long), torch.zeros(rows, 0), batch.token_ids_BT)
    return dataclasses.replace(batch, masking=masking)


def gradients(model: Electra, batch: MicroBatch, counts: GlobalCounts = COUNTS) -> dict[str, torch.Tensor]:
    model.zero_grad(set_to_none=True)
    model(batch, counts)[0].backward()
    return {name: parameter.grad for name, parameter in model.named_parameters()}


def sample_by_hand(model: Electra, logits_NV: torch.Tensor, seed: int) -> torch.Tensor:
    """The first token at which the cumulated probabilities exceed a uniform number, token by token."""
    temperature = model.objective.temperature
    samples = []
    for logits, draw in zip(logits_NV.tolist(), uniform(seed, len(logits_NV), "cpu").tolist(), strict=True):
        powers = [math.exp((x - max(logits)) / temperature) for x in logits]
        rest = draw * sum(powers)
        samples.append(next(token for token in range(len(powers)) if sum(powers[: token + 1]) > rest))
    return torch.tensor(samples)


def other_seed(batch: MicroBatch) -> MicroBatch:
    return dataclasses.replace(batch, seed=batch.seed + 1)


@pytest.mark.parametrize("changes", [{}, {"sharing": "none", "temperature": 2.0, "generator_loss_weight": 0.3}])
def test_the_loss_is_the_one_computed_by_hand(build_model, build_batch, changes):
    model, batch = build_model(**changes), build_batch()
    batch.masking.weights_BM[1, 4:] = 0  # a row with fewer tokens than positions
    loss, sums, rtd_logits_BT, is_replaced_BT = model(batch, COUNTS)

    logits_BMV = model.generator_logits(batch).detach().double().view(3, 6, -1)
    sampled_BM = sample_by_hand(model, logits_BMV.flatten(0, 1), batch.seed).view(3, 6)
    nll, correct, hidden, corrupted, labels = 0.0, 0, 0, batch.token_ids_BT.clone(), torch.zeros(3, 24, dtype=bool)
    for row in range(3):
        for m in range(6):
            place, counts = int(batch.masking.positions_BM[row, m]), bool(batch.masking.weights_BM[row, m])
            original = int(batch.token_ids_BT[row, place])
            if counts:
                logits = logits_BMV[row, m].tolist()
                nll += math.log(sum(math.exp(x) for x in logits)) - logits[original]
                correct += logits.index(max(logits)) == original
                hidden += int(batch.masking.generator_ids_BT[row, place]) == 4
                corrupted[row, place] = sampled_BM[row, m]
                labels[row, place] = int(sampled_BM[row, m]) != original
    bce, right = 0.0, 0
    logits_BT = model.discriminate(corrupted, batch).detach().double()
    for row in range(3):
        for place in range(24):
            x, label = float(logits_BT[row, place]), bool(labels[row, place])
            bce += math.log1p(math.exp(-x)) if label else math.log1p(math.exp(x))
            right += (x > 0) == label

    weight = changes.get("generator_loss_weight", 1.0)
    assert loss.item() == pytest.approx(weight * nll / COUNTS.masked + 50 * bce / COUNTS.tokens, rel=1e-5)
    assert torch.equal(is_replaced_BT, labels)
    assert labels.any()
    torch.testing.assert_close(rtd_logits_BT.double(), logits_BT, rtol=1e-5, atol=1e-6)
    found = dict(zip(FIELDS, sums.tolist(), strict=True))
    assert found["generator_nll"] == pytest.approx(nll, rel=1e-5)
    assert found["discriminator_bce"] == pytest.approx(bce, rel=1e-5)
    expected = {
        "masked": 16, "generator_correct": correct, "concealed": hidden, "tokens": 72,
        "replaced": int(labels.sum()), "discriminator_correct": right, "pairs": int(labels.sum() * (~labels).sum()),
    }  # fmt: skip
    assert {name: found[name] for name in expected} == expected


def test_a_token_is_labelled_replaced_only_where_the_sample_differs(build_model, build_batch):
    model, batch = build_model(), build_batch(rows=20)
    original_BM = batch.token_ids_BT.gather(1, batch.masking.positions_BM)
    copies_BM = torch.arange(original_BM.numel()).view_as(original_BM) % 2 == 0
    sampled_BM = torch.where(copies_BM, original_BM, (original_BM + 1) % 50)
    generated = model.generate(batch)
    predictions = dataclasses.replace(generated.predictions, sampled_N=sampled_BM.flatten())
    model.generate = lambda _: dataclasses.replace(generated, predictions=predictions)
    is_replaced_BT = model(batch, COUNTS)[3]
    assert torch.equal(is_replaced_BT.gather(1, batch.masking.positions_BM), ~copies_BM)
    assert is_replaced_BT.sum() == (~copies_BM).sum()


@pytest.mark.parametrize("kernels", ["reference", "torch"])
def test_gradients_are_those_of_the_losses_as_they_are_written(build_model, build_batch, kernels):
    """Of the logits that ``generator_logits`` and ``discriminate`` give, by torch's own losses, with dropout."""
    model, batch = build_model(kernels, dropout=0.2, attention_dropout=0.2).double().train(), build_batch()
    batch.masking.weights_BM[1, 4:] = 0
    found = gradients(model, batch)
    corrupted = model.corrupt(model.generate(batch), batch)
    original_N = batch.token_ids_BT.gather(1, batch.masking.positions_BM).flatten()
    nll_N = F.cross_entropy(model.generator_logits(batch), original_N, reduction="none")
    logits_BT = model.discriminate(corrupted.token_ids_BT, batch)
    bce = F.binary_cross_entropy_with_logits(logits_BT, corrupted.is_replaced_BT.float(), reduction="sum")
    loss = (nll_N * batch.masking.weights_BM.flatten()).sum() / COUNTS.masked + 50 * bce / COUNTS.tokens
    wanted = torch.autograd.grad(loss, list(model.parameters()))
    for (name, gradient), expected in zip(found.items(), wanted, strict=True):
        torch.testing.assert_close(gradient, expected, rtol=1e-5, atol=1e-8, msg=name)


def test_the_discriminators_loss_does_not_train_the_generator(build_model, build_batch):
    found = gradients(build_model(generator_loss_weight=0.0, sharing="none"), build_batch())
    for name, gradient in found.items():
        trained = not name.startswith("generator")
        assert (gradient.abs().sum() > 0) == trained, name


def test_the_generators_loss_does_not_train_the_discriminator(build_model, build_batch):
    found = gradients(build_model(discriminator_loss_weight=0.0, sharing="none"), build_batch())
    for name, gradient in found.items():
        assert (gradient.abs().sum() > 0) == name.startswith("generator"), name


@pytest.mark.parametrize("weights", [(1.0, 0.0), (0.0, 50.0)])
def test_each_network_trains_the_shared_tables(build_model, build_batch, weights):
    model = build_model(generator_loss_weight=weights[0], discriminator_loss_weight=weights[1])
    found = gradients(model, build_batch())
    for table in ("token.weight", "position.weight", "token_type.weight", "layer_norm.weight", "layer_norm.bias"):
        assert found[f"embeddings.{table}"].abs().sum() > 0, table


@pytest.mark.parametrize(("sharing", "tables"), [("embeddings", 1), ("none", 2)])
def test_tables_are_registered_once_or_twice(build_model, sharing, tables):
    model = build_model(sharing=sharing)
    assert sum("token.weight" in name for name in model.state_dict()) == tables
    assert len(list(model.parameters())) == len(model.state_dict())


def test_losses_and_gradients_of_micro_batches_add_up_to_the_whole(build_model, build_batch, take_rows):
    # So cold that the sample is the most likely token, whatever the noise.
    model, batch = build_model(temperature=1e-5).double(), build_batch(rows=6)
    batch.masking.weights_BM[4, 2:] = 0
    counts = GlobalCounts(float(batch.num_masked), batch.num_tokens)
    assert counts == GlobalCounts(32, 6 * 24)
    whole_loss, whole_sums, _, labels = model(batch, counts)
    whole = gradients(model, batch, counts)
    parts = [take_rows(batch, rows) for rows in (slice(0, 1), slice(1, 4), slice(4, 6))]
    results = [model(part, counts) for part in parts]
    assert labels.any()
    torch.testing.assert_close(sum(result[0] for result in results), whole_loss)
    ranked = [FIELDS.index("ordered_pairs"), FIELDS.index("pairs")]
    sums = sum(result[1] for result in results)
    sums[ranked] = whole_sums[ranked]  # pairs are counted within a micro-batch
    torch.testing.assert_close(sums, whole_sums, rtol=1e-6, atol=1e-6)
    added = [gradients(model, part, counts) for part in parts]
    for name, gradient in whole.items():
        torch.testing.assert_close(sum(part[name] for part in added), gradient, rtol=1e-4, atol=1e-7, msg=name)


def test_padding_changes_neither_loss_nor_statistics(build_model, build_batch):
    model, batch = build_model(temperature=1e-5).double(), build_batch(rows=4, length=16)
    counts = GlobalCounts(float(batch.num_masked), batch.num_tokens)
    padded = dataclasses.replace(
        batch,
        token_ids_BT=F.pad(batch.token_ids_BT, (0, 8)),
        positions_BT=F.pad(batch.positions_BT, (0, 8)),
        token_types_BT=F.pad(batch.token_types_BT, (0, 8)),
        packing=Packing(F.pad(batch.packing.pieces_BT, (0, 8), value=99)),
        masking=dataclasses.replace(batch.masking, generator_ids_BT=F.pad(batch.masking.generator_ids_BT, (0, 8))),
        is_unscored_BT=F.pad(torch.zeros(4, 16, dtype=torch.bool), (0, 8), value=True),
    )
    assert padded.num_tokens == batch.num_tokens
    loss, sums, _, labels = model(batch, counts)
    padded_loss, padded_sums, _, padded_labels = model(padded, counts)
    assert labels.any()
    assert torch.equal(padded_labels[:, :16], labels)
    torch.testing.assert_close(padded_loss, loss)
    torch.testing.assert_close(padded_sums, sums, rtol=1e-6, atol=1e-6)
    without, with_padding = gradients(model, batch, counts), gradients(model, padded, counts)
    for name, gradient in without.items():
        torch.testing.assert_close(with_padding[name], gradient, rtol=1e-4, atol=1e-7, msg=name)


@pytest.mark.parametrize("sharing", ["embeddings", "none"])
def test_a_batch_of_weight_zero_reaches_every_parameter_with_gradient_zero(build_model, build_batch, sharing):
    model, batch = build_model(sharing=sharing), dataclasses.replace(build_batch(), weight=0.0)
    loss, sums, _, _ = model(batch, COUNTS)
    assert loss.item() == 0
    assert not sums.any()
    assert float(batch.num_masked) == batch.num_tokens == 0
    for name, gradient in gradients(model, batch).items():
        assert gradient is not None, name
        assert not gradient.any(), name


def test_a_batch_without_masked_positions_reaches_every_parameter(build_model, build_batch):
    model, batch = build_model(), without_masked_positions(build_batch())
    loss, sums, logits_BT, is_replaced_BT = model(batch, COUNTS)
    assert not is_replaced_BT.any()
    expected = F.softplus(logits_BT).sum() * 50 / COUNTS.tokens
    torch.testing.assert_close(loss, expected)
    assert dict(zip(FIELDS, sums.tolist(), strict=True))["masked"] == 0
    for name, gradient in gradients(model, batch).items():
        assert gradient is not None, name
        assert gradient.isfinite().all(), name


def test_positions_of_weight_zero_are_neither_scored_nor_replaced(build_model, build_batch):
    model, batch = build_model(), build_batch()
    batch.masking.weights_BM[:] = 0
    torch.testing.assert_close(
        model(batch, COUNTS)[0], model(without_masked_positions(batch), COUNTS)[0], rtol=1e-6, atol=0
    )


@pytest.mark.parametrize("kernels", ["reference", "torch"])
def test_a_token_does_not_see_the_other_pieces_of_its_row(build_model, build_batch, kernels):
    model, batch = build_model(kernels), build_batch()
    is_middle = batch.packing.pieces_BT[0] == 1
    changed_BT = torch.where(is_middle, (batch.token_ids_BT + 7) % 50, batch.token_ids_BT)
    types_BT = torch.where(is_middle, 1 - batch.token_types_BT, batch.token_types_BT)
    changed = dataclasses.replace(
        batch,
        token_types_BT=types_BT,
        masking=dataclasses.replace(batch.masking, generator_ids_BT=changed_BT),
    )
    before, after = model.discriminate(batch.token_ids_BT, batch), model.discriminate(changed_BT, changed)
    assert torch.equal(before[:, ~is_middle], after[:, ~is_middle])
    assert (before[:, is_middle] != after[:, is_middle]).all()
    original = dataclasses.replace(
        batch, masking=dataclasses.replace(batch.masking, generator_ids_BT=batch.token_ids_BT)
    )
    in_middle_N = is_middle[batch.masking.positions_BM].flatten()
    before, after = model.generator_logits(original), model.generator_logits(changed)
    assert in_middle_N.any()
    assert torch.equal(before[~in_middle_N], after[~in_middle_N])
    assert (before[in_middle_N] != after[in_middle_N]).any(1).all()


@pytest.mark.parametrize("kernels", ["reference", "torch"])
def test_a_piece_in_a_row_is_encoded_as_if_it_stood_alone(build_model, build_batch, kernels):
    model, batch = build_model(kernels), build_batch()
    together = model.encode(batch.token_ids_BT, batch)
    for piece in range(3):
        chosen = batch.packing.pieces_BT[0] == piece
        ids, types = batch.token_ids_BT[:, chosen], batch.token_types_BT[:, chosen]
        positions = torch.arange(int(chosen.sum())).expand_as(ids)
        packing = Packing(torch.zeros_like(ids))
        single = dataclasses.replace(batch, positions_BT=positions, token_types_BT=types, packing=packing)
        alone = model.encode(ids, single)
        torch.testing.assert_close(alone, together[:, chosen], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
@pytest.mark.parametrize("disallow_correct", [False, True])
def test_samples_follow_the_softmax_of_the_logits(build_model, build_batch, temperature, disallow_correct):
    model, batch = build_model(temperature=temperature, disallow_correct=disallow_correct), build_batch(2000, 24, 20)
    batch = dataclasses.replace(batch, token_ids_BT=torch.full_like(batch.token_ids_BT, 3))
    logits_V = torch.full((50,), -torch.inf)
    logits_V[:6] = torch.tensor([0.0, 1.0, -1.5, 2.0, 0.3, -0.2])
    with torch.no_grad():  # the same logits at every position
        model.embeddings.token.weight.zero_()
        model.generator_head.output_bias.copy_(logits_V)
        sampled_N = model.generate(batch).predictions.sampled_N
    probabilities_V = torch.softmax(logits_V.double() / temperature, 0)
    if disallow_correct:
        probabilities_V[3] = 0
        probabilities_V /= probabilities_V.sum()
    counts_V = torch.bincount(sampled_N, minlength=50).double()
    possible = probabilities_V > 0
    assert counts_V[~possible].sum() == 0
    p_value = stats.chisquare(counts_V[possible], probabilities_V[possible] * len(sampled_N)).pvalue
    assert 1e-4 < p_value < 1 - 1e-4


def test_samples_follow_from_the_seed_and_leave_other_random_numbers_alone(build_model, build_batch):
    model, batch = build_model(temperature=100.0, dropout=0.1, attention_dropout=0.1).eval(), build_batch(rows=30)
    state = torch.get_rng_state()
    first, again, other = (
        model.generate(each).predictions.sampled_N for each in (batch, batch, other_seed(batch))
    )  # fmt: skip
    assert torch.equal(first, again)
    assert (first != other).float().mean() > 0.5
    gradients(model.train(), batch)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("kernels", ["reference", "torch"])
def test_logits_and_losses_of_bf16_weights_are_fp32(build_model, build_batch, kernels):
    model, batch = build_model(kernels), build_batch()
    expected = model(batch, COUNTS)[0]
    nll_N = model.generate(batch).predictions.nll_N
    rounded = model.bfloat16()
    loss, sums, rtd_logits_BT, _ = rounded(batch, COUNTS)
    generated = rounded.generate(batch)
    dtypes = {x.dtype for x in (loss, rtd_logits_BT, generated.predictions.nll_N, rounded.generator_logits(batch))}
    assert dtypes == {torch.float32}
    assert generated.hidden_NG.dtype == torch.bfloat16
    assert sums.dtype == torch.float64
    assert (generated.predictions.nll_N != generated.predictions.nll_N.bfloat16()).any()
    torch.testing.assert_close(generated.predictions.nll_N, nll_N, rtol=0.05, atol=0.1)
    torch.testing.assert_close(loss, expected, rtol=0.1, atol=0)


@pytest.mark.parametrize("changes", [{"dropout": 0.1}, {"attention_dropout": 0.1}])
@pytest.mark.parametrize("kernels", ["reference", "torch"])
def test_dropout_is_on_in_training_in_both_networks_and_off_in_evaluation(build_model, build_batch, kernels, changes):
    """The generator samples in the pass that trains it, with dropout, as released."""
    model, batch = build_model(kernels, **changes), build_batch()
    for network in (
        lambda batch: model.generate(batch).hidden_NG,
        lambda batch: model.discriminate(batch.token_ids_BT, batch),
    ):
        model.train()
        first = network(batch)
        torch.manual_seed(0)  # the micro-batch's seed says all
        assert torch.equal(network(batch), first)
        assert not torch.equal(network(other_seed(batch)), first)
        model.eval()
        assert torch.equal(network(batch), network(other_seed(batch)))
        assert not torch.equal(network(batch), first)


def test_weights_start_as_released(build_model):
    model = build_model(initializer_range=0.02, embedding_size=64, hidden_size=128, feed_forward_size=512)
    glorot = {"generator.embeddings_project": 0, "discriminator.embeddings_project": 0, "discriminator_head.output": 0}
    glorot |= {n: None for n, m in model.named_modules() if isinstance(m, torch.nn.LayerNorm)}
    assert "discriminator.embeddings_project.weight" in model.state_dict()
    for name, weight in model.state_dict().items():
        owner = name.rpartition(".")[0]
        if name.endswith("bias"):
            assert not weight.any(), name
        elif "layer_norm" in name:
            assert (weight == 1).all(), name
        elif owner in glorot:
            limit = (6 / sum(weight.shape)) ** 0.5
            assert 0.9 * limit < weight.abs().max() <= limit, name
        else:
            assert weight.abs().max() <= 0.04, name
            # A normal distribution cut off at two deviations has 0.8796 of its deviation.
            tolerance = 4 / (2 * weight.numel()) ** 0.5
            assert abs(float(weight.std()) / (0.8796 * 0.02) - 1) < tolerance, name


def test_projections_can_start_like_all_other_layers(build_model):
    model = build_model(glorot_projections=False, embedding_size=64, hidden_size=128, initializer_range=0.02)
    for name in ("discriminator.embeddings_project", "discriminator_head.output"):
        assert model.get_submodule(name).weight.abs().max() <= 0.04, name


@pytest.mark.parametrize("kernels", ["reference", "torch"])
@pytest.mark.parametrize("network", ["generator", "discriminator"])
def test_dropout_stands_where_the_released_code_has_it(build_model, build_batch, network, kernels):
    """On the normalised embeddings, the probabilities of attention, and the outputs of attention and feed-forward,
    each before the residual sum; each with a key of its own."""
    model, batch = build_model(kernels, dropout=0.3, attention_dropout=0.2, sharing="none"), build_batch()
    encoder = model.get_submodule(network)
    embeddings = model.embeddings if network == "discriminator" else model.generator_embeddings
    keys_S = iter(dropout_keys(batch.seed, int(network == "discriminator"), 1 + 3 * len(encoder.layers), "cpu"))

    def drop(x: torch.Tensor) -> torch.Tensor:
        return reference_dropout(x, dropout_at(next(keys_S)[None], 0, 0.3))

    ids_BT = batch.masking.generator_ids_BT
    hidden = drop(embeddings(ids_BT, batch.positions_BT, batch.token_types_BT))
    if encoder.embeddings_project is not None:
        hidden = encoder.embeddings_project(hidden)
    for layer in encoder.layers:
        qkv = layer.attention.query_key_value(hidden).unflatten(-1, (3, layer.attention.heads, -1))
        context = reference_attention(qkv, batch.packing, dropout_at(next(keys_S)[None], 0, 0.2))
        hidden = layer.attention_layer_norm(hidden + drop(layer.attention.output(context.flatten(2))))
        inner = F.gelu(layer.feed_forward_in(hidden))
        hidden = layer.feed_forward_layer_norm(hidden + drop(layer.feed_forward_out(inner)))
    assert next(keys_S, None) is None
    model.train()
    if network == "discriminator":
        found = model.encode(ids_BT, batch)
    else:
        found = model.generator_hidden(batch)
        hidden = hidden[torch.arange(3)[:, None], batch.masking.positions_BM].flatten(0, 1)
    torch.testing.assert_close(found, hidden)
