"""Greedy decoding of 64 tokens is transformers', token for token: every family, unequal prompts, and SmolLM2."""

import numpy as np
import pytest

from dpojax.generate import make_sampler, sample_all
from dpojax.models import Model, load_model, load_tokenizer, save_model
from experiments.common import smollm2_path
from tests.models.families import FAMILIES as TINY
from tests.models.test_families import random_model

torch = pytest.importorskip("torch", reason="live parity needs torch, which CI installs")
NEW = 64


def theirs(directory, prompts: list[list[int]], **options) -> list[list[int]]:
    """transformers' greedy tokens, one prompt at a time, no EOS."""
    from transformers import AutoModelForCausalLM

    # Of attention kernels, only the eager one caps scores.
    loaded = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32, attn_implementation="eager")
    model = loaded.eval()
    model.generation_config.eos_token_id = None
    options = {"do_sample": False, "max_new_tokens": NEW, "pad_token_id": 0} | options
    drawn = [model.generate(torch.tensor([prompt]), **options) for prompt in prompts]
    return [row[0, len(prompt) :].tolist() for row, prompt in zip(drawn, prompts, strict=True)]


def ours(model: Model, prompts: list[list[int]], **options) -> list[list[int]]:
    sampler = make_sampler(model.config, max_new_tokens=NEW, eos_ids=(), temperature=0.0, **options)
    return [row for (row,) in sample_all(sampler, model.params, prompts, batch_size=len(prompts)).lists()]


def random_prompts(lengths: tuple[int, ...], vocab: int) -> list[list[int]]:
    rng = np.random.default_rng(1)
    return [rng.integers(2, vocab, n).tolist() for n in lengths]


# Other weights of the same computation are compared with the forward pass (test_families.py).
OF_WEIGHTS = ("biases", "tied", "linear", "capped", "whole", "unscaled")


@pytest.mark.parametrize("name", [name for name in TINY if name.split()[-1] not in OF_WEIGHTS])
def test_every_family(name, tmp_path):
    model, prompts = random_model(TINY[name]), random_prompts((3, 17, 9), 384)
    save_model(model, tmp_path)
    assert ours(model, prompts) == theirs(tmp_path, prompts)
    penalty = {"repetition_penalty": 1.3}
    assert ours(model, prompts, **penalty) == theirs(tmp_path, prompts, **penalty)


def test_smollm2(tmp_path):
    model, tokenizer = load_model(smollm2_path()), load_tokenizer(smollm2_path())
    save_model(model, tmp_path)
    texts = ["The capital of France is", "Once upon a time, in a small village by the sea, there"]
    prompts = tokenizer(texts)["input_ids"]
    assert ours(model, prompts) == theirs(tmp_path, prompts)
