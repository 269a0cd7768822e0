"""GaLore as an optimizer, for comparison only: our own reading of the paper's algorithm 2, as in its
reference twin.

Paper: J. Zhao et al., "GaLore: Memory-Efficient LLM Training by Gradient Low-Rank Projection", 2024
(2403.03507). Matrices move in the basis of their gradient's leading singular vectors; all else moves by Adam.
"""

import torch


class GaLore(torch.optim.Optimizer):
    """Adam in r directions of each matrix; every `gap` steps the directions are taken anew."""

    def __init__(self, params, lr=1e-3, rank=16, alpha=0.25, betas=(0.9, 0.999), eps=1e-8, gap=200):
        super().__init__(
            params, {"lr": lr, "rank": rank, "alpha": alpha, "betas": betas, "eps": eps, "gap": gap}
        )

    @torch.no_grad()
    def step(self):
        """Update all parameters that have a gradient."""
        for group in self.param_groups:
            for param in group["params"]:
                if param.grad is not None:
                    self._update(param, group)

    def _update(self, param, group):
        state, grad = self.state[param], param.grad
        step = state["step"] = state.get("step", 0) + 1
        left = low_rank = group["rank"] is not None and param.ndim == 2
        if low_rank:
            left = param.shape[0] <= param.shape[1]
            if (step - 1) % group["gap"] == 0:
                u, _, vh = torch.linalg.svd(grad, full_matrices=False)
                state["basis"] = u[:, : group["rank"]] if left else vh[: group["rank"]].T
            grad = state["basis"].T @ grad if left else grad @ state["basis"]
        b1, b2 = group["betas"]
        m, v = state.setdefault("m", torch.zeros_like(grad)), state.setdefault("v", torch.zeros_like(grad))
        m.lerp_(grad, 1 - b1)
        v.lerp_(grad * grad, 1 - b2)
        move = (m / (1 - b1**step)) / ((v / (1 - b2**step)).sqrt() + group["eps"])
        if low_rank:
            move = group["alpha"] * (state["basis"] @ move if left else move @ state["basis"].T)
        param.sub_(group["lr"] * move)
