"""The attention interface: backends own the KV tensors and attend over blocks."""
