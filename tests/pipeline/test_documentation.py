"""Every command, key, file, variable and link that a page names exists; the recipes run as they stand."""

import os
import re
import shutil
import sys
from functools import cache
from pathlib import Path

import pytest

from pipeline.config_file import load_configs
from pipeline.reference import COMMAND, make_reference
from tests.conftest import REPOSITORY, clean_environment, make_text
from tests.pages import (
    SHELL,
    copy_checkout,
    files_of,
    find_broken_links,
    find_problems,
    inline_code,
    keys,
    pages,
    read_blocks,
    read_commands,
    run_page,
    write_electra,
)
from tests.parity.google_folders import MODEL, make_folders

PAGES = pages()
RECIPES = [page for page in PAGES if page.parent.name == "recipes" and page.name != "README.md"]
SECTIONS = {key.partition(".")[0] for key in keys() if "." in key}
SMALL = (
    *MODEL, "data.sequence_length=32", "data.num_workers=1", "train.steps=6", "train.global_batch_size=4",
    "train.precision=fp32", "train.checkpoint_every=2", "train.log_every=1", "train.held_out_rows=4",
    "optimizer.warmup_steps=2", "launch.device=cpu", "launch.threads_per_process=1", "evaluate.seeds=1",
    "evaluate.epochs=1", "evaluate.max_length=32", "train.held_out_every=null", "tokenizer.vocab_size=300",
    "tracking.uri=none",
)  # fmt: skip
"""What makes any run of a recipe take seconds on a CPU."""


def name_of(page: Path) -> str:
    return str(page.relative_to(REPOSITORY))


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_every_command_of_a_page_can_be_given(page: Path) -> None:
    made = set(files_of(page))
    problems = []
    for block in read_blocks(page):
        if block.language in SHELL:
            for words in read_commands(block.text):
                problems += [f"line {block.line}: {problem}" for problem in find_problems(words, page, made)]
    for code in inline_code(page):
        for words in read_commands(" ".join(code.split())):
            problems += [f"`{code}`: {problem}" for problem in find_problems(words, page, made, complete=False)]
    assert not problems, "\n".join(problems)


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_every_key_and_variable_of_a_page_exists(page: Path) -> None:
    named = {code.partition("=")[0] for code in inline_code(page)}
    as_keys = {name for name in named if re.fullmatch(rf"({'|'.join(SECTIONS)})\.[a-z_]+", name)}
    assert {name for name in as_keys - keys() if not name.endswith((".py", ".json", ".jsonl", ".tsv"))} == set()
    variables = set(re.findall(r"\bELECTRA_[A-Z_]*[A-Z]\b", page.read_text(encoding="utf-8")))
    own = page.relative_to(REPOSITORY).parts[:1]  # a page of the tests may name theirs
    assert variables - known_variables("pipeline", "slurm", *own) - {"ELECTRA_REQUIRE_ALL"} == set()


@cache
def known_variables(*rooms: str) -> set[str]:
    """The variables that the code of these folders names."""
    files = [path for room in rooms for path in (REPOSITORY / room).rglob("*")]
    text = "".join(path.read_text() for path in files if path.suffix in (".py", ".sh", ".example"))
    return set(re.findall(r"\bELECTRA_[A-Z_]*[A-Z]\b", text))


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_every_link_of_a_page_leads_somewhere(page: Path) -> None:
    assert find_broken_links(page) == []


def test_a_variable_that_only_tests_name_is_not_known() -> None:
    assert "ELECTRA_REQUIRE_ALL" in known_variables("tests") - known_variables("pipeline", "slurm")


def test_the_reference_is_what_the_schema_says() -> None:
    assert (REPOSITORY / "configs/REFERENCE.md").read_text(encoding="utf-8") == make_reference(), f"run: {COMMAND}"


def test_the_reference_has_every_key() -> None:
    page = (REPOSITORY / "configs/REFERENCE.md").read_text(encoding="utf-8")
    assert [key for key in keys() if f"| `{key}` |" not in page] == []


