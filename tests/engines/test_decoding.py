"""The choice of a token against a plain sort, and the slots of the cache."""

import pytest
import torch
from torch import Tensor

from selfsteer.engines.decoding import CANDIDATES, SlotCache, UnsupportedAttentionError, choose, slot_attention


def chosen(probabilities: list[float], uniforms: list[float], *, top_p: float, temperature: float = 1.0) -> list[int]:
    """Draw once for each uniform from the same probabilities."""
    rows = len(uniforms)
    return choose(
        torch.tensor(probabilities).log().expand(rows, -1),
        temperature=torch.full((rows,), temperature),
        top_p=torch.full((rows,), top_p),
        uniforms=torch.tensor(uniforms),
    ).tolist()


def sorted_nucleus(logits: Tensor, temperature: float, top_p: float) -> Tensor:
    """Oracle: the nucleus distribution of one row, (vocabulary,), by sorting all of it, as in arXiv 1904.09751."""
    probabilities = (logits.double() / temperature).softmax(-1)
    ordered, ids = probabilities.sort(descending=True, stable=True)
    before = ordered.cumsum(0) - ordered
    nucleus = torch.zeros_like(probabilities)
    nucleus[ids[before < top_p]] = ordered[before < top_p]
    return nucleus / nucleus.sum()


def test_choose_by_hand():
    """Nucleus of 0.75: tokens 2 (0.5) and 0 (0.3), renormalised to 0.625 and 0.375; token 1 (0.2) is never drawn."""
    assert chosen([0.3, 0.2, 0.5], [0.0, 0.62, 0.63, 0.9999], top_p=0.75) == [2, 2, 0, 0]


def test_nucleus_stops_when_reached():
    """0.5 alone has the mass 0.5 (powers of two: no rounding); with 0.51 the next token joins."""
    assert chosen([0.25, 0.5, 0.125, 0.125], [0.99], top_p=0.5) == [1]
    assert chosen([0.25, 0.5, 0.125, 0.125], [0.99], top_p=0.51) == [0]


def test_temperature_sharpens():
    """At temperature 0.5, 0.6 : 0.4 becomes 0.36 : 0.16, that is 0.6923 : 0.3077."""
    assert chosen([0.6, 0.4], [0.692, 0.693], top_p=1.0, temperature=0.5) == [0, 1]


def test_temperature_zero_takes_the_first_of_the_most_probable():
    assert chosen([0.2, 0.4, 0.4], [0.999], top_p=1.0, temperature=0.0) == [1]


def test_ties_at_the_edge_keep_the_size_of_the_nucleus():
    """Four equal tokens, nucleus of 0.5: any two of them, each with probability 1/2."""
    drawn = chosen([0.25] * 4, [i / 100 for i in range(100)], top_p=0.5)
    assert sorted(drawn.count(token) for token in set(drawn)) == [50, 50]


@pytest.mark.parametrize("top_p", [0.1, 0.8, 0.95, 1.0])
@pytest.mark.parametrize("scale", [0.05, 1.0, 4.0])  # flat: beyond all candidates; peaked: a few tokens
def test_choose_equals_the_sorted_nucleus(scale: float, top_p: float):
    """Each drawn token's interval of the oracle's cumulative distribution holds the uniform, but for float32's rounding."""
    logits = torch.randn(5000, generator=torch.Generator().manual_seed(3)) * scale
    expected = sorted_nucleus(logits, 0.7, top_p)
    ids = expected.argsort(descending=True, stable=True)
    upper = expected[ids].cumsum(0)
    if scale == 0.05 and top_p == 0.95:
        assert (expected > 0).sum() > max(CANDIDATES)
    uniforms = torch.linspace(0, 0.9999, 101)
    drawn = choose(
        logits.expand(101, -1),
        temperature=torch.full((101,), 0.7),
        top_p=torch.full((101,), top_p),
        uniforms=uniforms,
    )
    assert (expected[drawn] > 0).all()
    ranks = (ids[None] == drawn[:, None]).int().argmax(-1)
    assert (uniforms <= upper[ranks] + 1e-5).all()
    assert (uniforms >= upper[ranks] - expected[drawn] - 1e-5).all()


def test_rows_of_unlike_kinds_are_drawn_as_if_alone():
    """A peaked, a flat and a greedy row in one call, against one call each."""
    generator = torch.Generator().manual_seed(1)
    logits = torch.randn(3, 3000, generator=generator) * torch.tensor([[5.0], [0.01], [1.0]])
    options = {
        "temperature": torch.tensor([0.7, 1.0, 0.0]),
        "top_p": torch.tensor([0.8, 0.99, 0.9]),
        "uniforms": torch.tensor([0.3, 0.6, 0.9]),
    }
    together = choose(logits, **options)
    alone = [choose(logits[i : i + 1], **{name: value[i : i + 1] for name, value in options.items()})[0] for i in range(3)]
    assert together.tolist() == [int(token) for token in alone]


def test_frequencies_follow_the_distribution():
    """Chi-square with 3 degrees of freedom over 40,000 draws; 16.3 is exceeded once in a thousand correct samplers."""
    probabilities = torch.tensor([0.4, 0.3, 0.15, 0.1, 0.05])
    rows = 40_000
    drawn = choose(
        probabilities.log().expand(rows, -1),
        temperature=torch.ones(rows),
        top_p=torch.full((rows,), 0.9),
        uniforms=torch.rand(rows, generator=torch.Generator().manual_seed(0)),
    )
    expected = probabilities[:4] / 0.95 * rows
    counts = torch.bincount(drawn, minlength=5)
    assert counts[4] == 0
    assert ((counts[:4] - expected) ** 2 / expected).sum() < 16.3


def test_slots_grow_and_keep_their_content():
    cache = SlotCache(2)
    cache.reserve(5)
    keys, values = cache.layer(0, torch.zeros(1, 3, 1, 4), torch.zeros(1, 3, 1, 6))
    assert (keys.shape, values.shape) == ((2, 3, 128, 4), (2, 3, 128, 6))
    keys[1, :, :5] = 7
    cache.move(1, 0, 5)
    cache.reserve(129)
    grown, _ = cache.layers[0]
    assert grown.shape == (2, 3, 256, 4)
    assert grown[0, :, :5].eq(7).all()
    assert grown[0, :, 5:].eq(0).all()


@pytest.mark.parametrize("option", ["sliding_window", "softcap", "s_aux"])
def test_attention_that_is_not_plain_is_refused(option: str):
    states = torch.zeros(1, 2, 3, 4)
    with pytest.raises(UnsupportedAttentionError, match=option):
        slot_attention(torch.nn.Module(), states, states, states, None, **{option: 4})
