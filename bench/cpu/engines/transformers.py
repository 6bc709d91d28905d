"""transformers' ``generate``: one by one, in static batches, or with a static cache and a compiled forward pass."""

from __future__ import annotations

from typing import Any


class Generate:
    """A model with the generation mode that the options name."""

    def __init__(self, options: dict[str, Any]) -> None:
        import torch
        import transformers

        torch.set_num_threads(options["threads"])
        self._options = options
        self._model: Any = transformers.AutoModelForCausalLM.from_pretrained(
            options["weights"], dtype=torch.float32
        ).eval()
        # Lengths are the workload's, so nothing stops early; any token may fill masked places.
        self._model.generation_config.eos_token_id = None
        self._model.generation_config.pad_token_id = 0
        self.describes = {"transformers": transformers.__version__, "torch": torch.__version__}

    def run(self, workload: dict[str, Any]) -> list[list[int]]:
        """Answer in batches sorted by length, the order in which padding wastes the least."""
        prompts, new = workload["prompts"], workload["new"]
        size = self._options["batch"]
        order = sorted(range(len(prompts)), key=lambda i: (new[i], len(prompts[i])))
        answers: dict[int, list[list[int]]] = {}
        for start in range(0, len(order), size):
            chosen = order[start : start + size]
            rows = self._batch([prompts[i] for i in chosen], max(new[i] for i in chosen), workload)
            each = len(rows) // len(chosen)
            for place, i in enumerate(chosen):
                answers[i] = [row[: new[i]] for row in rows[place * each : (place + 1) * each]]
        return [answer for i in range(len(prompts)) for answer in answers[i]]

    def warm(self, workload: dict[str, Any]) -> None:
        """Run a little; or, where a shape is compiled, all of it."""
        short = workload if self._options.get("cache") == "static" else {**workload, "new": [4] * len(workload["new"])}
        self.run(short)

    def _batch(self, prompts: list[list[int]], new: int, workload: dict[str, Any]) -> list[list[int]]:
        import torch

        width = max(map(len, prompts))
        ids = torch.tensor([[0] * (width - len(prompt)) + prompt for prompt in prompts])
        mask = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts])
        with torch.inference_mode():
            output = self._model.generate(
                input_ids=ids, attention_mask=mask, max_new_tokens=new, **self._strategy(workload)
            )
        rows: list[list[int]] = output[:, width:].tolist()
        return rows

    def _strategy(self, workload: dict[str, Any]) -> dict[str, Any]:
        static = {"cache_implementation": "static"} if self._options.get("cache") == "static" else {}
        if workload["kind"] == "beam":
            beams = {"num_beams": workload["width"], "length_penalty": 1.0, "early_stopping": False}
            return {"do_sample": False, **beams, **static}
        if workload["kind"] == "sample":
            plain = {"temperature": 1.0, "top_k": 0, "top_p": 1.0}
            return {"do_sample": True, "num_return_sequences": workload["width"], **plain, **static}
        return {"do_sample": False, **static}


def load(options: dict[str, Any]) -> Generate:
    """Load the model."""
    return Generate(options)
