"""An objective that reads a new statistic of tokens touches four files: it is added to a copy of the package here."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import dpojax

TYPES = [  # a field of PairLogps and one of CompletionStats
    ("    kl: Sides | None = None\n", "    kl: Sides | None = None\n    entropy: Sides | None = None\n"),
    (
        '    kl: Float[Array, "B N"] | None = None\n',
        '    kl: Float[Array, "B N"] | None = None\n    entropy: Float[Array, "B N"] | None = None\n',
    ),
]
LOGPROBS = [  # its computation, and a row of the table
    (
        "TOKEN_STATISTICS: dict",
        """def _entropy(h: Array, head: Array, ref: ReferenceOutput | None, chunk_tokens: int) -> Float[Array, "R Z"]:
    def of_chunk(h: Float[Array, "R z D"]) -> Float[Array, "R z"]:
        logp = jax.nn.log_softmax(logits_of(h, head))
        return -jnp.sum(jnp.exp(logp) * logp, axis=-1)

    return by_chunk(of_chunk, chunk_tokens, h)


TOKEN_STATISTICS: dict""",
    ),
    ('"kl": _kl}', '"kl": _kl, "entropy": _entropy}'),
]
FAMILY = '''"""DPO with a bonus for the policy's entropy."""

from jaxtyping import Array, Float

from dpojax.losses.compose import require
from dpojax.losses.dpo import sigmoid
from dpojax.losses.traits import Beta, traits
from dpojax.types import PairLogps


@traits("entropy")
def entropy_bonus(policy: PairLogps, ref: PairLogps, *, beta: Beta = 0.1, bonus: float = 0.01) -> Float[Array, " B"]:
    """DPO that keeps the policy's token distributions wide."""
    chosen, rejected = require(policy.entropy, "entropy")
    return sigmoid(policy, ref, beta=beta) - bonus * (chosen + rejected)
'''
LISTED = [  # the import, the family and the name
    (
        "from dpojax.losses.ipo import",
        "from dpojax.losses.entropy import entropy_bonus\nfrom dpojax.losses.ipo import",
    ),
    ("(rpo, dpop,", "(entropy_bonus, rpo, dpop,"),
    ('    "exo_pair",\n', '    "entropy_bonus",\n    "exo_pair",\n'),
]
EDITS = {"types.py": TYPES, "logprobs.py": LOGPROBS, "losses/__init__.py": LISTED}  # and losses/entropy.py

USED = """
import jax, jax.numpy as jnp, numpy as np, optax
from dpojax import theory
from dpojax.logprobs import completion_stats
from dpojax.losses import spelled, traits_of
from dpojax.losses.catalogue import needs
from dpojax.losses.compose import swapped
from dpojax.losses.spelling import probe
from dpojax.packing import PairBatch
from dpojax.show import curves_named
from dpojax.train.objectives import BatchContext, make_loss, mean_chosen_len
from dpojax.types import ReferenceOutput

spec = spelled("with_label_smoothing(entropy_bonus(bonus=0.5), 0.1)+0.1*sft")
assert traits_of(spec.objective).statistics == {"entropy"} and not traits_of(spec.objective).needs_live_reference
assert "token distributions" in needs(spec.objective) and spec.takes_beta
assert swapped(probe(spec.objective)[0]).entropy is not None
(curve,) = curves_named(["entropy_bonus"])
np.testing.assert_allclose(curve.losses, curves_named(["sigmoid"])[0].losses, rtol=1e-6)  # a neutral entropy is 0
try:
    theory.expected_loss(spec.objective, *(jnp.zeros((1, 2)),) * 2, jnp.full((1, 2, 2), 0.5))
except ValueError as error:
    assert "'entropy'" in str(error)
else:
    raise AssertionError("theory has no exact entropy, and did not say so")

# Training: a model whose hidden state is a token's embedding.
tokens = jnp.arange(12).reshape(2, 2, 3)
batch = PairBatch(jnp.ones((2, 4), jnp.int32), jnp.array([4, 2]), tokens, jnp.array([[3, 2], [1, 3]]), jnp.ones(2))
params = {"embed": jax.random.normal(jax.random.key(0), (16, 8))}
apply_fn = lambda params, inputs: (params["embed"][inputs.tokens], params["embed"])
entropy = completion_stats(apply_fn, params, batch, reads=frozenset({"entropy"})).entropy
logp = np.asarray(jax.nn.log_softmax(params["embed"] @ params["embed"].T), np.float64)
of_token = -(np.exp(logp) * logp).sum(-1)  # of the distribution that follows it; the prompt ends with token 1
by_hand = [[sum(of_token[[1, *tokens[i, j, : n - 1]]]) for j, n in enumerate(row)]
           for i, row in enumerate(np.asarray(batch.completion_len))]
np.testing.assert_allclose(entropy, by_hand, rtol=1e-5)

objective, beta = spelled("entropy_bonus(bonus=0.5)").resolved(0.3)
loss_fn, context = make_loss(apply_fn, objective, chunk_tokens=4), BatchContext(beta, mean_chosen_len(batch), 0)
ref = ReferenceOutput(probe(objective, B=2)[1])

@jax.jit
def step(params):
    value, grads = jax.value_and_grad(lambda p: loss_fn(p, batch, ref, context)[0].sum / 2)(params)
    return value, optax.apply_updates(params, jax.tree.map(lambda g: -0.1 * g, grads))

values = []
for _ in range(3):
    value, params = step(params)
    values.append(float(value))
assert values[2] < values[1] < values[0], values
"""


def test_an_objective_that_reads_a_new_statistic_touches_four_files(tmp_path):
    package = tmp_path / "dpojax"
    shutil.copytree(Path(dpojax.__file__).parent, package, ignore=shutil.ignore_patterns("__pycache__"))
    for name, edits in EDITS.items():
        text = (package / name).read_text()
        for old, new in edits:
            assert text.count(old) == 1, (name, old)
            text = text.replace(old, new)
        (package / name).write_text(text)
    (package / "losses" / "entropy.py").write_text(FAMILY)
    environment = os.environ | {"PYTHONPATH": str(tmp_path)}
    ran = subprocess.run([sys.executable, "-c", USED], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
