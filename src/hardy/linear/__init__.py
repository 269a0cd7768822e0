"""Linear classifiers by large steps: solvers on tensors, scikit-learn estimators, hidden states to probe.

    from hardy.linear import NormalizedLogisticRegression
    model = NormalizedLogisticRegression().fit(X, y)

Names are loaded on first use; the estimators need scikit-learn (`pip install 'hardy[linear]'`).
"""

from importlib import import_module
from typing import TYPE_CHECKING

__all__ = [
    "BatchPerceptron",
    "LogisticGD",
    "NormalizedLogisticRegression",
    "Solution",
    "SolverConfig",
    "solve",
]

if TYPE_CHECKING:
    from hardy.linear.config import SolverConfig as SolverConfig
    from hardy.linear.estimators import BatchPerceptron as BatchPerceptron
    from hardy.linear.estimators import LogisticGD as LogisticGD
    from hardy.linear.estimators import NormalizedLogisticRegression as NormalizedLogisticRegression
    from hardy.linear.solver import Solution as Solution
    from hardy.linear.solver import solve as solve
else:
    _HOME = {
        "BatchPerceptron": "hardy.linear.estimators",
        "LogisticGD": "hardy.linear.estimators",
        "NormalizedLogisticRegression": "hardy.linear.estimators",
        "Solution": "hardy.linear.solver",
        "SolverConfig": "hardy.linear.config",
        "solve": "hardy.linear.solver",
    }

    def __getattr__(name: str) -> object:
        if name not in _HOME:
            raise AttributeError(f"module 'hardy.linear' has no attribute {name!r}")
        return getattr(import_module(_HOME[name]), name)
