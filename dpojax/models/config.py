"""A decoder's choices: norm, positions, attention, MLP, residual form and kinds of layers, each a small dataclass.

A family picks one of each (:mod:`dpojax.models.families`); the program reads the choices and knows no family.
"""

import dataclasses
from typing import Literal


@dataclasses.dataclass(frozen=True, kw_only=True)
class Norm:
    """RMSNorm (Zhang and Sennrich 2019, arXiv 1910.07467) or LayerNorm (Ba et al. 2016, arXiv 1607.06450)."""

    kind: Literal["rms", "layer"] = "rms"
    eps: float
    bias: bool = False
    offset: float = 0.0
    """What the parameter is added to before it scales (Gemma: 1)."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class RopeScaling:
    """Stretching of the rotary frequencies: all by ``factor`` (linear), the long wavelengths alone (Llama 3), or each
    by its own factor (LongRoPE, arXiv 2402.13753).

    LongRoPE has ``short`` factors for texts of up to ``original_max_positions`` tokens and ``long`` ones beyond; the
    program computes the short ones, and longer texts are refused. Its cosines and sines are multiplied with
    ``attention_factor``.
    """

    kind: Literal["linear", "llama3", "longrope"]
    factor: float
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_positions: int = 8192
    short: tuple[float, ...] = ()
    long: tuple[float, ...] = ()
    attention_factor: float = 1.0


@dataclasses.dataclass(frozen=True, kw_only=True)
class Rope:
    """Rotary positions (Su et al. 2021, arXiv 2104.09864) on the first ``share`` of every head's width."""

    theta: float
    scaling: RopeScaling | None = None
    share: float = 1.0
    interleaved: bool = False
    """The two coordinates that are turned lie side by side; otherwise they are a head's first and second half."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Learned:
    """A learned embedding of every position; there are none beyond ``size``."""

    size: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class Attention:
    """Grouped-query attention (Ainslie et al. 2023, arXiv 2305.13245): kv_heads divides heads."""

    heads: int
    kv_heads: int
    head_dim: int
    bias: Literal["none", "qkv", "all"] = "none"
    qk_norm: Norm | None = None
    """Of queries and keys, before the rotary positions."""
    qk_norm_over: Literal["head", "all"] = "head"
    """What it is a norm of: every head by itself, with one scale for all, or all heads together."""
    scale: float | None = None
    """What scores are multiplied with (None: ``head_dim ** -0.5``)."""
    softcap: float | None = None
    """``c tanh(score / c)`` in place of scores (Gemma 2, arXiv 2408.00118)."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Mlp:
    """``down(act(gate x) * up x)`` where gated (Shazeer 2020, arXiv 2002.05202), else ``down(act(up x))``."""

    width: int
    act: Literal["silu", "gelu", "gelu_tanh", "relu"] = "silu"
    gated: bool = True
    bias: bool = False


@dataclasses.dataclass(frozen=True, kw_only=True)
class Experts:
    """A mixture of gated MLPs, of which every token goes through a few (Shazeer et al. 2017, arXiv 1701.06538)."""

    number: int
    per_token: int
    width: int
    renormalize: bool = True
    """Whether a token's weights add up to 1; otherwise they are the router's probabilities."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class LayerKind:
    """What may alternate between layers: ``window``, the number of latest tokens that a token sees, itself included
    (None: all), rotary positions other than the decoder's, and another scale of scores than attention's."""

    window: int | None = None
    rope: Rope | None = None
    scale: float | None = None


Quantized = Literal["none", "int8", "nf4"]
"""Numbers of a frozen weight: its own; 8 bits and a scale for every output; or 4 bits of normal quantiles (Dettmers et
al. 2023, arXiv 2305.14314) and a scale for every 64 numbers."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class LowRank:
    """The rank and alpha of the adapter beside one weight of every layer, by the weight's name."""

    name: str
    rank: int
    alpha: float


