"""The hook of folo-tree-search. Importing this module imports no torch; the factory does."""

from __future__ import annotations

from typing import TYPE_CHECKING

from folo_core.plugins import hookimpl
from folo_core.plugins.specs import SamplerSpec
from folo_tree_search.params import TreeSearchParams

if TYPE_CHECKING:
    from folo_core.sampling.interface import Sampler, SamplerContext


def _build(context: SamplerContext) -> Sampler:
    from folo_core.sampling_params import SamplingType
    from folo_tree_search.sampler import TreeSearchSampler

    return TreeSearchSampler(context.plain_sampler(SamplingType.RANDOM))


@hookimpl
def folo_samplers() -> list[SamplerSpec]:
    """Offer ``tree-search``."""
    return [
        SamplerSpec(
            name="tree-search",
            help="best-first search over segments of text, guided by a scoring function",
            capabilities={"forks", "holds"},
            factory=_build,
            params_type=TreeSearchParams,
            examples=lambda: [
                TreeSearchParams(segment_tokens=1, width=4, branching=2, n=2, max_tokens=24),
                TreeSearchParams(segment_tokens=2, width=5, parallel_expansions=2, stopping="first", top_k=9),
            ],
        )
    ]
