"""Small random models of several families, groups of responses, and the ordinary forward of separate rows."""

from __future__ import annotations

import torch
from transformers import AutoModelForCausalLM, LlamaConfig, MistralConfig, Qwen2Config, Qwen3Config

from opsdl.prefix import Responses

VOCABULARY = 97
SHAPE = dict(
    vocab_size=VOCABULARY, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, head_dim=8, max_position_embeddings=64,
)  # fmt: skip
CONFIGS = {
    "llama": lambda: LlamaConfig(**SHAPE),
    "qwen2": lambda: Qwen2Config(**{k: v for k, v in SHAPE.items() if k != "head_dim"}),
    "qwen3": lambda: Qwen3Config(**SHAPE),
    "mistral": lambda: MistralConfig(**SHAPE, sliding_window=None),
}


def make_model(kind="llama", dtype=torch.float64, seed=0):
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(CONFIGS[kind](), dtype=dtype)
    # Plain initialisation leaves attention almost uniform; larger weights make every key matter.
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter.mul_(8)
    return model


def make_group(lengths, prefix_length=11, seed=0):
    generator = torch.Generator().manual_seed(seed)
    prefix_P = torch.randint(VOCABULARY, (prefix_length,), generator=generator)
    tokens_GT = torch.randint(VOCABULARY, (len(lengths), max(lengths)), generator=generator)
    mask_GT = torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]
    return prefix_P, Responses(tokens_GT, mask_GT)


def separate_rows(model, prefix_P, responses):
    """[G, T, H] from G ordinary forwards of prefix + response."""
    out = []
    for tokens_T, length in zip(responses.tokens, responses.lengths, strict=True):
        row = torch.cat([prefix_P, tokens_T[: length - 1]])
        hidden_LH = model.base_model(row[None], use_cache=False).last_hidden_state[0]
        out.append(torch.nn.functional.pad(hidden_LH[len(prefix_P) - 1 :], (0, 0, 0, tokens_T.shape[0] - length)))
    return torch.stack(out)


def relative(x, expected):
    return float((x - expected).detach().norm() / expected.detach().norm())
