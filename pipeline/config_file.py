"""From a YAML file and ``section.key=value`` arguments to a Config, with errors that say where.

YAML 1.2: 5e-4 is a number, 12:30 is text, a repeated key is an error. Relative
paths in a file resolve against its folder, in an argument against the current one.
"""

import copy
import difflib
import io
import os
from pathlib import Path
from typing import Any, get_args

from pydantic import BaseModel, ValidationError
from ruamel.yaml import YAML
from ruamel.yaml.error import MarkedYAMLError

from model.config import SIZES
from model.objective import RECIPES, SHARING_FOLLOWS_FROM, default_sharing
from pipeline.config import Config, RunConfig
from pipeline.config_train import MOST_FLOPS, MOST_STEPS
from pipeline.errors import ConfigError, UsageError
from pipeline.redaction import redact, redact_arguments, without_user_info
from pipeline.variants import choose_variants, take_variants

_PATH_KEYS = {
    "run.dir", "data.shards_dir", "data.local_dir", "tokenizer.path", "train.initial_discriminator",
    "train.initial_generator", "deepspeed.config", "evaluate.data_dir", "evaluate.checkpoint",
}  # fmt: skip

_PLAIN = {
    "model_type": "must be a section with keys",
    "tuple_type": "must be a list, for example [a, b]",
    "int_type": "must be a whole number",
    "float_type": "must be a number, written without quotes",
    "string_pattern_mismatch": "has characters or a form that are not allowed here",
}

Values = dict[str, Any]
"""A file's content as plain values: sections of keys."""

Sources = dict[str, str]
"""Dotted key to where it was set: ``file:line`` or the argument."""


def load_config(path: str | Path, overrides: tuple[str, ...] = ()) -> Config:
    """Reads the configuration of one run; of a file with variants, the one that ``run.variant`` chooses.

    Raises:
        ConfigError: Unreadable file, unknown key, wrong value; names the place and the nearest key.
        UsageError: An override that is not ``key=value``.
    """
    configs = load_configs(path, overrides)
    if len(configs) > 1:
        names = ", ".join(str(config.run.variant) for config in configs)
        raise ConfigError(f"{path} has {len(configs)} variants; choose the one that is meant by run.variant=: {names}")
    return configs[0]


def has_variants(path: str | Path) -> bool:
    """Whether a file describes several runs, though ``run.variant`` may choose one of them."""
    return "variants" in _read_file(Path(path))[0]


def load_configs(path: str | Path, overrides: tuple[str, ...] = ()) -> list[Config]:
    """Reads a file's run, or a run for each of its variants, unless ``run.variant`` chooses one of them.

    A variant's keys go over the file's, an override over both.

    Raises:
        ConfigError: As ``load_config``; also a variant that the file does not have.
        UsageError: An override that is not ``key=value``.
    """
    path = Path(path)
    values, sources = _read_file(path)
    variants = take_variants(values, sources, path)
    run = _overridden(values, sources, overrides)[0].get("run")
    wanted = run.get("variant") if isinstance(run, dict) else None
    if not variants:
        given = values.get("run")
        if wanted is not None and wanted != (given.get("variant") if isinstance(given, dict) else None):
            raise ConfigError(f"run.variant={wanted}: {path} has no variants; leave it out")
        overridden = _overridden(values, sources, overrides)
        _drop_what_followed((values, sources), overridden)
        return [_validate(*overridden)]
    names = choose_variants(variants, wanted, path)
    return [_load_variant(path, values, sources, name, variants[name], overrides) for name in names]


def _load_variant(
    path: Path, values: Values, sources: Sources, name: str, changes: Values, overrides: tuple[str, ...]
) -> Config:
    file = values, sources
    values, sources = copy.deepcopy(values), dict(sources)
    for key, value in changes.items():
        place = f"{sources[f'variants.{name}.{key}']}: variant {name}"
        _set_value(values, sources, key, value, place, path.resolve().parent)
    values, sources = _overridden(values, sources, overrides)
    _drop_what_followed(file, (values, sources))
    run = values.setdefault("run", {})
    if isinstance(run, dict):
        run |= {"name": f"{run.get('name', RunConfig.model_fields['name'].default)}-{name}", "variant": name}
    return _validate(values, sources, f"{sources[f'variants.{name}']}: variant {name}: ")


def _drop_what_followed(file: tuple[Values, Sources], changed: tuple[Values, Sources]) -> None:
    """Drops from ``changed`` what the file says of keys that follow from others, where those are others now.

    A resolved config states them all. What differs from what followed is deliberate and stays; so does what was
    set together with the change.
    """
    (stated, places), (values, sources) = file, changed
    now = _following(values)
    for (section, key), value in _following(stated).items():
        part = values.get(section)
        is_files = all(sources.get(name) == places.get(name) for name in (section, f"{section}.{key}"))
        if is_files and isinstance(part, dict) and now.get((section, key), value) != value == part.get(key):
            del part[key]


