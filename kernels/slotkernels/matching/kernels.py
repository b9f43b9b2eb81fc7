"""Triton kernel of the matching. Permutations are computed instead of read from a table: each digit of a permutation's
rank in the factorial number system selects the column of a row, among the columns that are still free.
"""

import triton
import triton.language as tl


@triton.jit
def _next_column(rank, taken, step, left, P: tl.constexpr):
    """Column of the next row in the permutation of this rank, and the set of taken columns, as bits.

    Args:
        rank: number of the permutation in lexicographic order.
        taken: columns of the previous rows, as bits.
        step: factorial of the number of rows that follow.
        left: number of free columns.
    """
    digit = rank // step % left
    column = rank * 0
    for c in tl.static_range(P):
        free = ((taken >> c) & 1) == 0
        column = tl.where(free & (digit == 0), c, column)
        digit -= free.to(tl.int32)  # below 0 once the column is found
    return column, taken | (1 << column)


@triton.jit
def match_kernel(
    similarity,  # [problems, P, P]
    partners,  # [problems, P]
    problems,
    P: tl.constexpr,
    PERMUTATIONS: tl.constexpr,  # P!
    BLOCK: tl.constexpr,  # problems of a program
    RANKS: tl.constexpr,  # PERMUTATIONS, padded to a power of two
):
    """A program reads BLOCK problems and writes their partners.

    Registers hold the sum of every permutation in float64. Each number is read (P-1)! times, from the first cache.
    Floor: P · P numbers read and P written for each problem; P · P! additions.
    """
    problem = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    real = problem < problems
    rank = tl.arange(0, RANKS)
    sums = tl.zeros([BLOCK, RANKS], tl.float64)
    taken, step = rank * 0, PERMUTATIONS
    for row in tl.static_range(P):
        step = step // (P - row)
        column, taken = _next_column(rank, taken, step, P - row, P)
        where = similarity + problem[:, None] * (P * P) + (row * P + column)[None, :]
        sums += tl.load(where, mask=real[:, None], other=0.0).to(tl.float64)
    counts = (rank < PERMUTATIONS)[None, :] & (sums == sums)  # a NaN is not equal to itself
    best = tl.argmax(tl.where(counts, sums, float("-inf")), 1)  # the first of equal ones

    taken, step = best * 0, PERMUTATIONS
    for row in tl.static_range(P):
        step = step // (P - row)
        column, taken = _next_column(best, taken, step, P - row, P)
        tl.store(partners + problem * P + row, column.to(tl.int64), mask=real)
