"""What is trained and how: objectives, trainings and ways of sharing weights; needs no torch.

The paper's comparisons (Clark et al., ICLR 2020, sections 3.2 to 3.4, appendix F) are
values of three keys. A combination that means nothing is refused with the reason.
"""

from typing import Any, Literal

from pydantic import Field, model_validator

from model.config import ModelConfig, Section

Objective = Literal["electra", "electra_15", "replace_mlm", "all_tokens_mlm", "mlm"]
Training = Literal["joint", "two_stage", "adversarial"]
Sharing = Literal["none", "embeddings", "all", "gdes"]
GeneratorKind = Literal["network", "unigram", "uniform"]

Trains = Literal["both", "generator", "discriminator"]
"""Who learns in a step; under two-stage training the other one rests."""

RECIPES: dict[str, dict[str, Any]] = {
    # Distinct positions, an exact number of them; losses over counts of the whole global batch.
    "fixed": {"position_sampling": "distinct", "loss_normalization": "global"},
    # google-research/electra: positions drawn with replacement; the mean of each replica's own means.
    "released": {"position_sampling": "with_replacement", "loss_normalization": "micro_batch"},
}
"""Values of ``objective.*`` that ``recipe`` sets where a file does not."""

SHARING_FOLLOWS_FROM = ("name", "training", "generator")
"""Keys of ``objective`` that ``default_sharing`` reads."""


def default_sharing(objective: dict[str, Any]) -> Sharing:
    """``objective.sharing`` where it is not given: embeddings, or none where tables cannot be shared."""
    alone = objective.get("name") == "mlm" or objective.get("generator", "network") != "network"
    return "none" if alone or objective.get("training") == "two_stage" else "embeddings"


class ObjectiveConfig(Section):
    """What is trained, and on what."""

    name: Objective = Field(
        "electra",
        description="electra: replaced or not, over all tokens; electra_15: over selected positions only; replace_mlm: "
        "the original token at selected positions, from generator samples; all_tokens_mlm: the original token "
        "everywhere, with a copy gate; mlm: BERT, one network (paper, 3.4).",
    )
    training: Training = Field(
        "joint",
        description="joint: both networks in one loss; two_stage: the generator first, then the discriminator from its "
        "weights; adversarial: the generator by policy gradient (appendix F).",
    )
    sharing: Sharing = Field(
        "embeddings",
        description="embeddings: the tables in common (released); none; all: one encoder, equal sizes; gdes: the "
        "discriminator's tables are the generator's, without gradient, plus a difference (DeBERTa-v3). "
        "Default where tables cannot be shared (mlm, two_stage, unigram): none.",
    )
    shared_tables: Literal["all", "token_and_position"] = Field(
        "all", description="all: also types and LayerNorm, as released; token_and_position: what the paper names."
    )
    generator: GeneratorKind = Field(
        "network",
        description="network; the controls: unigram draws replacements by their frequency in the training text, "
        "uniform all alike, never [PAD], [CLS], [SEP] or [MASK] (paper, 3.2; released: uniform_generator, of all ids).",
    )
    generator_steps: int | None = Field(
        None, ge=1, description="Steps of two_stage's first stage; null: half of train.steps."
    )
    mask_fraction: float = Field(
        0.15,
        gt=0,
        lt=1,
        description="Share of a row's positions that are selected: 0.15, and 0.25 for Large.",
    )
    position_sampling: Literal["distinct", "with_replacement"] = Field(
        "distinct",
        description="distinct: an exact number of different positions; with_replacement: as released, where samples "
        "that meet at one position are averaged as ids.",
    )
    mask_token_share: float = Field(
        0.85,
        gt=0,
        le=1,
        description="Selected positions that show [MASK]; the others stay (pretrain_helpers.py). Paper: 1.",
    )
    random_token_share: float = Field(
        0.0, ge=0, lt=1, description="Selected positions that show a random token: 0 as released; BERT: 0.1, with 0.8."
    )
    select_unknown: bool = Field(True, description="[UNK] may be selected, as released.")
    label_rule: Literal["differs", "selected"] = Field(
        "differs",
        description="Labelled replaced: differs from the original (a lucky sample counts as original, released), "
        "or every selected position, as Electric does.",
    )
    score_special_tokens: bool = Field(True, description="[CLS] and [SEP] count in the loss over all tokens, released.")
    loss_normalization: Literal["global", "micro_batch"] = Field(
        "global",
        description="global: sums over counts of the global batch; micro_batch: the mean of each micro-batch's own "
        "means, as released averages replicas.",
    )
    generator_loss_weight: float = Field(1.0, ge=0, description="Weight of the generator's loss.")
    discriminator_loss_weight: float = Field(50.0, ge=0, description="Lambda of the paper: replaced token detection.")
    prediction_loss_weight: float = Field(
        1.0, ge=0, description="Weight of the original token's loss: replace_mlm, all_tokens_mlm, mlm."
    )
    temperature: float = Field(1.0, gt=0, description="Of the softmax that replacements are sampled from.")
    disallow_correct: bool = Field(False, description="Never sample the original token; released: off.")

    @model_validator(mode="before")
    @classmethod
    def _share_nothing_where_nothing_can_be(cls, given: Any) -> Any:
        return {"sharing": default_sharing(given)} | given if isinstance(given, dict) else given

    @property
    def has_generator(self) -> bool:
        """Whether a generator network is trained."""
        return self.name != "mlm" and self.generator == "network"

    @property
    def detects(self) -> bool:
        """Whether the discriminator tells replaced tokens from original ones; else it predicts the original."""
        return self.name in ("electra", "electra_15")

    def masked_per_row(self, sequence_length: int) -> int:
        """Positions selected in a full row of ``sequence_length`` tokens.

        As released: their share, at most what is reserved for them, int((p + 0.005) T).
        """
        reserved = int((self.mask_fraction + 0.005) * sequence_length)
        return max(1, min(reserved, round(sequence_length * self.mask_fraction)))


