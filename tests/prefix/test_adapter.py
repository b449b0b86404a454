"""What attaching changes, and which models are refused."""

import pytest
import torch

from opsdl.prefix import Responses, attach, detach, prefill, response_hidden
from tests.support.models import SHAPE, VOCABULARY, make_model


def test_attach_keeps_ordinary_calls_and_can_be_undone():
    model = make_model()
    ids = torch.randint(VOCABULARY, (2, 10))
    mask = torch.ones_like(ids)
    mask[0, :4] = 0  # left padding must reach the attention
    before, implementation = model(ids, attention_mask=mask).logits, model.config._attn_implementation
    attach(model)
    assert torch.equal(model(ids, attention_mask=mask).logits, before)
    detach(model)
    assert model.config._attn_implementation == implementation
    assert torch.equal(model(ids, attention_mask=mask).logits, before)


def test_unsupported_layers_are_refused():
    from transformers import AutoModelForCausalLM, LlamaConfig, MistralConfig

    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(MistralConfig(**SHAPE, sliding_window=4))
    with pytest.raises(ValueError, match="layer 0 has a sliding window"):
        prefill(model, torch.arange(6))
    model = AutoModelForCausalLM.from_config(LlamaConfig(**SHAPE, attention_dropout=0.1)).train()
    with pytest.raises(ValueError, match="attention dropout is 0.1"):
        prefill(model, torch.arange(6))


def test_layers_that_are_no_full_attention_are_refused():
    from transformers import (
        AutoModelForCausalLM,
        Gemma2Config,
        Gemma3TextConfig,
        LlamaConfig,
        MambaConfig,
        MistralConfig,
        Qwen3NextConfig,
    )

    gemma = Gemma2Config(**SHAPE, query_pre_attn_scalar=8, sliding_window=None, layer_types=["full_attention"] * 2)
    gated = Qwen3NextConfig(
        **SHAPE, layer_types=["full_attention", "linear_attention"], num_experts=0, mlp_only_layers=[0, 1],
        linear_num_key_heads=2, linear_num_value_heads=2, linear_key_head_dim=8, linear_value_head_dim=8,
    )  # fmt: skip
    for config, message in (
        (gemma, "layer 0 soft-caps its attention scores"),
        (gated, "layer 1 is linear_attention; only full attention"),
        (MambaConfig(vocab_size=VOCABULARY, hidden_size=32, num_hidden_layers=2), "layer 0 is linear_attention"),
        (Gemma3TextConfig(**SHAPE), "sliding window"),
        (MistralConfig(**SHAPE, sliding_window=4), "sliding window"),
        (LlamaConfig(**SHAPE, attention_dropout=0.1), "dropout"),
    ):
        model = AutoModelForCausalLM.from_config(config).train()
        with pytest.raises(ValueError, match=message):
            prefill(model, torch.arange(6))
        with pytest.raises(ValueError, match=message):
            response_hidden(model, torch.arange(6), Responses(torch.ones(1, 2).long(), torch.ones(1, 2).bool()))
