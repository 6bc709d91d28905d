"""A llama-like model's parts, recognised in its transformers module, for a CUDA device (``folo_hf.device_decoder``)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import attrs
import torch
from torch.nn import functional

from folo_hf.low_bit import LowBitLinear
from folo_hf.passes import plain, shared_linear
from folo_hf.probe import tokens
from folo_hf.stack import NotRecognisedError, activation_of, norm_factor, noted, optional_factor

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from torch import nn
    from transformers import PreTrainedModel

    from folo_core.attention.interface import KVCacheSpec
    from folo_hf.attention import AttentionCall
    from folo_hf.low_bit import LowBit
    from folo_kernels.gpu.layers import Activation

ACTIVATIONS: dict[Activation, Callable[[torch.Tensor], torch.Tensor]] = {
    "silu": functional.silu,
    "gelu_tanh": lambda x: functional.gelu(x, approximate="tanh"),
    "gelu": functional.gelu,
}
"""Activations that the kernels know."""

SCALE_ERROR = 1e-2
"""Largest accepted ratio of the difference's norm to the norm, between embeddings and the layers' input."""

UNSCALED = 1e-3
"""How far from 1 an embedding's scale may be measured where there is none."""


@attrs.frozen(slots=True, eq=False)
class Linear:
    """A linear layer's weight ``[outputs, inputs]``, contiguous, and bias ``[outputs]``: the module's own tensors."""

    weight: torch.Tensor
    """Of no elements where the weight is rounded."""
    bias: torch.Tensor | None
    low_bit: LowBit | None = None
    """The rounded weight (``folo_hf.low_bit``)."""

    @property
    def outputs(self) -> int:
        """How many there are."""
        return self.weight.shape[0] if self.low_bit is None else self.low_bit.out_features


@attrs.frozen(slots=True, kw_only=True, eq=False)
class DeviceLayer:
    """One decoder layer: ``h += attention(norm(h))``, then ``h += feed_forward(norm(h))``.

    Norms are float32 factors of RMSNorm, ``x / sqrt(mean(x^2) + epsilon) * factor``.
    """

    input_norm: torch.Tensor
    """Before attention, ``[hidden]``."""
    feed_norm: torch.Tensor
    """Before the feed-forward."""
    qkv: Linear
    """Queries of all heads, then keys, then values."""
    out: Linear
    gate_up: Linear
    """The gate, then its values."""
    down: Linear
    activation: Activation
    heads: int
    size: int
    """Features of a head."""
    epsilon: float
    call: AttentionCall
    query_norm: torch.Tensor | None
    """On each head's queries before they are turned, ``[size]``."""
    key_norm: torch.Tensor | None
    attention_norm: torch.Tensor | None
    """On what attention adds."""
    output_norm: torch.Tensor | None
    """On what the feed-forward adds."""

    @property
    def is_rounded(self) -> bool:
        """Whether any of its weights is."""
        return any(each.low_bit is not None for each in (self.qkv, self.out, self.gate_up, self.down))

    @property
    def adds_plainly(self) -> bool:
        """Whether what is added to the residual stream is the product itself."""
        return self.attention_norm is None and self.output_norm is None

    @property
    def joins(self) -> bool:
        """Whether its products are of the kind that can be joined with what surrounds them."""
        has_biases = any(each.bias is not None for each in (self.qkv, self.out, self.gate_up, self.down))
        return self.adds_plainly and not self.is_rounded and not has_biases


@attrs.frozen(slots=True, kw_only=True, eq=False)
class Ends:
    """What comes before the layers and after them."""

    embedding: torch.Tensor
    """``[vocab_size, hidden]``."""
    embedding_scale: float
    norm: torch.Tensor
    """As the layers', ``[hidden]``."""
    epsilon: float
    head: Linear
    logit_scale: float
    softcap: float | None


