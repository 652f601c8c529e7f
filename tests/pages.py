"""The Markdown pages as tests see them: their blocks, their commands, their links; and what is wrong with these.

A comment on the line before a fenced block says what a test does with it:

    <!-- run -->            the test of its page executes it, all of a page's blocks in one shell, in order
    <!-- prints -->         each of its lines occurs in what the block before has printed; … stands for anything
    <!-- file: PATH -->     the test writes it to PATH before anything else runs
    <!-- first: COMMAND --> stands by itself: a command that only the test needs, at this place
"""

import re
import shlex
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import click

from pipeline.cli import cli
from pipeline.config_file import known_keys, load_configs
from pipeline.errors import ElectraError
from tests.conftest import REPOSITORY

SHELL = ("", "bash", "sh")
SBATCH_FLAGS = {
    "account", "array", "begin", "constraint", "cpus-per-task", "dependency", "exclude", "exclusive", "export",
    "gpus-per-node", "job-name", "mem", "nodelist", "nodes", "ntasks-per-node", "output", "parsable", "partition",
    "qos", "requeue", "no-requeue", "test-only", "time", "wait",
}  # fmt: skip
SRUN_FLAGS = {"cpus-per-task", "gpus-per-node", "nodelist", "nodes", "ntasks", "ntasks-per-node", "overlap"}
SYNTAX = {"do", "done", "then", "fi", "else", "time", "exec", "if", "while", "!"}
_FENCE = re.compile(r"^```(\w*)\s*$")
_COMMENT = re.compile(r"^<!-- (.+?) -->\s*$")
_PLACEHOLDER = re.compile(r"[A-Z][A-Z0-9_@-]*|.*[$…].*|\.\.\.|k=v|key=value", re.S)
_OVERRIDE = re.compile(r"[a-z_]+(\.[a-z_]+)?=.*", re.S)


@dataclass(frozen=True)
class Block:
    """A code block: the line of its page it begins at, the comment before it, its language and its text."""

    line: int
    marker: str
    language: str
    text: str


def pages() -> list[Path]:
    """Every Markdown page of the repository, new ones among them."""
    names = ["git", "ls-files", "--cached", "--others", "--exclude-standard", "*.md"]
    listed = subprocess.run(names, cwd=REPOSITORY, capture_output=True, text=True, check=True).stdout.split()
    return sorted(path for path in (REPOSITORY / name for name in listed) if path.exists())


def read_blocks(page: Path) -> list[Block]:
    """The fenced and the indented code blocks, and the ``first`` commands, in order."""
    blocks: list[Block] = []
    lines = [*page.read_text(encoding="utf-8").splitlines(), ""]
    marker, begin, language, held = "", 0, None, []
    for number, line in enumerate(lines, 1):
        fence = _FENCE.match(line.strip()) if line.lstrip().startswith("```") else None
        if language is not None:
            if fence:
                blocks.append(Block(begin, marker, language, "\n".join(held)))
                marker, language, held = "", None, []
            else:
                held.append(line)
        elif fence:
            if held:
                blocks.append(Block(begin, "", "", "\n".join(held)))
            begin, language, held = number + 1, fence[1], []
        elif line.startswith("    ") and (held or not lines[number - 2].strip()):
            begin = begin if held else number
            held.append(line[4:])
        elif held and line.strip():
            blocks.append(Block(begin, "indented", "", "\n".join(held)))
            held = []
        if language is None and line.strip() and not fence:
            comment = _COMMENT.match(line)
            marker = comment[1] if comment else ""
            if marker.startswith("first: "):
                blocks.append(Block(number, "run", "bash", marker.removeprefix("first: ")))
    return blocks + ([Block(begin, "indented", "", "\n".join(held))] if held else [])


