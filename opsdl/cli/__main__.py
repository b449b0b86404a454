"""`python -m opsdl.cli`: the `opsdl` command where its script is not on PATH."""

import sys

from opsdl.cli.main import main

sys.exit(main())
