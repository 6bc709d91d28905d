"""A plugin of samplers that break the contract, each in a way of its own, and an honest one to compare with."""

from __future__ import annotations

import attrs

from folo_core.plugins import hookimpl
from folo_core.plugins.specs import SamplerSpec
from folo_core.sampling_params import SamplingParams
from folo_core.validation import integer


@attrs.frozen(slots=True, kw_only=True)
class Width(SamplingParams):
    """Parameters of strategies with several rows."""

    width: int = attrs.field(default=2, metadata=integer(low=1))
    """Rows at once."""

    @property
    def num_sequences(self):
        return self.width

    @property
    def grows_in_place(self):
        return False


@attrs.frozen(slots=True, kw_only=True)
class AcceptsAnything(SamplingParams):
    """Parameters without rules."""

    depth: int = 3
    """How deep to look."""


PLAIN = {
    "honest": "keeps the contract",
    "reads-neighbours": "looks at other requests' logits",
    "global-random": "draws from torch's generator",
    "counts-steps": "draws by the number of its own steps",
    "keeps-state": "forgets to forget",
    "ignores-masks": "chooses masked tokens",
    "returns-foreign": "hands one request's answer to the next",
    "state-by-row": "remembers rows by their place in the batch",
    "loops-over-rows": "works row by row in Python",
    "falls-with-others": "fails everybody when one request is gone",
    "accepts-nonsense": "has parameters without rules",
}
FORKING = {
    "honest-fork": "keeps the contract with two rows",
    "loses-answers": "returns one of the two answers that were asked for",
    "never-ends": "starts a row anew whenever it is about to end",
    "undeclared-fork": "forks without saying so",
    "too-wide": "has more rows than it reserves",
    "not-steady": "says that its rows only go on, and forks",
}


def _spec(name, text, base):
    params = (
        AcceptsAnything
        if name == "accepts-nonsense"
        else attrs.make_class(
            name.title().replace("-", ""), {}, bases=(base,), frozen=True, slots=True, kw_only=True, repr=False
        )
    )
    params.__doc__ = f"Parameters of {name}."

    def build(context):
        from acme_broken import samplers

        return getattr(samplers, name.title().replace("-", ""))()

    capabilities = set()
    if base is Width and name != "undeclared-fork":
        capabilities = {"forks", "holds"} if name == "never-ends" else {"forks"}
    return SamplerSpec(
        name=name,
        help=text,
        factory=build,
        params_type=params,
        capabilities=capabilities,
        examples=(lambda: [params(n=2)]) if base is Width else None,
    )


SPECS = [
    *(_spec(name, text, SamplingParams) for name, text in PLAIN.items()),
    *(_spec(name, text, Width) for name, text in FORKING.items()),
]


@hookimpl
def folo_samplers():
    """Offer them all."""
    return SPECS
