"""What training shows: lines in a log, a bar on a terminal."""

import os
import pty
import re
import subprocess
from pathlib import Path

from tests.conftest import Electra, clean_environment, command


def test_a_log_gets_one_line_per_interval(config_path: Path, electra: Electra) -> None:
    said = electra("run", config_path, "train.log_every=5").stderr
    lines = re.findall(r"step (\d+)/20  loss [\d.]+ .*tokens/s  MFU [\d.]+ %  ETA \d:\d\d:\d\d", said)
    assert lines == ["5", "10", "15", "20"]
    assert "\x1b" not in said


def test_a_terminal_gets_a_bar(config_path: Path) -> None:
    main, terminal = pty.openpty()
    environment = clean_environment(TERM="xterm", COLUMNS="200")
    process = subprocess.Popen(command("run", config_path), env=environment, stdout=terminal, stderr=terminal)
    os.close(terminal)
    shown = b""
    while True:
        try:
            chunk = os.read(main, 65536)
        except OSError:  # how a terminal says that nobody writes any more
            break
        if not chunk:
            break
        shown += chunk
    os.close(main)
    assert process.wait(60) == 0
    text = shown.decode(errors="replace")
    assert "\x1b[" in text
    assert re.search(r"pretrain .*20/20", text)
    assert re.search(r"loss \d+\.\d{3}", text)
