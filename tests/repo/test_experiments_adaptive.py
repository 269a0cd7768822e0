"""The experiment on the adaptive recipe: its tasks, scores, stress, and what its page says."""

import importlib
import itertools
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

EXPERIMENTS = Path(__file__).parents[2] / "experiments"
pytestmark = pytest.mark.usefixtures("no_modules_of_experiments")


@pytest.fixture
def adaptive():
    """Import a module of the experiment on the recipe."""
    sys.path[:0] = [str(EXPERIMENTS / "adaptive"), str(EXPERIMENTS)]
    return importlib.import_module


def test_teacher_and_markov_follow_their_law(adaptive):
    tasks, trials = adaptive("tasks"), adaptive("trials")
    # The specification's own draws have 0.578 and 1.351; other draws lie within a tenth of these.
    assert trials.floor("teacher", 4096) == pytest.approx(0.578, rel=0.1)
    assert trials.floor("markov", 2048) == pytest.approx(1.351, rel=0.1)
    inputs, _ = tasks.draw_teacher(4096, torch.Generator().manual_seed(0))
    assert inputs.std(0) == pytest.approx((10 * torch.logspace(0, -2, 32)).numpy(), rel=0.1)


def test_the_answer_is_the_inside_of_the_span_that_is_asked_for(adaptive):
    tasks = adaptive("tasks")
    tokens_NT, labels_N2 = tasks.draw_span(500, torch.Generator().manual_seed(0))
    seen = set()
    for tokens, (first, last) in zip(tokens_NT.tolist(), labels_N2.tolist(), strict=True):
        opener = tasks.NUM_TYPES + tokens[0]
        assert tokens.count(opener) == 1
        assert first == tokens.index(opener) + 1
        assert last == tokens.index(tasks.END, first) - 1 >= first
        openers = sum(tasks.NUM_TYPES <= token < tasks.END for token in tokens)
        assert openers == tokens.count(tasks.END)
        seen.add((openers, last - first + 1))
    assert seen == set(itertools.product(range(1, 5), range(1, 4)))


def test_domains_differ_in_their_tokens(adaptive):
    tasks, trials = adaptive("tasks"), adaptive("trials")
    tokens_NT, labels_N = trials.held_out("domains", "test", 2048)
    ideal = tasks.ideal_domains(tokens_NT).argmax(1)
    assert (ideal == labels_N).float().mean() > 0.9
    shares = torch.bincount(labels_N, minlength=4) / 2048
    assert shares.tolist() == pytest.approx(tasks.DOMAIN_PRIORS, abs=0.04)


def test_the_best_span_ends_after_its_start_and_is_not_too_long(adaptive):
    scores = adaptive("scores")
    logits_NT2 = torch.randn(20, 40, 2, generator=torch.Generator().manual_seed(0))
    for logits, (first, last) in zip(logits_NT2, scores.best_spans(logits_NT2).tolist(), strict=True):
        allowed = [(i, j) for i in range(40) for j in range(i, min(40, i + 30))]
        assert (first, last) == max(allowed, key=lambda p, x=logits: (x[p[0], 0] + x[p[1], 1]).item())


def test_scores_by_hand(adaptive):
    scores = adaptive("scores")
    labels = torch.tensor([0, 0, 0, 1, scores.IGNORED])
    logits = torch.eye(2)[torch.tensor([0, 0, 1, 1, 0])]
    found = scores.class_scores(logits, labels)
    assert found == {"accuracy": 0.75, "macro_f1": pytest.approx((4 / 5 + 2 / 3) / 2)}
    sure_NT2 = torch.zeros(2, 6, 2)
    sure_NT2[0, 1, 0] = sure_NT2[0, 2, 1] = sure_NT2[1, 3, 0] = sure_NT2[1, 5, 1] = 9.0
    found = scores.span_scores(sure_NT2, torch.tensor([[1, 2], [4, 4]]))
    assert found == {"exact_match": 0.5, "token_f1": pytest.approx((1 + 2 / 4) / 2)}


