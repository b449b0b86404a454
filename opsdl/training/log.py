"""What a run writes down of each step: metrics.jsonl, samples.jsonl, and the line beside the progress bar."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch

from opsdl.training.monitor import Clock, peak_memory_mib

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from opsdl.training.groups import Rollout
    from opsdl.training.objectives.base import LossOutput
    from opsdl.training.rundir import RunDir


class StepLog:
    """Collects a step's numbers, and writes them when it is done.

    Args:
        run: the directory that the files are in.
        tokenizer: turns responses into text.
        clock: seconds of the step's parts.
    """

    def __init__(self, run: RunDir, tokenizer: PreTrainedTokenizerBase, clock: Clock):
        self.run, self.tokenizer, self.clock = run, tokenizer, clock

    def begin(self) -> None:
        """Start a step."""
        self.clock.start()
        self.sums: dict[str, float] = {"loss": 0.0}

    def sampled(self, rollouts: Sequence[Rollout], count: float) -> None:
        """Note the rollouts of the step, and what its sums are divided by."""
        self.count = count
        self.responses = sum(len(rollout.responses.lengths) for rollout in rollouts)
        self.tokens = sum(sum(rollout.responses.lengths) for rollout in rollouts)
        self.prompts = [rollout.prompt for rollout in rollouts]
        self.texts = [_texts(self.tokenizer, rollout) for rollout in rollouts]
        self.clock.lap("rollout")

    def add(self, out: LossOutput) -> None:
        """Add the loss of some of the rollouts, after its backward."""
        self.sums["loss"] += out.total.item()
        for name, of_tokens_N in out.statistics.items():
            self.sums[name] = self.sums.get(name, 0.0) + float(of_tokens_N.sum())
        self.clock.lap("student")

    @property
    def loss(self) -> float:
        """The step's loss so far."""
        return self.sums["loss"] / self.count

    def write(self, step: int, *, grad_norm: float, lr: float, device: torch.device) -> dict[str, Any]:
        """Write the metrics of step number `step` (the first is 1) and the responses to its first prompt.

        Returns:
            The metrics.
        """
        self.clock.lap("optimizer")
        seconds, read = self.clock.seconds, sum(len(prompt.long_ids) for prompt in self.prompts)
        metrics = {
            "step": step,
            **{name: value / self.count for name, value in self.sums.items()},
            "accuracy": self._accuracy(),
            "response_length": self.tokens / self.responses,
            "tokens_per_second": (read + self.tokens) / sum(seconds.values()),
            **{f"seconds_{part}": value for part, value in seconds.items()},
            "peak_memory_mib": peak_memory_mib(device),
            "grad_norm": grad_norm,
            "lr": lr,
        }
        first = self.prompts[0].triplet
        sample = {"step": step, "id": first.id, "question": first.question, "answers": first.answers}
        self.run.append("samples.jsonl", sample | {"responses": self.texts[0]})
        self.run.append("metrics.jsonl", metrics)
        return metrics

    def _accuracy(self) -> float | None:
        """The mean score of the responses whose answers are known, or None."""
        pairs = zip(self.prompts, self.texts, strict=True)
        scores = [prompt.score(text) for prompt, texts in pairs for text in texts]
        known = [score for score in scores if score is not None]
        return statistics.fmean(known) if known else None


def brief(metrics: dict[str, Any]) -> dict[str, str]:
    """Return what stands beside the progress bar."""
    shown = ("loss" if "kl" not in metrics else "kl", "accuracy")
    return {name: f"{metrics[name]:.4f}" for name in shown if metrics[name] is not None}


def _texts(tokenizer: PreTrainedTokenizerBase, rollout: Rollout) -> list[str]:
    pairs = zip(rollout.responses.tokens, rollout.responses.mask, strict=True)
    return [str(tokenizer.decode(tokens_T[mask_T], skip_special_tokens=True)) for tokens_T, mask_T in pairs]
