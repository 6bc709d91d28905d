"""What a step costs in calls, lines, operators and bytes, beside the most that the tests allow.

``--write`` sets the bar anew. No clock is read: tests/step_costs.py counts, and tests/core/test_cost_bar.py judges.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path

import tomli_w
import transformers

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT / "tests"), str(ROOT / "plugins" / "folo-hf" / "tests")]

from tiny_models import SMALL, save_model  # noqa: E402

import step_costs  # noqa: E402 (found by the path above)


def main() -> None:
    """Print all counts, or write the bar anew from them."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--write", action="store_true", help=f"write {step_costs.BAR.name} from what was counted")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        save_model(Path(folder) / "llama", transformers.LlamaConfig(**SMALL))
        llama = Path(folder) / "llama"
        forwards = {"forward": True, "forward_torch": False}
        found = {"engine": step_costs.engine_costs()}
        found |= {name: step_costs.forward_costs(llama, native=native) for name, native in forwards.items()}
    for part, costs in found.items():
        allowed = {} if args.write else step_costs.read_bar(part)
        for case, counts in costs.items():
            print(f"{part}, {case}, a step:")
            for name, count in counts.items():
                print(f"    {name:<20} {count:>12,.1f}   allowed {allowed.get(case, {}).get(name, 0):>12,.1f}")
    if args.write:
        bar = {
            part: {
                case: {name: step_costs.most_allowed(name, count) for name, count in counts.items()}
                for case, counts in costs.items()
            }
            for part, costs in found.items()
        }
        text = tomli_w.dumps({"measured_with": step_costs.versions()} | bar)
        header = "# The most that a step may cost. Written by: python bench/cost_bar.py --write\n\n"
        step_costs.BAR.write_text(header + text, encoding="utf-8")


if __name__ == "__main__":
    main()
