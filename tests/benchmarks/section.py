"""What a section of the suite gets, fills in, and may raise."""

import time
from dataclasses import dataclass, field
from typing import Any


class CheckFailedError(Exception):
    """Measured values break a limit; the results stay in the report."""


class NotRunError(Exception):
    """The section cannot run here; the message says why. Never counted as passed."""


class SectionTimeoutError(BaseException):
    """The section's share of the time budget is spent. No ``except Exception`` may hold it up."""


@dataclass
class Context:
    """One section in progress.

    Attributes:
        device: ``cuda`` or ``cpu``.
        is_tiny: Shapes that take seconds on two CPU cores instead of those of ELECTRA-Large.
        seed: Of the random inputs; another one each time unless given, recorded in the report.
        deadline: ``time.monotonic()`` at which the section is stopped.
        results: Numbers by name, with units; what is here survives a failure.
    """

    device: str
    is_tiny: bool
    seed: int
    deadline: float
    results: dict[str, Any] = field(default_factory=dict)

    @property
    def is_cuda(self) -> bool:
        """Whether numbers are a GPU's."""
        return self.device == "cuda"

    def left_s(self) -> float:
        """Seconds until the section is stopped."""
        return self.deadline - time.monotonic()
