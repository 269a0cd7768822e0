import pytest
import torch

from hardy.config import UserError
from hardy.model.generate import NotFiniteError, choose, generate
from hardy.ops.packed import DocumentLayout
from hardy.rng import generator_for


class Bare(torch.nn.Module):
    """A decoder that is not one of ours: no cache."""

    def __init__(self, model):
        super().__init__()
        self.model = model
        self.context_tokens = model.context_tokens

    def forward(self, tokens_T, layout):
        return self.model(tokens_T, layout)


def test_the_cache_changes_no_token(make_decoder):
    model = make_decoder()
    for settings in ({"temperature": 0.0}, {"temperature": 1.3, "top_k": 20, "top_p": 0.9, "seed": 4}):
        cached = generate(model, [3, 1, 4], max_new_tokens=20, **settings)
        assert cached == generate(Bare(model), [3, 1, 4], max_new_tokens=20, **settings)
        assert len(cached) == 20


def test_greedy_takes_the_likeliest_each_time(make_decoder):
    model = make_decoder()
    text = [7, 8]
    for token in generate(model, text, max_new_tokens=6, temperature=0.0):
        logits_TV = model(torch.tensor(text), DocumentLayout.from_lengths([len(text)]))
        assert token == logits_TV[-1].argmax()
        text.append(token)


def test_the_seed_decides(make_decoder):
    model = make_decoder()
    one, same, other = (generate(model, [1], max_new_tokens=30, seed=seed) for seed in (5, 5, 6))
    assert one == same != other


def test_it_stops_at_a_stop_token_and_at_the_context(make_decoder):
    model = make_decoder()
    free = generate(model, [1], max_new_tokens=10, seed=0)
    stop = free[4]
    assert generate(model, [1], max_new_tokens=10, seed=0, stop_ids=[stop]) == free[: free.index(stop) + 1]
    assert len(generate(model, [1] * 60, max_new_tokens=10)) == 4


def test_training_mode_comes_back(make_decoder):
    model = make_decoder()
    for mode in (True, False):
        model.train(mode)
        generate(model, [1], max_new_tokens=1)
        assert model.training is mode


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_model_that_diverged_is_named(make_decoder, temperature, value):
    decoder = make_decoder()
    with torch.no_grad():
        decoder.norm.weight.fill_(value)
    with pytest.raises(NotFiniteError, match=r"NaN or infinite: training diverged; take an earlier checkpoi"):
        generate(decoder, [1, 2], temperature=temperature)


def test_draws_follow_the_shares():
    logits_V = torch.tensor([0.5, 0.2, 0.25, 0.05]).log()
    generator = generator_for(0)

    def shares(**settings):
        draws = [choose(logits_V, generator=generator, **settings) for _ in range(2000)]
        return torch.bincount(torch.tensor(draws), minlength=4) / 2000

    torch.testing.assert_close(shares(), logits_V.exp(), rtol=0, atol=0.04)
    torch.testing.assert_close(shares(top_k=2), torch.tensor([2 / 3, 0, 1 / 3, 0]), rtol=0, atol=0.04)
    torch.testing.assert_close(shares(top_p=0.6), torch.tensor([2 / 3, 0, 1 / 3, 0]), rtol=0, atol=0.04)
    assert shares(top_p=0.4)[0] == 1
    squared = logits_V.exp() ** 2
    torch.testing.assert_close(shares(temperature=0.5), squared / squared.sum(), rtol=0, atol=0.04)


@pytest.mark.parametrize(
    ("prompt", "settings", "text"),
    [
        ([], {}, "the prompt is empty"),
        ([1] * 64, {}, "the prompt has 64 tokens and leaves no room in model.context_tokens=64"),
        ([1], {"temperature": -1.0}, "temperature must be at least 0, got -1.0"),
        ([1], {"top_k": 0}, "top_k must be at least 1, got 0"),
        ([1], {"top_p": 1.5}, "top_p must be above 0 and at most 1, got 1.5"),
    ],
)
def test_what_cannot_be_continued_is_named(make_decoder, prompt, settings, text):
    with pytest.raises(UserError, match=text):
        generate(make_decoder(), prompt, **settings)