def test_blocks_and_commands_are_found(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text(
        "Text, then:\n\n    make test   # all\n\n<!-- first: true -->\n<!-- run -->\n```bash\n"
        "electra run \\\n  A.yaml\nX=1 electra sync A.yaml && id=$(sbatch a.sh) > log\n"
        "```\n\n- item:\n\n  ```\n  electra status A.yaml\n  ```\n"
    )
    blocks = read_blocks(page)
    assert [(block.marker, block.line) for block in blocks] == [("indented", 3), ("run", 5), ("run", 8), ("", 16)]
    assert [" ".join(words) for block in blocks for words in read_commands(block.text)] == [
        "make test", "true", "electra run A.yaml", "electra sync A.yaml", "sbatch a.sh", "electra status A.yaml",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("command", "problem"),
    [
        ("electra pretrian configs/small.yaml", "no such command"),
        ("electra run configs/smal.yaml", "no such config"),
        ("electra run configs/small.yaml --plans", "No such option"),
        ("electra run configs/small.yaml train.step=5", "no such key"),
        ("electra run configs/small.yaml train.steps=0", "train.steps"),
        ("electra run CONFIG --until pretraining", "pretraining"),
        ("electra status", "Missing argument"),
        ("electra scores ../runs/runs/base runs/runs/small --out plots", "../runs/runs/base: commands are given in"),
        ("touch ../runs/runs/small/STOP", "commands are given in the checkout"),
        ("sbatch --node=2 slurm/tokenize.sh configs/small.yaml", "--node=2"),
        ("srun --node=2 electra doctor", "--node=2"),
        ("srun --nodes=2 .venv/bin/python -m pipeline docter", "no such command"),
        ("mlflow ui --backend-uri sqlite:///x.db --port 5000", "No such option"),
        ("sbatch slurm/pretrain_huge.sh", "no such script"),
        ("sbatch slurm/pretrain_large.sh train.step=5", "no such key"),
        ("for x in a; do slurm/pipeline.sh configs/smal.yaml; done", "no such config"),
        ("id=$(sbatch --parsable slurm/evaluate.sh CONFIG evaluate.task=[cola])", "no such key"),
        ("make quick", "no such target"),
        ("python -m pytest tests/nowhere", "no such file"),
    ],
)
def test_a_wrong_command_is_found(command: str, problem: str) -> None:
    found = [text for words in read_commands(command) for text in find_problems(words, REPOSITORY / "README.md", set())]
    assert len(found) == 1 and problem in found[0], found


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_folders_that_rsync_fills_elsewhere_are_there(page: Path) -> None:
    """It makes the last folder of a destination alone; on a fresh checkout runs/ is not there."""
    blocks = [block for block in read_blocks(page) if block.language in SHELL]
    commands = [words for block in blocks for words in read_commands(block.text) if words[0] == "rsync"]
    there = {Path("electra")}
    for *sources, target in ([word for word in words[1:] if word[0] != "-"] for words in commands):
        _, colon, place = target.partition(":")
        if colon:
            assert Path(place).parent in there, f"{target}: {Path(place).parent} is not there yet"
            there |= {Path(place), *(Path(place) / Path(source).name for source in sources)}


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the repository with what the recipes ask a user to bring: text, and published folders."""
    root = copy_checkout(tmp_path_factory.mktemp("checkout") / "electra")
    for name in ("mine", "wikipedia", "bookscorpus"):
        (root / "corpora" / name).mkdir(parents=True)
        (root / "corpora" / name / "part.txt").write_text(make_text(200, seed=len(name)), encoding="utf-8")
    discriminator, generator = make_folders(root / "made")
    (root / "published").mkdir()
    discriminator.rename(root / "published/discriminator")
    generator.rename(root / "published/generator")
    return root


@pytest.mark.parametrize("page", RECIPES, ids=lambda page: page.stem)
def test_a_recipe_runs_as_it_stands(page: Path, checkout: Path, tmp_path: Path) -> None:
    electra = write_electra(tmp_path / "bin", checkout, sys.executable, SMALL)
    env = clean_environment(PATH=f"{electra}{os.pathsep}{os.environ['PATH']}")
    del env["PYTHONPATH"]
    shutil.rmtree(checkout / "runs", ignore_errors=True)  # of the recipe before
    outputs = tmp_path / "outputs"
    outputs.mkdir()
    run_page(page, checkout, outputs, env, timeout_s=400)


@pytest.mark.parametrize("page", RECIPES, ids=lambda page: page.stem)
def test_the_configs_of_a_recipe_are_whole(page: Path, checkout: Path) -> None:
    for name, text in files_of(page).items():
        if name.startswith("configs/") and "/tasks/" not in name:
            (checkout / name).write_text(text, encoding="utf-8")
            load_configs(checkout / name)
