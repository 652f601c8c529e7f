"""Model cards: README.md of an exported network, filled from the records of its run."""

import io
import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML

from data_shards.store import read_manifest
from model.hf import ARCHITECTURES, OTHER_WEIGHTS
from model.weights import OTHERS, Head, Weights, head_of
from pipeline import checkpoint as checkpoints
from pipeline.config import Config
from pipeline.errors import FORESEEN
from pipeline.journal import read_entries
from pipeline.stages import locate_tokenized, read_record_file

_TAGS = ("electra", "replaced-token-detection")
_PAPER = "[Clark, Luong, Le and Manning, ICLR 2020](https://arxiv.org/abs/2003.10555)"
_PRIVATE = (  # where things lie on the machine that trained, which is nobody's business elsewhere
    "run.dir", "data.shards_dir", "data.local_dir", "evaluate.data_dir", "tracking", "launch",
)  # fmt: skip


_HUB_NAME = re.compile(r"\w[\w.-]*(/\w[\w.-]*)?", re.ASCII)


@dataclass(frozen=True)
class Card:
    """What the cards of a checkpoint say.

    Attributes:
        name: Of the run.
        config: The run.
        step: Of the checkpoint.
        facts: Rows of the table: what, value.
        held_out: Metrics on held-out text, with the step they belong to.
        scores: By task and metric, of this checkpoint.
        license_id: Licence; ``unknown`` where nobody said.
        languages: ISO 639 codes.
    """

    name: str
    config: Config
    step: int
    facts: list[tuple[str, str]]
    held_out: dict[str, float]
    held_out_step: int
    scores: dict[str, dict[str, Any]]
    license_id: str
    languages: tuple[str, ...]


def read_card(
    run_folder: Path, config: Config, checkpoint: checkpoints.Checkpoint, license_id: str, languages: tuple[str, ...]
) -> Card:
    """Collects what the run's records say; what is missing there is left out."""
    pretrain = read_record_file(run_folder / "pretrain" / "stage.json")
    return Card(
        name=run_folder.name,
        config=config,
        step=checkpoint.step,
        facts=_facts(run_folder, config, checkpoint.step),
        held_out=pretrain.metrics if pretrain else {},
        held_out_step=pretrain.metrics_step if pretrain else 0,
        scores=_scores(run_folder / "evaluate" / "results.json", checkpoint.folder.name),
        license_id=license_id,
        languages=languages,
    )


def _facts(run_folder: Path, config: Config, step: int) -> list[tuple[str, str]]:
    objective, data = config.objective, config.data
    facts = [
        ("data", "; ".join(_corpora(run_folder, config))),
        (
            "tokenizer",
            config.tokenizer.kind + (f", from `{config.tokenizer.path.name}`" if config.tokenizer.path else ""),
        ),
        ("steps", f"{step:,} of {config.train.steps:,}"),
        ("batch", f"{config.train.global_batch_size:,} rows of {data.sequence_length} tokens, layout {data.layout}"),
    ]
    entries = [entry for entry in read_entries(run_folder / "pretrain" / "journal.jsonl") if entry["step"] <= step]
    if entries:
        at = "" if entries[-1]["step"] == step else f" (at step {entries[-1]['step']:,})"
        facts.append(("tokens", f"{entries[-1]['tokens']:,}{at}"))
        facts.append(("FLOPs, nominal", f"{entries[-1]['flops']:.3e}{at}"))
        if "flops_paper" in entries[-1]:
            facts.append(("FLOPs as the paper counts", f"{entries[-1]['flops_paper']:.3e}{at}"))
    starts = {
        "forked from": config.run.fork_from,
        "initial discriminator": _name_of(config.train.initial_discriminator),
        "initial generator": _name_of(config.train.initial_generator),
    }
    facts += [(what, f"`{value}`") for what, value in starts.items() if value]
    generator = f", generator {objective.generator}" if objective.generator != "network" else ""
    facts += [
        ("objective", f"{objective.name}{generator}"),
        ("training", objective.training),
        ("sharing", objective.sharing),
        ("recipe", config.recipe),
        ("precision", config.train.precision),
    ]
    return facts


def _name_of(path: Path | None) -> str | None:
    return path.name if path else None


def _corpora(run_folder: Path, config: Config) -> list[str]:
    """Each corpus: name, its dataset on the hub, documents and tokens, weight."""
    record = read_record_file(run_folder / "tokenize" / "stage.json")
    tokenized = locate_tokenized(config, record.output) if record else {}
    folders = {corpus["name"]: Path(corpus["folder"]) for corpus in tokenized.get("corpora", [])}
    lines = []
    for corpus in config.data.corpora:
        line = corpus.name + (f" (`{corpus.hub}` of the Hugging Face hub)" if _is_on_hub(corpus.hub) else "")
        try:
            manifest = read_manifest(folders[corpus.name])
            line += f", {manifest.num_documents():,} documents, {manifest.num_tokens():,} tokens"
        except (KeyError, OSError, *FORESEEN):  # shards may have been deleted since
            pass
        lines.append(line + (f", weight {corpus.weight:g}" if len(config.data.corpora) > 1 else ""))
    return lines


def _is_on_hub(name: str | None) -> bool:
    """Whether ``hub`` names a dataset of the hub; ``datasets`` takes local paths too, and prefers what is there."""
    return bool(name and _HUB_NAME.fullmatch(name)) and not Path(name or "").exists()


