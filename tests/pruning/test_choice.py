"""Which tokens go on."""

import pytest
import torch

from uncomp.pruning import CHOICES, WIDEST, choose_tokens

ATTENTION, HANDED_ON = CHOICES["attention"], CHOICES["handed-on"]


def _layer(tokens, seed, heads=3, group=2, window=40, size=16):
    random = torch.Generator().manual_seed(seed)
    queries = torch.randn(heads, group, window, size, generator=random, dtype=torch.float64)
    keys = torch.randn(heads, tokens, size, generator=random, dtype=torch.float64)
    return queries, keys


@pytest.mark.parametrize(("name", "count"), [("attention", 8), ("handed-on", 32)])
@pytest.mark.parametrize(("tokens", "total"), [(41, 41), (57, 200), (333, 333)])
def test_scores_are_attention_summed_over_heads(name, count, tokens, total):
    queries, keys = _layer(tokens, seed=tokens)
    at = torch.arange(total - 40, total)
    positions = torch.cat([torch.arange(tokens - 40), at])
    scores = CHOICES[name].scores(queries, keys, at, positions, 0.25)
    logits = 0.25 * queries[:, :, -count:] @ keys.transpose(1, 2).unsqueeze(1)
    hidden = positions > at[-count:, None]
    probabilities = logits.masked_fill(hidden, float("-inf")).softmax(-1)  # [H, G, w, N]
    over = probabilities.sum(2) if name == "attention" else probabilities.amax(2)
    torch.testing.assert_close(scores, over.sum((0, 1)))


def test_no_choice_looks_at_more_queries_than_are_remembered():
    assert {choice.queries for choice in CHOICES.values()} == {8, WIDEST}


def test_forced_and_recent_tokens_stay_whatever_their_scores():
    scores = torch.linspace(1, 0, 60)
    forced = torch.zeros(60, dtype=torch.bool)
    forced[[0, 30]] = True
    chosen = choose_tokens(scores, forced, 10, 20, ATTENTION).tolist()
    assert chosen == [*range(9), 30, *range(50, 60)]


def test_equal_scores_go_to_the_earlier_token():
    chosen = choose_tokens(torch.zeros(9), torch.zeros(9, dtype=torch.bool), 2, 5, ATTENTION)
    assert chosen.tolist() == [0, 1, 2, 7, 8]


def test_scores_are_handed_on_but_not_those_of_recent_tokens():
    scores = torch.zeros(100)
    scores[20], scores[95] = 1.0, 100.0
    forced = torch.zeros(100, dtype=torch.bool)
    chosen = choose_tokens(scores, forced, 10, 20, HANDED_ON).tolist()
    # reaches twice as far forward (16) as back (8): 7 after it, 2 before it
    assert chosen == [*range(17, 27), *range(90, 100)]
    assert choose_tokens(scores, forced, 10, 20, ATTENTION).tolist() == [
        *range(9),
        20,
        *range(90, 100),
    ]


def test_all_tokens_can_stay():
    forced = torch.zeros(7, dtype=torch.bool)
    assert choose_tokens(torch.rand(7), forced, 3, 7, HANDED_ON).tolist() == list(range(7))


def test_more_than_there_are():
    with pytest.raises(ValueError, match="8 of 7 tokens"):
        choose_tokens(torch.rand(7), torch.zeros(7, dtype=torch.bool), 3, 8, ATTENTION)
