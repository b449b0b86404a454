"""Models and tokenizers: from a local directory, a GGUF file inside one, or the Hugging Face hub."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import HfApi
from huggingface_hub.utils import HFValidationError, validate_repo_id
from safetensors import SafetensorError
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import logging as transformers_logging

from opsdl.errors import UserError

HUB_SECONDS = 10  # to ask whether the hub has the model; after that only local copies count


def load_tokenizer(name: str, gguf_file: str | None = None) -> PreTrainedTokenizerBase:
    """Load the model's own tokenizer.

    Args:
        name: hub id, or a local directory.
        gguf_file: a GGUF file inside that directory.

    Raises:
        UserError: the model cannot be found or read.
    """
    with _loading(name, gguf_file) as source:
        return AutoTokenizer.from_pretrained(**source)


def load_model(name: str, gguf_file: str | None = None, *, device: torch.device | str = "cpu") -> PreTrainedModel:
    """Load a causal LM with float32 weights, in eval mode; a GGUF model is dequantized.

    Nothing is unpickled and no code from the model's repository runs.

    Args:
        name: hub id, or a local directory.
        gguf_file: a GGUF file inside that directory.
        device: where its weights go.

    Raises:
        UserError: the model cannot be found or read.
    """
    safetensors_only: dict[str, Any] = {} if gguf_file else {"use_safetensors": True}
    with _loading(name, gguf_file) as source:
        model = AutoModelForCausalLM.from_pretrained(**source, **safetensors_only, dtype=torch.float32)
    if gguf_file:
        _forget_quantization(model)
    torch.nn.Module.to(model, device)
    return model


def pick_device(name: str) -> torch.device:
    """The device that `name` means; "auto" is cuda where there is one, else cpu. Raises UserError if it is unusable."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        why = _first_line(error)
        raise UserError(f"device {name!r}: not usable here ({why}); expected auto, cpu or cuda") from None
    return device


def eos_token_ids(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Every token id that ends a response, sorted: those of the generation config and the tokenizer's own."""
    configured = model.generation_config.eos_token_id
    ids = set(configured) if isinstance(configured, list) else {configured}
    return sorted((ids | {tokenizer.eos_token_id}) - {None})


def context_limit(model: PreTrainedModel) -> int | None:
    """Tokens (context and response) that the model has positions for; None when its config does not say."""
    return getattr(model.config, "max_position_embeddings", None)


def checkpoint_activations(model: PreTrainedModel) -> None:
    """Make the backward pass recompute what is inside a layer, so that the forward pass keeps only the layers' inputs.

    Args:
        model: any transformers model that supports it; changed in place, and it takes effect in training mode.
    """
    # transformers 5.17 calls it gradient checkpointing; later versions renamed it and warn about the old name.
    name = "activation" if hasattr(model, "activation_checkpointing_enable") else "gradient"
    enable = getattr(model, f"{name}_checkpointing_enable")
    enable(**{f"{name}_checkpointing_kwargs": {"use_reentrant": False}})


def checkpoints_activations(model: PreTrainedModel) -> bool:
    """Whether any layer of the model recomputes its activations in the backward pass."""
    return any(getattr(module, "gradient_checkpointing", False) for module in model.modules())


@contextmanager
def _loading(name: str, gguf_file: str | None) -> Iterator[dict[str, Any]]:
    """Give the arguments of from_pretrained that say where the model is; silence it, make its errors a UserError."""
    local = Path(name).is_dir()
    if local and gguf_file and not (path := Path(name, gguf_file)).is_file():
        raise UserError(f"model {name}: GGUF file {path}: no such file")
    source = {"pretrained_model_name_or_path": name, "local_files_only": local or not _hub_has(name)}
    if gguf_file:
        source["gguf_file"] = gguf_file
    verbosity, bar = transformers_logging.get_verbosity(), transformers_logging.is_progress_bar_enabled()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    try:
        yield source
    except (OSError, ValueError, KeyError, SafetensorError) as error:
        what = "cannot be read" if local else "neither a local directory nor a hub id that can be loaded here"
        raise UserError(
            f"model {name}: {what} ({_first_line(error)}); expected a hub id (organisation/model) or a local "
            "directory that holds config.json, a tokenizer and safetensors or GGUF weights"
        ) from None
    finally:
        transformers_logging.set_verbosity(verbosity)
        if bar:
            transformers_logging.enable_progress_bar()


def _hub_has(name: str) -> bool:
    """Whether the hub can be reached and has the model; asking once spares half a minute of retries for each file."""
    try:
        validate_repo_id(name)
    except HFValidationError:
        raise UserError(f"model {name}: no such local directory, and not a hub id (organisation/model)") from None
    try:
        HfApi().model_info(name, timeout=HUB_SECONDS)
    except Exception:  # offline, unknown or private: loading from local copies says what is missing
        return False
    return True


def _forget_quantization(model: PreTrainedModel) -> None:
    """A model dequantized from GGUF still claims to be quantized, and so refuses to be saved as the float32 it is."""
    vars(model).update(hf_quantizer=None, is_quantized=False)
    for owner, name in ((model, "quantization_method"), (model.config, "quantization_config")):
        if hasattr(owner, name):
            delattr(owner, name)


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
