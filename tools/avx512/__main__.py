"""Build the emulated library into a folder: python -m tools.avx512 DIR."""

import sys
from pathlib import Path

from tools.avx512 import build

if len(sys.argv) != 2:
    raise SystemExit("usage: python -m tools.avx512 DIR")
print(build(Path(sys.argv[1])))
