"""Checkpoints: a plain HF model directory anyone can load, and beside it the state that resuming needs.

    <run_dir>/checkpoints/step-00010/   config.json, model.safetensors, tokenizer files
                                        trainer.safetensors (optimizer moments, EMA teacher), trainer.json (step)

Everything is safetensors and JSON: nothing is pickled. A checkpoint is written beside its place and renamed into it,
so one that exists is whole.
"""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel, PreTrainedTokenizerBase

MOMENTS = ("exp_avg", "exp_avg_sq", "step")


class Checkpoints:
    """The checkpoints of a run, of which the newest `keep` stay."""

    def __init__(self, run_dir: Path, tokenizer: PreTrainedTokenizerBase, keep: int):
        self.folder, self.tokenizer, self.keep = run_dir / "checkpoints", tokenizer, keep

    @property
    def newest(self) -> Path | None:
        """The directory of the newest whole checkpoint, or None."""
        return next(reversed(self._whole()), None)

    def save(
        self, step: int, model: PreTrainedModel, optimizer: torch.optim.Optimizer, average: PreTrainedModel | None
    ) -> None:
        """Write the state after `step` steps, and delete old checkpoints.

        Args:
            step: the number of steps done.
            model: the student.
            optimizer: its AdamW.
            average: the weights of an EMA teacher.
        """
        final = self.folder / f"step-{step:05d}"
        temporary = final.with_name(f".{final.name}.tmp")
        shutil.rmtree(temporary, ignore_errors=True)
        model.save_pretrained(temporary)
        self.tokenizer.save_pretrained(temporary)
        tensors = {
            f"{moment}.{name}": optimizer.state[parameter][moment]
            for name, parameter in model.named_parameters()
            if parameter in optimizer.state
            for moment in MOMENTS
        }
        if average is not None:
            tensors |= {f"average.{name}": parameter.detach() for name, parameter in average.named_parameters()}
        save_file(tensors, temporary / "trainer.safetensors")
        (temporary / "trainer.json").write_text(json.dumps({"step": step}) + "\n")
        shutil.rmtree(final, ignore_errors=True)
        os.replace(temporary, final)
        for old in self._whole()[: -self.keep]:
            shutil.rmtree(old)

    def restore(self, model: PreTrainedModel, optimizer: torch.optim.Optimizer, average: PreTrainedModel | None) -> int:
        """Put optimizer moments and EMA teacher back from the newest checkpoint; the model itself loads as a model.

        Returns:
            The number of steps done; 0 where there is no checkpoint.
        """
        checkpoint = self.newest
        if checkpoint is None:
            return 0
        tensors = load_file(checkpoint / "trainer.safetensors")
        for name, parameter in model.named_parameters():
            if f"step.{name}" in tensors:
                optimizer.state[parameter] = {
                    moment: tensors[f"{moment}.{name}"].to(parameter.device) for moment in MOMENTS
                }
        if average is not None:
            with torch.no_grad():
                for name, parameter in average.named_parameters():
                    parameter.copy_(tensors[f"average.{name}"])
        return int(json.loads((checkpoint / "trainer.json").read_text())["step"])

    def _whole(self) -> list[Path]:
        """The whole checkpoints, oldest first."""
        return sorted(self.folder.glob("step-*"))
