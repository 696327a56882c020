"""Openings of film reviews, written for this project, that a language model is asked to go on from.

Held-out openings differ from the training ones in their stem, not only in the kind of film they name.
"""

KINDS = ("film", "comedy", "thriller", "drama", "sequel", "western", "documentary", "romance")

TRAIN_STEMS = (
    "The acting in this {} was",
    "I watched this {} with my sister and",
    "After an hour of this {} I felt",
    "The plot of this {} is",
    "What I will remember about this {} is",
    "My first thought when this {} ended was that",
    "Compared with the book, this {} is",
    "The music in this {} made me",
    "The last scene of this {} left me",
    "I went to see this {} on a rainy evening and",
    "Critics have called this {}",
    "The dialogue in this {} sounds",
    "The lead actor in this {} gives a performance that",
    "Halfway through this {} the audience",
    "This {} is two hours long and it feels",
    "The director of this {} has",
    "Everyone at work told me about this {}, and",
    "The camera work in this {} is",
    "If I had to describe this {} in one word, it would be",
    "I expected little from this {}, but",
    "The characters in this {} are",
    "Watching this {} a second time, I",
    "My friends and I talked about this {} all night because",
    "The ending of this {} was so",
    "This {} tries to be clever, and",
    "The opening minutes of this {} are",
    "As a fan of the genre I found this {}",
    "The special effects in this {} look",
    "There is a moment in this {} when",
    "I would tell anyone who asks about this {} that",
)

HELD_OUT_STEMS = (
    "Honestly, this {} is",
    "The story told in this {} is",
    "I left the cinema after this {} feeling",
    "The young actress in this {} is",
    "The script of this {} was written by someone who",
    "When people ask me about this {}, I say it is",
    "The pacing of this {} is",
    "By the time this {} was over, my family",
)

TRAIN = tuple(stem.format(kind) for stem in TRAIN_STEMS for kind in KINDS)
HELD_OUT = tuple(stem.format(kind) for stem in HELD_OUT_STEMS for kind in KINDS)
