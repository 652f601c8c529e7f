"""Networks of several runs on the same rows, and the text that the paper's rows keep."""

import json
import sys
from pathlib import Path

import pytest

from data_shards.tokenizer import Tokenizer
from tests.benchmarks import held_out, paper_text
from tests.conftest import Electra

ROWS = 24


@pytest.fixture(scope="module")
def runs(shared_config: Path, electra: Electra) -> dict[str, Path]:
    """An ELECTRA and an MLM, two steps each."""
    for name in ("electra", "mlm"):
        steps = ("train.steps=2", f"train.held_out_rows={ROWS}")
        electra("run", shared_config, f"run.name=bench-{name}", f"objective.name={name}", *steps)
    return {name: shared_config.parent / "out/runs" / f"bench-{name}" for name in ("electra", "mlm")}


def test_a_run_scores_as_it_did_itself(runs: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tokenized = json.loads((runs["electra"] / "tokenize/stage.json").read_text())["output"]
    (shards,) = (corpus["folder"] for corpus in tokenized["corpora"])
    arguments = [*map(str, runs.values()), "--shards", shards, "--sequence-length", "32", "--rows", str(ROWS)]
    out = tmp_path / "table.md"
    given = ["held_out.py", *arguments, "--generators", str(runs["electra"]), "--out", str(out)]
    monkeypatch.setattr(sys, "argv", given)
    held_out.main()
    lines = [[cell.strip() for cell in line.split("|")[1:-1]] for line in out.read_text().splitlines() if "|" in line]
    heading, electra, mlm = lines[0], lines[2], lines[3]
    assert heading[-1] == "on bench-electra's"
    for name, cells in (("electra", electra), ("mlm", mlm)):
        metrics = json.loads((runs[name] / "pretrain/stage.json").read_text())["metrics"]
        assert cells[:2] == [f"bench-{name}", f"{metrics['held_out/mask_token_loss']:.3f}"]
    assert electra[2] == electra[4], "its own generator, once as its own and once as the common one"
    assert mlm[2:] == ["–"] * 3


def test_paper_text_is_the_beginning_of_what_a_row_collects(runs: dict[str, Path], tmp_path: Path) -> None:
    """Special tokens, padding and unknown characters are no part of it; held-out documents are left out."""
    tokenized = json.loads((runs["electra"] / "tokenize/stage.json").read_text())["output"]
    tokenizer = Tokenizer(tokenized["tokenizer"])
    words = " ".join(["bada"] * 200)
    (tmp_path / "a.txt").write_text(f"bada \N{SNOWMAN} bada\n{words}\n\nbada\n")
    out = tmp_path / "out"
    with pytest.MonkeyPatch.context() as patch:
        arguments = [tokenized["tokenizer"], str(tmp_path / "a.txt"), "--sequence-length", "32", "--out", str(out)]
        patch.setattr(sys, "argv", ["paper_text.py", *arguments, "--held-out-fraction", "0"])
        paper_text.main()
    first, second = (document.split("\n") for document in (out / "a.txt").read_text().strip().split("\n\n"))
    assert second == ["bada"] and first[0].split() == ["bada", "bada"]
    kept = [number for line in first for number in tokenizer.encode(line)]
    assert 25 <= len(kept) <= 30, "a row of 32 holds [CLS], [SEP], [SEP] and these"
    assert Tokenizer(out / "tokenizer").digest == tokenizer.digest
    assert paper_text.kept_text("bada\n\nbada bada", tokenizer, None, 1.0) == "\n"  # all is held out, no builder asked
