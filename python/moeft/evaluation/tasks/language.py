"""Whether a model answers in the language that it is asked in."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from moeft.errors import DataError, MissingExtraError
from moeft.evaluation.sources import Record
from moeft.evaluation.task import Figures, Item, Metric, Task, share
from moeft.evaluation.tasks.replies import chat_item, reply_task

MAX_NEW_TOKENS = 64
PROMPTS = {
    "en": ("Describe the sea in three sentences.", "What do bees do in winter?", "Why do people sleep at night?"),
    "de": (
        "Beschreibe das Meer in drei Sätzen.",
        "Was machen Bienen im Winter?",
        "Warum schlafen die Menschen in der Nacht?",
    ),
    "fr": (
        "Décris la mer en trois phrases.",
        "Que font les abeilles en hiver ?",
        "Pourquoi les gens dorment-ils la nuit ?",
    ),
    "es": (
        "Describe el mar en tres frases.",
        "¿Qué hacen las abejas en invierno?",
        "¿Por qué la gente duerme por la noche?",
    ),
    "it": ("Descrivi il mare in tre frasi.", "Che cosa fanno le api d'inverno?", "Perché le persone dormono di notte?"),
    "pt": (
        "Descreva o mar em três frases.",
        "O que as abelhas fazem no inverno?",
        "Por que as pessoas dormem à noite?",
    ),
    "nl": ("Beschrijf de zee in drie zinnen.", "Wat doen bijen in de winter?", "Waarom slapen mensen 's nachts?"),
    "pl": ("Opisz morze w trzech zdaniach.", "Co robią pszczoły zimą?", "Dlaczego ludzie śpią w nocy?"),
    "ru": ("Опиши море в трёх предложениях.", "Что делают пчёлы зимой?", "Почему люди спят ночью?"),
    "zh": ("用三句话描述大海。", "蜜蜂冬天做什么？", "为什么人们在晚上睡觉？"),
    "ja": (
        "海を三つの文で説明してください。",
        "ミツバチは冬に何をしますか。",
        "なぜ人は夜に眠るのですか。",
    ),
    "ko": ("바다를 세 문장으로 묘사해 주세요.", "벌은 겨울에 무엇을 합니까?", "사람들은 왜 밤에 잠을 잡니까?"),
}
"""Language -> questions that are asked where no file is given."""


def language(rows: Sequence[Record]) -> Task:
    """Rows with a ``prompt`` and the ``language`` of the reply, an ISO 639-1 code."""
    _detector()  # What is missing is said now, and not behind all generation.
    items = []
    for line, row in rows:
        code = row.get("language")
        if not isinstance(code, str) or len(code) != 2:
            raise DataError(f"task language: row {line} has {code!r} in `language`, expected a code such as 'de'")
        items.append(chat_item("language", line, row, MAX_NEW_TOKENS, code))
    return reply_task("language", items, (Metric("same_language"),), _judge)


def built_in() -> list[Record]:
    """Rows of the questions in :data:`PROMPTS`."""
    return [
        (f"{code}.{number}", {"prompt": prompt, "language": code})
        for code, prompts in PROMPTS.items()
        for number, prompt in enumerate(prompts, start=1)
    ]


def _judge(item: Item, reply: str) -> Figures:
    # Codes of three letters are those of its smaller languages, among them Wu Chinese, which it takes Chinese for.
    found = next(code for code, _ in _detector().rank(reply) if len(code) == 2)
    # Of an empty reply the detector says English.
    return {"same_language": share(bool(reply.strip()) and found == item.reference)}


def _detector() -> Any:
    try:
        import py3langid
    except ImportError as error:
        raise MissingExtraError("task language needs py3langid; install it with: pip install 'moeft[data]'") from error
    return py3langid
