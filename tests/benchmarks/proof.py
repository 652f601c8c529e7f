"""What pretraining runs came to, as tables small enough to be kept: theirs, their journals, their scores.

    python tests/benchmarks/proof.py RUN RUN… --against SETTING… --out configs/proof/tiny

RUN is a run's folder. Runs whose names differ in a number at the end (``mlm_1``, ``mlm_2``) are one setting, pretrained
several times. Scores are compared with those of each ``--against``, or of the first. With ``--keep`` the lines of runs
that are not given stay, as an earlier call wrote them, and so do scores that a given one's folder lacks, unless it was
trained anew at another commit. Written are

    OUT.md            each run (commit, FLOPs, speed, goodput, attempts), held-out scores, fine-tuned scores
    OUT_journal.csv   lines of the journal: about every tenth of a run, and those with held-out scores
    OUT_scores.csv    a line for each fine-tuning: run, checkpoint, task, metric, seed, score
"""

import argparse
import csv
import math
import re
import statistics
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # it need not be installed

from pipeline.comparison.curves import FLOPS_PAPER
from pipeline.comparison.folder import read_folder
from pipeline.comparison.measures import measure, show
from pipeline.comparison.run import Run
from pipeline.comparison.seeds import Column
from pipeline.evaluation.stored import Results
from pipeline.keys import SCIENCE
from tests.benchmarks.proof_kept import Kept, Line, read_kept

_LINES = 10  # of a run's journal
_DRAWS = ("run.seed", "run.fork_from")
_MADE_OF = tuple(key for stage in ("tokenize", "pretrain") for key in SCIENCE[stage] if key not in _DRAWS)
_SCORED = "held_out/mask_token_loss"
_JOURNAL = (
    "train/generator_mlm_loss", "train/prediction_loss", "train/discriminator_rtd_loss", "train/discriminator_auc",
    "held_out/mask_token_loss", "held_out/discriminator_auc", "train/learning_rate", "speed/tokens_per_s",
)  # fmt: skip
_OF_RUNS = (
    "step", "tokens", "FLOPs (nominal)", "FLOPs (paper's count)", "training time", "tokens/s (median)",
    "goodput, % productive", "attempts", "git commit",
)  # fmt: skip
_HELD_OUT = {
    "held_out/mask_token_loss": "loss on [MASK], nats",
    "held_out/discriminator_auc": "discriminator's AUC",
    "held_out/unigram_entropy": "unigram entropy, nats",
}


@dataclass(frozen=True)
class Setting:
    """Pretrainings that differ in the seed alone."""

    name: str
    runs: tuple[Run, ...]

    def medians(self, task: str) -> list[float]:
        """Each pretraining's median over its fine-tuning seeds, per cent."""
        return [100 * summary["median"] for run in self.runs if (summary := summary_of(run, task))]

    def deviation(self, task: str) -> float:
        """Of one fine-tuning from the mean of its pretraining's, per cent; the root of the mean of the variances.

        Not a number if no pretraining was fine-tuned twice.
        """
        summaries = [summary for run in self.runs if (summary := summary_of(run, task))]
        variances = [summary["std"] ** 2 for summary in summaries if summary["std"] is not None]
        return 100 * statistics.fmean(variances) ** 0.5 if variances else math.nan


def summary_of(run: Run, task: str) -> dict[str, Any] | None:
    """Values, median and spread of a task's own metric, fractions of 1; None where it was not done."""
    results = results_of(run)
    if results is None or task not in results["score"]:
        return None
    return results["tasks"][task][results["score"][task]]


def results_of(run: Run) -> Results | None:
    """Of the configured checkpoint; while more is being evaluated, of the last one that was."""
    return run.results or (run.all_results[-1] if run.all_results else None)


def settings_of(runs: Sequence[Run]) -> list[Setting]:
    """In the order of their first runs.

    Raises:
        SystemExit: Runs that are named as one setting's differ in more than their draws. Of kept ones nothing but
            the name is known.
    """
    by_name: dict[str, list[Run]] = {}
    for run in runs:
        by_name.setdefault(re.sub(r"_\d+$", "", run.name), []).append(run)
    for of_name in by_name.values():
        known = [run for run in of_name if run.settings]
        for run in known[1:]:
            first, other = _made_of(known[0]), _made_of(run)
            if changed := sorted(key for key in first.keys() | other.keys() if first.get(key) != other.get(key)):
                raise SystemExit(f"{run.name}: not a second {known[0].name}, its {changed[0]} is another; rename it")
    return [Setting(name, tuple(of_name)) for name, of_name in by_name.items()]


