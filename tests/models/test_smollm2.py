"""SmolLM2-135M-Instruct from its GGUF file, as transformers has it (goldens: scripts/make_goldens_smollm2.py)."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dpojax.data import COMPLETIONS, Batches, Encoder, load_examples
from dpojax.generate import make_sampler, sample_all
from dpojax.logprobs import completion_logps
from dpojax.models import load_model, load_tokenizer, make_apply, save_model
from experiments.common import smollm2_path
from tests.conftest import GOLDENS, plain_input, write_rows

GOLDEN = json.loads((GOLDENS / "smollm2.json").read_text())


@pytest.fixture(scope="module")
def smollm2():
    return load_model(smollm2_path())


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer(smollm2_path())


@pytest.fixture(scope="module")
def logits(smollm2):
    ids = jnp.array([GOLDEN["ids"]])
    h, head = make_apply(smollm2.config)(smollm2.params, plain_input(ids))
    return h[0] @ head.T


def test_ids(tokenizer):
    assert tokenizer("The capital of France is")["input_ids"] == GOLDEN["ids"] == [504, 3575, 282, 4649, 314]
    assert tokenizer("12,345")["input_ids"] == [tokenizer.convert_tokens_to_ids(c) for c in "12,345"]


def test_last_logits(logits):
    known = [1.6136, -11.8719, -7.9445, -9.3469, -10.0852, -10.8128, -3.9415, -10.8056]
    np.testing.assert_allclose(logits[-1, :8], known, atol=2e-3)
    np.testing.assert_allclose(logits[-1, :16], GOLDEN["last_logits"], atol=2e-3)
    assert [int(logits[-1].argmax()), float(logits[-1].max())] == pytest.approx(GOLDEN["argmax"], abs=2e-3)


def test_token_logps(logits):
    logps = jax.nn.log_softmax(logits, axis=-1)
    got = [float(logps[i, token]) for i, token in enumerate(GOLDEN["ids"][1:])]
    np.testing.assert_allclose(got, GOLDEN["token_logps"], atol=1e-3)


def test_sequence_logps(smollm2, tokenizer, tmp_path):
    rows = [{"prompt": c["prompt"], "completion": c["completion"]} for c in GOLDEN["completions"]]
    file = write_rows(tmp_path / "rows.jsonl", rows)
    examples, _ = load_examples([file], Encoder(tokenizer), kind=COMPLETIONS)
    assert [len(e.completions[0]) for e in examples] == [c["len"] for c in GOLDEN["completions"]]
    (item,) = Batches(examples, len(examples), max_shapes=1)
    sums = completion_logps(make_apply(smollm2.config), smollm2.params, jax.tree.map(jnp.asarray, item.batch))[:, 0]
    expected = np.array([c["logp"] for c in GOLDEN["completions"]])[item.index]
    np.testing.assert_allclose(sums, expected, atol=5e-3)


def test_greedy_tokens(smollm2):
    sampler = make_sampler(smollm2.config, max_new_tokens=12, eos_ids=(2,), temperature=0.0)
    drawn = sample_all(sampler, smollm2.params, [GOLDEN["ids"]], batch_size=1, seed=0)
    assert drawn.lists() == [[GOLDEN["greedy"]]]


def test_chat_template(tokenizer, tmp_path):
    """The template of SmolLM2-Instruct, by hand: 1 and 2 are <|im_start|> and <|im_end|>, 198 is a newline."""
    user, reply = {"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}
    path = tmp_path / "chat.jsonl"
    path.write_text(json.dumps({"prompt": [user], "completion": [reply]}) + "\n")
    (example,), _ = load_examples([str(path)], Encoder(tokenizer), kind=COMPLETIONS)

    def ids(text):
        return tokenizer(text)["input_ids"]

    system = ids("You are a helpful AI assistant named SmolLM, trained by Hugging Face")
    turns = [[*ids("system"), 198, *system], [*ids("user"), 198, *ids("Hi")]]
    expected = [token for turn in turns for token in (1, *turn, 2, 198)] + [1, *ids("assistant"), 198]
    assert example.prompt.tolist() == expected
    assert example.completions[0].tolist() == [*ids("Hello"), 2]


def test_export_is_read_back_by_transformers(smollm2, tokenizer, logits, tmp_path):
    torch = pytest.importorskip("torch", reason="live parity needs torch, which CI installs")
    from transformers import AutoModelForCausalLM, AutoTokenizer

    save_model(smollm2, tmp_path)
    tokenizer.save_pretrained(tmp_path)
    assert (
        AutoTokenizer.from_pretrained(tmp_path)("In 1984, 12 cats")["input_ids"]
        == tokenizer("In 1984, 12 cats")["input_ids"]
    )
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).eval()
    with torch.no_grad():
        expected = theirs(torch.tensor([GOLDEN["ids"]])).logits[0].numpy()
    np.testing.assert_allclose(logits, expected, atol=1e-3)
