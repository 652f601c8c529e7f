"""The peer of ``finetune.py``: transformers' Trainer on transformers' ElectraModel, and folders for both sides."""

import re
import sys
import time
import unicodedata
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR
from transformers import (
    AutoTokenizer,
    DataCollatorWithPadding,
    ElectraConfig,
    ElectraForPreTraining,
    ElectraModel,
    PrinterCallback,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)
from transformers.utils import logging

from data_shards.tokenizer_files import install
from model.config import ModelConfig
from pipeline.evaluation.finetune import Plan, layer_learning_rates
from pipeline.evaluation.recipes import Recipe
from pipeline.optimizer import ElectraAdamW
from pipeline.schedule import linear_times_warmup

logging.set_verbosity_error()
logging.disable_progress_bar()
Row = dict[str, Any]
_SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
_PUBLISHED_IDS = 30_522
_EPS, _BETAS, _CLIP = 1e-6, (0.9, 0.999), 1.0
_OUR_NAMES = (
    (re.compile(r"^electra\.encoder\.layer\."), "discriminator.layers."),
    (re.compile(r"^electra\.embeddings_project\."), "discriminator.embeddings_project."),
    (re.compile(r"^electra\.embeddings\."), "embeddings."),
    (re.compile(r"^output\."), "head.output."),
    (re.compile(r"LayerNorm"), "layer_norm"),
)


class PeerModel(nn.Module):
    """ElectraModel, dropout and one linear layer on [CLS]: the model of ``LinearHead``."""

    def __init__(self, folder: Path, recipe: Recipe, head: nn.Linear, attention: str):
        super().__init__()
        self.electra = ElectraModel.from_pretrained(
            folder,
            attn_implementation=attention,
            hidden_dropout_prob=recipe.dropout,
            attention_probs_dropout_prob=recipe.dropout,
            dtype=torch.float32,
        )
        self.dropout = nn.Dropout(recipe.dropout)
        self.output = nn.Linear(head.in_features, head.out_features)
        self.output.load_state_dict(head.state_dict())

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor, token_type_ids: Tensor, labels: Tensor | None = None
    ) -> dict[str, Tensor]:
        """Logits ``(P, C)``, and with labels the mean loss; a single output is a scaled score."""
        hidden_PLH = self.electra(input_ids, attention_mask, token_type_ids).last_hidden_state
        logits_PC = self.output(self.dropout(hidden_PLH[:, 0]))
        if labels is None:
            return {"logits": logits_PC}
        if logits_PC.shape[1] == 1:
            return {"loss": F.mse_loss(logits_PC.squeeze(1), labels.float()), "logits": logits_PC}
        return {"loss": F.cross_entropy(logits_PC, labels.long()), "logits": logits_PC}


class _Clock(TrainerCallback):
    """CPU seconds of the training loop alone."""

    seconds = 0.0

    def on_train_begin(self, *_: Any, **__: Any) -> None:
        self._begin = time.process_time()

    def on_train_end(self, *_: Any, **__: Any) -> None:
        self.seconds = time.process_time() - self._begin


class PeerTraining:
    """One fine-tuning run of the Trainer, with our optimizer, rates and schedule."""

    def __init__(
        self,
        model: PeerModel,
        tokenizer: Any,
        rows: Sequence[Row],
        recipe: Recipe,
        seed: int,
        folder: Path,
        pads_to: int | None = None,
        sampling: str = "random",
    ):
        """``pads_to``: a length for every batch; None to pad to the longest of each."""
        plan = Plan(len(rows), recipe.batch_size, recipe.epochs, recipe.warmup_fraction)
        self.collate = DataCollatorWithPadding(tokenizer, "max_length" if pads_to else True, pads_to)
        self._clock = _Clock()
        self._trainer = Trainer(
            model=model,
            args=TrainingArguments(
                output_dir=str(folder / "trainer"),
                num_train_epochs=recipe.epochs,
                per_device_train_batch_size=recipe.batch_size,
                max_grad_norm=_CLIP,
                seed=seed,
                use_cpu=True,
                save_strategy="no",
                logging_strategy="no",
                report_to=[],
                disable_tqdm=True,
                dataloader_num_workers=0,
                dataloader_pin_memory=False,
                remove_unused_columns=False,
                train_sampling_strategy=sampling,
            ),
            data_collator=self.collate,
            train_dataset=list(rows),  # type: ignore[arg-type]
            optimizers=_optimizer(model, recipe, plan),
            callbacks=[self._clock],
        )
        self._trainer.remove_callback(PrinterCallback)

    def run(self) -> float:
        """Trains to the end; returns the CPU seconds of the loop."""
        self._trainer.train()
        return self._clock.seconds

    def step(self, rows: Sequence[Row]) -> None:
        """One step on given rows, as the Trainer's loop does it, without the loop's own work."""
        trainer: Any = self._trainer
        trainer.current_gradient_accumulation_steps = 1  # which the loop sets
        trainer.training_step(trainer.model, self.collate(list(rows)))
        trainer.accelerator.clip_grad_norm_(trainer.model.parameters(), _CLIP)
        trainer.optimizer.step()
        trainer.lr_scheduler.step()
        trainer.model.zero_grad()


