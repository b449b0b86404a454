"""The config of a run: dataclasses give the keys, types and defaults; YAML and dotted overrides fill them.

    config = load_config("recipes/smollm2-kjv.yaml", ["optimizer.lr=1e-5", "rollout.group_size=8"])

An unknown key or a wrong type is a UserError that names the key and the nearest valid one.
"""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from omegaconf import MISSING, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from opsdl.errors import UserError


@dataclass
class ModelConfig:
    name: str = MISSING  # hub id or local directory of a HF causal LM
    gguf_file: str | None = None  # a GGUF file inside that directory
    compute_dtype: str = "bfloat16"  # autocast dtype of the matrix products; weights stay float32
    activation_checkpointing: bool = False


@dataclass
class NeedleConfig:
    """Needle questions in real text, made on the fly (opsdl/data/needles.py)."""

    haystack: str = "kjv"  # kjv | python
    split: str = "train"  # train | eval: disjoint keys, values, wording and haystack region
    kinds: list[str] = field(default_factory=lambda: ["single", "multikey", "multivalue", "multiquery"])
    length: int = 1000  # tokens of the long context
    questions: int = 1  # asked about one long context, each for another key; they share its prefill
    short_length: int = 150  # tokens of the short context, an excerpt that holds the evidence


@dataclass
class DataConfig:
    triplets: str | None = None  # JSONL of triplets; without it, `needles` makes them
    needles: NeedleConfig = field(default_factory=NeedleConfig)
    template: str = "{context}\n\n{question}"  # what the user turn of the chat holds


@dataclass
class RolloutConfig:
    group_size: int = 4  # responses per prompt, all from one prefill
    max_new_tokens: int = 24
    temperature: float = 0.8
    top_p: float = 1.0


@dataclass
class TeacherConfig:
    kind: str = "frozen"  # frozen: the initial weights | live: the student's own | ema
    ema_decay: float = 0.99  # used by `ema` only, once per step


@dataclass
class LossConfig:
    kind: str = "full"  # full: whole-vocabulary reverse KL | policy: the paper's sampled-token form
    baseline: str | None = None  # policy only: "kl" subtracts the expected advantage


@dataclass
class OptimizerConfig:
    lr: float = 3e-5
    warmup_steps: int = 5
    weight_decay: float = 0.0
    beta1: float = 0.9
    beta2: float = 0.95
    max_grad_norm: float = 1.0


@dataclass
class EvaluationSet:
    name: str = MISSING
    needles: NeedleConfig = field(default_factory=lambda: NeedleConfig(split="eval"))
    items: int = 48


@dataclass
class EvaluationConfig:
    sets: list[EvaluationSet] = field(default_factory=list)
    max_new_tokens: int = 32
    batch_size: int = 16  # prompts decoded together


