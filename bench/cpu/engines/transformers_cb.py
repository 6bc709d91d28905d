"""transformers' own continuous batching."""

from __future__ import annotations

from typing import Any

PAGE = 32


class ContinuousBatching:
    """A model and, for each workload, a batching manager that sleeps between runs."""

    def __init__(self, options: dict[str, Any]) -> None:
        import torch
        import transformers

        torch.set_num_threads(options["threads"])
        self._options = options
        self._managers: dict[str, Any] = {}
        self._model: Any = transformers.AutoModelForCausalLM.from_pretrained(
            options["weights"], dtype=torch.float32, attn_implementation=options["attention"]
        ).eval()
        self.describes = {"transformers": transformers.__version__, "torch": torch.__version__}

    def warm(self, workload: dict[str, Any]) -> None:
        """Make the workload's manager and run a little."""
        self._managers[workload["name"]] = self._manager(workload)
        self.run({**workload, "new": [min(new, 4) for new in workload["new"]]})

    def run(self, workload: dict[str, Any]) -> list[list[int]]:
        """Send all requests at once and gather their answers."""
        import torch

        manager = self._managers[workload["name"]]
        with torch.no_grad():
            manager.start()
            try:
                return self._answers(manager, workload)
            finally:
                manager.stop(block=True, keep_for_next_session=True)

    @staticmethod
    def _answers(manager: Any, workload: dict[str, Any]) -> list[list[int]]:  # noqa: ANN401 (an optional library's)
        ids = [
            manager.add_request(prompt, max_new_tokens=new, eos_token_id=-1)
            for prompt, new in zip(workload["prompts"], workload["new"], strict=True)
        ]
        children = workload["width"] - 1 if workload["kind"] == "sample" else 0
        wanted = [name for i in ids for name in (i, *(f"{i}__child#{child}" for child in range(children)))]
        found: dict[str, list[int]] = {}
        while len(found) < len(wanted):
            result = manager.get_result(timeout=1)
            if result is not None and result.is_finished():
                if result.error is not None:
                    raise RuntimeError(result.error)
                found[result.request_id] = result.generated_tokens
            elif result is None and not manager.is_running():
                raise RuntimeError("its generation thread ended early")
        return [found[name] for name in wanted]

    def _manager(self, workload: dict[str, Any]) -> Any:  # noqa: ANN401 (an optional library's)
        from transformers import ContinuousBatchingConfig, GenerationConfig

        rows = len(workload["prompts"]) * (workload["width"] if workload["kind"] == "sample" else 1)
        lengths = [len(prompt) + new for prompt, new in zip(workload["prompts"], workload["new"], strict=True)]
        sampling = {"do_sample": True, "temperature": 1.0, "top_k": 0, "top_p": 1.0}
        strategy: dict[str, Any] = {"do_sample": False}
        if workload["kind"] == "sample":
            strategy = sampling | {"num_return_sequences": workload["width"]}
        generation = GenerationConfig(eos_token_id=-1, max_new_tokens=max(workload["new"]), **strategy)
        # Blocks are not shared: what an earlier round computed must not help a later one.
        config = ContinuousBatchingConfig(
            page_size=PAGE, num_blocks=rows * (-(-max(lengths) // PAGE) + 1), max_requests_per_batch=rows,
            max_batch_tokens=self._options["max_batch_tokens"], allow_block_sharing=False,
            auto_switch_to_flash=False,
        )  # fmt: skip
        return self._model.init_continuous_batching(generation_config=generation, continuous_batching_config=config)


def load(options: dict[str, Any]) -> ContinuousBatching:
    """Load the model."""
    return ContinuousBatching(options)
