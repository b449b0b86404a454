"""A tree of segments in one stream: a document, questions about it, responses to each, every token computed once.

    document = Segment(document_ids, [Segment(question_ids, [Segment(response_ids), ...]), ...])
    hidden = tree_hidden(model, document)      # [L, H] of each segment, depth first

A segment sees all tokens of its ancestors and itself causally, so that each path from a root to a leaf is what a row of
its own would be; positions go on from the parent. In depth-first order the descendants of a segment are one run of the
stream, which attends to the segment's keys at once. A shared prefix with its responses is the tree of two levels.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel

from opsdl.prefix.adapter import last_hidden
from opsdl.prefix.attention import partial

ALONE = 256  # segments of so many tokens attend to themselves one by one; shorter ones together, padded


@dataclass(frozen=True)
class Segment:
    """Tokens [L] int64, at least one, that follow their parent's, and what follows them."""

    tokens: Tensor
    children: Sequence[Segment] = ()


def tree_hidden(model: PreTrainedModel, roots: Segment | Sequence[Segment]) -> list[Tensor]:
    """Last hidden states [L, H] of every segment, depth first, with exact gradients, in one pass.

    Raises ValueError for empty segments, other dtypes, or a path that is longer than the model's context.
    """
    segments, spans, positions = [], [], []
    for root in [roots] if isinstance(roots, Segment) else roots:
        _flatten(root, 0, segments, spans, positions)
    limit = getattr(model.config, "max_position_embeddings", None)
    longest = max(int(x[-1]) + 1 for x in positions)
    if limit is not None and longest > limit:
        raise ValueError(f"roots: a path of {longest} tokens; expected at most the model's context of {limit}")
    layout = TreeLayout(spans, segments[0].device)
    hidden_1LH = last_hidden(model, torch.cat(segments)[None], torch.cat(positions)[None], layout)
    return list(hidden_1LH[0].split([len(tokens) for tokens in segments]))


def _flatten(node: Segment, position: int, segments: list, spans: list, positions: list) -> None:
    if node.tokens.ndim != 1 or node.tokens.dtype != torch.int64 or not len(node.tokens):
        raise ValueError(f"segment: {node.tokens.dtype} {tuple(node.tokens.shape)}; expected int64 [L] with L >= 1")
    index, start = len(spans), spans[-1][1] if spans else 0
    end = start + len(node.tokens)
    segments.append(node.tokens)
    spans.append((start, end, end))
    positions.append(torch.arange(position, position + len(node.tokens), device=node.tokens.device))
    for child in node.children:
        _flatten(child, position + len(node.tokens), segments, spans, positions)
    spans[index] = (start, end, spans[-1][1])


class TreeLayout:
    """spans: of each segment, in the order of the stream, its first token, its end and that of its descendants."""

    def __init__(self, spans: list[tuple[int, int, int]], device: torch.device):
        self.inner = [(start, end, last) for start, end, last in spans if last > end]
        self.alone = [(start, end) for start, end, _ in spans if end - start >= ALONE]
        short = [(start, end) for start, end, _ in spans if end - start < ALONE]
        self.slots_ST = self.mask_ST = None  # of the short ones: places in the stream, and which of them count
        if short:
            starts, lengths = torch.tensor([(start, end - start) for start, end in short], device=device).T
            steps = torch.arange(int(lengths.max()), device=device)
            self.mask_ST = steps < lengths[:, None]
            self.slots_ST = torch.where(self.mask_ST, starts[:, None] + steps, 0)

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
        return TreeAttention.apply(query, key, value, self, scale)

    def pad(self, x_1HL: Tensor) -> Tensor:
        """[1, H, L, ...] -> [S, H, T, ...] of the short segments; a slot that does not count holds the first token."""
        return x_1HL[0][:, self.slots_ST].transpose(0, 1)

    def put(self, out_1HL: Tensor, padded_SHT: Tensor) -> None:
        """Write [S, H, T, ...] back to where `pad` took it from."""
        out_1HL[0][:, self.slots_ST[self.mask_ST]] = padded_SHT.transpose(0, 1)[:, self.mask_ST].to(out_1HL.dtype)


class TreeAttention(torch.autograd.Function):
    """Each segment over itself, causally, and over its ancestors; states and sums in float32 at least.

    query [1, Hq, L, D], key and value [1, Hkv, L, D].
    """

    @staticmethod
    def forward(ctx, query, key, value, layout: TreeLayout, scale: float):
        wide = torch.float64 if query.dtype == torch.float64 else torch.float32
        out, lse = query.new_empty(query.shape, dtype=wide), query.new_empty(query.shape[:3], dtype=wide)
        for start, end in layout.alone:
            own = (x[:, :, start:end] for x in (query, key, value))
            out[:, :, start:end], lse[:, :, start:end] = partial.attend(*own, scale, causal=True)
        if layout.slots_ST is not None:
            states = partial.attend(*(layout.pad(x) for x in (query, key, value)), scale, causal=True)
            layout.put(out, states[0]), layout.put(lse, states[1])
        for start, end, last in layout.inner:
            of_segment = (x[:, :, start:end] for x in (key, value))
            state = partial.attend(query[:, :, end:last], *of_segment, scale, causal=False)
            merged = partial.merge(out[:, :, end:last], lse[:, :, end:last], *state)
            out[:, :, end:last], lse[:, :, end:last] = merged
        out = out.to(query.dtype)  # what the next layer keeps anyway
        ctx.save_for_backward(query, key, value, out, lse)
        ctx.layout, ctx.scale = layout, scale
        return out

    @staticmethod
    def backward(ctx, grad_out):
        query, key, value, out, lse = ctx.saved_tensors
        layout, scale = ctx.layout, ctx.scale
        grads = [x.new_zeros(x.shape, dtype=lse.dtype) for x in (query, key, value)]
        inputs = grad_out, query, key, value, out, lse
        for start, end in layout.alone:
            own = partial.attend_backward(*(x[:, :, start:end] for x in inputs), scale, causal=True)
            for grad, x in zip(grads, own, strict=True):
                grad[:, :, start:end] = x
        if layout.slots_ST is not None:
            *padded, lse_SHT = (layout.pad(x) for x in inputs)
            # Slots that do not count get lse = inf, so their probabilities are exactly 0.
            lse_SHT = lse_SHT.masked_fill(~layout.mask_ST[:, None], torch.inf)
            for grad, x in zip(grads, partial.attend_backward(*padded, lse_SHT, scale, causal=True), strict=True):
                layout.put(grad, x)
        for start, end, last in layout.inner:
            below, above = slice(end, last), slice(start, end)
            parts = [x[:, :, above if x is key or x is value else below] for x in inputs]
            of_part = partial.attend_backward(*parts, scale, causal=False)
            for grad, x, where in zip(grads, of_part, (below, above, above), strict=True):
                grad[:, :, where] += x
        return *(x.to(query.dtype) for x in grads), None, None
