"""Scores an evaluation's prediction files again, by libraries alone, and compares with its results.json.

    python tests/parity/rescore.py RUN_FOLDER [--squad1 SCRIPT DEV.json] [--squad2 SCRIPT DEV.json]

SCRIPT is the official evaluate-v1.1.py or evaluate-v2.0.py, which is not part of this repository. The exit code is 1
when a metric differs by more than 1e-9, or one could not be compared.
"""

import argparse
import json
import math
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from scipy import stats
from seqeval.metrics import f1_score as span_f1
from sklearn import metrics as sk

_MOST = 1e-9
Rows = list[dict[str, Any]]


def _columns(rows: Rows) -> tuple[list[Any], list[Any]]:
    return [row["label"] for row in rows], [row["prediction"] for row in rows]


def _flat(rows: Rows) -> tuple[list[Any], list[Any]]:
    """Labels and predictions, of words where they are lists."""
    labels, predictions = _columns(rows)
    if isinstance(labels[0], list):
        return [tag for tags in labels for tag in tags], [tag for tags in predictions for tag in tags]
    return labels, predictions


def _correlation(function: Callable[..., Any]) -> Callable[[Rows], float]:
    def of(rows: Rows) -> float:
        value = float(function(*_columns(rows)).statistic)
        return 0.0 if math.isnan(value) else value  # results.json counts an undefined one as 0

    return of


_METRICS: dict[str, Callable[[Rows], float]] = {
    "accuracy": lambda rows: float(sk.accuracy_score(*_flat(rows))),
    "f1": lambda rows: float(sk.f1_score(*_columns(rows), pos_label=max(row["label"] for row in rows))),
    "matthews": lambda rows: float(sk.matthews_corrcoef(*_columns(rows))),
    "pearson": _correlation(stats.pearsonr),
    "spearman": _correlation(stats.spearmanr),
    "span_f1": lambda rows: float(span_f1(*_columns(rows))),
}


def rescore_unit(folder: Path, metrics: dict[str, float]) -> dict[str, float]:
    """What libraries make of ``predictions.jsonl``, and of those of further parts."""
    scores = {}
    for name in metrics:
        metric = next(known for known in sorted(_METRICS, key=len, reverse=True) if name.startswith(known))
        path = folder / f"predictions{name.removeprefix(metric)}.jsonl"
        rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        scores[name] = _METRICS[metric](rows)
    return scores


def rescore_squad(folder: Path, script: Path, dev: Path, threshold: float | None) -> dict[str, float]:
    """What the official script says, as fractions of 1; its 2.0 version also of the best thresholds."""
    if threshold is None:
        found = _official(script, dev, folder / "predictions.json")
        return {"exact": found["exact_match"] / 100, "f1": found["f1"] / 100}
    found = _official(script, dev, folder / "predictions.json")
    scores = {"exact": found["exact"] / 100, "f1": found["f1"] / 100}
    best = _official(
        script, dev, folder / "predictions_answered.json", "--na-prob-file", folder / "null_odds.json",
        "--na-prob-thresh", threshold,
    )  # fmt: skip
    assert (best["exact"], best["f1"]) == (found["exact"], found["f1"]), "the threshold means something else"
    return scores | {
        "best_exact": best["best_exact"] / 100, "best_f1": best["best_f1"] / 100,
        "best_exact_threshold": best["best_exact_thresh"], "best_f1_threshold": best["best_f1_thresh"],
        "has_answer_exact": best["HasAns_exact"] / 100, "has_answer_f1": best["HasAns_f1"] / 100,
        "no_answer_exact": best["NoAns_exact"] / 100, "no_answer_f1": best["NoAns_f1"] / 100,
    }  # fmt: skip


def _official(script: Path, dev: Path, predictions: Path, *more: object) -> dict[str, float]:
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, script.resolve(), dev.resolve(), predictions.resolve(), *more]
        done = subprocess.run(list(map(str, command)), cwd=folder, capture_output=True, text=True, check=True)
    return json.loads(done.stdout)


def main() -> int:
    """Compares every unit; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path)
    for name in ("squad1", "squad2"):
        parser.add_argument(f"--{name}", type=Path, nargs=2, metavar=("SCRIPT", "DEV"))
    arguments = parser.parse_args()
    arguments.run = arguments.run.resolve()
    results = json.loads((arguments.run / "evaluate/results.json").read_text(encoding="utf-8"))
    worst, problems = 0.0, []
    for path in sorted(arguments.run.glob("evaluate/*/*/**/result.json")):
        unit = json.loads(path.read_text(encoding="utf-8"))
        task, ours = unit["task"], unit["metrics"]
        if (path.parent / "predictions.json").exists():
            given = getattr(arguments, task, None)
            if not given:
                problems.append(f"{task}: no official script was given")
                continue
            threshold = unit["recipe"]["no_answer_threshold"] if task == "squad2" else None
            theirs = rescore_squad(path.parent, *given, threshold)
        else:
            theirs = rescore_unit(path.parent, ours)
        if ours.keys() != theirs.keys():
            problems.append(f"{task}: {sorted(ours)} against {sorted(theirs)}")
        differences = {name: abs(ours[name] - theirs[name]) for name in ours.keys() & theirs.keys()}
        summary = results["tasks"].get(task, {})
        if any(ours[name] not in summary.get(name, {"values": []})["values"] for name in ours):
            problems.append(f"{task}, seed {unit['seed']}: not in results.json")
        worst = max(worst, *differences.values())
        print(f"{task:12} seed {unit['seed']:2}  {max(differences.values()):.1e}  {', '.join(sorted(differences))}")
    problems += [f"largest difference {worst:.1e}"] if worst > _MOST else []
    print("\n".join(problems) or f"all equal within {_MOST:g}; largest difference {worst:.1e}")
    return bool(problems)


if __name__ == "__main__":
    sys.exit(main())
