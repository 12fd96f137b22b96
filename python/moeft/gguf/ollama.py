"""A Modelfile, with which Ollama takes a GGUF file as a chat model: template, stop tokens, sampling, context.

Source: https://docs.ollama.com/modelfile; templates are in the language of Go's text/template.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moeft.data import templates
from moeft.errors import CheckpointError
from moeft.gguf.config import TextConfig, read_json
from moeft.gguf.tokenizer import chat_template

# Of generation_config.json -> Ollama's names.
SAMPLING = {
    "temperature": "temperature",
    "top_k": "top_k",
    "top_p": "top_p",
    "min_p": "min_p",
    "repetition_penalty": "repeat_penalty",
}


@dataclass(frozen=True)
class Turns:
    """How a chat format writes turns.

    Attributes:
        start: Before the text, with ``{}`` for the role.
        end: After the text, the line break included.
        assistant: What the assistant is called.
        has_system: Whether there are turns of the system; else its text stands before the first user's.
    """

    start: str
    end: str
    assistant: str = "assistant"
    has_system: bool = True


FORMATS = {
    "gemma4": Turns("<|turn>{}\n", "<turn|>\n", "model"),
    "gemma3": Turns("<start_of_turn>{}\n", "<end_of_turn>\n", "model", has_system=False),
    "llama3": Turns("<|start_header_id|>{}<|end_header_id|>\n\n", "<|eot_id|>"),
    "qwen3": Turns("<|im_start|>{}\n", "<|im_end|>\n"),
    "chatml": Turns("<|im_start|>{}\n", "<|im_end|>\n"),
}


def modelfile(model: str | Path, file: str | Path, context: int = 4096) -> str:
    """The text of a Modelfile beside a GGUF file.

    Args:
        model: Folder of the checkpoint that the file was made from.
        file: The GGUF file; Ollama takes no split models.
        context: Tokens of a conversation.

    Raises:
        CheckpointError: If the checkpoint lacks ``config.json`` or ``tokenizer.json``, or is damaged.
        ValueError: If the context is not positive, or a stop token cannot be written.
    """
    model, file = Path(model), Path(file)
    if context < 1:
        raise ValueError(f"context is {context}, expected a positive number of tokens")
    generation = model / "generation_config.json"
    settings = read_json(generation) if generation.is_file() else {}
    lines = [f"FROM ./{file.name}", f"PARAMETER num_ctx {context}"]
    lines += [f"PARAMETER {theirs} {settings[ours]}" for ours, theirs in SAMPLING.items() if _is_number(settings, ours)]
    lines += [f"PARAMETER stop {_quoted(token)}" for token in _stops(model, settings)]
    template = chat_template(model)
    name, is_known = templates.stand_in(template) if template else (None, False)
    if name is not None and not is_known and template != templates.shipped(name):
        lines.append(
            f"# The format was told by its marks, {name}. Whatever else the checkpoint's template writes, such as a"
        )
        lines.append("# system turn of its own, is not in this one.")
    if name is None:
        lines.append("# No chat format that moeft knows: Ollama takes the template in the file, if it knows that.")
    else:
        lines.append(f'TEMPLATE """{go_template(FORMATS[name])}"""')
    return "\n".join(lines) + "\n"


def go_template(turns: Turns) -> str:
    """The turns of a format as Ollama renders them, up to the beginning of the reply. Calls of tools are left out."""
    user, assistant = turns.start.format("user"), turns.start.format(turns.assistant)
    system = turns.start.format("system")
    before_user = "" if turns.has_system else "{{ if and $.System (le $i 1) }}{{ $.System }}\n\n{{ end }}"
    branches = [f'{{{{ if eq .Role "user" }}}}{user}{before_user}{{{{ .Content }}}}{turns.end}']
    if turns.has_system:
        branches.append(f'{{{{ else if eq .Role "system" }}}}{system}{{{{ .Content }}}}{turns.end}')
    branches.append(f'{{{{ else if eq .Role "assistant" }}}}{assistant}{{{{ .Content }}}}{turns.end}')
    body = "".join(branches) + "{{ end }}"
    return f"{{{{ range $i, $_ := .Messages }}}}{body}{{{{ end }}}}{assistant}"


def _is_number(settings: Mapping[str, Any], name: str) -> bool:
    return isinstance(settings.get(name), int | float) and not isinstance(settings[name], bool)


def _stops(model: Path, settings: Mapping[str, Any]) -> list[str]:
    """Texts of the tokens that end a reply, by the generation settings and the model's."""
    document = read_json(model / "tokenizer.json")
    try:
        texts = {index: text for text, index in document["model"]["vocab"].items()}
        texts |= {token["id"]: token["content"] for token in document.get("added_tokens") or []}
    except (KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{model / 'tokenizer.json'} has no vocabulary ({error!r}); copy it again") from error
    found: list[str] = []
    for known in (TextConfig(model).get("eos_token_id", default=None), settings.get("eos_token_id")):
        for index in known if isinstance(known, list) else [known]:
            if index in texts and texts[index] not in found:
                found.append(texts[index])
    return found


def _quoted(text: str) -> str:
    if '"' in text:
        raise ValueError(f"the stop token {text} has a quotation mark, which a Modelfile cannot hold")
    return f'"{text}"'
