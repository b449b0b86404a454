"""Optimizer steps of the loop against the same steps in plain torch and transformers, in float64.

The other side is written from the paper: an ordinary forward of prompt and response for every response,
log-probabilities from whole logits, the mean over all response tokens, AdamW. It calls no code of this library; the
responses are given.
"""

import copy
from dataclasses import replace

import pytest
import torch

from opsdl.config import Chosen, OptimizerConfig, TeacherConfig
from opsdl.prefix import Responses
from opsdl.training.optimizer import Optimizer
from tests.support.training import RecordedEngine, make_loop

STEPS, LR, WARMUP, DECAY, BETAS, WEIGHT_DECAY = 3, 2e-3, 2, 0.9, (0.8, 0.9), 0.1
ROUNDING = 1e-6  # transformers' norms and rotary embedding are float32 inside
LENGTHS = [[3, 5, 1], [4, 2, 5], [2, 2, 4], [5, 1, 3], [1, 4, 4], [5, 5, 2]]


class RecordingOptimizer(Optimizer):
    """Keeps each step's gradient, as it is before the limit on its norm."""

    def clip(self):
        self.seen = [parameter.grad.clone() for parameter in self.parameters]
        return super().clip()


def log_probs(model, context_ids, tokens):
    """[t, V]: the model's distribution at each response token, from an ordinary forward."""
    ids = torch.cat([context_ids, tokens])[None]
    return model(ids).logits[0, len(context_ids) - 1 : -1].log_softmax(-1)


def loss_of(objective, log_p, log_q, tokens):
    """The sum over one response, by the formulas of the paper."""
    kl_t = (log_p.exp() * (log_p - log_q)).sum(-1)
    if objective.name == "full":
        return kl_t.sum()
    at = tokens[:, None]
    advantage = (log_q.gather(1, at) - log_p.gather(1, at))[:, 0]
    if objective.options.get("baseline") == "kl":
        advantage = advantage + kl_t
    return -(advantage.detach() * log_p.gather(1, at)[:, 0]).sum()


@pytest.mark.parametrize("max_grad_norm", [1e6, 0.05], ids=["free", "clipped"])
@pytest.mark.parametrize("teacher_kind", ["frozen", "live", "ema"])
@pytest.mark.parametrize(
    "objective", [Chosen("full"), Chosen("policy"), Chosen("policy", {"baseline": "kl"})], ids=["full", "policy", "kl"]
)
def test_steps_equal_plain_torch(objective, teacher_kind, max_grad_norm, config):
    settings = OptimizerConfig(LR, WARMUP, WEIGHT_DECAY, *BETAS, max_grad_norm)
    loop = make_loop(
        replace(
            config,
            loss=objective,
            teacher=TeacherConfig(teacher_kind, DECAY),
            optimizer=settings,
            model=replace(config.model, compute_dtype="float32"),
        )
    )
    loop.student.model.double(), loop.teacher.model.double()
    loop.optimizer = RecordingOptimizer(loop.student.model.parameters(), settings)
    plain = copy.deepcopy(loop.student.model).eval()
    teacher = plain if teacher_kind == "live" else copy.deepcopy(plain)
    adamw = torch.optim.AdamW(plain.parameters(), lr=LR, betas=BETAS, weight_decay=WEIGHT_DECAY)
    vocabulary = plain.config.vocab_size
    generator = torch.Generator().manual_seed(5)
    groups = [Responses(torch.randint(vocabulary, (3, 5), generator=generator),
                        torch.arange(5) < torch.tensor(lengths)[:, None]) for lengths in LENGTHS]  # fmt: skip
    loop.engine = RecordedEngine([groups[2 * step : 2 * step + 2] for step in range(STEPS)])
    for step in range(STEPS):
        metrics = loop.step()
        total, kl, count = 0.0, 0.0, 0
        for prompt, group, lengths in zip(
            loop.prompts.batch(step), groups[2 * step :], LENGTHS[2 * step : 2 * step + 2], strict=False
        ):
            for tokens_T, length in zip(group.tokens, lengths, strict=True):
                tokens = tokens_T[:length]
                log_p = log_probs(plain, prompt.long_ids, tokens)
                with torch.no_grad():
                    log_q = log_probs(teacher, prompt.short_ids, tokens)
                total = total + loss_of(objective, log_p, log_q, tokens)
                kl, count = kl + float((log_p.exp() * (log_p - log_q)).sum()), count + length
        (total / count).backward()
        for name_and_parameter, seen in zip(plain.named_parameters(), loop.optimizer.seen, strict=True):
            name, parameter = name_and_parameter
            assert (parameter.grad - seen).norm() <= ROUNDING * parameter.grad.norm(), (step, name)
        norm = torch.nn.utils.clip_grad_norm_(plain.parameters(), max_grad_norm)
        adamw.param_groups[0]["lr"] = LR * min(1, (step + 1) / WARMUP)
        adamw.step()
        adamw.zero_grad()
        if teacher_kind == "ema":
            with torch.no_grad():
                for average, current in zip(teacher.parameters(), plain.parameters(), strict=True):
                    average.copy_(DECAY * average + (1 - DECAY) * current)
        assert metrics["loss"] == pytest.approx(float(total) / count, rel=ROUNDING)
        assert metrics["kl"] == pytest.approx(kl / count, rel=ROUNDING)
        assert metrics["grad_norm"] == pytest.approx(float(norm), rel=ROUNDING)
        assert metrics["lr"] == adamw.param_groups[0]["lr"]
    for (name, parameter), mine in zip(plain.named_parameters(), loop.student.model.parameters(), strict=True):
        assert (parameter - mine).norm() <= ROUNDING * parameter.norm(), name
    assert loop.engine.synced == [0, 1, 2] and len(set(loop.engine.seeds)) == STEPS
