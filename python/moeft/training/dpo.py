"""Preference tuning: the policy learns to prefer the chosen answer of a pair to the rejected one."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader
from transformers.trainer_utils import EvalLoopOutput

from moeft.data import templates
from moeft.data.pair_batches import PairCollator
from moeft.data.pairs import EncodedPairs, Pair
from moeft.integration.log_probs import linear_head
from moeft.integration.token_divergences import token_divergences
from moeft.progress_bar import step_bar
from moeft.training.document_isolation import wants_documents
from moeft.training.dpo_arguments import DPOConfig
from moeft.training.preference.dataset import Dataset, check_encoded, encode_dataset
from moeft.training.preference.figures import KEYS, PairFigures
from moeft.training.preference.layout import usable_layout
from moeft.training.preference.losses import PairLosses, pair_losses
from moeft.training.preference.reference import Reference, ReferenceReport, tolerance, with_reference
from moeft.training.preference.reference_cache import ReferenceCache
from moeft.training.preference.reference_context import reference_context
from moeft.training.preference.scores import PairScores, chosen_rows, score_pairs, score_states, source_states
from moeft.training.preference.starting_policy import StartingPolicy
from moeft.training.preference.stop_rules import StopOnCollapse
from moeft.training.sft import padding_id
from moeft.training.trainer import MoeTrainer

logger = logging.getLogger(__name__)
DIVERGENCE_PAIRS = 64
"""Held-out pairs on whose chosen answers the divergence from the reference is measured."""


class DPOTrainer(MoeTrainer):
    """Trains a policy on preference pairs; both answers of a pair go through the model in one forward pass.

    The reference is the policy as it is handed in, with the same loaded weights: log-probabilities under it are taken
    before the first step, from ``args.reference_cache`` as far as they are there.

    Args:
        model: The policy, usually a PeftModel.
        args: Settings.
        train_dataset: File of preference rows, rows as mappings, or encoded pairs.
        processing_class: A fast tokenizer with a chat template.
        eval_dataset: Held-out pairs in the same form.
        **kwargs: As for :class:`moeft.training.trainer.MoeTrainer`.

    Attributes:
        train_pairs: What became of the training rows, rejects included.
        eval_pairs: The same for held-out rows; None without any.
        layout: How the two answers of a pair lie; another one than asked for if the model cannot do that.
        reference: How the log-probabilities under the reference came about; None before they are known.
        stopping: The stop rules; their ``reason`` says why training stopped early, if it did.

    Raises:
        DataError: If no pair can be used, or the template hides what the assistant said.
        UnsupportedModelError: If the head is no linear layer.
        ValueError: If there is more than one device.
    """

    args: DPOConfig
    logged_figures = KEYS
    unit = "pairs"

    def __init__(
        self,
        model: Any,
        args: DPOConfig,
        train_dataset: Dataset,
        processing_class: Any,
        eval_dataset: Dataset | None = None,
        **kwargs: Any,
    ) -> None:
        if args.world_size > 1 or args.n_gpu > 1:
            raise ValueError("preference pairs are trained on one device; start one process with one visible GPU")
        linear_head(model)
        origin = templates.apply(processing_class, args.chat_template, model.config.model_type)
        if origin is not None:
            logger.info("chat template: %s", origin)
        self.train_pairs = encode_dataset(train_dataset, processing_class, args)
        self.eval_pairs = None if eval_dataset is None else encode_dataset(eval_dataset, processing_class, args)
        for encoded in (self.train_pairs, self.eval_pairs):
            if encoded is not None:
                check_encoded(encoded, processing_class, model)
        self.layout = usable_layout(model, args.layout)
        # A prefix that two answers share is no document: its masks are made from segments.
        documents = self.layout != "shared_prefix" and wants_documents(model, args, self.layout == "packed")
        self.preference_loss = args.preference_loss
        self.start = StartingPolicy(model)
        self.reference: ReferenceReport | None = None
        self._figures = PairFigures()
        super().__init__(
            model=model,
            args=args,
            train_dataset=self.train_pairs.pairs,
            eval_dataset=None if self.eval_pairs is None else self.eval_pairs.pairs,
            processing_class=processing_class,
            data_collator=PairCollator(padding_id(processing_class), self.layout, documents),
            **kwargs,
        )
        # The loss is divided by the pairs of a step, over all its micro-batches.
        self.model_accepts_loss_kwargs = True
        self.stopping = StopOnCollapse(args.stop_rules, self.events)
        self.add_callback(self.stopping)

    def prepare_reference(self) -> ReferenceReport | None:
        """Take the log-probabilities under the reference, if the loss needs them and they are not known yet.

        Pairs whose log-probability is not finite are left out and join the rejects.

        Raises:
            DataError: If none is left.
        """
        if self.reference is not None or not self.preference_loss.needs_reference:
            return self.reference
        cache = None
        if self.args.reference_cache is not None:
            context = reference_context(self.model, self.start, self._precision())
            cache = ReferenceCache(self.args.reference_cache, context)
        dtype = self.model.get_input_embeddings().weight.dtype if self._precision() == "no" else torch.bfloat16
        reference = Reference(
            self._score_as_reference, self.args.eval_batch_size, cache, self.args.reference_verify, tolerance(dtype)
        )
        reports = []
        self.train_pairs, report = self._referenced(self.train_pairs, reference)
        reports.append(report)
        self.train_dataset = self.train_pairs.pairs
        if self.eval_pairs is not None:
            self.eval_pairs, report = self._referenced(self.eval_pairs, reference)
            reports.append(report)
            self.eval_dataset = self.eval_pairs.pairs
        self.reference = ReferenceReport(
            sum(report.cached for report in reports),
            sum(report.computed for report in reports),
            sum(report.verified for report in reports),
        )
        if self.events is not None:
            counts = self.reference
            self.events.event("reference", cached=counts.cached, computed=counts.computed, verified=counts.verified)
        return self.reference

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """Train, after the log-probabilities under the reference are known; as ``transformers.Trainer.train``."""
        self.prepare_reference()
        self._figures = PairFigures()  # without those of a micro-batch that was timed
        return super().train(*args, **kwargs)

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """Measure held-out pairs; as ``transformers.Trainer.evaluate``."""
        self.prepare_reference()
        return super().evaluate(*args, **kwargs)

    def tokens_of_epoch(self) -> tuple[int, int]:
        """Tokens of the training pairs as they are laid out, and how many of them are compared."""
        pairs = self.train_pairs.pairs
        saved = int(pairs.num_shared.sum()) if self.layout == "shared_prefix" else 0
        tokens = len(pairs.chosen.input_ids) + len(pairs.rejected.input_ids) - saved
        return tokens, pairs.chosen.num_trained + pairs.rejected.num_trained

    def sample_sequences(self, count: int) -> list[list[int]]:
        """Token ids of a few chosen conversations, held-out ones if there are any."""
        pairs = (self.eval_pairs or self.train_pairs).pairs
        return [example["input_ids"].tolist() for example in pairs.chosen[:count]]

    def get_batch_samples(self, *args: Any, **kwargs: Any) -> Any:
        """Micro-batches of a step, and how many pairs they hold."""
        batches, _ = super().get_batch_samples(*args, **kwargs)
        return batches, sum(len(batch["rows"]) for batch in batches)

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """Sum of the losses of a micro-batch's pairs over the pairs of the step, or of the micro-batch."""
        scores = score_pairs(self.model, inputs)
        losses = self._losses(scores, inputs)
        if self.model.training and torch.is_grad_enabled():
            self._figures.add(losses, scores, inputs["reference"])
        loss = losses.loss.sum() / (num_items_in_batch or len(losses.loss))
        return (loss, losses) if return_outputs else loss

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Log Trainer's figures with those of the pairs."""
        if "loss" in logs:
            figures = self._figures.read(self.preference_loss.is_mean)
            figures.pop("loss", None)
            logs |= figures
        super().log(logs, start_time)

    def evaluation_loop(
        self,
        dataloader: DataLoader,
        description: str,
        prediction_loss_only: bool | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> EvalLoopOutput:
        """Figures of held-out pairs, and how far the policy is from the reference on their chosen answers."""
        self.model.eval()
        figures = PairFigures()
        num_pairs = 0
        kept: list[tuple[Any, Tensor]] = []
        with torch.no_grad(), self.compute_loss_context_manager():
            for batch in dataloader:
                inputs = self._prepare_inputs(batch)
                states = source_states(self.model, inputs)
                scores = score_states(self.model, states, inputs)
                figures.add(self._losses(scores, inputs), scores, inputs["reference"])
                if num_pairs < DIVERGENCE_PAIRS:
                    kept.append((inputs, chosen_rows(states, inputs).cpu()))
                num_pairs += len(inputs["rows"])
            divergences = self._divergences(kept)
        read = figures.read(self.preference_loss.is_mean) | {"kl": float(divergences.double().mean())}
        metrics = {f"{metric_key_prefix}_{name}": value for name, value in read.items()}
        return EvalLoopOutput(predictions=None, label_ids=None, metrics=metrics, num_samples=num_pairs)

    def _losses(self, scores: PairScores, inputs: Any) -> PairLosses:
        reference = inputs["reference"] if self.preference_loss.needs_reference else None
        return pair_losses(self.preference_loss, scores.sums, scores.counts, reference)

    def _divergences(self, kept: list[tuple[Any, Tensor]]) -> Tensor:
        """``KL(policy || reference)`` before every token, of batches with their states under the policy."""
        head = linear_head(self.model)
        found = []
        with self.start.restored(self.model):
            for inputs, states in kept:
                reference = chosen_rows(source_states(self.model, inputs), inputs)
                found.append(token_divergences(states.to(reference.device), head, reference, head))
        return torch.cat(found)

    def _referenced(self, encoded: EncodedPairs, reference: Reference) -> tuple[EncodedPairs, ReferenceReport]:
        self.model.eval()
        with step_bar("reference", not self.args.disable_tqdm) as advance, self._routing_paused():
            return with_reference(encoded, reference, advance)

    def _score_as_reference(self, pairs: Sequence[Pair]) -> PairScores:
        batch = self._prepare_inputs(self.data_collator(pairs))
        with self.compute_loss_context_manager():
            return score_pairs(self.model, batch)

    def _precision(self) -> str:
        return str(self.accelerator.mixed_precision)

    def _routing_paused(self) -> Any:
        return nullcontext() if self.routing is None else self.routing.paused()
