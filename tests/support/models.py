"""Small random models of several families, groups of responses, and the ordinary forward of separate rows."""

from __future__ import annotations

import torch

VOCABULARY = 97
SHAPE = dict(
    vocab_size=VOCABULARY, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, head_dim=8, max_position_embeddings=64,
)  # fmt: skip
CONFIGS = {  # of each family the class in transformers, and what differs from SHAPE
    "llama": ("LlamaConfig", {}),
    "qwen2": ("Qwen2Config", {"head_dim": None}),
    "qwen3": ("Qwen3Config", {}),
    "mistral": ("MistralConfig", {"sliding_window": None}),
}


def make_model(kind="llama", dtype=torch.float64, seed=0):
    import transformers

    name, changes = CONFIGS[kind]
    shape = {key: value for key, value in (SHAPE | changes).items() if key != "head_dim" or value}
    torch.manual_seed(seed)
    model = transformers.AutoModelForCausalLM.from_config(getattr(transformers, name)(**shape), dtype=dtype)
    # Plain initialisation leaves attention almost uniform; larger weights make every key matter.
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter.mul_(8)
    return model


def make_group(lengths, prefix_length=11, seed=0):
    """A random prefix [P], and responses of these lengths."""
    from opsdl.prefix import Responses

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


def gradients(model, hidden, weight):
    """The gradient of sum(hidden * weight) for every parameter that has one."""
    model.zero_grad()
    (hidden * weight).sum().backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def rollout(model, prefix, seed=0, **changes):
    """Eight sampled responses of at most twelve tokens."""
    from opsdl.prefix import generate

    options = dict(num_responses=8, max_new_tokens=12, temperature=1.0, eos_token_id=[7, 3])
    return generate(model, prefix, **{**options, **changes}, generator=torch.Generator().manual_seed(seed))


def same(a, b):
    """Whether two groups of responses are equal to the bit."""
    return all(torch.equal(x, y) for x, y in ((a.tokens, b.tokens), (a.mask, b.mask), (a.log_probs, b.log_probs)))


def token_bytes(prefix):
    """The bytes of one token's keys and values."""
    return sum(x[:, :, :1].nbytes for pair in prefix.layers.values() for x in pair)


def relative(x, expected):
    return float((x - expected).detach().norm() / expected.detach().norm())
