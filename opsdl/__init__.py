"""OPSDL: on-policy self-distillation for long context.

The public names below are imported when they are first used: `import opsdl` costs next to nothing, the losses need
torch only, and the shared prefix also needs transformers (`pip install opsdl[train]`).
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from opsdl import losses as losses
    from opsdl import prefix as prefix
    from opsdl.errors import UserError as UserError
    from opsdl.losses import FusedLogProb as FusedLogProb
    from opsdl.losses import FusedPolicyReverseKL as FusedPolicyReverseKL
    from opsdl.losses import FusedReverseKL as FusedReverseKL
    from opsdl.losses import fused_log_prob as fused_log_prob
    from opsdl.losses import fused_policy_reverse_kl as fused_policy_reverse_kl
    from opsdl.losses import fused_reverse_kl as fused_reverse_kl
    from opsdl.losses import reference as reference
    from opsdl.prefix import FreedSequenceError as FreedSequenceError
    from opsdl.prefix import KeyValuePool as KeyValuePool
    from opsdl.prefix import OutOfBlocksError as OutOfBlocksError
    from opsdl.prefix import PrefixCache as PrefixCache
    from opsdl.prefix import Responses as Responses
    from opsdl.prefix import Segment as Segment
    from opsdl.prefix import StalePrefixError as StalePrefixError
    from opsdl.prefix import as_transformers as as_transformers
    from opsdl.prefix import extend as extend
    from opsdl.prefix import generate as generate
    from opsdl.prefix import packed_hidden as packed_hidden
    from opsdl.prefix import prefill as prefill
    from opsdl.prefix import response_hidden as response_hidden
    from opsdl.prefix import tree_hidden as tree_hidden

__version__ = "0.1.0"

# Every public name and the module that it is in; None says that it is a module itself.
_MODULE_OF: dict[str, str | None] = {
    "FreedSequenceError": "opsdl.prefix",
    "FusedLogProb": "opsdl.losses",
    "FusedPolicyReverseKL": "opsdl.losses",
    "FusedReverseKL": "opsdl.losses",
    "KeyValuePool": "opsdl.prefix",
    "OutOfBlocksError": "opsdl.prefix",
    "PrefixCache": "opsdl.prefix",
    "Responses": "opsdl.prefix",
    "Segment": "opsdl.prefix",
    "StalePrefixError": "opsdl.prefix",
    "UserError": "opsdl.errors",
    "as_transformers": "opsdl.prefix",
    "extend": "opsdl.prefix",
    "fused_log_prob": "opsdl.losses",
    "fused_policy_reverse_kl": "opsdl.losses",
    "fused_reverse_kl": "opsdl.losses",
    "generate": "opsdl.prefix",
    "losses": None,
    "packed_hidden": "opsdl.prefix",
    "prefill": "opsdl.prefix",
    "prefix": None,
    "reference": "opsdl.losses",
    "response_hidden": "opsdl.prefix",
    "tree_hidden": "opsdl.prefix",
}
__all__ = sorted(_MODULE_OF)


def __getattr__(name: str) -> Any:
    if name not in _MODULE_OF:
        raise AttributeError(f"module 'opsdl' has no attribute {name!r}")
    module = _MODULE_OF[name]
    value = import_module(f"opsdl.{name}") if module is None else getattr(import_module(module), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
