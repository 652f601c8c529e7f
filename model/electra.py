"""ELECTRA: a generator that fills in masked tokens, a discriminator that tells which were replaced.

Clark, Luong, Le and Manning, "ELECTRA: Pre-training Text Encoders as
Discriminators Rather Than Generators", ICLR 2020. The objectives that the paper
compares it with are here too: the discriminator then predicts original tokens.

Shapes: B rows, T tokens of a row, M selected positions of a row, N = B·M,
E embedding size, G generator's hidden size, H discriminator's, V vocabulary.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from model.batch import GlobalCounts, MicroBatch
from model.config import ModelConfig
from model.embeddings import DisentangledEmbeddings, build_embeddings
from model.encoder import Encoder, initialize
from model.heads import DiscriminatorHead, MaskedLanguageModelHead, TokenGate
from model.kernels.detection import COUNTS
from model.kernels.dropout import dropout_at, dropout_keys
from model.kernels.select import Kernels
from model.kernels.vocabulary import Predictions, Sampling, uniform
from model.losses import copy_mixture_nll, policy_gradient, predict_by_control
from model.masking import Masking
from model.objective import ObjectiveConfig, Trains, generator_embedding_size
from model.statistics import Statistics, generator_sums, pair_sums

_GENERATOR, _DISCRIMINATOR = 0, 1  # streams of dropout's keys
_LOGITS_AT_ONCE = 4096  # positions


@dataclass(frozen=True)
class Generated:
    """What the generator makes of the selected positions.

    Attributes:
        predictions: Its loss there, and its samples.
        hidden_NG: Its last hidden states; None for the controls, which have none.
        original_N: Tokens to find.
        weights_N: 1, or 0 where a position does not count.
    """

    predictions: Predictions
    hidden_NG: Tensor | None
    original_N: Tensor
    weights_N: Tensor


@dataclass(frozen=True)
class Corrupted:
    """What the discriminator reads.

    Attributes:
        token_ids_BT: Samples at the selected positions, original tokens elsewhere.
        is_replaced_BT: The labels.
    """

    token_ids_BT: Tensor
    is_replaced_BT: Tensor


@dataclass(frozen=True)
class Discriminated:
    """The discriminator's loss.

    Attributes:
        loss: Weighted, a scalar.
        sums: By the names of ``model.statistics.FIELDS``.
        rtd_logits_BT: Positive means replaced; None where originals are predicted instead.
        bce_BT: Loss of each token, likewise.
        nll_N: Loss of each prediction, where originals are predicted.
    """

    loss: Tensor
    sums: dict[str, Tensor]
    rtd_logits_BT: Tensor | None = None
    bce_BT: Tensor | None = None
    nll_N: Tensor | None = None


Outcome = tuple[Tensor, Tensor, Tensor | None, Tensor | None]
"""Loss, sums of ``Statistics``, the discriminator's logits and labels; a tuple, which DeepSpeed looks into."""


