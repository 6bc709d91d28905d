"""Compiles the kernels of ``folo_kernels.gpu.products`` for compute capability 9.0; no device is needed for that.

A program of its own, because a process that interprets Triton's kernels cannot compile them.
"""

from __future__ import annotations

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from folo_kernels.gpu import product_kernels

KINDS = {"counters": "*i32", "rows": "i32", "epsilon": "fp32", "head_epsilon": "fp32"}
KINDS |= {"positions": "*i64", "slots": "*i64"}
KINDS |= dict.fromkeys(("factor", "squares", "new_squares", "partials", "query_norm", "key_norm"), "*fp32")
KINDS |= {"x": "tensordesc<bf16[32, 64]>", "weight": "tensordesc<bf16[64, 64]>"}
SIZES = {"INPUTS": 1024, "OUTPUTS": 3072, "BLOCK_ROWS": 32, "BLOCK_OUT": 64, "BLOCK_IN": 64}
HEADS = {"HEADS": 16, "KV_HEADS": 8, "BLOCK_SIZE": 16}

CASES = [
    (product_kernels.product_kernel, {"SPLITS": 1, "PARTS": 16, "ADD": False, "SCALE": False, "PDL": False}),
    (product_kernels.product_kernel, {"SPLITS": 4, "PARTS": 0, "ADD": True, "SCALE": True, "PDL": True}),
    (product_kernels.gated_product_kernel, {"SPLITS": 1, "PARTS": 0, "ACTIVATION": 2, "PDL": True}),
    (product_kernels.gated_product_kernel, {"SPLITS": 2, "PARTS": 16, "ACTIVATION": 1, "PDL": False}),
    (product_kernels.rotated_product_kernel, {**HEADS, "SPLITS": 1, "PARTS": 16, "NORM": True, "PDL": False}),
    (product_kernels.rotated_product_kernel, {**HEADS, "SPLITS": 2, "PARTS": 0, "NORM": False, "PDL": True}),
]


def compile_all():
    for kernel, chosen in CASES:
        constants = {**SIZES, **chosen, "PARTS_TILE": max(1, chosen["PARTS"])}
        constants = {name: value for name, value in constants.items() if name in kernel.arg_names}
        signature = {
            each.name: "constexpr" if each.name in constants else KINDS.get(each.name, "*bf16")
            for each in kernel.params
        }
        indices = {(kernel.arg_names.index(name),): value for name, value in constants.items()}
        source = ASTSource(fn=kernel, signature=signature, constexprs=indices)
        options = {"num_warps": 4, "num_stages": 4, "launch_pdl": chosen["PDL"]}
        made = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)
        assert "wgmma.mma_async" in made.asm["ptx"]
        assert "cp.async.bulk.tensor" in made.asm["ptx"]
        assert ("griddepcontrol" in made.asm["ptx"]) == chosen["PDL"]
        print(kernel.__name__)  # noqa: T201 (read by the test)


if __name__ == "__main__":
    compile_all()
