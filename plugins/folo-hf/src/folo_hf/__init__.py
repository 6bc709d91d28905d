"""Model loader of Folo: causal language models of transformers."""
