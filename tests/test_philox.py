"""Philox4x32-10: Random123's known answers, an independent NumPy twin, and the maps to numbers."""

from fractions import Fraction

import numpy as np
import pytest
import torch

from bld_ext.philox import below, between, philox, seed_key, stream_seed, uniform

# Random123, tests/kat_vectors, philox4x32 with 10 rounds: counter, key, words
KNOWN_ANSWERS = {
    "zeros": ("00000000 00000000 00000000 00000000", "00000000 00000000",
              "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
    "ones": ("ffffffff ffffffff ffffffff ffffffff", "ffffffff ffffffff",
             "408f276d 41c83b0e a20bc7c6 6d5451fd"),
    "pi": ("243f6a88 85a308d3 13198a2e 03707344", "a4093822 299f31d0",
           "d16cfe09 94fdcceb 5001e420 24126ea1"),
}  # fmt: skip
LAST = 2**32 - 1
EDGE_WORDS = [0, 1, 0xFF, 0x100, 0x7FFFFFFF, 0x80000000, 0xFFFFFF00, LAST]


@pytest.fixture(params=KNOWN_ANSWERS.values(), ids=KNOWN_ANSWERS.keys())
def known_answer(request):
    return [tuple(int(word, 16) for word in words.split()) for words in request.param]


def philox_numpy(counter, key):
    """The published round, in unsigned 64-bit arithmetic: lo/hi of two products, then Weyl keys."""
    a, b, c, d = (np.asarray(word, np.uint64) for word in counter)
    k, m = (np.asarray(word, np.uint64) for word in key)
    low, half = np.uint64(LAST), np.uint64(32)
    for _ in range(10):
        x, y = np.uint64(0xD2511F53) * a, np.uint64(0xCD9E8D57) * c
        a, b, c, d = (y >> half) ^ b ^ k, y & low, (x >> half) ^ d ^ m, x & low
        k, m = (k + np.uint64(0x9E3779B9)) & low, (m + np.uint64(0xBB67AE85)) & low
    return np.stack([a, b, c, d])


def random_words(count, seed):
    words = np.random.default_rng(seed).integers(0, 2**32, (count, 1000), dtype=np.uint64)
    words[:, :2] = [0, LAST]
    return words


def test_known_answer_of_integers(known_answer):
    counter, key, words = known_answer
    assert philox(counter, key) == words


def test_known_answer_of_tensors(known_answer):
    counter, key, words = known_answer
    tensors = philox(tuple(map(torch.tensor, counter)), tuple(map(torch.tensor, key)))
    assert all(word.dtype == torch.int64 for word in tensors)
    assert tuple(map(int, tensors)) == words


def test_equals_numpy_twin():
    words = random_words(6, seed=0)
    counter, key = tuple(words[:4]), tuple(words[4:])
    tensors = philox(
        *(tuple(map(torch.from_numpy, w.astype(np.int64))) for w in (words[:4], words[4:]))
    )
    np.testing.assert_array_equal(torch.stack(tensors).numpy(), philox_numpy(counter, key))


def test_counters_broadcast():
    image, view = torch.arange(5), torch.arange(3).unsqueeze(1)
    grid = torch.stack(torch.broadcast_tensors(*philox((image, view, 7, 1), (2, 3))))
    assert grid.shape == (4, 3, 5)
    assert all(
        tuple(grid[:, v, i].tolist()) == philox((i, v, 7, 1), (2, 3))
        for v in range(3)
        for i in range(5)
    )


@pytest.mark.parametrize("seed", [0, LAST, 2**32, 0x0123456789ABCDEF, 2**63 - 1])
def test_key_is_both_halves_of_the_seed(seed):
    assert seed_key(seed) == (seed % 2**32, seed // 2**32)
    assert tuple(map(int, seed_key(torch.tensor(seed)))) == seed_key(seed)


def test_uniform_is_exact():
    words = EDGE_WORDS + random_words(1, seed=1)[0].tolist()
    numbers = uniform(torch.tensor(words)).tolist()
    assert [Fraction(u) for u in numbers] == [Fraction(word // 2**8, 2**24) for word in words]
    assert min(numbers) == 0 and max(numbers) == 1 - 2**-24


@pytest.mark.parametrize("low, high", [(-15.0, 15.0), (0.9, 1.1), (0.8, 1.2), (-0.05, 0.05)])
def test_between_is_one_rounded_sum(low, high):
    words = EDGE_WORDS + random_words(1, seed=2)[0].tolist()
    low32, span32 = Fraction(float(np.float32(low))), Fraction(float(np.float32(high - low)))
    exact = [low32 + Fraction(word // 2**8, 2**24) * span32 for word in words]
    # float(Fraction) rounds once, to double, as the one addition does
    expected = torch.tensor([float(x) for x in exact], dtype=torch.float64).float()
    numbers = between(torch.tensor(words), low, high)
    assert numbers.dtype == torch.float32
    assert torch.equal(numbers, expected)


@pytest.mark.parametrize(
    "low, high", [(0.0, 0.0), (1.0, 1.0), (-15.0, 15.0), (0.9, 1.1), (1.9419213452, 2.0122026197)]
)
def test_between_stays_in_its_bounds(low, high):
    numbers = between(torch.tensor(EDGE_WORDS), low, high)
    low32, high32 = torch.tensor([low, high])
    assert numbers[0] == low32
    assert ((low32 <= numbers) & (numbers <= high32)).all()


@pytest.mark.parametrize("n", [1, 2, 9, 2**21 + 1])
def test_below_is_the_high_word(n):
    words = EDGE_WORDS + random_words(1, seed=3)[0].tolist()
    numbers = below(torch.tensor(words), n)
    assert numbers.dtype == torch.int64
    assert numbers.tolist() == [word * n // 2**32 for word in words]
    assert numbers.min() == 0 and numbers.max() == n - 1


def test_stream_seed_is_two_philox_words():
    seed = 0x0123456789ABCDEF
    w0, w1, *_ = philox_numpy((0, 3, 5, 9), (0x89ABCDEF, 0x01234567)).tolist()
    assert stream_seed(seed, step=5, view=3, op=9) == w0 + 2**32 * (w1 % 2**31)


def test_stream_seed_differs_over_every_argument():
    seeds, few = (0, 1, 2**32, 2**63 - 1), (0, 1, 2, LAST)
    streams = {stream_seed(s, t, v, o) for s in seeds for t in few for v in few for o in few}
    assert len(streams) == 4**4
    assert all(0 <= stream < 2**63 for stream in streams)
