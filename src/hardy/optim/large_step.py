"""Large steps for a classification head in autograd: the gradient over the share of what is still wrong.

Paper: A. Tyurin, arXiv 2412.08424. Letters: p_i = probability of the right class, beta = 1 / mean(1 - p_i).
Ours, beyond the theorem: more than two classes, heads in autograd, the cap. With the whole data set in a
batch and no cap it is normalised logistic regression. On small batches that are classified well already, an
uncapped beta takes a full step on noise and training never settles. Not for a whole network, where large
steps diverge.

Shape suffixes: N rows, C classes.
"""

from collections.abc import Callable, Iterable

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from hardy.config import UserError

IGNORED_LABEL = -100


class LargeStep:
    """Sums of one batch, over micro-batches and workers, and the factor of its gradient.

    Call `loss` on each micro-batch and go backward from it, add the gradients over the workers (a sum, not
    a mean), then call `scale` before the optimizer's step. Labels of -100 do not count.

    Args:
        most: cap of beta.

    Example:
        >>> head, step = torch.nn.Linear(2, 3), LargeStep()
        >>> step.loss(head(torch.eye(2)), torch.tensor([0, 2])).backward()
        >>> bool(1 < step.scale(head.parameters()) < 100)
        True
    """

    def __init__(self, *, most: float = 100.0) -> None:
        if not 1 <= most < float("inf"):
            raise UserError(f"large_step.most must be at least 1 and finite, got {most}")
        self.most = most
        self._missed: Tensor | None = None

    def loss(self, logits_NC: Tensor, labels_N: Tensor) -> Tensor:
        """Return the summed cross-entropy of a micro-batch, in fp32 at least, and count what it misses."""
        logits_NC = logits_NC.float() if logits_NC.dtype.itemsize < 4 else logits_NC
        with torch.no_grad():
            counts_N = labels_N != IGNORED_LABEL
            right_N1 = labels_N.clamp(min=0)[:, None]
            right_N = logits_NC.gather(1, right_N1)[:, 0]
            wrong_N = logits_NC.scatter(1, right_N1, -torch.inf).logsumexp(1)
            missing_N = (wrong_N - right_N).sigmoid()  # 1 - p, exact where p is nearly 1
            missed = torch.stack([(missing_N * counts_N).sum(), counts_N.sum()])
            self._missed = missed if self._missed is None else self._missed + missed
        return cross_entropy(logits_NC, labels_N, ignore_index=IGNORED_LABEL, reduction="sum")

    def scale(
        self,
        parameters: Iterable[Tensor],
        *,
        sum_over_workers: Callable[[Tensor], Tensor] | None = None,
    ) -> float:
        """Multiply the gradients of `parameters` in place by beta over the labels' number; begin a new batch.

        Args:
            parameters: of the head; those without a gradient are passed over.
            sum_over_workers: adds two numbers over the workers, such as a Communicator's `sum`.

        Returns:
            beta.
        """
        if self._missed is None:
            raise UserError("LargeStep.scale was called before LargeStep.loss; call loss on a batch first")
        missed = self._missed if sum_over_workers is None else sum_over_workers(self._missed)
        self._missed = None
        share, count = missed.tolist()
        if count == 0:
            raise UserError("no label of the batch counts, so there is nothing to learn from; leave it out")
        beta = min(1 / max(share / count, 1e-12), self.most)
        for parameter in parameters:
            if parameter.grad is not None:
                parameter.grad.mul_(beta / count)
        return beta
