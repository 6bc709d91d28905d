"""Folo, from the environment that runs the harness."""

from __future__ import annotations

from typing import Any


class Folo:
    """One engine, wide enough for the widest workload."""

    def __init__(self, options: dict[str, Any]) -> None:
        import torch

        from folo_core import LLM, __version__

        torch.set_num_threads(options["threads"])
        more = self._quantised(options)
        self._llm = LLM(
            options["weights"], dtype="float32", max_model_len=options["longest"], max_num_seqs=options["width"],
            skip_tokenizer_init=True, **more,
        )  # fmt: skip
        self.describes = {"folo": __version__, "torch": torch.__version__}

    @staticmethod
    def _quantised(options: dict[str, Any]) -> dict[str, str]:
        """Return the option for weights of fewer bits, or say that this version has none."""
        if "quantization" not in options:
            return {}
        from folo_core.config import EngineConfig
        from folo_core.errors import ConfigError

        chosen = {"quantization": options["quantization"]}
        try:
            EngineConfig.from_options(model=options["weights"], **chosen)
        except ConfigError as error:
            reason = str(error).splitlines()[0].partition(";")[0]
            raise NotImplementedError(f"this version of Folo refuses it: {reason}") from error
        return chosen

    def run(self, workload: dict[str, Any]) -> list[list[int]]:
        """Send all requests at once."""
        params = [self._params(workload, new) for new in workload["new"]]
        outputs = self._llm.generate(workload["prompts"], params, use_tqdm=False)
        wanted = workload["width"] if workload["kind"] == "sample" else 1
        return [answer.token_ids for output in outputs for answer in output.outputs[:wanted]]

    @staticmethod
    def _params(workload: dict[str, Any], new: int) -> Any:  # noqa: ANN401 (each strategy has a class of its own)
        from folo_core import SamplingParams

        common: dict[str, Any] = {"max_tokens": new, "ignore_eos": True, "detokenize": False}
        if workload["kind"] == "beam":
            from folo_beam import BeamParams

            return BeamParams(width=workload["width"], length_penalty=1.0, early_stopping=False, **common)
        if workload["kind"] == "sample":
            return SamplingParams(n=workload["width"], temperature=1.0, seed=0, **common)
        return SamplingParams(temperature=0.0, **common)


def load(options: dict[str, Any]) -> Folo:
    """Load the model."""
    return Folo(options)
