"""Pretraining from Hugging Face folders: every weight arrives, and what does not fit is refused by name."""

import json
import logging
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from model.electra import Electra
from model.hf import FolderError, Network, from_transformers, read_folder
from model.kernels.select import select_kernels
from model.weights import discriminator_weights, fit_positions, generator_weights
from pipeline import checkpoint as checkpoints
from pipeline.chain import decide
from pipeline.config import Config
from pipeline.config_file import load_config
from pipeline.errors import ConfigError, DamagedError
from pipeline.evaluation.pretrained import find_pretrained
from pipeline.initial_weights import initial_weights
from pipeline.keys import science_of
from tests.conftest import Electra as Command
from tests.parity.google_folders import MODEL, PIECES, make_folders, make_network, write_vocabulary

VOCAB_SIZE = len(PIECES)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    return make_folders(tmp_path_factory.mktemp("hub"))


@pytest.fixture
def folder(folders: tuple[Path, Path], tmp_path: Path) -> Path:
    """A copy of the discriminator's, to be spoiled."""
    return Path(shutil.copytree(folders[0], tmp_path / "copy"))


@pytest.fixture
def config_of(config_path: Path, folders: tuple[Path, Path]):
    def config(*overrides: str, networks: str = "both") -> Config:
        keys = ("train.initial_discriminator", "train.initial_generator")
        chosen = [f"{key}={path}" for key, path in zip(keys, folders, strict=True) if networks in ("both", key[14:])]
        return load_config(config_path, (*MODEL, *chosen, *overrides))

    return config


def start(config: Config) -> Electra:
    """The model that pretraining would start from; what starts fresh is NaN."""
    model = Electra(config.model, config.objective, VOCAB_SIZE, select_kernels("torch"))
    read = initial_weights(config, VOCAB_SIZE)
    assert read is not None
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            value = read(name)
            parameter.copy_(torch.full_like(parameter, torch.nan) if value is None else value)
    return model


def networks_of(model: Electra) -> tuple[dict, dict]:
    state = dict(model.named_parameters())
    return tuple(  # type: ignore[return-value]
        {name: weight.detach() for name, weight in extract(state.__getitem__, state.keys()).items()}
        for extract in (discriminator_weights, generator_weights)
    )


def same(found: dict, network: Network, leave_out: str = "-") -> None:
    wanted = {name: weight for name, weight in network.weights.items() if not name.startswith(leave_out)}
    kept = {name: weight for name, weight in found.items() if not name.startswith(leave_out)}
    assert kept.keys() == wanted.keys()
    assert all(torch.equal(kept[name], wanted[name]) for name in wanted)


@pytest.mark.parametrize("objective", [("embeddings", "all"), ("embeddings", "token_and_position"), ("gdes", "all")])
def test_every_weight_of_both_folders_arrives(config_of, folders, objective: tuple[str, str]) -> None:
    config = config_of(f"objective.sharing={objective[0]}", f"objective.shared_tables={objective[1]}")
    for found, folder in zip(networks_of(start(config)), folders, strict=True):
        same(found, read_folder(folder))


def test_own_tables_of_the_generator_may_have_a_width_of_their_own(config_of, folders) -> None:
    config = config_of("objective.sharing=none", "model.generator_embedding_size=24")
    for found, folder in zip(networks_of(start(config)), folders, strict=True):
        same(found, read_folder(folder))
    with pytest.raises(ConfigError, match=r"set model\.generator_embedding_size=24"):
        initial_weights(config_of("objective.sharing=none"), VOCAB_SIZE)


def test_one_encoder_for_both_takes_the_discriminators(config_of, folders, tmp_path: Path, caplog) -> None:
    from transformers import ElectraForMaskedLM

    wide = tmp_path / "wide"
    make_network(ElectraForMaskedLM).save_pretrained(wide)
    write_vocabulary(wide)
    overrides = ("objective.sharing=all", "model.generator_width=1", f"train.initial_generator={wide}")
    with caplog.at_level(logging.WARNING, "electra"):
        discriminator, generator = networks_of(start(config_of(*overrides)))
    same(discriminator, read_folder(folders[0]))
    same({name: w for name, w in generator.items() if name.startswith("head.")}, read_folder(wide), ("e",))
    assert "objective.sharing=all: embeddings." in caplog.text
    alone = networks_of(start(config_of(*overrides, "train.initial_discriminator=null")))
    same(alone[1], read_folder(wide))


