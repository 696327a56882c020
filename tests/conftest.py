"""Eight fake devices, strict ranks, and a tiny model of the Llama family that needs no files."""

import os
import tempfile

# Tiny programs: most of the suite's time is the compiler's, which need not optimise them.
os.environ["XLA_FLAGS"] = (
    os.environ.get("XLA_FLAGS", "")
    + " --xla_force_host_platform_device_count=8"
    + " --xla_backend_optimization_level=0"
    # Eight devices on a few busy cores may keep each other waiting; XLA would end the process after 40 seconds.
    + " --xla_cpu_collective_call_terminate_timeout_seconds=600"
)
os.environ.setdefault("JAX_PLATFORMS", "cpu")
# XLA's CPU client has as many threads as devices, and a collective blocks one for each device: with another program in
# flight the last participant may find no thread, and all wait for ever. This is the number that XLA's pools have.
os.environ["NPROC"] = "32"
# Most of the suite's time would be compiling the same small programs again.
os.environ["JAX_COMPILATION_CACHE_DIR"] = os.environ.get("DPOJAX_TEST_CACHE") or tempfile.mkdtemp(prefix="dpojax-test-")
os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
os.environ["JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES"] = "-1"
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

import gc
import itertools
import json
from collections.abc import Iterable, Iterator
from pathlib import Path

import jax
import numpy as np
import pytest

from dpojax.models import DecoderConfig, Model, config_from_hf, init_params, save_model
from dpojax.packing import ModelInput, PairBatch, pack

jax.config.update("jax_numpy_rank_promotion", "raise")

GOLDENS = Path(__file__).parent / "goldens"

MAPS = 20_000
"""Of a process's at most 65,530 memory maps (vm.max_map_count). Every compiled program has some, and LLVM aborts the
process where it gets none."""
TESTS = itertools.count(1)


@pytest.fixture(autouse=True)
def few_programs() -> Iterator[None]:
    """Compiled programs are let go where many have gathered; those that are wanted again are in the cache on disk."""
    yield
    maps = Path("/proc/self/maps")
    if next(TESTS) % 10 == 0 and maps.exists() and maps.read_bytes().count(b"\n") > MAPS:
        jax.clear_caches()
        gc.collect()


# 384 embeddings hold ByT5's 256 bytes and its special tokens.
HF_CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_act": "silu",
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
    "max_position_embeddings": 512,
    "vocab_size": 384,
    "tie_word_embeddings": True,
    "bos_token_id": None,
    "eos_token_id": 1,
    "pad_token_id": 0,
}


def decoder_config(raw: dict) -> DecoderConfig:
    return config_from_hf(raw, "test")


def write_rows(path: Path, rows: Iterable[dict | str]) -> str:
    """Rows as JSONL, text as it is; the path."""
    path.parent.mkdir(exist_ok=True)
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return str(path)


@pytest.fixture(scope="session")
def config() -> DecoderConfig:
    return decoder_config(HF_CONFIG)


@pytest.fixture(scope="session")
def params(config):
    # Ten times the usual spread, so that attention and logits are far from uniform.
    return jax.tree.map(lambda x: x if (x == 1).all() else 10 * x, init_params(config, seed=0))


@pytest.fixture(scope="session")
def tiny_dir(config, params, tmp_path_factory) -> str:
    """A Hugging Face directory with a byte-level tokenizer and a chat template."""
    from transformers import ByT5Tokenizer

    directory = tmp_path_factory.mktemp("tiny")
    save_model(Model(config, params, HF_CONFIG), directory)
    tokenizer = ByT5Tokenizer()
    tokenizer.chat_template = (
        "{% for m in messages %}[{{ m['role'] }}] {{ m['content'] }}"
        "{% if m['role'] == 'assistant' %}</s>{% endif %}{{ '\n' }}{% endfor %}"
        "{% if add_generation_prompt %}[assistant] {% endif %}"
    )
    tokenizer.save_pretrained(directory)
    return str(directory)


WORDS = ["the", "film", "was", "a", "slow", "but", "lovely", "story", "of", "two", "friends", "going", "home"]


def sentence(rng: np.random.Generator, low: int, high: int) -> str:
    return " ".join(rng.choice(WORDS, int(rng.integers(low, high))))


@pytest.fixture(scope="session")
def pairs_file(tmp_path_factory) -> str:
    """24 preference rows of unequal lengths."""
    rng = np.random.default_rng(0)
    rows = [
        {
            "prompt": sentence(rng, 1, 6),
            "chosen": " " + sentence(rng, 1, 5) + " good",
            "rejected": " " + sentence(rng, 1, 5),
        }
        for _ in range(24)
    ]
    return write_rows(tmp_path_factory.mktemp("data") / "pairs.jsonl", rows)


def random_batch(
    rng: np.random.Generator, B: int, P: int, C: int, N: int = 2, vocab: int = 384, sequences: int = 1
) -> PairBatch:
    prompt_len = rng.integers(1, P + 1, B).astype(np.int32)
    completion_len = rng.integers(1, C + 1, (B, N)).astype(np.int32)
    T, Z = (B // sequences * width for width in (P + N * C, N * C))
    packing = pack(prompt_len, completion_len, P, C, sequences, T, Z)
    return PairBatch(
        prompt=jax.numpy.asarray(rng.integers(0, vocab, (B, P)).astype(np.int32)),
        prompt_len=jax.numpy.asarray(prompt_len),
        completions=jax.numpy.asarray(rng.integers(0, vocab, (B, N, C)).astype(np.int32)),
        completion_len=jax.numpy.asarray(completion_len),
        valid=jax.numpy.ones(B),
        packing=jax.tree.map(jax.numpy.asarray, packing),
    )


def plain_input(tokens: jax.Array) -> ModelInput:
    """Ordinary causal sequences, ``[B, T]``: prompts without completions."""
    B, T = tokens.shape
    index = jax.numpy.broadcast_to(jax.numpy.arange(T), (B, T))
    return ModelInput(tokens, index, index, index, jax.numpy.full((B,), T), prompt=T, completion=0)


def on_devices(patch: pytest.MonkeyPatch, n: int) -> None:
    """As if there were n of the eight devices."""
    devices = jax.devices()[:n]
    patch.setattr(jax, "devices", lambda: devices)
    patch.setattr(jax, "device_count", lambda: n)
