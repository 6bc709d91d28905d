"""The entry point offers the loader without importing torch."""

from __future__ import annotations

import subprocess
import sys

from folo_core.config import EngineConfig, ModelConfig
from folo_core.execution.interface import LoadedModel
from folo_core.execution.loading import ModelLoader
from folo_hf.loader import HfLoader
from folo_hf.plugin import folo_model_loaders


def test_the_plugin_offers_the_loader(llama):
    (spec,) = folo_model_loaders()
    assert spec.name == "hf"
    assert spec.can_load("anything/at-all")
    loader = spec.factory(EngineConfig(model=ModelConfig(model=str(llama))))
    assert isinstance(loader, HfLoader)
    assert isinstance(loader, ModelLoader)
    assert isinstance(loader.load_model(loader.load_tokenizer()), LoadedModel)


def test_the_entry_point_is_light():
    code = "import sys, folo_hf.plugin as p; p.folo_model_loaders(); assert not {'torch', 'jinja2'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_a_model_runs_only_with_a_backend(llama):
    import pytest
    import torch

    model = HfLoader(EngineConfig(model=ModelConfig(model=str(llama), device="cpu"))).load_model(None)
    with pytest.raises(RuntimeError, match="bind"):
        model.forward(torch.tensor([1]), torch.tensor([0]), torch.tensor([0]), None)
