"""ELECTRA fine-tuned: the discriminator's encoder, and the small heads that tasks put on it.

Examples stand one after the other in a single row, without padding.

Shapes: P examples, T tokens of all of them together, L tokens of the longest, N positions that a head reads,
E embedding size, H hidden size, A heads, C classes, K beam size, F inner width of a span head's layers.

Heads as in google-research/electra, ``finetune/``; their matrices start as TensorFlow's do, glorot uniform.
"""

from dataclasses import dataclass, replace
from functools import cached_property

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model.config import ModelConfig
from model.embeddings import Embeddings
from model.encoder import Encoder, Layer, SelfAttention, gelu
from model.kernels.attention import Packing
from model.kernels.dropout import dropout_at, dropout_keys
from model.kernels.select import Kernels, outside_autocast

SPAN_WIDTH = 512
_ROUND_TOKENS = 64
"""In bf16 on a CPU a row is filled up to a multiple of so many: oneDNN compiles a product for each shape, at ten times
the cost of running it at ELECTRA-Small's width and less."""


@dataclass(frozen=True)
class Examples:
    """What one forward pass reads.

    Attributes:
        token_ids_T: [CLS] A [SEP] or [CLS] A [SEP] B [SEP], one example after the other.
        token_types_T: 1 in segment B with its [SEP], else 0.
        packing: Where one ends and the next begins.
    """

    token_ids_T: Tensor
    token_types_T: Tensor
    packing: Packing

    @property
    def lengths(self) -> tuple[int, ...]:
        """Tokens of each example."""
        return self.packing.lengths

    @cached_property
    def first_P(self) -> Tensor:
        """Place of each [CLS]."""
        lengths_P = torch.tensor(self.lengths, device=self.token_ids_T.device)
        return lengths_P.cumsum(0) - lengths_P

    @cached_property
    def positions_T(self) -> Tensor:
        """Position of each token in its example."""
        pieces_T = self.packing.pieces_BT[0]
        return torch.arange(len(pieces_T), device=pieces_T.device) - self.first_P[pieces_T]

    def to(self, device: str) -> "Examples":
        """The same on a device."""
        if device == "cpu":
            return self
        packing = replace(self.packing, pieces_BT=self.packing.pieces_BT.to(device))
        return Examples(self.token_ids_T.to(device), self.token_types_T.to(device), packing)

    def filled_up(self, multiple: int) -> "Examples":
        """The same and more of [PAD], none longer than the longest, so that the tokens are a multiple of so many."""
        if not (missing := -len(self.token_ids_T) % multiple):
            return self
        token_ids_T, token_types_T = (F.pad(each_T, (0, missing)) for each_T in (self.token_ids_T, self.token_types_T))
        longest = max(self.lengths)
        filling = [min(longest, missing - begin) for begin in range(0, missing, longest)]
        return Examples(token_ids_T, token_types_T, Packing.of_lengths((*self.lengths, *filling), token_ids_T.device))

    def by_example(self, values_T: Tensor, padding: float) -> Tensor:
        """Values of tokens as ``(P, L, …)``, filled up with ``padding``."""
        padded = values_T.new_full((len(self.lengths), max(self.lengths), *values_T.shape[1:]), padding)
        return padded.index_put((self.packing.pieces_BT[0], self.positions_T), values_T)


