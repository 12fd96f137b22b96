"""``moeft hard iterate``: analyse, build pairs against the failures, tune, measure on held-out requests, and again.

``round-0`` measures the policy as it comes. Every later round probes the best policy so far on seeds, builds pairs
against what failed, tunes, and measures. Rounds end when held-out accuracy gains too little or the gate is broken; the
adapters of the best round are those to use. What a round has finished is not done again after an interruption.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from moeft.config.dpo import DpoRecipe
from moeft.config.iterate import IterateRecipe
from moeft.hard.requests import HeldOutTexts, Request
from moeft.hard.targets import Targets
from moeft.provenance import RunFolder, is_finished
from moeft.runs import dpo, preflight
from moeft.runs.gate import gate_files
from moeft.runs.generated import Speaker
from moeft.runs.hard import BuildSettings, Toolbox, analyze_replies, build_pairs
from moeft.runs.pictures import draw_picture
from moeft.runs.rounds import best_round, reason_to_stop
from moeft.runs.rounds_start import starting_adapters

Show = Callable[[str], None]


def run(recipe: IterateRecipe, show: Show = print) -> RunFolder:
    """Run rounds, or continue interrupted ones.

    Args:
        recipe: The resolved recipe.
        show: Where to print what is found.

    Returns:
        The finished run folder: ``round-N/`` with pairs, analyses and the preference run, ``metrics.json`` with
        ``rounds``, the ``best`` of them, its ``adapters``, and why rounds ended, and ``rounds.png``.

    Raises:
        MoeftError: If the recipe, the model, the data or the training cannot be used.
    """
    check(recipe)
    data = recipe.data
    inputs = {"model": recipe.model, "tools": data.tools, "seeds": data.seeds, "heldout": data.heldout}
    inputs |= {} if data.easy is None else {"easy": data.easy}
    inputs |= {"chat_template": data.chat_template} if isinstance(data.chat_template, Path) else {}
    inputs |= {} if recipe.sft is None else {"sft": recipe.sft}
    inputs |= {} if recipe.gate is None else {"gate": recipe.gate.rows}
    inputs |= {} if recipe.training_gate is None else gate_files(recipe.training_gate, "training_gate")
    inputs |= {f"stack_on[{i}]": path for i, path in enumerate(recipe.lora.stack_on)}
    seed = int(recipe.training.get("seed", 42))
    with RunFolder.create(recipe.output, "moeft hard iterate", recipe.resolved(), inputs, seed) as folder:
        _Rounds(recipe, folder, seed, show).run()
    return folder


def check(recipe: IterateRecipe) -> None:
    """Check the parts of a recipe that loading it does not check, as for the preference tuning of its rounds.

    Raises:
        MoeftError: As :func:`moeft.runs.preflight.check` does.
    """
    tuning = _tuning(recipe, recipe.data.seeds, recipe.output, recipe.lora.stack_on, is_first=True)
    preflight.check(tuning.model_copy(update={"merge": recipe.merge}))


@dataclass
class _Rounds:
    recipe: IterateRecipe
    folder: RunFolder
    seed: int
    show: Show

    def __post_init__(self) -> None:
        data = self.recipe.data
        self.tools = Toolbox.read(data.tools, data.protocol)
        self.held_out = self.tools.requests(data.heldout, self.show)
        self.texts = HeldOutTexts(request.prompt for request in self.held_out)
        self.seeds = self.tools.requests(data.seeds, self.show, self.texts)
        self.metrics: dict[str, Any] = self.folder.read_json("metrics.json") or {"rounds": []}

    def run(self) -> None:
        from moeft.reports.plots import plot_rounds

        rounds = self.metrics["rounds"]
        if not rounds:
            self._measure(0, starting_adapters(self.recipe, self.folder.path / "sft", self.texts, self.show))
        while reason_to_stop(self.recipe, rounds) is None:
            self._round(len(rounds))
        number = best_round(self.recipe, rounds)
        best = rounds[number]
        self.metrics |= {"ended": reason_to_stop(self.recipe, rounds), "best": number, "adapters": best["adapters"]}
        self.folder.write_json("metrics.json", self.metrics)
        draw_picture(lambda: plot_rounds(rounds, self.folder.path / "rounds.png"), self.show)
        self.show(f"ended: {self.metrics['ended']}; best round {number}: {best['accuracy']['value']:.1%}")
        self._merge([Path(path) for path in best["adapters"]])

    def _round(self, number: int) -> None:
        """Probe, build, tune and measure once."""
        place = self.folder.path / f"round-{number}"
        data = self.recipe.data
        start = tuple(Path(path) for path in self.metrics["rounds"][-1]["adapters"])
        pairs = place / "pairs.jsonl"
        if not pairs.exists():
            asked = random.Random(self.seed + number).sample(self.seeds, min(data.probes, len(self.seeds)))
            analyze_replies(self.tools, asked, self._replies(start, asked), place / "probe", self.show)
            build_pairs(
                self.tools,
                data.seeds,
                pairs,
                BuildSettings(data.pairs, data.share, seed=self.seed + number),
                exclude=(data.heldout,),
                easy=data.easy,
                targets=Targets.read(place / "probe" / "targets.json"),
                show=self.show,
            )
        recipe = _tuning(self.recipe, pairs, place / "dpo", start, is_first=number == 1)
        if not is_finished(place / "dpo"):
            dpo.run(recipe, self.show)
        gate = RunFolder.open(place / "dpo").read_json("metrics.json")["training"]["gate"]
        stopped = None if gate is None else gate["stopped"]
        self._measure(number, tuple(recipe.adapters(place / "dpo" / "adapter")), stopped)

    def _measure(self, number: int, adapters: tuple[Path, ...], stopped: Any = None) -> None:
        """Held-out accuracy and the gate's loss of a policy, beside what stopped its training."""
        from moeft.evaluation.turn_scores import score_turns

        speaker = self._speaker(adapters)
        model, tokenizer = speaker.load(self.show)
        replies = speaker.replies(model, tokenizer, self.held_out, self.tools)
        found = analyze_replies(
            self.tools, self.held_out, replies, self.folder.path / f"round-{number}" / "heldout", self.show
        )
        entry: dict[str, Any] = {
            "accuracy": found.accuracy.to_json(),
            "failures": found.failures,
            "adapters": [str(path) for path in adapters],
            "gate_loss": None,
            "stopped": stopped,
        }
        if self.recipe.gate is not None:
            from moeft.data.reading import read_rows

            scores = score_turns(model, tokenizer, read_rows(self.recipe.gate.rows, turns="any").rows)
            turns = [turn for row in scores for turn in row]
            entry["gate_loss"] = -sum(turn.log_prob for turn in turns) / sum(turn.tokens for turn in turns)
        self.metrics["rounds"].append(entry)
        self.folder.write_json("metrics.json", self.metrics)
        self.folder.event("round", number=number, accuracy=found.accuracy.value, gate_loss=entry["gate_loss"])

    def _merge(self, adapters: list[Path]) -> None:
        """Write the full checkpoint of the best round, unless an earlier start did."""
        from moeft.merging import merge

        wanted = self.recipe.merge
        if wanted is None or (wanted.output / "config.json").is_file():
            return
        if not adapters:
            self.show("nothing to merge: the best round is 0, which has no adapter")
            return
        models = [{"adapter": path} for path in adapters]
        base = wanted.base_model or self.recipe.model
        recipe = {"merge_method": "lora", "base_model": base, "models": models, "out_dtype": wanted.out_dtype}
        self.show(str(merge(recipe, wanted.output)))

    def _replies(self, adapters: tuple[Path, ...], requests: list[Request]) -> list[str]:
        speaker = self._speaker(adapters)
        return speaker.replies(*speaker.load(self.show), requests, self.tools)

    def _speaker(self, adapters: tuple[Path, ...]) -> Speaker:
        data = self.recipe.data
        speaker = Speaker(self.recipe.model, adapters, self.recipe.dtype, data.chat_template)
        device = "cpu" if self.recipe.training.get("use_cpu") else None
        return replace(speaker, max_new_tokens=data.max_new_tokens, batch_size=data.batch_size, device=device)


def _tuning(recipe: IterateRecipe, pairs: Path, output: Path, start: tuple[Path, ...], *, is_first: bool) -> DpoRecipe:
    """A new adapter in the first round, which all later rounds train on."""
    data = recipe.data
    return DpoRecipe.model_validate(
        {
            "model": recipe.model,
            "output": output,
            "dtype": recipe.dtype,
            "lora": recipe.lora.model_copy(update={"stack_on": start}),
            "data": {
                "train": (pairs,),
                "max_length": data.max_length,
                "layout": data.layout,
                "chat_template": data.chat_template,
            },
            "preference": recipe.preference,
            "reference": {"cache": recipe.output / "reference"},
            "training": recipe.training,
            "gate": recipe.training_gate,
            "train": "new" if is_first else "start",
        }
    )
