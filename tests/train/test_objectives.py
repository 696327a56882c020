"""What a run provides to objectives that read more than sums: against slow forms, and over whole runs."""

import dataclasses
import functools
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dpojax.cli import main
from dpojax.data import LABELS, Encoder, load_examples, with_mismatched
from dpojax.logprobs import completion_rewards, completion_stats, pair_up
from dpojax.losses import LOSSES, traits_of
from dpojax.models import load_tokenizer, make_apply
from dpojax.packing import Annotations
from dpojax.train.objectives import BatchContext, empty_running, make_loss, mean_chosen_len
from dpojax.train.program import make_ref_step
from dpojax.types import STATISTICS, CompletionStats, ReferenceOutput
from tests.conftest import plain_input, random_batch, sentence, write_rows
from tests.train.test_step import one_device

OPTIONS = ["--batch-size", "8", "--learning-rate", "1e-3", "--warmup-steps", "0", "--save-steps", "3"]


@pytest.fixture(scope="module")
def batch():
    return random_batch(np.random.default_rng(1), B=4, P=6, C=5, sequences=2)


def slow_logits(config, params, batch, row, n):
    """Logits that predict each token of one completion, from a row of its own."""
    prompt = np.asarray(batch.prompt[row])[batch.prompt.shape[1] - int(batch.prompt_len[row]) :]
    completion = np.asarray(batch.completions[row, n])[: int(batch.completion_len[row, n])]
    tokens = jnp.asarray(np.concatenate([prompt, completion]))[None]
    h, head = make_apply(config)(params, plain_input(tokens))
    return np.asarray(h[0, len(prompt) - 1 : -1] @ head.T, np.float64), completion, h[0, -1], head


