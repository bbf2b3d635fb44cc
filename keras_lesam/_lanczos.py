"""Linear algebra with a symmetric operator that is only known by products.

Pure NumPy and SciPy; see `Operator` for what the functions need of one.
"""

from typing import Any
from typing import Protocol

import numpy as np
import scipy.linalg
import scipy.sparse.linalg


class Operator(Protocol):
    """A symmetric matrix of which only products with vectors are known."""

    @property
    def size(self) -> int:
        """Number of rows and columns."""

    @property
    def progress(self) -> Any:
        """Context manager inside of which products are counted."""

    def __call__(self, vector: np.ndarray, /) -> np.ndarray:
        """Multiply by a vector of shape `(size,)`."""


def largest(
    operator: Operator,
    k: int,
    tolerance: float,
    max_products: int,
    rng: np.random.Generator,
) -> tuple[np.ndarray, np.ndarray]:
    """Compute the `k` largest eigenvalues and their eigenvectors.

    Args:
        operator: The operator.
        k: Integer in [1, operator.size].
        tolerance: Float, the relative accuracy; 0 for machine precision.
        max_products: Integer, about how many products to make.
        rng: A `np.random.Generator`.

    Returns:
        Arrays `(k,)`, descending, and `(operator.size, k)`.

    Raises:
        RuntimeError: if there was no convergence.
    """
    n = operator.size
    # SciPy's default for ARPACK's number of Lanczos vectors; it must exceed k.
    basis_size = max(2 * k + 1, 20)
    with operator.progress:
        if basis_size >= n:
            values, vectors = np.linalg.eigh(matrix(operator))
        else:
            values, vectors = _arpack(
                operator, k, basis_size, tolerance, max_products, rng
            )
    order = np.argsort(values)[::-1][:k]
    return values[order], vectors[:, order]


def matrix(operator: Operator) -> np.ndarray:
    """Compute the operator as a symmetrized array, by `size` products."""
    columns = [operator(e) for e in np.eye(operator.size)]
    dense = np.stack(columns, axis=1)
    return (dense + dense.T) / 2


def _arpack(
    operator: Operator,
    k: int,
    basis_size: int,
    tolerance: float,
    max_products: int,
    rng: np.random.Generator,
) -> tuple[np.ndarray, np.ndarray]:
    """Run SciPy's implicitly restarted Lanczos iteration."""
    n = operator.size
    linear = scipy.sparse.linalg.LinearOperator(
        (n, n), matvec=operator, dtype="float64"
    )
    try:
        return scipy.sparse.linalg.eigsh(
            linear,
            k,
            which="LA",
            tol=tolerance,
            ncv=basis_size,
            v0=rng.standard_normal(n),
            # Restarts; each makes one product per vector that it discards.
            maxiter=max(1, max_products // (basis_size - k)),
        )
    except scipy.sparse.linalg.ArpackNoConvergence as error:
        raise RuntimeError(
            f"{len(error.eigenvalues)} of {k} eigenvalues have converged "
            "within `max_products` products to `tolerance`; raise one of them."
            f" Received: max_products={max_products}, tolerance={tolerance}"
        ) from error


def trace(
    operator: Operator,
    tolerance: float,
    max_samples: int,
    rng: np.random.Generator,
) -> tuple[float, float, int]:
    """Estimate the trace by Hutchinson's method.

    `tr H = E v.(H v)` for vectors `v` of independent random signs.

    Args:
        operator: The operator.
        tolerance: Float, the relative standard error at which to stop.
        max_samples: Integer > 1, how many vectors to use at most.
        rng: A `np.random.Generator`.

    Returns:
        `(value, standard_error, samples)`.
    """
    # The standard error of fewer samples is too noisy to stop by.
    min_samples = min(10, max_samples)
    samples: list[float] = []
    with operator.progress:
        while len(samples) < max_samples:
            v = _signs(rng, operator.size)
            samples.append(v @ operator(v))
            if len(samples) < min_samples:
                continue
            error = np.std(samples, ddof=1) / np.sqrt(len(samples))
            if error <= tolerance * abs(np.mean(samples)):
                break
    return float(np.mean(samples)), float(error), len(samples)


def density(
    operator: Operator, probes: int, steps: int, rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """Estimate the spectrum by stochastic Lanczos quadrature.

    The nodes of a probe are the eigenvalues of its tridiagonal matrix, and
    their weights the squared first components of its eigenvectors. The
    spectrum is the mean over probes.

    Args:
        operator: The operator.
        probes: Integer > 0, how many random vectors to start from.
        steps: Integer > 0, Lanczos steps for each.
        rng: A `np.random.Generator`.

    Returns:
        Arrays of the nodes, ascending, and of their weights, of sum 1.
    """
    nodes, weights = [], []
    with operator.progress:
        for _ in range(probes):
            start = _signs(rng, operator.size)
            values, vectors = scipy.linalg.eigh_tridiagonal(
                *tridiagonal(operator, start, steps)
            )
            nodes.append(values)
            weights.append(vectors[0] ** 2 / probes)
    unsorted = np.concatenate(nodes)
    order = np.argsort(unsorted)
    return unsorted[order], np.concatenate(weights)[order]


def tridiagonal(
    operator: Operator, start: np.ndarray, steps: int
) -> tuple[np.ndarray, np.ndarray]:
    """Run Lanczos' iteration from `start`, with full reorthogonalisation.

    Args:
        operator: The operator.
        start: Vector, not zero.
        steps: Integer; fewer are made where the Krylov space is exhausted.

    Returns:
        Arrays of the diagonal and of the off-diagonal, one shorter.
    """
    steps = min(steps, operator.size)
    basis = np.empty((steps, operator.size))
    basis[0] = start / np.linalg.norm(start)
    diagonal: list[Any] = []
    off_diagonal: list[Any] = []
    for i in range(steps):
        product = operator(basis[i])
        diagonal.append(basis[i] @ product)
        previous = basis[: i + 1]
        # Twice is enough (Parlett, "The symmetric eigenvalue problem", 6.9).
        for _ in range(2):
            product -= previous.T @ (previous @ product)
        norm = np.linalg.norm(product)
        scale = np.abs(diagonal).max() + max(off_diagonal, default=0.0)
        if i + 1 == steps or norm <= 1e-6 * scale:
            break
        off_diagonal.append(norm)
        basis[i + 1] = product / norm
    return np.array(diagonal), np.array(off_diagonal)


def _signs(rng: np.random.Generator, size: int) -> np.ndarray:
    """Draw a vector of independent random signs."""
    return rng.choice([-1.0, 1.0], size)
