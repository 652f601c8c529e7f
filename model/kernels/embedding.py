"""The sum of several table lookups, LayerNorm, and dropout after it.

Shapes: B rows, T tokens of a row, E columns of the tables.
"""

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from model.kernels.dropout import Dropout, reference_dropout, torch_dropout
from model.kernels.layer_norm import layer_norm, reference_layer_norm

Embed = Callable[[Sequence[Tensor], Sequence[Tensor], Tensor, Tensor, float, Dropout | None], Tensor]


def reference_embed(
    tables: Sequence[Tensor],
    indices: Sequence[Tensor],
    weight_E: Tensor,
    bias_E: Tensor,
    eps: float,
    dropout: Dropout | None,
) -> Tensor:
    """dropout(LayerNorm(sum of tables at indices)), by plain products.

    Args:
        tables: Each ``(size, E)``: tokens, positions, types, and what else is added up.
        indices: For each table int64 ``(B, T)``.
        weight_E: Gain of LayerNorm.
        bias_E: Its shift.
        eps: Its epsilon.
        dropout: Rows are numbered through B·T, columns are those of the tables.

    Returns:
        ``(B, T, E)`` in the dtype of the tables.
    """
    total_BTE = torch.stack([table[index] for table, index in zip(tables, indices, strict=True)]).sum(0)
    return reference_dropout(reference_layer_norm(total_BTE, weight_E, bias_E, eps), dropout)


def torch_embed(
    tables: Sequence[Tensor],
    indices: Sequence[Tensor],
    weight_E: Tensor,
    bias_E: Tensor,
    eps: float,
    dropout: Dropout | None,
) -> Tensor:
    """The same by torch's lookups and LayerNorm."""
    total_BTE, *others = (F.embedding(index, table) for table, index in zip(tables, indices, strict=True))
    for other_BTE in others:
        total_BTE = total_BTE + other_BTE
    normalized_BTE = layer_norm(total_BTE, weight_E, bias_E, eps)
    if torch.compiler.is_compiling():
        return reference_dropout(normalized_BTE, dropout)
    return torch_dropout(normalized_BTE, dropout)


EMBED: dict[str, Embed] = {"reference": reference_embed, "torch": torch_embed}
