"""The backends that most tests of the losses go through."""

import pytest

from tests.support.losses import has


@pytest.fixture(params=["cpu", "torch"])
def backend(request):
    if not has(request.param):
        pytest.skip(f"backend {request.param!r} cannot be used here")
    return request.param
