"""Checkpoints: written aside, hashed, published by rename; verified before a byte is used.

    checkpoints/
      step_00012000/
        weights.safetensors      fp32, whole, by parameter name
        optimizer.safetensors    both moments, fp32, whole
        state.json               step, counters, open sums
        MANIFEST.json            size and SHA-256 of each file; written last
      LATEST                     name of the newest

Tensors are stored whole, so any ZeRO stage and any number of processes can read
what any other wrote. Nothing in a checkpoint is pickled.
"""

import errno
import hashlib
import json
import os
import shutil
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from math import isfinite
from pathlib import Path
from typing import TYPE_CHECKING, Any

from data_shards.digest import digest_file
from data_shards.store import write_json
from pipeline.errors import ConfigError, DamagedError
from pipeline.faults import Phase
from pipeline.log import logger

if TYPE_CHECKING:
    from pipeline.snapshot import Snapshot  # imports torch

MANIFEST, LATEST = "MANIFEST.json", "LATEST"
WEIGHTS, OPTIMIZER, STATE = "weights.safetensors", "optimizer.safetensors", "state.json"


def step_folder(folder: Path, step: int) -> Path:
    """Folder of the checkpoint after ``step`` optimizer steps."""
    return folder / f"step_{step:08d}"


def list_steps(folder: Path) -> list[int]:
    """Steps of published checkpoints, ascending."""
    names = (path.parent.name for path in folder.glob(f"step_*/{MANIFEST}"))
    return sorted(int(name.removeprefix("step_")) for name in names if name[5:].isdigit())


@dataclass(frozen=True)
class Checkpoint:
    """A published checkpoint whose files agree with its manifest."""

    folder: Path
    state: dict[str, Any]
    digest: str

    @property
    def step(self) -> int:
        """Optimizer steps behind it."""
        return self.state["step"]

    def tensors(self, file: str) -> Callable[[str], Any]:
        """Reader of one safetensors file: name to tensor."""
        from safetensors import safe_open

        return safe_open(self.folder / file, framework="pt").get_tensor

    def shapes(self, file: str) -> dict[str, list[int]]:
        """Shape of every tensor in a file."""
        from safetensors import safe_open

        with safe_open(self.folder / file, framework="pt") as tensors:
            return {name: tensors.get_slice(name).get_shape() for name in tensors.keys()}  # noqa: SIM118


@dataclass(frozen=True)
class Retention:
    """Which checkpoints stay.

    Attributes:
        newest: So many of the newest.
        every: Those of steps that it divides; None: none for that.
        best: The one with the lowest ``score`` in its state, of each ``scored_rows``.
        before: The newest that is so many steps older than the newest of all, and the next one, which will be
            that; None: none for that.
    """

    newest: int = 3
    every: int | None = None
    best: bool = False
    before: int | None = None


def save(
    folder: Path,
    state: dict[str, Any],
    snapshot: "Snapshot",
    retention: Retention,
    strike: Callable[[Phase], Any] = lambda _: None,
) -> Checkpoint:
    """Writes one checkpoint; a failure at any point leaves the older ones as they were.

    Args:
        folder: The ``checkpoints`` folder.
        state: JSON values; ``step`` among them.
        snapshot: The tensors.
        retention: Which checkpoints stay.
        strike: Is called when half is written, and before publication.

    Raises:
        OSError: It cannot be written, or what is on disk is not what was written.
    """
    target = step_folder(folder, state["step"])
    temporary = folder / f".tmp-{target.name}"
    try:
        _write_files(temporary, state, snapshot, strike)
    except OSError:
        shutil.rmtree(temporary, ignore_errors=True)  # its space may be what is missing
        raise
    strike("publish")
    if target.exists():  # left by an older lineage, or damaged: never deleted
        move_aside(target, "replaced")
    os.replace(temporary, target)
    _fsync(folder)
    _write_latest(folder, target.name)
    try:
        _prune(folder, retention)
    except OSError as error:  # somebody may have a file open on a network file system
        logger.warning("an old checkpoint could not be deleted (%s)", error)
    return Checkpoint(target, state, digest_file(target / MANIFEST))


def _write_files(temporary: Path, state: dict[str, Any], snapshot: "Snapshot", strike: Callable[[Phase], Any]) -> None:
    """Everything of a checkpoint, its manifest last, on disk and read again when this returns."""
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    files = {
        WEIGHTS: snapshot.weights.write(temporary / WEIGHTS),
        OPTIMIZER: snapshot.optimizer.write(temporary / OPTIMIZER, lambda: strike("write")),
    }
    text = (json.dumps(state, indent=1) + "\n").encode()
    (temporary / STATE).write_bytes(text)
    _fsync(temporary / STATE)
    files[STATE] = {"size": len(text), "sha256": hashlib.sha256(text).hexdigest()}
    for name, meant in files.items():
        if digest_file(temporary / name) != meant["sha256"]:
            raise OSError(errno.EIO, "reads otherwise than it was written", str(temporary / name))
    write_json(temporary / MANIFEST, {"step": state["step"], "files": files})
    _fsync(temporary)


