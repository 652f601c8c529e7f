"""The three stages, the chain that joins them, and the command line."""

__version__ = "0.1.0"
