"""A model as an objective may touch it: hidden states of responses under a context, and the head that reads them.

Precision, shared prefixes and the model's own attention stay behind it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal, NamedTuple

import torch
from torch import Tensor

from opsdl.data.prompts import Prompt, common_beginning
from opsdl.models import checkpoints_activations
from opsdl.prefix import PrefixCache, extend, packed_hidden, prefill

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from opsdl.config import RunConfig
    from opsdl.training.groups import Rollout
    from opsdl.training.monitor import Clock

Context = Literal["long", "short"]


class Head(NamedTuple):
    """What turns hidden states into logits: softcap * tanh((hidden weight^T + bias) / softcap)."""

    weight: Tensor  # [V, H]
    bias: Tensor | None  # [V]
    softcap: float | None


def context_ids(prompt: Prompt, context: Context) -> Tensor:
    """Return the token ids of a prompt under one of its contexts."""
    return prompt.long_ids if context == "long" else prompt.short_ids


class TeacherHead(NamedTuple):
    """What the losses take of a teacher's head: nothing where it is the student's own, for then the gap is exact."""

    weight: Tensor | None
    bias: Tensor | None


class Policy:
    """A model, and how it is run.

    Args:
        model: a causal LM.
        config: gives the precisions and the gradient through prefixes.
        name: the part of a step that its time is counted under.
        clock: counts that time.
    """

    def __init__(self, model: PreTrainedModel, config: RunConfig, name: str, clock: Clock):
        self.model, self.name, self.clock = model, name, clock
        self.prefix_gradient = config.prefix_gradient
        self.compute_dtype: torch.dtype = getattr(torch, config.model.compute_dtype)
        self.loss_dtype = _loss_dtype(config.model.loss_dtype, self.compute_dtype, model.device)

    @property
    def head(self) -> Head:
        """The weights of the LM head, as they are now."""
        head = self.model.get_output_embeddings()
        return Head(head.weight, head.bias, getattr(self.model.config, "final_logit_softcapping", None))

    def head_beside(self, student: Policy) -> TeacherHead:
        """Return the head of this policy as the teacher of `student`."""
        head = self.head
        return TeacherHead(None, None) if head.weight is student.head.weight else TeacherHead(head.weight, head.bias)

    def prefill(self, prompts: Sequence[Prompt]) -> list[PrefixCache]:
        """Run the long context of prompts that share it once, and what follows it once for each.

        The pass keeps its graph where the gradient is to go through the prefix, so that the rollout's own prefill also
        serves the student's backward; activation checkpointing trades that for memory.

        Returns:
            A cache for each prompt.
        """
        gradient = self.prefix_gradient == "exact" and not checkpoints_activations(self.model)
        with self.autocast():
            if len(prompts) == 1:
                return [prefill(self.model, prompts[0].long_ids, gradient=gradient)]
            document = prefill(self.model, common_beginning(prompts), gradient=gradient)
            return extend(self.model, document, [prompt.long_ids for prompt in prompts], gradient=gradient)

    def hidden(self, rollouts: Sequence[Rollout], context: Context, *, gradient: bool) -> Tensor:
        """Run all responses of some rollouts under one of their contexts, in one pass.

        With gradient under the long context the prefixes that the rollouts hold are taken from them, so that a graph
        lives no longer than its backward.

        Returns:
            [N, H]: for every response token, in the order of the rollouts, the last hidden state that predicts it.
        """
        prefixes = [rollout.take_prefix() for rollout in rollouts] if gradient and context == "long" else []
        kept = [prefix for prefix in prefixes if prefix is not None and self._serves(prefix)]
        with torch.set_grad_enabled(gradient), self.autocast():
            hidden_NH = packed_hidden(
                self.model,
                [context_ids(rollout.prompt, context) for rollout in rollouts],
                [rollout.responses for rollout in rollouts],
                prefix_gradient=self.prefix_gradient if gradient else "exact",
                prefix=kept if len(kept) == len(rollouts) else None,
            )
        self.clock.lap(self.name)
        return hidden_NH

    def _serves(self, prefix: PrefixCache) -> bool:
        return self.prefix_gradient == "detached" or prefix.has_gradient

    def autocast(self) -> torch.autocast:
        """Return a context in which matrix products are in the compute dtype, over float32 weights.

        It is entered anew for each pass: autocast keeps cast copies of the weights until its block ends, and those made
        without gradient must not serve the student's forward.
        """
        return _autocast(self.model.device, self.compute_dtype)

    def loss_autocast(self) -> torch.autocast:
        """Return a context in which the losses take their operands in the loss dtype."""
        return _autocast(self.model.device, self.loss_dtype)


def _autocast(device: torch.device, dtype: torch.dtype) -> torch.autocast:
    return torch.autocast(device.type, dtype, enabled=dtype != torch.float32)


def _loss_dtype(name: str, compute_dtype: torch.dtype, device: torch.device) -> torch.dtype:
    if name != "auto":
        return getattr(torch, name)
    return compute_dtype if device.type == "cuda" else torch.float32
