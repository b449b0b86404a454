"""transformers' own generate over a prefix cache."""

import pytest
import torch

from opsdl.prefix import KeyValuePool, as_transformers, detach, prefill
from tests.support.models import VOCABULARY, make_group, make_model, token_bytes


@pytest.mark.parametrize("attached", [True, False])
def test_transformers_generates_from_the_cache(attached):
    model = make_model()
    ids, _ = make_group([1], prefix_length=23)
    rows = ids.expand(4, -1)
    options = dict(max_new_tokens=9, do_sample=False, pad_token_id=0, eos_token_id=VOCABULARY + 1)
    expected = model.generate(rows, attention_mask=torch.ones_like(rows), **options)
    prefix = prefill(model, ids, pool=KeyValuePool(1 << 20))
    if not attached:
        detach(model)
    before = [x.clone() for pair in prefix.layers.values() for x in pair]
    cache = as_transformers(model, prefix, rows=4)
    got = model.generate(rows, attention_mask=torch.ones_like(rows), past_key_values=cache, **options)
    assert torch.equal(got, expected)
    assert all(torch.equal(x, y) for x, y in zip(before, (x for p in prefix.layers.values() for x in p), strict=True))
    own = sum(x.nbytes for layer in cache.layers for x in (layer.keys, layer.values))
    assert own == 4 * 9 * token_bytes(prefix)
    torch.manual_seed(0)
    sampled = model.generate(
        rows, attention_mask=torch.ones_like(rows), past_key_values=as_transformers(model, prefix, rows=4),
        **{**options, "do_sample": True},
    )  # fmt: skip
    assert sampled.shape == (4, 32) and len({tuple(row) for row in sampled.tolist()}) > 1
