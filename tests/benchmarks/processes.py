"""Other processes of this repository's programs, free of what belongs to this one."""

import os
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[2]

_FOREIGN = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
_FOREIGN_PREFIXES = ("SLURM_", "MLFLOW_", "ELECTRA_")


def clean_environment() -> dict[str, str]:
    """This environment without an outer launcher's, scheduler's or tracker's, the repository importable."""
    environment = {
        name: value
        for name, value in os.environ.items()
        if name not in _FOREIGN and not name.startswith(_FOREIGN_PREFIXES)
    }
    paths = [str(REPOSITORY), *filter(None, [os.environ.get("PYTHONPATH")])]
    return environment | {"PYTHONPATH": os.pathsep.join(paths)}
