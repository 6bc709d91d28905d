"""The step loop and what stands at its two ends: prompts in, text out."""
