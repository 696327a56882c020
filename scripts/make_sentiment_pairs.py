#!/usr/bin/env python3
"""Make the quickstart's preference pairs: the model's own continuations of review openings, labelled by VADER.

For every opening the model draws continuations at temperature 1; each is cut at its last sentence end and scored by
VADER's compound sentiment (-1 to 1). The best is paired with the worst, the second best with the second worst, where
their scores differ by at least MIN_GAP. Openings with no such pair give none; the counts are printed.

    .venv/bin/python scripts/make_sentiment_pairs.py        (2 cores: about 7 minutes)

writes experiments/data/sentiment_train.jsonl and experiments/data/sentiment_heldout.jsonl.
"""

import json
import re
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from dpojax.generate import make_sampler, sample_all
from dpojax.models import load_model, load_tokenizer
from experiments.common import smollm2_path, vader_scores
from experiments.data import openings

DRAWS, NEW_TOKENS, MIN_GAP, MIN_WORDS, SEED = 12, 24, 0.5, 4, 0
TOGETHER, SIDE_BY_SIDE = 4, 64  # samples of one computation of a prompt, and of one batch
OUT = Path(__file__).resolve().parent.parent / "experiments" / "data"


def whole_sentences(text: str) -> str:
    """The text up to its last sentence end, so that an EOS after it is natural; empty where there is none."""
    match = re.match(r"^.*[.!?][\"')]?(?=\s|$)", text, flags=re.DOTALL)
    return match.group(0) if match else ""


def pairs_of(prompt: str, texts: list[str]) -> list[dict]:
    usable = sorted({t for t in map(whole_sentences, texts) if len(t.split()) >= MIN_WORDS and "\n" not in t})
    ranked = sorted(zip(vader_scores(usable), usable, strict=True))
    pairs = []
    for i in range(min(2, len(ranked) // 2)):
        (low, rejected), (high, chosen) = ranked[i], ranked[-1 - i]
        if high - low >= MIN_GAP:
            scores = {"chosen_score": round(high, 4), "rejected_score": round(low, 4)}
            pairs.append({"prompt": prompt, "chosen": chosen, "rejected": rejected, **scores})
    return pairs


def main() -> None:
    path = smollm2_path()
    model, tokenizer = load_model(path), load_tokenizer(path)
    sampler = make_sampler(
        model.config, num_samples=TOGETHER, max_new_tokens=NEW_TOKENS, eos_ids=model.eos_ids(tokenizer)
    )
    OUT.mkdir(parents=True, exist_ok=True)
    for name, prompts in (("train", openings.TRAIN), ("heldout", openings.HELD_OUT)):
        start = time.time()

        def track(batches, name=name, start=start):
            for i in batches:
                yield i
                print(f"{name}: batch {i + 1}/{len(batches)}, {time.time() - start:.0f} s", flush=True)

        ids = [tokenizer(prompt)["input_ids"] for prompt in prompts for _ in range(DRAWS // TOGETHER)]
        drawn = sample_all(sampler, model.params, ids, batch_size=SIDE_BY_SIDE // TOGETHER, seed=SEED, track=track)
        texts = [tokenizer.decode(t, skip_special_tokens=True) for rows in drawn.lists() for t in rows]
        rows = [row for i, p in enumerate(prompts) for row in pairs_of(p, texts[i * DRAWS : (i + 1) * DRAWS])]
        with_pairs = len({row["prompt"] for row in rows})
        (OUT / f"sentiment_{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        print(f"{name}: {len(rows)} pairs from {with_pairs} of {len(prompts)} openings, {len(texts)} continuations")


if __name__ == "__main__":
    main()
