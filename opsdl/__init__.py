"""OPSDL: on-policy self-distillation for long context.

The public names below are imported when they are first used: `import opsdl` costs next to nothing, the losses need
torch only, and the shared prefix also needs transformers (`pip install opsdl[train]`).
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from opsdl import losses, prefix
    from opsdl.losses import (
        FusedLogProb,
        FusedPolicyReverseKL,
        FusedReverseKL,
        fused_log_prob,
        fused_policy_reverse_kl,
        fused_reverse_kl,
        reference,
    )
    from opsdl.prefix import (
        KeyValuePool,
        PrefixCache,
        Responses,
        as_transformers,
        generate,
        prefill,
        response_hidden,
    )

__version__ = "0.1.0"

__all__ = [
    "FusedLogProb",
    "FusedPolicyReverseKL",
    "FusedReverseKL",
    "KeyValuePool",
    "PrefixCache",
    "Responses",
    "as_transformers",
    "fused_log_prob",
    "fused_policy_reverse_kl",
    "fused_reverse_kl",
    "generate",
    "losses",
    "prefill",
    "prefix",
    "reference",
    "response_hidden",
]

_MODULES = {"losses": "opsdl.losses", "prefix": "opsdl.prefix", "reference": "opsdl.losses.reference"}
_IN_LOSSES = (
    "FusedLogProb",
    "FusedPolicyReverseKL",
    "FusedReverseKL",
    "fused_log_prob",
    "fused_policy_reverse_kl",
    "fused_reverse_kl",
)


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module 'opsdl' has no attribute {name!r}")
    if name in _MODULES:
        value = import_module(_MODULES[name])
    else:
        value = getattr(import_module("opsdl.losses" if name in _IN_LOSSES else "opsdl.prefix"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
