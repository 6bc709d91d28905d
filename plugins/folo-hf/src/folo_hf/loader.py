"""The ``hf`` model loader."""

from __future__ import annotations

import contextlib
import gc
import logging
from functools import cached_property
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

import torch
from transformers import AutoModelForCausalLM

from folo_core.errors import ConfigError, ModelLoadError
from folo_core.execution.interface import ModelInfo
from folo_hf import lean
from folo_hf.attention import AttentionBridge
from folo_hf.decoder import native_decoder
from folo_hf.device import TorchProbe, resolve_device, resolve_dtype
from folo_hf.gguf import converted
from folo_hf.invariance import STEADY_PASSES, settle
from folo_hf.low_bit import LowBitLinears, check_device
from folo_hf.model import HfLoadedModel
from folo_hf.native import NativeLinears, check_quantised, weight_bytes, weight_format
from folo_hf.passes import PASSES, run_passes
from folo_hf.peer import TransformersPeer
from folo_hf.positions import position_limit, settle_rope
from folo_hf.probe import probe
from folo_hf.quiet import quiet
from folo_hf.remembered import Memory, recall
from folo_hf.rounded_kv import check_fp8_kv, with_rounded_kv
from folo_hf.screening import load_config, screen
from folo_hf.source import Kind, check_weights, locate, weight_names
from folo_hf.swift import swift_loading
from folo_hf.tokenizer import load_tokenizer
from folo_hf.vocabulary import fit_vocabulary
from folo_kernels.matrix import Format

if TYPE_CHECKING:
    from pathlib import Path

    from transformers import PretrainedConfig, PreTrainedModel

    from folo_core.config import EngineConfig
    from folo_core.execution.loading import Tokenizer
    from folo_hf.device import HardwareProbe
    from folo_hf.device_decoder import DeviceDecoder
    from folo_hf.probe import ModelShape
    from folo_hf.source import Source
    from folo_hf.swift import LoadingReport
    from folo_hf.tokenizer import HfTokenizer

logger = logging.getLogger(__name__)


