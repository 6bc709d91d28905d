"""The offline face: a batch of prompts in, a list of outputs back."""

from __future__ import annotations

import itertools
import sys
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Self, TypeVar, cast

import attrs

from folo_core.config import EngineConfig
from folo_core.engine.engine import Engine
from folo_core.errors import FoloError, RequestError
from folo_core.plugins.assembly import build_components
from folo_core.plugins.manager import load_registry
from folo_core.sampling_params import RequestOutputKind, SamplingParams

if TYPE_CHECKING:
    from collections.abc import Collection, Iterator

    from folo_core.engine.input_processor import Prompt
    from folo_core.engine.reporting import EngineStats
    from folo_core.execution.loading import Tokenizer
    from folo_core.outputs import RequestOutput
    from folo_core.plugins.registry import Registry

Message = Mapping[str, Any]
T = TypeVar("T")


class LLM:
    """Generates text from a model, many prompts at a time.

    Args:
        model: ``demo``, a local folder, a GGUF file or a hub id.
        options: flat keywords of any section of EngineConfig, with vLLM's names: ``dtype``, ``seed``,
            ``max_model_len``, ``max_num_seqs``, ``enable_prefix_caching``, ``skip_tokenizer_init``,
            ``tensor_parallel_size``, ``gpu_memory_utilization`` and so on.

    Raises:
        ConfigError: every bad option at once.
        ModelLoadError: the model cannot be loaded.
        PluginError: a plugin that the options name is missing or broken.
    """

    def __init__(self, model: str, **options: Any) -> None:  # noqa: ANN401 (each option's section judges its type)
        self._start(EngineConfig.from_options(model=model, **options))

    @classmethod
    def from_config(cls, config: EngineConfig, registry: Registry | None = None) -> Self:
        """Build from a whole configuration, and from a registry other than that of the installed plugins."""
        llm = cls.__new__(cls)
        llm._start(config, registry)  # noqa: SLF001 (its own class)
        return llm

    def _start(self, config: EngineConfig, registry: Registry | None = None) -> None:
        if registry is None:
            registry = load_registry(block=config.blocked_plugins, strict=config.strict_plugins)
        self.engine = Engine(build_components(config, registry))
        self._request_ids = itertools.count()
        self._open: set[str] = set()
        self._kept: dict[str, list[RequestOutput]] = {}
        """What came for an open request while somebody waited for another: for a stream, while ``generate`` ran."""

    def stats(self) -> EngineStats:
        """Return queues, memory and the prefix cache's hit rate as they are now."""
        return self.engine.stats()

    def reset_prefix_cache(self) -> None:
        """Forget what was computed for earlier prompts."""
        self.engine.reset_prefix_cache()

    def get_tokenizer(self) -> Tokenizer:
        """Return the model's tokenizer.

        Raises:
            FoloError: it was skipped with ``skip_tokenizer_init=True``.
        """
        tokenizer = self.engine.components.tokenizer
        if tokenizer is None:
            message = "tokenizer: skip_tokenizer_init=True: this engine has none"
            raise FoloError(message)
        return tokenizer

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        use_tqdm: bool = True,
        priority: Sequence[int] | None = None,
        tenant: str | Sequence[str] = "",
    ) -> list[RequestOutput]:
        """Complete one or many prompts.

        Args:
            prompts: a text, ``{"prompt": text}``, ``{"prompt_token_ids": [...]}`` or a list of token ids;
                or a list of any of these.
            sampling_params: one for all prompts, or one for each.
            use_tqdm: show progress on stderr, if that is a terminal.
            priority: one for each prompt, for schedulers that look at it; lower runs earlier.
            tenant: whom the prompts serve, one for all or one for each; see ``Engine.add_request``.

        Returns:
            One output per prompt, in the prompts' order. A request that failed on its own has
            ``finish_reason="error"`` and ``error``; the others are complete.

        Raises:
            RequestError: a prompt cannot be served; nothing has been generated.
            ParamsError: parameters do not fit the model; nothing has been generated.
        """
        batch = _as_batch(prompts)
        done: list[RequestOutput | None] = [None] * len(batch)
        with _Progress(len(batch), enabled=use_tqdm and sys.stderr.isatty()) as progress:
            for place, output in self.generate_as_finished(batch, sampling_params, priority=priority, tenant=tenant):
                done[place] = output
                progress.advance(output)
        return [output for output in done if output is not None]

    def generate_as_finished(
        self,
        prompts: Sequence[Prompt],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        priority: Sequence[int] | None = None,
        tenant: str | Sequence[str] = "",
    ) -> Iterator[tuple[int, RequestOutput]]:
        """Yield ``(place among the prompts, output)`` whenever a request ends. Leaving early aborts the rest.

        Raises:
            RequestError: as ``generate``.
            ParamsError: as ``generate``.
        """
        params = _one_each(sampling_params or SamplingParams(), len(prompts), "sampling_params")
        priorities = _one_each(0 if priority is None else priority, len(prompts), "priority")
        tenants = _one_text_each(tenant, len(prompts), "tenant")
        final = {id(p): attrs.evolve(p, output_kind=RequestOutputKind.FINAL_ONLY) for p in params}
        places: dict[str, int] = {}
        opened: list[str] = []
        try:
            each = zip(prompts, params, priorities, tenants, strict=True)
            for place, (prompt, param, rank, whom) in enumerate(each):
                request_id = self._next_id()
                self.engine.add_request(request_id, prompt, final[id(param)], priority=rank, tenant=whom)
                places[request_id] = place
                self._open.add(request_id)
                opened.append(request_id)
            while places:
                for output in self._receive(places):
                    if output.finished:
                        yield places.pop(output.request_id), output
        finally:
            self._leave(opened)

    def stream(self, prompt: Prompt, sampling_params: SamplingParams | None = None) -> Iterator[RequestOutput]:
        """Yield what is new of one prompt's answer after each step. Leaving early aborts the request.

        Raises:
            RequestError: as ``generate``.
            ParamsError: as ``generate``.
        """
        params = attrs.evolve(sampling_params or SamplingParams(), output_kind=RequestOutputKind.DELTA)
        request_id = self._next_id()
        self.engine.add_request(request_id, prompt, params)
        self._open.add(request_id)
        finished = False
        try:
            while not finished:
                for output in self._receive([request_id]):
                    finished = output.finished
                    yield output
        finally:
            self._leave([request_id])

    def chat(
        self,
        messages: Sequence[Message] | Sequence[Sequence[Message]],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        use_tqdm: bool = True,
        chat_template: str | None = None,
        add_generation_prompt: bool = True,
    ) -> list[RequestOutput]:
        """Answer one or many conversations, laid out by the model's own chat template.

        Args:
            messages: a list of ``{"role": ..., "content": ...}``, or a list of such lists.
            sampling_params: one for all conversations, or one for each.
            use_tqdm: show progress on stderr, if that is a terminal.
            chat_template: a Jinja template in place of the model's.
            add_generation_prompt: end with the marks that open the assistant's turn.

        Raises:
            RequestError: as ``generate``, or the model has no chat template.
        """
        single = bool(messages) and isinstance(messages[0], Mapping)
        conversations = cast("Sequence[Sequence[Message]]", [messages] if single else messages)
        prompts = [
            self.apply_chat_template(c, chat_template=chat_template, add_generation_prompt=add_generation_prompt)
            for c in conversations
        ]
        return self.generate(prompts, sampling_params, use_tqdm=use_tqdm)

    def apply_chat_template(
        self, messages: Sequence[Message], *, chat_template: str | None = None, add_generation_prompt: bool = True
    ) -> dict[str, object]:
        """Return a conversation as a prompt, ``{"prompt": text, "prompt_token_ids": ids}``."""
        return chat_prompt(
            self.get_tokenizer(),
            messages,
            chat_template=chat_template or self.engine.components.config.model.chat_template,
            add_generation_prompt=add_generation_prompt,
        )

    def _receive(self, request_ids: Collection[str]) -> list[RequestOutput]:
        """Return what came for these requests while others were waited for, or else what the next step brings."""
        for request_id in [known for known in self._kept if known in request_ids]:
            return self._kept.pop(request_id)
        mine = []
        for output in self.engine.step():
            if output.request_id in request_ids:
                mine.append(output)
            elif output.request_id in self._open:
                self._kept.setdefault(output.request_id, []).append(output)
        return mine

    def _leave(self, request_ids: list[str]) -> None:
        """Forget these requests, and end those that are still running."""
        self.engine.abort(request_ids)
        self._open.difference_update(request_ids)
        for request_id in request_ids:
            self._kept.pop(request_id, None)

    def _next_id(self) -> str:
        return f"llm-{next(self._request_ids)}"


