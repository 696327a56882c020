"""Sampling with a KV cache, on the mesh that training uses."""

from dpojax.generate.sampler import Sampler, make_sampler, pad_left, sample_all
from dpojax.generate.samples import Samples
from dpojax.generate.sampling import DrawOptions, next_token, penalized, sample_token, token_logp, warped

__all__ = [
    "DrawOptions",
    "Sampler",
    "Samples",
    "make_sampler",
    "next_token",
    "pad_left",
    "penalized",
    "sample_all",
    "sample_token",
    "token_logp",
    "warped",
]
