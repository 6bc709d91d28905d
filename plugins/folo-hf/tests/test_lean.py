"""A lean start spares imports, the probe and renaming patterns, and loads the same model."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers
from tiny_models import ARCHITECTURES, make_loader, save_model
from transformers.utils import import_utils

import folo_hf.decoder
import folo_hf.loader
from folo_core.errors import ModelLoadError
from folo_hf import gguf, lean
from folo_hf.cache import cache_folder
from folo_kernels.library import why_not

BIG = ("sympy", "torch.distributed.tensor", "torch._dynamo.convert_frame")


def run_python(code, **variables):
    """What a fresh process prints, as JSON; imports start lean in it if the variables say so."""
    done = subprocess.run(
        [sys.executable, "-c", f"import json, sys; {code}"],
        env={**os.environ, **variables},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


IMPORTED = (
    "from folo_hf import lean; lean.install(); import folo_hf.loader; "
    f"print(json.dumps([name in sys.modules for name in {BIG}]))"
)


def test_a_lean_start_imports_none_of_the_big_packages():
    assert run_python(IMPORTED, FOLO_LEAN_START="1") == [False, False, False]


@pytest.mark.parametrize("variables", [{}, {"FOLO_LEAN_START": "0"}, {"FOLO_LEAN_START": "1", "WORLD_SIZE": "2"}])
def test_without_the_variable_or_in_a_distributed_launch_imports_are_whole(variables):
    assert run_python(IMPORTED, **variables) == [True, True, True]


def test_the_compiler_works_after_a_lean_start():
    code = """
from folo_hf import lean; lean.install()
import folo_hf.loader, torch
deferred = type(torch._dynamo).__name__
@torch.compiler.disable(recursive=False)
def plain(x): return x * 2
compiled = torch.compile(lambda x: plain(x) + 1, backend="eager")
print(json.dumps([deferred, compiled(torch.ones(2)).tolist(), type(torch._dynamo).__name__]))
"""
    assert run_python(code, FOLO_LEAN_START="1") == ["_Deferred", [3.0, 3.0], "module"]


COMPLETED = "'torch._meta_registrations' in sys.modules"


@pytest.mark.parametrize(
    "use",
    [
        "torch.device('meta').__enter__()",
        "from torch._subclasses.fake_tensor import FakeTensorMode; FakeTensorMode()",
        "torch.compile(lambda x: x + 1, backend='eager')(torch.ones(2))",
        "import torch._dynamo.config",
    ],
)
def test_torch_is_completed_before_it_calculates_shapes(use):
    code = f"""
from folo_hf import lean; lean.install()
import folo_hf.loader, torch
before = {COMPLETED}
{use}
print(json.dumps([before, {COMPLETED}]))
"""
    assert run_python(code, FOLO_LEAN_START="1") == [False, True]


LOAD = f"""
from folo_hf import lean; lean.install()
import os, pathlib
from folo_core.config import EngineConfig, ModelConfig
from folo_hf.loader import HfLoader
from folo_hf.probe import _own_logits
results, completed = {{}}, {{}}
for folder in sorted(pathlib.Path(os.environ["MODELS"]).iterdir()):
    loader = HfLoader(EngineConfig(model=ModelConfig(model=str(folder), device="cpu", skip_tokenizer_init=True)))
    for _ in range(2):
        model = loader.load_model(None)
    results[folder.name] = _own_logits(model.module, model._bridge).tolist()
    completed[folder.name] = {COMPLETED}
print(json.dumps([results, completed]))
"""


def test_a_lean_process_computes_what_any_other_does(tmp_path):
    for name, config in ARCHITECTURES.items():
        save_model(tmp_path / "models" / name, config())
    common = {"MODELS": str(tmp_path / "models"), "FOLO_CACHE_DIR": str(tmp_path / "cache")}
    lean_results, completed = run_python(LOAD, FOLO_LEAN_START="1", **common)
    results, _ = run_python(LOAD, FOLO_LEAN_START="0", **common)
    assert results.keys() == ARCHITECTURES.keys()
    assert lean_results == results
    assert not completed["cohere2"], "the lean way was left"


def test_a_function_that_the_compiler_was_to_leave_whole_is_known_to_it_once_it_runs():
    code = """
