"""Kernels for CUDA devices, written in Triton. Importing this package imports neither torch nor Triton.

``attention`` and ``layers`` import Triton: import them where a CUDA device is at hand, or in Triton's interpreter.
"""