def _made_of(run: Run) -> dict[str, str | bool]:
    """What two pretrainings of one setting have in common."""
    settings = {key: value for key, value in run.settings.items() if key.startswith("data.corpora.")}
    settings |= {key: run.settings[key] for key in (*_MADE_OF, "tokenizer.sha256") if key in run.settings}
    return settings | {"run.fork_from": run.settings.get("run.fork_from", "None") != "None"}


def told_apart(one: Setting, other: Setting, task: str) -> bool:
    """Whether no pretraining of one lies among the other's, and the means differ by more than fine-tunings do.

    False where a single pretraining of each was fine-tuned. It is no test: of two each there is none. Of two equal
    settings, fine-tuned five times, 4 % pass if pretrainings do not differ by chance, 23 % if they differ as much as
    fine-tunings do; 10 and 40 % where one of them was pretrained once.
    """
    ours, theirs = one.medians(task), other.medians(task)
    if max(len(ours), len(theirs)) < 2:
        return False
    overlap = max(ours) >= min(theirs) and max(theirs) >= min(ours)
    distance = abs(statistics.fmean(ours) - statistics.fmean(theirs))
    return not overlap and all(distance > setting.deviation(task) for setting in (one, other))


def tables(given: Sequence[Run], against: Sequence[str] = (), kept: Kept | None = None) -> str:
    """All tables, as Markdown; those of tasks when there are scores.

    Raises:
        SystemExit: ``against`` names a setting that is none of the runs'.
    """
    kept = kept or Kept()
    runs = kept.in_order([*given, *kept.runs], lambda run: run.name)
    settings = settings_of(runs)
    by_name = {setting.name: setting for setting in settings}
    if unknown := [name for name in against if name not in by_name]:
        raise SystemExit(f"--against {unknown[0]}: no such setting; there are {', '.join(by_name)}")
    bases = [by_name[name] for name in against] or settings[:1]
    about, held_out = (
        _of_lines(kept.in_order(lines, lambda line: line["run"]))
        for lines in ([*_about(given), *kept.about], [*_held_out(given), *kept.held_out])
    )
    parts = [f"The runs:\n\n{about}", f"At their ends, on text held out:\n\n{held_out}"]
    if not _tasks(runs):
        return "\n\n".join(parts) + "\n"
    parts.append(
        "Fine-tuned, per cent: the median over seeds of each pretraining ± the deviation of one fine-tuning\n"
        f"(seeds of each: {_numbers_of_seeds(runs)}):\n\n{_scores(settings)}"
    )
    if len(settings) > 1:
        parts.append(
            "Differences of the means of these medians; in bold where no pretraining of the one lies among those of\n"
            "the other and they differ by more than a fine-tuning deviates. It is a rule of thumb; equal settings\n"
            "pass it in 4 to 23 % of cases, or 10 to 40 % where one was pretrained once (`told_apart`)."
        )
        parts += [f"Against {base.name}:\n\n{_differences(settings, base)}" for base in bases]
    return "\n\n".join(parts) + "\n"


def _about(runs: Sequence[Run]) -> list[Line]:
    rows = {row.name: row for row in measure([Column(run.name, (run,)) for run in runs])}
    shown = [name for name in _OF_RUNS if name in rows]
    return [{"run": run.name} | {name: show(rows[name].values[place], rows[name].kind) for name in shown}
            for place, run in enumerate(runs)]  # fmt: skip


def _held_out(runs: Sequence[Run]) -> list[Line]:
    def shown(run: Run, metric: str) -> str:
        value = run.curves.at_end(metric)
        return "–" if value is None else f"{value:.3f}"

    return [{"run": run.name} | {heading: shown(run, key) for key, heading in _HELD_OUT.items()} for run in runs]


def _of_lines(lines: Sequence[Line]) -> str:
    headings = [name for name in ("run", *_OF_RUNS, *_HELD_OUT.values()) if any(name in line for line in lines)]
    return _markdown([headings, *([line.get(name, "–") for name in headings] for line in lines)])


def _numbers_of_seeds(runs: Sequence[Run]) -> str:
    numbers = {len(summary["values"]) for run in runs for task in _tasks(runs) if (summary := summary_of(run, task))}
    return " or ".join(map(str, sorted(numbers))) or "none"


def _tasks(runs: Sequence[Run]) -> list[str]:
    return list(dict.fromkeys(task for run in runs if (results := results_of(run)) for task in results["score"]))


def _metric(settings: Sequence[Setting], task: str) -> str:
    found = (results_of(run) for setting in settings for run in setting.runs)
    return next(results["score"][task] for results in found if results and task in results["score"])


