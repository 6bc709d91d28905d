"""Device and dtype on every kind of machine, with faked hardware; and on a real GPU where there is one (R11)."""

from __future__ import annotations

import attrs
import pytest
import torch
from tiny_models import PagedDecoder, make_loader, save_model

from folo_core.errors import ModelLoadError
from folo_hf.device import TorchProbe, resolve_device, resolve_dtype


@attrs.frozen
class Machine:
    """CUDA devices: name and compute capability of each."""

    devices: tuple[tuple[str, tuple[int, int]], ...] = ()

    def cuda_devices(self):
        return len(self.devices)

    def cuda_capability(self, index):
        return self.devices[index][1]

    def cuda_name(self, index):
        return self.devices[index][0]


CPU = Machine()
P100, V100, T4, A100, H100 = (
    Machine(((name, capability),))
    for name, capability in {
        "P100": (6, 0), "V100": (7, 0), "T4": (7, 5), "A100": (8, 0), "H100": (9, 0),
    }.items()
)  # fmt: skip
K80 = Machine((("K80", (3, 7)),))
MIXED = Machine((("V100", (7, 0)), ("H100", (9, 0))))


@pytest.mark.parametrize(
    ("machine", "device", "dtype"),
    [
        (CPU, "cpu", "float32"), (K80, "cuda:0", "float32"), (P100, "cuda:0", "float16"), (V100, "cuda:0", "float16"),
        (T4, "cuda:0", "float16"), (A100, "cuda:0", "bfloat16"), (H100, "cuda:0", "bfloat16"),
        (MIXED, "cuda:0", "float16"),
    ],
)  # fmt: skip
def test_auto(machine, device, dtype):
    assert resolve_device("auto", machine) == device
    assert resolve_dtype("auto", device, machine) == dtype


@pytest.mark.parametrize(
    ("machine", "device", "resolved"),
    [(H100, "cpu", "cpu"), (H100, "cuda", "cuda:0"), (MIXED, "cuda:1", "cuda:1"), (CPU, "cpu", "cpu")],
)
def test_explicit_device(machine, device, resolved):
    assert resolve_device(device, machine) == resolved


@pytest.mark.parametrize(("machine", "device"), [(CPU, "cuda"), (H100, "cuda:1"), (H100, "tpu"), (H100, "cuda:x")])
def test_device_that_is_not_there(machine, device):
    with pytest.raises(ModelLoadError, match=f"device: '{device}'"):
        resolve_device(device, machine)


@pytest.mark.parametrize(
    ("machine", "device", "dtype"),
    [
        (CPU, "cpu", "float16"), (CPU, "cpu", "bfloat16"), (CPU, "cpu", "float32"), (H100, "cuda:0", "float32"),
        (H100, "cuda:0", "float16"), (V100, "cuda:0", "float16"), (V100, "cuda:0", "float32"),
        (MIXED, "cuda:1", "bfloat16"),
    ],
)  # fmt: skip
def test_explicit_dtype_is_honoured(machine, device, dtype):
    assert resolve_dtype(dtype, device, machine) == dtype


@pytest.mark.parametrize(
    ("machine", "dtype", "words"),
    [(V100, "bfloat16", ("V100", "7.0", "8.0", '"float16"')), (K80, "float16", ("K80", "3.7", "5.3", '"float32"'))],
)
def test_explicit_dtype_is_refused_with_the_reason(machine, dtype, words):
    with pytest.raises(ModelLoadError, match=f"dtype: '{dtype}'") as error:
        resolve_dtype(dtype, "cuda:0", machine)
    assert all(word in str(error.value) for word in words)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_the_model_is_loaded_in_the_dtype(tmp_path, llama_config, dtype):
    folder = save_model(tmp_path, llama_config)
    model = make_loader(folder, skip_tokenizer_init=True, dtype=dtype).load_model(None)
    assert model.info.dtype == dtype
    assert {parameter.dtype for parameter in model.module.parameters()} == {getattr(torch, dtype)}
    assert model.kv_cache_specs[0].dtype == getattr(torch, dtype)
    _, (logits,) = PagedDecoder(model).run([[3, 4, 5]], 3)
    assert logits.isfinite().all()


def test_a_half_precision_checkpoint_is_widened_on_a_cpu(tmp_path, llama_config):
    folder = save_model(tmp_path, llama_config, dtype=torch.bfloat16)
    assert make_loader(folder, skip_tokenizer_init=True).load_model(None).info.dtype == "float32"


def test_no_cuda_here_is_refused_before_anything_is_read(tmp_path):
    loader = make_loader(tmp_path, hardware=CPU, device="cuda", skip_tokenizer_init=True)
    with pytest.raises(ModelLoadError, match="0 CUDA devices"):
        loader.load_model(None)


def test_torch_agrees_with_the_probe():
    assert TorchProbe().cuda_devices() == (torch.cuda.device_count() if torch.cuda.is_available() else 0)


@pytest.mark.gpu
def test_auto_on_this_gpu(tmp_path, llama_config):
    folder = save_model(tmp_path, llama_config)
    model = make_loader(folder, device="auto", skip_tokenizer_init=True).load_model(None)
    capability = torch.cuda.get_device_capability()
    assert model.info.dtype == ("bfloat16" if capability >= (8, 0) else "float16")
    assert model.device == torch.device("cuda:0")


@pytest.mark.gpu
def test_this_gpu_decodes_as_the_cpu_does(tmp_path, llama_config):
    folder = save_model(tmp_path, llama_config)
    prompts = [[5, 9, 33, 7, 60, 61, 8, 8, 90, 11], [40], list(range(10, 40))]
    runs = []
    for device in ("cpu", "cuda"):
        loader = make_loader(folder, device=device, dtype="float32", skip_tokenizer_init=True)
        runs.append(PagedDecoder(loader.load_model(None)).run(prompts, 10))
    (tokens, logits), (gpu_tokens, gpu_logits) = runs
    assert gpu_tokens == tokens
    torch.testing.assert_close(torch.stack(gpu_logits).cpu(), torch.stack(logits), rtol=0, atol=2e-3)
