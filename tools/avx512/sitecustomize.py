"""The emulated library in the place of opsdl/_cpu.so, in any Python that starts with the folder of both on PYTHONPATH.

Python imports this module by its name when it starts, so the processes that a test starts have the library too.
"""

from pathlib import Path

import torch

from opsdl import extension

torch.ops.load_library(Path(__file__).with_name("_cpu.so"))
extension.load = lambda: "available"