def _scores(path: Path, checkpoint_name: str) -> dict[str, dict[str, Any]]:
    """Results of this very checkpoint."""
    try:
        results = json.loads(path.read_text(encoding="utf-8"))
        return results["tasks"] if Path(results["checkpoint"]).name == checkpoint_name else {}
    except (OSError, ValueError, KeyError, TypeError):
        return {}


def write_card(folder: Path, role: str, weights: Weights, card: Card) -> None:
    """Writes README.md.

    Args:
        folder: The network's.
        role: ``discriminator`` or ``generator``.
        weights: Its plain weights.
        card: What the run's records say.
    """
    head = head_of(weights)
    parts = [f"---\n{_yaml(_front_matter(card, head))}---\n", _what(role, weights, card)]
    facts = [*card.facts, ("weights", f"{sum(weight.numel() for weight in weights.values()):,}")]
    parts.append("\n".join(["| | |", "|---|---|", *(f"| {what} | {value} |" for what, value in facts)]) + "\n")
    parts += [*_results(card), _use(head), _configuration(card.config)]
    (folder / "README.md").write_text("\n".join(parts), encoding="utf-8")


def _front_matter(card: Card, head: Head) -> dict[str, Any]:
    matter: dict[str, Any] = {"license": card.license_id, "library_name": "transformers", "tags": list(_TAGS)}
    if head == "prediction":
        matter["pipeline_tag"] = "fill-mask"
    if card.languages:
        matter["language"] = list(card.languages)
    datasets = [corpus.hub for corpus in card.config.data.corpora if _is_on_hub(corpus.hub)]
    return matter | ({"datasets": datasets} if datasets else {})


def _what(role: str, weights: Weights, card: Card) -> str:
    is_detector = head_of(weights) == "detection"
    if role == "generator":
        what = "The generator, which fills in masked tokens. Fine-tune the discriminator, not this one."
    elif is_detector:
        what = "The discriminator, which tells replaced tokens from original ones. Fine-tune this one."
    else:
        what = f"The main network, trained to predict original tokens (objective {card.config.objective.name})."
    text = f"# {card.name}: {role}\n\nELECTRA ({_PAPER}). {what}\n"
    others = sorted(name for name in weights if name.startswith(OTHERS))
    if others:
        text += f"\ntransformers has no place for {', '.join(others)}; they are in `{OTHER_WEIGHTS}`.\n"
    if not is_detector and card.config.model.activation != "gelu":
        text += (
            "\nTrained with the tanh form of GELU. transformers has the exact form in this network's head whatever "
            "`hidden_act` says, so its logits differ by about 1e-3.\n"
        )
    if card.license_id == "unknown":
        text += "\nNobody has stated a licence. That of the training data may bind.\n"
    return text


def _results(card: Card) -> list[str]:
    parts = []
    if card.held_out:
        rows = [
            f"| {name.removeprefix('held_out/')} | {_short(value)} |" for name, value in sorted(card.held_out.items())
        ]
        rows = [f"## Held-out text, step {card.held_out_step:,}\n", "| metric | value |", "|---|---|", *rows]
        parts.append("\n".join(rows) + "\n")
    if card.scores:
        rows = [
            f"| {task} | {metric} | {about['median']:.4f} | {', '.join(f'{value:.4f}' for value in about['values'])} |"
            for task, metrics in card.scores.items()
            for metric, about in metrics.items()
        ]
        header = ["## Fine-tuned scores on the dev sets\n", "| task | metric | median | runs |", "|---|---|---|---|"]
        parts.append("\n".join([*header, *rows]) + "\n")
    return parts


def _short(value: float) -> str:
    return f"{value:.4f}".rstrip("0").rstrip(".")


def _use(head: Head) -> str:
    return (
        "## Use\n\n```python\n"
        f"from transformers import AutoTokenizer, {ARCHITECTURES[head]}\n"
        'tokenizer = AutoTokenizer.from_pretrained("PATH")\n'
        f'model = {ARCHITECTURES[head]}.from_pretrained("PATH")\n```\n'
    )


def _configuration(config: Config) -> str:
    return f"<details><summary>Configuration</summary>\n\n```yaml\n{_yaml(_public(config))}```\n\n</details>\n"


def _public(config: Config) -> dict[str, Any]:
    """The config without folders of the machine; files by their names."""
    tree = config.model_dump(mode="json")
    for dotted in _PRIVATE:
        section, _, key = dotted.partition(".")
        if key:
            tree[section].pop(key)
        else:
            tree.pop(section)
    for section in tree.values():
        for key, value in section.items() if isinstance(section, dict) else ():
            section[key] = _without_folders(value)
    for corpus in tree["data"]["corpora"]:
        if corpus["hub"] and not _is_on_hub(corpus["hub"]):
            corpus["hub"] = Path(corpus["hub"]).name
    return tree


def _without_folders(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_folders(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [_without_folders(inner) for inner in value]
    return Path(value).name if isinstance(value, str) and value.startswith("/") else value


def _yaml(content: dict[str, Any]) -> str:
    stream = io.StringIO()
    yaml = YAML()
    yaml.default_flow_style = False
    yaml.width = 120
    yaml.dump(content, stream)
    return stream.getvalue()
