"""Linear algebra with a symmetric operator that is only known by products.

Pure NumPy and SciPy; an operator is a callable from a vector to a vector,
with a `size` and a `progress`, a context in which products are counted.
"""

import numpy as np
import scipy.linalg
import scipy.sparse.linalg


def largest(operator, k, tolerance, max_products, rng):
    """The `k` largest eigenvalues and their vectors.

    Args:
        operator: The operator.
        k: Integer in [1, operator.size].
        tolerance: Float, the relative accuracy; 0 for the machine's.
        max_products: Integer, about how many products to make.
        rng: A `np.random.Generator`.

    Returns:
        Arrays `(k,)`, descending, and `(operator.size, k)`.

    Raises:
        RuntimeError: if there was no convergence.
    """
    n = operator.size
    # Vectors that ARPACK keeps, as SciPy would have it; it needs more than k.
    kept = max(2 * k + 1, 20)
    with operator.progress:
        if kept >= n:
            values, vectors = np.linalg.eigh(matrix(operator))
        else:
            values, vectors = _arpack(
                operator, k, kept, tolerance, max_products, rng
            )
    order = np.argsort(values)[::-1][:k]
    return values[order], vectors[:, order]


def matrix(operator):
    """The operator as an array, made symmetric, by `size` products."""
    columns = [operator(e) for e in np.eye(operator.size)]
    dense = np.stack(columns, axis=1)
    return (dense + dense.T) / 2


def _arpack(operator, k, kept, tolerance, max_products, rng):
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
            ncv=kept,
            v0=rng.standard_normal(n),
            # Restarts; each makes as many products as it throws vectors away.
            maxiter=max(1, max_products // (kept - k)),
        )
    except scipy.sparse.linalg.ArpackNoConvergence as error:
        raise RuntimeError(
            f"{len(error.eigenvalues)} of {k} eigenvalues have converged "
            "within `max_products` products to `tolerance`; raise one of them."
            f" Received: max_products={max_products}, tolerance={tolerance}"
        ) from error


def trace(operator, tolerance, max_samples, rng):
    """Hutchinson's estimate, `(value, standard_error, samples)`.

    `tr H = E v.(H v)` for vectors `v` of independent random signs.
    """
    least = min(10, max_samples)
    samples = []
    with operator.progress:
        while len(samples) < max_samples:
            v = _signs(rng, operator.size)
            samples.append(v @ operator(v))
            if len(samples) < least:
                continue
            error = np.std(samples, ddof=1) / np.sqrt(len(samples))
            if error <= tolerance * abs(np.mean(samples)):
                break
    return float(np.mean(samples)), float(error), len(samples)


def density(operator, probes, steps, rng):
    """Nodes and weights of the spectrum by stochastic Lanczos quadrature.

    Each probe's are the eigenvalues of its tridiagonal matrix and the squared
    first components of their vectors; the spectrum is the mean over probes.
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
    nodes, weights = np.concatenate(nodes), np.concatenate(weights)
    order = np.argsort(nodes)
    return nodes[order], weights[order]


def tridiagonal(operator, start, steps):
    """Lanczos' iteration from `start`, with full reorthogonalisation.

    Args:
        operator: The operator.
        start: Vector, not zero.
        steps: Integer; fewer are made where the Krylov space is exhausted.

    Returns:
        Arrays of the diagonal and of what is beside it, one shorter.
    """
    steps = min(steps, operator.size)
    basis = np.empty((steps, operator.size))
    basis[0] = start / np.linalg.norm(start)
    diagonal, beside = [], []
    for i in range(steps):
        product = operator(basis[i])
        diagonal.append(basis[i] @ product)
        known = basis[: i + 1]
        # Twice is enough (Parlett, "The symmetric eigenvalue problem", 6.9).
        for _ in range(2):
            product -= known.T @ (known @ product)
        norm = np.linalg.norm(product)
        scale = np.abs(diagonal).max() + max(beside, default=0.0)
        if i + 1 == steps or norm <= 1e-6 * scale:
            break
        beside.append(norm)
        basis[i + 1] = product / norm
    return np.array(diagonal), np.array(beside)


def _signs(rng, size):
    return rng.choice([-1.0, 1.0], size)
