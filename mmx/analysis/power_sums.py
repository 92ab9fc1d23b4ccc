"""Fits log loss by the logarithm of a sum of powers, by Huber's loss or least squares.

    log L = logsumexp over m of (u_m - e_m x_m)

x_m is the logarithm of a feature of the run (compute, parameters, tokens) less its mean over the runs, so the fit does not
depend on the unit of the feature. The constant term has e_m = 0.

`solve` minimises from the best of a grid of starting points: L-BFGS first, then `descend` to the last digit. `bootstrap`
runs `descend` on all resamples at once. scipy.optimize.least_squares finds the same minima (exponents within 1e-8), but one
resample at a time, which takes 8 to 20 times as long.

Array axes, which belong to the analysis only (the model's axes are in mmx/dims.py): R resamples or starting points, I runs,
K powers, M terms of the sum (powers, then the constant), J fitted parameters (theta: the M numbers u_m, then the K exponents).
"""
import itertools
import math

import numpy as np
from scipy import optimize

# A term is at least exp(-7) times the smallest loss and at most exp(4) times the largest. An exponent is between -4 and 4.
BELOW_SMALLEST, ABOVE_LARGEST, MAX_EXPONENT = 7.0, 4.0, 4.0
STARTS = 24             # starting points of L-BFGS
MINIMA = 4              # of the minima found, those that every resample starts from
BLOCK = 4_000_000       # numbers in the Jacobian of the resamples that are computed at once


def log_sum(theta_RJ, x_KI) -> tuple[np.ndarray, np.ndarray]:
    """log L_RI, and the share_RMI of each term in L."""
    K = len(x_KI)
    log_RMI = np.repeat(theta_RJ[:, :-K, None], x_KI.shape[1], 2)
    log_RMI[:, :K] -= theta_RJ[:, -K:, None] * x_KI
    top_R1I = log_RMI.max(1, keepdims=True)
    share_RMI = np.exp(log_RMI - top_R1I)
    total_R1I = share_RMI.sum(1, keepdims=True)
    return (top_R1I + np.log(total_R1I))[:, 0], share_RMI / total_R1I


def gradient(share_RMI, x_KI) -> np.ndarray:
    """d log L / d theta, _RJI."""
    return np.concatenate([share_RMI, -share_RMI[:, :len(x_KI)] * x_KI], 1)


def _huber(r_RI, delta, weight_RI=1.0):
    size_RI = np.abs(r_RI)
    return (weight_RI * np.where(size_RI <= delta, r_RI ** 2 / 2, delta * (size_RI - delta / 2))).sum(-1)


def search_bounds(y_I, K, constant) -> np.ndarray:
    """Lowest and highest theta_J of the search."""
    M = K + constant
    return np.array([[y_I.min() - BELOW_SMALLEST] * M + [-MAX_EXPONENT] * K,
                     [y_I.max() + ABOVE_LARGEST] * M + [MAX_EXPONENT] * K])


def _starting_points(y_I, K, constant) -> np.ndarray:
    """theta_RJ of a grid over the terms' shares in the median loss and over the exponents."""
    M, exponents = K + constant, (0.03, 0.06, 0.12, 0.25, 0.5, 1.0)
    parts = [part for part in itertools.product((1, 3, 10), repeat=M) if min(part) == 1]
    return np.array([[*(np.log(np.array(part) / sum(part)) + np.median(y_I)), *chosen]
                     for part in parts for chosen in itertools.product(exponents, repeat=K)])


def solve(x_KI, y_I, constant: bool, delta: float, bounds) -> np.ndarray:
    """Finds the lowest distinct minima of Huber's loss.

    Args:
      x_KI: centred logarithms of the features.
      y_I: log losses.
      constant: whether the sum has a constant term.
      delta: residual at which Huber's loss turns from a square to a line.
      bounds: lowest and highest theta_J.
    Returns:
      theta_RJ of at most MINIMA minima, the lowest first.
    """
    def loss(theta_J):
        log_RI, share_RMI = log_sum(theta_J[None], x_KI)
        r_I = y_I - log_RI[0]
        scale = 1 / min(delta, 1)
        return scale * _huber(r_I, delta), -scale * gradient(share_RMI, x_KI)[0] @ np.clip(r_I, -delta, delta)

    starts_RJ = _starting_points(y_I, len(x_KI), constant)
    parts = np.array_split(starts_RJ, math.ceil(starts_RJ.size * len(y_I) / BLOCK))
    order_R = np.argsort(np.concatenate([_huber(y_I - log_sum(part, x_KI)[0], delta) for part in parts]), kind="stable")
    found_RJ = np.array([optimize.minimize(loss, start_J, jac=True, method="L-BFGS-B", bounds=bounds.T,
                                           options={"maxiter": 300, "ftol": 1e-14, "gtol": 1e-10}).x
                         for start_J in starts_RJ[order_R[:STARTS]]])
    found_RJ, loss_R = descend(found_RJ, x_KI, np.broadcast_to(1.0, (len(found_RJ), len(y_I))), y_I, delta, bounds)
    minima = []
    for r in np.argsort(loss_R, kind="stable"):
        if len(minima) < MINIMA and all(np.abs(found_RJ[r] - minimum_J).max() > 1e-3 for minimum_J in minima):
            minima.append(found_RJ[r])
    return np.array(minima)


