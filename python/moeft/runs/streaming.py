"""Where the weights of a run lie: on the device, or streamed to it, as the recipe and its plan say."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from moeft.config import SftRecipe
from moeft.errors import RecipeError
from moeft.planning.sizes import format_bytes
from moeft.runs.context import RunContext
from moeft.runs.training_plan import memory_forecast

if TYPE_CHECKING:
    from moeft.integration.streaming import ExpertStream
    from moeft.planning import Plan


def forecast(run: RunContext[SftRecipe]) -> Plan | None:
    """The plan of this run, for where its experts wait, the report, and an error about memory; None without one.

    Raises:
        RecipeError: If experts are to be streamed, and there is no plan to say how many.
    """
    memory = run.recipe.memory
    planned = memory_forecast(run, memory.vram or _memory_of_gpu(run.recipe))
    if planned is None and memory.experts != "resident":
        raise RecipeError(f"memory.experts is {memory.experts!r}, which needs a plan of the memory; set it to resident")
    return planned


def stream_if_asked(run: RunContext[SftRecipe], model: Any, args: Any, planned: Plan | None) -> ExpertStream | None:
    """Stream experts as the recipe and its plan say, before the trainer moves the model to its device.

    Raises:
        RecipeError: If the memory that the recipe names is too small even with all experts streamed, or several GPUs
            would share the model.
        UnsupportedModelError: If the model has no packed experts.
    """
    memory = run.recipe.memory
    if memory.experts == "resident" or planned is None:
        return None
    from moeft.integration.streaming import stream_experts

    if args.n_gpu > 1:
        raise RecipeError(
            f"memory.experts streams to one GPU, and {args.n_gpu} are visible; choose one, as with "
            "CUDA_VISIBLE_DEVICES=0"
        )
    if planned.streaming is None and memory.experts == "auto":
        run.show("experts: all resident")
        return None
    if planned.fits is False:
        missing = format_bytes(planned.device_bytes - (planned.vram_bytes or 0))
        message = (
            f"the plan is {missing} over the card's memory with all experts streamed; `moeft plan` says what saves"
        )
        if memory.vram is not None:
            raise RecipeError(f"memory.vram is {memory.vram}, and {message}")
        run.show(f"warning: {message}")
    resident = 0 if planned.streaming is None else planned.streaming.resident
    stream = stream_experts(model, args.device, resident, memory.backing)
    run.metrics["streaming"] = {
        "layers": stream.layers,
        "resident": list(stream.resident),
        "slot_bytes": stream.ring.num_bytes,
        "host_bytes": stream.host_bytes,
        "backing": memory.backing,
    }
    run.show(
        f"experts streamed: {len(stream.resident)} of {stream.layers} layers resident, "
        f"{format_bytes(stream.ring.num_bytes)} of slots, {format_bytes(stream.host_bytes)} of host memory"
    )
    return stream


def place_on_gpu(run: RunContext[SftRecipe], model: Any, args: Any) -> None:
    """Move a model that a single GPU trains, from the files of its checkpoint; the trainer moves any other."""
    if args.device.type == "cuda" and args.world_size == 1 and args.n_gpu == 1:
        from moeft.integration.placing import place

        place(model, args.device, sorted(run.recipe.model.glob("*.safetensors")))


def _memory_of_gpu(recipe: SftRecipe) -> int | None:
    """All memory of the GPU that training would take; None without one."""
    import torch

    if recipe.training.get("use_cpu") or not torch.cuda.is_available():
        return None
    return torch.cuda.get_device_properties(torch.cuda.current_device()).total_memory
