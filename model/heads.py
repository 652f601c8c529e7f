"""What stands on top of an encoder: the masked language model's head, the detector's, the copy gate.

Shapes: B rows, T tokens of a row, N tokens in one dimension, E embedding size, G and H hidden sizes,
V vocabulary.
"""

import torch.nn.functional as F
from torch import Tensor, nn

from model.config import ModelConfig
from model.encoder import gelu
from model.kernels.layer_norm import LayerNorm
from model.kernels.select import Kernels
from model.kernels.vocabulary import Predictions, Sampling


class MaskedLanguageModelHead(nn.Module):
    """Dense, GELU, LayerNorm, then the token table as output layer, at the positions asked for only."""

    def __init__(self, config: ModelConfig, hidden_size: int, embedding_size: int, vocab_size: int, kernels: Kernels):
        super().__init__()
        self.dense = nn.Linear(hidden_size, embedding_size)
        self.layer_norm = LayerNorm(embedding_size, eps=config.layer_norm_eps)
        self.output_bias = nn.Parameter(self.dense.weight.new_zeros(vocab_size))
        self.activation, self.kernels = config.activation, kernels

    def forward(
        self,
        hidden_NG: Tensor,
        token_table_VE: Tensor,
        original_N: Tensor,
        weights_N: Tensor,
        sampling: Sampling | None = None,
    ) -> Predictions:
        """Loss and samples at the positions, without holding their logits; see ``model.kernels.vocabulary``."""
        transformed_NE = self._transform(hidden_NG)
        return self.kernels.predict(transformed_NE, token_table_VE, self.output_bias, original_N, weights_N, sampling)

    def logits(self, hidden_NG: Tensor, token_table_VE: Tensor) -> Tensor:
        """Returns logits ``(N, V)``, fp32."""
        return F.linear(self._transform(hidden_NG), token_table_VE, self.output_bias).float()

    def _transform(self, hidden_NG: Tensor) -> Tensor:
        return self.layer_norm(gelu(self.dense(hidden_NG), self.activation))


class DiscriminatorHead(nn.Module):
    """Dense, GELU, then one logit for each token."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.dense = nn.Linear(config.hidden_size, config.hidden_size)
        self.output = nn.Linear(config.hidden_size, 1)
        self.activation = config.activation

    def forward(self, hidden_BTH: Tensor) -> Tensor:
        """Returns logits ``(B, T)``, fp32; positive means replaced."""
        return self.output(gelu(self.dense(hidden_BTH), self.activation)).squeeze(-1).float()


class TokenGate(nn.Linear):
    """One logit for each token by a single linear layer: the copy gate, and the policy gradient's baseline."""

    def __init__(self, hidden_size: int, bias: bool = True):
        super().__init__(hidden_size, 1, bias=bias)

    def forward(self, hidden: Tensor) -> Tensor:
        """``(…, H)`` to logits ``(…)``, fp32."""
        return super().forward(hidden).squeeze(-1).float()