def chat_prompt(
    tokenizer: Tokenizer, messages: Sequence[Message], *, chat_template: str | None, add_generation_prompt: bool = True
) -> dict[str, object]:
    """Lay a conversation out as a prompt. The template runs in transformers' immutable Jinja sandbox.

    Raises:
        RequestError: the messages are malformed, or there is no template, or the template refuses them.
    """
    for place, message in enumerate(messages):
        if not isinstance(message, Mapping) or not isinstance(message.get("role"), str) or "content" not in message:
            text = f"messages[{place}]: {message!r}: give {{'role': 'user' | 'assistant' | ..., 'content': text}}"
            raise RequestError(text)
    if chat_template is None and not getattr(tokenizer, "chat_template", None):
        text = "chat_template: the model's tokenizer has none: give chat_template=, or use generate"
        raise RequestError(text)
    try:
        prompt = tokenizer.apply_chat_template(
            [dict(message) for message in messages],
            tokenize=False,
            add_generation_prompt=add_generation_prompt,
            chat_template=chat_template,
        )
    except Exception as error:
        text = f"messages: the chat template refused them: {type(error).__name__}: {error}"
        raise RequestError(text) from error
    return {"prompt": prompt, "prompt_token_ids": tokenizer.encode(prompt, add_special_tokens=False)}


