"""The losses on the CPU: a block of tokens goes through the operators of csrc/cpu/loss/.

Between them lie two numbers for every logit of the block, of 2 bytes with bf16 products and 4 with float32; the block
is as large as 1 KiB for every vocabulary entry and 36 MiB allow, for every block reads and writes the whole of dWeight.
With a skip_tolerance blocks are half as large, and the gradient that their tiles keep is put aside: several blocks then
share the products, and that reading and writing.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from opsdl.losses import moments
from opsdl.losses.call import Call, Gradients
from opsdl.losses.values import Factors, Value

PANEL, TILE_ENTRIES, STEP_TILES = 64, 128, 2  # of csrc/cpu/{common/gemm.h,loss/tile.h,loss/block.h}
SUM_BYTES = 16 << 20  # of the threads' sums of dHidden, with a skip_tolerance
GAP_SCALE, SQUARE0, SQUARE1, SQUARE2 = range(7, 11)  # fields after those of moments.py


class Kept(NamedTuple):
    """What a block keeps: the gradient of its logits step by step, [256, kept tokens of the step] each."""

    index_n: Tensor
    hidden_nH: Tensor
    grads: Tensor
    offsets: Tensor  # [steps + 1]
    which: Tensor  # place of the kept tokens among those of all blocks put aside, step by step
    skipped_nH: Tensor | None


class CpuEngine:
    """Engine of engine.py whose parts are tiles of the vocabulary; two tiles, a step, are skipped together."""

    panel = PANEL

    def __init__(self, call: Call, count: int) -> None:
        self.call, self.ops = call, torch.ops.opsdl
        hidden, second = call.hidden_NH, call.second
        sizes = [hidden.shape[1], *(() if second is None else (second.size,))]
        bf16 = hidden.dtype == torch.bfloat16 and self.ops.cpu_has_bf16() and all(size % 2 == 0 for size in sizes)
        self.operand = torch.bfloat16 if bf16 else torch.float32
        self.entries, size = call.head.weight.shape
        self.tiles = -(-self.entries // TILE_ENTRIES)
        self.stored = torch.float16 if bf16 else torch.float32
        largest = call.shards.largest
        budget = 1024 * largest + (36 << 20)
        token_bytes = 2 * self.stored.itemsize * largest + 4 * size * torch.get_num_threads()
        self.kept: list[Kept] = []
        if call.skip_tolerance > 0:
            budget //= 2
            self.kept_tokens = SUM_BYTES // (4 * size * torch.get_num_threads())
            self.kept_bytes = max(0, budget - SUM_BYTES)
        self.block = max(PANEL, budget // token_bytes // PANEL * PANEL)
        self.only_block = count <= self.block
        self._allocate(count)

    def _allocate(self, count: int) -> None:
        call, weight_VH = self.call, self.call.head.weight
        columns = -(-min(self.block, count) // PANEL) * PANEL
        length = [self.tiles * TILE_ENTRIES * columns if any(call.wanted) else 0]
        self.stored_e, self.stored_gap = (self.ops.empty_huge(length, self.stored) for _ in range(2))
        hidden_dtype = call.grad_dtypes[0] if call.shards.group is None else torch.float32
        self.grad_hidden = torch.zeros(call.hidden_NH.shape, dtype=hidden_dtype) if call.wanted.hidden else None
        self.grad_weight: Tensor | None = None
        if call.wanted.weight:
            direct = self.only_block and weight_VH.dtype == self.operand == torch.bfloat16
            dtype = torch.bfloat16 if direct else torch.float32
            self.grad_weight = self.ops.empty_huge(list(call.weight_VH.shape), dtype)
            self.grad_weight[self.entries if count else 0 :] = 0
        self.grad_bias = torch.zeros(len(call.weight_VH)) if call.wanted.bias else None
        self.accumulate_weight = False
        self.mean_entry_kH: Tensor | None = None

    def moments(self, index_n: Tensor) -> tuple[Tensor, Tensor]:
        """Implements `Engine.moments`; more fields than its seven stay here."""
        call, head = self.call, self.call.head
        self.index_n, self.hidden_nH = index_n, call.hidden_NH[index_n].to(self.operand).contiguous()
        self.token_n = call.local_tokens(index_n)
        bias = None if head.bias is None else head.bias.float()
        keep = any(call.wanted)
        self.parts_fkn, self.picked_3n = self.ops.block_moments(
            self.hidden_nH, head.weight, bias, *self._second(index_n), self.token_n, head.temperature,
            head.softcap or 0.0, self.stored_e if keep else None, self.stored_gap if keep and call.second else None,
        )  # fmt: skip
        return self.parts_fkn[:7], self.picked_3n.clone()

    def _second(self, index_n: Tensor) -> tuple[Tensor | None, ...]:
        """Return hidden, low part, weight, bias and difference flags of the second product."""
        if self.call.second is None:
            return (None,) * 5
        second = self.call.second.product(index_n)
        hidden_nK, low_nK = second.hidden_nK, second.low_nK
        if self.operand == torch.float32 and low_nK is not None:
            hidden_nK, low_nK = hidden_nK.float() + low_nK.float(), None
        bias = None if second.bias_V is None else second.bias_V.float()
        return hidden_nK.to(self.operand), low_nK, second.weight_VK, bias, second.difference_n.float()

    def prepare(self, stats: dict[str, Tensor], factors: Factors) -> None:
        """Implements `Engine.prepare`: computes factors of the stored numbers, for each tile and token."""
        tops, gaps = self.parts_fkn[moments.MAX], self.parts_fkn[moments.GAP]
        base_kn = torch.where(tops > -torch.inf, ((tops - stats["top"]) - stats["log_sum"]).exp(), 0.0)
        base_kn /= self.call.head.temperature
        self.on_gap_kn = base_kn * factors.on_gap
        self.on_e_kn = self.on_gap_kn * (gaps - stats["mean_gap"]) + base_kn * factors.on_prob
        self.has_token = self.call.value is not Value.KL  # there tokens are for the statistics only
        if self.has_token:
            # The gradient at the token itself, p A - A, is as exact as p: not put together from what is stored.
            p_n = ((self.picked_3n[0] - stats["top"]) - stats["log_sum"]).exp()
            self.without_token_n = p_n * factors.on_prob * self.picked_3n[2]
            self.at_token_n = self.without_token_n + factors.on_token * self.picked_3n[2]

    def energy(self) -> Tensor:
        """Implements `Engine.energy` for every step or, with a soft cap, for whole tokens, from the moments."""
        square0, square1, square2 = self.parts_fkn[SQUARE0:]
        energy_kn = self.on_gap_kn.square() * square2 + 2 * self.on_gap_kn * self.on_e_kn * square1
        energy_kn += self.on_e_kn.square() * square0
        if self.has_token:
            self._add_at_tokens(energy_kn, self.at_token_n.square() - self.without_token_n.square())
        # A soft cap keeps tiles from having a mean: see _skipped_hidden. There whole tokens are skipped.
        if self.call.head.softcap is not None:
            return energy_kn.sum(0, keepdim=True)
        whole_steps_kn = torch.nn.functional.pad(energy_kn, (0, 0, 0, -self.tiles % STEP_TILES))
        return whole_steps_kn.unflatten(0, (-1, STEP_TILES)).sum(1)

    def accumulate(self, kept_sn: Tensor | None) -> None:
        """Implements `Engine.accumulate`."""
        if kept_sn is not None:
            return self._select(kept_sn)
        grad_nH = torch.empty(self.hidden_nH.shape) if self.call.wanted.hidden else None
        self.ops.block_gradient(
            self.hidden_nH, self.call.head.weight, *self._stored(), grad_nH, self.grad_weight, self.grad_bias,
            self.accumulate_weight,
        )  # fmt: skip
        self.accumulate_weight = True
        if grad_nH is not None and self.grad_hidden is not None:
            self.grad_hidden[self.index_n] = grad_nH.to(self.grad_hidden.dtype)

    def _stored(self) -> tuple[Tensor | None, ...]:
        """Return what block_moments stored, its factors, and the gradient at the sampled tokens."""
        tokens = (self.token_n, self.at_token_n) if self.has_token else (None, None)
        if self.call.second is None:
            return self.stored_e, None, _padded(self.on_e_kn), None, *tokens
        on_gap_kn = _padded(self.on_gap_kn * self.parts_fkn[GAP_SCALE])
        return self.stored_e, self.stored_gap, _padded(self.on_e_kn), on_gap_kn, *tokens

    def _select(self, kept_sn: Tensor) -> None:
        """Put the gradient of the kept steps aside, until there is room for no more."""
        kept_sn = kept_sn.expand(-(-self.tiles // STEP_TILES), -1).contiguous()
        offsets = torch.cat([kept_sn.new_zeros(1, dtype=torch.int64), kept_sn.sum(1).cumsum(0)])
        skipped_nH = None
        if self.call.wanted.hidden:
            skipped_nH = torch.zeros(self.hidden_nH.shape)
            if self.call.head.softcap is None:
                skipped_nH = self._skipped_hidden(kept_sn.repeat_interleave(STEP_TILES, 0)[: self.tiles])
        held = sum(kept.grads.nbytes for kept in self.kept)
        tokens_held = sum(len(kept.index_n) for kept in self.kept)
        more = int(offsets[-1]) * STEP_TILES * TILE_ENTRIES * self.operand.itemsize
        if self.kept and (held + more > self.kept_bytes or tokens_held + len(self.index_n) > self.kept_tokens):
            self._flush()
            tokens_held = 0
        grads = self.ops.select_gradient(*self._stored(), kept_sn, offsets, self.entries)
        which = kept_sn.nonzero()[:, 1] + tokens_held
        self.kept.append(Kept(self.index_n, self.hidden_nH, grads, offsets, which, skipped_nH))

    def _flush(self) -> None:
        """Compute the products with what `_select` put aside."""
        if not self.kept:
            return
        hidden_nH = torch.cat([kept.hidden_nH for kept in self.kept])
        grad_nH = torch.empty(hidden_nH.shape) if self.call.wanted.hidden else None
        self.ops.selected_gradient(
            hidden_nH, self.call.head.weight, [kept.grads for kept in self.kept], [kept.offsets for kept in self.kept],
            [kept.which for kept in self.kept], grad_nH, self.grad_weight, self.grad_bias, self.accumulate_weight,
        )  # fmt: skip
        self.accumulate_weight = True
        if grad_nH is not None and self.grad_hidden is not None:
            grad_nH += torch.cat([kept.skipped_nH for kept in self.kept if kept.skipped_nH is not None])
            self.grad_hidden[torch.cat([kept.index_n for kept in self.kept])] = grad_nH.to(self.grad_hidden.dtype)
        self.kept = []

    def _skipped_hidden(self, kept_kn: Tensor) -> Tensor:
        """Return what the skipped tiles add to dHidden if every entry were the mean of its tile's, [n, H].

        Alone each is negligible, but they are many and the entries of a head have a common part: without this, dHidden
        of real models is off by 1.7 % at 91 % skipped, with it by 0.9 %. The sum of a tile's gradient is on_e SUM,
        since gaps are centred.
        """
        if self.mean_entry_kH is None:
            self.mean_entry_kH = torch.empty(self.tiles, self.call.head.weight.shape[1])
            for tile, mean_H in zip(self.call.head.weight.split(TILE_ENTRIES), self.mean_entry_kH, strict=True):
                torch.mean(tile, 0, dtype=torch.float32, out=mean_H)
        sum_kn = self.on_e_kn * self.parts_fkn[moments.SUM]
        if self.has_token:
            self._add_at_tokens(sum_kn, self.at_token_n - self.without_token_n)
        return sum_kn.masked_fill(kept_kn, 0.0).T @ self.mean_entry_kH

    def _add_at_tokens(self, x_kn: Tensor, more_n: Tensor) -> None:
        """Add to the tile that holds each token, if this rank's head does."""
        assert self.token_n is not None
        here_n = (self.token_n >= 0) & (self.token_n < self.entries)
        tile_n = torch.where(here_n, self.token_n, 0) // TILE_ENTRIES
        x_kn.scatter_add_(0, tile_n[None], torch.where(here_n, more_n, 0.0)[None])

    def gradients(self) -> Gradients:
        """Implements `Engine.gradients`."""
        self._flush()
        return Gradients(self.grad_hidden, self.grad_weight, self.grad_bias)


def _padded(x_kn: Tensor) -> Tensor:
    """Add zeros up to a whole number of panels."""
    return torch.nn.functional.pad(x_kn, (0, -x_kn.shape[1] % PANEL)).contiguous()
