"""The training loop. It reads like the algorithm (arXiv 2604.17535, algorithm 1; design, "What it is for"):

    for each prompt (C_L, C_S, Q) of the step
        prefix    = prefill(student, C_L + Q)                     questions about one C_L share its prefill
        responses = generate(student, prefix)                     y ~ p(. | C_L, Q), a group from one prefill
        q         = response_hidden(teacher, C_S + Q, responses)  no gradient
        p         = response_hidden(student, C_L + Q, responses)  with gradient, through that same prefill
        loss      = mean over response tokens of KL(p || q)
    backward, optimizer step

Run it with `opsdl train recipes/smollm2-kjv.yaml`.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor
from tqdm import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import logging as transformers_logging

from opsdl.config import RunConfig
from opsdl.data.prompts import Prompt, Prompts, by_context, common_beginning
from opsdl.errors import UserError
from opsdl.evaluation.evaluate import evaluate
from opsdl.evaluation.report.markdown import format_table, write_report
from opsdl.evaluation.scoring import found
from opsdl.losses import fused_policy_reverse_kl, fused_reverse_kl
from opsdl.models import context_limit, eos_token_ids, load_model, load_tokenizer, pick_device
from opsdl.prefix import PrefixCache, Responses, extend, generate, prefill, response_hidden
from opsdl.training.checkpoint import restore_trainer, save_checkpoint
from opsdl.training.monitor import Clock, interrupt_after_step, peak_memory_mib
from opsdl.training.rundir import RunDir
from opsdl.training.teacher import Teacher


def train(config: RunConfig) -> None:
    """Evaluate, train, evaluate again, write the report; go on from the newest checkpoint with resume=auto.

    Raises UserError for bad input, before anything is written, and for a loss or gradient that is not a number, with
    the checkpoint before it intact. KeyboardInterrupt (Ctrl-C) arrives after the running step is finished
    and saved.
    """
    transformers_logging.disable_progress_bar()  # saving a checkpoint must not break the bar of the steps
    device = pick_device(config.device)
    tokenizer = load_tokenizer(config.model)
    initial = load_model(config.model, device)
    prompts = Prompts(config, tokenizer, context_limit(initial), device)
    prompts[0]  # bad data fails here
    run = RunDir(config)
    before = run.load("before.json")
    if before is None:
        before = evaluate(initial, tokenizer, config)
        run.create()
        run.save("before.json", before)
    trainer = Trainer(config, run, initial, tokenizer, prompts)
    trainer.run_steps()
    after = run.load("after.json")
    if after is None:
        after = evaluate(trainer.student, tokenizer, config)
        run.save("after.json", after)
    write_report(run.path, config, before, after, run.rows("metrics.jsonl"))
    print(f"\n{format_table(before, after)}\n\nreport: {run.path / 'report.md'}   model: {run.checkpoint}")


class Trainer:
    """The state of a run, and one step of it."""

    def __init__(
        self,
        config: RunConfig,
        run: RunDir,
        initial: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        prompts: Prompts,
    ):
        self.config, self.run, self.tokenizer, self.prompts = config, run, tokenizer, prompts
        self.device = device = initial.device
        checkpoint = run.checkpoint
        if checkpoint is None:
            self.student, self.done = initial, 0
            self.teacher = Teacher(self.student, None, config)
        else:
            self.student = load_model(replace(config.model, name=str(checkpoint), gguf_file=None), device)
            self.teacher = Teacher(self.student, initial, config)
        self.student.train()
        if config.model.activation_checkpointing:
            self.student.activation_checkpointing_enable(activation_checkpointing_kwargs={"use_reentrant": False})
        settings = config.optimizer
        self.optimizer = torch.optim.AdamW(
            self.student.parameters(),
            lr=settings.lr,
            betas=(settings.beta1, settings.beta2),
            weight_decay=settings.weight_decay,
            fused=True,
        )
        if checkpoint is not None:
            self.done = restore_trainer(checkpoint, self.student, self.optimizer, self._average)
        run.forget_after(self.done)
        self.eos = eos_token_ids(self.student, tokenizer)
        # The rollout's own pass over the prefix keeps its graph for the backward, unless memory is to be saved.
        self.reuse_prefill = config.prefix_gradient == "exact" and not config.model.activation_checkpointing

    @property
    def _average(self) -> PreTrainedModel | None:
        """The teacher, where its weights are part of the run's state."""
        return self.teacher.model if self.config.teacher.kind == "ema" else None

    def run_steps(self) -> None:
        with (
            interrupt_after_step() as interrupted,
            tqdm(total=self.config.steps, initial=self.done, unit="step", desc="train") as bar,
        ):
            while self.done < self.config.steps:
                metrics = self.step()
                bar.set_postfix(kl=f"{metrics['kl']:.4f}", accuracy=metrics["accuracy"])
                bar.update()
                if interrupted or self.done == self.config.steps or self.done % self.config.checkpoint_every == 0:
                    self.save()
                if interrupted:
                    raise KeyboardInterrupt

    def step(self) -> dict[str, float]:
        """One optimizer step over `prompts_per_step` prompts. Returns and logs its metrics."""
        clock = Clock(self.device)
        batch = self.prompts.batch(self.done)
        try:
            prefixes, groups = self.rollout(batch)
        except UserError as error:
            raise self.broken(str(error)) from None
        clock.lap("rollout")
        num_tokens = sum(int(group.mask.sum()) for group in groups)
        loss, kl, entropy = 0.0, 0.0, 0.0
        todo = list(zip(batch, prefixes, groups, strict=True))
        del prefixes  # a graph lives until its backward
        for prompts in by_context(batch):
            _, caches, responses = zip(*(todo.pop(0) for _ in prompts), strict=True)
            teacher_NH = self.teacher_hidden(prompts, responses)
            clock.lap("teacher")
            student_NH = self.student_hidden(prompts, caches, responses)
            total, stats = self.loss(student_NH, teacher_NH, torch.cat([r.tokens[r.mask] for r in responses]))
            del caches, student_NH
            (total / num_tokens).backward()  # one pass through the prefill that these prompts share
            loss += total.item() / num_tokens
            kl += float(stats["kl"].sum()) / num_tokens
            entropy += float(stats["entropy"].sum()) / num_tokens
            clock.lap("student")
        norm = float(torch.nn.utils.clip_grad_norm_(self.student.parameters(), self.config.optimizer.max_grad_norm))
        if not (math.isfinite(loss) and math.isfinite(norm)):
            raise self.broken(f"the loss is {loss}, its gradient's norm {norm}; expected finite numbers")
        self.update()
        clock.lap("optimizer")
        self.done += 1
        seconds = clock.seconds
        metrics = {
            "step": self.done,
            "loss": loss,
            "kl": kl,
            "entropy": entropy,
            "accuracy": self.log_samples(batch, groups),
            "response_length": num_tokens / sum(len(group.lengths) for group in groups),
            "tokens_per_second": (sum(len(p.long_ids) for p in batch) + num_tokens) / sum(seconds.values()),
            **{f"seconds_{part}": value for part, value in seconds.items()},
            "peak_memory_mib": peak_memory_mib(self.device),
            "grad_norm": norm,
            "lr": self.optimizer.param_groups[0]["lr"],
        }
        self.run.append("metrics.jsonl", metrics)
        return metrics

    def rollout(self, batch: list[Prompt]) -> tuple[list[PrefixCache], list[Responses]]:
        """A group of responses for each prompt under its long context, each group from one prefill."""
        settings = self.config.rollout
        # Drawn from (seed, step) alone, so that a resumed run samples what the uninterrupted one would have.
        generator = torch.Generator(self.device).manual_seed(self.config.seed * 1_000_003 + self.done)
        with self.autocast():
            prefixes = [cache for prompts in by_context(batch) for cache in self.prefill(prompts)]
            groups = generate(
                self.student,
                prefixes,
                num_responses=settings.group_size,
                max_new_tokens=settings.max_new_tokens,
                temperature=settings.temperature,
                top_p=settings.top_p,
                eos_token_id=self.eos,
                generator=generator,
            )
        return prefixes, groups

    def prefill(self, prompts: list[Prompt]) -> list[PrefixCache]:
        """A cache for each of the prompts, which share their long context and so its prefill."""
        if len(prompts) == 1:
            return [prefill(self.student, prompts[0].long_ids, gradient=self.reuse_prefill)]
        document = prefill(self.student, common_beginning(prompts), gradient=self.reuse_prefill)
        return extend(self.student, document, [p.long_ids for p in prompts], gradient=self.reuse_prefill)

    @torch.no_grad()
    def teacher_hidden(self, prompts: list[Prompt], groups: Sequence[Responses]) -> Tensor:
        """Every response token under its short context, [N, H]."""
        with self.autocast():
            hiddens = response_hidden(self.teacher.model, [p.short_ids for p in prompts], groups)
        return torch.cat([hidden[group.mask] for hidden, group in zip(hiddens, groups, strict=True)])

    def student_hidden(
        self, prompts: list[Prompt], caches: Sequence[PrefixCache], groups: Sequence[Responses]
    ) -> Tensor:
        """Every response token under its long context, [N, H], with gradient."""
        mode = self.config.prefix_gradient
        reusable = mode == "detached" or self.reuse_prefill
        with self.autocast():
            hiddens = response_hidden(
                self.student,
                [p.long_ids for p in prompts],
                groups,
                prefix_gradient=mode,
                prefix=caches if reusable else None,
            )
        return torch.cat([hidden[group.mask] for hidden, group in zip(hiddens, groups, strict=True)])

    def loss(self, student_NH: Tensor, teacher_NH: Tensor, tokens_N: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """The sum over response tokens, and per-token statistics."""
        student, teacher = self.student.get_output_embeddings(), self.teacher.head
        inputs = student_NH, student.weight, teacher_NH, teacher and teacher.weight
        options = {
            "student_bias": student.bias,
            "teacher_bias": teacher and teacher.bias,
            "softcap": getattr(self.student.config, "final_logit_softcapping", None),
            "reduction": "sum",
            "return_stats": True,
        }
        if self.config.loss.kind == "full":
            return fused_reverse_kl(*inputs, **options)
        return fused_policy_reverse_kl(*inputs, tokens_N, baseline=self.config.loss.baseline, **options)

    def broken(self, what: str) -> UserError:
        """Why this step was not made."""
        return UserError(
            f"step {self.done + 1}: {what}. The last checkpoint, {self.run.checkpoint or 'none'}, is as it was; try a"
            " lower optimizer.lr"
        )

    def update(self) -> None:
        """Step with the learning rate of this step, then move the teacher."""
        settings = self.config.optimizer
        self.optimizer.param_groups[0]["lr"] = settings.lr * min(1.0, (self.done + 1) / max(settings.warmup_steps, 1))
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.teacher.update()

    def log_samples(self, batch: list[Prompt], groups: list[Responses]) -> float | None:
        """Write the responses of the step's first prompt. Returns the share of right ones, where answers are known."""
        texts = [
            [
                self.tokenizer.decode(row[mask], skip_special_tokens=True)
                for row, mask in zip(g.tokens, g.mask, strict=True)
            ]
            for g in groups
        ]
        first = batch[0].triplet
        sample = {"step": self.done, "id": first.id, "question": first.question, "answers": first.answers}
        self.run.append("samples.jsonl", sample | {"responses": texts[0]})
        scores = [
            found(text, prompt.triplet.answers)
            for prompt, group in zip(batch, texts, strict=True)
            for text in group
            if prompt.triplet.answers
        ]
        return statistics.fmean(scores) if scores else None

    def save(self) -> None:
        save_checkpoint(
            self.run.path, self.done, self.student, self.tokenizer, self.optimizer, self._average,
            self.config.keep_checkpoints,
        )  # fmt: skip

    def autocast(self) -> torch.autocast:
        """Matrix products in the compute dtype over float32 weights.

        Entered anew for each pass: autocast keeps cast copies of the weights until its block ends, and those made
        without gradient must not serve the student's forward.
        """
        dtype = getattr(torch, self.config.model.compute_dtype)
        return torch.autocast(self.device.type, dtype, enabled=dtype != torch.float32)
