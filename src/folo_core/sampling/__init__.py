"""How next tokens are chosen: interfaces, batch metadata and counter-based randomness."""