from folo_hf import lean; lean.install()
import torch
def leaf(x): return x
assert torch._dynamo.allow_in_graph(leaf) is leaf
torch._dynamo.optimize
print(json.dumps([type(torch._dynamo).__name__, id(leaf) in torch._dynamo.trace_rules._allowed_callable_ids]))
"""
    assert run_python(code, FOLO_LEAN_START="1") == ["module", True]


def test_a_mask_function_gets_the_real_class_of_a_deferred_module():
    code = """
from folo_hf import lean; lean.install()
from transformers import masking_utils
import torch
mode = masking_utils.TransformGetItemToIndex()
print(json.dumps([type(mode).__module__, isinstance(mode, torch.overrides.TorchFunctionMode)]))
"""
    expected = ["torch._dynamo._trace_wrapped_higher_order_op", True]
    assert run_python(code, FOLO_LEAN_START="1") == expected


def test_the_list_of_modules_is_kept_and_is_what_transformers_finds():
    code = """
from folo_hf import lean; lean.install()
import transformers
print(json.dumps(sorted(transformers._class_to_module.items())))
"""
    first, second = (run_python(code, FOLO_LEAN_START="1") for _ in range(2))
    (kept,) = (cache_folder() / "transformers").glob("*.json")
    assert first == second == run_python(code)
    whole = import_utils.create_import_structure_from_path(Path(transformers.__file__).parent / "models")
    assert lean._decode(json.loads(kept.read_text())) == whole
    kept.write_text('{"names": 3}')
    assert run_python(code, FOLO_LEAN_START="1") == first


@pytest.fixture
def asked(monkeypatch, tmp_path):
    monkeypatch.setenv("FOLO_LEAN_START", "1")
    monkeypatch.setenv("FOLO_CACHE_DIR", str(tmp_path / "cache"))


def load(folder, **options):
    return make_loader(folder, skip_tokenizer_init=True, **options).load_model(None)


def tensors(model):
    return {**dict(model.module.named_parameters()), **dict(model.module.named_buffers())}


def count_trials(monkeypatch):
    trials = []
    check = folo_hf.decoder._check
    monkeypatch.setattr(folo_hf.decoder, "_check", lambda *a: trials.append(1) or check(*a))
    return trials


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_a_remembered_start_loads_the_same_model(name, tmp_path, monkeypatch, asked):
    folder = save_model(tmp_path / "model", ARCHITECTURES[name]())
    monkeypatch.setenv("FOLO_LEAN_START", "0")
    general = load(folder)
    monkeypatch.setenv("FOLO_LEAN_START", "1")
    load(folder)
    monkeypatch.setattr(folo_hf.loader, "probe", None)
    trials = count_trials(monkeypatch)
    remembered = load(folder)
    whole = general._decoder is not None and general._decoder.is_whole
    assert not (whole and trials)
    assert whole == (remembered._decoder is not None and remembered._decoder.is_whole)
    assert remembered.info == general.info
    assert remembered.kv_cache_specs == general.kv_cache_specs
    assert list(remembered._layers.values()) == list(general._layers.values())
    wanted, got = tensors(general), tensors(remembered)
    assert wanted.keys() == got.keys()
    for key, value in wanted.items():
        torch.testing.assert_close(got[key], value, rtol=0, atol=0, msg=key)
        assert got[key].dtype == value.dtype
    outputs = [folo_hf.probe._own_logits(each.module, each._bridge) for each in (general, remembered)]
    assert torch.equal(*outputs)


@pytest.mark.skipif(why_not() is not None, reason="no kernels for this machine")
@pytest.mark.parametrize("refused", [True, False])
def test_the_trial_of_the_kernels_is_spared_only_once_it_was_passed(refused, tmp_path, monkeypatch, asked):
    folder = save_model(tmp_path / "model", ARCHITECTURES["llama"]())
    with monkeypatch.context() as first:
        if refused:
            first.setattr(folo_hf.decoder, "TOLERANCE", -1.0)
        load(folder)
    trials = count_trials(monkeypatch)
    assert load(folder)._decoder.is_whole
    assert len(trials) == refused


def findings():
    return sorted((cache_folder() / "findings").glob("*.json"))


def test_what_renames_weights_is_remembered_as_such(tmp_path, asked):
    load(save_model(tmp_path / "plain", ARCHITECTURES["llama"]()))
    (plain,) = findings()
    assert json.loads(plain.read_text())["plain_names"] is True
    load(save_model(tmp_path / "merged", ARCHITECTURES["mixtral"]()))
    (merged,) = set(findings()) - {plain}
    assert json.loads(merged.read_text())["plain_names"] is False


@pytest.mark.parametrize("change", ["weights", "config", "options", "broken", "layer"])
def test_the_probe_runs_again_when_anything_changed(change, tmp_path, monkeypatch, asked):
    folder = save_model(tmp_path / "model", ARCHITECTURES["llama"]())
    load(folder)
    calls = []
    probe = folo_hf.loader.probe
    monkeypatch.setattr(folo_hf.loader, "probe", lambda *a: calls.append(1) or probe(*a))
    load(folder)
    assert not calls
    options = {}
    (finding,) = findings()
    if change == "weights":
        os.utime(folder / "model.safetensors", ns=(1, 1))
    elif change == "config":
        (folder / "config.json").write_text((folder / "config.json").read_text() + "\n")
    elif change == "options":
        options = {"max_model_len": 64}
    elif change == "broken":
        finding.write_text("[")
    else:
        content = json.loads(finding.read_text())
        content["shape"]["layers"][0] = "elsewhere"
        finding.write_text(json.dumps(content))
    load(folder, **options)
    assert calls == [1]


def test_without_asking_nothing_is_remembered(tmp_path, monkeypatch, asked):
    monkeypatch.delenv("FOLO_LEAN_START")
    load(save_model(tmp_path / "model", ARCHITECTURES["llama"]()))
    assert not (cache_folder() / "findings").exists()


def test_a_remembered_start_still_refuses_an_incomplete_checkpoint(tmp_path, monkeypatch, asked):
    from safetensors.torch import load_file, save_file

    folder = save_model(tmp_path / "model", ARCHITECTURES["llama"]())
    load(folder)
    monkeypatch.setattr(folo_hf.remembered.Memory, "plain_names", True)
    weights = load_file(folder / "model.safetensors")
    weights.pop("model.norm.weight")
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelLoadError, match=r"lacks 1 weights \(model.norm.weight\)"):
        load(folder)


def test_a_constructor_that_mixes_ranges_and_parameters_is_loaded_the_general_way(tmp_path, monkeypatch, asked):
    folder = save_model(tmp_path / "model", ARCHITECTURES["llama"]())
    init = transformers.LlamaModel.__init__

    def mixing(self, config):
        init(self, config)
        self.scales = self.norm.weight + torch.arange(len(self.norm.weight))

    monkeypatch.setattr(transformers.LlamaModel, "__init__", mixing)
    assert load(folder).module.model.scales.shape == (32,)


def test_a_cache_that_cannot_be_written_is_no_error(tmp_path, monkeypatch, asked):
    (tmp_path / "file").touch()
    monkeypatch.setenv("FOLO_CACHE_DIR", str(tmp_path / "file"))
    assert load(save_model(tmp_path / "model", ARCHITECTURES["llama"]())).info.num_layers == 2


def test_a_gguf_file_is_read_again_only_after_it_was_touched(tmp_path, monkeypatch, asked):
    file = tmp_path / "model.gguf"
    file.write_bytes(b"GGUF one")
    first = gguf.fingerprint(file)
    reads = []
    digest = gguf._digest
    monkeypatch.setattr(gguf, "_digest", lambda path: reads.append(path) or digest(path))
    assert gguf.fingerprint(file) == first
    assert not reads
    file.write_bytes(b"GGUF two")
    second = gguf.fingerprint(file)
    assert reads == [file]
    assert second == digest(file) != first
    for note in (cache_folder() / "gguf").glob("*.json"):
        note.write_text('[[], "x"]')
    assert gguf.fingerprint(file) == second
    assert reads == [file, file]
