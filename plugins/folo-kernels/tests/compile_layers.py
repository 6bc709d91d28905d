"""Compiles the kernels of ``folo_kernels.gpu.layers`` for compute capability 9.0; no device is needed for that.

A program of its own, because a process that interprets Triton's kernels cannot compile them.
"""

from __future__ import annotations

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from folo_kernels.gpu import layers

FLOATS = {"factor", "post", "query_norm", "key_norm"}
SCALARS = {"epsilon": "fp32", "post_epsilon": "fp32", "key_factor": "fp32", "value_factor": "fp32"}
SCALARS |= dict.fromkeys(("hidden", "width", "rows", "outputs"), "i32")
OPTIONS = {"num_warps": 4, "num_stages": 3}

ROTATE = {"HEADS": 16, "KV_HEADS": 8, "SIZE": 128, "BLOCK_SIZE": 16, "TOGETHER": 8, "HALF": 64, "REST": 64}
THIN = {"INPUTS": 4096, "NORM": True, "BIAS": True, "ADD": True}
CASES = [
    *((layers._norm_kernel, {"ADD": add, "POST": add, "BLOCK": 4096}) for add in (False, True)),
    (layers._rotate_kernel, {**ROTATE, "ROTARY": 128, "NORM": True}),
    (layers._rotate_kernel, {**ROTATE, "ROTARY": 64, "NORM": False}),
    *((layers._gated_kernel, {"ACTIVATION": number, "BLOCK": 1024}) for number in (1, 2, 3)),
    *(
        (layers._thin_kernel, {**THIN, "ROWS": rows, "BLOCK_OUT": 4, "BLOCK_IN": 256, "ACTIVATION": activation})
        for rows, activation in ((1, 1), (4, 0))
    ),
    *(
        (layers._thin_dot_kernel, {**THIN, "ROWS": 16, "BLOCK_OUT": 16, "BLOCK_IN": 256, "ACTIVATION": activation})
        for activation in (0, 1)
    ),
]


def kind(name, stored):
    """An argument's type."""
    if name in SCALARS:
        return SCALARS[name]
    if name in FLOATS:
        return "*fp32"
    if name in {"keys", "values"}:
        return stored
    return "*i64" if name in {"positions", "slots"} else "*bf16"


def compile_all():
    """Compile every case, in turns for keys and values in bfloat16 and float8, with and without dependent launches."""
    for number, (kernel, chosen) in enumerate(CASES):
        pdl, stored = number % 2 == 0, "*fp8e4nv" if number % 2 else "*bf16"
        constants = {**chosen, "PDL": pdl}
        signature = {
            each.name: "constexpr" if each.name in constants else kind(each.name, stored) for each in kernel.params
        }
        indices = {(kernel.arg_names.index(name),): value for name, value in constants.items()}
        source = ASTSource(fn=kernel, signature=signature, constexprs=indices)
        made = triton.compile(source, target=GPUTarget("cuda", 90, 32), options={**OPTIONS, "launch_pdl": pdl})
        assert ("griddepcontrol" in made.asm["ptx"]) == pdl
        print(kernel.__name__)  # noqa: T201 (read by the test)


if __name__ == "__main__":
    compile_all()
