#!/usr/bin/env python
"""Make tests/goldens/families.json: logits of tiny random models, one a family, by transformers.

    pip install torch==2.13.0; python scripts/make_goldens_families.py

The weights are NumPy's, seeded by each tensor's place in a sorted list of names, so that the file holds logits alone.
"""

import json
import sys
from pathlib import Path

import numpy as np
import torch
from transformers import AutoConfig, AutoModelForCausalLM

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from tests.models.families import FAMILIES, TOKENS, random_tensor  # noqa: E402


def main() -> None:
    goldens = {}
    for name, raw in FAMILIES.items():
        config = AutoConfig.for_model(**{k: v for k, v in raw.items() if k != "architectures"})
        model = AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
        state = model.state_dict()
        tied = {"lm_head.weight"} if raw["tie_word_embeddings"] else set()
        for i, key in enumerate(sorted(state.keys() - tied)):
            state[key].copy_(torch.tensor(random_tensor(i, tuple(state[key].shape))))
        with torch.no_grad():
            logits = model(torch.tensor(TOKENS)).logits.numpy()
        # Of every eighth position, every thirty-second token of the vocabulary.
        goldens[name] = np.round(logits[:, ::8, ::32], 5).tolist()
    path = ROOT / "tests" / "goldens" / "families.json"
    path.write_text(json.dumps(goldens))
    print(f"{path}: {path.stat().st_size} bytes")


if __name__ == "__main__":
    main()
