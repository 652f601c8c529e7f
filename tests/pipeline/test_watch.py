"""Heartbeats: who is silent, who stands still, and that all hear of it."""

import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist

from pipeline import watch as watching
from pipeline.distributed import Process
from pipeline.watch import Beat, Watch, own_store
from tests.conftest import free_port

TIMEOUT_S = 4.0
NEVER_S = 1000.0


class Store(dict):
    """A store in memory, as several ranks of one process see it."""

    def set(self, key: str, value: str) -> None:
        self[key] = value.encode()

    def get(self, key: str, default: Any = None) -> bytes:  # type: ignore[override]
        return self[key]

    def multi_get(self, keys: list[str]) -> list[bytes]:
        return [self[key] for key in keys]

    def check(self, keys: list[str]) -> bool:
        return all(key in self for key in keys)

    def wait(self, keys: list[str]) -> None:
        while not self.check(keys):
            time.sleep(0.001)


class Rank:
    """A watch, and the reason for which it ended its process."""

    def __init__(self, rank: int, size: int, store: Any, peer_s: float = TIMEOUT_S, hang_s: float = NEVER_S):
        self.reason, self.ended = "", threading.Event()
        self.watch = Watch(Process(rank, rank, size), store, peer_s, hang_s, Path("unused"), self._end)

    def _end(self, reason: str) -> None:
        self.reason = reason
        self.ended.set()