@pytest.mark.parametrize("chunk_tokens", [7, 512])
def test_statistics_of_tokens(config, params, batch, chunk_tokens):
    other = jax.tree.map(lambda x: 1.1 * x, params)
    apply_fn = make_apply(config)
    stats = functools.partial(completion_stats, apply_fn, batch=batch, chunk_tokens=chunk_tokens)
    ref = stats(params=other, reads=frozenset({"hidden"}))
    ref = ReferenceOutput(pair_up(ref, batch), ref.hidden, other["embed"])
    got = stats(params=params, reads=frozenset(STATISTICS), ref=ref)
    for row, n in np.ndindex(4, 2):
        logits, completion, *_ = slow_logits(config, params, batch, row, n)
        ref_logits, *_ = slow_logits(config, other, batch, row, n)
        logp, ref_logp = (x - np.logaddexp.reduce(x, axis=1, keepdims=True) for x in (logits, ref_logits))
        tokens = logp[np.arange(len(completion)), completion]
        expected = np.zeros(5)
        expected[: len(tokens)] = tokens
        np.testing.assert_allclose(got.tokens[row, n], expected, rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(got.sums[row, n], tokens.sum(), rtol=1e-5)
        np.testing.assert_allclose(got.squares[row, n], np.logaddexp.reduce(2 * logp, axis=1).sum(), rtol=1e-4)
        kl = (np.exp(ref_logp) * (ref_logp - logp)).sum()
        np.testing.assert_allclose(got.kl[row, n], kl, rtol=1e-4, atol=1e-5)


def test_kl_has_the_gradient_of_the_whole_logits(config, params, batch):
    other = jax.tree.map(lambda x: 1.1 * x, params)
    apply_fn = make_apply(config)
    reads = frozenset({"kl"})
    hidden = frozenset({"hidden"})
    stats = completion_stats(apply_fn, other, batch, reads=hidden)
    ref = ReferenceOutput(pair_up(stats, batch), stats.hidden, other["embed"])

    def plain(p):
        h = completion_stats(apply_fn, p, batch, reads=hidden).hidden
        logp, ref_logp = (jax.nn.log_softmax(x @ head.T) for x, head in ((h, p["embed"]), (ref.hidden, ref.head)))
        real = jnp.any(h != 0, axis=-1)
        return jnp.sum(jnp.where(real, jnp.sum(jnp.exp(ref_logp) * (ref_logp - logp), axis=-1), 0))

    kl = lambda p: completion_stats(apply_fn, p, batch, reads=reads, ref=ref, chunk_tokens=7).kl.sum()  # noqa: E731
    for a, b in zip(*map(jax.tree.leaves, (jax.grad(kl)(params), jax.grad(plain)(params))), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-4 * float(jnp.abs(b).max()))


def test_rewards_are_of_the_last_token(config, params, batch):
    config = dataclasses.replace(config, head="score")
    params = {**params, "score": jax.random.normal(jax.random.key(0), (1, config.width))}
    got = completion_rewards(make_apply(config), params, batch)
    for row, n in np.ndindex(4, 2):
        *_, last, score = slow_logits(config, params, batch, row, n)
        np.testing.assert_allclose(got[row, n], float(last @ score[0]), rtol=1e-4)


def test_several_completions_are_all_pairs_of_different_rank(batch):
    rng = np.random.default_rng(0)
    batch = random_batch(rng, B=3, P=4, C=5, N=3)
    rank = jnp.array([[0, 1, 2], [0, 0, 1], [0, 1, 0]])
    lengths = batch.completion_len.at[2, 2].set(0)  # the third row has two
    annotations = Annotations(rank=rank, score=jnp.asarray(-rank, jnp.float32))
    batch = dataclasses.replace(batch, completion_len=lengths, annotations=annotations)
    sums = jnp.asarray(-rng.gamma(2.0, 5.0, (3, 3)), jnp.float32)
    pairs = pair_up(CompletionStats(sums), batch)
    there = np.flatnonzero(pairs.chosen_len > 0)
    expected = [(0, 0, 1), (0, 0, 2), (0, 1, 2), (1, 0, 2), (1, 1, 2), (2, 0, 1)]
    assert len(there) == len(expected)
    for at, (row, i, j) in zip(there, expected, strict=True):
        assert (pairs.chosen[at], pairs.rejected[at]) == (sums[row, i], sums[row, j])
        assert (pairs.chosen_len[at], pairs.rejected_len[at]) == (lengths[row, i], lengths[row, j])
        assert pairs.margin[at] == rank[row, j] - rank[row, i]


@pytest.fixture
def labels_file(tmp_path):
    rng = np.random.default_rng(2)
    rows = [
        {"prompt": sentence(rng, 1, 6), "completion": " " + sentence(rng, 1, 5), "label": i % 3 > 0} for i in range(20)
    ]
    return write_rows(tmp_path / "labels.jsonl", rows)


def metrics(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def train(tiny_dir, data, run, loss, *more, steps=6):
    command = ["dpo", "--model", tiny_dir, "--data", data, "--eval-data", data, "--output", str(run), "--loss", loss]
    assert main([*command, "--steps", str(steps), *OPTIONS, *more]) == 0
    return metrics(run)


def test_mismatched_completions_are_of_other_prompts(tiny_dir, tmp_path):
    texts = ["a", "a", "b", "b", "c", "a"]
    rows = [{"prompt": p, "completion": f"{i}" * (i + 1), "label": True} for i, p in enumerate(texts)]
    file = write_rows(tmp_path / "rows.jsonl", rows)
    examples, _ = load_examples([file], Encoder(load_tokenizer(tiny_dir)), kind=LABELS)
    both = with_mismatched(examples, max_length=6)
    prompts = [e.prompt.tobytes() for e in examples]
    of = {e.completions[0].tobytes()[: 4 * 2]: p for e, p in zip(examples, prompts, strict=True)}
    for example, prompt in zip(both, prompts, strict=True):
        other = example.completions[1]
        assert of[other.tobytes()[: 4 * 2]] != prompt and len(example.prompt) + len(other) <= 6
    assert [e.completions[0].tolist() for e in both] == [e.completions[0].tolist() for e in examples]


def test_unpaired_objectives_train(tiny_dir, labels_file, tmp_path):
    lines = train(tiny_dir, labels_file, tmp_path / "run", "kto+bco", steps=8)
    held_out = [line for line in lines if "eval_loss" in line]
    assert held_out[-1]["eval_loss"] < held_out[0]["eval_loss"]
    assert held_out[-1]["eval_rewards/chosen"] > held_out[-1]["eval_rewards/rejected"]


MOVING = ["--sync-ref-model", "--ref-model-sync-steps", "2"]


@pytest.mark.parametrize(
    ("loss", "more"),
    [("tdpo2+0.1*beta_dpo", []), ("sigmoid", MOVING)],
    ids=["draws and means", "moving"],
)
def test_what_steps_leave_behind_survives_a_stop(tiny_dir, pairs_file, tmp_path, loss, more, monkeypatch):
    whole = train(tiny_dir, pairs_file, tmp_path / "whole", loss, *more, steps=6)
    import dpojax.train.loop as loop

    real = loop.put_batch
    calls = []

    def stops(*args):
        calls.append(1)
        if len(calls) > 4:
            raise KeyboardInterrupt
        return real(*args)

    command = ["dpo", "--model", tiny_dir, "--data", pairs_file, "--eval-data", pairs_file, "--loss", loss]
    command += ["--output", str(tmp_path / "cut"), "--steps", "6", *OPTIONS, *more]
    monkeypatch.setattr(loop, "put_batch", stops)
    assert main(command) == 130
    monkeypatch.setattr(loop, "put_batch", real)
    assert main(command) == 0
    rates = {"pairs_per_second", "tokens_per_second"}
    keep = lambda lines: [{k: v for k, v in line.items() if k not in rates} for line in lines]  # noqa: E731
    assert keep(metrics(tmp_path / "cut")) == keep(whole)


@pytest.mark.parametrize("alpha", [1.0, 0.5])
def test_a_reference_that_moves(tiny_dir, pairs_file, tmp_path, alpha):
    lines = train(
        tiny_dir, pairs_file, tmp_path / "run", "sigmoid", *MOVING, "--ref-model-mixup-alpha", f"{alpha}", steps=3
    )
    still = train(tiny_dir, pairs_file, tmp_path / "still", "sigmoid", steps=3)
    losses, others = ({line["step"]: line["loss"] for line in run if "loss" in line} for run in (lines, still))
    np.testing.assert_allclose([losses[1], others[1]], np.log(2), rtol=1e-6)
    np.testing.assert_allclose(losses[2], others[2], rtol=1e-5)  # programs of their own
    if alpha == 1:  # the policy is its reference again
        np.testing.assert_allclose(losses[3], np.log(2), rtol=1e-6)
    else:
        assert others[3] < losses[3] < np.log(2)


def test_objective_of_ones_own_file(tiny_dir, pairs_file, tmp_path, capsys):
    file = tmp_path / "mine.py"
    log = tmp_path / "log"
    file.write_text(
        f"open({str(log)!r}, 'a').write('executed\\n')\n"
        "def mine(policy, ref, *, beta=0.3):\n    return -beta * (policy.chosen - policy.rejected)\n"
    )
    lines = train(tiny_dir, pairs_file, tmp_path / "run", f"{file}:mine+0.1*sft", steps=3)
    assert lines[-1]["eval_loss"] < lines[0]["eval_loss"]
    assert log.read_text() == "executed\n"  # once a run
    # Another content of the file is another run.
    file.write_text(file.read_text().replace("0.3", "0.4"))
    command = ["dpo", "--model", tiny_dir, "--data", pairs_file, "--eval-data", pairs_file, "--steps", "3", *OPTIONS]
    assert main([*command, "--output", str(tmp_path / "run"), "--loss", f"{file}:mine+0.1*sft"]) == 2
    assert "mine.py" in capsys.readouterr().err


def test_ranked_rows_are_their_pairs(tiny_dir, tmp_path):
    """A prompt with three completions, against the three pairs written out."""
    rng = np.random.default_rng(3)
    ranked, pairs = [], []
    for _ in range(8):
        prompt, texts = sentence(rng, 1, 6), [f" {sentence(rng, 1, 5)} {i}" for i in range(3)]
        ranked.append({"prompt": prompt, "completions": texts, "scores": [1.0, 3.0, 2.5]})
        for i, j, margin in ((1, 2, 0.5), (1, 0, 2.0), (2, 0, 1.5)):
            pairs.append({"prompt": prompt, "chosen": texts[i], "rejected": texts[j], "margin": margin})
    files = write_rows(tmp_path / "ranked.jsonl", ranked), write_rows(tmp_path / "pairs.jsonl", pairs)
    options = [("--batch-size", "8"), ("--batch-size", "24")]
    ends = [
        train(tiny_dir, file, tmp_path / f"run{i}", "odpo", *option, steps=2)[-1]
        for i, (file, option) in enumerate(zip(files, options, strict=True))
    ]
    for name in ("eval_loss", "eval_rewards/margins", "eval_rewards/accuracies"):
        np.testing.assert_allclose(ends[0][name], ends[1][name], rtol=1e-5)


READ_TOKENS = [name for name, loss in LOSSES.items() if traits_of(loss).statistics]


@pytest.mark.parametrize("name", READ_TOKENS)
def test_gradients_reach_a_model(config, params, batch, name):
    objective, apply_fn = LOSSES[name], make_apply(config)
    full = dataclasses.replace(batch, key=jax.random.split(jax.random.key(0), 4))
    ref = make_ref_step(apply_fn, one_device(), config, traits_of(objective), chunk_tokens=64)(params, full)
    loss_fn = make_loss(apply_fn, objective, chunk_tokens=64)
    context = BatchContext(jnp.float32(0.1), mean_chosen_len(full), jnp.int32(0), empty_running(objective))
    value, grads = jax.value_and_grad(lambda p: loss_fn(p, full, ref, context)[0].sum)(params)
    assert np.isfinite(value) and all(np.isfinite(g).all() for g in jax.tree.leaves(grads))
    assert any((g != 0).any() for g in jax.tree.leaves(grads))
