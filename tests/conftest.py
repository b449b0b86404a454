"""The models of the tests: the small real one that `make setup` fetches, and a tiny random one with its tokenizer.

transformers takes seconds to import, and most tests of the losses need no model: it is imported by the fixtures that
use it, never here.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from transformers import LlamaForCausalLM, PreTrainedModel, PreTrainedTokenizerBase

    from opsdl.config import ModelConfig

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="session")
def model_dir() -> Path:
    """The directory of SmolLM2-135M-Instruct, as a GGUF file or in Hugging Face form."""
    path = Path(os.environ.get("OPSDL_TEST_MODEL_DIR", ROOT / ".cache" / "smollm2"))
    if not any([*path.glob("*.gguf"), *path.glob("config.json")]):
        pytest.skip(f"no model in {path}: run `make setup`, or set OPSDL_TEST_MODEL_DIR")
    return path


@pytest.fixture(scope="session")
def model_config(model_dir: Path) -> ModelConfig:
    from opsdl.config import ModelConfig

    gguf = next(model_dir.glob("*.gguf"), None)
    return ModelConfig(name=str(model_dir), gguf_file=gguf and gguf.name)


@pytest.fixture(scope="session")
def tokenizer(model_config: ModelConfig, pytestconfig: pytest.Config) -> PreTrainedTokenizerBase:
    """SmolLM2's own tokenizer. Converting it from GGUF takes seconds, so pytest's cache keeps the result."""
    import transformers

    from opsdl.models import load_tokenizer

    if model_config.gguf_file is None:
        return load_tokenizer(model_config.name, model_config.gguf_file)
    size = Path(model_config.name, model_config.gguf_file).stat().st_size
    kept = pytestconfig.cache.mkdir("tokenizers") / f"{model_config.gguf_file}-{size}-{transformers.__version__}"
    if not kept.is_dir():
        unfinished = tempfile.mkdtemp(dir=kept.parent)
        load_tokenizer(model_config.name, model_config.gguf_file).save_pretrained(unfinished)
        os.replace(unfinished, kept)
    return transformers.AutoTokenizer.from_pretrained(kept, local_files_only=True)


@pytest.fixture(scope="session")
def smollm2(model_config: ModelConfig) -> PreTrainedModel:
    """The real model, float32, on the CPU. Shared by all tests: leave its weights as they are."""
    from opsdl.models import load_model

    return load_model(model_config.name, model_config.gguf_file)


@pytest.fixture
def tiny_model(tokenizer: PreTrainedTokenizerBase) -> LlamaForCausalLM:
    from tests.support.tiny_model import make_tiny_model

    return make_tiny_model(tokenizer)


@pytest.fixture(scope="session")
def tiny_model_dir(tokenizer: PreTrainedTokenizerBase, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The tiny model and its tokenizer, saved: a model.name that loads in a moment."""
    from tests.support.tiny_model import make_tiny_model

    path = tmp_path_factory.mktemp("tiny-model")
    make_tiny_model(tokenizer).save_pretrained(path)
    tokenizer.save_pretrained(path)
    yield path
    shutil.rmtree(path)