def read_commands(text: str) -> Iterator[list[str]]:
    """The simple commands of shell text as lists of words, without assignments before and redirections."""
    for line in text.replace("\\\n", " ").splitlines():
        # A list of usages explains each after a gap, without a "#".
        line = re.split(r" {3,}(?=[a-z0-9])(?!configs/)", line)[0]
        lexer = shlex.shlex(line, posix=True, punctuation_chars=True)
        lexer.whitespace_split = True
        try:
            words = list(lexer)
        except ValueError:  # an apostrophe: prose, not a command
            continue
        command: list[str] = []
        skip = False
        for word in [*words, ";"]:
            if skip:
                skip = False
            elif set(word) <= set("<>"):
                skip = True
            elif set(word) <= set("();|&"):
                if command:
                    yield command
                command = []
            elif command or not (word in SYNTAX or re.match(r"[A-Za-z_]\w*=", word)):
                command.append(_without_brackets(word))


def _without_brackets(word: str) -> str:
    """``[--plan]`` and ``[k=v …]`` in a line of usage; a list as a value stays."""
    word = word.removeprefix("[")
    return word.removesuffix("]") if word.count("]") > word.count("[") else word


def is_placeholder(word: str) -> bool:
    return _PLACEHOLDER.fullmatch(word) is not None


# ---- commands


def find_problems(words: list[str], page: Path, made: set[str], complete: bool = True) -> list[str]:
    """What is wrong with a simple command, if it is one of this project.

    Args:
        words: Its words.
        page: Where it stands; a config may be named from there.
        made: Files that the page's own blocks or commands make.
        complete: Whether arguments must be there; they need not in the middle of a sentence.
    """
    if outside := [word for word in words if word.startswith("../runs")]:  # what presets mean seen from configs/
        return [f"{word}: commands are given in the checkout, which has runs/" for word in outside]
    if words[0] == "srun":
        problems, rest = _without_flags("srun", words[1:], SRUN_FLAGS)
        return problems + (find_problems(rest, page, made, complete) if rest else [])
    if words[0] == "mlflow":
        return _of_mlflow(words[1:])
    if "electra" in words[:4]:
        return _of_electra(words[words.index("electra") + 1 :], page, made, complete)
    if (at := _find(words, "-m", "pipeline")) is not None:
        return _of_electra(words[at + 2 :], page, made, complete)
    name = words[0].removeprefix("./")
    if name == "sbatch":
        return _of_sbatch(words[1:], page, made, complete)
    if re.fullmatch(r"slurm/(pipeline|chain)\.sh", name):
        skipped = 0 if "pipeline" in name else 2
        script = [f"{w}: no such job script" for w in words[2:3] if skipped and not is_placeholder(w) and not exists(w)]
        return script + _of_run(words[1 + skipped :], page, made, complete and not skipped)
    if name == "make":
        targets = re.findall(r"(?m)^([a-z]+):", (REPOSITORY / "Makefile").read_text())
        return [f"make {word}: no such target" for word in words[1:2] if word not in targets]
    if name in ("cp", "cat", "source", "bash", "shellcheck"):
        files = [word for word in words[1:2] if word.startswith(("slurm/", "configs/"))]
        return [f"{word}: no such file" for word in files if not exists(word)]
    if name == "pytest" or _find(words, "-m", "pytest") is not None or name in ("python", "python3"):
        paths = [word for word in words if re.match(r"(tests|pipeline|model|data_shards)/", word)]
        return [f"{word}: no such file" for word in paths if not exists(word.partition("::")[0])]
    return []


def exists(word: str) -> bool:
    return bool(list(REPOSITORY.glob(word))) if "*" in word else (REPOSITORY / word).exists()


def _find(words: list[str], *run: str) -> int | None:
    return next((i for i in range(len(words)) if tuple(words[i : i + len(run)]) == run), None)


def _of_electra(words: list[str], page: Path, made: set[str], complete: bool) -> list[str]:
    command: click.Command = cli
    context = click.Context(cli, info_name="electra")
    while isinstance(command, click.Group) and words and not words[0].startswith("-"):
        found = command.get_command(context, words[0])
        if found is None:
            return [] if is_placeholder(words[0]) or "|" in words[0] else [f"electra {words[0]}: no such command"]
        command, words = found, words[1:]
        context = click.Context(command, context, info_name=command.name)
    if isinstance(command, click.Group):
        return []
    try:
        values = _parse(command, context, words)
    except (click.MissingParameter, click.BadOptionUsage) as error:  # an argument or an option's value is not there
        return [f"{context.command_path}: {error.format_message()}"] if complete else []
    except click.UsageError as error:
        return [f"{context.command_path}: {error.format_message()}"]
    config, overrides = values.get("config"), values.get("overrides")
    if "overrides" not in values or not isinstance(config, str | Path):
        return []
    return _of_run([str(config), *(overrides if isinstance(overrides, list | tuple) else ())], page, made, complete)


