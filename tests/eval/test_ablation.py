"""Replays of a recorded prompt, on a small model of random weights."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from uncomp.eval.ablation import choose, features, per_prompt, variants
from uncomp.eval.ablation.heads import between, spearman
from uncomp.eval.ablation.measure import Case, measure, reference_spans, signs
from uncomp.eval.ablation.replay import Replay
from uncomp.eval.ablation.shared import both, forget
from uncomp.eval.ablation.summary import table
from uncomp.importance import Importance
from uncomp.kernels.select import ema_pool
from uncomp.kernels.window_scores import window_scores
from uncomp.rotary import Rotary

PROMPT = [(7 * i * i + 3 * i) % 97 for i in range(40)]
REST = [5, 11, 2, 60, 33]


@pytest.fixture(scope="module")
def replay(tmp_path_factory: pytest.TempPathFactory) -> Replay:
    from tokenizers import Tokenizer, models
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("model")
    shape = {"hidden_size": 48, "intermediate_size": 64, "num_hidden_layers": 3}
    heads = {"num_attention_heads": 6, "num_key_value_heads": 3}
    # Far from the usual 0.02, so that attention is not flat.
    config = LlamaConfig(vocab_size=97, initializer_range=0.4, eos_token_id=96, **shape, **heads)
    LlamaForCausalLM(config).save_pretrained(folder)
    words = Tokenizer(models.WordLevel({str(i): i for i in range(97)}, unk_token="0"))
    PreTrainedTokenizerFast(tokenizer_object=words).save_pretrained(folder)
    return Replay(str(folder))


def plain(replay: Replay, ids: list[int]) -> Tensor:
    """The model's own logits, by its ordinary attention."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(replay.model.name_or_path)
    with torch.inference_mode():
        return model(torch.tensor([ids])).logits[0]


def test_everything_kept_is_the_model(replay: Replay) -> None:
    reading = replay.read(PROMPT)
    expected = plain(replay, PROMPT + REST)
    torch.testing.assert_close(reading.logits, expected[39], rtol=0, atol=1e-4)
    everything = torch.ones(2, 3, 3, 40, dtype=torch.bool)
    for logits in replay.follow(reading, everything, REST, 5):
        torch.testing.assert_close(logits, expected[40:], rtol=0, atol=1e-4)


def test_greedy_answer_is_the_models(replay: Replay) -> None:
    reading = replay.read(PROMPT)
    answer = replay.generate(reading, 6)
    ids = list(PROMPT)
    for token in answer:
        assert int(plain(replay, ids)[-1].argmax()) == token
        ids.append(token)
    assert len(answer) == 6 or int(plain(replay, ids)[-1].argmax()) == 96


def test_what_is_dropped_is_not_attended_to(replay: Replay) -> None:
    """Against a cache in which the dropped values are changed, and one in which kept ones are."""
    reading = replay.read(PROMPT)
    kept = torch.rand(1, 3, 3, 40) < 0.4
    kept[..., 0] = True
    before = replay.follow(reading, kept, REST, 5)
    with torch.inference_mode():
        reading.values.masked_fill_(~kept[0, ..., None], 9.0)
        assert replay.follow(reading, kept, REST, 5).equal(before)
        reading.values[kept[0]] += 1.0
    assert not torch.allclose(replay.follow(reading, kept, REST, 5), before, atol=1e-2)


def test_one_head_of_one_layer_can_keep_something_else(replay: Replay) -> None:
    reading = replay.read(PROMPT)
    both_of_them = torch.ones(2, 3, 3, 40, dtype=torch.bool)
    both_of_them[1, 2, 1, 5:30] = False
    first, second = replay.follow(reading, both_of_them, REST, 5)
    assert not torch.allclose(first, second, atol=1e-3)


