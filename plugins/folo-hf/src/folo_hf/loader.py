"""The ``hf`` model loader."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from folo_core.execution.interface import ModelInfo
from folo_hf.attention import AttentionBridge
from folo_hf.device import TorchProbe, resolve_device, resolve_dtype
from folo_hf.model import HfLoadedModel
from folo_hf.probe import ModelShape, probe

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from folo_core.config import EngineConfig
    from folo_core.execution.loading import Tokenizer
    from folo_hf.device import HardwareProbe


class HfLoader:
    """``ModelLoader`` for one EngineConfig."""

    def __init__(self, config: EngineConfig, hardware: HardwareProbe | None = None) -> None:
        self._config = config.model
        self._hardware = hardware or TorchProbe()

    def load_tokenizer(self) -> Tokenizer | None:
        """The model's tokenizer (see ``ModelLoader``)."""
        if self._config.skip_tokenizer_init:
            return None
        return AutoTokenizer.from_pretrained(self._config.tokenizer or self._config.model, trust_remote_code=False)

    def load_model(self, tokenizer: Tokenizer | None) -> HfLoadedModel:
        """The model on its device in its resolved dtype (see ``ModelLoader``)."""
        device = resolve_device(self._config.device, self._hardware)
        dtype = resolve_dtype(self._config.dtype, device, self._hardware)
        bridge = AttentionBridge()
        module = AutoModelForCausalLM.from_pretrained(
            self._config.model,
            dtype=getattr(torch, dtype),
            attn_implementation=bridge.name,
            use_safetensors=True,
            trust_remote_code=False,
        )
        module = module.to(device).eval()
        shape = probe(module, bridge)
        return HfLoadedModel(module, bridge, shape, _info(module, shape, dtype, device))


def _info(module: PreTrainedModel, shape: ModelShape, dtype: str, device: str) -> ModelInfo:
    config = module.config.get_text_config(decoder=True)
    return ModelInfo(
        architecture=type(module).__name__,
        vocab_size=shape.vocab_size,
        max_model_len=config.max_position_embeddings,
        num_layers=len(shape.specs),
        kv_bytes_per_token=sum(spec.bytes_per_token() for spec in shape.specs),
        dtype=dtype,
        device=device,
        eos_token_ids=_eos(module),
        num_parameters=sum(parameter.numel() for parameter in module.parameters()),
    )


def _eos(module: PreTrainedModel) -> tuple[int, ...]:
    for source in (module.generation_config, module.config.get_text_config(decoder=True)):
        eos = getattr(source, "eos_token_id", None)
        if eos is not None:
            return tuple(eos) if isinstance(eos, (list, tuple)) else (eos,)
    return ()
