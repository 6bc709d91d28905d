"""CTranslate2, from a model that it converted itself."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any


def converted(options: dict[str, Any]) -> Path:
    """Return the model in CTranslate2's format; convert it if no earlier run did."""
    folder = Path(options["cache"]) / "ctranslate2" / Path(options["weights"]).name
    if not (folder / "model.bin").is_file():
        from ctranslate2.converters import TransformersConverter

        partial = folder.with_suffix(".partial")
        TransformersConverter(options["weights"]).convert(str(partial), force=True)
        partial.replace(folder)
    return folder


class Generator:
    """CTranslate2 takes tokens as texts, so ids are looked up in its own vocabulary, outside the measured time."""

    def __init__(self, options: dict[str, Any]) -> None:
        import ctranslate2

        folder = converted(options)
        self._options = options
        self._vocabulary: list[str] = json.loads((folder / "vocabulary.json").read_text(encoding="utf-8"))
        self._generator: Any = ctranslate2.Generator(
            str(folder), device="cpu", compute_type=options["compute_type"], inter_threads=1,
            intra_threads=options["threads"],
        )  # fmt: skip
        self._known: dict[str, list[list[str]]] = {}
        self.describes = {"ctranslate2": ctranslate2.__version__}

    def warm(self, workload: dict[str, Any]) -> None:
        """Look the prompts' tokens up and run a little."""
        self._known[workload["name"]] = [[self._vocabulary[i] for i in prompt] for prompt in workload["prompts"]]
        self.run({**workload, "new": [min(new, 4) for new in workload["new"]]})

    def run(self, workload: dict[str, Any]) -> list[list[int]]:
        """Answer in batches sorted by length; a batch runs as long as its longest answer."""
        prompts, new = self._known[workload["name"]], workload["new"]
        size = self._options["batch"]
        order = sorted(range(len(prompts)), key=lambda i: (new[i], len(prompts[i])))
        answers: dict[int, list[list[int]]] = {}
        for start in range(0, len(order), size):
            chosen = order[start : start + size]
            length = max(new[i] for i in chosen)
            results = self._generator.generate_batch(
                [prompts[i] for i in chosen], min_length=length, max_length=length, include_prompt_in_result=False,
                **self._strategy(workload),
            )  # fmt: skip
            for i, result in zip(chosen, results, strict=True):
                answers[i] = [ids[: new[i]] for ids in result.sequences_ids]
        return [answer for i in range(len(prompts)) for answer in answers[i]]

    @staticmethod
    def _strategy(workload: dict[str, Any]) -> dict[str, Any]:
        if workload["kind"] == "beam":
            return {"beam_size": workload["width"], "length_penalty": 1.0}
        if workload["kind"] == "sample":
            return {"num_hypotheses": workload["width"], "sampling_topk": 0, "sampling_temperature": 1.0}
        return {"beam_size": 1}


def load(options: dict[str, Any]) -> Generator:
    """Load the model."""
    return Generator(options)