def test_rotation_is_that_of_the_policies(replay: Replay) -> None:
    reading = replay.read(PROMPT)
    angles = torch.arange(40)[:, None] * replay.model.model.rotary_emb.inv_freq
    table = torch.cat([angles.cos(), angles.sin()], -1)
    positions = torch.arange(40).expand(3, -1)
    undone = replay.rotate(reading.keys, -torch.arange(40))
    for layer in range(3):
        expected = Rotary(table).undo(reading.keys[layer], positions)
        torch.testing.assert_close(undone[layer], expected, rtol=0, atol=1e-5)


def test_scores_are_those_of_the_kernels(replay: Replay) -> None:
    """What is tried here is what the engine does: window scores and pooling."""
    reading = replay.read(PROMPT)
    found = features.windows(reading, replay.scale, [8])[8, "max", "sum"]
    positions = torch.arange(40).expand(3, -1)
    for layer in range(3):
        queries = reading.queries[layer, :, :, 32:]
        lengths = torch.full((3,), 40)
        expected = window_scores(
            queries, reading.keys[layer], lengths, positions, torch.arange(32, 40), replay.scale,
            over="max",
        )  # fmt: skip
        torch.testing.assert_close(found[layer], expected, rtol=1e-4, atol=1e-6)
        pooled = both(found[layer, None], 4, 8)[0]
        torch.testing.assert_close(pooled, ema_pool(found[layer], 8), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", variants.SETS)
def test_variants_keep_what_they_are_allowed(replay: Replay, name: str) -> None:
    reading = replay.read(PROMPT * 4)  # a window of 64 must fit
    replay.importance = Importance((0.25,), torch.rand(1, 3, 3, dtype=torch.float64))
    seen = set()
    for variant, mask in variants.masks(name, reading, replay, 0.25):
        assert mask.shape == (3, 3, 160), variant
        layers = mask.sum((1, 2))
        if "layers" not in variant:
            assert (layers == 3 * 40).all(), variant
        assert int(layers.sum()) == 3 * 3 * 40, variant
        assert mask[..., :4].all(), variant
        assert mask[..., -8:].all(), variant
        assert variant not in seen
        seen.add(variant)
    forget()


def test_measure(replay: Replay) -> None:
    reading = replay.read(PROMPT)
    answer = replay.generate(reading, 6)
    case = Case(reading, (), tuple(answer), spans=((0, 1), (2, 4)), full=0.5)
    everything = torch.ones(1, 3, 3, 40, dtype=torch.bool)
    reference = replay.follow(reading, everything, case.fed, len(answer) - 1)[0]
    kept = torch.cat([everything, everything])
    kept[1, ..., 3:36] = False
    same, other = measure(replay, case, kept, reference)
    assert same == {"kl": pytest.approx(0, abs=1e-6), "top1": 1.0, "score": 0.5}
    assert other["kl"] > 0.01


def test_spans_of_references() -> None:
    class Letters:
        def decode(self, ids: list[int]) -> str:
            return "".join("ab 12"[i] for i in ids)

    # "ab 12 1": every letter is a token
    ids = [0, 1, 2, 3, 4, 2, 3]
    assert reference_spans(Letters(), ids, ["12", "B", "21"]) == [(3, 5), (1, 2)]


def test_shares_are_bounded() -> None:
    scores = torch.rand(2, 3, 50)
    scores[0, 0] *= 100
    always = choose.forced(50, 2, 4)
    kept = choose.by_score(scores, 12, always, floor=0.5)
    assert kept.sum((1, 2)).tolist() == [36, 36]
    assert (kept.sum(2) >= 6).all()
    assert kept[0, 0].sum() > kept[0, 1].sum()


def test_summary_pairs_samples_and_averages_tasks() -> None:
    def row(variant: str, task: str, sample: str, score: float | None, kl: float) -> dict:
        full = None if score is None else 1.0
        values = {"kept": 0.25, "kl": kl} | ({} if score is None else {"score": score})
        return {
            "task": task,
            "sample": sample,
            "variant": variant,
            "keep": 0.25,
            "full": full,
        } | values

    rows = [row("snapkv", "a", str(i), 0.0, 1.0) for i in range(4)]
    rows += [row("mine", "a", str(i), 1.0, 0.5) for i in range(4)]
    rows += [row("mine", "b", "0", 0.5, 0.1), row("snapkv", "b", "0", 0.5, 0.2)]
    rows += [row("mine", "c", "0", None, 0.3), row("snapkv", "c", "0", None, 0.3)]
    first, second = table(rows)
    assert (first["variant"], first["score"], first["kl"]) == ("snapkv", 25.0, 0.5)
    assert (second["variant"], second["score"], second["full"]) == ("mine", 75.0, 100.0)
    assert (second["difference"], second["samples"], second["tasks"]) == (50.0, 5, 2)
    assert second["kl"] == 0.3
    assert second["kl_samples"] == 6


def test_signs_of_a_loss() -> None:
    attention = torch.tensor([[[3.0, 1.0], [1.0, 1.0]], [[1.0, 3.0], [0.0, 4.0]]])
    kept = torch.tensor([[[True, False], [True, True]], [[True, False], [True, False]]])
    found = signs(attention, kept, torch.tensor([[0.5, 0.25], [0.5, 0.75]]))
    assert found == {"missed": 0.5, "missed_worst": 0.875, "entropy": 0.5}


def _rows(helpful: bool) -> list[dict[str, Any]]:
    """Half of the prompts lose a lot at the small ratio; the sign knows which, or knows nothing."""
    rows = []
    for i in range(40):
        hard = i % 2 == 0
        known = hard if helpful else i % 4 < 2
        for keep in (0.125, 0.5):
            kl = 1.0 + 0.001 * i if hard and keep < 0.2 else 0.001 * i
            sign = 0.3 if known and keep < 0.2 else 0.01
            rows.append(
                {"variant": "uncomp", "task": "t", "sample": str(i), "keep": keep, "kl": kl}
                | {name: sign + 1e-5 * i for name in per_prompt.SIGNS}
            )
    return rows


@pytest.mark.parametrize("helpful", [True, False], ids=["knows", "does-not-know"])
def test_a_sign_that_knows_saves_bytes_and_one_that_does_not_saves_none(helpful: bool) -> None:
    found = per_prompt.correlations(_rows(helpful), "uncomp")
    (small,) = [x for x in found if x["sign"] == "missed" and x["keep"] == 0.125]
    assert (small["correlation"] > 0.7) == helpful
    assert small["low"] <= small["correlation"] <= small["high"]
    lines = per_prompt.adaptive(_rows(helpful), "uncomp", "missed")
    line = min(lines, key=lambda x: abs(x["kept"] - 0.3125))
    share = (line["kept"] - 0.125) / 0.375
    assert 0.2 < share < 0.8
    # Equal shares lose what their place between the two ratios says.
    assert line["kl_equal"] == pytest.approx(0.5 * (1 - share) + 0.0195, abs=0.01)
    if helpful:
        assert line["high"] < 0
        assert line["kl"] < 0.15
    else:
        assert line["low"] < 0 < line["high"]


def test_rank_correlation() -> None:
    a = torch.tensor([[0.1, 0.5], [0.3, 0.2]])
    assert spearman(a, a**3) == pytest.approx(1)
    assert spearman(a, -a) == pytest.approx(-1)
    assert spearman(a, torch.tensor([[1.0, 2.0], [4.0, 3.0]])) == pytest.approx(0.4)
    assert spearman(a, torch.ones(2, 2)) == 0


def test_importance_of_two_texts() -> None:
    def file(shares: list[list[float]]) -> Any:
        measured = Importance((0.5,), torch.tensor([shares], dtype=torch.float64))
        return SimpleNamespace(model="m", head_importance=lambda: measured)

    first, other = file([[0.1, 0.9], [0.4, 0.6]]), file([[0.2, 1.0], [0.5, 0.7]])
    [row] = between(first, other, ("a", "b"), [0.5])
    assert (row["texts"], row["correlation"]) == ("a / b", 1.0)
    [row] = between(first, file([[0.9, 0.1], [0.6, 0.4]]), ("a", "b"), [0.5])
    assert row["correlation"] == -1.0