@pytest.mark.parametrize("sharing", ["none", "embeddings", "gdes"])
def test_with_one_folder_the_other_network_starts_fresh(config_of, folders, sharing: str, caplog) -> None:
    own = ("model.generator_embedding_size=24",) if sharing == "none" else ()
    with caplog.at_level(logging.INFO, "electra"):
        discriminator, generator = networks_of(
            start(config_of(f"objective.sharing={sharing}", *own, networks="discriminator"))
        )
    assert "train.initial_generator is not given: that network starts fresh" in caplog.text
    same(discriminator, read_folder(folders[0]))
    assert all(weight.isnan().all() for name, weight in generator.items() if name.startswith(("encoder.", "head.")))
    assert bool(generator["embeddings.token.weight"].isnan().any()) == (sharing == "none")

    discriminator, generator = networks_of(start(config_of(f"objective.sharing={sharing}", *own, networks="generator")))
    same(generator, read_folder(folders[1]))
    assert all(weight.isnan().all() for name, weight in discriminator.items() if name.startswith(("encoder.", "head.")))


def test_objectives_that_predict_take_a_masked_language_model(config_of, folders, caplog) -> None:
    narrow = ("model.hidden_size=16", "model.attention_heads=1", "model.feed_forward_size=32")
    mlm = config_of(*narrow, "objective.name=mlm", f"train.initial_discriminator={folders[1]}", networks="neither")
    state = dict(start(mlm).named_parameters())
    same(discriminator_weights(state.__getitem__, state.keys()), read_folder(folders[1]))
    with caplog.at_level(logging.WARNING, "electra"):
        found, _ = networks_of(start(config_of("objective.name=replace_mlm")))
    assert "no head for this objective; that part starts fresh, and the head that it has is left out" in caplog.text
    assert all(weight.isnan().all() for name, weight in found.items() if name.startswith("head."))
    same(found, read_folder(folders[0]), "head.")


@pytest.mark.parametrize(("there", "here"), [(64, 160), (64, 32)])
def test_position_tables_of_another_length(config_of, folders, there: int, here: int, caplog) -> None:
    with caplog.at_level(logging.INFO, "electra"):
        for found, folder in zip(networks_of(start(config_of(f"model.max_positions={here}"))), folders, strict=True):
            old = read_folder(folder).weights["embeddings.position.weight"]
            new = found["embeddings.position.weight"]
            assert (len(old), len(new)) == (there, here)
            assert torch.equal(new, torch.cat([old, old, old])[:here])
    assert ("the table of 64 positions is repeated to 160" if here > there else "the first 32 of 64") in caplog.text


def test_128_positions_become_512() -> None:
    table = torch.randn(128, 8)
    assert torch.equal(fit_positions(table, 512), torch.cat([table] * 4))
    assert torch.equal(fit_positions(table, 128), table)


def refused(config: Config, *wanted: str, error: type[Exception] = ConfigError, vocab_size: int = VOCAB_SIZE) -> None:
    with pytest.raises(error) as caught:
        initial_weights(config, vocab_size)
    for part in wanted:
        assert part in str(caught.value), str(caught.value)


def test_shapes_that_differ_are_named_with_the_keys_to_set(config_of, folders) -> None:
    refused(config_of("model.hidden_size=64"), "embeddings_project.bias is [32] there and [64] in this run",
            "set model.hidden_size=32")  # fmt: skip
    refused(config_of("model.hidden_layers=3"), "encoder.layers.2.", "is absent there", "set model.hidden_layers=2")
    refused(config_of("model.attention_heads=4"), "has 2 attention heads and this run's network 4")
    refused(config_of("model.generator_width=1", networks="generator"), "set model.generator_width=0.5")
    refused(config_of("model.generator_depth=0.5", networks="generator"), "set model.generator_depth=1")
    small = ("model.size=small", "model.hidden_size=16", "model.attention_heads=1", "model.feed_forward_size=32")
    refused(config_of(*small, "model.generator_width=0.25", networks="generator"), "set model.size=small_plus_plus")
    refused(config_of(), f"{VOCAB_SIZE:,} rows", "300 ids",
            f"set tokenizer.kind=wordpiece tokenizer.path={folders[0]}/vocab.txt", vocab_size=300)  # fmt: skip