def short(trials, **changes):
    return replace(
        trials.Trial(
            task="teacher", row="recipe", lr=1e-2, seed=1, steps=8, examples="test", num_examples=64
        ),
        **changes,
    )


def test_rows_of_one_seed_begin_with_the_same_weights_and_see_the_same_batches(adaptive, monkeypatch):
    trials, seen = adaptive("trials"), []

    class Spy(trials.Run):
        def __init__(self, model, *args, **named):
            super().__init__(model, *args, **named)
            seen.append([p.detach().clone() for p in model.parameters()])

        def step(self, task, inputs, labels, spoil):
            seen[-1] += [inputs, labels]
            super().step(task, inputs, labels, spoil)

    monkeypatch.setattr(trials, "Run", Spy)
    for row, seed in (("recipe", 1), ("sgd, led", 1), ("adamw + cosine + clip", 1), ("recipe", 2)):
        trials.train(short(trials, row=row, seed=seed))
    recipe, sgd, control, other_seed = seen
    assert all(torch.equal(a, b) and torch.equal(a, c) for a, b, c in zip(recipe, sgd, control, strict=True))
    assert not any(torch.equal(a, b) for a, b in zip(recipe, other_seed, strict=True))


def test_stress_hits_every_row_at_the_same_steps(adaptive):
    trials = adaptive("trials")
    lost = trials.train(short(trials, row="adam", stress="nan"))
    assert lost["loss"] is None and lost["skips"] == 0
    kept = trials.train(short(trials, stress="nan"))
    assert kept["loss"] is not None and kept["skips"] == trials.NAN_STEPS
    spoilers = [trials.Spoiler(short(trials, row=row, steps=600)) for row in ("recipe", "sgd")]
    assert spoilers[0].spikes == spoilers[1].spikes and len(spoilers[0].spikes) == 12
    noise = trials.Spoiler(short(trials, steps=30, stress="label noise"))
    labels = torch.arange(1000)
    changed = [(noise.labels(labels, step) != labels).float().mean().item() for step in range(30)]
    assert changed[:10] == changed[20:] == [0.0] * 10
    assert changed[10:20] == pytest.approx([0.1] * 10, abs=0.03)


def test_too_many_skipped_steps_lose_a_run(adaptive, monkeypatch):
    trials = adaptive("trials")
    monkeypatch.setattr(trials, "NAN_STEPS", 19)
    result = trials.train(short(trials, steps=20, stress="nan"))
    assert (result["loss"], result["skips"]) == (None, 19)


def test_spikes_are_times_a_thousand(adaptive):
    trials = adaptive("trials")
    model, spoil = torch.nn.Linear(2, 1), trials.Spoiler(short(trials, stress="spikes"))
    for step in range(8):
        for p in model.parameters():
            p.grad = torch.ones_like(p)
        spoil.gradients(model, step)
        factor = 1000.0 if step in spoil.spikes else 1.0
        assert all((p.grad == factor).all() for p in model.parameters())
    assert len(spoil.spikes) == 1


class Canned:
    """Answers trials without training: the loss is least at one rate, and another one on test examples."""

    def __init__(self, best, *, levels=None, lost=(), lost_under_nan=()):
        self.best, self.levels, self.lost, self.lost_under_nan = best, levels or {}, lost, lost_under_nan
        self.asked = []

    def run(self, work, trials, *, label):
        self.asked += trials
        assert all(label(trial) for trial in trials)
        return {trial: self.result(trial) for trial in trials}

    def result(self, trial):
        best = self.best if trial.examples == "validation" else self.best * 10
        loss = self.levels.get(trial.row, 1 + abs(trial.lr - best) + 0.01 * trial.seed)
        if trial.row in self.lost or (trial.stress == "nan" and trial.row in self.lost_under_nan):
            loss = None
        counts = {"clips": 0, "skips": 3 * (trial.stress == "nan"), "state_bytes": 8, "final_lr_ratio": 0.5}
        scores = {"exact_match": 0.5, "token_f1": 0.5, "accuracy": 0.5, "macro_f1": 0.5} if loss else {}
        curve = [[100, 2.0], [200, 1.0]] if loss else [[100, None]]
        return {"loss": loss, "curve": curve, "wall_s": 1.0, **scores, **counts}


