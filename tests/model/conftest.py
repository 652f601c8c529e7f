"""A tiny ELECTRA and packed rows for it."""

import dataclasses
from collections.abc import Callable

import pytest
import torch

from model.batch import MicroBatch
from model.config import ModelConfig
from model.electra import Electra
from model.kernels.attention import Packing
from model.kernels.select import select_kernels
from model.masking import MaskingRule, select_and_mask
from model.objective import ObjectiveConfig

VOCAB_SIZE, MASK_ID, NUM_SPECIAL = 50, 4, 5
TINY = {
    "size": "tiny", "hidden_layers": 2, "hidden_size": 16, "attention_heads": 2, "feed_forward_size": 24,
    "embedding_size": 12, "generator_width": 0.5, "max_positions": 32, "dropout": 0.0, "attention_dropout": 0.0,
    "initializer_range": 0.3,
}  # fmt: skip


@pytest.fixture
def build_model() -> Callable[..., Electra]:
    """Builds a tiny model without dropout; keys of ``ModelConfig`` and ``ObjectiveConfig`` change it."""

    def build_model(kernels: str = "torch", **changes) -> Electra:
        torch.manual_seed(5)
        config = TINY | {key: value for key, value in changes.items() if key in ModelConfig.model_fields}
        objective = {key: value for key, value in changes.items() if key not in config}
        return Electra(ModelConfig(**config), ObjectiveConfig(**objective), VOCAB_SIZE, select_kernels(kernels))

    return build_model


@pytest.fixture
def build_batch() -> Callable[..., MicroBatch]:
    """Builds rows of three pieces each, masked, by a seed."""

    def build_batch(rows: int = 3, length: int = 24, masked: int = 6, seed: int = 1) -> MicroBatch:
        draw = torch.Generator().manual_seed(seed)
        token_ids = torch.randint(NUM_SPECIAL, VOCAB_SIZE, (rows, length), generator=draw)
        borders = torch.tensor([0, length // 3, length // 2])
        pieces = torch.bucketize(torch.arange(length), borders, right=True) - 1
        positions = torch.arange(length) - borders[pieces]
        token_ids[:, borders] = 2
        token_ids[:, [*(borders[1:] - 1).tolist(), length - 1]] = 3
        keys = torch.randint(-(2**63), 2**63 - 1, (rows,), generator=draw)
        return MicroBatch(
            token_ids_BT=token_ids,
            positions_BT=positions.expand(rows, -1),
            token_types_BT=(positions > 3).long().expand(rows, -1),
            packing=Packing(pieces.expand(rows, -1)),
            masking=select_and_mask(token_ids, keys, MaskingRule(masked, 0.85, MASK_ID, (0, 2, 3, 4))),
            seed=seed,
        )

    return build_batch


@pytest.fixture
def take_rows() -> Callable[[MicroBatch, slice], MicroBatch]:
    """A micro-batch of some rows of another."""

    def take_rows(batch: MicroBatch, rows: slice) -> MicroBatch:
        masking = batch.masking
        return dataclasses.replace(
            batch,
            token_ids_BT=batch.token_ids_BT[rows],
            positions_BT=batch.positions_BT[rows],
            token_types_BT=batch.token_types_BT[rows],
            packing=Packing(batch.packing.pieces_BT[rows]),
            masking=type(masking)(*(getattr(masking, f.name)[rows] for f in dataclasses.fields(masking))),
        )

    return take_rows
