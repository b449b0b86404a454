"""Shared prefixes: one prefill serves rollout, student forward and backward, and teacher (design, "Shared prefix").

Read in this order: rows (what a response feeds), layout and decode (who attends to whom), partial and rows_attention
(the arithmetic), attention (how transformers models come here), tree, pool and cache, generate, hidden.
"""

from opsdl.prefix.adapter import attach, detach
from opsdl.prefix.attention import flash  # noqa: F401  registers what runs on CUDA
from opsdl.prefix.generate import generate
from opsdl.prefix.hidden import response_hidden
from opsdl.prefix.memory.cache import PrefixCache, StalePrefixError, extend, prefill
from opsdl.prefix.memory.pool import FreedSequence, KeyValuePool, OutOfBlocks
from opsdl.prefix.memory.transformers_cache import as_transformers
from opsdl.prefix.responses import Responses
from opsdl.prefix.tree import Segment, tree_hidden

__all__ = [
    "FreedSequence", "KeyValuePool", "OutOfBlocks", "PrefixCache", "Responses", "Segment", "StalePrefixError",
    "as_transformers", "attach", "detach", "extend", "generate", "prefill", "response_hidden", "tree_hidden",
]  # fmt: skip
