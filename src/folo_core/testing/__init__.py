"""For plugin authors: conformance checks, builders of inputs, and hypothesis strategies."""
