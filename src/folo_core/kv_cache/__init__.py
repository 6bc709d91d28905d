"""Bookkeeping of KV blocks: which are free, who shares which, what must be copied before a write. No tensors here."""