@dataclasses.dataclass(frozen=True, kw_only=True)
class Lora:
    """An adapter (Hu et al. 2021, arXiv 2106.09685): ``x W + scale (x A) B`` beside each weight W of ``weights``.

    The scale is ``alpha / rank``, or ``alpha / sqrt(rank)`` with ``rslora`` (Kalajdzievski 2023, arXiv 2312.03732).
    ``zero`` is the factor that starts at zero. ``dropout`` is the share of A's inputs that training sets to zero.
    ``saved`` are parameters that the adapter has whole, in place of the base's. ``vocab_size`` is that of resized
    embeddings (None: the base's), ``tied`` whether the adapted model's unembedding is its embedding (None: as in the
    base).
    """

    weights: tuple[LowRank, ...]
    rslora: bool = False
    zero: Literal["a", "b"] = "b"
    dropout: float = 0.0
    saved: tuple[str, ...] = ()
    vocab_size: int | None = None
    tied: bool | None = None

    def scale(self, low: LowRank) -> float:
        """What the product of a weight's factors is multiplied with."""
        return low.alpha / (low.rank**0.5 if self.rslora else low.rank)


@dataclasses.dataclass(frozen=True, kw_only=True)
class DecoderConfig:
    """All that shapes the program; hashable, so it can be a static argument.

    ``residual`` is where norms stand around attention and MLP: "pre" (``x + f(norm x)``), "post" (``x + norm(f x)``),
    "pre_post" (both), "parallel" (attention and MLP both of x, added together), or "parallel_shared" (the same behind
    one norm). Layer i is of kind ``kinds[kind_of_layer[i]]``; an empty ``kind_of_layer`` means that all are of the
    first. ``head`` is the unembedding to the vocabulary, or one score (a reward model). Embeddings are multiplied with
    ``embed_scale``; logits z become ``c tanh(z / c)`` with c the ``logits_softcap``. ``experts`` stand in place of the
    MLP in all layers but the ``dense_layers``. ``max_positions`` is the longest text that the model was made for.
    ``lora`` is an adapter beside the parameters; all other choices are the base's.
    ``quantized`` is how the layers' weights are kept where no step changes them.
    """

    vocab_size: int
    width: int
    layers: int
    attention: Attention
    mlp: Mlp
    norm: Norm
    positions: Rope | Learned
    max_positions: int
    residual: Literal["pre", "post", "pre_post", "parallel", "parallel_shared"] = "pre"
    kinds: tuple[LayerKind, ...] = (LayerKind(),)
    kind_of_layer: tuple[int, ...] = ()
    tied: bool = False
    head: Literal["vocab", "score"] = "vocab"
    head_bias: bool = False
    embed_scale: float = 1.0
    logits_softcap: float | None = None
    experts: Experts | None = None
    dense_layers: tuple[int, ...] = ()
    lora: Lora | None = None
    quantized: Quantized = "none"

    @property
    def base(self) -> "DecoderConfig":
        """The choices without the adapter."""
        return dataclasses.replace(self, lora=None)

    @property
    def merged(self) -> "DecoderConfig":
        """The choices of the model that has the adapter in its own parameters."""
        if self.lora is None:
            return dataclasses.replace(self, quantized="none")
        vocab, tied = self.lora.vocab_size, self.lora.tied
        tied = self.tied if tied is None else tied
        size = self.vocab_size if vocab is None else vocab
        return dataclasses.replace(self.base, vocab_size=size, tied=tied, quantized="none")

    @property
    def reward(self) -> bool:
        """Whether it scores completions instead of predicting tokens."""
        return self.head == "score"

    @property
    def unembedding(self) -> str:
        """The parameter that maps hidden states to logits or, in a reward model, to scores."""
        return "score" if self.reward else "embed" if self.tied else "head"

    @property
    def longest(self) -> int | None:
        """How many tokens a text may have at most, beyond which there are no positions; None without a limit."""
        if isinstance(self.positions, Learned):
            return self.positions.size
        scalings = [rope.scaling for rope in (self.positions, *[kind.rope for kind in self.kinds]) if rope is not None]
        limits = [s.original_max_positions for s in scalings if s is not None and s.kind == "longrope"]
        return min(limits) if limits else None

    def kind(self, layer: int) -> LayerKind:
        """The kind of a layer, by its number."""
        return self.kinds[self.kind_of_layer[layer] if self.kind_of_layer else 0]
