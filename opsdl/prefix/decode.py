"""The layout of decoding: rows that grow by a token a step, over cached prefixes."""

from __future__ import annotations

import torch
from torch import Tensor

from opsdl.prefix import partial
from opsdl.prefix.rows import KeyValue


class DecodeLayout:
    """Rows of one or more cached prefixes that all grow by one token a step; each prefix is read once a step.

    prefixes: for each prefix its layers' keys and values, and how many consecutive rows are its own.
    """

    def __init__(self, prefixes: list[tuple[dict[int, KeyValue], int]], max_steps: int):
        self.prefixes = prefixes
        self.max_steps = max_steps
        self.own: dict[int, KeyValue] = {}  # [R, Hkv, max_steps, D] each
        self.held: dict[int, int] = {}  # tokens that each row holds in that layer

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
        out_own, lse_own = partial.attend(query, *self._append(layer, key, value), scale, causal=False)
        outs, lses = [], []
        for group, (layers, _) in zip(query.split([count for _, count in self.prefixes]), self.prefixes, strict=True):
            # The group's rows become the queries of one batch over its one prefix.
            out, lse = partial.attend(group.transpose(0, 2), *layers[layer], scale, causal=False)
            outs.append(out.transpose(0, 2))
            lses.append(lse[..., None].transpose(0, 2)[..., 0])
        out, _ = partial.merge(torch.cat(outs), torch.cat(lses), out_own, lse_own)
        return out.to(query.dtype)

    def keep(self, rows_R: Tensor) -> None:
        """Drop the rows that are False in `rows_R` [R]."""
        counts = [int(part.sum()) for part in rows_R.split([count for _, count in self.prefixes])]
        self.prefixes = [(layers, count) for (layers, _), count in zip(self.prefixes, counts, strict=True) if count]
        self.own = {layer: (key[rows_R], value[rows_R]) for layer, (key, value) in self.own.items()}

    def _append(self, layer: int, key: Tensor, value: Tensor) -> KeyValue:
        held = self.held.get(layer, 0)
        if not held:
            shape = (key.shape[0], key.shape[1], self.max_steps, key.shape[3])
            self.own[layer] = (key.new_empty(shape), value.new_empty(shape))
        own_key, own_value = self.own[layer]
        own_key[:, :, held], own_value[:, :, held] = key[:, :, 0], value[:, :, 0]
        self.held[layer] = held + 1
        return own_key[:, :, : held + 1], own_value[:, :, : held + 1]
