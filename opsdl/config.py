"""The config of a run: dataclasses give the keys, types, defaults and bounds; YAML and dotted overrides fill them.

    config = load_config("recipes/smollm2-kjv.yaml", ["optimizer.lr=1e-5", "rollout.group_size=8"])

An unknown key, a wrong type or a value out of bounds is a UserError that names the key and what was expected.

Two things are chosen from tables that live in the packages above this file: the task that makes the questions, and the
objective. The config holds such a choice as a name and its options (`Chosen`), and `build` makes the object:

    data: {needles: {haystack: kjv}}        ->  config.data.task == Chosen("needles", {"haystack": "kjv"})
    loss: {kind: policy, baseline: kl}      ->  config.loss == Chosen("policy", {"baseline": "kl"})
    build(TASKS, config.data.task, "data")  ->  Needles(haystack="kjv", ...)
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields, is_dataclass
from pathlib import Path
from typing import Any, TypeVar, cast, get_args, get_type_hints

from omegaconf import MISSING, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from opsdl.errors import UserError

T = TypeVar("T")


def checked(default: Any, expected: str, holds: Callable[[Any], bool]) -> Any:
    """A field with a bound: `holds(value)` says whether it is kept, `expected` what the error message asks for."""
    return field(default=default, metadata={"expected": expected, "holds": holds})


def positive(default: float) -> Any:
    """A field of a number above 0."""
    return checked(default, "a positive number", lambda value: value > 0)


def one_of(default: Any, *choices: Any) -> Any:
    """A field that takes one of `choices`."""
    return checked(default, f"one of {', '.join(map(str, choices))}", lambda value: value in choices)


@dataclass
class Chosen:
    """An entry of a table, by its name, and the options that are given for it."""

    name: str = MISSING
    options: dict[str, Any] = field(default_factory=dict)


@dataclass
class ModelConfig:
    name: str = MISSING  # hub id or local directory of a HF causal LM
    gguf_file: str | None = None  # a GGUF file inside that directory
    # Of the matrix products, by autocast; weights stay float32.
    compute_dtype: str = one_of("bfloat16", "float32", "bfloat16", "float16")
    # Of the operands of the loss; auto: compute_dtype on a GPU, float32 on a CPU (docs/design.md, "The loop").
    loss_dtype: str = one_of("auto", "auto", "float32", "bfloat16", "float16")
    activation_checkpointing: bool = False


@dataclass
class DataConfig:
    triplets: str | None = None  # JSONL of triplets; without it, the task makes them
    extractor: str | None = None  # finds the short contexts that triplets lack: an entry of opsdl/data/extract.py
    extract_tokens: int = positive(512)  # of a short context that it finds, at most
    task: Chosen = field(default_factory=lambda: Chosen("needles"))  # YAML: the name of the task as a key, its options
    # What the user turn of the chat holds.
    template: str = checked(
        "{context}\n\n{question}",
        "text with {context} and {question} once each",
        lambda text: text.count("{context}") == text.count("{question}") == 1,
    )


@dataclass
class RolloutConfig:
    engine: str = "builtin"  # an entry of opsdl/training/rollout
    group_size: int = positive(4)  # responses per prompt, all from one prefill
    max_new_tokens: int = positive(24)
    temperature: float = checked(0.8, "a number above 0", lambda value: value > 0)
    top_p: float = checked(1.0, "a number in (0, 1]", lambda value: 0 < value <= 1)


@dataclass
class TeacherConfig:
    kind: str = one_of("frozen", "frozen", "live", "ema")  # the initial weights | the student's own | their average
    ema_decay: float = 0.99  # used by `ema` only, once per step


@dataclass
class OptimizerConfig:
    lr: float = positive(3e-5)
    warmup_steps: int = 5
    weight_decay: float = 0.0
    beta1: float = 0.9
    beta2: float = 0.95
    max_grad_norm: float = 1.0


@dataclass
class EvaluationSet:
    name: str = MISSING
    items: int = positive(48)
    task: Chosen = field(default_factory=lambda: Chosen("needles"))  # YAML: as in data


@dataclass
class EvaluationConfig:
    sets: list[EvaluationSet] = field(default_factory=list)
    max_new_tokens: int = positive(32)
    batch_size: int = positive(16)  # prompts decoded together


@dataclass
class RunConfig:
    run_dir: str = MISSING
    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    rollout: RolloutConfig = field(default_factory=RolloutConfig)
    teacher: TeacherConfig = field(default_factory=TeacherConfig)
    # YAML: `kind` names the entry of opsdl/training/objectives; the other keys are its options.
    loss: Chosen = field(default_factory=lambda: Chosen("full"))
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    prefix_gradient: str = one_of("exact", "exact", "detached")  # detached: no gradient through the prefix
    steps: int = positive(32)
    prompts_per_step: int = positive(4)
    seed: int = 0
    checkpoint_every: int = positive(10)  # steps
    keep_checkpoints: int = positive(1)
    resume: str = one_of("never", "never", "auto")  # auto: go on from the newest checkpoint of run_dir
    device: str = "auto"  # auto: cuda if there is one, else cpu


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> RunConfig:
    """Read a YAML config, apply overrides and check every value but the options of what is chosen from tables.

    Args:
        path: the YAML file.
        overrides: `key.sub=value` each; a later one wins.

    Returns:
        The config, with defaults for the keys that neither gives. `build` checks the options of a choice.

    Raises:
        UserError: names the file or the override, and the key.
    """
    path = Path(path)
    config = OmegaConf.structured(RunConfig)
    for source, given in [(f"config {path}", _read(path)), *((f"override {o!r}", _dotlist(o)) for o in overrides)]:
        layer = _unfold(given, RunConfig, source)
        try:
            _forget_other_options(config, layer)
            config = OmegaConf.merge(config, layer)
        except OmegaConfBaseException as error:
            raise UserError(f"{source}: {_reason(error)}") from None
        except TypeError:  # a mapping laid over a list
            raise UserError(f"{source}: a list has no keys to set; give the whole list") from None
    return cast(RunConfig, _checked(config, f"config {path}", ""))


def build(table: Mapping[str, type[T]], chosen: Chosen, key: str) -> T:
    """Make what was chosen from a table of dataclasses, whose fields are the options.

    Args:
        table: the classes by name.
        chosen: the name, and some of the options.
        key: where the config holds the choice, for messages: "data" or "loss".

    Raises:
        UserError: names the key that is unknown, of a wrong type or out of bounds.
    """
    if chosen.name not in table:
        if key == "loss":
            raise UserError(f"config: key loss.kind is {chosen.name!r}; expected one of {', '.join(table)}")
        raise UserError(f"config: {_unknown(chosen.name, table, f'{key}.')}")
    schema = table[chosen.name]
    prefix = "loss." if key == "loss" else f"{key}.{chosen.name}."
    try:
        filled = OmegaConf.merge(OmegaConf.structured(schema), _unfold(chosen.options, schema, "config", prefix))
    except OmegaConfBaseException as error:
        raise UserError(f"config: {_reason(error, prefix)}") from None
    return cast(T, _checked(filled, "config", prefix))


def to_yaml(config: RunConfig) -> str:
    """The config as YAML that `load_config` reads, with every key present."""
    return OmegaConf.to_yaml(as_mapping(config))


def as_mapping(config: Any) -> dict[str, Any]:
    """A config dataclass as a mapping in the form of the YAML file."""
    out: dict[str, Any] = {}
    for entry, value in ((entry, getattr(config, entry.name)) for entry in fields(config)):
        if isinstance(value, Chosen) and entry.name == "task":
            out[value.name] = value.options
        elif isinstance(value, Chosen):
            out[entry.name] = {"kind": value.name, **value.options}
        elif isinstance(value, list):
            out[entry.name] = [as_mapping(item) if is_dataclass(item) else item for item in value]
        else:
            out[entry.name] = as_mapping(value) if is_dataclass(value) else value
    return out


def _read(path: Path) -> dict[Any, Any]:
    if not path.is_file():
        raise UserError(f"config {path}: no such file")
    try:
        loaded = OmegaConf.load(path)
    except (YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"config {path}: not valid YAML: {' '.join(str(error).split())}") from None
    if not OmegaConf.is_dict(loaded):
        raise UserError(f"config {path}: expected a mapping of keys, found a list")
    return cast(dict[Any, Any], OmegaConf.to_container(loaded))


def _dotlist(override: str) -> dict[Any, Any]:
    if "=" not in override:
        raise UserError(f"override {override!r}: expected key.sub=value")
    try:
        return cast(dict[Any, Any], OmegaConf.to_container(OmegaConf.from_dotlist([override])))
    except (OmegaConfBaseException, YAMLError) as error:
        raise UserError(f"override {override!r}: {' '.join(str(error).split())}") from None


def _unfold(layer: Mapping[Any, Any], schema: type, source: str, parent: str = "") -> dict[str, Any]:
    """The layer in the form of the schema: a choice becomes a name and options. Raises UserError for an unknown key."""
    types = get_type_hints(schema)
    out: dict[str, Any] = {}
    for key, value in layer.items():
        if "task" in types and key not in types and isinstance(value, Mapping | None):
            if "task" in out:
                both = f"{out['task']['name']} and {key}"
                raise UserError(f"{source}: key {parent.removesuffix('.')} holds two tasks, {both}; expected one")
            out["task"] = {"name": key, "options": dict(value or {})}
        elif key not in types or key == "task":
            raise UserError(f"{source}: {_unknown(str(key), [name for name in types if name != 'task'], parent)}")
        elif types[key] is Chosen and isinstance(value, Mapping):
            named = {"name": value["kind"]} if "kind" in value else {}
            out[key] = {**named, "options": {name: x for name, x in value.items() if name != "kind"}}
        elif is_dataclass(types[key]) and isinstance(value, Mapping):
            out[key] = _unfold(value, cast(type, types[key]), source, f"{parent}{key}.")
        elif isinstance(value, list) and is_dataclass(item := next(iter(get_args(types[key])), None)):
            out[key] = [
                _unfold(x, cast(type, item), source, f"{parent}{key}[{index}].") if isinstance(x, Mapping) else x
                for index, x in enumerate(value)
            ]
        else:
            out[key] = value
    return out


def _forget_other_options(config: Any, layer: dict[str, Any]) -> None:
    """Options belong to the entry they were given for: a layer that names another entry begins with none."""
    for key in ("data.task", "loss"):
        name = OmegaConf.select(OmegaConf.create(layer), f"{key}.name")
        if name is not None and name != OmegaConf.select(config, f"{key}.name"):
            OmegaConf.update(config, f"{key}.options", {}, merge=False)


def _checked(config: Any, source: str, prefix: str) -> Any:
    """The dataclass that a merged config describes. Raises UserError for missing values and those out of bounds."""
    try:
        OmegaConf.resolve(config)
        missing = sorted(OmegaConf.missing_keys(config))
    except OmegaConfBaseException as error:
        raise UserError(f"{source}: {_reason(error)}") from None
    if missing:
        raise UserError(f"config: key {prefix}{missing[0]} is required and has no value")
    _check_bounds(made := OmegaConf.to_object(config), prefix)
    return made


def _check_bounds(config: Any, prefix: str) -> None:
    for entry in fields(config):
        value, key = getattr(config, entry.name), f"{prefix}{entry.name}"
        if "holds" in entry.metadata and not entry.metadata["holds"](value):
            raise UserError(f"config: key {key} is {value!r}; expected {entry.metadata['expected']}")
        if is_dataclass(value):
            _check_bounds(value, f"{key}.")
        for index, item in enumerate(value if isinstance(value, list) else ()):
            if is_dataclass(item):
                _check_bounds(item, f"{key}[{index}].")


def _unknown(key: str, valid: Iterable[str], parent: str) -> str:
    nearest = difflib.get_close_matches(key, list(valid), n=1, cutoff=0.0)[0]
    return f"unknown key {parent}{key}; the nearest valid key is {parent}{nearest}"


def _reason(error: OmegaConfBaseException, prefix: str = "") -> str:
    key = getattr(error, "full_key", None)
    return (f"key {prefix}{key}: " if key else "") + str(error).splitlines()[0]