class FineTunedElectra(nn.Module):
    """Embeddings, the discriminator's encoder, and a head."""

    def __init__(self, config: ModelConfig, vocab_size: int, kernels: Kernels, head: nn.Module):
        super().__init__()
        kernels = outside_autocast(kernels)
        self.embeddings = Embeddings(config, vocab_size, kernels)
        self.discriminator = Encoder(config, config.discriminator, kernels)
        self.head = head

    def encode(self, examples: Examples) -> Tensor:
        """The last layer's vectors ``(T, H)``."""
        return self._run(_as_row(examples), leaves_out=0)[0][: len(examples.token_ids_T)]

    def encode_first(self, examples: Examples) -> Tensor:
        """The last layer's vectors of each [CLS] alone, ``(P, H)``: equal to ``encode``'s, and a layer cheaper."""
        hidden_TH, keys_S = self._run(_as_row(examples), leaves_out=1)
        layer, keys_S = self.discriminator.layers[-1], self.discriminator.keys_of_layer(keys_S, -1)
        assert isinstance(layer, Layer)
        first_PH = hidden_TH.index_select(0, examples.first_P)
        attended_PH = _attend_from_first(layer.attention, first_PH, hidden_TH, examples)
        return layer.after_attention(first_PH, attended_PH, keys_S)

    def _run(self, row: Examples, leaves_out: int) -> tuple[Tensor, Tensor | None]:
        """The row of all examples through the encoder, ``(T, H)``, and dropout's keys, drawn from torch's generator."""
        encoder, device, keys_S = self.discriminator, row.token_ids_T.device, None
        if self.training:
            keys_S = dropout_keys(int(torch.randint(2**62, ())), 0, encoder.num_sites, device)
        arguments = (row.token_ids_T[None], row.positions_T[None], row.token_types_T[None])
        embedded_1TE = self.embeddings(*arguments, dropout_at(keys_S, 0, encoder.embedding_dropout))
        return encoder(embedded_1TE, row.packing, keys_S, leaves_out)[0], keys_S


class LinearHead(nn.Module):
    """One linear layer, on [CLS] (with dropout before it) or on the first token of each word (without, as released)."""

    def __init__(self, config: ModelConfig, num_outputs: int, dropout: float):
        super().__init__()
        self.dropout = nn.Dropout(dropout)
        self.output = _glorot_linear(config.hidden_size, num_outputs)

    def forward(self, hidden_NH: Tensor) -> Tensor:
        """Returns logits or scores ``(N, C)`` in fp32, of the vectors of the positions that it reads."""
        return self.output(self.dropout(hidden_NH)).float()


@dataclass(frozen=True)
class SpanTargets:
    """What a span head learns of each example.

    Attributes:
        start_P: Position of the answer's first token in its example; 0, [CLS], where it has none.
        end_P: The same for its last token.
        is_impossible_P: 1.0 where the question has no answer anywhere.
    """

    start_P: Tensor
    end_P: Tensor
    is_impossible_P: Tensor


@dataclass(frozen=True)
class Spans:
    """The best spans of each example: K starts, and for each K ends.

    Attributes:
        start_PK: Positions of starts in their example, best first.
        start_score_PK: Their scores: logits of the simple head, log probabilities of the joint one.
        end_PKK: For each start the positions of ends, best first.
        end_score_PKK: Their scores, given the start in the joint head.
        null_score_P: How little an example looks as if it had the answer.
    """

    start_PK: Tensor
    start_score_PK: Tensor
    end_PKK: Tensor
    end_score_PKK: Tensor
    null_score_P: Tensor


