"""What all points of a sweep share, computed once: the reference, prompts, its samples, their rewards.

DIRECTORY/setting.json
DIRECTORY/base/         a new model, and its tokenizer
DIRECTORY/sft/          the run of supervised fine-tuning (`dpojax sft`), whose last checkpoint is the reference
DIRECTORY/samples.npz   completions of the prompts, their log-probabilities and rewards
DIRECTORY/frontier.npz  rewards of many completions of the held-out prompts
"""

import dataclasses
import functools
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from dpojax.configs import PassOptions, SFTConfig
from dpojax.data import Encoder, read_rows
from dpojax.errors import UserError
from dpojax.evaluate.rewards import scorer_of_file
from dpojax.evaluate.samples import TextScorer, text_scores
from dpojax.generate import Samples, make_sampler, pad_left, sample_all
from dpojax.models import DecoderConfig, Model, load_tokenizer, new_model, save_model
from dpojax.packing import ApplyFn, PairBatch
from dpojax.progress import track
from dpojax.sharding import batch_shards, make_mesh, put_batch
from dpojax.train.by_name import load_policy
from dpojax.train.loop import train
from dpojax.train.scoring import apply_on
from experiments import reviews
from experiments.claims import made_once
from experiments.common import smollm2_path, vader_scores
from experiments.data import openings
from experiments.setting import Setting

PROMPT_TOKENS = (2, 8)  # of a review's beginning; the paper, section 6.1


class Texts(NamedTuple):
    """Prompts of the three kinds, and reviews for supervised fine-tuning as (opening, rest)."""

    train: list[str]
    tune: list[str]
    held_out: list[str]
    sft: list[tuple[str, str]]


class Drawn(NamedTuple):
    """Completions of some prompts with their rewards, ``[X, S]`` of each."""

    prompts: list[list[int]]
    samples: Samples
    rewards: np.ndarray

    @property
    def logps(self) -> np.ndarray:
        """Log-probabilities of the completions under the policy that drew them, ``[X, S]``, nats."""
        return np.asarray(self.samples.logps).sum(axis=-1)


