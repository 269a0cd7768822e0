"""One training with some workers lying."""

import copy
from collections import Counter
from dataclasses import dataclass

import torch
from problem import (
    BATCH,
    DATA,
    NUM_CLASSES,
    NUM_WORKERS,
    SPLITS,
    TRUSTED_BATCH,
    accuracy,
    gradients,
    initial_weights,
    stream,
)

from hardy.distributed.aggregation import build_aggregator
from hardy.distributed.attacks import build_attack, flip_labels
from hardy.rng import seed_for

RATE, CURVE_STEPS = 0.2, 10
RULES = {
    "mean": ("mean", {}, ()),
    "median": ("median", {}, ()),
    "multi-Krum": ("multi_krum", {}, ()),
    "NNM + trimmed mean": ("trimmed_mean", {}, ("nnm",)),
    "FLTrust": ("fltrust", {}, ()),
    "dSTAR none+current": ("dstar", {"scale": "none", "threshold": "current"}, ()),
    "dSTAR none+history": ("dstar", {"scale": "none", "threshold": "history"}, ()),
    "dSTAR clip+current": ("dstar", {"scale": "clip", "threshold": "current"}, ()),
    "dSTAR clip+history": ("dstar", {}, ()),
    "trimmed mean": ("trimmed_mean", {}, ()),
    "Krum": ("krum", {}, ()),
    "Aksel": ("aksel", {}, ()),
}
"""Name, arguments and pre-aggregators. The last dSTAR is the default."""
NOT_SANITISED = "mean, not sanitised"
TRUSTED_ALONE = "trusted gradient alone"
ATTACKS = {
    "sign flip": ("sign_flip", {}),
    "IPM 0.5": ("ipm", {"strength": 0.5}),
    "IPM 10": ("ipm", {"strength": 10.0}),
    "ALIE 1.5": ("alie", {"z": 1.5}),
    "edge": ("edge", {}),
    "cosine 1.05": ("cosine", {"q": 1.05}),
    "cosine 0.1": ("cosine", {"q": 0.1}),
    "min-max": ("min_max", {}),
    "min-max, sign": ("min_max", {"direction": "sign"}),
    "min-sum": ("min_sum", {}),
    "min-sum, mean": ("min_sum", {"direction": "mean"}),
    "Fang": ("fang", {}),
    "optimal IPM": ("optimal", {"base": "ipm"}),
    "optimal ALIE": ("optimal", {"base": "alie"}),
    "identical": ("identical", {}),
    "mimic": ("mimic", {}),
    "mimic, learned": ("mimic", {"warmup_steps": 30}),
    "gaussian": ("gaussian", {}),
    "zero": ("zero", {}),
    "NaN": ("nan", {}),
    "infinity": ("inf", {}),
    "one NaN": ("one_nan", {}),
    "huge": ("huge", {}),
    "bit flips": ("bit_flip", {}),
    "stale 100": ("stale", {"steps": 100}),
    "replay": ("replay", {}),
    "drift": ("drift", {}),
}
"""Name and arguments of attacks on gradients."""
LABEL_FLIP = "flipped labels"


@dataclass(frozen=True, kw_only=True)
class Cell:
    """One training."""

    rule: str
    attack: str = "none"
    data: str = "gaussian"
    split: str = "iid"
    num_faulty: int = 8
    """f: workers that attack, and what the rule is told."""
    num_received: int = NUM_WORKERS
    """k."""
    momentum: float = 0.0
    """Of each worker."""
    exponential: bool = False
    """Whether the first k of exponential times count; else all workers that attack, and some drawn others."""
    seed: int = 0
    draw: int = 0
    """Another number draws another split, batches and arrivals, with the same data and weights."""
    steps: int = 300

    @property
    def label(self) -> str:
        """What it is called where progress is shown."""
        drawn = f", draw {self.draw}" if self.draw else ""
        return f"{self.rule}, {self.attack}, {self.data}, {self.split}, seed {self.seed}{drawn}"


