"""Loading: what comes out is a plain float32 model, whatever file it came from."""

from types import SimpleNamespace

import pytest
import torch
from transformers import AutoModelForCausalLM

from opsdl.models import context_limit, eos_token_ids, load_model, pick_device


def test_the_real_model_is_plain_float32_and_saves_exactly(smollm2, tmp_path):
    """A model from GGUF refuses to be saved until it has forgotten that it was quantized."""
    smollm2.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path, local_files_only=True, dtype="auto")
    saved = dict(again.named_parameters())
    for name, parameter in smollm2.named_parameters():
        assert parameter.dtype == saved[name].dtype == torch.float32
        assert torch.equal(parameter, saved[name]), name


def test_weights_become_float32(tiny_model, tmp_path):
    tiny_model.bfloat16().save_pretrained(tmp_path)
    model = load_model(str(tmp_path))
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    assert not model.training


def test_pickled_weights_are_refused(tiny_model, tmp_path):
    tiny_model.config.save_pretrained(tmp_path)
    torch.save(tiny_model.state_dict(), tmp_path / "pytorch_model.bin")
    with pytest.raises(ValueError, match="cannot be read"):
        load_model(str(tmp_path))


@pytest.mark.parametrize(("configured", "expected"), [(None, [2]), (2, [2]), (7, [2, 7]), ([9, 2, 7], [2, 7, 9])])
def test_eos_token_ids_of_model_and_tokenizer(tiny_model, tokenizer, configured, expected):
    tiny_model.generation_config.eos_token_id = configured
    assert eos_token_ids(tiny_model, tokenizer) == expected


def test_context_limit(tiny_model):
    assert context_limit(tiny_model) == 2048
    assert context_limit(SimpleNamespace(config=SimpleNamespace())) is None  # Mamba and its like


def test_device():
    assert pick_device("cpu") == torch.device("cpu")
    assert pick_device("auto").type == ("cuda" if torch.cuda.is_available() else "cpu")
