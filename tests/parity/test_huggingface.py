"""Our networks against transformers' ELECTRA: exported weights give the same logits and gradients.

Each case writes a folder, loads it with transformers, and reads it back, so that
both directions are tested by what they are for.
"""

import os
import shutil
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

os.environ["HF_HUB_OFFLINE"] = "1"
from transformers import ElectraForMaskedLM, ElectraForPreTraining
from transformers.utils import logging as their_logging

from model.batch import MicroBatch
from model.config import SIZES, EncoderShape, ModelConfig
from model.electra import Electra
from model.hf import from_transformers, read_folder, write_folder
from model.kernels.attention import Packing
from model.kernels.select import select_kernels
from model.masking import Masking
from model.objective import ObjectiveConfig
from model.weights import Weights, discriminator_weights, generator_weights

PAD_ID, LENGTH = 0, 40
GAINS = {"query_key_value": 1.5, "attention.output": 0.3, "dense": 2.0, "discriminator_head.output": 1.5}
their_logging.disable_progress_bar()


@dataclass(frozen=True)
class Text:
    """Pieces of tokens as transformers reads them, one a row, padded; and as we do, padded or packed."""

    pieces: list[Tensor]

    @property
    def lengths(self) -> list[int]:
        return [len(piece) for piece in self.pieces]

    def theirs(self) -> dict[str, Tensor]:
        ids = torch.nn.utils.rnn.pad_sequence(self.pieces, batch_first=True, padding_value=PAD_ID)
        mask = torch.arange(ids.shape[1]) < torch.tensor(self.lengths)[:, None]
        return {"input_ids": ids, "attention_mask": mask.long(), "token_type_ids": self._types(ids.shape[1])}

    def _types(self, length: int) -> Tensor:
        """The second half of each piece is segment B."""
        place = torch.arange(length).expand(len(self.pieces), -1)
        return (
            (place >= torch.tensor(self.lengths)[:, None] // 2) & (place < torch.tensor(self.lengths)[:, None])
        ).long()

    def padded(self) -> MicroBatch:
        inputs = self.theirs()
        positions = torch.arange(inputs["input_ids"].shape[1]).expand_as(inputs["input_ids"])
        return _batch(inputs["input_ids"], positions, inputs["token_type_ids"], 1 - inputs["attention_mask"])

    def packed(self) -> MicroBatch:
        types = [row[:length] for row, length in zip(self._types(max(self.lengths)), self.lengths, strict=True)]
        return _batch(
            torch.cat(self.pieces)[None],
            torch.cat([torch.arange(length) for length in self.lengths])[None],
            torch.cat(types)[None],
            torch.cat([torch.full((length,), number) for number, length in enumerate(self.lengths)])[None],
        )

    def real(self, padded: Tensor) -> Tensor:
        """What belongs to tokens of the pieces, in their order."""
        return torch.cat([row[:length] for row, length in zip(padded, self.lengths, strict=True)])


def _batch(ids: Tensor, positions: Tensor, types: Tensor, pieces: Tensor) -> MicroBatch:
    """Every position is selected, so that the generator's head runs on all of them."""
    everywhere = torch.arange(ids.shape[1]).expand_as(ids)
    return MicroBatch(ids, positions, types, Packing(pieces), Masking(everywhere, torch.ones(ids.shape), ids), 0)


def random_model(config: ModelConfig, vocab_size: int, **objective) -> Electra:
    """Weights at which layers neither forget the token nor blur it, so that attention is sharp and logits differ."""
    with torch.device("meta"):
        model = Electra(config, ObjectiveConfig(**objective), vocab_size, select_kernels("torch"))
    model.to_empty(device="cpu").eval()
    torch.manual_seed(2)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            mean = 1.0 if "layer_norm" in name and name.endswith("weight") else 0.0
            gain = next((gain for part, gain in GAINS.items() if part in name), 0.5)
            std = gain * parameter.shape[1] ** -0.5 if parameter.dim() == 2 else 0.05
            parameter.normal_(mean, std)
    return model


def make_text(vocab_size: int, lengths: tuple[int, ...] = (LENGTH, 23)) -> Text:
    draw = torch.Generator().manual_seed(1)
    return Text([torch.randint(5, vocab_size, (length,), generator=draw) for length in lengths])


def plain(model: Electra, role: str) -> Weights:
    state = model.state_dict()
    return (discriminator_weights if role == "discriminator" else generator_weights)(state.__getitem__, state.keys())


def shape_of(config: ModelConfig, role: str) -> EncoderShape:
    return config.discriminator if role == "discriminator" else config.generator


def our_logits(model: Electra, role: str, batch: MicroBatch) -> Tensor:
    if role == "discriminator":
        return model.discriminate(batch.token_ids_BT, batch)
    return model.generator_logits(batch).unflatten(0, batch.token_ids_BT.shape)


def loss_of(logits: Tensor, role: str) -> Tensor:
    """RTD over all tokens, or MLM at every sixth, with labels of no meaning; ``logits`` of real tokens only."""
    draw = torch.Generator().manual_seed(3)
    if role == "discriminator":
        labels = (torch.rand(logits.shape, generator=draw) < 0.2).float()
        return F.binary_cross_entropy_with_logits(logits, labels)
    selected = torch.arange(0, len(logits), 6)
    return F.cross_entropy(logits[selected], torch.randint(0, logits.shape[-1], selected.shape, generator=draw))


def load(folder: Path, role: str) -> torch.nn.Module:
    kind = ElectraForPreTraining if role == "discriminator" else ElectraForMaskedLM
    model, info = kind.from_pretrained(folder, output_loading_info=True)
    assert not any(info.values()), info
    return model.eval()


def our_gradients(model: Electra, role: str) -> Weights:
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    extract = discriminator_weights if role == "discriminator" else generator_weights
    return extract(gradients.__getitem__, gradients.keys())


def relative_errors(ours: Weights, theirs: Weights) -> dict[str, float]:
    assert ours.keys() == theirs.keys()
    return {name: float((ours[name] - theirs[name]).norm() / theirs[name].norm()) for name in ours}


BASE, LARGE = ("base", 30522, 1e-5), ("large", 1000, 1e-4)


@pytest.mark.parametrize("role", ["discriminator", "generator"])
@pytest.mark.parametrize(
    ("size", "vocab_size", "tolerance"),
    [("small", 30522, 1e-5), *(pytest.param(*case, marks=pytest.mark.soak) for case in (BASE, LARGE))],
)
def test_logits_and_gradients_at_the_published_sizes(
    size: str, vocab_size: int, tolerance: float, role: str, tmp_path: Path
):
    assert size in SIZES
    config = ModelConfig(size=size, dropout=0.0, attention_dropout=0.0)  # type: ignore[arg-type, call-arg]
    check_logits_and_gradients(config, vocab_size, tolerance, role, tmp_path)


@pytest.mark.parametrize("role", ["discriminator", "generator"])
@pytest.mark.parametrize(("size", "vocab_size", "tolerance"), [BASE, LARGE])
def test_logits_and_gradients_at_the_published_widths(
    size: str, vocab_size: int, tolerance: float, role: str, tmp_path: Path
):
    """Two layers of those of Base and Large, whose weights are most of the time; the soak has all."""
    config = ModelConfig(size=size, hidden_layers=2, dropout=0.0, attention_dropout=0.0)  # type: ignore
    assert config.hidden_size == SIZES[size]["hidden_size"]
    check_logits_and_gradients(config, vocab_size, tolerance, role, tmp_path)


def check_logits_and_gradients(
    config: ModelConfig, vocab_size: int, tolerance: float, role: str, tmp_path: Path
) -> None:
    model, text = random_model(config, vocab_size), make_text(vocab_size)
    folder = tmp_path / role
    folder.mkdir()
    weights = plain(model, role)
    write_folder(folder, weights, config, shape_of(config, role), PAD_ID)
    back = read_folder(folder)
    assert back.weights.keys() == weights.keys()
    assert all(torch.equal(back.weights[name], weights[name]) for name in weights)
    del back, weights

    with torch.no_grad():
        packed = our_logits(model, role, text.packed())[0]
    padded = text.real(our_logits(model, role, text.padded()))
    loss_of(padded, role).backward()
    gradients, padded = our_gradients(model, role), padded.detach()
    del model  # Large, twice with gradients, would be 6 GB

    theirs = load(folder, role)
    shutil.rmtree(folder)  # pytest keeps what its last runs wrote
    expected = text.real(theirs(**text.theirs()).logits)
    loss_of(expected, role).backward()
    expected = expected.detach()
    errors = relative_errors(
        gradients, from_transformers({n: p.grad for n, p in theirs.named_parameters()}, "gradients")
    )
    worst = max(errors, key=errors.__getitem__)
    logits, size = [float((ours - expected).abs().max()) for ours in (padded, packed)], config.size
    print(f"\n{size} {role}: logits {logits[0]:.1e} padded, {logits[1]:.1e} packed (deviation {expected.std():.2f}); "
          f"gradients {errors[worst]:.1e} ({worst})")  # fmt: skip
    assert expected.std() > 0.1
    torch.testing.assert_close(padded, expected, rtol=0, atol=tolerance)
    torch.testing.assert_close(packed, expected, rtol=0, atol=tolerance)
    assert errors[worst] < 1e-4


NARROW = {
    "size": "tiny", "hidden_layers": 3, "hidden_size": 16, "attention_heads": 2, "feed_forward_size": 40,
    "generator_width": 0.5, "generator_depth": 0.67, "max_positions": 24, "embedding_size": 16,
}  # fmt: skip
VARIANTS = [
    ({"embedding_size": 12}, {}),
    ({"embedding_size": 8}, {}),
    ({"layer_norm_eps": 1e-5}, {"sharing": "none"}),
    ({"generator_embedding_size": 10}, {"sharing": "none"}),
    ({}, {"sharing": "gdes"}),
    ({}, {"shared_tables": "token_and_position"}),
    ({"generator_width": 1.0, "generator_depth": 1.0}, {"sharing": "all"}),
    ({}, {"training": "adversarial"}),
]


@torch.no_grad()
@pytest.mark.parametrize("role", ["discriminator", "generator"])
@pytest.mark.parametrize(("shape", "objective"), VARIANTS)
def test_every_way_of_sharing_stands_alone_when_exported(shape: dict, objective: dict, role: str, tmp_path: Path):
    config = ModelConfig.model_validate(NARROW | shape)
    model, text = random_model(config, 60, **objective), make_text(60, (24, 9, 15))
    write_folder(tmp_path, plain(model, role), config, shape_of(config, role), PAD_ID)
    expected = text.real(load(tmp_path, role)(**text.theirs()).logits)
    assert expected.std() > 0.1
    ours = our_logits(model, role, text.packed())[0]
    torch.testing.assert_close(ours, expected, rtol=0, atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("name", ["mlm", "replace_mlm", "all_tokens_mlm"])
def test_networks_that_predict_tokens_are_masked_language_models(name: str, tmp_path: Path):
    config, objective = ModelConfig.model_validate(NARROW), {"name": name}
    model, text = random_model(config, 60, **objective), make_text(60, (24, 9, 15))
    weights = plain(model, "discriminator")
    write_folder(tmp_path, weights, config, config.discriminator, PAD_ID)
    batch = text.packed()
    hidden = model.encode(batch.token_ids_BT, batch)
    ours = model.prediction_head.logits(hidden, model.embeddings.token_table())[0]  # type: ignore[operator]
    expected = text.real(load(tmp_path, "generator")(**text.theirs()).logits)
    torch.testing.assert_close(ours, expected, rtol=0, atol=1e-5)
    back = read_folder(tmp_path)
    assert back.head == "prediction"
    assert back.weights.keys() == weights.keys()
    assert any(key.startswith("copy_gate.") for key in back.weights) == (name == "all_tokens_mlm")
    assert all(torch.equal(back.weights[key], weights[key]) for key in weights)


@torch.no_grad()
def test_the_tanh_form_of_gelu_is_theirs_but_for_the_head_of_their_generator(tmp_path: Path):
    config = ModelConfig.model_validate(NARROW | {"activation": "gelu_tanh"})
    model, text = random_model(config, 60), make_text(60, (24, 9, 15))
    for role, tolerance in (("discriminator", 1e-5), ("generator", 5e-3)):
        folder = tmp_path / role
        folder.mkdir()
        write_folder(folder, plain(model, role), config, shape_of(config, role), PAD_ID)
        expected = text.real(load(folder, role)(**text.theirs()).logits)
        torch.testing.assert_close(our_logits(model, role, text.packed())[0], expected, rtol=0, atol=tolerance)
        assert read_folder(folder).model.activation == "gelu_tanh"
