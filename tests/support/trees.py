"""Random trees of segments, and their paths."""

from __future__ import annotations

import torch

from opsdl.prefix import Segment
from tests.support.models import VOCABULARY

TREES = {
    "document, questions, responses": (9, (4, (3,), (1,), (5,)), (2, (2,), (6,)), (3,)),
    "one segment": (7,),
    "a chain": (1, (1, (1, (4,)))),
}


def make_tree(lengths, seed=0):
    """lengths: (own length, subtrees...) in nested tuples."""
    generator = torch.Generator().manual_seed(seed)

    def grow(own, *below):
        return Segment(torch.randint(VOCABULARY, (own,), generator=generator), [grow(*child) for child in below])

    return grow(*lengths)


def paths(node, before=()):
    """Every segment, depth first, with its ancestors."""
    here = (*before, node.tokens)
    yield here
    for child in node.children:
        yield from paths(child, here)
