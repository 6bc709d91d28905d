"""Stands for FlashInfer: reads pages by its documented rules, one number after the other, in float64.

A wrapper keeps what ``plan`` was given; ``run`` takes queries and two caches ``[pages, page_size, kv_heads, size]``.
"""

from __future__ import annotations

import torch


def dense(query, key, value, *, scale, window, softcap):  # noqa: PLR0913 (what attention depends on)
    """Causal attention of one sequence's last tokens, head by head, in float64."""
    count, heads, _ = query.shape
    length, kv_heads, _ = key.shape
    output = torch.zeros(query.shape, dtype=torch.float64)
    for row in range(count):
        position = length - count + row
        begin = 0 if window is None else max(0, position - window + 1)
        for head in range(heads):
            kv = head // (heads // kv_heads)
            scores = key[begin : position + 1, kv].double() @ query[row, head].double() * scale
            if softcap:
                scores = torch.tanh(scores / softcap) * softcap
            output[row, head] = torch.softmax(scores, 0) @ value[begin : position + 1, kv].double()
    return output


class _Wrapper:
    def __init__(self, workspace, layout, **options):
        assert layout == "NHD"
        assert workspace.dtype == torch.uint8
        self.options = options
        self.plans = 0

    def _keep(self, query_start, page_start, page_ids, last_page_len, shape, options):  # noqa: PLR0913, PLR0917 (a plan)
        for tensor in (query_start, page_start, page_ids, last_page_len):
            assert (tensor.dtype, tensor.device.type, tensor.is_contiguous()) == (torch.int32, "cpu", True)
        assert len(page_start) == len(query_start) == len(last_page_len) + 1
        assert page_start[-1] == len(page_ids)
        self.plans += 1
        self.kept = query_start.tolist(), page_start.tolist(), page_ids, last_page_len.tolist()
        self.shape, self.planned = shape, options

    def run(self, query, cache):
        keys, values = cache
        query_start, page_start, page_ids, last_page_len = self.kept
        heads, kv_heads, size, page_size = self.shape
        assert query.shape == (query_start[-1], heads, size)
        assert keys.shape[1:] == values.shape[1:] == (page_size, kv_heads, size)
        assert query.dtype == keys.dtype == self.planned["q_data_type"] == self.planned["kv_data_type"]
        left = self.planned["window_left"]
        output = torch.empty_like(query)
        for i, last in enumerate(last_page_len):
            pages = page_ids[page_start[i] : page_start[i + 1]].long()
            length = (len(pages) - 1) * page_size + last
            key, value = (cache[pages].flatten(0, 1)[:length] for cache in (keys, values))
            rows = slice(query_start[i], query_start[i + 1])
            output[rows] = dense(
                query[rows], key, value, scale=self.planned["sm_scale"], window=None if left < 0 else left + 1,
                softcap=self.planned["logits_soft_cap"],
            ).to(query.dtype)  # fmt: skip
        return output


class BatchDecodeWithPagedKVCacheWrapper(_Wrapper):
    def plan(self, indptr, indices, last_page_len, heads, kv_heads, size, page_size, **options):  # noqa: PLR0913, PLR0917
        query_start = torch.arange(len(indptr), dtype=torch.int32)
        self._keep(query_start, indptr, indices, last_page_len, (heads, kv_heads, size, page_size), options)


class BatchPrefillWithPagedKVCacheWrapper(_Wrapper):
    def plan(  # noqa: PLR0913, PLR0917 (FlashInfer's signature)
        self, qo_indptr, indptr, indices, last_page_len, heads, kv_heads, size, page_size, *, causal, **options
    ):
        assert causal
        self._keep(qo_indptr, indptr, indices, last_page_len, (heads, kv_heads, size, page_size), options)