def read_layer(layer: Any, call: AttentionCall, spec: KVCacheSpec) -> DeviceLayer:  # noqa: ANN401 (of any architecture)
    """Read one layer.

    Raises:
        NotRecognisedError: it has other parts than the kernels compute.
    """
    attention, mlp = layer.self_attn, layer.mlp
    qkv = _joined(attention, ("q_proj", "k_proj", "v_proj"), "qkv_proj")
    sandwich = hasattr(layer, "pre_feedforward_layernorm")
    input_norm, epsilon = norm_factor(layer.input_layernorm)
    feed_norm = layer.pre_feedforward_layernorm if sandwich else layer.post_attention_layernorm
    read = DeviceLayer(
        input_norm=input_norm,
        feed_norm=norm_factor(feed_norm)[0],
        qkv=qkv,
        out=_linear(attention.o_proj),
        gate_up=_joined(mlp, ("gate_proj", "up_proj"), "gate_up_proj"),
        down=_linear(mlp.down_proj),
        activation=_activation(mlp),
        heads=qkv.outputs // spec.head_size - 2 * spec.num_kv_heads,
        size=spec.head_size,
        epsilon=epsilon,
        call=call,
        query_norm=optional_factor(attention, "q_norm"),
        key_norm=optional_factor(attention, "k_norm"),
        attention_norm=norm_factor(layer.post_attention_layernorm)[0] if sandwich else None,
        output_norm=optional_factor(layer, "post_feedforward_layernorm"),
    )
    _check_layer(read, layer, spec)
    return read


def read_ends(model: PreTrainedModel, stack: tuple[nn.Module, str]) -> Ends:
    """Read what comes before and after the layers.

    Raises:
        NotRecognisedError: there is more than an embedding, a norm and a head.
    """
    owner: Any = stack[0]
    config: Any = model.config.get_text_config(decoder=True)
    norm, epsilon = norm_factor(owner.norm)
    embedding = model.get_input_embeddings().weight.detach()
    return Ends(
        embedding=embedding,
        embedding_scale=_embedding_scale(model, stack, embedding),
        norm=norm,
        epsilon=epsilon,
        head=_linear(model.get_output_embeddings()),
        logit_scale=float(getattr(config, "logit_scale", None) or 1) / float(getattr(config, "logits_scaling", 1) or 1),
        softcap=getattr(config, "final_logit_softcapping", None),
    )


def _joined(parent: nn.Module, names: Sequence[str], whole: str) -> Linear:
    """Linears of these names, joined by ``FuseLinears``, or the one that the architecture has for all of them."""
    linear = shared_linear(parent, names)
    return _linear(getattr(parent, whole, None) if linear is None else linear)


def _linear(module: nn.Module | None) -> Linear:
    if isinstance(module, LowBitLinear):
        return Linear(torch.empty(0), None if module.bias is None else module.bias.detach(), module.low_bit)
    found = None if module is None else plain(module)
    if found is None or not found[0].is_contiguous():
        raise NotRecognisedError(f"{type(module).__name__} is no plain linear layer")
    return Linear(found[0].detach(), None if found[1] is None else found[1].detach())


def _activation(mlp: nn.Module) -> Activation:
    activation = getattr(mlp, "act_fn", getattr(mlp, "activation_fn", None))
    found = activation_of(activation, ACTIVATIONS)
    if found is None:
        raise NotRecognisedError(f"{type(mlp).__name__}: an activation of another kind: {activation}")
    return found


def _check_layer(read: DeviceLayer, layer: Any, spec: KVCacheSpec) -> None:  # noqa: ANN401 (of any architecture)
    if spec.v_head_size is not None:
        raise NotRecognisedError(f"values of {spec.v_head_size} features, keys of {spec.head_size}")
    if any(norm is not None and norm.numel() != read.size for norm in (read.query_norm, read.key_norm)):
        raise NotRecognisedError(f"norms over more than a head of {read.size} features")
    norms = [each for each in (*layer.children(), *layer.self_attn.children()) if type(each).__name__.endswith("Norm")]
    if {norm_factor(norm)[1] for norm in norms} != {read.epsilon}:
        raise NotRecognisedError(f"{type(layer).__name__}: norms of more than one epsilon")


def _embedding_scale(model: PreTrainedModel, stack: tuple[nn.Module, str], embedding: torch.Tensor) -> float:
    """The number that the embedding is multiplied by, found from what the first layer is handed."""
    ids = torch.cat(tokens(model))
    found = noted(model, stack, ids, torch.arange(len(ids), device=ids.device)).hidden.float()
    rows = functional.embedding(ids, embedding).float()
    scale = float((found * rows).sum() / rows.square().sum())
    # Architectures round the number to the model's dtype.
    scale = 1.0 if abs(scale - 1) < UNSCALED else float(torch.tensor(scale, dtype=embedding.dtype))
    if not float((found - rows * scale).norm()) < SCALE_ERROR * float(found.norm()):
        raise NotRecognisedError("the layers are handed something else than the embedding")
    return scale
