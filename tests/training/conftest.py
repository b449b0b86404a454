"""The config of a small run."""

import pytest

from tests.support.training import tiny_config


@pytest.fixture
def config(tiny_model_dir, tmp_path):
    return tiny_config(tiny_model_dir, tmp_path)
