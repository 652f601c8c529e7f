"""Failures with an exit code. A message gives the value, the constraint and the remedy.

The codes are an interface: Slurm scripts and users' scripts branch on them.
"""

from data_shards.errors import DataError


class ElectraError(Exception):
    """Ends the program with ``exit_code`` and one message on stderr."""

    exit_code = 1


class UsageError(ElectraError):
    """The command line cannot be understood."""

    exit_code = 64


class DamagedError(ElectraError):
    """Data or a checkpoint is not what it was when it was written."""

    exit_code = 65


class PeerLostError(ElectraError):
    """Another process is gone. The launcher starts all again; outside of it the code comes out as 1."""

    exit_code = 75


class StartAgainError(ElectraError):
    """What is on disk is good, what is in memory is not. The launcher starts all processes again."""

    exit_code = 75


class ConfigError(ElectraError):
    """A setting is wrong, or does not fit what is on disk."""

    exit_code = 78


class StoppedEarly(ElectraError):  # noqa: N818 - not a failure
    """Everything is saved; the same command goes on from here."""

    exit_code = 85


class StoppedByFile(StoppedEarly):
    """A user's file asks for it: nothing goes on until that is removed."""


class DoNotRequeueError(ElectraError):
    """Running it again would end the same way."""

    exit_code = 93


FORESEEN = (ElectraError, DataError)
"""What a user, a disk or a cluster can cause."""
