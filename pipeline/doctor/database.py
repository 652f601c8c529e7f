"""MLflow's SQLite file: whether it can be locked, its schema is the client's, and the experiment is there."""

import importlib.util
import os
import re
import sqlite3
from importlib import metadata
from pathlib import Path
from typing import NamedTuple

from pipeline.doctor.checks import Check, failure, ok, warning
from pipeline.tracking import on_network_file_system

_LOCK_S = 2.0
_REVISION = re.compile(r"(?m)^(down_)?revision\b[^=]*= *(.*)$")
_QUOTED = re.compile(r"[\"'](\w+)[\"']")
_NEW_TABLE = re.compile(r"\bop\.create_table\(\s*[\"'](\w+)")


def check_sqlite(path: Path, experiment: str) -> Check:
    """Whether a SQLite file can be written to by this node and used by MLflow's client, or made."""
    if on_network_file_system(path.parent, Path("/proc/mounts").read_text(encoding="utf-8")):
        remedy = "set tracking.uri=auto or a server's address: SQLite's locks are not to be relied on there"
        return warning("mlflow file", f"{path} lies on a network file system", remedy)
    if not path.exists():
        folder = next(parent for parent in path.absolute().parents if parent.is_dir())
        if not os.access(folder, os.W_OK):
            return failure("mlflow file", f"{folder} cannot be written to", "set tracking.uri to where it can")
        return ok("mlflow file", f"{path} will be made")
    try:
        connection = sqlite3.connect(path.absolute().as_uri() + "?mode=rw", timeout=_LOCK_S, uri=True)
        try:
            connection.execute("begin immediate")
            return _look_into(connection, path.absolute(), experiment)
        finally:
            connection.close()  # and rolls back
    except sqlite3.Error as error:
        locked = "locked" in str(error)
        remedy = "see who holds it (fuser)" if locked else "restore it, or move it aside: `electra sync` fills another"
        return (warning if locked else failure)("mlflow file", f"{path}: {error}", remedy)


def _look_into(connection: sqlite3.Connection, path: Path, experiment: str) -> Check:
    """The schema, of which MLflow's client takes its own alone, and the experiment."""
    tables = {name for (name,) in connection.execute("select name from sqlite_master where type = 'table'")}
    if not tables:
        return ok("mlflow file", f"{path} is empty and will be filled")
    row = connection.execute("select version_num from alembic_version").fetchone()
    if problem := judge_schema(row[0] if row else "none", tables, path):
        return problem
    asked = "select experiment_id from experiments where name = ? and lifecycle_stage = 'deleted'"
    if row := connection.execute(asked, (experiment,)).fetchone():
        return deleted_experiment("mlflow file", f"sqlite:///{path}", experiment, row[0])
    return ok("mlflow file", f"{path} can be written to, its schema is that of this MLflow")


def judge_schema(found: str, tables: set[str], path: Path) -> Check | None:
    """What is wrong with a schema; None: it is this MLflow's.

    MLflow's client migrates a file that lacks one of its tables, and refuses any other that is not up to date
    (mlflow/store/tracking/sqlalchemy_store.py).

    Args:
        found: Revision of the file.
        tables: Its tables.
        path: Of the file.
    """
    revisions = read_revisions()
    head = ", ".join(revisions.keys() - set().union(*(each.before for each in revisions.values())))
    if found == head:
        return None
    unlike = f"{path} has schema {found}, where MLflow {metadata.version('mlflow')} wants {head}"
    if found not in revisions:
        return failure("mlflow file", unlike, "install the MLflow that wrote it, or a later one; or move it aside")
    passed, ahead = set[str](), [found]
    while ahead:
        passed.add(revision := ahead.pop())
        ahead += revisions[revision].before
    newer = [each for revision, each in revisions.items() if revision not in passed]
    remedy = f"keep a copy, then: mlflow db upgrade sqlite:///{path}"
    if set().union(*(each.tables for each in newer)) - tables:
        return warning("mlflow file", f"{unlike}: the first to open it will migrate it", remedy)
    return failure("mlflow file", f"{unlike}, and refuses it", remedy)


class Revision(NamedTuple):
    """A schema of MLflow's: those it comes after, and the tables that it brings."""

    before: set[str]
    tables: set[str]


def read_revisions() -> dict[str, Revision]:
    """The schemas that the installed MLflow knows, read from its migrations as text: it takes seconds to import."""
    spec = importlib.util.find_spec("mlflow")
    assert spec is not None and spec.origin is not None, "a dependency, which has a file"
    revisions: dict[str, Revision] = {}
    for path in (Path(spec.origin).parent / "store" / "db_migrations" / "versions").glob("[!_]*.py"):
        upgrade = path.read_text(encoding="utf-8").partition("def downgrade")[0]
        named = {down: set(_QUOTED.findall(value)) for down, value in _REVISION.findall(upgrade)}
        (own,) = named[""]
        revisions[own] = Revision(named["down_"], set(_NEW_TABLE.findall(upgrade)))
    return revisions


def deleted_experiment(name: str, uri: str, experiment: str, number: object) -> Check:
    """MLflow finds a deleted experiment by its name, and takes no run into it."""
    restore = f"MLFLOW_TRACKING_URI={uri} mlflow experiments restore -x {number}"
    return failure(name, f"{uri}: experiment {experiment!r} is deleted", f"{restore}, or set tracking.experiment")