def test_another_vocabulary_of_the_same_size_is_refused(config_of, tmp_path: Path) -> None:
    write_vocabulary(tmp_path / "other", [*PIECES[:-2], PIECES[-1], PIECES[-2]])
    with pytest.raises(ConfigError, match=rf"id {VOCAB_SIZE - 2} is '##zo' there and '##zu' in this run's tokenizer"):
        initial_weights(config_of(), VOCAB_SIZE, tmp_path / "other")


def test_what_makes_no_sense_is_refused(config_of, folders) -> None:
    refused(config_of("objective.training=two_stage", "model.generator_width=1"), "starts from the generator's weights")
    refused(config_of("objective.name=mlm"), "this run trains no generator (objective.name=mlm")
    refused(config_of(f"train.initial_generator={folders[0]}", networks="neither"), "is a discriminator")
    refused(config_of("train.initial_generator=/nowhere"), "train.initial_generator=/nowhere: no such folder")


def rewrite_config(folder: Path, **values) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def test_another_activation_is_an_error_and_another_eps_a_warning(config_of, folder: Path, caplog) -> None:
    rewrite_config(folder, hidden_act="gelu_new", layer_norm_eps=1e-6)
    config = config_of(f"train.initial_discriminator={folder}")
    refused(config, "set model.activation=gelu_tanh")
    with caplog.at_level(logging.WARNING, "electra"):
        initial_weights(
            config_of(f"train.initial_discriminator={folder}", "model.activation=gelu_tanh", networks="neither"),
            VOCAB_SIZE,
        )
    assert "has a LayerNorm eps of 1e-06, this run model.layer_norm_eps=1e-12" in caplog.text


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"model_type": "bert"}, "model_type is 'bert', and only 'electra' is read"),
        ({"hidden_act": "relu"}, "hidden_act is 'relu'"),
        ({"position_embedding_type": "relative_key"}, "position_embedding_type is 'relative_key'"),
    ],
)
def test_other_models_are_refused(config_of, folder: Path, values: dict, message: str) -> None:
    rewrite_config(folder, **values)
    refused(config_of(f"train.initial_discriminator={folder}"), message)


def test_damaged_folders_are_refused(config_of, folder: Path) -> None:
    config = config_of(f"train.initial_discriminator={folder}")
    rewrite_config(folder, num_hidden_layers=3)
    refused(config, "is absent among the weights and [32] by config.json", error=DamagedError)
    (folder / "config.json").write_text("{")
    refused(config, "config.json: unreadable", error=DamagedError)
    (folder / "config.json").write_text('{"model_type": "electra"}')
    (folder / "model.safetensors").write_bytes(b"no weights")
    refused(config, "model.safetensors: unreadable", error=DamagedError)
    (folder / "model.safetensors").unlink()
    refused(config, "no weights in it", error=DamagedError)
    (folder / "model.safetensors.index.json").write_text('{"weight_map": {"a": "model-00001-of-00001.safetensors"}}')
    refused(config, "model-00001-of-00001.safetensors: missing", error=DamagedError)
    (folder / "config.json").unlink()
    refused(config, "no Hugging Face folder (no config.json)")


