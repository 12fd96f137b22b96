"""The demo's tools as OpenAI's ``tools``."""

from typing import Any

from moeft.demo.ops_vocabulary import TOOLS, VALUES


def ops_tools() -> list[dict[str, Any]]:
    """Schemas of the ops agent's tools; every argument is a text of a closed vocabulary."""
    return [
        {
            "type": "function",
            "function": {
                "name": tool.name,
                "description": tool.phrasings[1].replace("{", "<").replace("}", ">").capitalize(),
                "parameters": {
                    "type": "object",
                    "properties": {
                        key: {"type": "string", "enum": list(VALUES[of])} for key, of in tool.arguments.items()
                    },
                    "required": list(tool.arguments),
                },
            },
        }
        for tool in TOOLS
    ]
