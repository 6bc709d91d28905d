"""The bridge between transformers' attention layers and an ``AttentionBackend``.

transformers looks its attention function up by name. Each loaded model registers a name of its own, bound to its own
``AttentionBridge``, so that several engines in one process never share a context.
"""

from __future__ import annotations

import itertools
import weakref
from typing import TYPE_CHECKING, Any, Protocol

import attrs
from transformers import AttentionInterface

from folo_core.errors import UnsupportedModelError

if TYPE_CHECKING:
    import torch

    from folo_core.attention.interface import AttentionBackend, AttentionMetadata

_numbers = itertools.count()

IGNORED_OPTIONS = frozenset(
    {
        "cache_position",
        "deterministic",
        "layer_idx",
        "output_attentions",
        "output_hidden_states",
        "output_router_logits",
        "position_ids",
        "return_dict",
        "token_type_ids",
        "use_cache",
    }
)
"""Options of transformers' attention call that do not change what causal attention computes."""


@attrs.frozen(slots=True, kw_only=True)
class AttentionCall:
    """What one attention layer asks for, besides its tensors."""

    scale: float
    sliding_window: int | None
    softcap: float | None


class AttentionTarget(Protocol):
    """Computes attention for one layer of a packed batch."""

    def attend(
        self, module: torch.nn.Module, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, call: AttentionCall
    ) -> torch.Tensor:
        """Attend causally within each sequence; tensors are ``[num_tokens, heads, size]``."""


class AttentionBridge:
    """Owns the registered name of one model and sends its attention calls to the current target."""

    def __init__(self) -> None:
        self.name = f"folo_{next(_numbers)}"
        self.target: AttentionTarget | None = None
        AttentionInterface.register(self.name, self._call)

    def release(self) -> None:
        """Forget the registered name."""
        _forget(self.name)

    def release_with(self, owner: object) -> None:
        """Forget the registered name when ``owner`` is collected."""
        weakref.finalize(owner, _forget, self.name)

    def _call(
        self,
        module: torch.nn.Module,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: torch.Tensor | None,
        **options: Any,  # noqa: ANN401 (transformers' own signature)
    ) -> tuple[torch.Tensor, None]:
        """Attention as transformers calls it: ``[1, heads, tokens, size]`` in, ``[1, tokens, heads, size]`` out."""
        if self.target is None:
            raise UnsupportedModelError(f"{type(module).__name__} ran before a backend was bound to the model")
        call = read_call(module, query, attention_mask, options)
        query, key, value = (tensor[0].transpose(0, 1) for tensor in (query, key, value))
        return self.target.attend(module, query, key, value, call)[None], None


def _forget(name: str) -> None:
    # transformers offers no way back; its registry is a plain dictionary.
    AttentionInterface._global_mapping.pop(name, None)  # noqa: SLF001


def read_call(
    module: torch.nn.Module, query: torch.Tensor, mask: torch.Tensor | None, options: dict[str, Any]
) -> AttentionCall:
    """Read what a layer asks for.

    Raises:
        UnsupportedModelError: the layer asks for something that paged causal attention would leave out.
    """
    scale, window = options.pop("scaling", None), options.pop("sliding_window", None)
    softcap, causal = options.pop("softcap", None), options.pop("is_causal", None)
    unknown = sorted(key for key, value in options.items() if key not in IGNORED_OPTIONS and not _is_off(value))
    if mask is not None:
        unknown.append("attention_mask")
    if causal is False or getattr(module, "is_causal", True) is False:
        unknown.append("is_causal=False")
    if unknown:
        raise UnsupportedModelError(
            f"{type(module).__name__} asks its attention for {', '.join(unknown)}, which paged attention does not do"
        )
    return AttentionCall(
        scale=query.shape[-1] ** -0.5 if scale is None else float(scale),
        sliding_window=window,
        softcap=softcap,
    )


def _is_off(value: object) -> bool:
    """Whether an option is at its neutral value. A tensor never is."""
    return value is None or (isinstance(value, (bool, int, float)) and value == 0)


class PagedTarget:
    """Sends each layer to an ``AttentionBackend``, with the step's metadata."""

    def __init__(self, backend: AttentionBackend, layers: dict[int, int]) -> None:
        self.metadata: AttentionMetadata | None = None
        self._backend = backend
        self._layers = layers

    def attend(
        self, module: torch.nn.Module, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, call: AttentionCall
    ) -> torch.Tensor:
        """Attend over the blocks of the step's sequences."""
        if self.metadata is None:
            raise RuntimeError("an attention layer ran outside a step")
        return self._backend.forward(
            self._layers[id(module)],
            query,
            key,
            value,
            self.metadata,
            scale=call.scale,
            sliding_window=call.sliding_window,
            softcap=call.softcap,
        )
