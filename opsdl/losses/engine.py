"""What the driver asks of an engine: the arithmetic of a block of tokens, forward and backward."""

from __future__ import annotations

from typing import Protocol, runtime_checkable

from torch import Tensor

from opsdl.losses.call import Gradients
from opsdl.losses.values import Factors


class Engine(Protocol):
    """The arithmetic of one call on one device, made by `Class(call, count)` for `count` unmasked tokens.

    The driver hands it one block of tokens after the other; for each it calls `moments` and, where gradients are
    wanted, `prepare`, with a skip_tolerance `energy`, and `accumulate`. At the end it calls `gradients`.
    """

    block: int  # most tokens that a block may have
    panel: int  # blocks are cut to a multiple of so many tokens

    def moments(self, index_n: Tensor) -> tuple[Tensor, Tensor]:
        """Begin a block: compute both products, and of them only what is asked here.

        Args:
            index_n: Numbers of the block's tokens, int64.

        Returns:
            The moments of moments.py [7, k, n] for k parts of this rank's vocabulary, and logit, gap and slope (d logit
            / d raw logit) at the sampled tokens [3, n], 0 where this rank's head does not have the token. The logit is
            -inf and so is the gap where the token is padding; the slope only has to be there if the engine itself
            reads it again.
        """
        ...

    def prepare(self, stats: dict[str, Tensor], factors: Factors) -> None:
        """Learn what the block's gradient needs of the whole vocabulary.

        Args:
            stats: What `moments.statistics` found, [n] each.
            factors: The factors of each token's gradient, the loss's scale included.
        """
        ...

    def energy(self) -> Tensor:
        """Return the squared norm, or an estimate, of the gradient for the raw logits of each part and token, [s, n].

        The s parts are those that `accumulate` can leave out one by one; an engine that only leaves out whole tokens
        returns [1, n].
        """
        ...

    def accumulate(self, kept_sn: Tensor | None) -> None:
        """Add the block's gradients to the engine's sums.

        Args:
            kept_sn: bool, False for the parts of `energy` whose gradient is left out; None keeps all of them.
        """
        ...

    def gradients(self) -> Gradients:
        """Return the sums over all blocks, in float32 or wider, or already in `Call.grad_dtypes`.

        dWeight and dBias have the padding of the head too, filled with zeros.
        """
        ...


@runtime_checkable
class MixingEngine(Engine, Protocol):
    """An engine that also knows the divergences between the forward and the reverse KL (beta other than 1)."""

    def mix(self, beta: float, stats: dict[str, Tensor]) -> Tensor:
        """Take another divergence of the Jensen-Shannon family in the place of the reverse KL, for this block.

        `prepare` then prepares its gradient. The driver calls this between `moments` and `prepare`.

        Args:
            beta: Which divergence (values.py).
            stats: What `moments.statistics` found, [n] each.

        Returns:
            The divergence of each token, [n] nats.
        """
        ...