def _following(values: Values) -> dict[tuple[str, str], Any]:
    """The values that keys have unless they are given: those that follow from others which ``values`` state."""
    model, objective = (part if isinstance(part, dict) else {} for part in map(values.get, ("model", "objective")))
    following = {("model", key): value for key, value in SIZES.get(str(model.get("size")), {}).items()}
    following |= {("objective", key): value for key, value in RECIPES.get(str(values.get("recipe")), {}).items()}
    if any(key in objective for key in SHARING_FOLLOWS_FROM):
        following["objective", "sharing"] = default_sharing(objective)
    return following


def _overridden(values: Values, sources: Sources, overrides: tuple[str, ...]) -> tuple[Values, Sources]:
    """Copies with the overrides applied."""
    values, sources = copy.deepcopy(values), dict(sources)
    for override in overrides:
        _apply_override(values, sources, override)
    return values, sources


def _validate(values: Values, sources: Sources, who: str = "") -> Config:
    """The values as a Config; ``who`` begins a message that is about no single key."""
    try:
        return Config.model_validate(_with_steps(values, sources))
    except ValidationError as error:
        raise ConfigError("\n".join(_explain_all(error, sources, who))) from None


def _with_steps(values: Values, sources: Sources) -> Values:
    """``train.steps`` from ``train.flops``, where a file states a budget instead of a length.

    Raises:
        ConfigError: The budget pays for more steps than any run has.
    """
    train = values.get("train")
    if not isinstance(train, dict) or train.get("steps") is not None or train.get("flops") is None:
        return values
    flops = train["flops"]
    if not isinstance(flops, int | float) or isinstance(flops, bool) or not 0 < flops < MOST_FLOPS:
        return values | {"train": train | {"steps": 1}}  # the message is about the budget, not about missing steps
    longest = train | {"flops": None, "steps": MOST_STEPS}  # what depends on steps is checked with the real ones
    steps = Config.model_validate(values | {"train": longest}).steps_of_budget(flops)
    if steps > MOST_STEPS:
        raise ConfigError(
            f"{_place(['train', 'flops'], sources)}: train.flops={flops:g} pays for {steps:.3g} steps, more than the "
            f"{MOST_STEPS:,} that a run may have; lower it"
        )
    return values | {"train": train | {"steps": steps}}


def parse_yaml(text: str) -> Any:
    """Parses YAML 1.2 to plain Python values."""
    return YAML(typ="safe", pure=True).load(text)


def dump_yaml(config: Config) -> str:
    """The resolved configuration as YAML; reading it back gives an equal Config."""
    stream = io.StringIO()
    yaml = YAML()
    yaml.default_flow_style = False
    yaml.width = 120
    yaml.dump(config.model_dump(mode="json"), stream)
    return stream.getvalue()


