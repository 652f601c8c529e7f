"""``python -m pipeline`` is ``electra``."""

from pipeline.cli import main

main()