def _optimizer(model: nn.Module, recipe: Recipe, plan: Plan) -> tuple[ElectraAdamW, LambdaLR]:
    renamed = [(_our_name(name), parameter) for name, parameter in model.named_parameters()]
    as_ours: Any = SimpleNamespace(named_parameters=lambda: iter(renamed))
    groups = layer_learning_rates(as_ours, recipe)
    optimizer = ElectraAdamW(groups, _BETAS, _EPS, recipe.weight_decay, bias_correction=False)
    for group in optimizer.param_groups:
        group["lr"] = group["peak_lr"]
    schedule = LambdaLR(optimizer, lambda step: linear_times_warmup(1.0, step, plan.warmup_steps, plan.steps))
    return optimizer, schedule


def _our_name(name: str) -> str:
    for pattern, ours in _OUR_NAMES:
        name = pattern.sub(ours, name)
    return name


def learning_rates(groups: Iterable[dict[str, Any]]) -> dict[float, int]:
    """Peak rate to the number of weights that have it."""
    found: Counter[float] = Counter()
    for group in groups:
        found[group["peak_lr"]] += sum(parameter.numel() for parameter in group["params"])
    return dict(found)


def peer_rates(model: nn.Module, recipe: Recipe) -> dict[float, int]:
    """The same of the peer's model."""
    return learning_rates(_optimizer(model, recipe, Plan(1, 1, 1, 0.0))[0].param_groups)


@torch.no_grad()
def predict(model: PeerModel, collate: Any, rows: Sequence[Row]) -> Tensor:
    """Logits of all rows, in their order."""
    model.eval()
    logits = []
    for first in range(0, len(rows), 64):
        batch = collate([{k: v for k, v in row.items() if k != "labels"} for row in rows[first : first + 64]])
        logits.append(model(**batch)["logits"])
    return torch.cat(logits)


def load_tokenizer(folder: Path) -> Any:
    """The folder's tokenizer, as transformers loads it."""
    return AutoTokenizer.from_pretrained(folder)


def tokenize(tokenizer: Any, texts: Sequence[tuple[str, ...]], max_length: int) -> list[Row]:
    """[CLS] A [SEP] or [CLS] A [SEP] B [SEP] of each example."""
    columns = [list(column) for column in zip(*texts, strict=True)]
    encoded = tokenizer(*columns, truncation=True, max_length=max_length, return_token_type_ids=True)
    names = ("input_ids", "token_type_ids", "attention_mask")
    return [dict(zip(names, values, strict=True)) for values in zip(*(encoded[n] for n in names), strict=True)]


def give_our_ids(name: str, features: Sequence[Any], rows: Sequence[Row]) -> int:
    """Checks that ids and segments are ours, and adds our targets; returns how many rows took our ids.

    Where both texts of a pair are cut and the room is odd, BERT's rule (ours) leaves the first one a token more, the
    tokenizers library the longer one. All else that differs ends the benchmark.
    """
    replaced = 0
    for feature, row in zip(features, rows, strict=True):
        ids = feature.token_ids.tolist()
        types = [int(place >= feature.num_first) for place in range(len(ids))]
        if ids != row["input_ids"] or types != row["token_type_ids"]:
            moved = sum(types) - sum(row["token_type_ids"])
            if len(ids) != len(row["input_ids"]) or moved != -1:
                sys.exit(f"{name}, example {feature.example}: {ids} is not the peer's {row['input_ids']}")
            row.update(input_ids=ids, token_type_ids=types)
            replaced += 1
        row["labels"] = feature.target
    return replaced


def random_folder(folder: Path, size: str, vocabulary: Path | None, texts: Iterable[str]) -> Path:
    """A Hugging Face folder of that size with random weights; returns it.

    Args:
        folder: Where it goes.
        size: Of ``model.size``.
        vocabulary: BERT's or one like it; None to make one of the words of ``texts``.
        texts: Of the tasks.
    """
    if vocabulary is None:
        vocabulary = folder.with_name("words.txt")
        vocabulary.write_text("\n".join(_words(texts)) + "\n", encoding="utf-8")
    install(folder, vocabulary)
    model = ModelConfig.model_validate({"size": size})
    torch.manual_seed(0)
    config = ElectraConfig(
        vocab_size=len(vocabulary.read_text(encoding="utf-8").splitlines()),
        embedding_size=model.embedding_size,
        hidden_size=model.hidden_size,
        num_hidden_layers=model.hidden_layers,
        num_attention_heads=model.attention_heads,
        intermediate_size=model.feed_forward_size,
        max_position_embeddings=model.max_positions,
    )
    ElectraForPreTraining(config).save_pretrained(folder)
    return folder


def _words(texts: Iterable[str]) -> list[str]:
    """As many pieces as the published vocabulary: special tokens, characters, the most frequent words, empty rows."""
    counts: Counter[str] = Counter()
    for text in texts:
        plain = "".join(c for c in unicodedata.normalize("NFD", text.lower()) if not unicodedata.combining(c))
        counts.update(re.findall(r"[^\W_]+|[\W_]", plain))
    characters = sorted({character for word in counts for character in word if not character.isspace()})
    pieces = [*_SPECIAL, *characters, *(f"##{c}" for c in characters)]
    pieces += [word for word, _ in counts.most_common() if len(word) > 1]
    pieces = pieces[:_PUBLISHED_IDS]
    return pieces + [f"[unused{number}]" for number in range(_PUBLISHED_IDS - len(pieces))]