def generator_embedding_size(model: ModelConfig, objective: ObjectiveConfig) -> int:
    """Width of the tables that the generator reads.

    Its own ones are as wide as its hidden size (released: ``untied_generator_embeddings``), but
    under ``two_stage`` as wide as the discriminator's, which start from them.
    """
    if objective.sharing != "none" or objective.training == "two_stage":
        return model.embedding_size
    return model.generator_embedding_size or model.generator.hidden_size


def refuse_senseless(model: ModelConfig, objective: ObjectiveConfig) -> None:
    """Refuses combinations that mean nothing.

    Raises:
        ValueError: Names the keys, the reason and the remedy.
    """
    for applies, message in _senseless(model, objective):
        if applies:
            raise ValueError(message)


def _senseless(model: ModelConfig, objective: ObjectiveConfig) -> list[tuple[bool, str]]:
    name, training, sharing = objective.name, objective.training, objective.sharing
    same_size = model.generator.fits(model.discriminator)
    equal = "set model.generator_width=1 and model.generator_depth=1"
    two_stage, control = training == "two_stage", objective.generator != "network"
    return [
        (name == "mlm" and training != "joint",
         f"objective.training={training} needs a generator, and objective.name=mlm trains one network; set joint"),
        (name == "mlm" and sharing != "none",
         f"objective.sharing={sharing} needs two networks, and objective.name=mlm trains one; set none"),
        (name == "mlm" and control,
         f"objective.generator={objective.generator} draws replacements, and objective.name=mlm has none; set network"),
        (control and training != "joint",
         f"objective.training={training} trains the generator, and objective.generator={objective.generator} has no "
         "weights; set joint"),
        (control and sharing != "none",
         f"objective.sharing={sharing} needs a generator with weights, and objective.generator={objective.generator} "
         "has none; set objective.sharing=none"),
        (sharing == "all" and training == "adversarial",
         "objective.sharing=all makes both networks one, which cannot play against itself (objective.training="
         "adversarial); set objective.sharing=embeddings"),
        (two_stage and sharing in ("embeddings", "all"),
         f"objective.training=two_stage freezes the generator while the discriminator learns, so objective.sharing="
         f"{sharing} would change what is frozen; set objective.sharing=none"),
        (training == "adversarial" and not objective.detects,
         f"objective.training=adversarial rewards the generator for what the discriminator takes for original, and "
         f"objective.name={name} detects nothing; set electra or electra_15"),
        (sharing == "all" and not same_size,
         f"objective.sharing=all needs networks of one size; {equal}"),
        (two_stage and not same_size,
         f"objective.training=two_stage starts the discriminator as the generator, whose weights must fit; {equal}"),
        (sharing == "all" and model.generator_dropout is not None,
         "model.generator_dropout must be null where objective.sharing=all makes both networks one"),
        (model.generator_embedding_size is not None and (sharing != "none" or two_stage or not objective.has_generator),
         "model.generator_embedding_size is for a generator with tables of its own: objective.sharing=none and joint "
         "or adversarial training; remove it"),
        (objective.shared_tables != "all" and sharing != "embeddings",
         f"objective.shared_tables={objective.shared_tables} is for objective.sharing=embeddings, not {sharing}"),
        (objective.generator_steps is not None and not two_stage,
         "objective.generator_steps is for objective.training=two_stage; remove it"),
        (name == "electra_15" and (objective.label_rule == "selected" or objective.disallow_correct),
         "objective.name=electra_15 scores selected positions only, and with objective.label_rule=selected or "
         "objective.disallow_correct=true all of them are replaced: there is nothing to tell apart"),
        (objective.mask_token_share + objective.random_token_share > 1,
         f"objective.mask_token_share={objective.mask_token_share} and objective.random_token_share="
         f"{objective.random_token_share} exceed 1 together"),
    ]  # fmt: skip
