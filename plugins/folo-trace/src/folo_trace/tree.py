"""From an engine's records to the tree of a generation, as plain data: the format is described in the README."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, TypedDict

from folo_core.engine.detokenizer import Detokenizer

if TYPE_CHECKING:
    from collections.abc import Sequence

    from folo_core.engine.observer import BranchRecord
    from folo_core.execution.loading import Tokenizer
    from folo_core.outputs import CompletionOutput, RequestOutput

FORMAT = "folo-trace"
VERSION = 1
ROOT = -1
"""The parent of first tokens: the end of the prompt."""


class Node(TypedDict):
    """One appended token."""

    id: int
    parent: int
    """The node it continues, or -1 for the prompt."""
    step: int
    """The step that appended it; 1 is the first."""
    depth: int
    """Its place in the answer; 1 is the first token."""
    sequence: int
    """The sequence it was appended to."""
    token_id: int
    text: str
    """What it added to the text; empty while a character is unfinished."""
    logprob: float | None
    """As the strategy counts it, or else the answer's own; null where nobody knows it, or it is not finite."""
    score: float
    """What the strategy ranked its row by after the step."""
    status: str
    """``grown``, ``pruned`` (a branch died here) or ``ended`` (an answer ended here)."""
    died: int | None
    """The step that pruned it."""
    reason: str | None
    """Why it ended: ``stop`` or ``length``."""
    answer: int | None
    """The place among the answers that end here; 0 is the best."""
    alternatives: list[tuple[str, float]]
    """The most likely tokens at this place and their log probabilities, where they are known."""


class Row(TypedDict):
    """A sequence that goes on after a step."""

    sequence: int
    node: int
    cached: int
    """Tokens in its blocks: all but the newest."""
    score: float
    blocks: list[int]


class Step(TypedDict):
    """What one step did."""

    step: int
    rows: list[Row]
    forks: list[tuple[int, int]]
    """Pairs of parent sequence and new sequence."""
    pruned: list[int]
    """Sequences that nothing continues."""
    ended: dict[str, str]
    """Sequences that ended, and why."""
    blocks_held: int
    """Blocks in use while the step ran, without those that only a guess at further tokens needs."""
    blocks_separate: int
    """Blocks that as many separate requests would have used."""