def test_unknown_weights_are_named(folder: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    save_file(weights | {"classifier.dense.weight": torch.zeros(2, 2)}, folder / "model.safetensors")
    with pytest.raises(FolderError, match=r"classifier\.dense\.weight: no weights of ElectraForPreTraining"):
        read_folder(folder)


def test_every_layout_is_read(folders, folder: Path) -> None:
    """Pickled, in several files, without head, with the names of releases before 2.0; all with their buffers."""
    named = load_file(folder / "model.safetensors")
    wanted = read_folder(folder).weights
    (folder / "model.safetensors").unlink()
    old = {name.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta"): weight
           for name, weight in named.items()}  # fmt: skip
    torch.save(old | {"electra.embeddings.position_ids": torch.arange(64)[None]}, folder / "pytorch_model.bin")
    found = read_folder(folder)
    assert found.head == "detection"
    same(found.weights, Network(folder, found.model, 0, "detection", wanted))
    (folder / "pytorch_model.bin").unlink()

    parts = [dict(list(named.items())[first::2]) for first in (0, 1)]
    for number, part in enumerate(parts):
        save_file(part, folder / f"part_{number}.safetensors")
    index = {name: f"part_{number}.safetensors" for number, part in enumerate(parts) for name in part}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
    same(read_folder(folder).weights, Network(folder, found.model, 0, "detection", wanted))
    (folder / "model.safetensors.index.json").unlink()

    bare = {n.removeprefix("electra."): w for n, w in named.items() if n.startswith("electra.")}
    save_file(bare, folder / "model.safetensors")
    assert read_folder(folder).head == "none"
    same(read_folder(folder).weights, Network(folder, found.model, 0, "none", wanted), "head.")

    generator = load_file(folders[1] / "model.safetensors")
    table = generator["electra.embeddings.word_embeddings.weight"]
    from_transformers(generator | {"generator_lm_head.weight": table.clone()}, "here")
    with pytest.raises(FolderError, match=r"generator_lm_head\.weight is not the token table"):
        from_transformers(generator | {"generator_lm_head.weight": table + 1}, "here")


def test_a_folder_enters_the_fingerprint_by_content(config_of, folder: Path) -> None:
    config = config_of(f"train.initial_discriminator={folder}")
    key = "train.initial_discriminator"
    assert science_of(config, "pretrain")[key] == science_of(config_of(), "pretrain")[key]
    rewrite_config(folder, layer_norm_eps=1e-6)
    assert science_of(config, "pretrain")[key] != science_of(config_of(), "pretrain")[key]


def test_pretraining_starts_from_the_folders(config_path: Path, folders, electra: Command) -> None:
    arguments = (
        config_path, "run.name=continued", *MODEL, "train.steps=1", "train.held_out_rows=0",
        f"train.initial_discriminator={folders[0]}", f"train.initial_generator={folders[1]}",
    )  # fmt: skip
    refused = electra("run", *arguments, "run.name=wrong", "--until", "pretrain", code=78).stderr
    assert "set tokenizer.kind=wordpiece tokenizer.path=" in refused
    wordpiece = ("tokenizer.kind=wordpiece", f"tokenizer.path={folders[0]}/vocab.txt")
    electra("run", *arguments, *wordpiece, "--until", "pretrain")
    folder = config_path.parent / "out/runs/continued/pretrain/checkpoints"
    found = checkpoints.load(folder, 1)  # the first step's learning rate is 0
    names = found.shapes(checkpoints.WEIGHTS).keys()
    for extract, theirs in zip((discriminator_weights, generator_weights), folders, strict=True):
        same(extract(found.tensors(checkpoints.WEIGHTS), names), read_folder(theirs))


def test_a_run_that_has_started_needs_its_folder_no_more(
    config_path: Path, folder: Path, electra: Command, caplog: pytest.LogCaptureFixture
) -> None:
    arguments = (
        config_path, *MODEL, "train.steps=2", "train.checkpoint_every=1", "train.held_out_rows=0",
        f"train.initial_discriminator={folder}", "tokenizer.kind=wordpiece",
        f"tokenizer.path={write_vocabulary(config_path.parent)}",
    )  # fmt: skip
    electra("run", *arguments, "--until", "pretrain")
    config = load_config(config_path, tuple(map(str, arguments[1:])))
    before = science_of(config, "pretrain")
    shutil.rmtree(folder)
    caplog.set_level(logging.INFO)
    assert decide(config, "pretrain").action == "reuse"
    assert science_of(config, "pretrain") == before
    assert caplog.text.count("no such folder; taken to be the one that the run started from") == 1
    assert find_pretrained(config).step == 2
    status = json.loads(electra("status", *arguments, "--json").stdout)
    assert status["rerun"]["pretrain"] == "reuse: up to date, at step 2"

    run = config_path.parent / "out/runs/tiny/pretrain"
    shutil.rmtree(checkpoints.step_folder(run / "checkpoints", 2))
    assert "restored step 1 from" in electra("pretrain", *arguments).stderr
    shutil.rmtree(run / "checkpoints")
    again = ("run", *arguments, "--until", "pretrain", "--force", "pretrain")
    assert "no such folder" in electra(*again, code=78).stderr  # to start again needs it
    generator = f"train.initial_generator={folder}"
    for unknown in (("run.name=fresh",), (generator,)):
        refused = load_config(config_path, (*map(str, arguments[1:]), *unknown))
        with pytest.raises(ConfigError, match=f"train.initial_.*={folder}: no such folder"):
            science_of(refused, "pretrain")
