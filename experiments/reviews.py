"""Synthetic film reviews, from a grammar of some 240 words: a language that a model of 100,000 parameters learns.

They are no data of anybody's, and no English that anybody wrote. Every review has a mood, which is not written down: it
makes good words, or bad ones, likelier through the whole of it. Its opening names a film and says nothing of the mood.
So a model of this language writes good, bad and mixed reviews, and what is left to learn from preferences is the mood.

    python -m experiments.reviews        prints a dozen
"""

import itertools
import random
from collections.abc import Sequence

KINDS = ["film", "comedy", "thriller", "drama", "sequel", "western", "documentary", "romance", "musical", "remake"]
PARTS = [
    "acting",
    "plot",
    "music",
    "script",
    "ending",
    "pacing",
    "dialogue",
    "camera",
    "story",
    "cast",
    "opening",
    "finale",
]
MAKERS = ["director", "writer", "narrator", "villain", "hero", "crew"]
THINGS = ["jokes", "songs", "fights", "colours", "costumes", "characters", "effects", "sounds", "dances", "scenes"]
FRIENDS = ["sister", "brother", "wife", "husband", "friend", "mother", "father", "neighbour"]
TIMES = ("after ten minutes", "in the middle", "near the end", "from start to end", "after an hour", "at times")
ADVERBS = ["very", "quite", "rather", "really", "so", "truly", "almost"]

ADJECTIVES = {
    "good": "good great wonderful superb excellent brilliant beautiful charming lovely fine delightful enjoyable "
    "amazing funny perfect fresh interesting entertaining strong smart warm outstanding fantastic pleasant clever",
    "bad": "bad terrible awful horrible dull boring weak poor annoying disappointing dreadful stupid ugly pathetic "
    "lame unpleasant ridiculous confusing empty sad painful lazy useless worthless silly",
    "plain": "long short slow quiet loud simple dark old usual familiar different plain busy modern quick",
}
VERBS = {
    "good": "loved enjoyed liked adored admired praised",
    "bad": "hated disliked regretted mocked resented dreaded",
    "plain": "watched finished followed discussed remembered noticed",
}
NOUNS = {
    "good": "joy treat pleasure success triumph delight marvel masterpiece winner",
    "bad": "mess failure disaster waste bore insult disappointment shame disgrace",
    "plain": "lesson journey puzzle portrait trip picture chapter",
}
FEELINGS = {
    "good": "happy thrilled amused hopeful pleased",
    "bad": "bored angry tired lost upset",
    "plain": "awake quiet early busy",
}
ADVICE = {
    "good": ("recommend it", "watch it again", "thank the director"),
    "bad": ("avoid it", "skip it", "blame the director"),
    "plain": ("wait a year", "read the book", "see another"),
}
MOODS, SHARES = (
    (0.08, 0.5, 0.92),
    (0.4, 0.2, 0.4),
)  # how likely a word of feeling is a good one; how many reviews have it
PLAIN = 0.25  # share of words that have no feeling
SKEW = 1.5  # words that come first in a list are likelier

OPENINGS = (
    ("the {part} of this {kind} is", "quality"),
    ("the {maker} of this {kind} was", "quality"),
    ("the {thing} in this {kind} are", "quality"),
    ("this {kind} is", "verdict"),
    ("my {friend} and i saw this {kind} and we", "verb"),
    ("i saw this {kind} with my {friend} and", "clause"),
    ("{time} in this {kind}", "clause"),
)


def openings() -> list[tuple[str, str]]:
    """Every opening, with the kind of words that go on from it."""
    slots = {"part": PARTS, "kind": KINDS, "maker": MAKERS, "thing": THINGS, "friend": FRIENDS, "time": TIMES}
    out = []
    for form, goes_on in OPENINGS:
        names = [name for name in slots if "{" + name + "}" in form]
        for words in itertools.product(*(slots[name] for name in names)):
            out.append((form.format(**dict(zip(names, words, strict=True))), goes_on))
    return out


class Writer:
    """Writes what comes after an opening, at random."""

    def __init__(self, seed: int):
        self.random = random.Random(seed)

    def of(self, words: Sequence[str]) -> str:
        return words[int(len(words) * self.random.random() ** SKEW)]

    def word(self, table: dict, mood: float) -> str:
        """A word of a table in a mood."""
        u = self.random.random()
        feeling = "plain" if u < PLAIN else "good" if self.random.random() < mood else "bad"
        words = table[feeling]
        return self.of(words.split() if isinstance(words, str) else words)

    def quality(self, mood: float) -> str:
        u, word = self.random.random(), self.word(ADJECTIVES, mood)
        if u < 0.45:
            return word
        if u < 0.75:
            return f"{self.of(ADVERBS)} {word}"
        joined = ("and", mood) if u < 0.9 else ("but", 1 - mood)
        return f"{word} {joined[0]} {self.word(ADJECTIVES, joined[1])}"

    def verdict(self, mood: float) -> str:
        noun = self.word(NOUNS, mood)
        return f"a {noun}" if self.random.random() < 0.5 else f"a {self.word(ADJECTIVES, mood)} {noun}"

    def verb(self, mood: float) -> str:
        return f"{self.word(VERBS, mood)} it"

    def clause(self, mood: float) -> str:
        u = self.random.random()
        who = f"the {self.of(PARTS if u < 0.2 else MAKERS)}"
        if u < 0.3:
            return f"{who} is {self.quality(mood)}"
        if u < 0.45:
            return f"the {self.of(THINGS)} are {self.quality(mood)}"
        if u < 0.6:
            return f"i {self.word(VERBS, mood)} the {self.of(THINGS)}"
        if u < 0.7:
            return f"it is {self.verdict(mood)}"
        if u < 0.8:
            return f"{self.of(TIMES)} i was {self.word(FEELINGS, mood)}"
        if u < 0.9:
            return f"my {self.of(FRIENDS)} {self.verb(mood)}"
        return f"i would {self.word(ADVICE, mood)}"

    def rest(self, goes_on: str) -> str:
        """A review from its opening on: one sentence or more, in one mood."""
        mood = self.random.choices(MOODS, SHARES)[0]
        text, u = getattr(self, goes_on)(mood), self.random.random()
        if u < 0.3:
            text += f" and {self.clause(mood)}"
        elif u < 0.4:
            text += f" , but {self.clause(1 - mood)}"
        text += " ."
        while self.random.random() < 0.45 and len(text.split()) < 16:
            text += f" {self.clause(mood)} ."
        return text


def reviews(n: int, openings: Sequence[tuple[str, str]], seed: int) -> list[tuple[str, str]]:
    """n reviews of these openings, drawn at random: the opening and the rest of each."""
    writer = Writer(seed)
    drawn = [openings[writer.random.randrange(len(openings))] for _ in range(n)]
    return [(opening, writer.rest(goes_on)) for opening, goes_on in drawn]


def vocabulary() -> list[str]:
    """Every word of the language, in order of the alphabet."""
    tables = (ADJECTIVES, VERBS, NOUNS, FEELINGS, ADVICE)
    texts = [text for text, _ in openings()] + [*ADVERBS, *TIMES, "but and , . a the are is i was would my it we"]
    texts += [
        text for table in tables for words in table.values() for text in ([words] if isinstance(words, str) else words)
    ]
    return sorted({word for text in texts for word in text.split()})


if __name__ == "__main__":
    for opening, rest in reviews(12, openings(), 0):
        print(f"{opening} | {rest}")