class Growth:
    """The tree as it grows, record by record."""

    def __init__(self, tokenizer: Tokenizer | None, prompt: Sequence[int], block_size: int) -> None:
        self.nodes: list[Node] = []
        self.steps: list[Step] = []
        self._prompt_length, self._block_size = len(prompt), block_size
        self._tips: dict[int, int] = {}
        """Each live sequence's newest node."""
        self._texts: dict[int, Detokenizer] = {}
        """Each live node's text so far."""
        if tokenizer is not None:
            self._texts[ROOT] = Detokenizer(tokenizer, prompt, skip_special_tokens=False)

    def add(self, record: BranchRecord) -> None:
        """Add what one step did."""
        held, separate = self._usage()
        step = len(self.steps) + 1
        before = self._tips
        self._tips = {}
        for row, sequence in enumerate(record.rows):
            parent = before.get(record.parents[row], ROOT)
            self._tips[sequence] = self._append_row(record, row, parent, step)
        for sequence, reason in record.ended.items():
            self._close(self._tips.pop(sequence), "ended", reason=reason)
        for sequence in record.pruned:
            self._close(before.get(sequence, ROOT), "pruned", died=step)
        self._texts = {node: self._texts[node] for node in self._tips.values() if node in self._texts}
        self.steps.append(self._step(record, step, held, separate))

    def _append_row(self, record: BranchRecord, row: int, parent: int, step: int) -> int:
        stated = [] if record.logprobs is None else record.logprobs[row]
        tokens = record.tokens[row]
        logprobs = stated[: len(tokens)] if len(stated) >= len(tokens) else [None] * len(tokens)
        text = self._texts[parent].fork() if parent in self._texts else None
        for token, logprob in zip(tokens, logprobs, strict=True):
            node = Node(
                id=len(self.nodes),
                parent=parent,
                step=step,
                depth=1 if parent == ROOT else self.nodes[parent]["depth"] + 1,
                sequence=record.rows[row],
                token_id=token,
                text="" if text is None else text.append(token),
                logprob=logprob,
                score=record.scores[row],
                status="grown",
                died=None,
                reason=None,
                answer=None,
                alternatives=[],
            )
            self.nodes.append(node)
            parent = node["id"]
        if text is not None:
            self._texts[parent] = text
        return parent

    def _close(self, node: int, status: str, *, died: int | None = None, reason: str | None = None) -> None:
        if node != ROOT:
            self.nodes[node].update({"status": status, "died": died, "reason": reason})

    def _step(self, record: BranchRecord, step: int, held: int, separate: int) -> Step:
        scores = dict(zip(record.rows, record.scores, strict=True))
        rows = [
            Row(sequence=sequence, node=node, cached=self._cached(node), score=scores[sequence], blocks=blocks)
            for sequence, node in self._tips.items()
            if (blocks := record.blocks.get(sequence)) is not None
        ]
        return Step(
            step=step,
            rows=rows,
            forks=[(p, r) for p, r in zip(record.parents, record.rows, strict=True) if p != r],
            pruned=record.pruned,
            ended={str(sequence): reason for sequence, reason in record.ended.items()},
            blocks_held=held,
            blocks_separate=separate,
        )

    def _cached(self, node: int) -> int:
        return self._prompt_length - 1 + (0 if node == ROOT else self.nodes[node]["depth"])

    def _usage(self) -> tuple[int, int]:
        """Count the blocks in use while the next step runs, and those that separate requests would use.

        Each row writes its newest token: into a new block if its last is full, into its own copy if its last is
        shared, else in place. Of the rows that share a partly filled block, the last to write needs no copy.
        """
        if not self.steps:
            alone = -(-self._prompt_length // self._block_size)
            return alone, alone
        rows = self.steps[-1]["rows"]
        full = sum(row["cached"] % self._block_size == 0 for row in rows)
        tails = Counter(row["blocks"][-1] for row in rows if row["cached"] % self._block_size)
        shared = len({block for row in rows for block in row["blocks"]})
        separate = sum(-(-(row["cached"] + 1) // self._block_size) for row in rows)
        return shared + full + tails.total() - len(tails), separate


def path_to(nodes: Sequence[Node], node: int) -> list[int]:
    """Return the nodes from the first token to ``node``."""
    path: list[int] = []
    while node != ROOT:
        path.append(node)
        node = nodes[node]["parent"]
    return path[::-1]


def build_trace(
    records: Sequence[BranchRecord],
    output: RequestOutput,
    tokenizer: Tokenizer | None,
    *,
    block_size: int,
    about: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """Turn what a Recorder kept of one request into a trace: plain data, ready for JSON.

    Args:
        records: the request's records, in order.
        output: the request's final output.
        tokenizer: gives tokens their texts; without one these are empty.
        block_size: tokens in a KV block of the engine.
        about: more to say at the top level, such as ``model``, ``strategy`` and ``params``.
    """
    prompt = output.prompt_token_ids
    growth = Growth(tokenizer, prompt, block_size)
    for record in records:
        growth.add(record)
    answers = [_answer(growth.nodes, place, completion) for place, completion in enumerate(output.outputs)]
    trace: dict[str, Any] = _plain(
        {
            "format": FORMAT,
            "version": VERSION,
            **(about or {}),
            "block_size": block_size,
            "prompt": {"text": _prompt_text(output, tokenizer), "token_ids": list(prompt)},
            "answers": answers,
            "summary": _summary(growth, answers),
            "nodes": growth.nodes,
            "steps": growth.steps,
        }
    )
    return trace


def _plain(value: Any) -> Any:  # noqa: ANN401 (any JSON-like value)
    """Copy what JSON has; a number that it has not (an infinite score) is null, a function is its name."""
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return value if value is None or isinstance(value, (str, int)) else getattr(value, "__qualname__", repr(value))


def _prompt_text(output: RequestOutput, tokenizer: Tokenizer | None) -> str:
    if output.prompt is not None or tokenizer is None:
        return output.prompt or ""
    return tokenizer.decode(output.prompt_token_ids, skip_special_tokens=False)


def _answer(nodes: list[Node], place: int, completion: CompletionOutput) -> dict[str, Any]:
    """Describe an answer and mark the node it ends at."""
    leaf = _find_leaf(nodes, completion.token_ids)
    if leaf != ROOT:
        nodes[leaf]["answer"] = place
        _fill_in_logprobs(nodes, path_to(nodes, leaf), completion)
    return {
        "node": leaf,
        "text": completion.text,
        "score": completion.score,
        "cumulative_logprob": completion.cumulative_logprob,
        "finish_reason": completion.finish_reason,
        "num_tokens": len(completion.token_ids),
    }


def _find_leaf(nodes: list[Node], token_ids: Sequence[int]) -> int:
    """Find the ended node whose path reads so and that is no other answer's; a finished text is never rewritten."""
    free = [node["id"] for node in nodes if node["status"] == "ended" and node["answer"] is None]
    wanted = list(token_ids)
    return next((id_ for id_ in free if [nodes[i]["token_id"] for i in path_to(nodes, id_)] == wanted), ROOT)


def _fill_in_logprobs(nodes: list[Node], path: list[int], completion: CompletionOutput) -> None:
    """Take over what the answer knows of its tokens, where the strategy stated nothing."""
    for index, candidates in zip(path, completion.logprobs or [], strict=False):
        node = nodes[index]
        chosen = candidates.get(node["token_id"])
        if node["logprob"] is None and chosen is not None:
            node["logprob"] = chosen.logprob
        node["alternatives"] = sorted(
            ((found.decoded_token or "", found.logprob) for found in candidates.values()), key=lambda pair: -pair[1]
        )


def _summary(growth: Growth, answers: list[dict[str, Any]]) -> dict[str, Any]:
    kept = {node for answer in answers for node in path_to(growth.nodes, answer["node"])}
    held = max((step["blocks_held"] for step in growth.steps), default=0)
    separate = max((step["blocks_separate"] for step in growth.steps), default=0)
    return {
        "steps": len(growth.steps),
        "tokens": len(growth.nodes),
        "tokens_kept": len(kept),
        "forks": sum(len(step["forks"]) for step in growth.steps),
        "pruned": sum(len(step["pruned"]) for step in growth.steps),
        "ended": sum(len(step["ended"]) for step in growth.steps),
        "most_rows": max((len(step["rows"]) for step in growth.steps), default=0),
        "peak_blocks": held,
        "peak_blocks_separate": separate,
    }