class HfLoader:
    """``ModelLoader`` for one EngineConfig: transformers' causal language models."""

    def __init__(self, config: EngineConfig, hardware: HardwareProbe | None = None) -> None:
        self._config = config.model
        self._deterministic = config.deterministic
        self._rounds_kv = config.cache.kv_cache_dtype == "fp8"
        self._hardware = hardware or TorchProbe()

    @cached_property
    def _placement(self) -> tuple[str, str]:
        """Device and dtype, by name."""
        device = resolve_device(self._config.device, self._hardware)
        return device, resolve_dtype(self._config.dtype, device, self._hardware)

    @cached_property
    def _weights(self) -> Format:
        """How weights are stored, once nothing speaks against it."""
        device, dtype = self._placement
        if self._rounds_kv:
            check_fp8_kv(device, dtype, self._hardware)
        if self._low_bit is not None:
            return Format.FLOAT32  # what passes for CUDA round is none of the kernels for a CPU
        return weight_format(self._config.quantization, device, dtype, deterministic=self._deterministic)

    @cached_property
    def _low_bit(self) -> LowBitLinears | None:
        """What rounds weights on a CUDA device, if that is wanted and nothing speaks against it."""
        quantization, (device, dtype) = self._config.quantization, self._placement
        if quantization is None or self._deterministic or not device.startswith("cuda"):
            return None
        return LowBitLinears(quantization, check_device(quantization, device, dtype, self._hardware))

    @cached_property
    def _folder(self) -> Path:
        """The model's folder of safetensors, fetched or converted if need be."""
        return self._as_folder(locate(self._config.model, self._config.revision))

    def _as_folder(self, source: Source) -> Path:
        if source.kind is Kind.FOLDER:
            return source.path
        return converted(source.path, getattr(torch, self._placement[1]))

    @cached_property
    def _screened(self) -> PretrainedConfig:
        """The model's configuration, once nothing speaks against loading it."""
        config = load_config(self._folder)
        screen(config)
        check_weights(self._folder)
        return config

    def load_tokenizer(self) -> HfTokenizer | None:
        """The model's tokenizer, mended (see ``ModelLoader``)."""
        _ = self._weights  # refused before a GGUF file is converted
        if self._config.skip_tokenizer_init:
            return None
        # What is wrong with the model itself is said first: a tokenizer is read with the model's configuration.
        _ = self._screened
        name = self._config.tokenizer
        return load_tokenizer(self._folder if name is None else self._as_folder(locate(name, self._config.revision)))

    def load_model(self, tokenizer: Tokenizer | None) -> HfLoadedModel:
        """The model on its device in its resolved dtype (see ``ModelLoader``).

        Raises:
            ConfigError: ``deterministic``, ``quantization`` or ``kv_cache_dtype`` asks for what the device or the
                dtype does not allow.
            ModelLoadError: the model cannot be loaded.
            UnsupportedModelError: it cannot run through paged attention, or not deterministically.
        """
        device, dtype = self._placement
        if self._deterministic:
            _check_placement(device, dtype)
        weights = self._weights
        config = self._screened
        bridge = AttentionBridge()
        try:
            memory = self._recall(None if tokenizer is None else len(tokenizer))
            module, plain = _load_module(self._folder, self._options(config, bridge.name), memory)
            if tokenizer is not None:
                fit_vocabulary(module, len(tokenizer))
            settle_rope(module, self._config.max_model_len)
            num_parameters = module.num_parameters()
            passes = PASSES + STEADY_PASSES if self._deterministic else (NativeLinears(weights), *PASSES)
            passes = passes if self._low_bit is None else (*passes, self._low_bit)
            done = run_passes(module, device, getattr(torch, dtype), passes)
            check_quantised(module, self._config.quantization)
            shape = memory.shape(module) or probe(module, bridge)
            native = NativeLinears.name in done
            decoder = native_decoder(module, bridge, shape, tried=memory.decoder_tried) if native else None
            memory.keep(module, shape, plain_names=plain, decoder_tried=decoder is not None and decoder.is_whole)
            limit = position_limit(module.config, self._config.max_model_len)
            on_device = self._device_decoder(module, bridge, shape, limit)
            if self._rounds_kv:
                shape = with_rounded_kv(shape, on_device)
            guard = settle(module, bridge) if self._deterministic else contextlib.nullcontext
        except BaseException:
            bridge.release()
            raise
        info = ModelInfo(
            architecture=type(module).__name__,
            vocab_size=shape.vocab_size,
            max_model_len=limit,
            num_layers=len(shape.specs),
            kv_bytes_per_token=sum(spec.bytes_per_token() for spec in shape.specs),
            dtype=dtype,
            device=device,
            eos_token_ids=_eos_token_ids(module),
            num_parameters=num_parameters,
            quantization=self._config.quantization,
            kv_cache_dtype="fp8" if self._rounds_kv else None,
            weight_bytes=weight_bytes(module),
            batch_invariant=self._deterministic,
        )
        return HfLoadedModel(module, bridge, shape, info, guard=guard, decoder=decoder, device_decoder=on_device)

    def _device_decoder(
        self, module: PreTrainedModel, bridge: AttentionBridge, shape: ModelShape, limit: int
    ) -> DeviceDecoder | None:
        """The whole model in a CUDA device's kernels, where Triton is there to compile them."""
        if module.device.type != "cuda" or self._deterministic or find_spec("triton") is None:
            return None
        from folo_hf.device_decoder import device_decoder

        return device_decoder(module, bridge, shape, min(limit, self._config.max_model_len or limit))

    def _recall(self, num_tokens: int | None) -> Memory:
        """What an earlier start found out about the same files and options."""
        return recall(
            self._folder,
            self._placement[0],
            dtype=self._placement[1],
            deterministic=self._deterministic,
            quantization=self._config.quantization,
            max_model_len=self._config.max_model_len,
            num_tokens=num_tokens,
        )

    def _options(self, config: PretrainedConfig, attention: str) -> dict[str, Any]:
        """Arguments of ``from_pretrained``."""
        device, dtype = self._placement
        options = {"config": config, "dtype": getattr(torch, dtype), "attn_implementation": attention}
        return options if device == "cpu" else {**options, "device_map": device}

    def open_peer(self, name: str) -> TransformersPeer:
        """The same weights under transformers' own ``generate`` (see ``PeerOpener``)."""
        if name != "transformers":
            raise ModelLoadError(f"peer: {name!r}: the hf loader can open 'transformers'")
        config = load_config(self._folder)
        screen(config)
        module, _ = _load_module(self._folder, self._options(config, "sdpa"), Memory(None))
        return TransformersPeer(module)


