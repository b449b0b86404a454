"""What the package says of its compiled parts."""

import warnings

import pytest

from opsdl import extension


@pytest.mark.parametrize("state", ["not built (it needs nvcc)", "built for another torch (undefined symbol)"])
def test_a_gpu_without_compiled_operators_is_told_why_once(state, monkeypatch):
    monkeypatch.setattr(extension, "load_cuda", lambda: state)
    extension.warn_without_cuda.cache_clear()
    with pytest.warns(UserWarning) as caught:
        extension.warn_without_cuda()
        extension.warn_without_cuda()
    assert [str(warning.message) for warning in caught] == [
        f"opsdl: operators of shared prefixes run in plain torch on this GPU: csrc/cuda is {state}"
    ]
    extension.warn_without_cuda.cache_clear()


def test_a_gpu_with_compiled_operators_is_told_nothing(monkeypatch):
    monkeypatch.setattr(extension, "load_cuda", lambda: "available")
    extension.warn_without_cuda.cache_clear()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        extension.warn_without_cuda()
    extension.warn_without_cuda.cache_clear()
