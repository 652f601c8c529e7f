"""Published scores to set ours beside, in per cent, of dev sets (chunking: the test set) and of single models.

Sources: tables of Clark et al., *ELECTRA* (ICLR 2020), which quote other papers for other models; and the README of
google-research/electra, the medians of the released checkpoints. FLOPs are in the paper's counting (see
``model.flops_paper``): as printed there, else what its script gives. None where neither has them.

The README's 80.5 on SQuAD 2.0 for the released Base is the score of the paper's Base, and left out here.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

Size = Literal["small", "base", "large"]


@dataclass(frozen=True)
class Column:
    """A score that the paper reports.

    Attributes:
        task: Our name of the task.
        metric: Our name of the metric.
        heading: For tables.
    """

    task: str
    metric: str
    heading: str

    @property
    def key(self) -> str:
        """Its name in ``Published.scores``."""
        return f"{self.task}/{self.metric}"


GLUE_COLUMNS = (
    Column("cola", "matthews", "CoLA"),
    Column("sst2", "accuracy", "SST-2"),
    Column("mrpc", "accuracy", "MRPC"),
    Column("stsb", "spearman", "STS-B"),
    Column("qqp", "accuracy", "QQP"),
    Column("mnli", "accuracy", "MNLI-m"),
    Column("qnli", "accuracy", "QNLI"),
    Column("rte", "accuracy", "RTE"),
)
"""The eight whose mean is the GLUE average of the paper, in its order; WNLI is not among them."""

OTHER_COLUMNS = (
    Column("squad1", "exact", "SQuAD 1.1 EM"),
    Column("squad1", "f1", "SQuAD 1.1 F1"),
    Column("squad2", "exact", "SQuAD 2.0 EM"),
    Column("squad2", "f1", "SQuAD 2.0 F1"),
    Column("chunk", "span_f1", "Chunking F1"),
)


@dataclass(frozen=True)
class Published:
    """A model's published scores.

    Attributes:
        family: Of the model, for plots.
        flops: Of its pretraining, in the paper's counting.
        scores: By the columns' keys, in per cent.
        printed_average: GLUE average as printed, in per cent.
    """

    model: str
    family: str
    size: Size
    flops: float | None
    source: str
    scores: Mapping[str, float] = field(default_factory=dict)
    printed_average: float | None = None

    @property
    def glue_average(self) -> float | None:
        """As printed, else the mean of the eight tasks; None if neither is published."""
        values = [self.scores.get(column.key) for column in GLUE_COLUMNS]
        known = [value for value in values if value is not None]
        if self.printed_average is not None or len(known) < len(GLUE_COLUMNS):
            return self.printed_average
        return sum(known) / len(known)


def _glue(row: str) -> dict[str, float]:
    return {column.key: float(cell) for column, cell in zip(GLUE_COLUMNS, row.split(), strict=True)}


def _others(row: str) -> dict[str, float]:
    """SQuAD 1.1 EM and F1, SQuAD 2.0 EM and F1, chunking F1; "-" where nothing is published."""
    cells = zip(OTHER_COLUMNS, row.split(), strict=True)
    return {column.key: float(cell) for column, cell in cells if cell != "-"}


_T1, _T2, _T4 = "ELECTRA paper, table 1", "ELECTRA paper, table 2", "ELECTRA paper, table 4"
_T2_T4 = "ELECTRA paper, tables 2 and 4"
_README = "README of google-research/electra"

_SMALL = (
    Published("BERT-Small", "BERT", "small", 1.4e18, _T1, printed_average=75.1),
    Published("ELECTRA-Small, 6.25 % of the steps", "ELECTRA", "small", 8.9e16, _T1, printed_average=74.1),
    Published("ELECTRA-Small, 12.5 % of the steps", "ELECTRA", "small", 1.8e17, _T1, printed_average=76.0),
    Published("ELECTRA-Small, 25 % of the steps", "ELECTRA", "small", 3.6e17, _T1, printed_average=77.7),
    Published("ELECTRA-Small, 50 % of the steps", "ELECTRA", "small", 7.1e17, _T1, printed_average=79.0),
    Published("ELECTRA-Small", "ELECTRA", "small", 1.4e18, _T1, printed_average=79.9),
    Published(
        "ELECTRA-Small-OWT", "ELECTRA", "small", 1.4e18, _README, _glue("56.8 88.3 87.4 86.8 88.3 78.9 87.9 68.5")
    ),
    Published(
        "ELECTRA-Small++ (released)", "ELECTRA", "small", 3.6e19, _README,
        _glue("57.0 91.2 88.0 87.5 89.0 81.3 88.4 66.7") | _others("75.8 - 70.1 - 96.5"),
    ),
)  # fmt: skip

_BASE = (
    Published("ELMo", "other", "base", 3.3e18, _T1, printed_average=71.2),
    Published("GPT", "other", "base", 4.0e19, _T1, printed_average=78.8),
    Published(
        "BERT-Base", "BERT", "base", 6.4e19, "ELECTRA paper, tables 1 and 4",
        _others("80.8 88.5 - - -"), printed_average=82.2,
    ),
    Published("XLNet-Base", "XLNet", "base", None, _T4, _others("81.3 - 78.5 - -")),
    Published(
        "ELECTRA-Base", "ELECTRA", "base", 6.4e19, "ELECTRA paper, tables 1 and 4",
        _others("84.5 90.8 80.5 83.3 -"), printed_average=85.1,
    ),
    Published(
        "ELECTRA-Base++ (released)", "ELECTRA", "base", 3.3e20, _README,
        _glue("67.7 95.1 89.5 91.2 91.5 88.8 93.2 82.7") | _others("86.8 - - - 97.1"),
    ),
)  # fmt: skip

_LARGE = (
    Published(
        "BERT-Large", "BERT", "large", 1.9e20, _T2_T4,
        _glue("60.6 93.2 88.0 90.0 91.3 86.6 92.3 70.4") | _others("84.1 90.9 79.0 81.8 -"), 84.0,
    ),
    Published(
        "BERT-Large (ELECTRA's authors)", "BERT", "large", 7.1e20, _T2_T4,
        _glue("67.0 95.9 89.1 91.2 91.5 89.6 93.5 79.5") | _others("88.0 93.7 84.7 87.5 -"), 87.2,
    ),
    Published("SpanBERT", "BERT", "large", None, _T4, _others("88.8 94.6 85.7 88.7 -")),
    Published(
        "RoBERTa-100K", "RoBERTa", "large", 6.4e20, _T2_T4,
        _glue("66.1 95.6 91.4 92.2 92.0 89.3 94.0 82.7") | _others("- 94.0 - 87.7 -"), 87.9,
    ),
    Published(
        "RoBERTa-500K", "RoBERTa", "large", 3.2e21, _T2_T4,
        _glue("68.0 96.4 90.9 92.1 92.2 90.2 94.7 86.6") | _others("88.9 94.6 86.5 89.4 -"), 88.9,
    ),
    Published(
        "XLNet-Large", "XLNet", "large", 3.9e21, _T2_T4,
        _glue("69.0 97.0 90.8 92.2 92.3 90.8 94.9 85.9") | _others("89.7 95.1 87.9 90.6 -"), 89.1,
    ),
    Published("ALBERT", "other", "large", 3.1e22, _T4, _others("89.3 94.8 87.4 90.2 -")),
    Published(
        "ELECTRA-400K", "ELECTRA", "large", 7.1e20, _T2_T4,
        _glue("69.3 96.0 90.6 92.1 92.4 90.5 94.5 86.8") | _others("88.7 94.2 86.9 89.6 -"), 89.0,
    ),
    Published(
        "ELECTRA-1.75M", "ELECTRA", "large", 3.1e21, _T2_T4,
        _glue("69.1 96.9 90.8 92.6 92.4 90.9 95.0 88.0") | _others("89.7 94.9 88.0 90.6 -"), 89.5,
    ),
    Published(
        "ELECTRA-1.75M (released)", "ELECTRA", "large", 3.1e21, _README,
        _glue("69.1 96.9 90.8 92.6 92.4 90.9 95.0 88.0") | _others("89.7 - 88.1 - 97.2"),
    ),
)  # fmt: skip

PUBLISHED = _SMALL + _BASE + _LARGE
