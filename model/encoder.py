"""The transformer encoder of BERT, as both networks of ELECTRA use it.

Shapes: B rows, T tokens of a row, E embedding size, H hidden size, F inner width of feed-forward;
within attention H heads, D head size.
"""

import torch.nn.functional as F
from torch import Tensor, nn

from model.config import EncoderShape, ModelConfig
from model.kernels.attention import Packing
from model.kernels.select import Kernels


class SelfAttention(nn.Module):
    """Multi-head attention within the pieces of a row."""

    def __init__(self, shape: EncoderShape, kernels: Kernels):
        super().__init__()
        self.heads, self.kernels = shape.heads, kernels
        self.attention_dropout = shape.attention_dropout
        self.query_key_value = nn.Linear(shape.hidden_size, 3 * shape.hidden_size)
        self.output = nn.Linear(shape.hidden_size, shape.hidden_size)

    def forward(self, hidden_BTH: Tensor, packing: Packing) -> Tensor:
        """Returns ``(B, T, H)``."""
        rows, length, _ = hidden_BTH.shape
        split_BT3HD = self.query_key_value(hidden_BTH).view(rows, length, 3, self.heads, -1)
        query, key, value = split_BT3HD.permute(2, 0, 3, 1, 4).unbind(0)
        dropout = self.attention_dropout if self.training else 0.0
        context_BHTD = self.kernels.attention(query, key, value, packing, dropout)
        return self.output(context_BHTD.transpose(1, 2).reshape(rows, length, -1))


class Layer(nn.Module):
    """Attention and feed-forward, each with dropout, residual and LayerNorm after it (post-LN)."""

    def __init__(self, config: ModelConfig, shape: EncoderShape, kernels: Kernels):
        super().__init__()
        self.attention = SelfAttention(shape, kernels)
        self.attention_layer_norm = nn.LayerNorm(shape.hidden_size, eps=config.layer_norm_eps)
        self.feed_forward_in = nn.Linear(shape.hidden_size, shape.feed_forward_size)
        self.feed_forward_out = nn.Linear(shape.feed_forward_size, shape.hidden_size)
        self.feed_forward_layer_norm = nn.LayerNorm(shape.hidden_size, eps=config.layer_norm_eps)
        self.dropout = nn.Dropout(shape.dropout)
        self.activation = config.activation

    def forward(self, hidden_BTH: Tensor, packing: Packing) -> Tensor:
        """Returns ``(B, T, H)``."""
        return self.after_attention(hidden_BTH, self.attention(hidden_BTH, packing))

    def after_attention(self, hidden_BTH: Tensor, attended_BTH: Tensor) -> Tensor:
        """The layer's output from its input and what attention made of it, ``(…, H)``."""
        hidden_BTH = self.attention_layer_norm(hidden_BTH + self.dropout(attended_BTH))
        inner_BTF = gelu(self.feed_forward_in(hidden_BTH), self.activation)
        fed_BTH = self.dropout(self.feed_forward_out(inner_BTF))
        return self.feed_forward_layer_norm(hidden_BTH + fed_BTH)


class Encoder(nn.Module):
    """Dropout on the embeddings, their projection to the hidden size where the two differ, and the layers."""

    def __init__(self, config: ModelConfig, shape: EncoderShape, kernels: Kernels, embedding_size: int | None = None):
        super().__init__()
        embedding_size = embedding_size or config.embedding_size
        same_size = embedding_size == shape.hidden_size
        self.dropout = nn.Dropout(shape.dropout)
        self.embeddings_project = None if same_size else nn.Linear(embedding_size, shape.hidden_size)
        self.layers = nn.ModuleList(Layer(config, shape, kernels) for _ in range(shape.layers))

    def forward(self, embedded_BTE: Tensor, packing: Packing, leaves_out: int = 0) -> Tensor:
        """Returns ``(B, T, H)``; of the layers before the last ``leaves_out``."""
        embedded_BTE = self.dropout(embedded_BTE)
        hidden_BTH = embedded_BTE if self.embeddings_project is None else self.embeddings_project(embedded_BTE)
        for layer in self.layers[: len(self.layers) - leaves_out]:
            hidden_BTH = layer(hidden_BTH, packing)
        return hidden_BTH


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
