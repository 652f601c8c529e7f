"""Token, position and type embeddings, and the ways in which two networks share them.

Each is the sum of its tables at a token's id, position and type, then LayerNorm, then dropout.

Shapes: B rows, T tokens of a row, E embedding size, V vocabulary.
"""

from abc import ABC, abstractmethod

from torch import Tensor, nn

from model.config import ModelConfig
from model.kernels.dropout import Dropout
from model.kernels.select import Kernels
from model.objective import ObjectiveConfig, generator_embedding_size

NUM_TOKEN_TYPES = 2


class _Summed(nn.Module, ABC):
    """What all ways have in common: types and LayerNorm of their own, and the sum."""

    def __init__(self, config: ModelConfig, size: int, kernels: Kernels):
        super().__init__()
        self.token_type = nn.Embedding(NUM_TOKEN_TYPES, size)
        self.layer_norm = nn.LayerNorm(size, eps=config.layer_norm_eps)
        self.kernels = kernels

    @abstractmethod
    def tables(self) -> list[tuple[Tensor, Tensor]]:
        """Pairs of a token table ``(V, E)`` and a position table that are added up."""

    def forward(
        self, token_ids_BT: Tensor, positions_BT: Tensor, token_types_BT: Tensor, dropout: Dropout | None = None
    ) -> Tensor:
        """Returns ``(B, T, E)``."""
        pairs, norm = self.tables(), self.layer_norm
        tables = [*(table for pair in pairs for table in pair), self.token_type.weight]
        indices = [*(token_ids_BT, positions_BT) * len(pairs), token_types_BT]
        return self.kernels.embed(tables, indices, norm.weight, norm.bias, norm.eps, dropout)


class Embeddings(_Summed):
    """Tables of its own."""

    def __init__(self, config: ModelConfig, vocab_size: int, kernels: Kernels, embedding_size: int | None = None):
        size = embedding_size or config.embedding_size
        super().__init__(config, size, kernels)
        self.token = nn.Embedding(vocab_size, size)
        self.position = nn.Embedding(config.max_positions, size)

    def tables(self) -> list[tuple[Tensor, Tensor]]:
        """Its own."""
        return [(self.token.weight, self.position.weight)]

    def token_table(self) -> Tensor:
        """The table that output layers are tied to, ``(V, E)``."""
        return self.token.weight


class BorrowingEmbeddings(_Summed):
    """Token and position tables of another network, types and LayerNorm of its own (what the paper's text names)."""

    def __init__(self, config: ModelConfig, lender: Embeddings):
        super().__init__(config, lender.token.embedding_dim, lender.kernels)
        self._lender = (lender,)  # in a tuple, since the lender's owner registers it

    def tables(self) -> list[tuple[Tensor, Tensor]]:
        """The lender's."""
        return self._lender[0].tables()

    def token_table(self) -> Tensor:
        """The lender's, ``(V, E)``."""
        return self._lender[0].token_table()


class DisentangledEmbeddings(_Summed):
    """Another network's tables without gradient, plus differences that start at zero.

    Gradient-disentangled embedding sharing (He, Gao and Chen, DeBERTaV3, 2021): the generator's
    loss alone moves the common tables, the discriminator learns what it needs on top.
    """

    def __init__(self, config: ModelConfig, vocab_size: int, lender: Embeddings):
        size = lender.token.embedding_dim
        super().__init__(config, size, lender.kernels)
        self._lender = (lender,)
        self.token_difference = nn.Embedding(vocab_size, size)
        self.position_difference = nn.Embedding(config.max_positions, size)

    def tables(self) -> list[tuple[Tensor, Tensor]]:
        """The lender's without gradient, and the differences."""
        lent = [(token.detach(), position.detach()) for token, position in self._lender[0].tables()]
        return [*lent, (self.token_difference.weight, self.position_difference.weight)]

    def token_table(self) -> Tensor:
        """The effective table, ``(V, E)``."""
        return self._lender[0].token_table().detach() + self.token_difference.weight

    def start_as_the_lender(self) -> None:
        """Sets the differences to zero."""
        nn.init.zeros_(self.token_difference.weight)
        nn.init.zeros_(self.position_difference.weight)


AnyEmbeddings = Embeddings | BorrowingEmbeddings | DisentangledEmbeddings


def build_embeddings(
    config: ModelConfig, objective: ObjectiveConfig, vocab_size: int, kernels: Kernels
) -> tuple[AnyEmbeddings, AnyEmbeddings | None]:
    """The discriminator's, and the generator's where it has some of its own."""
    own = Embeddings(config, vocab_size, kernels)
    if not objective.has_generator or objective.sharing == "all":
        return own, None
    if objective.sharing == "embeddings":
        return own, BorrowingEmbeddings(config, own) if objective.shared_tables == "token_and_position" else None
    generators = Embeddings(config, vocab_size, kernels, generator_embedding_size(config, objective))
    if objective.sharing == "gdes":
        return DisentangledEmbeddings(config, vocab_size, generators), generators
    return own, generators
