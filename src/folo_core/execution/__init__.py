"""How a scheduled step becomes logits and tokens."""
