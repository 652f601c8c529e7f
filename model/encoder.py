"""The transformer encoder of BERT, as both networks of ELECTRA use it.

Shapes: B rows, T tokens of a row, H hidden size, E embedding size, F inner width of feed-forward, S sites of dropout;
within attention 3 for queries, keys and values, A heads, D head size.
"""

import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from model.config import EncoderShape, ModelConfig
from model.kernels.attention import Packing
from model.kernels.dropout import dropout_at
from model.kernels.gelu import gelu_linear
from model.kernels.select import Kernels

SITES_OF_LAYER = 3


class SelfAttention(nn.Module):
    """Multi-head attention within the pieces of a row."""

    def __init__(self, shape: EncoderShape, kernels: Kernels):
        super().__init__()
        self.heads, self.kernels = shape.heads, kernels
        self.attention_dropout = shape.attention_dropout
        self.query_key_value = nn.Linear(shape.hidden_size, 3 * shape.hidden_size)
        self.output = nn.Linear(shape.hidden_size, shape.hidden_size)

    def forward(self, hidden_BTH: Tensor, packing: Packing, keys_S: Tensor | None) -> Tensor:
        """Returns ``(B, T, H)``; dropout of the first of the layer's sites."""
        qkv_BT3AD = self.query_key_value(hidden_BTH).unflatten(-1, (3, self.heads, -1))
        context_BTAD = self.kernels.attention(qkv_BT3AD, packing, dropout_at(keys_S, 0, self.attention_dropout))
        return self.output(context_BTAD.flatten(2))


class Layer(nn.Module):
    """Attention and feed-forward, each with dropout, residual and LayerNorm after it (post-LN)."""

    def __init__(self, config: ModelConfig, shape: EncoderShape, kernels: Kernels):
        super().__init__()
        self.attention = SelfAttention(shape, kernels)
        self.attention_layer_norm = nn.LayerNorm(shape.hidden_size, eps=config.layer_norm_eps)
        self.feed_forward_in = nn.Linear(shape.hidden_size, shape.feed_forward_size)
        self.feed_forward_out = nn.Linear(shape.feed_forward_size, shape.hidden_size)
        self.feed_forward_layer_norm = nn.LayerNorm(shape.hidden_size, eps=config.layer_norm_eps)
        self.dropout, self.kernels = shape.dropout, kernels
        self.approximate_gelu = config.activation == "gelu_tanh"

    def forward(self, hidden_BTH: Tensor, packing: Packing, keys_S: Tensor | None) -> Tensor:
        """Returns ``(B, T, H)``; nothing is dropped without keys."""
        return self.after_attention(hidden_BTH, self.attention(hidden_BTH, packing, keys_S), keys_S)

    def after_attention(self, hidden_BTH: Tensor, attended_BTH: Tensor, keys_S: Tensor | None) -> Tensor:
        """The layer's output from its input and what attention made of it, ``(…, H)``."""
        hidden_BTH = self._add_norm(attended_BTH, hidden_BTH, self.attention_layer_norm, keys_S, 1)
        before, after = self.feed_forward_in, self.feed_forward_out
        fed_BTH = gelu_linear(
            F.linear(hidden_BTH, before.weight), before.bias, after.weight, after.bias, self.approximate_gelu,
            self.kernels.bias_gelu,
        )  # fmt: skip
        return self._add_norm(fed_BTH, hidden_BTH, self.feed_forward_layer_norm, keys_S, 2)

    def _add_norm(self, x: Tensor, residual: Tensor, norm: nn.LayerNorm, keys_S: Tensor | None, site: int) -> Tensor:
        dropout = dropout_at(keys_S, site, self.dropout)
        x = x.to(residual.dtype)  # narrower under autocast alone
        return self.kernels.add_norm(x, residual, norm.weight, norm.bias, norm.eps, dropout)


class Encoder(nn.Module):
    """The projection of embeddings to the hidden size, where the two differ, and the layers."""

    def __init__(self, config: ModelConfig, shape: EncoderShape, kernels: Kernels, embedding_size: int | None = None):
        super().__init__()
        embedding_size = embedding_size or config.embedding_size
        same_size = embedding_size == shape.hidden_size
        self.embedding_dropout = shape.dropout
        self.embeddings_project = None if same_size else nn.Linear(embedding_size, shape.hidden_size)
        self.layers = nn.ModuleList(Layer(config, shape, kernels) for _ in range(shape.layers))
        self.checkpoints_activations = False

    @property
    def num_sites(self) -> int:
        """Places where this network drops: one on the embeddings, then those of each layer."""
        return 1 + SITES_OF_LAYER * len(self.layers)

    def forward(
        self, embedded_BTE: Tensor, packing: Packing, keys_S: Tensor | None = None, leaves_out: int = 0
    ) -> Tensor:
        """Returns ``(B, T, H)``; of the layers before the last ``leaves_out``.

        Args:
            embedded_BTE: Normalized embeddings, dropped already.
            packing: Pieces of the rows.
            keys_S: Keys of dropout, ``num_sites`` of them, the embeddings' first; None to drop nothing.
            leaves_out: Layers at the end that are not run.
        """
        hidden_BTH = embedded_BTE
        if self.embeddings_project is not None:
            hidden_BTH = self.embeddings_project(embedded_BTE).to(embedded_BTE.dtype)  # autocast narrows it
        for number, layer in enumerate(self.layers[: len(self.layers) - leaves_out]):
            keys_of_layer = self.keys_of_layer(keys_S, number)
            if self.checkpoints_activations and self.training:
                hidden_BTH = checkpoint(layer, hidden_BTH, packing, keys_of_layer, use_reentrant=False)
            else:
                hidden_BTH = layer(hidden_BTH, packing, keys_of_layer)
        return hidden_BTH

    def keys_of_layer(self, keys_S: Tensor | None, number: int) -> Tensor | None:
        """The keys of layer ``number``, negative from the end."""
        first = 1 + SITES_OF_LAYER * (number % len(self.layers))
        return None if keys_S is None else keys_S[first : first + SITES_OF_LAYER]


def gelu(x: Tensor, activation: str) -> Tensor:
    """GELU, exact (erf) or in its tanh form (Hendrycks and Gimpel, 2016)."""
    return F.gelu(x, approximate="tanh" if activation == "gelu_tanh" else "none")


def initialize(module: nn.Module, config: ModelConfig) -> None:
    """As released: truncated normal for tables and layers, glorot where TensorFlow's default stood."""
    bound = 2 * config.initializer_range
    for child in module.modules():
        if isinstance(child, nn.Linear | nn.Embedding):
            nn.init.trunc_normal_(child.weight, std=config.initializer_range, a=-bound, b=bound)
        if isinstance(child, nn.Linear) and child.bias is not None:
            nn.init.zeros_(child.bias)
    for child in module.modules() if config.glorot_projections else ():
        if isinstance(child, Encoder) and child.embeddings_project is not None:
            nn.init.xavier_uniform_(child.embeddings_project.weight)
