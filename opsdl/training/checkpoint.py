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


def save_checkpoint(
    run_dir: Path,
    step: int,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    optimizer: torch.optim.Optimizer,
    average: PreTrainedModel | None,
    keep: int,
) -> Path:
    """Write the state after `step` steps and delete all but the newest `keep` checkpoints. Returns its directory."""
    final = run_dir / "checkpoints" / f"step-{step:05d}"
    temporary = final.with_name(f".{final.name}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    model.save_pretrained(temporary)
    tokenizer.save_pretrained(temporary)
    names = {parameter: name for name, parameter in model.named_parameters()}
    tensors = {
        f"{moment}.{names[parameter]}": state[moment]
        for parameter, state in optimizer.state.items()
        for moment in MOMENTS
    }
    if average is not None:
        tensors |= {f"average.{name}": parameter.detach() for name, parameter in average.named_parameters()}
    save_file(tensors, temporary / "trainer.safetensors")
    (temporary / "trainer.json").write_text(json.dumps({"step": step}) + "\n")
    shutil.rmtree(final, ignore_errors=True)
    os.replace(temporary, final)
    for old in checkpoints(run_dir)[:-keep]:
        shutil.rmtree(old)
    return final


def checkpoints(run_dir: Path) -> list[Path]:
    """The whole checkpoints of a run, oldest first."""
    return sorted((run_dir / "checkpoints").glob("step-*"))


def restore_trainer(
    checkpoint: Path, model: PreTrainedModel, optimizer: torch.optim.Optimizer, average: PreTrainedModel | None
) -> int:
    """Put optimizer moments and EMA teacher back (the model itself loads as a model). Returns the steps done."""
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
    return json.loads((checkpoint / "trainer.json").read_text())["step"]
