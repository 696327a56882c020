"""Sampling with a KV cache, on the mesh that training uses."""

from dpojax.generate.sampler import Sampler, Samples, make_sampler, pad_left, sample_all
from dpojax.generate.sampling import next_token, sample_token, token_logp

__all__ = ["Sampler", "Samples", "make_sampler", "next_token", "pad_left", "sample_all", "sample_token", "token_logp"]
