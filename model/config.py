"""Hyperparameters of the networks and of the objective; needs no torch.

Sources: the ELECTRA paper (Clark et al., ICLR 2020, tables 6 and 7) and
google-research/electra (``configure_pretraining.py``, ``util/training_utils.py``).
"""

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

Size = Literal["tiny", "small", "small_plus_plus", "base", "large"]

_SMALL = {
    "hidden_layers": 12, "hidden_size": 256, "attention_heads": 4, "feed_forward_size": 1024,
    "embedding_size": 128, "generator_width": 1 / 4,
}  # fmt: skip

SIZES: dict[str, dict[str, Any]] = {
    # Not in the paper: what two CPU cores can train.
    "tiny": {
        "hidden_layers": 4, "hidden_size": 128, "attention_heads": 2, "feed_forward_size": 512,
        "embedding_size": 128, "generator_width": 1 / 2,
    },
    "small": _SMALL,
    "small_plus_plus": _SMALL | {"generator_width": 1.0},  # the released "small" checkpoints
    "base": {
        "hidden_layers": 12, "hidden_size": 768, "attention_heads": 12, "feed_forward_size": 3072,
        "embedding_size": 768, "generator_width": 1 / 3,
    },
    "large": {
        "hidden_layers": 24, "hidden_size": 1024, "attention_heads": 16, "feed_forward_size": 4096,
        "embedding_size": 1024, "generator_width": 1 / 4,
    },
}  # fmt: skip


class Section(BaseModel):
    """A frozen part of a configuration; unknown keys are errors."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False, protected_namespaces=())


class ModelConfig(Section):
    """``size`` sets the published values; a file states only what differs from them."""

    size: Size = Field("small", description="Published size whose values fill the keys that are not given.")
    hidden_layers: int = Field(ge=1, description="Transformer layers of the discriminator.")
    hidden_size: int = Field(ge=1, description="Width of the discriminator, a multiple of attention_heads.")
    attention_heads: int = Field(ge=1, description="Attention heads of the discriminator.")
    feed_forward_size: int = Field(ge=1, description="Inner width of the discriminator's feed-forward layers.")
    embedding_size: int = Field(ge=1, description="Width of the embedding tables; projected when it differs.")
    generator_width: float = Field(gt=0, le=4, description="Generator's width over the discriminator's, 1/4 to 1.")
    generator_depth: float = Field(1.0, gt=0, le=4, description="Generator's layers over the discriminator's.")
    max_positions: int = Field(512, ge=8, description="Rows of the position table: longest piece, in tokens.")
    dropout: float = Field(0.1, ge=0, lt=1, description="After embeddings, attention output and feed-forward.")
    attention_dropout: float = Field(0.1, ge=0, lt=1, description="On attention probabilities.")
    layer_norm_eps: float = Field(1e-12, gt=0, description="Added to the variance in LayerNorm.")
    initializer_range: float = Field(0.02, gt=0, description="Deviation of the truncated normal initialisation.")
    activation: Literal["gelu", "gelu_tanh"] = Field("gelu", description="Exact (erf) GELU, or its tanh form.")

    @model_validator(mode="before")
    @classmethod
    def _fill_from_size(cls, given: Any) -> Any:
        if not isinstance(given, dict):
            return given
        return SIZES.get(given.get("size", "small"), {}) | given

    @model_validator(mode="after")
    def _check_heads(self) -> "ModelConfig":
        if self.hidden_size % self.attention_heads:
            raise ValueError(
                f"hidden_size={self.hidden_size} is not a multiple of attention_heads={self.attention_heads}"
            )
        return self

    @property
    def discriminator(self) -> "EncoderShape":
        """Shape of the discriminator's encoder."""
        return EncoderShape(
            layers=self.hidden_layers,
            hidden_size=self.hidden_size,
            heads=self.attention_heads,
            feed_forward_size=self.feed_forward_size,
        )

    @property
    def generator(self) -> "EncoderShape":
        """Shape of the generator's encoder: width scales, the head size stays."""
        hidden_size = round(self.hidden_size * self.generator_width)
        heads = max(1, hidden_size // (self.hidden_size // self.attention_heads))
        return EncoderShape(
            layers=max(1, round(self.hidden_layers * self.generator_depth)),
            hidden_size=hidden_size - hidden_size % heads,
            heads=heads,
            feed_forward_size=round(self.feed_forward_size * self.generator_width),
        )


class EncoderShape(Section):
    """Shape of one transformer encoder."""

    layers: int
    hidden_size: int
    heads: int
    feed_forward_size: int


class ObjectiveConfig(Section):
    """What is trained, and on what."""

    name: Literal["electra"] = Field("electra", description="Replaced token detection over all tokens.")
    training: Literal["joint"] = Field("joint", description="Generator and discriminator in one step, one loss.")
    sharing: Literal["embeddings", "none"] = Field(
        "embeddings",
        description="Token, position and type tables and their LayerNorm in common (released), or none.",
    )
    mask_fraction: float = Field(
        0.15,
        gt=0,
        lt=1,
        description="Share of a row's positions that are selected: 0.15, and 0.25 for Large.",
    )
    mask_token_share: float = Field(
        0.85,
        gt=0,
        le=1,
        description="Selected positions that show [MASK]; the others stay (pretrain_helpers.py).",
    )
    generator_loss_weight: float = Field(1.0, ge=0, description="Weight of the generator's MLM loss.")
    discriminator_loss_weight: float = Field(50.0, ge=0, description="Lambda of the paper.")
    temperature: float = Field(1.0, gt=0, description="Of the softmax that replacements are sampled from.")
    disallow_correct: bool = Field(False, description="Never sample the original token.")

    def masked_per_row(self, sequence_length: int) -> int:
        """Positions selected in a full row of ``sequence_length`` tokens."""
        return max(1, round(sequence_length * self.mask_fraction))
