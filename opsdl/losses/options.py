"""The options of the public losses as types, for `typing.Unpack`: what overloads and modules take by name."""

from __future__ import annotations

from typing import TypedDict

import torch.distributed as dist
from torch import Tensor


class Settings(TypedDict, total=False):
    """The options that are no tensors, of all three losses; a module keeps them."""

    temperature: float
    softcap: float | None
    vocab_size: int | None
    reduction: str
    skip_tolerance: float | str | None
    vocab_group: dist.ProcessGroup | None
    backend: str


class KLSettings(Settings, total=False):
    beta: float
    clip: float | None


class PolicySettings(Settings, total=False):
    baseline: str | None


class TokenTensors(TypedDict, total=False):
    mask: Tensor | None
    token_weights: Tensor | None


class PairTensors(TokenTensors, total=False):
    student_bias: Tensor | None
    teacher_bias: Tensor | None


class KLOptions(KLSettings, PairTensors, total=False):
    tokens: Tensor | None


class PolicyOptions(PolicySettings, PairTensors, total=False):
    pass


class LogProbOptions(Settings, TokenTensors, total=False):
    bias: Tensor | None
