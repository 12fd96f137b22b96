"""Where a training step of the demo spends its time on the CPU, what it asks of the interpreter, and how fast it is.

The model, the rows, the settings and the trainer are the demo's own. Shares come from two sides: PyTorch's profiler
says which operator, and ``perf``, which slows nothing, which function of which library.

usage: python benches/training_step.py [--out FILE.jsonl] [--steps N] [--rounds N] [--hidden N] [--stock-norms]
"""

from __future__ import annotations

import argparse
import json
import os
from pathlib import Path
from typing import Any


def main() -> None:
    """Test, watch some steps, time others beside PEFT, and print the tables."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--out", type=Path, help="append results as JSON lines")
    parser.add_argument("--steps", type=int, default=40, help="steps of each look")
    parser.add_argument("--rounds", type=int, default=5, help="rounds beside PEFT; 0 for none")
    parser.add_argument("--hidden", type=int, help="width of a model of random weights instead of the demo's base")
    parser.add_argument("--stock-norms", action="store_true", help="leave the norms to transformers")
    parser.add_argument("--threads", type=int, help="default: as the demo, one")
    arguments = parser.parse_args()
    os.environ["RAYON_NUM_THREADS"] = str(arguments.threads or 1)  # read when the core is first used

    import torch

    import harness
    import step_peer
    from moeft.demo.run import THREADS
    from step_counts import Calls, DispatchedOperators
    from step_operators import Operators
    from step_phases import Clock, Looks
    from step_samples import Samples
    from step_setup import demo_recipe, demo_trainer

    harness.require_green(("test_trainer.py", "test_kernels_rms_norm.py", "test_fused_norms.py"))
    threads = arguments.threads or THREADS
    harness.set_threads(threads)
    with demo_recipe(arguments.hidden) as recipe, demo_trainer(recipe, not arguments.stock_norms) as trainer:
        hidden = trainer.model.config.hidden_size
        layers = list(trainer.model.get_base_model().model.layers)
        counted = min(arguments.steps, 10)
        clock, operators = Clock(arguments.steps), Operators(arguments.steps)
        dispatched, calls = DispatchedOperators(layers, counted), Calls(counted)
        samples = Samples(arguments.steps) if Samples.is_available() else None
        looks = Looks([look for look in (clock, samples, operators, dispatched, calls) if look is not None])
        trainer.add_callback(looks)
        trainer.train()
        trainer.remove_callback(looks)
        result: dict[str, Any] = {
            "case": f"training step of the demo, hidden {hidden}",
            "threads": threads,
            "fused_norms": trainer.args.fused_norms,
            "steps": arguments.steps,
            "wall_seconds": clock.wall_seconds,
            "cpu_seconds": clock.cpu_seconds,
            "operator_shares": operators.shares,
            "largest_operators_seconds": operators.largest,
            "sample_shares": samples.shares if samples else None,
            "core_has_symbols": samples.core_has_symbols if samples else None,
            "operators_per_step": sum(dispatched.operators.values()) / dispatched.steps,
            "operators_per_layer_forward": dispatched.operators["layer forward"] / dispatched.steps / len(layers),
            "scalars_read_per_step": per_step(dispatched.host_reads, dispatched.steps),
            "tensors_read_per_step": per_step(calls.readers, calls.steps),
            "python_calls_per_step": calls.python / calls.steps,
            "core_calls_per_step": per_step(calls.core, calls.steps),
        }
        show(result)
        if arguments.out is not None:
            with arguments.out.open("a", encoding="utf-8") as file:
                file.write(json.dumps(result | harness.machine()) + "\n")
        if arguments.rounds:
            torch.manual_seed(0)
            case = step_peer.case(recipe, trainer)
            case.name += f", hidden {hidden}"
            harness.report(harness.measure(case, arguments.rounds, threads), arguments.out)


def per_step(counts: dict[str, int], steps: int) -> dict[str, float]:
    """Counts of one step, largest first."""
    return {name: count / steps for name, count in sorted(counts.items(), key=lambda item: -item[1])}


def show(result: dict[str, Any]) -> None:
    """Print the tables."""
    wall, cpu = result["wall_seconds"] * 1e3, result["cpu_seconds"] * 1e3
    print(f"\n{result['case']}, {result['threads']} thread(s): {wall:.0f} ms of wall time, {cpu:.0f} ms of CPU time")
    for title, shares in (
        ("share of wall time by operator, profiled", result["operator_shares"]),
        ("share of CPU time by function, sampled", result["sample_shares"]),
    ):
        print(f"\n{title}{'' if shares else ': perf cannot sample here'}")
        for name, share in (shares or {}).items():
            print(f"  {name:<56}{share:>7.1%}")
        products = sum(share for name, share in (shares or {}).items() if name.startswith(("matmul", "attention")))
        print(f"  {'matmul kernels in all':<56}{products:>7.1%}")
    print("\nper step")
    print(f"  {'operators that reach a kernel':<56}{result['operators_per_step']:>9,.0f}")
    print(f"  {'of them in the forward of one layer':<56}{result['operators_per_layer_forward']:>9,.0f}")
    print(f"  {'calls of Python functions':<56}{result['python_calls_per_step']:>9,.0f}")
    for name in ("core_calls_per_step", "scalars_read_per_step", "tensors_read_per_step"):
        print(f"  {name.removesuffix('_per_step').replace('_', ' ')}:")
        for key, count in result[name].items():
            print(f"    {key:<54}{count:>9,.1f}")


if __name__ == "__main__":
    main()