def _parse(command: click.Command, context: click.Context, words: list[str]) -> dict[str, Any]:
    """Options and arguments by name; of a line with placeholders without their types, since N is no number."""
    if not any(map(is_placeholder, words)):
        command.parse_args(context, list(words))
        return context.params
    values, _, _ = command.make_parser(context).parse_args(list(words))
    for parameter in command.params:
        value = values.get(str(parameter.name))
        if isinstance(parameter, click.Option) and isinstance(value, str) and not is_placeholder(value):
            parameter.type_cast_value(context, value)
    return values


def _without_flags(program: str, words: list[str], known: set[str]) -> tuple[list[str], list[str]]:
    """What is wrong with Slurm's flags, and the words after them."""
    problems = []
    while words and words[0].startswith("-"):
        flag, words = words[0], words[1:]
        name = flag.removeprefix("--").partition("=")[0]
        if not flag.startswith("--") or name not in known:
            problems.append(f"{program} {flag}: not a flag that the pages use; {program.upper()}_FLAGS has them")
    return problems, words


def _of_mlflow(words: list[str]) -> list[str]:
    from mlflow.cli import cli as mlflow  # takes seconds

    command = mlflow.get_command(click.Context(mlflow), words[0]) if words else mlflow
    if command is None:
        return [f"mlflow {words[0]}: no such command"]
    try:
        command.make_parser(click.Context(command, info_name="mlflow")).parse_args(words[1:])
    except click.UsageError as error:
        return [f"mlflow: {error.format_message()}"]
    return []


def _of_sbatch(words: list[str], page: Path, made: set[str], complete: bool) -> list[str]:
    problems, words = _without_flags("sbatch", words, SBATCH_FLAGS)
    while words and is_placeholder(words[0]):  # "$FLAGS", FLAGS, …, and flags after them
        words = words[1:]
    if not words:
        return problems + (["sbatch: no script"] if complete else [])
    if not exists(words[0]):
        return [*problems, f"sbatch {words[0]}: no such script"]
    rest = words[1:]
    if rest and _OVERRIDE.fullmatch(rest[0]):  # the script has a config of its own
        rest = ["CONFIG", *rest]
    return problems + (_of_run(rest, page, made, complete) if rest else [])


def _of_run(words: list[str], page: Path, made: set[str], complete: bool) -> list[str]:
    """CONFIG and overrides: the file is there, the keys are known, and together they are a valid run."""
    if not words:
        return ["CONFIG is missing"] if complete else []
    config, overrides = words[0], [word for word in words[1:] if "=" in word and not is_placeholder(word)]
    problems = [problem for word in words[1:] for problem in _of_override(word)]
    if is_placeholder(config) or config in made:
        return problems
    path = next((folder / config for folder in (REPOSITORY, page.parent) if (folder / config).is_file()), None)
    if path is None:
        return [*problems, f"{config}: no such config"]
    if not problems:
        try:
            load_configs(path, tuple(o for o in overrides if not is_placeholder(o.partition("=")[2])))
        except ElectraError as error:
            problems.append(str(error))
    return problems


def _of_override(word: str) -> list[str]:
    if is_placeholder(word):
        return []
    key, equals, _ = word.partition("=")
    if not equals:
        return [f"{word!r}: not an override"]
    return [] if is_placeholder(key) or key in keys() else [f"{key}: no such key"]


@lru_cache
def keys() -> frozenset[str]:
    return frozenset(known_keys())


# ---- text


def read_text(page: Path) -> str:
    """The page without its fenced blocks and its indented ones."""
    text = re.sub(r"(?ms)^\s*```.*?^\s*```\s*$", "", page.read_text(encoding="utf-8"))
    return "\n".join(line for line in text.splitlines() if not line.startswith("    "))