def _read_file(path: Path) -> tuple[Values, Sources]:
    if not path.is_file():
        problem = "is a folder" if path.is_dir() else "no such config file"
        raise ConfigError(f"{path}: {problem}; the presets are in configs/")
    try:
        tree = YAML(typ="rt", pure=True).load(path.read_text(encoding="utf-8")) or {}
    except (MarkedYAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: not valid YAML: {_yaml_problem(error)}") from None
    if not isinstance(tree, dict):
        raise ConfigError(f"{path}: a config is a mapping of sections, not {type(tree).__name__}")
    sources: Sources = {}
    _note_lines(tree, str(path), "", sources)
    values = _plain(tree)
    _resolve_paths(values, path.resolve().parent)
    return values, sources


def _yaml_problem(error: Exception) -> str:
    mark = getattr(error, "problem_mark", None)
    problem = " ".join(str(getattr(error, "problem", None) or error).split())
    return f"line {mark.line + 1}: {problem}" if mark else problem


def _note_lines(tree: Any, file: str, prefix: str, sources: Sources) -> None:
    marks = tree.lc.data or {}
    for key in tree:
        dotted = f"{prefix}{key}"
        line = marks[key][0] if key in marks else tree.lc.line  # the mapping's own, where `<<` brought the key
        place = sources[dotted] = f"{file}:{line + 1}"
        if not isinstance(key, str):
            raise ConfigError(f"{place}: {prefix}{key}: YAML reads this name as {key!r}, not as text; put it in quotes")
        if isinstance(tree[key], dict):
            _note_lines(tree[key], file, f"{dotted}.", sources)


def _plain(tree: Any) -> Any:
    """ruamel's round-trip containers and scalars as plain ones; an empty section as no keys."""
    if isinstance(tree, dict):
        return {str(key): _plain(value) for key, value in tree.items()}
    if isinstance(tree, list):
        return [_plain(value) for value in tree]
    for kind in (bool, int, float, str):
        if isinstance(tree, kind):
            return kind(tree)
    return tree


def _apply_override(values: Values, sources: Sources, override: str) -> None:
    dotted, equals, text = override.partition("=")
    shown = repr(*redact_arguments([override]))
    if not equals or not dotted:
        raise UsageError(f"{shown}: an override is section.key=value")
    if dotted == "run.variant" and not text:
        raise ConfigError("run.variant is empty; give the name of a variant, or leave run.variant out")
    try:
        value = text if dotted == "run.variant" else parse_yaml(text)  # a name is never a number, nor null
    except MarkedYAMLError as error:
        raise UsageError(f"{shown}: the value is not valid YAML: {_yaml_problem(error)}") from None
    _set_value(values, sources, dotted, value, f"argument {shown}", Path.cwd())


def _set_value(values: Values, sources: Sources, dotted: str, value: Any, place: str, base: Path) -> None:
    """Sets one key; a relative path resolves against ``base``."""
    *sections, key = dotted.split(".")
    target = values
    for section in sections:
        target = target.setdefault(section, {})
        if not isinstance(target, dict):
            raise ConfigError(f"{place}: {section} is not a section; {_nearest(dotted)}")
    sources[dotted] = place
    here: dict[str, Any] = {}
    nested = here
    for section in sections:
        nested = nested.setdefault(section, {})
    nested[key] = value
    _resolve_paths(here, base)
    target[key] = nested[key]


def _resolve_paths(values: dict[str, Any], base: Path) -> None:
    """Makes every path in ``values`` absolute, in place."""
    for dotted in _PATH_KEYS:
        section, key = dotted.split(".")
        holder = values.get(section)
        given = holder.get(key) if isinstance(holder, dict) else None
        is_step = dotted == "evaluate.checkpoint" and (given == "last" or str(given).isdigit())
        if isinstance(holder, dict) and isinstance(given, str) and not is_step:
            holder[key] = str(_absolute(given, base))
    data, evaluate = values.get("data"), values.get("evaluate")
    corpora = data.get("corpora") if isinstance(data, dict) else None
    for corpus in corpora if isinstance(corpora, list) else []:
        if isinstance(corpus, dict) and isinstance(corpus.get("path"), str):
            corpus["path"] = str(_absolute(corpus["path"], base))
    tasks = evaluate.get("tasks") if isinstance(evaluate, dict) else None
    if isinstance(evaluate, dict) and isinstance(tasks, list):
        evaluate["tasks"] = [_resolve_task(task, base) for task in tasks]


def _absolute(path: str, base: Path) -> Path:
    return Path(os.path.normpath(base / Path(path).expanduser()))


def _resolve_task(task: Any, base: Path) -> Any:
    """A task file's path becomes absolute; a bare name is looked up later."""
    return str(_absolute(task, base)) if isinstance(task, str) and task.endswith((".yaml", ".yml")) else task


def _explain_all(error: ValidationError, sources: Sources, who: str) -> list[str]:
    """One line for each wrong key, the first finding of each; a list that lost its bad items is not empty."""
    lines: dict[str, str] = {}
    for item in error.errors():
        location = [str(part) for part in item["loc"] if not _is_branch(str(part))]
        dotted = ".".join(location)
        if not any(known.startswith(f"{dotted}.") for known in lines):
            lines.setdefault(dotted, _explain(item, location, sources, who))
    return [without_user_info(line) for line in lines.values()]


def _is_branch(part: str) -> bool:
    """pydantic's names for the alternatives of a union."""
    return part.startswith(("literal[", "constrained-", "function-"))


def _explain(item: Any, location: list[str], sources: Sources, who: str) -> str:
    dotted = ".".join(location)
    place = _place(location, sources)
    prefix = f"{place}: " if place else ""
    if item["type"] == "extra_forbidden":
        return f"{prefix}unknown key {dotted}; {_nearest(dotted)}"
    if item["type"] == "missing" or (dotted == "train.steps" and item.get("input") is None):
        or_budget = ", or give train.flops, a budget that steps follow from" if dotted == "train.steps" else ""
        return f"{who}{dotted}: missing; set it in the config file or as an argument {dotted}=…{or_budget}"
    message = _PLAIN.get(item["type"]) or str(item["msg"]).removeprefix("Value error, ")
    if not location:
        return f"{who}{message}"
    value = item.get("input")
    if dotted == "tracking.uri" and isinstance(value, str):
        value = redact(value)
    shown = f"={value!r}" if isinstance(value, str | int | float | bool) else ""
    return f"{prefix}{dotted}{shown}: {message[0].lower()}{message[1:]}"


def _place(location: list[str], sources: Sources) -> str:
    """The most precise place known for a key or the section around it."""
    for end in range(len(location), 0, -1):
        place = sources.get(".".join(location[:end]))
        if place:
            return place
    return ""


def _nearest(dotted: str) -> str:
    known = list(known_keys())
    close = difflib.get_close_matches(dotted, known, n=1, cutoff=0.0)
    section = dotted.split(".")[0]
    in_section = difflib.get_close_matches(dotted, [k for k in known if k.startswith(f"{section}.")], 1, 0.6)
    return f"the nearest known key is {(in_section or close)[0]}"


def known_keys(schema: type[BaseModel] = Config, prefix: str = "") -> list[str]:
    """Every key of the schema as ``section.key``."""
    keys: list[str] = []
    for name, field in schema.model_fields.items():
        kind = field.annotation
        if isinstance(kind, type) and issubclass(kind, BaseModel) and not get_args(kind):
            keys += known_keys(kind, f"{prefix}{name}.")
        else:
            keys.append(prefix + name)
    return keys
