"""Which positions are masked, and what the generator reads there.

Shapes: B rows, T tokens of a row, M selected positions of a row.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from model.keyed import keyed_bits

_SELECT, _SHOW_MASK = 1, 2


@dataclass(frozen=True)
class Masking:
    """The selected positions of each row.

    Attributes:
        positions_BM: int64, ascending in each row.
        weights_BM: float32, 1, or 0 where a row has fewer than M tokens to select.
        generator_ids_BT: Input of the generator, [MASK] at most selected positions.
    """

    positions_BM: Tensor
    weights_BM: Tensor
    generator_ids_BT: Tensor


def select_and_mask(
    token_ids_BT: Tensor,
    keys_B: Tensor,
    masked_per_row: int,
    mask_token_share: float,
    mask_id: int,
    never_selected: tuple[int, ...],
) -> Masking:
    """Draws exactly ``masked_per_row`` distinct positions of each row, uniformly.

    A selected position shows [MASK] with probability ``mask_token_share`` and its own
    token otherwise; never a random one (google-research/electra, ``pretrain_helpers.py``).
    The draw depends on the row's key alone.

    Args:
        token_ids_BT: Original tokens.
        keys_B: int64 key of each row and visit.
        masked_per_row: M.
        mask_token_share: Probability of [MASK], 0 to 1.
        mask_id: Id of [MASK].
        never_selected: Ids that stay as they are: [PAD], [CLS], [SEP], [MASK]; [UNK] may be selected, as released.
    """
    length = token_ids_BT.shape[1]
    position_T = torch.arange(length, device=token_ids_BT.device)
    # The position in the low bits makes every priority distinct, so that all devices agree on the order.
    priority_BT = (keyed_bits(keys_B, length, _SELECT) << 20) | position_T
    special_BT = torch.isin(token_ids_BT, torch.tensor(never_selected, device=token_ids_BT.device))
    priority_BT = priority_BT.masked_fill(special_BT, torch.iinfo(torch.int64).max)
    positions_BM = priority_BT.topk(masked_per_row, dim=1, largest=False).indices.sort(dim=1).values
    weights_BM = (~special_BT.gather(1, positions_BM)).float()
    shows_mask_BT = keyed_bits(keys_B, length, _SHOW_MASK) < int(mask_token_share * 2**32)
    original_BM = token_ids_BT.gather(1, positions_BM)
    shown_BM = torch.where(shows_mask_BT.gather(1, positions_BM) & (weights_BM > 0), mask_id, original_BM)
    return Masking(positions_BM, weights_BM, token_ids_BT.scatter(1, positions_BM, shown_BM))
