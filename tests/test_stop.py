"""Stop strings: found wherever they lie in tokens, cut off the text, and nothing before them changes."""

import numpy as np
import pytest

from dpojax.cli import main
from dpojax.generate import make_sampler, sample_all
from dpojax.generate.samples import stopped_length, text_of

PROMPTS = [[5, 6, 7, 8, 9], [10], [11, 12, 13]]
OPTIONS = {"max_new_tokens": 29, "eos_ids": ()}


class Letters:
    """A tokenizer with a token for every letter, and for the letters ab together, c with an end of text, and <s>."""

    pieces = ("<s>", "ab", "c\n", *"abcdefghij")

    def decode(self, ids, skip_special_tokens=False):
        return "".join(self.pieces[i % len(self.pieces)] for i in ids if not (skip_special_tokens and i == 0))


def tokens_of(*pieces: str) -> list[int]:
    return [Letters.pieces.index(piece) for piece in pieces]


@pytest.mark.parametrize(
    ("pieces", "stop", "length", "text"),
    [
        (("a", "d", "e", "f"), ("de",), 3, "a"),  # over two tokens
        (("d", "ab", "c\n", "e"), ("bc",), 3, "da"),  # from inside of one into another
        (("d", "ab", "e"), ("x", "ab", "b"), 2, "d"),  # the first of two that one token completes
        (("d", "e"), ("x",), None, "de"),
        (("<s>", "d", "<s>", "e", "f"), ("e",), 4, "d"),  # special tokens are no text
        (("d", "<s>", "e"), ("<s>",), 2, "d"),  # and may be a stop string
        (("d", "<s>", "e"), ("d<",), 2, ""),
    ],
)
def test_where_a_text_stops(pieces, stop, length, text):
    assert stopped_length(tokens_of(*pieces), Letters(), stop) == length
    assert text_of(tokens_of(*pieces), False, Letters(), stop) == text


def test_a_token_that_ended_a_completion_is_no_text():
    assert text_of(tokens_of("d", "e"), True, Letters()) == "d"
    assert text_of(tokens_of("d", "e", "f"), True, Letters(), ("e",)) == "d"


@pytest.mark.parametrize("num_samples", [1, 3])
def test_samples_that_stop_are_those_that_do_not_up_to_there(config, params, num_samples):
    options = OPTIONS | {"num_samples": num_samples}
    free = sample_all(make_sampler(config, **options), params, PROMPTS, batch_size=2, seed=3)
    stopped = make_sampler(config, **options, stop=("ha", "j"), tokenizer=Letters())
    got = sample_all(stopped, params, PROMPTS, batch_size=2, seed=3)
    found = 0
    for i in range(len(PROMPTS)):
        for k in range(num_samples):
            row = free.lists()[i][k]
            length = stopped_length(row, Letters(), ("ha", "j"))
            kept = len(row) if length is None else length
            assert got.lists()[i][k] == row[:kept]
            np.testing.assert_array_equal(got.logps[i, k], np.where(np.arange(29) < kept, free.logps[i, k], 0))
            assert got.ended[i, k] == (length is not None)
            found += length is not None
    assert found > 0
    assert got.texts(Letters(), ("ha", "j")) == free.texts(Letters(), ("ha", "j"))


def test_eos_ends_a_completion_before_a_stop_string(config, params):
    greedy = OPTIONS | {"temperature": 0.0}
    ((free,),) = sample_all(make_sampler(config, **greedy), params, PROMPTS[:1], batch_size=1).lists()
    sampler = make_sampler(config, **greedy | {"eos_ids": (free[2],)}, stop=("nowhere",), tokenizer=Letters())
    got = sample_all(sampler, params, PROMPTS[:1], batch_size=1)
    assert got.lists()[0][0] == free[: free.index(free[2]) + 1] and got.ended.all()


def test_a_stop_string_is_not_empty_and_needs_a_tokenizer(config):
    for options in ({"stop": ("a",)}, {"stop": ("a", ""), "tokenizer": Letters()}):
        with pytest.raises(ValueError, match="stop strings must not be empty, and need tokenizer="):
            make_sampler(config, **OPTIONS, **options)


def test_the_command_prints_up_to_a_stop_string_or_a_stop_token(capsys, tiny_dir):
    def printed(*flags: str) -> str:
        args = ("sample", "--model", tiny_dir, "--prompt", "the film", "--temperature", "0", "--max-new-tokens", "24")
        assert main([*args, *flags]) == 0
        return capsys.readouterr().out.partition("the film|")[2].removesuffix("\n")

    free = printed()
    stop = free[5:7]
    assert printed("--stop", "nowhere", stop) == free[: free.index(stop)]
    token = ord(free[5]) + 3  # ByT5's, of a byte
    assert printed("--stop-token-ids", str(token)) == free[: free.index(free[5])]
