"""``moeft sft``: load, add LoRA, measure, train, measure again, save, merge. Each finished step survives a restart."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moeft.config import SftRecipe, validate_optimizer, validate_training_fields
from moeft.errors import CheckpointError, MoeftError, RecipeError
from moeft.provenance import RunFolder
from moeft.runs.adapter import adapted
from moeft.runs.replies import HeldOutCalls

if TYPE_CHECKING:
    from moeft.config.sft import Merge
    from moeft.integration.audit import Audit
    from moeft.planning import Plan
    from moeft.training.sft import SFTTrainer

PROOF_ROWS = 8


def run(recipe: SftRecipe, show: Callable[[str], None] = print) -> RunFolder:
    """Run a recipe, or continue its interrupted run.

    Args:
        recipe: The resolved recipe.
        show: Where to print what is found.

    Returns:
        The finished run folder: ``adapter/``, ``checkpoints/``, ``metrics.json``, ``rejects.jsonl``, ``run.json`` and
        ``events.jsonl``; the merged checkpoint lies where the recipe says.

    Raises:
        MoeftError: If the recipe, the model, the data or the training cannot be used; see the classes.
    """
    validate_training_fields(recipe.training)
    validate_optimizer(recipe.training)
    _check_policy(recipe)
    _check_merge(recipe)
    inputs = {"model": recipe.model, **{f"train[{i}]": path for i, path in enumerate(recipe.data.train)}}
    inputs |= {
        name: path
        for name, path in (
            ("eval", recipe.data.eval),
            ("tool_calls", recipe.evaluation.tool_calls),
            ("chat_template", recipe.data.chat_template),
        )
        if isinstance(path, Path)
    }
    inputs |= {f"stack_on[{i}]": path for i, path in enumerate(recipe.lora.stack_on)}
    seed = int(recipe.training.get("seed", 42))
    with RunFolder.create(recipe.output, "moeft sft", recipe.resolved(), inputs, seed) as folder:
        _Run(recipe, folder, show).execute()
    return folder


def _check_policy(recipe: SftRecipe) -> None:
    """Refuse an unknown policy before the run folder is written.

    Raises:
        RecipeError: If ``training.activation_checkpointing`` is a word that is not a policy.
    """
    from moeft.training.layer_policies import check_policy_choice

    policy = recipe.training.get("activation_checkpointing")
    try:
        if isinstance(policy, str):
            check_policy_choice(policy)
    except ValueError as error:
        raise RecipeError(f"training.{error}") from error


def _check_merge(recipe: SftRecipe) -> None:
    """Refuse before training what the merge would refuse after it.

    Raises:
        RecipeError: If the base to merge into is packed, or a new run would merge into a folder that is not empty.
    """
    if recipe.merge is None:
        return
    if recipe.merge.verify and recipe.lora.stack_on:
        raise RecipeError(
            "merge.verify proves the merge of one adapter, and lora.stack_on names others; set merge.verify to false"
        )
    base, output = recipe.merge.base_model or recipe.model, recipe.merge.output
    config = base / "config.json"
    if config.is_file() and "quantization_config" in json.loads(config.read_text("utf-8")):
        raise RecipeError(
            f"an adapter is merged into a 16-bit checkpoint, and {base} is quantised; set merge.base_model to the "
            "checkpoint that it was made from"
        )
    continued = (recipe.output / "run.json").exists()
    if not continued and output.is_dir() and any(output.iterdir()):
        raise RecipeError(f"merge.output {output} is not empty; choose another folder, or remove it")


class _Run:
    def __init__(self, recipe: SftRecipe, folder: RunFolder, show: Callable[[str], None]) -> None:
        self.recipe = recipe
        self.folder = folder
        self.show = show
        self.metrics: dict[str, Any] = folder.read_json("metrics.json") or {}
        path = recipe.evaluation.tool_calls
        self.calls = None if path is None else HeldOutCalls(path, recipe.evaluation)

    def execute(self) -> None:
        with self.stage("load"):
            trainer = self.trainer()
        if "before" not in self.metrics.get("heldout", {}):
            with self.stage("measure before"):
                self.measure(trainer, "before")
        with self.stage("train"):
            self.train(trainer)
        with self.stage("save adapter"):
            trainer.model.save_pretrained(str(self.folder.path / "adapter"), selected_adapters=["default"])
        with self.stage("measure after"):
            self.measure(trainer, "after")
        if self.recipe.merge is not None:
            if not self.merged(self.recipe.merge.output):
                with self.stage("merge"):
                    self.merge(self.recipe.merge)
            if self.recipe.merge.verify:
                with self.stage("prove"):
                    self.prove(trainer, self.recipe.merge)

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        start = time.perf_counter()
        self.folder.event("stage", name=name, status="started", seconds=0.0)
        try:
            yield
        finally:
            self.folder.write_json("metrics.json", self.metrics)
        self.folder.event("stage", name=name, status="finished", seconds=time.perf_counter() - start)

    def merged(self, output: Path) -> bool:
        """Whether an earlier start of this run merged: the folder appears only when it is complete."""
        return (output / "config.json").is_file() and any(
            event["name"] == "merge" for event in self.folder.events("stage")
        )

    def trainer(self) -> SFTTrainer:
        from moeft.data import templates
        from moeft.integration.audit import audit
        from moeft.integration.loading import load
        from moeft.integration.nf4_config import NF4Config
        from moeft.training.sft import SFTConfig, SFTTrainer

        recipe = self.recipe
        args = SFTConfig(
            output_dir=str(self.folder.path / "checkpoints"),
            train_on=recipe.data.train_on,
            max_length=recipe.data.max_length,
            on_too_long=recipe.data.on_too_long,
            packing=recipe.data.packing,
            reasoning=recipe.data.reasoning,
            cache_dir=str(recipe.data.cache_dir or self.folder.path / "encoded"),
            **recipe.training,
        )
        wanted = recipe.quantization
        config = None if wanted is None else NF4Config(**wanted.model_dump())
        model, tokenizer = load(recipe.model, config, recipe.text_only, recipe.dtype)
        if tokenizer is None:
            raise CheckpointError(f"{recipe.model} holds no tokenizer; copy that of the base beside the weights")
        origin = templates.apply(tokenizer, recipe.data.chat_template, model.config.model_type)
        if origin is not None:
            self.show(f"chat template: {origin}")
        packed = getattr(model.config, "quantization_config", None)
        found = audit(model, strict=bool(packed and packed.experts))
        self.show(str(found))
        self.metrics["bytes"] = self.bytes_by_component(found)
        rows = self.training_rows(tokenizer, args, model)
        trainer = SFTTrainer(
            model=adapted(model, recipe.lora, rows.examples, self.metrics, self.show),
            args=args,
            train_dataset=rows,
            eval_dataset=recipe.data.eval,
            processing_class=tokenizer,
            events=self.folder,
        )
        trainer.forecast = self.forecast()
        self.count_rows(trainer)
        return trainer

    def forecast(self) -> Plan | None:
        """The plan of this run, for the report and for an error about memory."""
        from moeft.planning import plan

        try:
            forecast = plan(self.recipe.model, recipe=self.recipe)
        except MoeftError as error:  # A model that loads and cannot be planned is no reason not to train it.
            self.show(f"no memory plan: {error}")
            return None
        self.metrics["plan"] = {
            "peak_allocated_bytes": forecast.peak_allocated_bytes,
            "peak_reserved_bytes": forecast.peak_reserved_bytes,
        }
        return forecast

    def bytes_by_component(self, found: Audit) -> dict[str, Any]:
        """Bytes of the checkpoint before and after packing; of the model in memory if it was packed while loading."""
        from moeft.checkpoint import read_report

        report = read_report(self.recipe.model)
        if report is None:
            return {"after": found.bytes_by_component()}
        return {when: report.bytes_by_component(when) for when in ("before", "after")}

    def training_rows(self, tokenizer: Any, args: Any, model: Any) -> Any:
        """Rows of all training files, encoded, with the rejects of all."""
        from moeft.data.chat import Encoded
        from moeft.training.sft import encode_dataset

        return Encoded.join(encode_dataset(path, tokenizer, args, model) for path in self.recipe.data.train)

    def count_rows(self, trainer: SFTTrainer) -> None:
        from moeft.data.rows import write_rejects

        counts: dict[str, float] = {
            "train_rows": len(trainer.train_rows.examples),
            "train_tokens": trainer.train_rows.num_tokens,
            "trained_tokens": trainer.train_rows.num_trained_tokens,
            "rejected_rows": len(trainer.train_rows.rejects),
            "shortened_rows": trainer.train_rows.num_shortened,
        }
        rejects = list(trainer.train_rows.rejects)
        if trainer.eval_rows is not None:
            counts |= {"heldout_rows": len(trainer.eval_rows.examples)}
            rejects += trainer.eval_rows.rejects
        write_rejects(rejects, self.folder.path / "rejects.jsonl")
        self.metrics["data"] = counts
        self.show(f"training rows: {trainer.train_rows}")
        if trainer.train_packs is not None:
            packs = trainer.train_packs
            counts |= {"packs": len(packs.packs), "packing_efficiency": packs.efficiency}
            self.show(f"packing: {packs}")
        if rejects:
            self.show(f"{len(rejects)} rows rejected, reasons in {self.folder.path / 'rejects.jsonl'}")

    def measure(self, trainer: SFTTrainer, when: str) -> None:
        """Held-out loss and tool calls, before or after training."""
        figures: dict[str, Any] = {}
        if trainer.eval_rows is not None:
            figures["loss"] = trainer.evaluate()["eval_loss"]
        if self.calls is not None:
            scores, replies = self.calls.score(trainer.model, trainer.processing_class)
            figures |= scores
            self.keep_samples(replies, when)
        self.metrics.setdefault("heldout", {})[when] = figures
        if figures:
            self.show(f"held out {when} training: " + ", ".join(f"{k} {v:.4g}" for k, v in figures.items()))

    def keep_samples(self, replies: list[str], when: str) -> None:
        assert self.calls is not None
        samples = self.metrics.setdefault("samples", self.calls.samples())
        for sample, reply in zip(samples, replies, strict=True):
            sample[when] = reply

    def train(self, trainer: SFTTrainer) -> None:
        from moeft.training.checkpoints import last_checkpoint

        last = last_checkpoint(Path(trainer.args.output_dir))
        trainer.train(resume_from_checkpoint=None if last is None else str(last))
        throughput = trainer.throughput
        self.metrics["training"] = {
            "steps": trainer.state.global_step,
            "seconds": throughput.total_seconds,
            "tokens": throughput.total_tokens,
            "tokens_per_second": throughput.total_tokens / throughput.total_seconds,
            "peak_bytes": max((log["peak_bytes"] for log in self.folder.events("train_log")), default=0),
            "skipped_steps": trainer.skipped_steps,
            "resumed_from": None if last is None else last.name,
            "routing": None if trainer.routing is None else trainer.routing.summary(),
        }

    def merge(self, wanted: Merge) -> None:
        from moeft.merging import merge

        report = merge(
            {
                "merge_method": "lora",
                "base_model": self.base(wanted),
                "models": [{"adapter": path} for path in (*self.recipe.lora.stack_on, self.folder.path / "adapter")],
                "out_dtype": wanted.out_dtype,
            },
            wanted.output,
        )
        self.show(str(report))

    def prove(self, trainer: SFTTrainer, wanted: Merge) -> None:
        """Proofs against plain PEFT, and samples of base and merged checkpoint by plain transformers."""
        from moeft.merging.verify import prove, require

        base, adapter = self.base(wanted), self.folder.path / "adapter"
        rows = (trainer.eval_rows or trainer.train_rows).examples[:PROOF_ROWS]
        proofs = prove(base, trainer.model, adapter, wanted.output, [row["input_ids"].tolist() for row in rows])
        self.metrics["proofs"] = [proof.to_json() for proof in proofs]
        for proof in proofs:
            self.show(str(proof))
        if self.calls is not None:
            for when, checkpoint in (("before", base), ("after", wanted.output)):
                self.keep_samples(self.calls.sample_replies(checkpoint, self.recipe.dtype), when)
            for sample in self.metrics["samples"]:
                self.show("\n  ".join([sample["prompt"], f"before: {sample['before']}", f"after:  {sample['after']}"]))
        require(proofs)

    def base(self, wanted: Merge) -> Path:
        """The 16-bit checkpoint that the adapter is merged into."""
        return wanted.base_model or self.recipe.model