def find_broken_links(page: Path) -> list[str]:
    """Links to files or headings that are not there."""
    broken = []
    for target in re.findall(r"\]\(([^)\s]+)\)", re.sub(r"`[^`\n]*`", "", read_text(page))):
        if re.match(r"(https?|mailto):", target):
            continue
        name, _, anchor = target.partition("#")
        file = page.parent / name if name else page
        if not file.exists() or (anchor and anchor not in anchors(file)):
            broken.append(target)
    return broken


def anchors(page: Path) -> set[str]:
    """The headings as links name them: lower case, no punctuation, hyphens for spaces."""
    found: set[str] = set()
    for title in re.findall(r"(?m)^#+ +(.+)$", read_text(page)):
        slug = re.sub(r"[^\w\- ]", "", title.strip().lower()).replace(" ", "-")
        found.add(next(name for name in (slug, *(f"{slug}-{n}" for n in range(1, 99))) if name not in found))
    return found


def inline_code(page: Path) -> list[str]:
    return re.findall(r"`([^`]+)`", read_text(page))


# ---- execution


def files_of(page: Path) -> dict[str, str]:
    """What the page's ``file`` blocks say, by path."""
    blocks = [block for block in read_blocks(page) if block.marker.startswith("file: ")]
    return {block.marker.removeprefix("file: "): block.text + "\n" for block in blocks}


def run_page(page: Path, checkout: Path, outputs: Path, env: dict[str, str], timeout_s: float) -> None:
    """Executes the page's ``run`` blocks in one strict shell, in ``checkout``, and compares what they print.

    Raises:
        AssertionError: A block ended with another code than 0, or did not print what the page shows.
    """
    for name, text in files_of(page).items():
        (checkout / name).parent.mkdir(parents=True, exist_ok=True)
        (checkout / name).write_text(text, encoding="utf-8")
    blocks = [block for block in read_blocks(page) if block.marker in ("run", "prints")]
    runs = [block for block in blocks if block.marker == "run"]
    assert runs, f"{page}: nothing to run"
    script = "\n".join(f"exec >'{outputs}/{block.line}' 2>&1\n{block.text}" for block in runs)
    done = subprocess.run(["bash", "-euo", "pipefail", "-c", script], cwd=checkout, env=env, timeout=timeout_s)
    printed = {block.line: path.read_text() for block in runs if (path := outputs / str(block.line)).exists()}
    last = max(printed)
    assert done.returncode == 0, f"{page.name}, line {last}: ended with {done.returncode}\n{printed[last][-6000:]}"
    before = 0
    for block in blocks:
        if block.marker == "run":
            before = block.line
            continue
        for line in filter(None, map(str.strip, block.text.splitlines())):
            pattern = r"\s+".join(map(re.escape, line.split())).replace("…", ".*")
            assert re.search(pattern, printed[before]), f"{page.name}: no {line!r} in\n{printed[before][-6000:]}"


def copy_checkout(folder: Path) -> Path:
    """This repository's files as a clone would have them, uncommitted changes among them."""
    names = ["git", "ls-files", "--cached", "--others", "--exclude-standard", "-z"]
    listed = subprocess.run(names, cwd=REPOSITORY, capture_output=True, text=True, check=True).stdout.split("\0")
    for name in filter(None, listed):
        source, copy = REPOSITORY / name, folder / name
        if source.is_file():
            copy.parent.mkdir(parents=True, exist_ok=True)
            copy.write_bytes(source.read_bytes())
            copy.chmod(source.stat().st_mode)
    return folder


def write_electra(folder: Path, checkout: Path, python: str, overrides: tuple[str, ...] = ()) -> Path:
    """A command ``electra`` that runs the checkout; with overrides, every run of it is small."""
    folder.mkdir(parents=True, exist_ok=True)
    command = f'PYTHONPATH={shlex.quote(str(checkout))} PYTHONSAFEPATH=1 exec {shlex.quote(python)} -m pipeline "$@"'
    small = f"run | tokenize | pretrain | evaluate | status | sync) {command} {shlex.join(overrides)} ;;"
    program = folder / "electra"
    program.write_text(f"#!/bin/bash\ncase ${{1:-}} in\n{small if overrides else ''}\n*) {command} ;;\nesac\n")
    program.chmod(0o755)
    return folder