class Training:
    """The state of a cell's training."""

    def __init__(self, cell: Cell) -> None:
        self.cell = cell
        self.data = DATA[cell.data](cell.seed)
        self.owners = SPLITS[cell.split](self.data, cell.seed, cell.draw)
        self.theta = initial_weights(cell.seed)
        self.draws = stream(cell.seed, "batches", cell.draw)
        self.num_faulty = 0 if cell.attack == "none" else cell.num_faulty
        self.momentum = torch.zeros(NUM_WORKERS, len(self.theta))
        self.attack = None
        if cell.attack in ATTACKS:
            name, arguments = ATTACKS[cell.attack]
            self.attack = build_attack(name, arguments=arguments, seed=seed_for(cell.seed, "attack"))
        self.aggregator = None
        if cell.rule in RULES:
            name, arguments, pre = RULES[cell.rule]
            self.aggregator = build_aggregator(name, num_faulty=self.num_faulty, arguments=arguments, pre=pre)
        self.seen: Counter[str] = Counter()
        self.now, self.curve = 0.0, []

    def run(self) -> dict[str, object]:
        """Return the test accuracy and what was accepted on the way."""
        for step in range(self.cell.steps):
            rows, g_v = self._gradients()
            if self.cell.rule == TRUSTED_ALONE:
                update = g_v
            else:
                received = self._received()
                update = self._aggregated(rows[received], g_v, step)
            if update is not None:
                self.theta -= RATE * update
            if not self.theta.isfinite().all():
                break
            if self.cell.exponential and (step + 1) % CURVE_STEPS == 0:
                self.curve.append([self.now, accuracy(self.theta, *self.data.test())])
        found = accuracy(self.theta, *self.data.test())
        shares = {
            f"accepted_{kind}": self.seen[f"accepted_{kind}"] / self.seen[kind]
            for kind in ("honest", "bad")
            if self.seen[kind]
        }
        waited = (
            {"step_time": self.now / self.cell.steps, "curve": self.curve} if self.cell.exponential else {}
        )
        return {"accuracy": found, "empty": self.seen["empty"] / self.cell.steps} | shares | waited

    def _gradients(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Return what each worker would send [N, D] and the trusted gradient [D]."""
        data = self.data
        picked = torch.randint(self.owners.shape[1], (NUM_WORKERS, BATCH), generator=self.draws)
        examples = self.owners.gather(1, picked)
        labels = data.labels[examples]
        if self.cell.attack == LABEL_FLIP:
            labels[: self.num_faulty] = flip_labels(labels[: self.num_faulty], NUM_CLASSES)
        rows = gradients(self.theta, data.inputs[examples], labels)
        if self.cell.momentum:
            rows = self.momentum.lerp_(rows, 1 - self.cell.momentum).clone()
        trusted = data.num_train + torch.randint(data.num_trusted, (1, TRUSTED_BATCH), generator=self.draws)
        return rows, gradients(self.theta, data.inputs[trusted], data.labels[trusted])[0]

    def _received(self) -> torch.Tensor:
        """Return all that attack, and as many of the others as make k; or the first k to be done.

        Exponential times forget: who was left out begins anew with the next step like everybody else.
        """
        if self.cell.exponential:
            times = torch.empty(NUM_WORKERS, dtype=torch.float64).exponential_(generator=self.draws)
            in_order = times.sort()
            self.now += in_order.values[self.cell.num_received - 1].item()
            return in_order.indices[: self.cell.num_received].sort().values
        honest = torch.randperm(NUM_WORKERS - self.num_faulty, generator=self.draws) + self.num_faulty
        honest = honest[: self.cell.num_received - self.num_faulty].sort().values
        return torch.cat([torch.arange(self.num_faulty), honest])

    def _aggregated(self, rows: torch.Tensor, g_v: torch.Tensor, step: int) -> torch.Tensor | None:
        """Return the vector that the rule makes after the attack; none where the step is left out."""
        if self.attack is not None:
            self.attack(
                [rows],
                attackers=range(self.num_faulty),
                references=[g_v],
                step=step,
                rule=lambda blocks: self._tried(blocks, g_v, step),
            )
        found = self._outcome([rows], g_v, step)
        return None if found is None else found[0]

    def _tried(self, blocks, g_v, step):
        """Return what the rule would make of the blocks; it remembers nothing."""
        if self.aggregator is None:
            return [block.mean(0) for block in blocks]
        return copy.deepcopy(self.aggregator)(blocks, references=[g_v], step=step).vectors

    def _outcome(self, blocks, g_v, step):
        """Return the rule's vectors and count what it accepted."""
        if self.aggregator is None:
            return [block.mean(0) for block in blocks]
        outcome = self.aggregator(blocks, references=[g_v], step=step)
        self.seen["empty"] += outcome.taken != "rows"
        if outcome.weights is not None or outcome.taken != "rows":
            weights = torch.zeros(len(blocks[0])) if outcome.weights is None else outcome.weights
            for kind, part in (("bad", weights[: self.num_faulty]), ("honest", weights[self.num_faulty :])):
                self.seen[kind] += len(part)
                self.seen[f"accepted_{kind}"] += int((part != 0).sum())
        return outcome.vectors


def play(cell: Cell) -> dict[str, object]:
    """Train a cell. Weights that are not finite end it; their accuracy is that of one class for all."""
    torch.set_num_threads(1)
    return Training(cell).run()
