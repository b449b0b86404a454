"""Runs on a tiny model and real text, and an engine that answers with given responses."""

from __future__ import annotations

from pathlib import Path

from opsdl.config import (
    Chosen,
    DataConfig,
    EvaluationConfig,
    EvaluationSet,
    ModelConfig,
    OptimizerConfig,
    RolloutConfig,
    RunConfig,
)

NEEDLES = {"kinds": ["multikey"], "length": 160, "short_length": 60}


def tiny_config(model_dir: Path, folder: Path) -> RunConfig:
    """Four steps of two prompts, three responses of up to five tokens each."""
    return RunConfig(
        run_dir=str(folder / "run"),
        model=ModelConfig(name=str(model_dir)),
        data=DataConfig(task=Chosen("needles", NEEDLES)),
        rollout=RolloutConfig(group_size=3, max_new_tokens=5),
        optimizer=OptimizerConfig(lr=1e-3, warmup_steps=2),
        evaluation=EvaluationConfig(
            sets=[EvaluationSet(name="tiny", items=2, task=Chosen("needles", NEEDLES))], max_new_tokens=4
        ),
        steps=4,
        prompts_per_step=2,
        checkpoint_every=2,
        device="cpu",
    )


def make_loop(config: RunConfig):
    """The loop of a run, in its directory."""
    from opsdl.models import load_model, load_tokenizer
    from opsdl.training import run
    from opsdl.training.rundir import RunDir

    tokenizer, model = load_tokenizer(config.model.name), load_model(config.model.name)
    folder = RunDir(config)
    folder.create()
    return run.make_loop(config, folder, model, tokenizer, run.make_prompts(config, tokenizer, model))


class RecordedEngine:
    """A rollout engine whose responses were sampled before: a list of groups for each step."""

    def __init__(self, steps):
        self.steps, self.seeds, self.synced = list(steps), [], []

    def generate(self, prompts, sampling, seed):
        from opsdl.training.groups import Rollout

        self.seeds.append(seed)
        return [Rollout(prompt, group) for prompt, group in zip(prompts, self.steps.pop(0), strict=True)]

    def sync(self, student, step):
        self.synced.append(step)

    def close(self):
        pass
