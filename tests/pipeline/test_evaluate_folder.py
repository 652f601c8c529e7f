"""`electra evaluate` of a Hugging Face folder: its own shape and tokenizer, no other stage needed."""

import json
import os
import shutil
from pathlib import Path

import pytest
import torch

os.environ["HF_HUB_OFFLINE"] = "1"
from transformers import AutoTokenizer

from data_shards.digest import digest_file
from model.finetuning import FineTunedElectra, LinearHead
from model.hf import read_folder
from model.kernels.select import select_kernels
from pipeline import hf_folder
from pipeline.chain import decide
from pipeline.config import Config
from pipeline.config_file import load_config
from pipeline.errors import ConfigError
from pipeline.evaluation.pretrained import find_pretrained
from pipeline.keys import science_of
from tests.conftest import Electra
from tests.parity.google_folders import PIECES, make_folders


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Not of the shape of the runs' config, which the folder makes irrelevant."""
    return make_folders(tmp_path_factory.mktemp("hub"), num_hidden_layers=1, initializer_range=0.02)[0]


def config_for(config_path: Path, folder: Path, *overrides: str) -> Config:
    return load_config(config_path, (f"evaluate.checkpoint={folder}", *overrides))


def test_a_published_folder_is_fine_tuned_end_to_end(
    config_path: Path, published: Path, electra: Electra, write_task, tmp_path: Path
) -> None:
    arguments = (config_path, f'evaluate.tasks=["{write_task()}"]', "evaluate.epochs=12", "evaluate.lr=2e-3")
    folder = f"evaluate.checkpoint={published}"
    assert "2 of 2 units to do" in electra("evaluate", *arguments, folder).stderr
    stage = tmp_path / "out/runs/tiny/evaluate"
    results = json.loads((stage / "results.json").read_text())
    assert results["checkpoint"] == str(published)
    assert min(results["tasks"]["first_word"]["accuracy"]["values"]) > 0.9
    (label,) = (path.name for path in stage.glob("electra-tiny-discriminator-*"))
    assert len(label) == len(published.name) + 9
    assert (stage / label / "first_word/seed_2/predictions.jsonl").exists()
    assert not (tmp_path / "out/runs/tiny/pretrain").exists()
    assert "evaluate: up to date" in electra("evaluate", *arguments, folder).stderr

    moved = Path(shutil.copytree(published, tmp_path / published.name))
    config = load_config(config_path, (*map(str, arguments[1:]), f"evaluate.checkpoint={moved}"))
    assert decide(config, "evaluate").action == "reuse"  # folders count by content
    (moved / "vocab.txt").write_text("\n".join([*PIECES[:-2], PIECES[-1], PIECES[-2]]))
    decision = decide(config, "evaluate")
    assert decision.action == "run"
    assert "evaluate.checkpoint: sha256:" in decision.why


def test_the_folders_weights_tokenizer_and_shape_are_used(config_path: Path, published: Path) -> None:
    found = find_pretrained(config_for(config_path, published))
    theirs = AutoTokenizer.from_pretrained(published)
    for text in ("Bada zozo.", "fi ku, mere: LALA", "xyz"):
        assert theirs(text, add_special_tokens=False)["input_ids"] == found.tokenizer.encode(text)
    model = FineTunedElectra(found.model, found.vocab_size, select_kernels("torch"), LinearHead(found.model, 2, 0.1))
    found.load_into(model)
    weights = read_folder(published).weights
    copied = {name.replace("discriminator.", "encoder."): p for name, p in model.named_parameters()}
    assert {name for name in copied if not name.startswith("head.")} == {
        n for n in weights if not n.startswith("head.")
    }
    assert all(torch.equal(copied[name], weights[name]) for name in weights if not name.startswith("head."))


def test_tokenizers_in_either_form_are_the_same(config_path: Path, published: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(published, tmp_path / "copy"))
    (copy / "vocab.txt").unlink()
    AutoTokenizer.from_pretrained(published).save_pretrained(copy)
    assert (copy / "tokenizer.json").exists()
    ours, theirs = (find_pretrained(config_for(config_path, folder)).tokenizer for folder in (published, copy))
    assert ours.special == theirs.special
    assert ours.encode("Bada zozo, fi!") == theirs.encode("Bada zozo, fi!")


def test_an_export_scores_as_the_checkpoint_that_it_was_made_of(
    shared_config: Path, electra: Electra, write_task, tmp_path: Path
) -> None:
    arguments = (shared_config, "run.name=scored_twice", "train.steps=2", "train.held_out_rows=0",
                 f'evaluate.tasks=["{write_task()}"]', "evaluate.seeds=1", "evaluate.epochs=2")  # fmt: skip
    electra("run", *arguments)
    run = shared_config.parent / "out/runs/scored_twice"
    checkpoint = json.loads((run / "evaluate/results.json").read_text())
    electra("export", run, tmp_path / "out")
    assert "first_word" in (tmp_path / "out/discriminator/README.md").read_text()
    electra("evaluate", *arguments, f"evaluate.checkpoint={tmp_path / 'out'}")
    folder = json.loads((run / "evaluate/results.json").read_text())
    assert folder["checkpoint"] == str(tmp_path / "out")
    assert folder["tasks"] == checkpoint["tasks"]
    units = sorted(path.name for path in (run / "evaluate").iterdir() if path.is_dir())
    assert [name[:4] for name in units] == ["out-", "step"]
    lines = [next((run / "evaluate" / name).rglob("predictions.jsonl")).read_text() for name in units]
    assert lines[0] == lines[1]


