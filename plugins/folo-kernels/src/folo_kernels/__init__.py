"""Native kernels for CPUs, called through a plain C interface. A library: it knows nothing of Folo's own types."""
