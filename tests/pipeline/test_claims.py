"""Claims: one owner at a time, taken over from the dead, left to the living."""

import errno
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from data_shards import temporaries
from data_shards.temporaries import Watch
from pipeline.evaluation import claims
from pipeline.evaluation.claims import clear, is_beating, take
from tests.conftest import clean_environment

HOLDER = """
import sys, time
from pathlib import Path
from data_shards.temporaries import Watch
from pipeline.evaluation.claims import take
claim = take(Path(sys.argv[1]), Watch())
print("taken" if claim else "refused", flush=True)
time.sleep(60)
"""


def start_holder(folder: Path) -> subprocess.Popen[str]:
    process = subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(folder)], stdout=subprocess.PIPE, text=True, env=clean_environment()
    )
    assert process.stdout and process.stdout.readline() == "taken\n"
    return process


@pytest.fixture(params=[True, False])
def links(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """The file system's hard links, and one that has none."""

    def link(*_: object) -> None:
        raise OSError(errno.EOPNOTSUPP, os.strerror(errno.EOPNOTSUPP))

    if not request.param:
        monkeypatch.setattr(os, "link", link)


@pytest.mark.usefixtures("links")
def test_a_claim_is_one_processs_and_leaves_nothing_behind(tmp_path: Path) -> None:
    holder = start_holder(tmp_path)
    assert take(tmp_path, Watch()) is None
    holder.terminate()
    holder.wait()
    claim = take(tmp_path, Watch())
    assert claim is not None  # its owner is gone, which shows at once on one host
    with claim:
        assert (tmp_path / "claim").exists()
        assert take(tmp_path, Watch()) is None
    assert list(tmp_path.iterdir()) == []


def test_without_links_of_either_kind_the_error_is_the_systems(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def link(*_: object) -> None:
        raise OSError(errno.EOPNOTSUPP, os.strerror(errno.EOPNOTSUPP))

    monkeypatch.setattr(os, "link", link)
    monkeypatch.setattr(os, "symlink", link)
    with pytest.raises(OSError, match="not supported"):
        take(tmp_path, Watch())
    assert list(tmp_path.iterdir()) == []


def test_a_claim_that_goes_away_while_it_is_read_is_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def read_text(*_: object, **__: object) -> str:
        raise OSError(errno.ESTALE, os.strerror(errno.ESTALE))

    monkeypatch.setattr(Path, "read_text", read_text)
    claim = take(tmp_path, Watch())
    assert claim
    with claim:
        pass


def test_of_two_that_want_a_dead_ones_unit_one_gets_it(tmp_path: Path) -> None:
    """Of three, two may within microseconds, and do it twice: see ``claims``."""
    holder = start_holder(tmp_path)
    holder.kill()
    holder.wait()
    command = [sys.executable, "-c", HOLDER, str(tmp_path)]
    rivals = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=clean_environment()) for _ in range(2)]
    said = [rival.stdout.readline().strip() for rival in rivals if rival.stdout]
    for rival in rivals:
        rival.kill()
        rival.wait()
    assert sorted(said) == ["refused", "taken"]


@pytest.mark.parametrize("left", ["claim and heartbeat", "heartbeat alone"])
def test_a_unit_that_is_done_is_cleared_of_what_killed_owners_left(tmp_path: Path, left: str) -> None:
    holder = start_holder(tmp_path)
    holder.kill()
    holder.wait()
    if left == "heartbeat alone":
        (tmp_path / "claim").unlink()
    assert list(tmp_path.glob(".claim.*.tmp"))
    clear(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_an_owner_on_another_node_is_believed_for_a_minute(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    heartbeat = tmp_path / ".claim.elsewhere~17.tmp"
    heartbeat.write_text("")
    (tmp_path / "claim").write_text(heartbeat.name)
    now = [100.0]
    monkeypatch.setattr(temporaries.time, "monotonic", lambda: now[0])
    watch = Watch()
    assert take(tmp_path, watch) is None
    assert not is_beating(tmp_path, watch)  # it has not been seen to change
    now[0] += 30
    os.utime(heartbeat, (now[0], now[0]))
    assert take(tmp_path, watch) is None
    assert is_beating(tmp_path, watch)
    now[0] += 61
    claim = take(tmp_path, watch)
    assert claim is not None
    assert not heartbeat.exists()
    claim.__exit__(None, None, None)


def test_a_claim_that_was_renewed_in_between_is_put_back(tmp_path: Path) -> None:
    """A process that found it stale must not take away what another one has just put there."""
    (tmp_path / "claim").write_text(".claim.elsewhere~18.tmp")
    claims._remove_stale(tmp_path / "claim", ".claim.elsewhere~17.tmp")
    assert (tmp_path / "claim").read_text() == ".claim.elsewhere~18.tmp"


def test_the_heart_beats(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(claims, "_BEAT_EVERY_S", 0.02)
    claim = take(tmp_path, Watch())
    assert claim is not None
    with claim:
        heartbeat = tmp_path / (tmp_path / "claim").read_text()
        os.utime(heartbeat, (1, 1))
        deadline = time.monotonic() + 10
        while heartbeat.stat().st_mtime == 1 and time.monotonic() < deadline:
            time.sleep(0.01)
        assert heartbeat.stat().st_mtime > 1