def new_tokenizer() -> Any:
    """A tokenizer of the grammar's words, which begins every text with a BOS."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    words = ["<pad>", "<s>", "</s>", "<unk>", *reviews.vocabulary()]
    inner = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, "<unk>"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    inner.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    special = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    return PreTrainedTokenizerFast(tokenizer_object=inner, **special)


def make_base(setting: Setting, directory: Path) -> None:
    """Write a new model of the setting's size, and its tokenizer."""
    from dpojax.models import Attention, Mlp, Norm, Rope

    tokenizer, D = new_tokenizer(), setting.width
    shape = DecoderConfig(
        vocab_size=len(tokenizer),
        width=D,
        layers=setting.layers,
        attention=Attention(heads=4, kv_heads=4, head_dim=D // 4),
        mlp=Mlp(width=3 * D),
        norm=Norm(eps=1e-5),
        positions=Rope(theta=10_000.0),
        max_positions=64,
        tied=True,
    )
    save_model(new_model(shape), directory, tokenizer=tokenizer)


def texts_of(setting: Setting, tokenizer: Any) -> Texts:
    """The setting's prompts, none of which is of two kinds, and its reviews.

    Raises:
      UserError: there are too few, or no rows of this name.
    """
    rng = np.random.default_rng(0)
    rest: dict[str, str] = {}
    if setting.texts == "grammar":
        every = reviews.openings()
        pool = [text for text, _ in every]
        known = dict(every)
    elif setting.texts == "openings":
        pool = list(openings.TRAIN)
    else:
        rest = dict(beginnings(setting, tokenizer, rng))
        pool = list(rest)
    rng.shuffle(pool)
    held_out = list(openings.HELD_OUT) if setting.texts == "openings" else []
    n, tune = (0 if held_out else setting.held_out), setting.tune
    held_out, chosen, train = (held_out or pool)[: setting.held_out], pool[n : n + tune], pool[n + tune :]
    if len(held_out) < setting.held_out or not train:
        raise UserError(f"--setting.prompts: there are {len(pool)} openings in all; ask for fewer")
    train = train[: setting.prompts]
    if setting.texts == "grammar":
        sft = reviews.reviews(setting.sft_rows, [(text, known[text]) for text in (*train, *chosen)], seed=1)
    else:
        sft = [(text, rest[text]) for text in train if rest][: setting.sft_rows]
    return Texts(train, chosen, held_out, sft)


def beginnings(setting: Setting, tokenizer: Any, rng: np.random.Generator) -> list[tuple[str, str]]:
    """Reviews as (their first tokens, the rest)."""
    out: dict[str, str] = {}
    for row in read_rows([setting.reviews]):
        text = getattr(row, "fields", {}).get("text")
        if not isinstance(text, str):
            raise UserError(f"--setting.reviews {setting.reviews}: row {row.number} has no field text, a string")
        tokens = tokenizer(text.replace("<br />", "\n"), add_special_tokens=False)["input_ids"]
        n = int(rng.integers(PROMPT_TOKENS[0], PROMPT_TOKENS[1] + 1))
        if len(tokens) > n:
            out.setdefault(tokenizer.decode(tokens[:n]), tokenizer.decode(tokens[n:]))
    return list(out.items())


def scorer_of(name: str) -> TextScorer:
    """The reward of this name.

    Raises:
      UserError: no such file or function.
    """
    if name == "vader":
        return lambda prompts, completions: vader_scores(completions)
    return scorer_of_file(name, "--setting.scorer")


class World:
    """The reference, prompts in tokens, the reward, and samples of the reference; all of it is read when it is first
    asked for.

    Args:
      setting: what is wanted.
      directory: where it is kept; whoever comes first makes it, others wait.
    """

    def __init__(self, setting: Setting, directory: Path):
        self.setting, self.directory = setting, directory
        self.mesh = make_mesh(setting.mesh)
        check_same(setting, directory)
        self.score_texts = scorer_of(setting.scorer)

    @functools.cache  # noqa: B019  # a world lives as long as its process
    def of_width(self, width: int | None) -> "World":
        """The same with a model of another width (None: this one)."""
        if width is None or width == self.setting.width:
            return self
        return World(dataclasses.replace(self.setting, width=width), self.directory / f"width{width}")

    # ---- models ---------------------------------------------------------------------------------------------------

    @functools.cached_property
    def base(self) -> str:
        """The model before supervised fine-tuning, by name."""
        if self.setting.model:
            return self.setting.model
        if self.setting.texts != "grammar":
            return smollm2_path()
        return str(made_once(self.directory / "base", lambda path: make_base(self.setting, path)))

    @functools.cached_property
    def tokenizer(self) -> Any:
        return load_tokenizer(self.base)

    @functools.cached_property
    def texts(self) -> Texts:
        return texts_of(self.setting, self.tokenizer)

    @functools.cached_property
    def reference(self) -> Model:
        """The policy that every point starts from, and whose KL is measured."""
        return load_policy(self.fine_tuned(), mesh=self.mesh)

    def fine_tuned(self, steps: int | None = None) -> str:
        """The model after so many steps of supervised fine-tuning (default: the setting's), by name."""
        setting = self.setting
        steps = setting.sft_steps if steps is None else steps
        if not steps:
            return self.base
        name = "sft" if steps == setting.sft_steps else f"sft{steps}"

        def build(directory: Path) -> None:
            rows = directory / "reviews.jsonl"
            lines = (json.dumps({"prompt": prompt, "completion": f" {rest}"}) for prompt, rest in self.texts.sft)
            rows.write_text("".join(line + "\n" for line in lines))
            options = {
                "model": self.base,
                "data": (str(rows),),
                "output": str(directory / "run"),
                "batch_size": setting.batch_size,
                "steps": steps,
                "learning_rate": setting.sft_learning_rate,
                "lr_scheduler_type": "cosine",
                "warmup_steps": min(20, steps),
                "optim": "adamw",
                "logging_steps": 100,
                "dtype": setting.dtype,
                "mesh": setting.mesh,
            }
            if not train(SFTConfig(**options)).finished:
                raise KeyboardInterrupt

        return str(made_once(self.directory / name, build) / "run")

    @functools.cached_property
    def apply_fn(self) -> ApplyFn:
        """The reference's model over the mesh, forward."""
        return self.apply_of(self.reference.config)

    def apply_of(self, config: DecoderConfig) -> ApplyFn:
        """A model over the mesh, forward."""
        return apply_on(config, self.mesh, PassOptions(dtype=self.setting.dtype))

    # ---- prompts, samples, rewards --------------------------------------------------------------------------------

    def prompts(self, kind: str) -> list[list[int]]:
        """The prompts of a kind, train, tune or held_out, in tokens."""
        encoder = Encoder(self.tokenizer)
        return [encoder.encode_prompt(text) for text in getattr(self.texts, kind)]

    @functools.cache  # noqa: B019  # a world lives as long as its process
    def sampler(self, samples: int) -> Any:
        return make_sampler(
            self.reference.config,
            max_new_tokens=self.setting.new_tokens,
            eos_ids=self.reference.eos_ids(self.tokenizer),
            num_samples=samples,
            dtype=self.setting.dtype,
            mesh=self.mesh,
        )

    def rewards(self, prompts: Sequence[Sequence[int]], samples: Samples) -> np.ndarray:
        """The reward of every completion, ``[X, S]``."""
        return text_scores(self.score_texts, self.tokenizer, prompts, samples)

    def draw(
        self, params: Any, prompts: list[list[int]], samples: int, seed: int, label: str | None = None, each: int = 64
    ) -> Drawn:
        """Completions of a policy for every prompt, with rewards; ``each`` of a prompt are drawn side by side."""
        each = min(each, samples)
        if samples % each:
            raise UserError(f"{samples} samples of a prompt: must be a multiple of {each}")
        rounds, rows = samples // each, max(1, self.setting.side_by_side // each)
        drawn = sample_all(
            self.sampler(each),
            params,
            [prompt for prompt in prompts for _ in range(rounds)],
            batch_size=-(-min(rows, len(prompts) * rounds) // batch_shards(self.mesh)) * batch_shards(self.mesh),
            seed=seed,
            track=(lambda batches: batches) if label is None else (lambda batches: track(batches, label)),
        )
        drawn = jax.tree.map(lambda x: x.reshape(len(prompts), samples, *x.shape[2:]), drawn)
        return Drawn(prompts, drawn, self.rewards(prompts, drawn))

    def batch(self, prompts: Sequence[Sequence[int]], samples: Samples, rows: int = 1) -> PairBatch:
        """Prompts with their completions as a batch of padded rows over the mesh: of ``rows`` at least and a multiple
        of the devices that split it, the last ones padding."""
        shards = batch_shards(self.mesh)
        rows = -(-max(rows, len(prompts)) // shards) * shards
        more = rows - len(prompts)
        prompt, prompt_len = pad_left([*prompts, *[prompts[-1]] * more], -(-max(map(len, prompts)) // 8) * 8)
        tokens, lengths = (
            np.concatenate([x, np.repeat(x[-1:], more, axis=0)]) for x in (samples.tokens, samples.lengths)
        )
        valid = (np.arange(rows) < len(prompts)).astype(np.float32)
        return put_batch(PairBatch(*map(jnp.asarray, (prompt, prompt_len, tokens, lengths, valid))), self.mesh)

    def kept(self, name: str, kind: str, samples: int, seed: int) -> Drawn:
        """Completions of the reference, drawn once for all."""
        prompts = self.prompts(kind)

        def build(path: Path) -> None:
            drawn = self.draw(
                self.reference.params, prompts, samples, seed, f"Samples of the reference, {kind} prompts"
            )
            np.savez(path / "samples.npz", **drawn.samples._asdict(), rewards=drawn.rewards)

        with np.load(made_once(self.directory / name, build) / "samples.npz") as arrays:
            rows = dict(arrays)
        rewards = rows.pop("rewards")
        return Drawn(prompts, Samples(**rows), rewards)

    @functools.cached_property
    def drawn(self) -> Drawn:
        """The completions that preferences are made of."""
        return self.kept("samples", "train", self.setting.samples, seed=11)

    @functools.cached_property
    def frontier(self) -> Drawn:
        """Many completions of each held-out prompt."""
        return self.kept("frontier", "held_out", self.setting.frontier_samples, seed=12)


def check_same(setting: Setting, directory: Path) -> None:
    """Keep the setting beside what is made of it.

    Raises:
      UserError: the directory is of another setting.
    """
    file = directory / "setting.json"
    mine = json.loads(json.dumps(dataclasses.asdict(setting)))
    shared = {name: mine[name] for name in SHARED}
    if not file.exists():
        directory.mkdir(parents=True, exist_ok=True)
        partial = file.with_name(f"setting.json.{np.random.default_rng().integers(1 << 40)}")
        partial.write_text(json.dumps(shared, indent=2))
        partial.replace(file)
    theirs = json.loads(file.read_text())
    if differing := sorted(name for name in SHARED if theirs.get(name) != shared[name]):
        named = ", ".join(f"{name} ({theirs.get(name)!r} there, {shared[name]!r} here)" for name in differing)
        raise UserError(f"--world {directory}: was made with another {named}; name another directory")


SHARED = (
    *("model", "width", "layers", "texts", "reviews", "scorer", "new_tokens", "prompts", "tune", "held_out"),
    *("samples", "frontier_samples", "sft_rows", "sft_steps", "sft_learning_rate", "batch_size", "dtype"),
)
"""Fields of a setting that samples and reference depend on."""