def _as_batch(prompts: Prompt | Sequence[Prompt]) -> list[Prompt]:
    """Tell one prompt from many: a list of numbers is one prompt of token ids."""
    if isinstance(prompts, (str, Mapping)):
        return [prompts]
    items = list(prompts)
    if items and all(isinstance(item, int) for item in items):
        return [cast("list[int]", items)]
    return cast("list[Prompt]", items)


def _one_text_each(given: str | Sequence[str], count: int, name: str) -> list[str]:
    """Like ``_one_each`` for texts, each of which is itself a sequence."""
    texts = [given] * count if isinstance(given, str) else list(given)
    if len(texts) != count:
        message = f"{name}: {len(texts)} given for {count} prompts: give one for all, or one for each"
        raise RequestError(message)
    return texts


def _one_each(given: T | Sequence[T], count: int, name: str) -> list[T]:
    if not isinstance(given, Sequence):
        return [given] * count
    if len(given) != count:
        message = f"{name}: {len(given)} given for {count} prompts: give one for all, or one for each"
        raise RequestError(message)
    return list(given)


class _Progress:
    """A bar on stderr: requests done and tokens per second."""

    def __init__(self, total: int, *, enabled: bool) -> None:
        self._total = total
        self._enabled = enabled
        self._tokens = 0

    def __enter__(self) -> Self:
        if self._enabled:
            from rich.console import Console
            from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

            columns = (BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[rate]}"), TimeElapsedColumn())
            self._bar = Progress(*columns, console=Console(stderr=True), transient=True)
            self._task = self._bar.add_task("", total=self._total, rate="")
            self._bar.start()
        return self

    def advance(self, output: RequestOutput) -> None:
        """Count a finished request."""
        if self._enabled:
            self._tokens += sum(len(completion.token_ids) for completion in output.outputs)
            elapsed = self._bar.tasks[0].elapsed
            rate = f"{self._tokens / elapsed:.0f} tok/s" if elapsed else ""
            self._bar.update(self._task, advance=1, rate=rate)

    def __exit__(self, *exc_info: object) -> None:
        if self._enabled:
            self._bar.stop()
