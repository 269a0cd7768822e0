"""The best assignment there is, by scipy's HiGHS: for tests and small cases. scipy is optional.

Letters: x_ij whether taker j has sequence i, Y_j its bubble, Z when the slowest is done.
"""

from importlib import import_module
from typing import Any

import numpy as np

from hardy.balance.assign import Integers, Problem, finish_times
from hardy.config import UserError


def best_assignment(problem: Problem, *, time_limit_s: float = 10.0) -> Integers:
    """Return the taker of each sequence with the least time of the slowest.

    What comes back is checked: a solver that was stopped can hand back fractions.

    Raises:
        UserError: scipy is missing, or no answer was found in time.
    """
    try:
        optimize: Any = import_module("scipy.optimize")
        sparse: Any = import_module("scipy.sparse")
    except ImportError as error:
        raise UserError(f"the exact oracle needs scipy ({error}); install it by pip install scipy") from None
    n, m = problem.times.shape
    finite = np.isfinite(problem.times)
    times = np.where(finite, problem.times, 0.0)
    num_x, first_y, z = n * m, n * m, n * m + m
    constraints: list[Any] = []
    each = sparse.lil_matrix((n, z + 1))
    takers = sparse.lil_matrix((m, z + 1))
    rooms = sparse.lil_matrix((m, z + 1))
    for i in range(n):
        each[i, i * m : (i + 1) * m] = 1.0
        for j in range(m):
            takers[j, i * m + j] = times[i, j]
            rooms[j, i * m + j] = float(problem.tokens[i])
    for j in range(m):
        takers[j, first_y + j], takers[j, z] = 1.0, -1.0
    constraints += [
        optimize.LinearConstraint(each.tocsr(), 1.0, 1.0),
        optimize.LinearConstraint(takers.tocsr(), -np.inf, 0.0),
        optimize.LinearConstraint(rooms.tocsr(), -np.inf, problem.room.astype(np.float64)),
    ]
    if problem.bubbles.any():
        bubbles = sparse.lil_matrix((n * m, z + 1))
        for i in range(n):
            for j in range(m):
                bubbles[i * m + j, i * m + j] = times[i, j] * float(problem.bubbles[j])
                bubbles[i * m + j, first_y + j] = -1.0
        constraints.append(optimize.LinearConstraint(bubbles.tocsr(), -np.inf, 0.0))
    upper = np.concatenate((finite.reshape(-1).astype(np.float64), np.full(m + 1, np.inf)))
    objective, integrality = np.zeros(z + 1), np.zeros(z + 1)
    objective[z], integrality[:num_x] = 1.0, 1
    found: Any = optimize.milp(
        objective,
        constraints=constraints,
        integrality=integrality,
        bounds=optimize.Bounds(np.zeros(z + 1), upper),
        options={"time_limit": time_limit_s, "mip_rel_gap": 1e-9},
    )
    if found.x is None:
        raise UserError(f"HiGHS found no assignment in {time_limit_s:g} s: {found.message}")
    taken_by: Integers = np.asarray(found.x[:num_x]).reshape(n, m).argmax(axis=1).astype(np.int64)
    used = np.bincount(taken_by, weights=problem.tokens, minlength=m)
    if not np.isfinite(finish_times(problem, taken_by)).all() or (used > problem.room).any():
        raise UserError("HiGHS handed back an assignment that breaks a cap; give it more time")
    return taken_by
