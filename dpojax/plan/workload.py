"""What a step works on: rows of which lengths, packed how; and the model's floating-point operations for them."""

import dataclasses
import json
from pathlib import Path

import numpy as np

from dpojax.data import Batches
from dpojax.data.batches import MULTIPLE, Shape, stays_padded
from dpojax.data.examples import Example
from dpojax.errors import UserError
from dpojax.models import DecoderConfig


@dataclasses.dataclass(frozen=True)
class Workload:
    """The shapes of a batch, and how much of them is real.

    Attributes:
      rows: B, prompts of a global batch.
      each: N, completions of a prompt.
      prompt, completion: padded tokens, P and C.
      sequences: R, packed sequences.
      tokens, targets: T and Z of each.
      lengths: ``[n, 1 + N]``, tokens of prompts and completions, of rows that are typical of the data.
      source: where the lengths come from, in words.
    """

    rows: int
    each: int
    prompt: int
    completion: int
    sequences: int
    tokens: int
    targets: int
    lengths: np.ndarray
    source: str

    @property
    def padded(self) -> bool:
        """Whether the rows are not packed (:func:`~dpojax.data.batches.stays_padded`)."""
        shape = Shape(self.tokens, self.targets, self.prompt, self.completion)
        return stays_padded(shape, self.rows // self.sequences, self.each)

    @property
    def width(self) -> int:
        """Positions that are computed of a sequence."""
        return self.prompt + self.each * self.completion if self.padded else self.tokens

    @property
    def real_tokens(self) -> float:
        """Tokens of a batch without padding, in the mean."""
        return float(self.lengths.sum(axis=1).mean()) * self.rows

    @property
    def real_targets(self) -> float:
        """Completion tokens of a batch, in the mean."""
        return float(self.lengths[:, 1:].sum(axis=1).mean()) * self.rows

    @property
    def real_share(self) -> float:
        """Of the tokens that are computed."""
        return self.real_tokens / (self.sequences * self.width)

    def scores(self, window: int | None) -> float:
        """Pairs of a query and a key that it sees, of a batch in the mean."""
        prompt, completions = self.lengths[:, 0].astype(float), self.lengths[:, 1:].astype(float)
        seen = _seen(prompt, window)
        behind = _seen(prompt[:, None] + completions, window) - seen[:, None]
        return float((seen + behind.sum(axis=1)).mean()) * self.rows


def _seen(length: np.ndarray, window: int | None) -> np.ndarray:
    """Pairs within a causal text."""
    if window is None:
        return length * (length + 1) / 2
    short = np.minimum(length, window)
    return short * (short + 1) / 2 + (length - short) * window


def full_rows(rows: int, each: int, prompt: int, completion: int, sequences: int) -> Workload:
    """The workload of rows that are all as long as they may be."""
    even = lambda n: -(-n // 2) * 2  # noqa: E731
    up = lambda n: -(-n // MULTIPLE) * MULTIPLE  # noqa: E731
    together = rows // sequences
    lengths = np.array([[prompt, *[completion] * each]])
    tokens, targets = together * (prompt + each * completion), together * each * completion
    source = f"full length: prompts of {prompt}, completions of {completion} tokens"
    sizes = even(prompt), even(completion), sequences, up(tokens), up(targets)
    return Workload(rows, each, *sizes, lengths, source)


def rows_of_lengths(lengths: np.ndarray, rows: int, sequences: int, source: str, max_shapes: int = 8) -> Workload:
    """The workload of a data set's lengths ``[n, 1 + N]``, packed as a run packs them: its largest shape."""
    examples = [
        Example(np.zeros(prompt, np.int32), tuple(np.zeros(n, np.int32) for n in completions))
        for prompt, *completions in lengths.tolist()
    ]
    batches = Batches(examples, rows, max_shapes=max_shapes, sequences=sequences, seed=0)
    largest = max(batches.shapes, key=lambda s: (s.tokens, s.targets))
    sizes = (largest.prompt, largest.completion, sequences, largest.tokens, largest.targets)
    return Workload(rows, lengths.shape[1] - 1, *sizes, lengths, source)


def read_lengths(name: str, each: int, max_length: int) -> np.ndarray:
    """``[n, 1 + N]`` lengths from a JSONL file, cut to ``max_length`` as a run cuts rows: prompts first.

    Raises:
      UserError: no such file, or a line that says no lengths; it names the line.
    """
    path, out = Path(name), []
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except OSError as error:
        raise UserError(f"--lengths {name}: {error.strerror}; name a JSONL file of lengths") from None
    example = json.dumps({"prompt": 310, "completions": [180, 95][:each]})
    for number, line in enumerate(lines, 1):
        try:
            row = json.loads(line)
            prompt, completions = int(row["prompt"]), [int(n) for n in row["completions"]]
        except (ValueError, TypeError, KeyError):
            raise UserError(f"--lengths {name}, line {number}: is no lengths; write it as {example}") from None
        if len(completions) != each or min(prompt, *completions) < 1:
            raise UserError(f"--lengths {name}, line {number}: must have {each} completions, as in {example}")
        longest = max(completions)
        kept = min(prompt, max(1, max_length - longest))
        out.append([kept, *(min(n, max_length - kept) for n in completions)])
    if not out:
        raise UserError(f"--lengths {name}: is empty; write a line a row, as in {example}")
    return np.array(out)


# ---- floating-point operations --------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class ModelFlops:
    """FLOPs of the whole global batch that the model itself needs, nothing computed twice: a multiply-add is two.

    ``step`` is a train step's, ``reference`` a live reference's; ``unembedding`` is the part of the step that has to do
    with the vocabulary.
    """

    step: float
    reference: float
    unembedding: float

    @property
    def total(self) -> float:
        return self.step + self.reference


def forward_flops(config: DecoderConfig, work: Workload) -> tuple[float, float, float]:
    """FLOPs of one forward pass of a batch: of the layers' weights, of attention's scores, and of the unembedding.

    ``2 tokens parameters`` of every weight that a token meets, ``4 heads head_dim`` for each score, and
    ``2 targets width vocabulary``.
    """
    a, D = config.attention, config.width
    attention = D * a.head_dim * (2 * a.heads + 2 * a.kv_heads)
    dense = D * config.mlp.width * (3 if config.mlp.gated else 2)
    weights = 0.0
    for layer in range(config.layers):
        experts = config.experts
        if experts is None or layer in config.dense_layers:
            feed = dense
        else:
            feed = experts.per_token * 3 * D * experts.width + D * experts.number
        weights += attention + feed
    windows = [config.kind(i).window for i in range(config.layers)]
    pairs = {window: work.scores(window) for window in set(windows)}
    scores = 4.0 * a.heads * a.head_dim * sum(pairs[window] for window in windows)
    rows = 1 if config.reward else config.vocab_size
    head = 2.0 * (work.rows * work.each if config.reward else work.real_targets) * D * rows
    return 2.0 * work.real_tokens * weights, scores, head


def model_flops(
    config: DecoderConfig, work: Workload, *, adapter: float = 0.0, top_layers: int | None = None, live: bool = False
) -> ModelFlops:
    """The model's FLOPs of a step: the backward pass needs twice the forward pass's where weights are trained, and once
    where they are frozen (gradients of activations alone).

    Args:
      config: the whole model's choices, without an adapter.
      work: the batch.
      adapter: parameters of the adapter, where it alone is trained.
      top_layers: trained layers, where the others' hidden states are there already.
      live: a reference runs in every step.
    """
    layers, scores, head = forward_flops(config, work)
    reference = layers + scores + head if live else 0.0
    if top_layers is not None:
        share = top_layers / config.layers
        # The unembedding is frozen: gradients of hidden states alone.
        return ModelFlops(3 * share * (layers + scores) + 2 * head, reference, 2 * head)
    if adapter:
        low = 2.0 * work.real_tokens * adapter
        return ModelFlops(2 * layers + 3 * (scores + low) + 2 * head, reference, 2 * head)
    return ModelFlops(3 * (layers + scores + head), reference, 3 * head)
