"""The Triton kernels, installed as `opsdl.kernels`: the two passes of the losses on a GPU.

forward.py     linear_moments: both products of every vocabulary tile, its moments, nothing else leaves the tile
backward.py    linear_gradient: tiles again, their gradient through a bounded workspace into dHidden and dWeight
tile.py        what both do with a tile: product, logits and gap, moments
operands.py    what both read
configs.py     tile sizes by architecture and data type, and what the passes allocate

A suffix says the shape of a tensor: x_NH is [N, H], of

    M    hidden states that are given          N, n   tokens that are computed, all or those of a tile or chunk
    V, v entries of the vocabulary, likewise   H, K   hidden units of the student, of the teacher
    S    parts that the vocabulary is split into

but in the product of two matrices, whose own M, N and K stand beside it.

Nothing is imported here: transformers looks for a package named `kernels`, and in a checkout it finds and imports this
one.
"""