def _check_placement(device: str, dtype: str) -> None:
    """Refuse what ``deterministic`` is not measured on, before the weights are read."""
    if device != "cpu" or dtype != "float32":
        raise ConfigError(
            f"deterministic: True: {dtype} on {device}: only float32 on a CPU gives a token its bits in any batch: "
            'give device="cpu" and dtype="float32", or leave deterministic off'
        )


def _load_module(folder: Path, options: dict[str, Any], memory: Memory) -> tuple[PreTrainedModel, bool]:
    """The transformers module with every weight in place, and whether its checkpoint has the module's own names."""
    try:
        with quiet():
            try:
                module, report, loading = _from_pretrained(folder, options, memory, spare=lean.asked())
            except Exception:
                if not lean.asked():
                    raise
                module, report, loading = _from_pretrained(folder, options, Memory(None), spare=False)
    except torch.OutOfMemoryError as error:
        gc.collect()
        raise ModelLoadError(
            f"model: '{folder}': does not fit into the memory of {options.get('device_map', 'cpu')}: {error}"
        ) from error
    except Exception as error:
        text = str(error).strip() or type(error).__name__
        raise ModelLoadError(f"model: '{folder}': transformers could not load it: {text}") from error
    _check_complete(folder, report)
    return module.eval(), loading.plain(weight_names(folder))


def _from_pretrained(
    folder: Path, options: dict[str, Any], memory: Memory, *, spare: bool
) -> tuple[PreTrainedModel, dict[str, Any], LoadingReport]:
    incomplete = lean.incomplete_torch() if spare else contextlib.nullcontext()
    with incomplete, swift_loading(plain_names=memory.plain_names, ranges_on_cpu=spare) as loading:
        module, report = AutoModelForCausalLM.from_pretrained(
            folder, use_safetensors=True, trust_remote_code=False, output_loading_info=True, **options
        )
    return module, report, loading


def _check_complete(folder: Path, report: dict[str, Any]) -> None:
    """Transformers fills weights that a checkpoint lacks with random numbers; a server must not."""
    missing = sorted(report.get("missing_keys") or ())
    if missing:
        shown = ", ".join(missing[:3]) + (", ..." if len(missing) > 3 else "")  # noqa: PLR2004 (enough to recognise)
        raise ModelLoadError(
            f"model: '{folder}': the checkpoint lacks {len(missing)} weights ({shown}); it is incomplete, "
            "or config.json is another model's"
        )
    if report.get("mismatched_keys"):
        raise ModelLoadError(
            f"model: '{folder}': weights of other shapes than config.json says: {sorted(report['mismatched_keys'])[:3]}"
        )


def _eos_token_ids(module: PreTrainedModel) -> tuple[int, ...]:
    """From the generation config, which names every token that ends an answer, else from the config."""
    for source in (module.generation_config, module.config.get_text_config(decoder=True)):
        eos = getattr(source, "eos_token_id", None)
        if eos is not None:
            return tuple(eos) if isinstance(eos, (list, tuple)) else (int(eos),)
    return ()