def _by_task(settings: Sequence[Setting], columns: Sequence[Setting], cell: Callable[[Setting, str], str]) -> str:
    tasks = _tasks([run for setting in settings for run in setting.runs])
    heading = ["task", "metric", *(setting.name for setting in columns)]
    rows = [[task, _metric(settings, task), *(cell(setting, task) for setting in columns)] for task in tasks]
    return _markdown([heading, *rows])


def _scores(settings: Sequence[Setting]) -> str:
    def cell(setting: Setting, task: str) -> str:
        medians, deviation = setting.medians(task), setting.deviation(task)
        spread = "" if math.isnan(deviation) else f" ± {deviation:.1f}"
        return f"{', '.join(f'{each:.1f}' for each in medians)}{spread}" if medians else "–"

    return _by_task(settings, settings, cell)


def _differences(settings: Sequence[Setting], base: Setting) -> str:
    def cell(setting: Setting, task: str) -> str:
        if not base.medians(task) or not setting.medians(task):
            return "–"
        difference = statistics.fmean(setting.medians(task)) - statistics.fmean(base.medians(task))
        return f"**{difference:+.1f}**" if told_apart(base, setting, task) else f"{difference:+.1f}"

    return _by_task(settings, [setting for setting in settings if setting is not base], cell)


def _markdown(rows: Sequence[Sequence[str]]) -> str:
    heading, *others = (f"| {' | '.join(row)} |" for row in rows)
    return "\n".join([heading, "|---" * len(rows[0]) + "|", *others])


def journal_rows(runs: Sequence[Run]) -> Iterable[list[str]]:
    """Heading, then of each run the lines next to every tenth of its steps, and those with held-out scores."""
    yield ["run", "step", "tokens", "flops", "flops_paper", *_JOURNAL]
    for run in runs:
        steps = run.curves.axes["step"]
        unknown = np.full(len(steps), math.nan)
        columns = [run.curves.metrics.get(name, unknown) for name in (FLOPS_PAPER, *_JOURNAL)]
        scored = np.flatnonzero(np.isfinite(run.curves.metrics.get(_SCORED, unknown))).tolist()
        tenths = {round((number + 1) * len(steps) / _LINES) - 1 for number in range(_LINES)} - {-1}
        for place in sorted(tenths.union(scored)):
            axes = [f"{run.curves.axes[axis][place]:.6g}" for axis in ("step", "tokens", "flops")]
            values = [column[place] for column in columns]
            yield [run.name, *axes, *(f"{value:.6g}" if np.isfinite(value) else "" for value in values)]


def score_rows(runs: Sequence[Run]) -> Iterable[list[str]]:
    """Heading, then every score of every checkpoint that was evaluated, per cent."""
    yield ["run", "checkpoint_step", "flops_paper", "task", "metric", "seed", "per_cent"]
    for run in runs:
        for results in run.all_results:
            for task, metric in results["score"].items():
                for seed, value in enumerate(results["tasks"][task][metric]["values"], 1):
                    of = [str(results.get("step") or ""), f"{results.get('flops_paper') or 0:.4g}"]
                    yield [run.name, *of, task, metric, str(seed), f"{100 * value:.3f}"]


def main() -> None:
    """Writes the three files."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN")
    parser.add_argument("--against", nargs="+", default=[], metavar="SETTING")
    parser.add_argument("--keep", action="store_true", help="lines of runs that are not given stay")
    parser.add_argument("--note", default="", help="for the reader, at the top")
    parser.add_argument("--out", type=Path, required=True, help="beginning of the files' names")
    given = parser.parse_args()
    runs = [read_folder(folder) for folder in given.runs]
    kept = read_kept(given.out, runs) if given.keep else Kept()
    given.out.parent.mkdir(parents=True, exist_ok=True)
    head = " ".join(["Written by tests/benchmarks/proof.py; README.md has the command and the machine.", given.note])
    text = f"{head.strip()}\n\n{tables(runs, given.against, kept)}"
    given.out.with_name(f"{given.out.name}.md").write_text(text, encoding="utf-8")
    written = {"journal": (journal_rows(runs), kept.journal), "scores": (score_rows(runs), kept.scores)}
    for name, ((heading, *rows), earlier) in written.items():
        with open(given.out.with_name(f"{given.out.name}_{name}.csv"), "w", newline="", encoding="utf-8") as file:
            csv.writer(file, lineterminator="\n").writerows(
                [heading, *kept.in_order([*rows, *earlier], lambda row: row[0])]
            )


if __name__ == "__main__":
    main()
