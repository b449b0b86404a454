"""Shared prefixes: one prefill serves rollout, student forward and backward, and teacher (docs/design.md).

The modules look one way; read them in this order:

    responses                                   what a response is, and what it feeds to the model
    attention/{operators,partial,states,flash}  the arithmetic: partial attention states and their merge
    memory/{blocks,pool,cache}                  where keys and values lie: tensors, or blocks of a pool
    layouts/{base,stream,cached,tree,decode}    who attends to whom
    adapter                                     how transformers models come here
    prefilling, tree, hidden, generation          what users call

Names of tensors end in their shape, and docstrings use the same letters:

    N tokens of a packed stream    R responses that decode together    S states to merge, or sequences of a stream
    B batch                        G responses of one prefix           T tokens of a response, the longest of a group
    L tokens of a sequence         P tokens of a prefix                H hidden size (heads, where a D follows)
    Hq, Hkv heads of queries and of keys                               D numbers of a head
    V vocabulary                   E ends (token ids)                  A responses that still grow
"""

from opsdl.prefix.adapter import attach, detach
from opsdl.prefix.attention import flash  # noqa: F401  registers what runs on CUDA
from opsdl.prefix.generation import generate
from opsdl.prefix.hidden import packed_hidden, response_hidden
from opsdl.prefix.memory.blocks import FreedSequenceError, OutOfBlocksError
from opsdl.prefix.memory.cache import PrefixCache, StalePrefixError
from opsdl.prefix.memory.pool import KeyValuePool
from opsdl.prefix.memory.transformers_cache import as_transformers
from opsdl.prefix.prefilling import extend, prefill
from opsdl.prefix.responses import Responses
from opsdl.prefix.tree import Segment, tree_hidden

__all__ = [
    "FreedSequenceError",
    "KeyValuePool",
    "OutOfBlocksError",
    "PrefixCache",
    "Responses",
    "Segment",
    "StalePrefixError",
    "as_transformers",
    "attach",
    "detach",
    "extend",
    "generate",
    "packed_hidden",
    "prefill",
    "response_hidden",
    "tree_hidden",
]
