"""A model loader that draws weights on the device instead of reading them, and leaves all else to the ``hf`` loader.

Writing and reading 16 GB would take longer than what is measured. The numbers are those of the architecture's own
initialisation, the same for the same seed, device and dtype, so a second copy can be built to compare with.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any
from unittest import mock

from folo_core.plugins import hookimpl
from folo_core.plugins.specs import ModelLoaderSpec

if TYPE_CHECKING:
    from collections.abc import Sequence

    import torch
    from transformers import PretrainedConfig, PreTrainedModel

    from folo_core.config import EngineConfig
    from folo_core.execution.interface import LoadedModel
    from folo_core.execution.loading import Tokenizer

SEED = 20


def draw(config: PretrainedConfig, *, dtype: torch.dtype, device: str, attention: str = "sdpa") -> PreTrainedModel:
    """Build a module of this configuration on the device, with random weights."""
    import torch
    from transformers import AutoModelForCausalLM

    devices = [torch.device(device)] if device.startswith("cuda") else []
    with torch.random.fork_rng(devices), torch.device(device):
        torch.manual_seed(SEED)
        module: PreTrainedModel = AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation=attention)
    module.tie_weights()
    return module.to(device).eval()


def _instead_of_reading(_folder: object, **options: Any) -> tuple[PreTrainedModel, dict[str, Any]]:  # noqa: ANN401
    """Stand in for ``AutoModelForCausalLM.from_pretrained`` with the options that the ``hf`` loader gives."""
    device = str(options.get("device_map", "cpu"))
    attention = options["attn_implementation"]
    return draw(options["config"], dtype=options["dtype"], device=device, attention=attention), {}


class RandomLoader:
    """``ModelLoader`` for a folder of ``shapes.write_empty_folder``."""

    def __init__(self, config: EngineConfig) -> None:
        from folo_hf.loader import HfLoader

        self._loader = HfLoader(config)

    def load_tokenizer(self) -> None:
        """Return None, as the ``hf`` loader does with ``skip_tokenizer_init``: a drawn model has no tokenizer."""
        self._loader.load_tokenizer()

    def load_model(self, tokenizer: Tokenizer | None) -> LoadedModel:
        """Load as the ``hf`` loader does, from weights that were never written."""
        from transformers import AutoModelForCausalLM

        with mock.patch.object(AutoModelForCausalLM, "from_pretrained", _instead_of_reading):
            return self._loader.load_model(tokenizer)


@hookimpl
def folo_model_loaders() -> Sequence[ModelLoaderSpec]:
    """Offer ``random``, for those who name it."""
    return [
        ModelLoaderSpec(
            name="random",
            help="random weights of a folder's configuration, drawn on the device",
            factory=RandomLoader,
            can_load=lambda model: False,  # noqa: ARG005 (only by name)
        )
    ]