class Electra(nn.Module):
    """Both networks, and the losses that train them."""

    def __init__(self, config: ModelConfig, objective: ObjectiveConfig, vocab_size: int, kernels: Kernels):
        super().__init__()
        self.config, self.objective, self.kernels = config, objective, kernels
        has_generator, hidden_size = objective.has_generator, config.hidden_size
        self.embeddings, self.generator_embeddings = build_embeddings(config, objective, vocab_size, kernels)
        generator_width = generator_embedding_size(config, objective)
        self.generator = self.generator_head = self.baseline = None
        if has_generator and objective.sharing != "all":
            self.generator = Encoder(config, config.generator, kernels, generator_width)
        if has_generator:
            generator_hidden = config.generator.hidden_size
            self.generator_head = MaskedLanguageModelHead(
                config, generator_hidden, generator_width, vocab_size, kernels
            )
        self.discriminator = Encoder(config, config.discriminator, kernels)
        self.discriminator_head = DiscriminatorHead(config) if objective.detects else None
        self.prediction_head = self.copy_gate = None
        if not objective.detects:
            self.prediction_head = MaskedLanguageModelHead(
                config, hidden_size, config.embedding_size, vocab_size, kernels
            )
        if objective.name == "all_tokens_mlm":
            self.copy_gate = TokenGate(hidden_size)
        if objective.training == "adversarial":
            self.baseline = TokenGate(config.generator.hidden_size, bias=False)
        self._control_logits_V: Tensor | None = None
        self._initialize()

    def _initialize(self) -> None:
        initialize(self, self.config)
        if self.discriminator_head is not None and self.config.glorot_projections:
            nn.init.xavier_uniform_(self.discriminator_head.output.weight)
        if isinstance(self.embeddings, DisentangledEmbeddings):
            self.embeddings.start_as_the_lender()

    def set_control(self, log_probabilities_V: Tensor) -> None:
        """Sets the distribution that the unigram or uniform generator draws from; -inf for special ids."""
        self._control_logits_V = log_probabilities_V.float()  # no buffer: half precision would round it

    def forward(self, batch: MicroBatch, counts: GlobalCounts, trains: Trains = "both") -> Outcome:
        """One pass: generate, corrupt, discriminate.

        Args:
            batch: Rows with their selected positions.
            counts: What the sums of the losses are divided by. They belong to the global batch, so
                the losses of its micro-batches add up to the loss of the paper, however it is split.
            trains: Who learns.

        Returns:
            The weighted loss of this micro-batch; the sums of ``Statistics``; the discriminator's
            logits and labels, both ``(B, T)``, None where nothing is detected.
        """
        if self.objective.name == "mlm":
            return self._masked_language_model(batch, counts)
        if trains == "generator":
            return self._generator_alone(batch, counts)
        if trains == "discriminator":
            return self._discriminator_alone(batch, counts)
        generated = self.generate(batch)
        corrupted = self.corrupt(generated, batch)
        discriminated = self.discriminator_loss(corrupted, batch, counts)
        if self.objective.training == "adversarial":
            loss, sums = self.policy_loss(generated, corrupted, discriminated, batch, counts)
        else:
            loss, sums = self.mlm_loss(generated, batch, counts)
        return _outcome(loss, sums, corrupted, discriminated, batch)

    def _masked_language_model(self, batch: MicroBatch, counts: GlobalCounts) -> Outcome:
        """BERT: the one network reads the masked rows and predicts the originals."""
        predicted = self._predict_selected(batch.masking.generator_ids_BT, batch, counts)
        assert predicted.nll_N is not None
        concealed_N = batch.masking.weights_BM.flatten() * batch.weight * _is_concealed(batch)
        sums = {"concealed": concealed_N.sum(), "concealed_nll": (predicted.nll_N * concealed_N).sum()}
        return predicted.loss, Statistics.of(predicted.loss.device, predicted.sums | sums).sums, None, None

    def _generator_alone(self, batch: MicroBatch, counts: GlobalCounts) -> Outcome:
        """The first of two stages: the discriminator only takes part in the backward pass."""
        loss, sums = self.mlm_loss(self.generate(batch), batch, counts)
        idle = batch.idle()
        nothing = Corrupted(idle.token_ids_BT, torch.zeros_like(idle.token_ids_BT).bool())
        idle_loss = self.discriminator_loss(nothing, idle, counts).loss
        return loss + idle_loss, Statistics.of(loss.device, sums).sums, None, None

    def _discriminator_alone(self, batch: MicroBatch, counts: GlobalCounts) -> Outcome:
        """The second of two stages: the frozen generator only takes part in the backward pass."""
        with torch.no_grad():
            generated = self.generate(batch)
            _, sums = self.mlm_loss(generated, batch, counts)
        corrupted = self.corrupt(generated, batch)
        discriminated = self.discriminator_loss(corrupted, batch, counts)
        idle = batch.idle()
        idle_loss, _ = self.mlm_loss(self.generate(idle), idle, counts)
        return _outcome(idle_loss, sums | {"resting": sums["masked"]}, corrupted, discriminated, batch)

    def generate(self, batch: MicroBatch) -> Generated:
        """The generator reads the masked rows, and fills in each selected position by a draw from its softmax."""
        original_N = batch.token_ids_BT.gather(1, batch.masking.positions_BM).flatten()
        weights_N = batch.masking.weights_BM.flatten() * batch.weight
        objective = self.objective
        sampling = Sampling(
            uniform(batch.seed, len(original_N), original_N.device), objective.temperature, objective.disallow_correct
        )
        if self.generator_head is None:
            assert self._control_logits_V is not None, "set_control was not called"
            self._control_logits_V = self._control_logits_V.to(original_N.device)
            return Generated(
                predict_by_control(self._control_logits_V, original_N, weights_N, sampling), None, original_N, weights_N
            )
        hidden_NG = self.generator_hidden(batch)
        with torch.set_grad_enabled(torch.is_grad_enabled() and objective.training != "adversarial"):
            predictions = self.generator_head(hidden_NG, self._generator_table(), original_N, weights_N, sampling)
        return Generated(predictions, hidden_NG, original_N, weights_N)

    def generator_hidden(self, batch: MicroBatch) -> Tensor:
        """The generator's hidden states at the selected positions, ``(N, G)``."""
        encoder, embeddings = self.generator or self.discriminator, self.generator_embeddings or self.embeddings
        keys_S = self._dropout_keys(batch, encoder, _GENERATOR)
        dropout = dropout_at(keys_S, 0, encoder.embedding_dropout)
        masking = batch.masking
        embedded_BTE = embeddings(masking.generator_ids_BT, batch.positions_BT, batch.token_types_BT, dropout)
        return _select(encoder(embedded_BTE, batch.packing, keys_S), masking)

    def generator_logits(self, batch: MicroBatch) -> Tensor:
        """The generator's logits at the selected positions, ``(N, V)``, fp32: all of them, for whoever needs them."""
        assert self.generator_head is not None
        return self.generator_head.logits(self.generator_hidden(batch), self._generator_table())

    def _generator_table(self) -> Tensor:
        """The token table that the generator reads and its output layer is tied to, ``(V, E)``."""
        return (self.generator_embeddings or self.embeddings).token_table()

    def _dropout_keys(self, batch: MicroBatch, encoder: Encoder, network: int) -> Tensor | None:
        """Keys of the dropout of one network in one pass; None outside training."""
        if not self.training:
            return None
        return dropout_keys(batch.seed, network, encoder.num_sites, batch.token_ids_BT.device)

    def corrupt(self, generated: Generated, batch: MicroBatch) -> Corrupted:
        """Replaces the selected tokens by samples; one that equals the original does not count as replaced."""
        assert generated.predictions.sampled_N is not None
        token_ids_BT = replace(batch.token_ids_BT, batch.masking, generated.predictions.sampled_N)
        is_replaced_BT = token_ids_BT != batch.token_ids_BT
        if self.objective.label_rule == "selected":
            is_replaced_BT = batch.masking.times_selected_BT > 0
        return Corrupted(token_ids_BT, is_replaced_BT)

    def mlm_loss(
        self, generated: Generated, batch: MicroBatch, counts: GlobalCounts
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The generator's maximum likelihood loss, weighted, and its sums; a control has no loss to learn from."""
        predictions = generated.predictions
        sums = generator_sums(predictions.nll_N, predictions.is_correct_N, generated.weights_N, _is_concealed(batch))
        if self.generator_head is None:
            return torch.zeros_like(predictions.loss), sums | {"resting": sums["masked"]}
        return self.objective.generator_loss_weight * predictions.loss / counts.masked, sums

    def policy_loss(
        self,
        generated: Generated,
        corrupted: Corrupted,
        discriminated: Discriminated,
        batch: MicroBatch,
        counts: GlobalCounts,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The adversarial generator's policy gradient on the discriminator's losses, weighted, and its sums."""
        sampled_N, positions_BM = generated.predictions.sampled_N, batch.masking.positions_BM
        assert self.baseline is not None and generated.hidden_NG is not None and discriminated.bce_BT is not None
        assert self.generator_head is not None and sampled_N is not None
        # The reward is known only now, so the head runs once more, and all logits are there.
        logits_NV = self.generator_head.logits(generated.hidden_NG, self._generator_table())
        logits_NV = logits_NV / self.objective.temperature
        if self.objective.disallow_correct:
            logits_NV = logits_NV.scatter(1, generated.original_N[:, None], -torch.inf)
        log_probability_N = -F.cross_entropy(logits_NV, sampled_N, reduction="none")
        reward_N = discriminated.bce_BT.gather(1, positions_BM).flatten()
        # A sample that was averaged with another one has no reward of its own.
        stands_N = corrupted.token_ids_BT.gather(1, positions_BM).flatten() == sampled_N
        weights_N = generated.weights_N * stands_N
        # The baseline learns from the hidden states without shaping them: it must not change what is sought.
        baseline_logit_N = self.baseline(generated.hidden_NG.detach())
        policy_N, baseline_N = policy_gradient(log_probability_N, reward_N, baseline_logit_N)
        policy_N = policy_N.masked_fill(weights_N == 0, 0.0)
        _, sums = self.mlm_loss(generated, batch, counts)
        sums |= {
            "rewarded": weights_N.sum(),
            "reward": (reward_N * weights_N).sum(),
            "policy_loss": (policy_N.detach() * weights_N).sum(),
            "baseline_bce": (baseline_N.detach() * weights_N).sum(),
        }
        return self.objective.generator_loss_weight * ((policy_N + baseline_N) * weights_N).sum() / counts.masked, sums

    def discriminator_loss(self, corrupted: Corrupted, batch: MicroBatch, counts: GlobalCounts) -> Discriminated:
        """What the objective asks of the discriminator, which reads the corrupted rows."""
        if self.objective.detects:
            return self._detect(corrupted, batch, counts)
        if self.objective.name == "replace_mlm":
            return self._predict_selected(corrupted.token_ids_BT, batch, counts)
        return self._predict_all(corrupted.token_ids_BT, batch, counts)

    def _detect(self, corrupted: Corrupted, batch: MicroBatch, counts: GlobalCounts) -> Discriminated:
        """Replaced token detection, over all tokens or over the selected ones (ELECTRA 15 %)."""
        labels_BT, scored_BT, denominator = corrupted.is_replaced_BT, batch.token_weights_BT, counts.tokens
        if self.objective.name == "electra_15":
            scored_BT, denominator = batch.masking.times_selected_BT * batch.weight, counts.masked
        logits_BT = self.discriminate(corrupted.token_ids_BT, batch)
        detection = self.kernels.detect(logits_BT, labels_BT, scored_BT)
        loss = self.objective.discriminator_loss_weight * detection.loss / denominator
        sums = dict(zip(COUNTS, detection.sums.unbind(), strict=True)) | pair_sums(logits_BT, labels_BT, scored_BT)
        return Discriminated(loss, sums, logits_BT.detach(), detection.bce_BT)

    def _predict_selected(self, read_BT: Tensor, batch: MicroBatch, counts: GlobalCounts) -> Discriminated:
        """The original token at the selected positions: Replace MLM, and BERT's MLM if [MASK] is read there."""
        assert self.prediction_head is not None
        hidden_NH = _select(self.encode(read_BT, batch), batch.masking)
        original_N = batch.token_ids_BT.gather(1, batch.masking.positions_BM).flatten()
        weights_N = batch.masking.weights_BM.flatten() * batch.weight
        found = self.prediction_head(hidden_NH, self.embeddings.token_table(), original_N, weights_N)
        return self._predicted(found.loss, found.nll_N, found.is_correct_N, weights_N, counts.masked)

    def _predict_all(self, read_BT: Tensor, batch: MicroBatch, counts: GlobalCounts) -> Discriminated:
        """The original token everywhere, with a copy gate: All-Tokens MLM. Each chunk's logits are made twice."""
        assert self.prediction_head is not None and self.copy_gate is not None
        hidden_NH = self.encode(read_BT, batch).flatten(0, 1)
        tokens = (self.copy_gate(hidden_NH), read_BT.flatten(), batch.token_ids_BT.flatten())
        parts = [
            checkpoint(self._copy_or_predict, *part, use_reentrant=False)
            for part in zip(*(t.split(_LOGITS_AT_ONCE) for t in (hidden_NH, *tokens)), strict=True)
        ]
        nll_N, is_correct_N = (torch.cat(column) for column in zip(*parts, strict=True))
        weights_N = batch.token_weights_BT.flatten()
        loss = (nll_N * weights_N).sum()
        return self._predicted(loss, nll_N.detach(), is_correct_N, weights_N, counts.tokens)

    def _copy_or_predict(
        self, hidden_NH: Tensor, gate_N: Tensor, read_N: Tensor, original_N: Tensor
    ) -> tuple[Tensor, Tensor]:
        assert self.prediction_head is not None
        logits_NV = self.prediction_head.logits(hidden_NH, self.embeddings.token_table())
        return copy_mixture_nll(logits_NV, gate_N, read_N, original_N)

    def _predicted(
        self, loss: Tensor, nll_N: Tensor, is_correct_N: Tensor, weights_N: Tensor, denominator: float
    ) -> Discriminated:
        sums = {
            "predicted": weights_N.sum(),
            "prediction_nll": loss.detach(),
            "prediction_correct": (is_correct_N * weights_N).sum(),
        }
        return Discriminated(self.objective.prediction_loss_weight * loss / denominator, sums, nll_N=nll_N)

    def discriminate(self, token_ids_BT: Tensor, batch: MicroBatch) -> Tensor:
        """The discriminator's logits, ``(B, T)``; positive means replaced."""
        assert self.discriminator_head is not None
        return self.discriminator_head(self.encode(token_ids_BT, batch))

    def encode(self, token_ids_BT: Tensor, batch: MicroBatch) -> Tensor:
        """The discriminator's hidden states, ``(B, T, H)``; fine-tuning keeps the weights that make them."""
        keys_S = self._dropout_keys(batch, self.discriminator, _DISCRIMINATOR)
        dropout = dropout_at(keys_S, 0, self.discriminator.embedding_dropout)
        embedded_BTE = self.embeddings(token_ids_BT, batch.positions_BT, batch.token_types_BT, dropout)
        return self.discriminator(embedded_BTE, batch.packing, keys_S)


def replace(token_ids_BT: Tensor, masking: Masking, sampled_N: Tensor) -> Tensor:
    """The discriminator's input: samples at the selected positions, original tokens elsewhere.

    Where several samples meet, which happens if positions are drawn with replacement, the released
    code writes the mean of their ids, rounded down (``pretrain_helpers.scatter_update``).
    """
    counts_BM = masking.weights_BM.long()
    sampled_BM = sampled_N.view_as(masking.positions_BM) * counts_BM
    sums_BT = torch.zeros_like(token_ids_BT).scatter_add(1, masking.positions_BM, sampled_BM)
    times_BT = torch.zeros_like(token_ids_BT).scatter_add(1, masking.positions_BM, counts_BM)
    return torch.where(times_BT > 0, sums_BT // times_BT.clamp(min=1), token_ids_BT)


def _select(hidden_BTG: Tensor, masking: Masking) -> Tensor:
    """Hidden states at the selected positions, ``(N, G)``."""
    index_BMG = masking.positions_BM[..., None].expand(-1, -1, hidden_BTG.shape[-1])
    return hidden_BTG.gather(1, index_BMG).flatten(0, 1)


def _is_concealed(batch: MicroBatch) -> Tensor:
    """Selected positions where the original is not shown, float ``(N,)``."""
    masking = batch.masking
    shown_BM = masking.generator_ids_BT.gather(1, masking.positions_BM)
    return (shown_BM != batch.token_ids_BT.gather(1, masking.positions_BM)).flatten().float()


def _outcome(
    generator_loss: Tensor,
    sums: dict[str, Tensor],
    corrupted: Corrupted,
    discriminated: Discriminated,
    batch: MicroBatch,
) -> Outcome:
    weights_BT = batch.token_weights_BT
    differs_BT = corrupted.token_ids_BT != batch.token_ids_BT
    sums = sums | discriminated.sums | {"tokens": weights_BT.sum(), "replaced": (weights_BT * differs_BT).sum()}
    loss, logits_BT = generator_loss + discriminated.loss, discriminated.rtd_logits_BT
    labels_BT = None if logits_BT is None else corrupted.is_replaced_BT
    return loss, Statistics.of(loss.device, sums).sums, logits_BT, labels_BT
