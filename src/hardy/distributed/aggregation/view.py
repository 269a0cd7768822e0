"""What a rule sees of the rows: numbers of each row, and when asked for their Gram matrix; never the rows.

Letters: m vectors of the basis, n rows in view, x_i = sum_j C_ij b_j, K = <b_i, b_j>, D2 squared distances.

Rows are kept as differences from one of them, r, the row of lower-median norm: distances of nearly equal rows
come out of the difference of large numbers otherwise. No liar can steer that choice to a row of its own size.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from hardy.distributed.aggregation.columns import Rows
from hardy.distributed.aggregation.stack import (
    LARGEST_SQUARE,
    SMALLEST_SQUARE,
    Loader,
    Total,
    chunks,
    products,
    row_numbers,
    working_dtype,
)


def lower_median_place(values_n: Tensor) -> int:
    """Return where the value stands that is at sorted position (n - 1) // 2."""
    return int(values_n.argsort(stable=True)[(len(values_n) - 1) // 2])


@dataclass(frozen=True, kw_only=True)
class Gram:
    """Inner products of the rows' differences from row `centre`, and of that row itself in its own place."""

    basis_mm: Tensor
    """float64, on the CPU; symmetric up to rounding."""
    centre: int

    def coefficients(self, mix_nm: Tensor) -> Tensor:
        """Return C of mixtures of the rows: row i is b_i + b_centre, the centre is b_centre alone."""
        C_nm = mix_nm.clone()
        C_nm[:, self.centre] = mix_nm.sum(1)
        return C_nm


def gram(
    blocks: Sequence[Tensor],
    rows: Sequence[int],
    squares_m: Tensor,
    total: Total,
    *,
    extras: Sequence[Tensor] | None = None,
) -> Gram:
    """Return the Gram matrix of chosen rows, and of one more vector at the end; one wait for the device.

    Args:
        blocks: [N, d] each.
        rows: those in use; finite.
        squares_m: their squared norms, that of the extra vector last.
        total: adds over the workers that hold the other columns.
        extras: the extra vector, one piece per block.
    """
    num_rows = len(rows)
    centre, scales_m = lower_median_place(squares_m[:num_rows]), _scales(squares_m, num_rows)
    size = len(squares_m)
    sums_mm = torch.zeros(size, size, dtype=torch.float64, device=blocks[0].device)
    for number, block in enumerate(blocks):
        dtype = working_dtype(block)
        loader = Loader(block, rows, dtype=dtype, spare=size - num_rows)
        factors_m1 = None if scales_m is None else scales_m.to(block.device, dtype)[:, None]
        here_mm = torch.zeros_like(sums_mm, device=block.device)
        for where in chunks(block):
            extra_c = None if extras is None else extras[number][where]
            b_mc = _centred_chunk(loader, where, centre, extra_c, factors_m1)
            here_mm += products(b_mc, b_mc)
        sums_mm += here_mm.to(sums_mm.device)
    basis_mm = total(sums_mm).cpu()
    if scales_m is not None:
        basis_mm = basis_mm / scales_m[:, None] / scales_m[None, :]
    return Gram(basis_mm=basis_mm, centre=centre)


def _centred_chunk(
    loader: Loader, where: slice, centre: int, extra_c: Tensor | None, factors_m1: Tensor | None
) -> Tensor:
    """Return the differences of rows from row `centre`, itself in its own place; scaled by factors."""
    if loader.is_plain and extra_c is None and factors_m1 is None:  # without a copy before
        middle_c = loader.block[centre, where]
        b_mc = torch.sub(loader.block[:, where], middle_c, out=loader.buffer(where))
        b_mc[centre] = middle_c
        return b_mc
    b_mc = loader.copy(where)
    if extra_c is not None:
        b_mc[-1].copy_(extra_c)
    middle_c = b_mc[centre].clone()
    if factors_m1 is None:
        b_mc.sub_(middle_c)
        b_mc[centre] = middle_c
    else:  # scaled before the difference, which may overflow
        b_mc.mul_(factors_m1).addcmul_(factors_m1, middle_c[None], value=-1)
        b_mc[centre] = middle_c * factors_m1[centre]
    return b_mc


def _scales(squares_m: Tensor, num_rows: int) -> Tensor | None:
    """Return powers of two that bring rows near norm 1, where float32 products would overflow or vanish."""
    positive = squares_m[squares_m > 0]
    if not len(positive) or (SMALLEST_SQUARE < positive.min() and positive.max() < LARGEST_SQUARE):
        return None
    middle = squares_m[lower_median_place(squares_m[:num_rows])]
    exponents_m = torch.maximum(squares_m, middle).clamp(min=1e-300).log2().div(2).round().clamp(-120, 120)
    return torch.exp2(-exponents_m)


@dataclass(frozen=True, kw_only=True)
class View:
    """The rows that a rule decides on, as mixtures of the rows of the stack that are in use."""

    mix_nR: Tensor
    """float64 [n, R]: row i of the view is the sum of mix_ij times row j."""
    squares_n: Tensor
    """Squared norms, float64, on the CPU as all numbers here."""
    sample_weights_n: Tensor
    """How much each row counts in an average."""
    dots_n: Tensor | None = None
    """Dots with the trusted gradient."""
    reference_square: float = torch.nan
    """Squared norm of the trusted gradient."""
    gram: Gram | None = None
    """None for rules that do not need it."""
    own_row: int | None = None
    """Place of the worker's own row."""
    step: int = 0
    seed: int = 0
    """Of what is drawn."""
    workers: tuple[int, ...] = ()
    """Who sent the rows in use."""
    rows: Rows | None = None
    """The rows in use. None where only what the workers report is known."""
    unclipped_n: Tensor | None = None
    """Squared norms before rows were shortened to a common norm, by which equals are told apart; None where
    none was."""
    changes_n: Tensor | None = None
    """Squared distances of the rows in use to what their workers sent the last time; NaN for the first."""

    @property
    def num_rows(self) -> int:
        """Return n."""
        return self.mix_nR.shape[0]

    @property
    def norms_n(self) -> Tensor:
        """Return the norms."""
        return self.squares_n.sqrt()

    @property
    def trusted_dots_n(self) -> Tensor:
        """Return the dots, for rules that say that they need them."""
        assert self.dots_n is not None, "the rule says that it needs the trusted gradient"
        return self.dots_n

    def centred_nn(self) -> Tensor:
        """Return the Gram matrix of the rows less the row of lower-median norm; 0 in that row and column."""
        assert self.gram is not None, "the rule says that it needs the Gram matrix"
        C_nm = self.gram.coefficients(self.mix_nR)
        C_nm = C_nm - C_nm[lower_median_place(self.squares_n)]
        K_nn = C_nm @ self.gram.basis_mm @ C_nm.T
        return (K_nn + K_nn.T) / 2

    def drawn(self, count: int, *purpose: str | int) -> "View":
        """Return the view whose Gram matrix is of `count` columns only, drawn by the seed and the step."""
        assert self.rows is not None, "a rule that is not self-reported is given the rows"
        rows = self.rows.drawn(count, seed=self.seed, purpose=[*purpose, self.step])
        squares_R = row_numbers(rows.blocks, None, rows.total).squares_N
        return replace(self, gram=gram(rows.blocks, rows.places, squares_R, rows.total))

    def distances_nn(self) -> Tensor:
        """Return D2, exactly symmetric, 0 on the diagonal."""
        return squared_distances(self.centred_nn())

    def scaled(self, factors_n: Tensor) -> "View":
        """Return the view of the rows times factors."""
        dots_n = None if self.dots_n is None else factors_n * self.dots_n
        return replace(
            self,
            mix_nR=factors_n[:, None] * self.mix_nR,
            squares_n=factors_n.square() * self.squares_n,
            dots_n=dots_n,
        )

    def mixed(self, weights_kn: Tensor) -> "View":
        """Return the view of averages of the rows: weights are at least 0 and each row's sum is 1.

        Equal mixtures are formed once, so that they tie to the last bit whatever order a product sums in.
        """
        assert self.gram is not None, "what mixes rows says that it needs the Gram matrix"
        weights_jn, place_k = weights_kn.unique(dim=0, return_inverse=True)
        mix_jR = weights_jn @ self.mix_nR
        C_jm = self.gram.coefficients(mix_jR)
        squares_j = ((C_jm @ self.gram.basis_mm) * C_jm).sum(1).clamp(min=0)
        return replace(
            self,
            mix_nR=mix_jR[place_k],
            squares_n=squares_j[place_k],
            unclipped_n=None,
            sample_weights_n=(weights_jn @ self.sample_weights_n)[place_k],
            dots_n=None if self.dots_n is None else (weights_jn @ self.dots_n)[place_k],
        )


def squared_distances(K_nn: Tensor) -> Tensor:
    """Return the squared distances of vectors with Gram matrix K."""
    diagonal_n = K_nn.diagonal()
    D2_nn = (diagonal_n[:, None] + diagonal_n[None, :] - 2 * K_nn).clamp(min=0)
    return D2_nn.fill_diagonal_(0.0)


def with_last_vector(view: View, square: Tensor) -> View:
    """Return the view with the rule's last vector, the last of the basis, as one more row."""
    row_1m = torch.zeros(1, view.mix_nR.shape[1], dtype=torch.float64)
    row_1m[0, -1] = 1.0
    one = torch.ones(1, dtype=torch.float64)
    return replace(
        view,
        mix_nR=torch.cat([view.mix_nR, row_1m]),
        squares_n=torch.cat([view.squares_n, square[None]]),
        sample_weights_n=torch.cat([view.sample_weights_n, one]),
    )
