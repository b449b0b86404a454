"""The Triton kernels, installed as `opsdl.kernels`: the two passes of the losses on a GPU.

forward.py     linear_moments: both products of every vocabulary tile, its moments, nothing else leaves the tile
backward.py    linear_gradient: tiles again, their gradient through a bounded workspace into dHidden and dWeight
tile.py        what both do with a tile: product, logits and gap, moments
configs.py     tile sizes by architecture and data type, and what the passes allocate

Nothing is imported here: transformers looks for a package named `kernels`, and in a checkout it finds and imports this
one.
"""
