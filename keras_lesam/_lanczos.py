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
        """Context manager inside of which products are counted.

        Its `target` is set to how many there will be at most, or `None`.
        """

    def __call__(self, vector: np.ndarray, /) -> np.ndarray:
        """Multiply by a vector of shape `(size,)`."""


class _ZeroError(Exception):
    """Raised inside of ARPACK, which has no answer for a zero matrix."""


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
        RuntimeError: if there was no convergence, or a product is not finite.
    """
    n = operator.size
    # SciPy's default for ARPACK's number of Lanczos vectors; it must exceed k.
    basis_size = max(2 * k + 1, 20)
    with _counting(operator, n if basis_size >= n else None):
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
    columns = [_multiply(operator, e) for e in np.eye(operator.size)]
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
    scale = 0.0

    def scaled(vector: np.ndarray) -> np.ndarray:
        # ARPACK takes eigenvalues below 1e-11 for converged whatever they
        # are. Its first product, of a random vector, tells how large they are.
        nonlocal scale
        product = _multiply(operator, vector)
        if scale == 0:
            scale = np.abs(product).max() / np.abs(vector).max()
        if scale == 0:
            raise _ZeroError
        return product / scale

    try:
        values, vectors = scipy.sparse.linalg.eigsh(
            scipy.sparse.linalg.LinearOperator(
                (n, n), matvec=scaled, dtype="float64"
            ),
            k,
            which="LA",
            tol=tolerance,
            ncv=basis_size,
            v0=rng.standard_normal(n),
            # Restarts; each makes one product per vector that it discards.
            maxiter=max(1, max_products // (basis_size - k)),
        )
    except _ZeroError:
        return np.zeros(k), np.eye(n, k)
    except scipy.sparse.linalg.ArpackError as error:
        converged = len(getattr(error, "eigenvalues", ()))
        raise RuntimeError(
            f"{converged} of {k} eigenvalues have converged "
            "within `max_products` products to `tolerance`; raise one of them."
            f" Received: max_products={max_products}, tolerance={tolerance}"
        ) from None
    return values * scale, vectors


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

    Raises:
        RuntimeError: if a product is not finite.
    """
    # The standard error of fewer samples is too noisy to stop by.
    min_samples = min(10, max_samples)
    samples: list[float] = []
    with _counting(operator, max_samples):
        while len(samples) < max_samples:
            v = _signs(rng, operator.size)
            samples.append(v @ _multiply(operator, v))
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

    Raises:
        RuntimeError: if a product is not finite.
    """
    nodes, weights = [], []
    with _counting(operator, probes * min(steps, operator.size)):
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
        product = _multiply(operator, basis[i])
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


def _multiply(operator: Operator, vector: np.ndarray) -> np.ndarray:
    """Make a product, which must be finite."""
    product = operator(vector)
    if not np.all(np.isfinite(product)):
        raise RuntimeError(
            "The Hessian is not finite: a product with it has nan or infinite "
            "entries. Look for them in the weights of the model and in the "
            "data; if they and the loss are finite, the loss has no second "
            "derivative here (a norm at 0, say), or overflows its dtype."
        )
    return product


def _counting(operator: Operator, target: int | None) -> Any:
    """Return the progress of an operator, told how many products to expect."""
    operator.progress.target = target
    return operator.progress


def _signs(rng: np.random.Generator, size: int) -> np.ndarray:
    """Draw a vector of independent random signs."""
    return rng.choice([-1.0, 1.0], size)