def descend(theta_RJ, x_KI, weight_RI, y_I, delta: float, bounds, steps: int = 400) -> tuple[np.ndarray, np.ndarray]:
    """Moves each row of `theta_RJ` to the nearest minimum of its Huber loss with weights `weight_RI`.

    Each step solves a linear system whose matrix is N + damping * W. N is Newton's matrix: it contains only the runs with
    residuals below delta and may be singular. W is the matrix of iteratively reweighted least squares: it contains all runs,
    and its steps never increase the loss. As in the method of Levenberg and Marquardt, the damping falls after a step that
    decreases the loss and grows after any other step.

    Returns:
      theta_RJ and the loss_R.
    """
    theta_RJ, eye = theta_RJ.copy(), np.eye(theta_RJ.shape[1])
    log_RI, share_RMI = log_sum(theta_RJ, x_KI)
    r_RI = y_I - log_RI
    loss_R, damping_R, active = _huber(r_RI, delta, weight_RI), np.ones(len(theta_RJ)), np.arange(len(theta_RJ))
    for _ in range(steps):
        if not len(active):
            break
        theta, r, weight = theta_RJ[active], r_RI[active], weight_RI[active]
        gradient_RJI, size = gradient(share_RMI[active], x_KI), np.abs(r)
        downhill_RJ = (gradient_RJI @ (weight * np.clip(r, -delta, delta))[..., None])[..., 0]
        newton, reweighted = weight * (size <= delta), weight * np.minimum(1, delta / np.maximum(size, 1e-300))
        newton_RJJ, reweighted_RJJ = ((gradient_RJI * w[:, None]) @ gradient_RJI.transpose(0, 2, 1)
                                      for w in (newton, reweighted))
        matrix_RJJ = newton_RJJ + damping_R[active, None, None] * reweighted_RJJ
        matrix_RJJ = matrix_RJJ + (1e-12 * np.trace(matrix_RJJ, axis1=1, axis2=2) + 1e-300)[:, None, None] * eye
        free_RJ = ~((theta <= bounds[0]) & (downhill_RJ < 0) | (theta >= bounds[1]) & (downhill_RJ > 0))
        matrix_RJJ = np.where(free_RJ[:, :, None] & free_RJ[:, None], matrix_RJJ, eye)
        theta = np.clip(theta + np.linalg.solve(matrix_RJJ, (downhill_RJ * free_RJ)[..., None])[..., 0], *bounds)
        log_RI, share = log_sum(theta, x_KI)
        loss = _huber(y_I - log_RI, delta, weight)
        better = loss < loss_R[active]
        done = np.where(better, loss_R[active] - loss < 1e-13 * loss_R[active] + 1e-24, damping_R[active] > 1e8)
        damping_R[active] = np.where(better, np.maximum(damping_R[active] / 8, 1e-9), damping_R[active] * 8)
        rows = active[better]
        theta_RJ[rows], r_RI[rows], share_RMI[rows], loss_R[rows] = (
            theta[better], (y_I - log_RI)[better], share[better], loss[better])
        active = active[~done]
    return theta_RJ, loss_R


def bootstrap(minima_RJ, x_KI, y_I, delta, bounds, resamples, rng) -> np.ndarray:
    """theta_RJ of `resamples` sets of runs drawn with replacement: for each the lowest minimum reached from `minima_RJ`."""
    I, rows, parts = len(y_I), max(1, BLOCK // (minima_RJ.shape[1] * len(y_I))), []
    for first in range(0, resamples, rows):     # blocks bound the memory
        weight_RI = rng.multinomial(I, np.full(I, 1 / I), min(rows, resamples - first)).astype(float)
        tried = [descend(np.tile(minimum_J, (len(weight_RI), 1)), x_KI, weight_RI, y_I, delta, bounds)
                 for minimum_J in minima_RJ]
        best_R = np.argmin([loss_R for _, loss_R in tried], 0)
        parts.append(np.choose(best_R[:, None], [theta_RJ for theta_RJ, _ in tried]))
    return np.concatenate(parts)