class SimpleSpanHead(nn.Module):
    """Start and end by one linear layer, independent of each other (BERT's head)."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.output = _glorot_linear(config.hidden_size, 2)

    def loss(self, hidden_TH: Tensor, examples: Examples, targets: SpanTargets) -> Tensor:
        """Mean of the negative log likelihoods of start and end, ``(P,)``."""
        start_PL, end_PL = self._logits(hidden_TH, examples)
        return (_nll(start_PL.log_softmax(-1), targets.start_P) + _nll(end_PL.log_softmax(-1), targets.end_P)) / 2

    def spans(self, hidden_TH: Tensor, examples: Examples, beam_size: int) -> Spans:
        """The best starts and the best ends by their logits; the null score is that of [CLS] to [CLS]."""
        start_PL, end_PL = self._logits(hidden_TH, examples)
        start_score_PK, start_PK = _top(start_PL, beam_size)
        end_score_PK, end_PK = _top(end_PL, beam_size)
        each_start = (-1, start_PK.shape[1], -1)
        end_PKK, end_score_PKK = (t[:, None].expand(each_start) for t in (end_PK, end_score_PK))
        return Spans(start_PK, start_score_PK, end_PKK, end_score_PKK, start_PL[:, 0] + end_PL[:, 0])

    def _logits(self, hidden_TH: Tensor, examples: Examples) -> tuple[Tensor, Tensor]:
        logits_PL2 = examples.by_example(self.output(hidden_TH).float(), -torch.inf)
        start_PL, end_PL = logits_PL2.masked_fill(~may_answer(examples)[..., None], -torch.inf).unbind(-1)
        return start_PL, end_PL


class JointSpanHead(nn.Module):
    """The end given the start, and whether there is an answer at all: the head of ELECTRA's SQuAD scores.

    The start has a linear layer. The end has a hidden layer over the token and the start's token: the true start in
    training, each start of the beam afterwards. Answerability has one over [CLS] and the mean of all tokens,
    weighted by their probability to be the start.
    """

    def __init__(self, config: ModelConfig, answerable_weight: float):
        super().__init__()
        self.answerable_weight, self.activation = answerable_weight, config.activation
        self.start = _glorot_linear(config.hidden_size, 1)
        self.end_inner = _glorot_linear(2 * config.hidden_size, SPAN_WIDTH)
        self.end = _glorot_linear(SPAN_WIDTH, 1)
        self.answerable_inner = _glorot_linear(2 * config.hidden_size, SPAN_WIDTH)
        self.answerable = _glorot_linear(SPAN_WIDTH, 1)

    def loss(self, hidden_TH: Tensor, examples: Examples, targets: SpanTargets) -> Tensor:
        """That of start and end, as in the simple head, and the weighted one of answerability, ``(P,)``."""
        start_PL = self._start_log_probabilities(hidden_TH, examples)
        true_start_PH = hidden_TH.index_select(0, examples.first_P + targets.start_P)
        of_start_PF, of_token_TF = self._end_parts(true_start_PH, hidden_TH)
        inner_TF = gelu(of_token_TF + of_start_PF.index_select(0, examples.packing.pieces_BT[0]), self.activation)
        end_PL = self._normalized(self.end(inner_TF), examples)
        impossible_P = self._impossible_logit(hidden_TH, examples, start_PL)
        answerable_P = F.binary_cross_entropy_with_logits(impossible_P, targets.is_impossible_P, reduction="none")
        span_P = (_nll(start_PL, targets.start_P) + _nll(end_PL, targets.end_P)) / 2
        return span_P + self.answerable_weight * answerable_P

    def spans(self, hidden_TH: Tensor, examples: Examples, beam_size: int) -> Spans:
        """A beam of starts, and of ends for each; the null score is the logit of "impossible"."""
        start_PL = self._start_log_probabilities(hidden_TH, examples)
        start_score_PK, start_PK = _top(start_PL, beam_size)
        places_PK = examples.first_P[:, None] + start_PK  # a short example's beam has slots beyond its end, at -inf
        starts_PKH = hidden_TH[places_PK.clamp(max=len(hidden_TH) - 1)]
        of_start_PKF, of_token_TF = self._end_parts(starts_PKH, hidden_TH)
        logits_PKL = hidden_TH.new_full((*start_PK.shape, max(examples.lengths)), -torch.inf, dtype=torch.float32)
        for number, of_token_LF in enumerate(of_token_TF.split(examples.lengths)):  # all at once would be K times T
            inner_KLF = gelu(of_start_PKF[number, :, None] + of_token_LF, self.activation)
            logits_PKL[number, :, : len(of_token_LF)] = self.end(inner_KLF).squeeze(-1).float()
        allowed_P1L = may_answer(examples)[:, None]
        end_score_PKK, end_PKK = _top(logits_PKL.masked_fill(~allowed_P1L, -torch.inf).log_softmax(-1), beam_size)
        return Spans(
            start_PK, start_score_PK, end_PKK, end_score_PKK, self._impossible_logit(hidden_TH, examples, start_PL)
        )

    def _start_log_probabilities(self, hidden_TH: Tensor, examples: Examples) -> Tensor:
        return self._normalized(self.start(hidden_TH), examples)

    def _normalized(self, logits_T1: Tensor, examples: Examples) -> Tensor:
        logits_PL = examples.by_example(logits_T1.squeeze(-1).float(), -torch.inf)
        return logits_PL.masked_fill(~may_answer(examples), -torch.inf).log_softmax(-1)

    def _end_parts(self, starts: Tensor, hidden_TH: Tensor) -> tuple[Tensor, Tensor]:
        """The hidden layer over (start; token) in two products, since each start meets every token."""
        weight_of_start, weight_of_token = self.end_inner.weight.chunk(2, dim=1)
        return F.linear(starts, weight_of_start, self.end_inner.bias), F.linear(hidden_TH, weight_of_token)

    def _impossible_logit(self, hidden_TH: Tensor, examples: Examples, start_PL: Tensor) -> Tensor:
        pieces_T = examples.packing.pieces_BT[0]
        probability_T = start_PL.exp()[pieces_T, examples.positions_T].to(hidden_TH.dtype)
        mixed_PH = hidden_TH.new_zeros(len(examples.lengths), hidden_TH.shape[1])
        mixed_PH = mixed_PH.index_add(0, pieces_T, probability_T[:, None] * hidden_TH)
        both_P2H = torch.cat([hidden_TH.index_select(0, examples.first_P), mixed_PH], dim=1)
        return self.answerable(gelu(self.answerable_inner(both_P2H), self.activation)).squeeze(-1).float()


def _as_row(examples: Examples) -> Examples:
    """What the network is given: the examples, or a row of a length that comes again, see ``_ROUND_TOKENS``."""
    compiles_shapes = examples.token_ids_T.device.type == "cpu" and torch.is_autocast_enabled("cpu")
    return examples.filled_up(_ROUND_TOKENS) if compiles_shapes else examples


def _attend_from_first(attention: SelfAttention, first_PH: Tensor, hidden_TH: Tensor, examples: Examples) -> Tensor:
    """What ``attention`` gives at each [CLS], ``(P, H)``; keys and values are needed of every token. D: head size."""
    width = hidden_TH.shape[1]
    weights, biases = (p.split([width, 2 * width]) for p in attention.query_key_value.parameters())
    query_PH, both_T2H = F.linear(first_PH, weights[0], biases[0]), F.linear(hidden_TH, weights[1], biases[1])
    both_T2H = both_T2H[: len(examples.token_ids_T)]  # without what fills the row up
    heads = (attention.heads, width // attention.heads)
    key_PALD, value_PALD = examples.by_example(both_T2H, 0.0).unflatten(-1, (2, *heads)).permute(2, 0, 3, 1, 4)
    real_PL = examples.by_example(torch.ones_like(examples.token_ids_T, dtype=torch.bool), False)
    context_PA1D = F.scaled_dot_product_attention(
        query_PH.unflatten(-1, heads)[:, :, None], key_PALD, value_PALD, attn_mask=real_PL[:, None, None],
        dropout_p=attention.attention_dropout if attention.training else 0.0,
    )  # fmt: skip
    return attention.output(context_PA1D.flatten(1))


def may_answer(examples: Examples) -> Tensor:
    """Where answers may begin and end: segment B, and [CLS] for "none", ``(P, L)``."""
    allowed_T = (examples.token_types_T == 1) | (examples.positions_T == 0)
    return examples.by_example(allowed_T, False)


def _nll(log_probabilities_PL: Tensor, targets_P: Tensor) -> Tensor:
    return F.nll_loss(log_probabilities_PL, targets_P, reduction="none")


def _top(scores: Tensor, beam_size: int) -> tuple[Tensor, Tensor]:
    return scores.topk(min(beam_size, scores.shape[-1]), dim=-1)


def _glorot_linear(inputs: int, outputs: int) -> nn.Linear:
    linear = nn.Linear(inputs, outputs)
    nn.init.xavier_uniform_(linear.weight)
    nn.init.zeros_(linear.bias)
    return linear
