"""The models of the tests: the small real one that `make setup` fetches, and a tiny random one with its tokenizer."""

from __future__ import annotations

import os
import shutil
import tempfile
from pathlib import Path

import pytest
import torch
import transformers
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from opsdl.config import ModelConfig
from opsdl.models import load_model, load_tokenizer

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
    gguf = next(model_dir.glob("*.gguf"), None)
    return ModelConfig(name=str(model_dir), gguf_file=gguf and gguf.name)


@pytest.fixture(scope="session")
def tokenizer(model_config: ModelConfig, pytestconfig: pytest.Config):
    """SmolLM2's own tokenizer. Converting it from GGUF takes seconds, so pytest's cache keeps the result."""
    if model_config.gguf_file is None:
        return load_tokenizer(model_config)
    size = Path(model_config.name, model_config.gguf_file).stat().st_size
    kept = pytestconfig.cache.mkdir("tokenizers") / f"{model_config.gguf_file}-{size}-{transformers.__version__}"
    if not kept.is_dir():
        unfinished = tempfile.mkdtemp(dir=kept.parent)
        load_tokenizer(model_config).save_pretrained(unfinished)
        os.replace(unfinished, kept)
    return AutoTokenizer.from_pretrained(kept, local_files_only=True)


@pytest.fixture(scope="session")
def smollm2(model_config: ModelConfig):
    """The real model, float32, on the CPU. Shared by all tests: leave its weights as they are."""
    return load_model(model_config)


def make_tiny_model(tokenizer) -> LlamaForCausalLM:
    """A random two-layer Llama with the vocabulary of `tokenizer`, the same every time."""
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        max_position_embeddings=2048,
        initializer_range=0.2,  # the default gives nearly equal logits at this size
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return LlamaForCausalLM(config).float().eval()


@pytest.fixture
def tiny_model(tokenizer) -> LlamaForCausalLM:
    return make_tiny_model(tokenizer)


@pytest.fixture(scope="session")
def tiny_model_dir(tokenizer, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model and its tokenizer, saved: a model.name that loads in a moment."""
    path = tmp_path_factory.mktemp("tiny-model")
    make_tiny_model(tokenizer).save_pretrained(path)
    tokenizer.save_pretrained(path)
    yield path
    shutil.rmtree(path)
