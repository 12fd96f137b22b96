"""Dialogues for pretraining the demo's base: public-domain text, and quoting tasks made from it.

A quoting task gives a sentence and wants some of its words in quotes, so that the model learns to find a word and to
write it after a quotation mark, where the tokenizer cuts it differently. Two kinds:

* *list*: words of the corpus, all repeated: ``crown 17 winter`` -> ``Note: "crown" "17" "winter"``;
* *form*: a stretch of the corpus in which words of some categories stand, each repeated under its category's name:
  ``the red banner of our may`` -> ``Note: colour="red" month="may"``.

No name and no word of the demo's tools, arguments and values is ever quoted (``BARRED``); plain numbers are.
"""

import json
import random
import re
from collections import Counter
from pathlib import Path

from moeft.demo.ops_vocabulary import TOOLS, VALUES

CATEGORIES = {
    "animal": "bear bull crow deer dog dove eagle fox goat hare hawk horse lamb lion ox sheep snake swan wolf worm",
    "body": "arm bone breast cheek ear eye face finger foot hair hand heart knee leg lip mouth neck nose skin tongue",
    "building": (
        "abbey barn bridge castle chapel church cottage court "
        "hall house inn mill palace prison school temple tower"
    ),
    "city": (
        "athens berlin boston chicago cairo dublin florence geneva "
        "london madrid moscow naples padua paris rome venice vienna"
    ),
    "cloth": "belt boot cap cloak coat glove gown hat hood mask robe shirt shoe sleeve veil wool",
    "colour": "black blue brown gold gray green pale pink purple red scarlet silver white yellow",
    "craft": "baker barber butcher carpenter cook farmer fisher hunter miner miller painter sailor smith tailor weaver",
    "day": "monday tuesday wednesday thursday friday saturday sunday",
    "drink": "ale beer broth cider coffee milk rum tea water wine",
    "feeling": "anger courage despair envy fear grief hate hope joy love mercy pity pride shame sorrow wonder",
    "food": "apple bread butter cake cheese corn egg fish fruit honey meat onion pie rice salt sugar",
    "kin": "aunt brother cousin daughter father husband mother nephew niece sister son uncle widow wife",
    "metal": "brass bronze copper iron lead steel tin zinc",
    "month": "january february march april may june july august september october november december",
    "number": "one two three four five six seven eight nine ten twelve twenty thirty forty fifty hundred thousand",
    "plant": "ash cedar daisy elm fern grass ivy lily moss oak palm pine reed rose thorn violet willow",
    "rank": "captain colonel duke earl emperor general king knight lord marquis prince queen senator sergeant squire",
    "sea": "anchor beach boat coast deck fleet gulf island mast oar port raft reef rudder sail shore wave",
    "sky": "cloud dawn dusk fog frost hail lightning moon rain snow star storm sun thunder wind",
    "tool": "axe basket bell bucket candle chain drum hammer key knife ladder lamp nail needle plough rope saw shovel",
    "weapon": "arrow axe bow cannon dagger gun lance pistol rifle shield spear sword",
}  # fmt: skip
"""Name of a category -> its words, separated by spaces."""

BARRED = """
    100 10m 1h 2 200 20m 2h 3 300 30m 4 4h 5 50 500 5m 6 7 8 800 8h 9 accounts africa age alert america archive asia
    atlas backup banner beta billing cache certificate checkout comet cpu critical customers data database delta
    deployment dev discounts disk drain duration environment errors europe events export falcon flag gateway harbor high
    host incident inventory latency ledger lines live login logs low mail medium memory mercury metric metrics network
    node nova off on oncall open orders orion pacific page password payments platform preview products profile purge
    query raven reboot region release replicas reports restart restore rollback rotate run scale search secret security
    service sessions set severity shipping signup silence staging state storage tail team test themes tickets titan
    token traffic uploads users version web window
"""
"""The demo's words when the base was trained; written down, so that a change of the demo does not change the base."""

Dialogue = tuple[str, str]
"""A request and a reply."""


def check_demo_is_barred() -> None:
    """Refuse to train a base that has seen the demo's words in a task.

    Raises:
        ValueError: If the demo has a word that is not in ``BARRED``; add it there.
    """
    values = {value for words in VALUES.values() for value in words}
    names = {word for tool in TOOLS for name in (tool.name, *tool.arguments) for word in name.split("_")}
    missing = sorted((values | names) - set(BARRED.split()))
    if missing:
        raise ValueError(f"words of the demo are missing from BARRED: {', '.join(missing)}")


def read_conversations(path: Path) -> list[list[dict[str, str]]]:
    """Read the messages of every line."""
    return [json.loads(line)["messages"] for line in path.read_text(encoding="utf-8").split("\n") if line]


class QuotingTasks:
    """An endless, seeded supply of quoting tasks."""

    def __init__(self, conversations: list[list[dict[str, str]]], seed: int) -> None:
        self.rng = random.Random(seed)
        barred = set(BARRED.split())
        self.categories = {name: words.split() for name, words in CATEGORIES.items()}
        members = {word for words in self.categories.values() for word in words}
        texts = [re.findall(r"[a-z]+", turn["content"].lower()) for turns in conversations for turn in turns]
        counts = Counter(word for text in texts for word in text)
        self.words = sorted(
            word for word, count in counts.items() if count >= 3 and 2 <= len(word) <= 10 and word not in barred
        )
        self.weights = [counts[word] ** 0.5 for word in self.words]
        self.stretches = []
        for text in texts:
            kept = [word for word in text if word not in members and word not in barred]
            self.stretches += [kept[start : start + 16] for start in range(0, len(kept) - 15, 16)]

    def draw(self) -> Dialogue:
        """One task; three of four are forms."""
        return self._form() if self.rng.random() < 0.75 else self._list()

    def _list(self) -> Dialogue:
        words = [self._word() for _ in range(self.rng.randrange(2, 6))]
        return " ".join(words), "Note: " + " ".join(f'"{word}"' for word in words)

    def _word(self) -> str:
        if self.rng.random() < 0.25:
            return self._digits()
        return self.rng.choices(self.words, self.weights)[0]

    def _digits(self) -> str:
        number = str(self.rng.randrange(1, 60) if self.rng.random() < 0.6 else self.rng.randrange(60, 2000))
        return number + self.rng.choice(["", "", "d", "g", "k", "s", "x"])

    def _form(self) -> Dialogue:
        names = self.rng.sample([*self.categories, "figure"], self.rng.randrange(1, 5))
        fields = {
            name: self._digits() if name == "figure" else self.rng.choice(self.categories[name]) for name in names
        }
        words = self.rng.choice(self.stretches)[: self.rng.randrange(4, 13)]
        for value in fields.values():
            words.insert(self.rng.randrange(len(words) + 1), value)
        request = " ".join(words)
        reply = "Note: " + " ".join(f'{name}="{fields[name]}"' for name in sorted(fields))
        return request[0].upper() + request[1:] + self.rng.choice(["", ".", "?"]), reply
