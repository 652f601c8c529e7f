"""The state of a fine-tuning run that is not at its end: weights and moments in one safetensors file."""

from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from data_shards.temporaries import publish, temporary_path
from pipeline.log import logger
from pipeline.optimizer import ElectraAdamW

_MOMENTS = ("exp_avg", "exp_avg_sq")


class PartialState:
    """A file beside a unit's result; whole or absent."""

    def __init__(self, path: Path, fingerprint: str):
        """``fingerprint`` is the unit's; a file of another one is not used."""
        self._path, self._fingerprint = path, fingerprint

    def save(self, model: nn.Module, optimizer: ElectraAdamW, step: int) -> None:
        """Writes the state after ``step`` updates."""
        about = {"step": str(step), "fingerprint": self._fingerprint}
        write_tensors(self._path, _tensors(model, optimizer), about)

    @torch.no_grad()
    def load(self, model: nn.Module, optimizer: ElectraAdamW) -> int:
        """Restores the state if there is one that can be used; returns the number of updates behind it."""
        if not self._path.exists():
            return 0
        tensors = _tensors(model, optimizer)
        try:
            with safe_open(self._path, framework="pt") as file:
                about = file.metadata() or {}
                if about.get("fingerprint") != self._fingerprint:
                    return 0
                held = {name: file.get_tensor(name) for name in tensors}  # all of it, before anything changes
            step = int(about["step"])
        except (SafetensorError, KeyError, ValueError, OSError) as error:
            logger.warning("%s: damaged (%s); the unit begins again", self._path, error)
            return 0
        for name, tensor in tensors.items():
            tensor.copy_(held[name])
        return step

    def discard(self) -> None:
        """Removes the file; the unit is done."""
        self._path.unlink(missing_ok=True)


def fingerprint_of(path: Path) -> str | None:
    """The fingerprint that a safetensors file was written with; None where there is none that can be read."""
    try:
        with safe_open(path, framework="pt") as file:
            return (file.metadata() or {}).get("fingerprint")
    except (SafetensorError, OSError):
        return None


def write_tensors(path: Path, tensors: dict[str, Tensor], about: dict[str, str]) -> None:
    """A safetensors file, whole or absent.

    Raises:
        OSError: It cannot be written.
    """
    temporary = temporary_path(path)
    try:
        save_file({name: tensor.detach().contiguous().cpu() for name, tensor in tensors.items()}, temporary, about)
        publish(temporary, path)
    except (SafetensorError, OSError) as error:
        raise OSError(f"{path}: cannot be written ({error}); check permissions and free space") from error
    finally:
        temporary.unlink(missing_ok=True)


def _tensors(model: nn.Module, optimizer: ElectraAdamW) -> dict[str, Tensor]:
    """Everything that training changes, by name; moments that do not exist yet are made."""
    tensors = {}
    for name, parameter in model.named_parameters():
        optimizer.create_state([parameter])
        tensors[f"weight.{name}"] = parameter
        tensors |= {f"{moment}.{name}": optimizer.state[parameter][moment] for moment in _MOMENTS}
    return tensors
