"""An objective of one's own in a file of one's own, trained from the command line.

    dpojax dpo --model path/to/model --data experiments/data/sentiment_train.jsonl \
        --eval-data experiments/data/sentiment_heldout.jsonl --steps 10 --warmup-steps 5 --learning-rate 5e-6 \
        --loss experiments/custom_loss.py:squared_hinge --beta 0.1 --output runs/custom_loss

A squared hinge: as hinge it is 0 from a margin of 1 / beta nats on, but its gradient falls to 0 on the way there.
`dpojax losses experiments/custom_loss.py:squared_hinge hinge --beta 1` draws both.

Hardware and time: SmolLM2-135M-Instruct, two CPU cores that had other work too, 10 steps of 8 pairs in 81 seconds.
Result: the held-out loss falls from 1 to 0.876, and 79 % of the held-out pairs are ordered rightly.
"""

import jax.numpy as jnp

from dpojax.losses import log_ratios, traits


@traits(divergence=True)  # of log-ratios alone, so with_divergence may go around it
def squared_hinge(policy, ref, *, beta=0.1):
    """``max(0, 1 - beta h)^2``, h the log-ratio margin in nats; one loss a pair, ``[B]``."""
    chosen, rejected = log_ratios(policy, ref)
    return jnp.square(jnp.maximum(0.0, 1 - beta * (chosen - rejected)))
