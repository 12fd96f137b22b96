"""Several adapters active on one model at once: a second one trained on top of a first one."""

from __future__ import annotations

from pathlib import Path

from peft import LoraConfig, PeftModel

from moeft.errors import AdapterError


def add(model: PeftModel, config: LoraConfig, name: str) -> None:
    """Add a fresh adapter that trains, on top of the active ones, which stay active and are frozen.

    Raises:
        ValueError: If the name is taken or cannot be used.
        AdapterError: If both adapt experts, and not the same stacks.
    """
    check_name(name, model)
    _match_stacks(model, config)
    active = list(model.active_adapters)
    model.add_adapter(name, config)
    activate(model, [*active, name], trainable=[name])


def load(model: PeftModel, path: Path, trainable: bool, name: str) -> None:
    """Load a saved adapter on top of the active ones, which stay active and are frozen.

    Raises:
        ValueError: If the name is taken or cannot be used.
        AdapterError: If both adapt experts, and not the same stacks.
    """
    check_name(name, model)
    config = LoraConfig.from_pretrained(str(path))
    config.inference_mode = not trainable
    _match_stacks(model, config)
    active = list(model.active_adapters)
    model.add_adapter(name, config)
    model.load_adapter(path, name, is_trainable=trainable)
    activate(model, [*active, name], trainable=[name] if trainable else [])


def activate(model: PeftModel, names: list[str], trainable: list[str]) -> None:
    """Let some adapters act at once, and some of those train."""
    model.base_model.set_adapter(names)
    for parameter_name, parameter in model.named_parameters():
        if ".lora_" in parameter_name:
            parameter.requires_grad_(any(f".{name}." in parameter_name for name in trainable))


def restore(model: PeftModel, checkpoint: Path) -> None:
    """Load every adapter of the model from a checkpoint; which of them act and which train stays as it is.

    Raises:
        OSError, ValueError: If an adapter is not in the checkpoint.
    """
    active = list(model.active_adapters)
    training = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    for name in model.peft_config:
        model.load_adapter(checkpoint if name == "default" else checkpoint / name, name)
    model.base_model.set_adapter(active)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in training)


def check_name(name: str, model: PeftModel | None = None) -> None:
    """Refuse a name that cannot be part of a parameter's name or that an adapter of the model has.

    Raises:
        ValueError: If so.
    """
    if not name.isidentifier():
        raise ValueError(f"name is {name!r}, expected letters, digits and underscores, such as 'second'")
    if model is not None and name in model.peft_config:
        taken = ", ".join(model.peft_config)
        raise ValueError(f"name is {name!r}, but the model has adapters {taken}; choose another name")


def _match_stacks(model: PeftModel, config: LoraConfig) -> None:
    """Check what PEFT demands of two adapters with experts, and spell the stacks as the first one does.

    PEFT tells the stacks of a module apart by the order in which their wrappers are nested, so all adapters of a model
    must adapt the same ones; it compares the names as they are written, which may be long or short.
    """
    if not config.target_parameters:
        return
    parameters = [n.replace(".base_layer", "") for n, _ in model.get_base_model().named_parameters()]
    wanted = _matching(parameters, config.target_parameters)
    for name, other in model.peft_config.items():
        if not other.target_parameters:
            continue
        present = _matching(parameters, other.target_parameters)
        if present != wanted:
            odd = sorted(present ^ wanted)[0]
            raise AdapterError(
                f"adapter {name!r} changes {len(present)} stacks of experts, the new one {len(wanted)}, only one "
                f"of them {odd}; PEFT needs the same stacks in both: the same layers, and gate_up_proj and "
                "down_proj or the same one of them"
            )
        config.target_parameters = list(other.target_parameters)


def _matching(parameters: list[str], targets: list[str]) -> set[str]:
    ends = tuple(f".{target}" for target in targets)
    return {name for name in parameters if name in targets or name.endswith(ends)}