def test_what_cannot_be_evaluated_is_refused(config_path: Path, published: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"evaluate\.max_length=65 exceeds the 64 positions of evaluate\.checkpoint="):
        find_pretrained(config_for(config_path, published, "evaluate.max_length=65"))
    with pytest.raises(ConfigError, match=r"evaluate\.checkpoint=.*nowhere: no such folder"):
        science_of(config_for(config_path, tmp_path / "nowhere"), "evaluate")
    copy = Path(shutil.copytree(published, tmp_path / "copy"))
    (copy / "vocab.txt").write_text("\n".join([*PIECES, "one", "two"]))
    with pytest.raises(
        ConfigError, match=rf"its tokenizer has {len(PIECES) + 2} ids and its token table {len(PIECES)}"
    ):
        find_pretrained(config_for(config_path, copy))
    (copy / "vocab.txt").unlink()
    with pytest.raises(ConfigError, match=r"no tokenizer in it \(tokenizer\.model, tokenizer\.json or vocab\.txt\)"):
        find_pretrained(config_for(config_path, copy))


def test_a_step_a_name_and_a_folder_are_told_apart(config_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert load_config(config_path).evaluate.checkpoint == "last"
    assert load_config(config_path, ("evaluate.checkpoint=last",)).evaluate.checkpoint == "last"
    assert load_config(config_path, ("evaluate.checkpoint=12",)).evaluate.checkpoint == 12
    monkeypatch.chdir("/tmp")
    assert load_config(config_path, ("evaluate.checkpoint=there",)).evaluate.checkpoint == Path("/tmp/there")
    beside = load_config(config_path, ("train.initial_generator=~/there",)).train.initial_generator
    assert beside == Path.home() / "there"


def test_a_folder_is_checked_before_an_allocation_is_spent_on_it(
    config_path: Path, published: Path, electra: Electra, write_task, tmp_path: Path
) -> None:
    """Also one that takes longer examples than the run's own model does."""
    arguments = (config_path, f'evaluate.tasks=["{write_task()}"]', "model.max_positions=32", "evaluate.max_length=33")
    assert "exceeds model.max_positions=32" in electra("evaluate", *arguments, "--check", code=78).stderr
    electra("evaluate", *arguments, f"evaluate.checkpoint={published}", "--check")
    missing = electra("evaluate", *arguments, f"evaluate.checkpoint={tmp_path / 'nowhere'}", "--check", code=78)
    assert "no such folder" in missing.stderr


def test_a_trained_run_keeps_the_config_that_its_checkpoints_need(
    config_path: Path, published: Path, electra: Electra, write_task, tmp_path: Path
) -> None:
    tasks = (f'evaluate.tasks=["{write_task()}"]', f"evaluate.checkpoint={published}")
    electra("run", config_path, "train.steps=1", "train.held_out_rows=0", "--until", "pretrain")
    before = (tmp_path / "out/runs/tiny/config.yaml").read_text()
    other = (config_path, "train.steps=1", "train.held_out_rows=0", *tasks, "model.attention_heads=4")
    refused = electra("evaluate", *other, code=78).stderr
    for text in ("model.attention_heads: 2 -> 4", "nothing was touched", "set run.name=NEW"):
        assert text in refused
    assert (tmp_path / "out/runs/tiny/config.yaml").read_text() == before
    same = load_config(config_path, (*tasks, "train.steps=1"))
    assert decide(same, "evaluate").action == "run"
    assert decide(load_config(config_path, (*map(str, other[1:]), "run.name=new")), "evaluate").action == "run"


def test_a_check_writes_nothing(config_path: Path, published: Path, write_task, tmp_path: Path) -> None:
    config = config_for(config_path, published, f'evaluate.tasks=["{write_task()}"]')
    found = find_pretrained(config, installs=False)
    decide(config, "evaluate", keep_digests=False)
    assert not (tmp_path / "out").exists()
    installed = find_pretrained(config).tokenizer
    assert installed.folder.parent == tmp_path / "out/tokenizers"
    assert installed.digest == found.tokenizer.digest
    assert found.tokenizer.encode("Bada zozo.") == installed.encode("Bada zozo.")


def test_weights_are_hashed_once_for_all_processes(
    config_path: Path, published: Path, write_task, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    copy = Path(shutil.copytree(published, tmp_path / "copy"))
    config = config_for(config_path, copy, f'evaluate.tasks=["{write_task()}"]')
    hashed: list[str] = []
    monkeypatch.setattr(hf_folder, "digest_file", lambda path: hashed.append(Path(path).name) or digest_file(path))

    def inputs_of_new_process() -> dict:
        hashed.clear()
        hf_folder._digest_of.cache_clear()
        return decide(config, "evaluate").inputs

    first = inputs_of_new_process()
    assert "model.safetensors" in hashed
    assert inputs_of_new_process() == first
    assert hashed == []
    for entry in (tmp_path / "out/digests").iterdir():
        entry.write_text("damaged")
    assert inputs_of_new_process() == first
    (copy / "config.json").write_text((copy / "config.json").read_text() + "\n")
    assert inputs_of_new_process() != first
    assert hashed == ["config.json"]


def test_one_start_is_enough(config_path: Path, published: Path) -> None:
    with pytest.raises(ConfigError, match="both say what training starts from"):
        load_config(config_path, ("run.fork_from=other@5", f"train.initial_discriminator={published}"))
