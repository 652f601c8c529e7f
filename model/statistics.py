"""Sums over a micro-batch from which every metric follows.

Sums add up over micro-batches and processes; ratios do not. Hence one short
vector of sums, and ``metrics`` at the end. What an objective does not have stays
zero, and its ratios are left out.

Shapes: B rows, T tokens of a row, N selected positions, V vocabulary.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

FIELDS = (
    "masked",               # selected positions
    "generator_nll",        # sum of the generator's negative log-likelihood there
    "generator_correct",
    "concealed",            # selected positions where the masked language model does not see the original
    "concealed_nll",        # the same sum on those alone
    "resting",              # selected positions of a generator that learns nothing: a frozen one, or a control
    "tokens",
    "replaced",             # tokens that differ from the original
    "detected",             # tokens that count in the detection's loss
    "detected_replaced",    # … of which replaced
    "discriminator_bce",
    "discriminator_correct",
    "flagged",              # tokens called replaced
    "flagged_replaced",     # … and rightly so
    "ordered_pairs",        # pairs (replaced, original) of a micro-batch in the right order
    "pairs",
    "predicted",            # tokens whose original is predicted by the main network
    "prediction_nll",
    "prediction_correct",
    "rewarded",             # samples with a reward (adversarial)
    "reward",
    "policy_loss",
    "baseline_bce",
)  # fmt: skip


@dataclass
class Statistics:
    """A float64 vector of the sums in ``FIELDS``."""

    sums: Tensor

    @classmethod
    @torch.no_grad()
    def of(cls, device: torch.device | str, sums: dict[str, Tensor]) -> "Statistics":
        """The sums that are given, zero for the others."""
        zero = torch.zeros((), dtype=torch.float64, device=device)
        return cls(torch.stack([sums[name].double() if name in sums else zero for name in FIELDS]))

    @classmethod
    def zeros(cls, device: torch.device | str = "cpu") -> "Statistics":
        """Nothing counted yet."""
        return cls(torch.zeros(len(FIELDS), dtype=torch.float64, device=device))

    def __add__(self, other: "Statistics") -> "Statistics":
        return Statistics(self.sums + other.sums)

    def metrics(
        self, generator_weight: float, discriminator_weight: float, prediction_weight: float = 1.0
    ) -> dict[str, float]:
        """Ratios by the names under which they are logged; those without a denominator are left out.

        ``train/total_loss`` is what is trained on; it is left out where no loss was counted.
        """
        s: dict[str, float] = dict(zip(FIELDS, self.sums.tolist(), strict=True))
        ratios = {
            "generator_mlm_loss": ("generator_nll", "masked"),
            "mask_token_loss": ("concealed_nll", "concealed"),
            "discriminator_rtd_loss": ("discriminator_bce", "detected"),
            "prediction_loss": ("prediction_nll", "predicted"),
            "policy_loss": ("policy_loss", "rewarded"),
            "baseline_loss": ("baseline_bce", "rewarded"),
            "reward": ("reward", "rewarded"),
            "generator_accuracy": ("generator_correct", "masked"),
            "prediction_accuracy": ("prediction_correct", "predicted"),
            "discriminator_accuracy": ("discriminator_correct", "detected"),
            "discriminator_auc": ("ordered_pairs", "pairs"),
            "discriminator_precision": ("flagged_replaced", "flagged"),
            "discriminator_recall": ("flagged_replaced", "detected_replaced"),
            "replaced_fraction": ("replaced", "tokens"),
        }
        found = {name: s[above] / s[below] for name, (above, below) in ratios.items() if s[below]}
        generator = ("policy_loss", "baseline_loss") if s["rewarded"] else ("generator_mlm_loss",)
        # The loss is divided by all that is selected, though samples of equal position leave some without reward.
        learning_share = ((s["rewarded"] or s["masked"]) - s["resting"]) / s["masked"] if s["masked"] else 0.0
        weights = dict.fromkeys(generator, generator_weight * learning_share) if learning_share else {}
        weights |= {"discriminator_rtd_loss": discriminator_weight, "prediction_loss": prediction_weight}
        terms = [weight * found[name] for name, weight in weights.items() if name in found]
        total = {"total_loss": sum(terms)} if terms else {}
        return {f"train/{name}": value for name, value in (total | found).items()}


@torch.no_grad()
def generator_sums(nll_N: Tensor, is_correct_N: Tensor, weights_N: Tensor, is_concealed_N: Tensor) -> dict[str, Tensor]:
    """Sums of the masked language model at the selected positions."""
    concealed_N = is_concealed_N * weights_N
    return {
        "masked": weights_N.sum(),
        "generator_nll": (nll_N * weights_N).sum(),
        "generator_correct": (is_correct_N * weights_N).sum(),
        "concealed": concealed_N.sum(),
        "concealed_nll": (nll_N * concealed_N).sum(),
    }


@torch.no_grad()
def pair_sums(logits_BT: Tensor, is_replaced_BT: Tensor, scored_BT: Tensor) -> dict[str, Tensor]:
    """Pairs of a replaced and an original token, of those with a weight; for the AUC."""
    counts_BT = scored_BT > 0
    ordered, pairs = count_ordered_pairs(
        logits_BT.flatten(), (is_replaced_BT & counts_BT).flatten(), (~is_replaced_BT & counts_BT).flatten()
    )
    return {"ordered_pairs": ordered, "pairs": pairs}


def count_ordered_pairs(scores_N: Tensor, positive_N: Tensor, negative_N: Tensor) -> tuple[Tensor, Tensor]:
    """Mann-Whitney's U: pairs (positive, negative) with the positive scored higher, ties counting half.

    What is neither positive nor negative, as padding is, counts for nothing.

    U over the number of pairs is the area under the ROC curve. No shape depends on the data.

    Returns:
        ``(U, pairs)``, float64 scalars.
    """
    sorted_N, order_N = scores_N.sort()
    negatives_before = F.pad(negative_N[order_N].long().cumsum(0), (1, 0))
    below_N = negatives_before[torch.searchsorted(sorted_N, scores_N, side="left")]
    not_above_N = negatives_before[torch.searchsorted(sorted_N, scores_N, side="right")]
    positive_N = positive_N.double()
    return (positive_N * (below_N + not_above_N)).sum() / 2, positive_N.sum() * negative_N.double().sum()
