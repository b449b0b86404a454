"""A tree of segments in one stream: a document, questions about it, responses to each, every token computed once.

    document = Segment(document_ids, [Segment(question_ids, [Segment(response_ids), ...]), ...])
    hidden = tree_hidden(model, document)      # [L, H] of each segment, depth first

A segment sees all tokens of its ancestors and itself causally, so that each path from a root to a leaf is what a
sequence of its own would be; positions go on from the parent. In depth-first order the descendants of a segment are one
run of the stream, which attends to the segment's keys at once. A shared prefix with its responses is the tree of two
levels.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor
from transformers import PreTrainedModel

from opsdl.models import context_limit
from opsdl.prefix.adapter import last_hidden
from opsdl.prefix.layouts.tree import Span, TreeLayout


@dataclass(frozen=True)
class Segment:
    """Some tokens, and what follows them.

    Args:
        tokens: int64 [L], at least one, that follow the parent's.
        children: What follows these tokens, each in its own way.
    """

    tokens: Tensor
    children: Sequence[Segment] = ()


def tree_hidden(model: PreTrainedModel, roots: Segment | Sequence[Segment]) -> list[Tensor]:
    """Run trees of segments in one pass, with exact gradients (docs/design.md, "Shared prefix").

    Args:
        model: A causal language model with full attention in every layer.
        roots: One tree or several, which do not see each other.

    Returns:
        The hidden states [L, H] after the final norm of every segment, depth first.

    Raises:
        ValueError: An empty segment, another dtype than int64, or a path that is longer than the model's context.
    """
    hidden_LH, spans = stream_hidden(model, [roots] if isinstance(roots, Segment) else roots)
    return list(hidden_LH.split([span.end - span.start for span in spans]))


def stream_hidden(model: PreTrainedModel, roots: Sequence[Segment]) -> tuple[Tensor, list[Span]]:
    """Hidden states [L, H] of the whole stream, and where in it each segment is. Arguments as of `tree_hidden`."""
    stream = flatten(roots)
    limit = context_limit(model)
    longest = max(int(positions[-1]) + 1 for positions in stream.positions)
    if limit is not None and longest > limit:
        raise ValueError(f"roots: a path of {longest} tokens; expected at most the model's context of {limit}")
    tokens_L, positions_L = torch.cat(stream.tokens), torch.cat(stream.positions)
    layout = TreeLayout(stream.spans, tokens_L.device)
    return last_hidden(model, tokens_L[None], positions_L[None], layout)[0], stream.spans


@dataclass
class FlatTrees:
    """Trees as one stream: of each segment, depth first, its tokens [L], their positions [L], and where they are."""

    tokens: list[Tensor] = field(default_factory=list)
    positions: list[Tensor] = field(default_factory=list)
    spans: list[Span] = field(default_factory=list)


def flatten(roots: Sequence[Segment]) -> FlatTrees:
    """Put trees one after the other into a stream."""
    out = FlatTrees()
    end = 0
    for root in roots:
        end = _append(out, root, 0, end)
    return out


def _append(out: FlatTrees, node: Segment, position: int, start: int) -> int:
    """Append a segment and its descendants at `start`; returns their end."""
    if node.tokens.ndim != 1 or node.tokens.dtype != torch.int64 or not len(node.tokens):
        raise ValueError(f"segment: {node.tokens.dtype} {tuple(node.tokens.shape)}; expected int64 [L] with L >= 1")
    index, end = len(out.spans), start + len(node.tokens)
    below = position + len(node.tokens)
    out.tokens.append(node.tokens)
    out.positions.append(torch.arange(position, below, device=node.tokens.device))
    out.spans.append(Span(start, end, end))
    last = end
    for child in node.children:
        last = _append(out, child, below, last)
    out.spans[index] = Span(start, end, last)
    return last
