"""Compiles the kernels of ``folo_kernels.gpu.attention`` for compute capability 9.0; no device is needed for that.

A program of its own, because a process that interprets Triton's kernels cannot compile them.
"""

from __future__ import annotations

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from folo_kernels.gpu import attention_kernels as kernels
from folo_kernels.gpu.attention import HOPPER

FLOATS = {"partials", "partial_tops"}
PLANS = {"counters", "header", "items", "rows", "tables", "tiles"}
SCALARS = {"factor": "fp32", "cap": "fp32", "v_scale": "fp32"}
TENSORS = {"query", "keys", "values", "out", "key", "value"}
SIZES = {"GROUP": 2, "KV_HEADS": 8, "KEY_SIZE": 128, "VALUE_SIZE": 128, "KEY_TILE": 128, "VALUE_TILE": 128}
SIZES |= {"BLOCK_SIZE": 16, "PRECISION": "tf32x3"}
DECODE = {**SIZES, "ROW_TILE": 16, "SHARED_TILE": 32, "SHARED_BLOCK_N": 32, "GROUP_TILE": 2, "PARTS": 16}
PLAIN, ALL = {"SOFTCAP": False, "WINDOW": False}, {"SOFTCAP": True, "WINDOW": True}
STORE = {name: SIZES[name] for name in ("KV_HEADS", "KEY_SIZE", "VALUE_SIZE", "KEY_TILE", "VALUE_TILE", "BLOCK_SIZE")}
CASES = [
    (kernels.decode_kernel, HOPPER.decode, {**DECODE, **PLAIN, "HAS_SHARED": True}, False),
    (kernels.decode_kernel, HOPPER.few, {**DECODE, **ALL, "HAS_SHARED": True}, True),
    (kernels.decode_kernel, HOPPER.single, {**DECODE, **PLAIN, "HAS_SHARED": False}, True),
    (kernels.prefill_kernel, HOPPER.prefill, {**SIZES, **PLAIN, "TOKENS": 64, "BLOCK_M": 128}, False),
    (kernels.store_kernel, None, {**STORE, "HEADS_TILE": 8}, False),
]


def kind(name):
    """An argument's type."""
    if name in TENSORS:
        return "*bf16"
    if name in FLOATS:
        return "*fp32"
    return "*i32" if name in PLANS else SCALARS.get(name, "*i64" if name == "slots" else "i32")


def compile_all():
    """Compile every case; tensors begin, and their rows are apart, at multiples of 16 bytes, as they do in a step."""
    for kernel, config, chosen, pdl in CASES:
        constants = dict(chosen)
        if config is not None:
            constants["BLOCK_N"] = config.block_n
        if "PDL" in kernel.arg_names:
            constants["PDL"] = pdl
        signature = {name: "constexpr" if name in constants else kind(name) for name in kernel.arg_names}
        indices = {(kernel.arg_names.index(name),): value for name, value in constants.items()}
        aligned = [i for i, name in enumerate(signature) if "*" in signature[name] or name.endswith("stride")]
        attributes = {(i,): [["tt.divisibility", 16]] for i in aligned}
        source = ASTSource(fn=kernel, signature=signature, constexprs=indices, attrs=attributes)
        options = {"num_warps": config.num_warps, "num_stages": config.num_stages} if config else {}
        made = triton.compile(source, target=GPUTarget("cuda", 90, 32), options={**options, "launch_pdl": pdl})
        assert ("griddepcontrol" in made.asm["ptx"]) == pdl
        assert made.metadata.shared <= 227 * 1024
        print(kernel.__name__)  # noqa: T201 (read by the test)


if __name__ == "__main__":
    compile_all()