def load_newest(folder: Path) -> Checkpoint | None:
    """The newest checkpoint that is intact; newer ones are moved aside and named in the log.

    Raises:
        DamagedError: There are checkpoints, but none is intact. Nothing starts afresh in silence.
        OSError: None is intact, and some could not be read: that may pass, so those stay where they are.
    """
    unreadable: list[int] = []
    steps = sorted(int(path.name[5:]) for path in folder.glob("step_*") if path.name[5:].isdigit())
    for step in reversed(steps):
        try:
            if not (step_folder(folder, step) / MANIFEST).exists():  # it was there before the folder had this name
                raise DamagedError(f"{step_folder(folder, step) / MANIFEST}: missing")
            found = load(folder, step)
        except DamagedError as error:
            aside = move_aside(step_folder(folder, step), "damaged")
            logger.warning("%s; moved to %s, trying the one before", error, aside.name)
        except OSError as error:
            unreadable.append(step)
            logger.warning("%s: cannot be read (%s); trying the one before", error.filename, error.strerror)
        else:
            for newer in unreadable:  # training goes on from before them: they belong to it no longer
                move_aside(step_folder(folder, newer), "unreadable")
            return found
    if unreadable:
        raise OSError(errno.EIO, "no checkpoint can be read; the file system may be unwell", str(folder))
    if steps:
        raise DamagedError(
            f"{folder}: none of the checkpoints at steps {', '.join(map(str, steps))} is intact; restore one "
            "from a copy, or start again with `--force pretrain`"
        )
    if (folder / LATEST).exists():
        raise DamagedError(
            f"{folder}: {LATEST} names {(folder / LATEST).read_text().strip()!r} but there is no checkpoint; "
            "restore it, or start again with `--force pretrain`"
        )
    return None


def load(folder: Path, step: int, verify: bool = True) -> Checkpoint:
    """A checkpoint whose files all have the size and SHA-256 of the manifest.

    Args:
        folder: The ``checkpoints`` folder.
        step: Which one.
        verify: False when another process has just verified it.

    Raises:
        ConfigError: No checkpoint of that step.
        DamagedError: A file is missing or differs.
        OSError: A file cannot be read.
    """
    path = step_folder(folder, step)
    if not (path / MANIFEST).exists():
        there = ", ".join(map(str, list_steps(folder))) or "none"
        raise ConfigError(f"{folder}: no checkpoint of step {step}; there are: {there}")
    try:
        manifest = json.loads((path / MANIFEST).read_text(encoding="utf-8"))
        for name, expected in manifest["files"].items() if verify else ():
            file = path / name
            if not file.is_file() or file.stat().st_size != expected["size"]:
                raise DamagedError(f"{file}: missing or not {expected['size']} bytes long")
            if digest_file(file) != expected["sha256"]:
                raise DamagedError(f"{file}: content differs from its SHA-256")
        state = json.loads((path / STATE).read_text(encoding="utf-8"))
    except (ValueError, KeyError, TypeError, IsADirectoryError) as error:
        raise DamagedError(f"{path / MANIFEST}: unreadable ({error})") from error
    return Checkpoint(path, state, digest_file(path / MANIFEST))


def _write_latest(folder: Path, name: str) -> None:
    temporary = folder / f".{LATEST}.tmp"
    temporary.write_text(f"{name}\n", encoding="utf-8")
    _fsync(temporary)
    os.replace(temporary, folder / LATEST)
    _fsync(folder)


def _prune(folder: Path, retention: Retention) -> None:
    """Deletes old checkpoints, each renamed first: what a kill leaves of it is then no checkpoint."""
    steps = list_steps(folder)
    kept = set(steps[-retention.newest :])
    if retention.every:
        kept |= {step for step in steps if step % retention.every == 0}
    if retention.best:
        kept |= _best(folder, steps)
    if retention.before:
        limit = steps[-1] - retention.before
        kept |= set([step for step in steps if step <= limit][-1:] + [step for step in steps if step > limit][:1])
    for step in steps:
        if step not in kept:
            doomed = folder / f".tmp-{step_folder(folder, step).name}"
            shutil.rmtree(doomed, ignore_errors=True)
            os.replace(step_folder(folder, step), doomed)
            shutil.rmtree(doomed)


def _best(folder: Path, steps: list[int]) -> set[int]:
    """The step with the lowest score, of each set of rows that steps were scored on: others are no measure for it."""
    scores: dict[str | None, dict[float, int]] = {}
    for step in steps:
        with suppress(OSError, ValueError):  # damaged: loading will say so
            state = json.loads((step_folder(folder, step) / STATE).read_text(encoding="utf-8"))
            if state.get("score") is not None and isfinite(state["score"]):
                scores.setdefault(state.get("scored_rows"), {}).setdefault(state["score"], step)
    return {of_rows[min(of_rows)] for of_rows in scores.values()}


def remove_unfinished(folder: Path) -> None:
    """Removes what a killed save or deletion left; each may be gigabytes."""
    for leftover in folder.glob(".tmp-*"):
        shutil.rmtree(leftover, ignore_errors=True)


def move_aside(path: Path, why: str) -> Path:
    """Renames a folder to ``<name>.<why>-<n>``, which is no checkpoint; nothing is deleted."""
    number = 1
    while (aside := path.with_name(f"{path.name}.{why}-{number}")).exists():
        number += 1
    os.replace(path, aside)
    return aside


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
