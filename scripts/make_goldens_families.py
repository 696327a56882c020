#!/usr/bin/env python
"""Make tests/goldens/families.json: logits of tiny random models, one a family, by transformers.

    pip install torch==2.13.0; python scripts/make_goldens_families.py

The weights are NumPy's, seeded by each tensor's place in a sorted list of names, so that the file holds logits alone.
"""

import copy
import json
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch
from safetensors.numpy import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from tests.models.families import FAMILIES, TOKENS, random_tensor  # noqa: E402


def golden(raw: dict, directory: Path) -> list:
    """Logits of every eighth position and thirty-second token, of the model whose files hold the tests' tensors."""
    config = AutoConfig.for_model(**{k: v for k, v in copy.deepcopy(raw).items() if k != "architectures"})
    AutoModelForCausalLM.from_config(config).save_pretrained(directory)
    file = directory / "model.safetensors"
    tensors = {name: random_tensor(i, x.shape) for i, (name, x) in enumerate(sorted(load_file(file).items()))}
    save_file(tensors, file, metadata={"format": "pt"})
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32, attn_implementation="eager")
    with torch.no_grad():
        logits = model.eval()(torch.tensor(TOKENS)).logits.numpy()
    return np.round(logits[:, ::8, ::32], 5).tolist()


def main() -> None:
    goldens = {}
    for name, raw in FAMILIES.items():
        with tempfile.TemporaryDirectory() as directory:
            goldens[name] = golden(raw, Path(directory))
    path = ROOT / "tests" / "goldens" / "families.json"
    path.write_text(json.dumps(goldens))
    print(f"{path}: {path.stat().st_size} bytes")


if __name__ == "__main__":
    main()