def ranks_of(size: int, store_of: Callable[[int], Any], hang_s: float = NEVER_S) -> list[Rank]:
    """Ranks in threads: each waits for the first beat of all."""
    found: dict[int, Rank] = {}
    threads = [
        threading.Thread(target=lambda rank=rank: found.update({rank: Rank(rank, size, store_of(rank), hang_s=hang_s)}))
        for rank in range(size)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    return [found[rank] for rank in range(size)]


@pytest.fixture(params=["in memory", "TCP"])
def ranks(request: pytest.FixtureRequest):
    """Three ranks; those that ended last are taken out of the watch when the test ends."""
    started: list[Rank] = []
    servers = []  # outlive the ranks

    def make(hang_s: float = NEVER_S) -> list[Rank]:
        if request.param == "TCP":
            port = free_port()
            server = dist.TCPStore("127.0.0.1", port, is_master=True, wait_for_workers=False)
            servers.append(server)
            started.extend(ranks_of(3, lambda rank: connect(port), hang_s))
        else:
            store = Store()
            started.extend(ranks_of(3, lambda rank: store, hang_s))
        for rank in started:
            rank.watch.__enter__()
        return started

    yield make
    for rank in started:
        rank.watch.__exit__()


def connect(port: int) -> Any:
    return dist.TCPStore("127.0.0.1", port, is_master=False, wait_for_workers=False)


def test_nobody_ends_while_all_live_and_get_on(ranks) -> None:
    three = ranks(hang_s=2 * TIMEOUT_S)
    for step in range(16):
        for rank in three:
            rank.watch.mark("step", step)
        time.sleep(TIMEOUT_S / 6)
    assert [rank.reason for rank in three] == ["", "", ""]


def test_all_hear_whose_signs_of_life_have_ended(ranks) -> None:
    three = ranks()
    three[1].watch.mark("save", 1037)
    time.sleep(TIMEOUT_S / 2)
    began = time.monotonic()
    three[1].watch.__exit__()  # its threads end as with a process that is stopped
    for rank in (three[0], three[2]):
        assert rank.ended.wait(30)
        assert rank.reason.startswith("no sign of life for ")
        assert f" of rank 1 on {three[1].watch._beat.node} (step 1,037, save)" in rank.reason
    assert TIMEOUT_S / 2 < time.monotonic() - began < 30


def test_rank_0_is_missed_though_the_store_answers(ranks) -> None:
    """As under torchrun, whose store is no rank's."""
    three = ranks()
    three[0].watch.mark("data", 12)
    time.sleep(TIMEOUT_S / 2)
    three[0].watch.__exit__()
    for rank in three[1:]:
        assert rank.ended.wait(30)
        assert "s from rank 0 on " in rank.reason and "(step 12, data)" in rank.reason


def test_a_standstill_of_all_ends_all_and_names_who_is_behind(ranks) -> None:
    three = ranks(hang_s=TIMEOUT_S)
    for rank in (three[0], three[2]):
        rank.watch.mark("exchange", 4)
    for rank in three:
        assert rank.ended.wait(30)
        assert "nobody got on for " in rank.reason and "; behind are rank 1 on " in rank.reason
        assert "rank 2 on" not in rank.reason


def test_a_store_that_is_gone_is_rank_0_that_is_gone() -> None:
    class Gone(Store):
        gone = False

        def set(self, key: str, value: str) -> None:
            if self.gone:
                raise RuntimeError("Connection reset by peer\nand a trace")
            super().set(key, value)

    store = Gone()
    rank = ranks_of(2, lambda rank: store)[1]
    with rank.watch:
        store.gone = True
        assert rank.ended.wait(30)
    assert rank.reason.startswith("rank 0 on ")
    assert rank.reason.endswith(" cannot be reached any more (Connection reset by peer)")


def test_an_answer_that_never_comes_ends_the_process_that_waits_for_it() -> None:
    stuck = threading.Event()

    class Stuck(Store):
        def check(self, keys: list[str]) -> bool:
            return ("verdict" not in keys or stuck.wait(60)) and super().check(keys)

    store = Stuck()
    rank = ranks_of(2, lambda rank: store)[1]
    with rank.watch:
        assert rank.ended.wait(30)
    stuck.set()
    assert "no answer for " in rank.reason and "from rank 0 on " in rank.reason


def test_many_are_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [0.0]
    monkeypatch.setattr(watching.time, "monotonic", lambda: clock[0])
    watch = Watch(Process(0, 0, 9), Store({f"beat/{rank}": b"" for rank in range(1, 9)}), 30, NEVER_S, Path("unused"))
    beats = {rank: Beat(f"n{rank}", 1, 5, 7, "step") for rank in range(9)}
    assert watch._judge(beats) == ""
    for clock[0] in range(1, 31):
        beats[0] = Beat("n0", 2, 6, 8, "step")
        assert watch._judge(beats) == ""
    clock[0] = 31
    said = watch._judge(beats)
    assert said.startswith("no sign of life for 31 s of rank 1 on n1 (step 7, step), rank 2 on n2 ")
    assert said.endswith("rank 4 on n4 (step 7, step) and 4 more")


def test_who_was_suspended_with_all_others_calls_nobody_lost(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [0.0]
    monkeypatch.setattr(watching.time, "monotonic", lambda: clock[0])
    watch = Watch(Process(0, 0, 2), Store({"beat/1": b""}), 30, 100, Path("unused"))
    beats = {rank: Beat(f"n{rank}", 1, 5, 7, "step") for rank in range(2)}
    for clock[0] in (1, 2, 500, 501, 502):
        assert watch._judge(beats) == ""
    for clock[0] in range(503, 540):
        said = watch._judge(beats)
    assert said.startswith("no sign of life for ")


@pytest.mark.parametrize("place", ["a file", "a pipe that nobody reads"])
def test_the_process_ends_also_where_no_stacks_can_be_written(tmp_path: Path, place: str) -> None:
    stacks = tmp_path / "stacks"
    if place == "a file":
        stacks.touch()
    else:
        stacks.mkdir()
        os.mkfifo(stacks / "rank_00000.txt")  # to open it waits for ever
    code = (
        "import time\nfrom pathlib import Path\nfrom pipeline import watch\n"
        "from pipeline.distributed import Process\nwatch._DUMP_S = 1.0\n"
        f"with watch.Watch(Process(), None, 6.0, 0.3, Path({str(stacks)!r})):\n    time.sleep(60)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 75
    assert "rank 0 ends: nobody got on" in done.stderr


def test_the_process_ends_at_once_with_its_stacks_on_disk(tmp_path: Path) -> None:
    code = (
        "import time\nfrom pathlib import Path\nfrom pipeline.distributed import Process\n"
        "from pipeline.watch import Watch\nfrom pipeline.log import set_up_logging\nset_up_logging()\n"
        "def a_collective():\n    time.sleep(60)\n"
        f"with Watch(Process(), None, 6.0, 0.3, Path({str(tmp_path)!r})) as w:\n"
        "    w.mark('exchange', 37)\n    a_collective()"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 75
    stacks = (tmp_path / "rank_00000.txt").read_text()
    assert "nobody got on for" in stacks and "(step 37, exchange)" in stacks and "in a_collective" in stacks
    assert "rank 0 ends: nobody got on" in done.stderr and "rank_00000.txt" in done.stderr


def test_keys_of_one_attempt_are_not_seen_by_the_next(monkeypatch: pytest.MonkeyPatch) -> None:
    """Torchrun's store outlives its processes: an old verdict would end the new ones."""
    port = free_port()
    server = dist.TCPStore("127.0.0.1", port, is_master=True, wait_for_workers=False)
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("MASTER_PORT", str(port))
    two = Process(1, 1, 2)
    first, again, second = (own_store(two, name, 5) for name in ("run/1", "run/1", "run/2"))
    first.set("verdict", "lost")
    assert again.check(["verdict"]) and not second.check(["verdict"])
    assert own_store(Process(), "run/1", 5) is None
    del server
