"""llama.cpp through llama-cpp-python's low-level functions: as many sequences in parallel as the options say.

llama-cpp-python's own ``Llama`` runs one sequence at a time. The loop here admits the next request as soon as a
sequence ends, as llama.cpp's server does, and tokens are chosen by llama.cpp's own samplers.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

F32 = 0
"""llama.cpp's number of this type of tensor."""


def weights(options: dict[str, Any]) -> Path:
    """Return the GGUF file as shipped; or the same weights written out in float32, once."""
    shipped = Path(options["gguf"])
    if options["weights_kind"] == "as-shipped":
        return shipped
    target = Path(options["cache"]) / "llamacpp" / f"{Path(options['weights']).name}.gguf"
    if not target.is_file():
        import llama_cpp

        target.parent.mkdir(parents=True, exist_ok=True)
        partial = target.with_suffix(".partial")
        params = llama_cpp.llama_model_quantize_default_params()
        params.ftype, params.allow_requantize, params.nthread = llama_cpp.LLAMA_FTYPE_ALL_F32, True, options["threads"]
        if llama_cpp.llama_model_quantize(str(shipped).encode(), str(partial).encode(), params):
            raise NotImplementedError(f"llama.cpp could not write {shipped.name} in float32")
        partial.replace(target)
    return target


@dataclass
class Answer:
    """A request's place in memory and what it has so far."""

    request: int
    slot: int
    prompt: list[int]
    wanted: int
    ids: list[int] = field(default_factory=list)
    output: int = -1
    """Where in the batch its logits are."""


class LlamaCpp:
    """A model, with a context and a batch for each workload."""

    def __init__(self, options: dict[str, Any]) -> None:
        import llama_cpp

        self._api: Any = llama_cpp
        self._options = options
        llama_cpp.llama_backend_init()
        self._model = llama_cpp.llama_model_load_from_file(
            str(weights(options)).encode(), llama_cpp.llama_model_default_params()
        )
        if not self._model:
            raise NotImplementedError(f"llama.cpp could not load {weights(options)}")
        self._ready: dict[str, tuple[Any, Any, Any]] = {}
        self.describes = {"llama-cpp-python": llama_cpp.__version__}

    def warm(self, workload: dict[str, Any]) -> None:
        """Make the workload's context and run a little."""
        if workload["kind"] == "beam":
            raise NotImplementedError("llama-cpp-python has no beam search")
        self._ready[workload["name"]] = self._context(workload), self._batch(workload), self._sampler(workload)
        self.run({**workload, "new": [min(new, 4) for new in workload["new"]]})

    def run(self, workload: dict[str, Any]) -> list[list[int]]:
        """Answer all requests, or draw all answers of one."""
        context, batch, sampler = self._ready[workload["name"]]
        memory = self._api.llama_get_memory(context)
        self._api.llama_memory_clear(memory, False)  # noqa: FBT003 (C's argument)
        waiting = list(enumerate(zip(workload["prompts"], workload["new"], strict=True)))[::-1]
        free = list(range(self._options["parallel"]))
        active: list[Answer] = []
        done: list[Answer] = []
        while waiting or active:
            batch.n_tokens = 0
            for answer in active:
                place = len(answer.prompt) + len(answer.ids) - 1
                answer.output = self._put(batch, answer.ids[-1], place, answer.slot, logits=True)
            active += self._admit(batch, waiting, free)
            self._decode(context, batch)
            for answer in active:
                answer.ids.append(self._api.llama_sampler_sample(sampler, context, answer.output))
            if workload["kind"] == "sample" and len(active) == 1 and len(active[0].ids) == 1:
                active += self._fan_out(context, sampler, memory, active[0], workload["width"])
            for answer in [answer for answer in active if len(answer.ids) == answer.wanted]:
                active.remove(answer)
                done.append(answer)
                free.append(answer.slot)
                self._api.llama_memory_seq_rm(memory, answer.slot, -1, -1)
        return [answer.ids for answer in sorted(done, key=lambda answer: (answer.request, answer.slot))]

    def _admit(self, batch: Any, waiting: list[Any], free: list[int]) -> list[Answer]:  # noqa: ANN401 (C's structure)
        """Put prompts into the batch while there are slots and room."""
        admitted = []
        while waiting and free and batch.n_tokens + len(waiting[-1][1][0]) <= self._options["tokens"]:
            request, (prompt, wanted) = waiting.pop()
            answer = Answer(request, free.pop(0), prompt, wanted)
            for place, token in enumerate(prompt):
                answer.output = self._put(batch, token, place, answer.slot, logits=place == len(prompt) - 1)
            admitted.append(answer)
        return admitted

    def _fan_out(self, context: Any, sampler: Any, memory: Any, first: Answer, width: int) -> list[Answer]:  # noqa: ANN401
        """Give the other answers copies of the prompt's memory, and first tokens from the same logits."""
        others = []
        for slot in range(1, width):
            self._api.llama_memory_seq_cp(memory, first.slot, slot, -1, -1)
            token = self._api.llama_sampler_sample(sampler, context, first.output)
            others.append(Answer(first.request, slot, first.prompt, first.wanted, [token]))
        return others

    @staticmethod
    def _put(batch: Any, token: int, place: int, slot: int, *, logits: bool) -> int:  # noqa: ANN401 (C's structure)
        i: int = batch.n_tokens
        batch.token[i], batch.pos[i], batch.n_seq_id[i], batch.logits[i] = token, place, 1, logits
        batch.seq_id[i][0] = slot
        batch.n_tokens = i + 1
        return i

    def _decode(self, context: Any, batch: Any) -> None:  # noqa: ANN401 (C's structures)
        status = self._api.llama_decode(context, batch)
        if status:
            raise RuntimeError(f"llama_decode returned {status}")

    def _context(self, workload: dict[str, Any]) -> Any:  # noqa: ANN401 (C's structure)
        parallel = max(self._options["parallel"], 1)
        longest = max(len(prompt) + new for prompt, new in zip(workload["prompts"], workload["new"], strict=True))
        params = self._api.llama_context_default_params()
        params.n_ctx = parallel * (-(-longest // 256) * 256)
        params.n_batch = params.n_ubatch = self._options["tokens"]
        params.n_seq_max = parallel
        params.n_threads = params.n_threads_batch = self._options["threads"]
        params.kv_unified = self._options.get("unified", False)
        if self._options["weights_kind"] == "f32":
            params.type_k = params.type_v = F32  # as the other engines hold keys and values
        context = self._api.llama_init_from_model(self._model, params)
        if not context:
            raise NotImplementedError("llama.cpp could not make a context")
        return context

    def _batch(self, workload: dict[str, Any]) -> Any:  # noqa: ANN401 (C's structure)
        return self._api.llama_batch_init(max(self._options["tokens"], *map(len, workload["prompts"])), 0, 1)

    def _sampler(self, workload: dict[str, Any]) -> Any:  # noqa: ANN401 (C's structure)
        if workload["kind"] == "sample":
            return self._api.llama_sampler_init_dist(0)  # the plain distribution: temperature 1, nothing cut off
        return self._api.llama_sampler_init_greedy()


def load(options: dict[str, Any]) -> LlamaCpp:
    """Load the model."""
    return LlamaCpp(options)
