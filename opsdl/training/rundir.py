"""The directory of a run: its config, metrics.jsonl, samples.jsonl, evaluations, checkpoints, report."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from opsdl.config import RunConfig, as_mapping, to_yaml
from opsdl.errors import UserError
from opsdl.evaluation import EvaluationResult
from opsdl.files import write_whole


class RunDir:
    """A new run directory, not made before `create`, or with resume=auto an existing one.

    Raises UserError when the directory already holds a run and resume is "never", or when the run in it was started
    with another config: it names the first key that differs.
    """

    def __init__(self, config: RunConfig):
        self.path = Path(config.run_dir)
        self.config_file = self.path / "config.yaml"
        self.resolved = to_yaml(replace(config, resume="never"))  # resuming does not change what a run computes
        if self.config_file.exists():
            if config.resume == "never":
                raise UserError(f"run_dir {self.path}: holds a run already; expected resume=auto or another run_dir")
            _compare(OmegaConf.load(self.config_file), OmegaConf.create(self.resolved), self.path, DEFAULTS)

    def create(self) -> None:
        """Make the directory, with the resolved config in it. Raises UserError where that cannot be done."""
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            write_whole(self.config_file, self.resolved)
        except OSError as error:
            raise UserError(f"run_dir {self.path}: cannot be made: {error.strerror}") from None

    def forget_after(self, step: int) -> None:
        """Drop the metrics and samples of steps that no checkpoint holds: they are about to run again."""
        for name in ("metrics.jsonl", "samples.jsonl"):
            rows = [row for row in self.rows(name) if row["step"] <= step]
            write_whole(self.path / name, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))

    def append(self, name: str, row: dict[str, Any]) -> None:
        with open(self.path / name, "a", encoding="utf-8") as file:
            file.write(json.dumps(row, ensure_ascii=False) + "\n")

    def rows(self, name: str) -> list[dict[str, Any]]:
        path = self.path / name
        if not path.exists():
            return []
        # Only whole lines count: a process that was killed may have left half of the last one.
        return [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n")[:-1]]

    def evaluation(self, name: str) -> EvaluationResult | None:
        """Return an evaluation that was saved, or None. Raises UserError for one of another version."""
        path = self.path / name
        if not path.exists():
            return None
        return EvaluationResult.from_json(json.loads(path.read_text(encoding="utf-8")), str(path))

    def save(self, name: str, value: Any) -> None:
        write_whole(self.path / name, json.dumps(value, ensure_ascii=False, indent=1) + "\n")


# What a key had that the config of an older version does not hold yet.
DEFAULTS = OmegaConf.create(as_mapping(RunConfig()))


def _compare(old: Any, new: Any, path: Path, defaults: Any, parent: str = "") -> None:
    for key in new:
        before, now = OmegaConf.select(old, key, default=OmegaConf.select(defaults, key)), OmegaConf.select(new, key)
        if OmegaConf.is_dict(now) and OmegaConf.is_dict(before):
            _compare(before, now, path, OmegaConf.select(defaults, key, default=OmegaConf.create()), f"{parent}{key}.")
        elif before != now:
            raise UserError(
                f"run_dir {path}: was started with {parent}{key}={before}, now {now}; expected the same config to"
                " resume, or another run_dir"
            )
