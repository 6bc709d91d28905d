"""Run by ``nox -s wheels`` in an environment that has only built wheels, from a folder outside the repository."""

from __future__ import annotations

import importlib
import importlib.metadata
import json
import subprocess
import sys
from pathlib import Path

DISTRIBUTIONS = {
    "folo-core": "folo_core",
    "folo-attention": "folo_attention",
    "folo-beam": "folo_beam",
    "folo-best-of": "folo_best_of",
    "folo-cli": "folo_cli",
    "folo-demo-model": "folo_demo_model",
    "folo-flashinfer": "folo_flashinfer",
    "folo-guidance": "folo_guidance",
    "folo-hf": "folo_hf",
    "folo-kernels": "folo_kernels",
    "folo-sampling": "folo_sampling",
    "folo-schedulers": "folo_schedulers",
    "folo-speculative": "folo_speculative",
    "folo-trace": "folo_trace",
    "folo-tree-search": "folo_tree_search",
    "folo-third-party-sampler": "folo_third_party_sampler",
    "folo-third-party-strategy": "folo_third_party_strategy",
}

LIBRARIES = {"folo-kernels"}
"""What plugins are built on; no plugins themselves."""


def folo(*arguments: str) -> str:
    """Run the installed command and return what it printed."""
    command = [str(Path(sys.executable).with_name("folo")), *arguments]
    return subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout


def check_sources(root: Path) -> None:
    """Everything is imported from site-packages, and every wheel carries its licence and its type marker."""
    assert not Path.cwd().samefile(root)
    for distribution, package in DISTRIBUTIONS.items():
        folder = Path(importlib.import_module(package).__file__).parent
        assert folder.parent.name == "site-packages", f"{package} was imported from {folder}"
        assert (folder / "py.typed").is_file(), f"{package} has no py.typed"
        metadata = importlib.metadata.metadata(distribution)
        assert metadata["License-Expression"] == "Apache-2.0", distribution
        if not distribution.startswith("folo-third-party-"):
            assert "LICENSE" in (metadata.get_all("License-File") or []), f"{distribution} carries no licence text"


def check_plugins() -> None:
    """The plugin of every distribution but libraries is found, and none is broken."""
    rows = json.loads(folo("plugins", "list", "--json"))
    status = {row["distribution"]: row["status"] for row in rows}
    assert status == dict.fromkeys(set(DISTRIBUTIONS) - LIBRARIES, "loaded"), status


def check_kernels() -> None:
    """The wheel was built with a compiler at hand, so it holds libraries, and one of them suits this processor."""
    from folo_kernels.library import FOLDER, load

    assert list(FOLDER.glob("*.so")), f"no compiled kernels in {FOLDER}"
    assert "site-packages" in FOLDER.parts
    assert load().vector_lanes >= 4


def check_command_line() -> None:
    """The command generates text with the embedded model."""
    text = folo("generate", "The capital of France is", "--model", "demo", "--max-tokens", "8", "--no-stats")
    assert "Paris" in text, text


def check_strategies() -> None:
    """Strategies are chosen by name from the command line, and a beam's tree is drawn as one page."""
    beam = ["--strategy", "beam", "-O", "width=3", "--max-tokens", "8"]
    text = folo("generate", "The capital of France is", *beam, "--no-stats")
    assert "Paris" in text, text
    page = Path("tree.html")
    folo("trace", "The capital of France is", *beam, "-o", str(page))
    assert "Paris" in page.read_text(encoding="utf-8"), "the page does not show the answer"


def check_third_party_sampler() -> None:
    """A distribution that Folo knows nothing of serves its own parameters, by their class."""
    from folo_core import LLM
    from folo_third_party_sampler.params import TypicalParams

    llm = LLM("demo", max_model_len=256)
    params = [TypicalParams(temperature=1.0, typical_p=0.5, seed=seed, max_tokens=12) for seed in (1, 1, 2)]
    outputs = llm.generate(["Once upon a time"] * len(params), params, use_tqdm=False)
    first, again, other = (output.outputs[0].token_ids for output in outputs)
    assert len(first) == 12, outputs
    assert first == again, "one seed, two answers"
    assert first != other, "two seeds, one answer"
    table = llm.engine.components.sampler_table
    assert "typical" in table.find(params[0])


def check_third_party_strategy() -> None:
    """Another one, whose rows fork, carry numbers and are pruned, runs in a batch with plain requests."""
    from folo_core import LLM, SamplingParams
    from folo_third_party_strategy import StochasticBeamParams

    llm = LLM("demo", max_model_len=256)
    params = [StochasticBeamParams(k=4, n=4, seed=3, max_tokens=8), SamplingParams(temperature=0.0, max_tokens=8)]
    drawn, plain = llm.generate(["The capital of France is"] * len(params), params, use_tqdm=False)
    texts = {tuple(output.token_ids) for output in drawn.outputs}
    scores = [output.score for output in drawn.outputs]
    assert len(texts) == 4, "a text was drawn twice"
    assert scores == sorted(scores, reverse=True), scores
    assert "Paris" in plain.outputs[0].text, "its neighbour was disturbed"


def main() -> None:
    """Check everything; an assertion names what is wrong."""
    check_sources(Path(sys.argv[1]))
    check_plugins()
    check_kernels()
    check_command_line()
    check_strategies()
    check_third_party_sampler()
    check_third_party_strategy()
    versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in DISTRIBUTIONS)
    print(f"installed from wheels and working: {versions}")


if __name__ == "__main__":
    main()
