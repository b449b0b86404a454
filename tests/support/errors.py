"""What bad input must lead to."""

from __future__ import annotations

import pytest

from opsdl.errors import UserError


def refuses(match: str):
    """Expect a UserError whose one line matches."""
    return pytest.raises(UserError, match=match)
