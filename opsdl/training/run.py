"""A run from its config: evaluate, train, evaluate again, report; go on from the newest checkpoint.

Run it with `opsdl train recipes/smollm2-kjv.yaml`.
"""

from __future__ import annotations

from contextlib import closing

from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import logging as transformers_logging

from opsdl.config import RunConfig, build
from opsdl.data.prompts import Prompts, open_source
from opsdl.errors import UserError
from opsdl.evaluation import EvaluationResult, evaluate, format_table, write_report
from opsdl.models import checkpoint_activations, context_limit, eos_token_ids, load_model, load_tokenizer, pick_device
from opsdl.training.checkpoint import Checkpoints
from opsdl.training.log import StepLog
from opsdl.training.loop import Loop
from opsdl.training.monitor import Clock
from opsdl.training.objectives import OBJECTIVES, Objective
from opsdl.training.optimizer import Optimizer
from opsdl.training.parallel import OneProcess
from opsdl.training.policy import Policy
from opsdl.training.rollout import ENGINES
from opsdl.training.rundir import RunDir
from opsdl.training.teacher import TEACHERS


def train(config: RunConfig) -> None:
    """Evaluate, train, evaluate again, write the report.

    Args:
        config: with resume "auto" the run in run_dir goes on from its newest checkpoint.

    Raises:
        UserError: bad input, before anything is written; a loss or gradient that is not a number, with the checkpoint
            before it intact.
        KeyboardInterrupt: after Ctrl-C, when the running step is finished and saved.
    """
    transformers_logging.disable_progress_bar()  # saving a checkpoint must not break the bar of the steps
    device = pick_device(config.device)
    tokenizer = load_tokenizer(config.model.name, config.model.gguf_file)
    initial = load_model(config.model.name, config.model.gguf_file, device=device)
    prompts = make_prompts(config, tokenizer, initial)
    prompts[0]  # bad data fails here
    _check_choices(config)
    run = RunDir(config)
    before = run.evaluation("before.json")
    if before is None:
        before = _evaluate(initial, tokenizer, config)
        run.create()
        run.save("before.json", before.to_json())
    loop = make_loop(config, run, initial, tokenizer, prompts)
    with closing(loop.engine):
        loop.run()
    after = run.evaluation("after.json")
    if after is None:
        after = _evaluate(loop.student.model, tokenizer, config)
        run.save("after.json", after.to_json())
    write_report(
        run.path,
        config,
        before,
        after,
        run.rows("metrics.jsonl"),
        objective=loop.objective.phrase,
        teacher=loop.teacher.phrase,
    )
    print(f"\n{format_table(before, after)}\n\nreport: {run.path / 'report.md'}   model: {loop.checkpoints.newest}")


def make_prompts(config: RunConfig, tokenizer: PreTrainedTokenizerBase, model: PreTrainedModel) -> Prompts:
    """Open the stream of training prompts.

    Raises:
        UserError: anything is wrong with the task's options or the file of triplets, or a prompt of the file with its
            response does not fit the model's positions.
    """
    return Prompts(
        open_source(config.data, tokenizer),
        tokenizer,
        template=config.data.template,
        limit=context_limit(model),
        max_new_tokens=config.rollout.max_new_tokens,
        device=model.device,
        seed=config.seed,
        prompts_per_step=config.prompts_per_step,
    )


def make_loop(
    config: RunConfig,
    run: RunDir,
    initial: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Prompts,
) -> Loop:
    """Put the parts of a run together, in the state of its newest checkpoint.

    Args:
        config: the run's.
        run: its directory, made already.
        initial: the model as it was before training; it becomes the student where nothing was trained yet.
        tokenizer: the model's.
        prompts: the stream of training prompts.

    Raises:
        UserError: the objective, its options or the rollout engine are unknown.
    """
    objective = _check_choices(config)
    parallel, clock = OneProcess(), Clock(initial.device)
    checkpoints = Checkpoints(run.path, tokenizer, config.keep_checkpoints)
    newest = checkpoints.newest
    model = initial if newest is None else load_model(str(newest), device=initial.device)
    student = Policy(parallel.shard(model), config, "student", clock)
    teacher_kind = TEACHERS[config.teacher.kind if objective.needs_teacher else "live"]
    teacher = teacher_kind(student, None if newest is None else initial, config)
    student.model.train()
    if config.model.activation_checkpointing:
        checkpoint_activations(student.model)
    optimizer = Optimizer(student.model.parameters(), config.optimizer)
    done = checkpoints.restore(student.model, optimizer.adamw, teacher.state)
    run.forget_after(done)
    return Loop(
        config=config,
        prompts=prompts,
        engine=ENGINES[config.rollout.engine](student, eos_token_ids(student.model, tokenizer)),
        objective=objective,
        student=student,
        teacher=teacher,
        optimizer=optimizer,
        parallel=parallel,
        log=StepLog(run, tokenizer, clock),
        checkpoints=checkpoints,
        done=done,
    )


def _check_choices(config: RunConfig) -> Objective:
    if config.rollout.engine not in ENGINES:
        known = ", ".join(ENGINES)
        raise UserError(f"config: key rollout.engine is {config.rollout.engine!r}; expected one of {known}")
    return build(OBJECTIVES, config.loss, "loss")


def _evaluate(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, config: RunConfig) -> EvaluationResult:
    return evaluate(
        model,
        tokenizer,
        config.evaluation,
        template=config.data.template,
        compute_dtype=config.model.compute_dtype,
        seed=config.seed,
    )
