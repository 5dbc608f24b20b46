"""Hadamard matrices: entries of 1 and -1, orthogonal rows. They exist for sizes 1, 2 and, as far as known, multiples of 4."""

import functools
import math

import numpy as np
from jaxtyping import Int8


def hadamard(size: int) -> Int8[np.ndarray, "D D"] | None:
    """A Hadamard matrix, None for a size that these constructions don't reach.

    Sylvester's doubling, Paley's two constructions (J. Math. Phys. 12, 1933) over fields of prime order, and Kronecker
    products of them reach 12, 20, 28, 36, 44 and so on times powers of two, which hidden sizes are.
    """
    if not is_known(size):
        return None
    if size == 1:
        return np.ones((1, 1), np.int8)
    if size == 2:
        return np.array([[1, 1], [1, -1]], np.int8)
    factors = _factors(size)
    if factors:
        return np.kron(hadamard(factors[0]), hadamard(factors[1]))
    return _paley_first(size - 1) if _is_paley_first(size) else _paley_second(size // 2 - 1)


@functools.cache
def is_known(size: int) -> bool:
    """Whether `hadamard` has a matrix of that size."""
    return size in (1, 2) or _factors(size) is not None or _is_paley_first(size) or _is_paley_second(size)


@functools.cache
def _factors(size: int) -> tuple[int, int] | None:
    """Two smaller sizes that are known and multiply to `size`."""
    for divisor in range(2, math.isqrt(size) + 1):
        if size % divisor == 0 and is_known(divisor) and is_known(size // divisor):
            return divisor, size // divisor
    return None


def _is_paley_first(size: int) -> bool:
    return size % 4 == 0 and _is_prime(size - 1)


def _is_paley_second(size: int) -> bool:
    return size % 4 == 0 and size // 2 % 4 == 2 and _is_prime(size // 2 - 1)


def _is_prime(number: int) -> bool:
    return number > 1 and all(number % divisor for divisor in range(2, math.isqrt(number) + 1))


def _residue_matrix(prime: int) -> Int8[np.ndarray, "q q"]:
    """Entry i, j says whether i - j is a square of the field: 1, or -1 where it is none, 0 on the diagonal."""
    character = np.full(prime, -1, np.int8)
    character[np.arange(1, prime, dtype=np.int64) ** 2 % prime] = 1
    character[0] = 0
    index = np.arange(prime)
    return character[(index[:, None] - index) % prime]


def _bordered(prime: int, corner: int) -> Int8[np.ndarray, "q1 q1"]:
    """The residue matrix below a row of ones, its first column `corner` below a zero."""
    matrix = np.ones((prime + 1, prime + 1), np.int8)
    matrix[1:, 1:] = _residue_matrix(prime)
    matrix[1:, 0], matrix[0, 0] = corner, 0
    return matrix


def _paley_first(prime: int) -> Int8[np.ndarray, "D D"]:
    """Of size q + 1 for q = 3 mod 4, where the bordered matrix is skew."""
    return _bordered(prime, -1) + np.eye(prime + 1, dtype=np.int8)


def _paley_second(prime: int) -> Int8[np.ndarray, "D D"]:
    """Of size 2 (q + 1) for q = 1 mod 4, where the bordered matrix is symmetric."""
    return (np.kron(_bordered(prime, 1), np.array([[1, 1], [1, -1]], np.int8))
            + np.kron(np.eye(prime + 1, dtype=np.int8), np.array([[1, -1], [-1, -1]], np.int8)))
