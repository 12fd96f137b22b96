"""A layer that would keep random weights after loading is an error, never a warning."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from moeft.errors import CheckpointError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

SHOWN = 6


def require_complete(model: PreTrainedModel) -> None:
    """Make the running ``from_pretrained`` of this model fail if a weight is missing, misshapen or not converted.

    transformers offers no hook that sees its loading report, so the method that finishes the report is wrapped for
    this one instance and this one load.
    """
    finish = model._adjust_missing_and_unexpected_keys

    def finish_and_check(loading_info: Any) -> None:
        finish(loading_info)
        del model._adjust_missing_and_unexpected_keys
        errors = dict(loading_info.conversion_errors)
        # transformers reports these in a `finally`, with an exception of its own that would hide ours.
        loading_info.conversion_errors.clear()
        check(loading_info.missing_keys, loading_info.mismatched_keys, errors)

    model._adjust_missing_and_unexpected_keys = finish_and_check


def check(missing: set[str], mismatched: set[Any], conversion_errors: dict[str, str]) -> None:
    """Raise unless every weight of a model came from the checkpoint.

    Raises:
        CheckpointError: Listing the weights that did not.
    """
    if conversion_errors:
        name, trace = next(iter(conversion_errors.items()))
        causes = [line for line in trace.splitlines() if "Error: " in line and " on tensors destined for " not in line]
        cause = causes[-1].partition("Error: ")[2] if causes else trace
        raise CheckpointError(f"{len(conversion_errors)} weights could not be converted, first {name}: {cause}")
    if mismatched:
        name, found, expected = sorted(mismatched, key=str)[0]
        raise CheckpointError(
            f"{len(mismatched)} weights have another shape than the model, first {name}: {tuple(found)} in the "
            f"checkpoint, {tuple(expected)} in the model; does config.json belong to these weights?"
        )
    if missing:
        names = sorted(missing)
        listed = ", ".join(names[:SHOWN]) + (f" and {len(names) - SHOWN} more" if len(names) > SHOWN else "")
        raise CheckpointError(
            f"{len(names)} weights are missing from the checkpoint and would stay random: {listed}; the download may "
            "be incomplete, or a multimodal checkpoint is loaded as text only (use moeft.load)"
        )