def said_of(adaptive, trials):
    """Return the numbers for the claims and the tables of the page."""
    comparison, report = adaptive("comparison"), adaptive("report")
    results = comparison.Comparison(trials, smoke=False).run() | {"nan_steps": 3}
    return report.numbers(results), report.tables(results)


def test_rates_are_chosen_by_validation_on_one_seed_and_frozen_for_the_others(adaptive):
    trials = Canned(best=1e-2)
    results = adaptive("comparison").Comparison(trials, smoke=False).run()
    rows = {row["row"]: row for row in results["tasks"]["teacher"]["rows"]}
    assert (rows["recipe"]["lr"], rows["recipe"]["at_edge"]) == (1e-2, False)
    assert rows["sgd, led"]["at_edge"], "its grid begins above the best rate"
    assert len(rows["recipe"]["loss"]) == 3
    assert rows["recipe"]["steps_to_target"] == [200] * 3
    tuning = {trial.seed for trial in trials.asked if trial.examples == "validation"}
    final = {trial.seed for trial in trials.asked if trial.examples == "test"}
    assert (tuning, final) == ({0}, {1, 2, 3})
    assert len(trials.asked) == len(set(trials.asked))


def test_a_lost_row_is_said_to_be_lost(adaptive):
    got, text = said_of(adaptive, Canned(best=1e-2, lost=("adam", "sgd")))
    assert f"| adam | 0.001 (edge) | lost in 3 of 3 |{' lost |' * 4} never |" in text
    assert got["nan_survived_share"] == 1
    got, _ = said_of(adaptive, Canned(best=1e-2, lost_under_nan=("recipe",)))
    assert got["nan_survived_share"] == 0


def test_the_reading_is_only_what_the_numbers_bear_out(adaptive):
    control = "adamw + cosine + clip"
    baselines = dict.fromkeys(adaptive("rows").BASELINES, 1.2)
    levels = {**baselines, control: 1.0, "recipe": 1.01, "recipe, no decay": 1.18}
    got, text = said_of(adaptive, Canned(best=1e-2, levels=levels, lost_under_nan=(*baselines, control)))
    assert "The numbers bear all of it out" in text
    assert "teacher 89%, markov 89%, domains 89%. At least 80 %: holds." in text
    assert got["tasks_below_every_constant_baseline"] == 3
    assert got["markov_over_control_percent"] == pytest.approx(1)
    for change in ({"recipe, no decay": 1.1}, {control: 1.1}):
        _, text = said_of(adaptive, Canned(best=1e-2, levels=levels | change, lost_under_nan=(control,)))
        assert "The numbers do **not** bear all of it out" in text
    _, text = said_of(adaptive, Canned(best=1e-2, levels=levels))
    assert "Survives what the control does not: does **not** hold" in text


def test_grids_are_four_half_decades(adaptive):
    rows, tasks = adaptive("rows"), adaptive("tasks")
    assert [rows.half_decades(count) for count in (-6, -5, 0, 1)] == [0.001, 0.003, 1.0, 3.0]
    for row, task in itertools.product(rows.ROWS, tasks.TASKS):
        grid = rows.grid_of(row, task)
        assert [b / a for a, b in itertools.pairwise(grid)] == pytest.approx([10**0.5] * 3, rel=0.06)


def test_width_and_interval_by_hand(adaptive):
    comparison, report = adaptive("comparison"), adaptive("report")
    assert comparison.width_decades([1.2, 1.005, 1.0, 1.009]) == 1.0
    assert comparison.steps_to(1.0, [(5, None), (10, 1.1), (15, 0.9), (20, 1.2), (25, 0.8)]) == 15
    assert comparison.steps_to(0.5, [(5, 0.6)]) is None
    # 4.303 / sqrt(3) times the standard deviation 0.1.
    assert report.half_width([1.0, 1.1, 1.2]) == pytest.approx(0.2484, abs=1e-4)
    assert report.half_width([1.0, None, 1.2]) == report.mean([1.0, None]) == float("inf")
