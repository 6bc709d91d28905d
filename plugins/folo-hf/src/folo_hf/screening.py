"""Decides from the configuration and the class, before any weight is read, whether a model can run.

What transformers itself says of a class decides, so that models added later are judged too. The probe
(``folo_hf.probe``) then judges the loaded model by what it does.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

from transformers import AutoConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

from folo_core.errors import ModelLoadError, UnsupportedModelError
from folo_hf.quiet import quiet
from folo_hf.source import read_config

if TYPE_CHECKING:
    from pathlib import Path

    from transformers import PretrainedConfig, PreTrainedModel

PAGED_LAYER_TYPES = {"full_attention", "sliding_attention"}
LANGUAGE_MODEL = re.compile(r"CausalLM|LMHead|ConditionalGeneration|Model$")
"""Class names of checkpoints that hold a language model, with its head or tied to its embeddings."""


def load_config(folder: Path) -> PretrainedConfig:
    """The folder's configuration, as transformers' own class.

    Raises:
        ModelLoadError: it is missing, corrupt, or of an architecture that transformers does not know.
    """
    raw = read_config(folder)
    kind = raw["model_type"]
    if kind not in CONFIG_MAPPING:
        raise ModelLoadError(_unknown_type(folder, kind, raw))
    try:
        with quiet():
            return AutoConfig.from_pretrained(folder, trust_remote_code=False)
    except Exception as error:
        text = str(error).strip() or type(error).__name__
        raise ModelLoadError(f"model: '{folder / 'config.json'}': transformers refuses it: {text}") from error


def _unknown_type(folder: Path, kind: str, raw: dict[str, Any]) -> str:
    if "auto_map" in raw:
        return (
            f"model: '{folder}': its architecture {kind!r} is code of its own (auto_map), "
            "and Folo runs no code that comes with a model; use a model that transformers itself knows"
        )
    return (
        f"model: '{folder}': model_type {kind!r} is unknown to the installed transformers; "
        "upgrade transformers if it is newer, or correct config.json"
    )


def screen(config: PretrainedConfig) -> type[PreTrainedModel]:
    """The class that will run the model.

    Raises:
        UnsupportedModelError: that class cannot run through paged attention; the message names it and says why.
    """
    if config.is_encoder_decoder:
        raise _refusal(_declared(config), "it is an encoder-decoder, and Folo runs decoders alone")
    if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        raise _refusal(_declared(config), "transformers has no causal language model of its type")
    model_class: type[PreTrainedModel] = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
    declared = config.architectures or []
    if declared and not any(LANGUAGE_MODEL.search(name) for name in declared):
        raise _refusal(", ".join(declared), "the checkpoint holds no language model head")
    reason = _class_reason(model_class) or _layer_reason(config.get_text_config(decoder=True))
    if reason is not None:
        raise _refusal(model_class.__name__, reason)
    return model_class


def _declared(config: PretrainedConfig) -> str:
    return ", ".join(config.architectures or []) or config.model_type


def _refusal(name: str, reason: str) -> UnsupportedModelError:
    return UnsupportedModelError(f"model: {name} cannot run through paged attention: {reason}")


def _class_reason(model_class: type[PreTrainedModel]) -> str | None:
    if getattr(model_class, "_is_stateful", False):
        return "it keeps a recurrent state beside, or in place of, keys and values"
    can_set = getattr(model_class, "_can_set_attn_implementation", None)
    if not getattr(model_class, "_supports_attention_backend", False) and not (can_set is not None and can_set()):
        return "its attention does not go through transformers' AttentionInterface (ALiBi models are of this kind)"
    return None


def _layer_reason(config: PretrainedConfig) -> str | None:
    """Why the text model's layers do not fit, from its configuration."""
    kinds = sorted(set(getattr(config, "layer_types", None) or ()) - PAGED_LAYER_TYPES)
    if kinds:
        return f"it has layers of type {', '.join(map(repr, kinds))}; full and sliding attention are what runs"
    if getattr(config, "attention_chunk_size", None) and not getattr(config, "layer_types", None):
        return "its attention is cut into chunks (attention_chunk_size)"
    return None
