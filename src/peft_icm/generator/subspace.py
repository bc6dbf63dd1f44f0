"""PCA of snapshots that do not fit into memory: few directions, many columns, blocks of columns in memory."""

from __future__ import annotations

import torch
from torch import Tensor

from ..adapters.snapshots import SnapshotMatrix

EXACT = 1024  # snapshots: forming their Gram matrix takes N^2 P
OVERSAMPLING, PASSES = 10, 6
SETTLED = 1e-5  # of the variance that the components hold: what another pass must add to be worth it
ROUNDING = {torch.float64: 1e-9, torch.float32: 1e-7}  # of the first eigenvalue: below it lies no component


@torch.no_grad()
def principal_components(rows: SnapshotMatrix, center: Tensor, basis: Tensor) -> Tensor:
    """Write the mean and the first principal components of snapshots.

    They are eigenvectors of the Gram matrix `G = X X^T` of the centred snapshots, taken back to the columns. Up to 1,024 snapshots G is
    formed, in fp64: in fp32 its rounding passes for a component where snapshots are nearly alike. Of more, G stays unformed: a
    random subspace of R + 10 dimensions is multiplied by it until it holds no more variance than before (Halko, Martinsson and Tropp
    2011, algorithm 4.4), in fp32 with sums in fp64. Both read X block by block of columns, so that beside the results no memory grows
    with P. (scikit-learn's IncrementalPCA and `torch.svd_lowrank` need whole rows.)

    Args:
        rows ([`SnapshotMatrix`]): `[N, P]`.
        center (`Tensor`): `[P]`, written.
        basis (`Tensor`): `[R, P]`, of which the first r <= N - 1 rows, orthonormal, are written and the others are set to zero.

    Returns:
        `Tensor`: `[r]` fp64, the singular values of X, the largest first.
    """
    dtype = torch.float64 if len(rows) <= EXACT else torch.float32
    squares, vectors = (_of_gram if dtype == torch.float64 else _of_random_subspace)(rows, len(basis))
    rank = min(len(squares), len(rows) - 1, int((squares > squares[0] * ROUNDING[dtype]).sum()))
    singular = squares[:rank].sqrt()
    weights = (vectors[:, :rank] / singular).T.to(dtype)
    basis.zero_()
    for columns, block in rows.columns("components"):
        centered = block.to(dtype)
        mean = centered.mean(0)
        centered -= mean
        center[columns] = mean
        basis[:rank, columns] = weights @ centered
        del centered  # before the next one is made
    if dtype == torch.float32:
        _orthonormalize(basis[:rank])
    return singular


def _of_gram(rows: SnapshotMatrix, rank: int) -> tuple[Tensor, Tensor]:
    """The first eigenvalues and eigenvectors of G, `[R]` and `[N, R]`."""
    gram = torch.zeros(len(rows), len(rows), dtype=torch.float64)
    for _, block in rows.columns("Gram matrix"):
        centered = block.double()
        centered -= centered.mean(0)
        gram.addmm_(centered, centered.T)
        del centered  # before the next one is made
    squares, vectors = torch.linalg.eigh(gram)
    return squares.flip(0)[:rank], vectors.flip(1)[:, :rank]


def _of_random_subspace(rows: SnapshotMatrix, rank: int) -> tuple[Tensor, Tensor]:
    """The same, by subspace iteration."""
    draw = torch.Generator().manual_seed(0)
    image = torch.randn(len(rows), rank + OVERSAMPLING, generator=draw, dtype=torch.float64)
    held = 0.0
    for number in range(PASSES):
        space = torch.linalg.qr(image).Q
        image, narrow = torch.zeros_like(space), space.float()
        for _, block in rows.columns(f"subspace, pass {number + 1}"):
            block -= block.mean(0)
            image += block @ (block.T @ narrow)
        squares, vectors = torch.linalg.eigh(space.T @ image)
        before, held = held, float(squares[-rank:].sum())
        if held - before <= SETTLED * held:
            break
    return squares.flip(0)[:rank], space @ vectors.flip(1)[:, :rank]


def _orthonormalize(basis: Tensor) -> None:
    """In place, rows that nearly are; fp32 leaves those of small singular values not quite orthogonal."""
    parts = basis.split(2**16, dim=1)
    gram = torch.zeros(len(basis), len(basis), dtype=torch.float64, device=basis.device)
    for part in parts:
        gram.addmm_(part.double(), part.double().T)
    factor = torch.linalg.cholesky(gram)
    for part in parts:
        part.copy_(torch.linalg.solve_triangular(factor, part.double(), upper=False))
