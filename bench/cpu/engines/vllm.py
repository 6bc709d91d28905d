"""vLLM's CPU build, its engine in this process."""

from __future__ import annotations

from typing import Any


class Vllm:
    """One engine.

    The prefix cache is off, because every round sends the same prompts; but for beam search, which sends all beams
    anew for each token and can do with nothing less. It is emptied before each run.
    """

    def __init__(self, options: dict[str, Any]) -> None:
        import torch
        import vllm

        self._llm: Any = vllm.LLM(
            model=options["weights"], dtype="float32", max_model_len=options["longest"],
            max_num_seqs=options.get("max_num_seqs", options["width"]), enforce_eager=options["eager"],
            enable_prefix_caching=options.get("prefix_caching", False), disable_log_stats=True, seed=0,
        )  # fmt: skip
        self.describes = {"vllm": vllm.__version__, "torch": torch.__version__}

    def run(self, workload: dict[str, Any]) -> list[list[int]]:
        """Send all requests at once."""
        from vllm import SamplingParams

        self._llm.reset_prefix_cache()
        prompts = [{"prompt_token_ids": prompt} for prompt in workload["prompts"]]
        if workload["kind"] == "beam":
            return self._beam(prompts, workload)
        n = workload["width"] if workload["kind"] == "sample" else 1
        common = {"n": n, "temperature": 1.0 if n > 1 else 0.0, "ignore_eos": True, "detokenize": False}
        params = [SamplingParams(max_tokens=new, **common) for new in workload["new"]]
        outputs = self._llm.generate(prompts, params, use_tqdm=False)
        return [list(answer.token_ids) for output in outputs for answer in output.outputs]

    def _beam(self, prompts: list[dict[str, Any]], workload: dict[str, Any]) -> list[list[int]]:
        from vllm.sampling_params import BeamSearchParams

        new = workload["new"][0]
        params = BeamSearchParams(
            beam_width=workload["width"], max_tokens=new, ignore_eos=True, temperature=0.0, length_penalty=1.0
        )
        outputs = self._llm.beam_search(prompts, params)
        # Its sequences begin with the prompt.
        return [list(output.sequences[0].tokens[-new:]) for output in outputs]


def load(options: dict[str, Any]) -> Vllm:
    """Load the model."""
    return Vllm(options)
