"""The peers: each function imports its peer and returns a loss, Inputs -> mean over the tokens.

A peer that is not installed raises ImportError here, and the tables say so. All of them get one head for student and
teacher, the teacher's use of it detached, and their defaults where the function's name does not say otherwise.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from bench.inputs import Inputs

Loss = Callable[[Inputs], Tensor]


def plain() -> Loss:
    """The formula as one writes it: logits in the input dtype, softmax in float32."""

    def loss(x: Inputs) -> Tensor:
        return _formula(x.hidden_NH, x.weight_VH, x.teacher_NH)

    return loss


def plain_compiled() -> Loss:
    formula = torch.compile(_formula)

    def loss(x: Inputs) -> Tensor:
        return formula(x.hidden_NH, x.weight_VH, x.teacher_NH)

    return loss


def liger_eager() -> Loss:
    return _liger(compiled=False)


def liger_compiled() -> Loss:
    """Liger's default."""
    return _liger(compiled=True)


def trl_default() -> Loss:
    return _trl(token_tile=4096, vocabulary_tile=32768)


def trl_small_tiles() -> Loss:
    """Tiles that need less memory than TRL's own, and are faster on a CPU."""
    return _trl(token_tile=1024, vocabulary_tile=4096)


def cut_cross_entropy() -> Loss:
    """Another loss, for scale: cross-entropy of one model, by the one implementation of CCE that runs on a CPU."""
    from cut_cross_entropy import linear_cross_entropy

    def loss(x: Inputs) -> Tensor:
        return linear_cross_entropy(x.hidden_NH, x.weight_VH, x.tokens_N, impl="torch_compile")

    return loss


def _formula(hidden_NH: Tensor, weight_VH: Tensor, teacher_NH: Tensor) -> Tensor:
    log_p_NV = (hidden_NH @ weight_VH.T).float().log_softmax(-1)
    with torch.no_grad():
        log_q_NV = (teacher_NH @ weight_VH.T).float().log_softmax(-1)
    return (log_p_NV.exp() * (log_p_NV - log_q_NV)).sum(-1).mean()


def _liger(compiled: bool) -> Loss:
    """beta=1 is reverse KL; the default weights would mix in cross-entropy."""
    from liger_kernel.chunked_loss import LigerFusedLinearJSDLoss

    jsd = LigerFusedLinearJSDLoss(weight_hard_loss=0.0, weight_soft_loss=1.0, beta=1.0, compiled=compiled)

    def loss(x: Inputs) -> Tensor:
        return jsd(x.hidden_NH, x.weight_VH, x.teacher_NH, x.weight_VH.detach(), x.tokens_N)

    return loss


def _trl(token_tile: int, vocabulary_tile: int) -> Loss:
    from trl.kernels import chunked_divergence as trl

    def loss(x: Inputs) -> Tensor:
        # Module constants, which the backward reads again: set for every step, so that the two tilings can take turns.
        trl.TOKEN_CHUNK_SIZE, trl.VOCAB_CHUNK_SIZE = token_tile, vocabulary_tile
        divergence_N, _ = trl.ChunkedDivergenceFunction.apply(
            x.hidden_NH, x.weight_VH, None, x.teacher_NH, x.weight_VH.detach(), None, 1.0
        )
        return divergence_N.mean()

    return loss
