"""Tasks that make questions; `build(TASKS, config.data.task, "data")` makes the one that a config names.

base.py        what a task is
needles.py     numbers hidden in real text, worded by wordings.py, put into passages.py of haystacks.py
matching.py    whether a text contains the answers
"""

from opsdl.data.tasks.base import SPLITS, Task
from opsdl.data.tasks.matching import found
from opsdl.data.tasks.needles import Needles

TASKS: dict[str, type[Task]] = {"needles": Needles}

__all__ = ["SPLITS", "TASKS", "Needles", "Task", "found"]