@dataclass
class RunConfig:
    run_dir: str = MISSING
    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    rollout: RolloutConfig = field(default_factory=RolloutConfig)
    teacher: TeacherConfig = field(default_factory=TeacherConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    prefix_gradient: str = "exact"  # exact | detached (no gradient through the prefix)
    steps: int = 32
    prompts_per_step: int = 4
    seed: int = 0
    checkpoint_every: int = 10  # steps
    keep_checkpoints: int = 1
    resume: str = "never"  # never | auto: go on from the newest checkpoint of run_dir
    device: str = "auto"  # auto: cuda if there is one, else cpu


CHOICES = {
    "model.compute_dtype": ("float32", "bfloat16", "float16"),
    "teacher.kind": ("frozen", "live", "ema"),
    "loss.kind": ("full", "policy"),
    "loss.baseline": (None, "kl"),
    "prefix_gradient": ("exact", "detached"),
    "resume": ("never", "auto"),
}
POSITIVE = (
    "rollout.group_size", "rollout.max_new_tokens", "optimizer.lr", "steps", "prompts_per_step", "checkpoint_every",
    "keep_checkpoints", "data.needles.length", "data.needles.short_length", "data.needles.questions",
    "evaluation.max_new_tokens", "evaluation.batch_size",
)  # fmt: skip


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> RunConfig:
    """Read a YAML config, apply `key.sub=value` overrides, check every value.

    Raises UserError naming the file and the key.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"config {path}: no such file")
    for override in overrides:
        if "=" not in override:
            raise UserError(f"override {override!r}: expected key.sub=value")
    schema = OmegaConf.structured(RunConfig)
    try:
        loaded = OmegaConf.load(path)
    except (YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"config {path}: not valid YAML: {' '.join(str(error).split())}") from None
    if not OmegaConf.is_dict(loaded):
        raise UserError(f"config {path}: expected a mapping of keys, found a list")
    config = schema
    for source, layer in [(f"config {path}", loaded)] + [(f"override {o!r}", _dotlist(o)) for o in overrides]:
        _refuse_unknown_keys(layer, schema, source)
        try:
            config = OmegaConf.merge(config, layer)
        except OmegaConfBaseException as error:
            raise UserError(f"{source}: {_reason(error)}") from None
        except TypeError:  # a mapping laid over a list
            raise UserError(f"{source}: a list has no keys to set; give the whole list") from None
    try:
        OmegaConf.resolve(config)
    except OmegaConfBaseException as error:
        raise UserError(f"config {path}: {_reason(error)}") from None
    _check_values(config)
    return OmegaConf.to_object(config)


def to_yaml(config: RunConfig) -> str:
    """The resolved config, every key present."""
    return OmegaConf.to_yaml(OmegaConf.structured(config))


def _reason(error: OmegaConfBaseException) -> str:
    key = getattr(error, "full_key", None)
    return (f"key {key}: " if key else "") + str(error).splitlines()[0]


def _dotlist(override: str) -> Any:
    try:
        return OmegaConf.from_dotlist([override])
    except (OmegaConfBaseException, YAMLError) as error:
        raise UserError(f"override {override!r}: {' '.join(str(error).split())}") from None


def _refuse_unknown_keys(layer: Any, schema: Any, source: str, parent: str = "") -> None:
    valid = list(schema)
    for key in layer:
        full = f"{parent}{key}"
        if key not in valid:
            near = difflib.get_close_matches(str(key), valid, n=1, cutoff=0.0)
            raise UserError(f"{source}: unknown key {full}; the nearest valid key is {parent}{near[0]}")
        if OmegaConf.is_dict(layer._get_node(key)) and OmegaConf.is_dict(schema._get_node(key)):
            _refuse_unknown_keys(layer[key], schema[key], source, f"{full}.")


def _check_values(config: Any) -> None:
    missing = OmegaConf.missing_keys(config)
    if missing:
        raise UserError(f"config: key {sorted(missing)[0]} is required and has no value")
    for key, choices in CHOICES.items():
        value = OmegaConf.select(config, key)
        if value not in choices:
            raise UserError(f"config: key {key} is {value!r}; expected one of {', '.join(map(str, choices))}")
    for key in POSITIVE:
        value = OmegaConf.select(config, key)
        if not value > 0:
            raise UserError(f"config: key {key} is {value}; expected a positive number")
    for index, chosen in enumerate(config.evaluation.sets):
        for key in ("items", "needles.length", "needles.short_length", "needles.questions"):
            value = OmegaConf.select(chosen, key)
            if not value > 0:
                raise UserError(f"config: key evaluation.sets[{index}].{key} is {value}; expected a positive number")
    if not config.rollout.temperature > 0:
        raise UserError(f"config: key rollout.temperature is {config.rollout.temperature}; rollouts need it above 0")
    if not 0 < config.rollout.top_p <= 1:
        raise UserError(f"config: key rollout.top_p is {config.rollout.top_p}; expected a number in (0, 1]")
    if config.data.template.count("{context}") != 1 or config.data.template.count("{question}") != 1:
        raise UserError("config: key data.template must hold {context} and {question} once each")
