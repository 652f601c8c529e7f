"""Failures that a corpus, a tokenizer or a disk can cause.

``exit_code`` is what the command line returns: 65 for damaged data, 78 for a
setting that does not fit the data.
"""


class DataError(Exception):
    """Ends the program with ``exit_code`` and one message."""

    exit_code = 1


class DamagedDataError(DataError):
    """A file is missing bytes, undecodable or not what its manifest says."""

    exit_code = 65


class DataSettingError(DataError):
    """A setting asks for something that the data at hand cannot give."""

    exit_code = 78
