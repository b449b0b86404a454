"""Made-up results of evaluations."""

from __future__ import annotations

import random

from opsdl.evaluation.results import EvaluationResult, Sample, SetResult


def made_up_result(seed: int, bias: float) -> EvaluationResult:
    """A result with random scores; `bias` is the chance to find an answer under the long context."""
    draw, sets = random.Random(seed), []
    described = (("kjv-1000", 1000, ("single", "multikey")), ("python-2000", 2000, ("single", "multivalue")))
    for name, length, kinds in described:
        samples = []
        for index in range(30):
            long_score, short_score = float(draw.random() < bias), draw.choice([0.5, 1.0, 1.0])
            samples.append(
                Sample(
                    id=f"{name}-{index}",
                    task=kinds[index % 2],
                    question="What is the special number?",
                    answers=(str(10000 + index),),
                    long_score=long_score,
                    short_score=short_score,
                    long_text=f"It is {10000 + index}.\n```" if long_score else "I | cannot say.",
                    short_text="word " * 200,
                )
            )
        sets.append(SetResult(name, f"questions in {name}", length, tuple(samples)))
    return EvaluationResult(tuple(sets), 12.5)
