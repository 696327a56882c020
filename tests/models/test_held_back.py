"""``dpojax logps`` of models that transformers has written, with config.json as the hub has it: transformers' sums."""

import copy
import json

import numpy as np
import pytest

from dpojax.cli import main
from dpojax.models import FAMILIES
from tests.conftest import sentence, write_rows
from tests.models.families import HELD_BACK

torch = pytest.importorskip("torch", reason="live parity needs torch, which CI installs")


def written(raw: dict, path) -> None:
    """A random model, saved by transformers; then its config.json as it was given."""
    from transformers import AutoConfig, AutoModelForCausalLM, ByT5Tokenizer

    # Layers far from a fresh model's: tied embeddings must not answer with the last token alone.
    config = AutoConfig.for_model(**copy.deepcopy(raw))
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    torch.manual_seed(0)
    for name, x in model.named_parameters():
        x.data = (name.endswith("weight") and x.ndim == 1) + 0.2 * torch.randn_like(x)
    model.save_pretrained(path)
    (path / "config.json").write_text(json.dumps(raw | {"architectures": [type(model).__name__]}))
    ByT5Tokenizer().save_pretrained(path)


def sums(path, rows: list[dict]) -> list[list[float]]:
    """transformers' sums of both completions, of bytes and an EOS."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, attn_implementation="eager").eval()
    ids = lambda text: [byte + 3 for byte in text.encode()]  # noqa: E731

    def of(prompt: list[int], completion: list[int]) -> float:
        text = torch.tensor([prompt + completion])
        with torch.no_grad():
            logps = model(text).logits.log_softmax(-1)[0, len(prompt) - 1 : -1]
        return float(logps.gather(-1, text[0, len(prompt) :, None]).sum())

    return [[of(ids(row["prompt"]), [*ids(row[side]), 1]) for side in ("chosen", "rejected")] for row in rows]


@pytest.mark.parametrize("i", [0, 1])
@pytest.mark.parametrize("family", FAMILIES)
def test_sums_are_transformers(family, i, tmp_path):
    raw, rng = {"model_type": family, **HELD_BACK[family][i]}, np.random.default_rng(i)
    rows = [{"prompt": sentence(rng, 1, 5), "chosen": sentence(rng, 1, 4), "rejected": "no"} for _ in range(4)]
    written(raw, tmp_path / "model")
    data = write_rows(tmp_path / "data" / "rows.jsonl", rows)
    out = tmp_path / "logps.jsonl"
    flags = ["--batch-size", "8", "--max-shapes", "1"]
    assert main(["logps", "--model", str(tmp_path / "model"), "--data", data, "--output", str(out), *flags]) == 0
    got = [json.loads(line) for line in out.read_text().splitlines()]
    expected = sums(tmp_path / "model", rows)
    np.testing.assert_allclose([[row["chosen_logps"], row["rejected_logps"]] for row in got], expected, atol=2e-3)
