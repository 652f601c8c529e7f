"""Networks of several runs on the same rows, and the text that the paper's rows keep."""

import json
import math
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest

from data_shards.paper import ExampleBuilder
from data_shards.sampling import is_held_out
from data_shards.store import Layout, read_manifest
from data_shards.tokenizer import Tokenizer
from pipeline.unigram import token_shares
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


@pytest.fixture(scope="module")
def tokenized(runs: dict[str, Path]) -> dict[str, Any]:
    """What their tokenize stages made."""
    return json.loads((runs["electra"] / "tokenize/stage.json").read_text())["output"]


@pytest.fixture(scope="module")
def shards(tokenized: dict[str, Any]) -> Path:
    """Their only corpus."""
    (corpus,) = tokenized["corpora"]
    return Path(corpus["folder"])


def test_a_run_scores_as_it_did_itself(
    runs: dict[str, Path], shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = [*map(str, runs.values()), "--shards", str(shards), "--sequence-length", "32", "--rows", str(ROWS)]
    out = tmp_path / "table.md"
    given = ["held_out.py", *arguments, "--generators", str(runs["electra"]), "--out", str(out)]
    monkeypatch.setattr(sys, "argv", given)
    monkeypatch.setattr(held_out, "_ROWS_AT_ONCE", 7)
    held_out.main()
    lines = [[cell.strip() for cell in line.split("|")[1:-1]] for line in out.read_text().splitlines() if "|" in line]
    heading, electra, mlm = lines[0], lines[2], lines[3]
    assert heading[-1] == "on bench-electra's"
    for name, cells in (("electra", electra), ("mlm", mlm)):
        metrics = json.loads((runs[name] / "pretrain/stage.json").read_text())["metrics"]
        assert cells[:2] == [f"bench-{name}", f"{metrics['held_out/mask_token_loss']:.3f}"]
    assert electra[2] == electra[4], "its own generator, once as its own and once as the common one"
    assert mlm[2:] == ["–"] * 3


def test_paper_text_is_the_beginning_of_what_a_row_collects(tokenized: dict[str, Any], tmp_path: Path) -> None:
    """Special tokens, padding and unknown characters are no part of it; held-out documents are left out."""
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


def test_paper_text_leaves_out_what_the_original_holds_out(tokenized: dict[str, Any]) -> None:
    tokenizer = Tokenizer(tokenized["tokenizer"])
    builder = ExampleBuilder(Layout("paper", 64, 1), tokenizer.special, tokenizer.dtype, 0)
    documents = [" ".join(["bada"] * count) for count in range(1, 13)]
    kept = paper_text.kept_text("\n \n".join(f"  {it} " for it in documents), tokenizer, builder, 0.5)
    trained = [document for document in documents if not is_held_out(document.encode(), 0.5)]
    assert 0 < len(trained) < 12
    assert [document.replace("\n", " ") for document in kept.strip().split("\n\n")] == trained


def test_frequencies_cost_what_they_do_where_the_original_is_hidden(runs: dict[str, Path], shards: Path) -> None:
    trained = held_out.load(runs["electra"])
    vocab_size = trained.model.embeddings.token_table().shape[0]
    (batch,) = held_out.micro_batches(shards, trained.config, vocab_size, 32, ROWS)
    shares = token_shares([shards], [1.0], vocab_size, list(read_manifest(shards).special.all))
    losses = []
    for row, positions in enumerate(batch.masking.positions_BM.tolist()):
        for slot, position in enumerate(positions):
            original = int(batch.token_ids_BT[row, position])
            counts = batch.masking.weights_BM[row, slot] > 0
            if counts and int(batch.masking.generator_ids_BT[row, position]) != original:
                losses.append(-math.log(max(shares[original], 1e-6)))
    assert len(losses) < batch.masking.positions_BM.numel(), "some show the original"
    assert held_out.unigram_loss(shards, vocab_size, [batch]) == pytest.approx(sum(losses) / len(losses))


def test_what_makes_no_sense_is_refused(
    runs: dict[str, Path], shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = [str(runs["electra"]), "--sequence-length", "32", "--out", str(tmp_path / "table.md"), "--shards"]
    monkeypatch.setattr(sys, "argv", ["held_out.py", *arguments, str(shards), "--generators", str(runs["mlm"])])
    with pytest.raises(SystemExit, match="--generators bench-mlm: it trained none"):
        held_out.main()
    other = tmp_path / "other"
    shutil.copytree(shards, other)
    manifest = json.loads((other / "MANIFEST.json").read_text()) | {"tokenizer_sha256": "0" * 64}
    (other / "MANIFEST.json").write_text(json.dumps(manifest))
    monkeypatch.setattr(sys, "argv", ["held_out.py", *arguments, str(other)])
    with pytest.raises(SystemExit, match="bench-electra: trained with another tokenizer than"):
        held_out.main()
