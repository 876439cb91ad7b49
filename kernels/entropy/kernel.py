"""Device side of the spectral entropy: Householder tridiagonalisation, then Sturm bisection."""

import triton
import triton.language as tl


@triton.jit
def tridiagonal_kernel(
    covariance_ptr, matrix_ptr, vectors_ptr, diagonal_ptr, squares_ptr,
    HEAD_SIZE: tl.constexpr, PADDED: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """Tridiagonal form of one symmetric matrix, scaled to trace one. Grid (B,).

    Step k removes column k below the subdiagonal with the reflection I - β v vᵀ, which changes the
    matrix by -(v wᵀ + w vᵀ). This update is carried out one step late, in the same pass over the
    matrix that multiplies it with the next v: one read and one write of the matrix a step.

    The matrix lies in `matrix_ptr` `[B, d, d]`, which stays in the L1 and L2 caches, because 256 x
    256 floats do not fit the registers; `vectors_ptr` is `[B, 4, PADDED]`, v and w of the last step
    and of this one, by parity, so that two barriers a step are enough.

    Output: diagonal `[B, d]` and squared subdiagonal `[B, d]` (its last one is 0).
    """
    at = tl.program_id(0).to(tl.int64)
    covariance_ptr += at * HEAD_SIZE * HEAD_SIZE
    matrix_ptr += at * HEAD_SIZE * HEAD_SIZE
    vectors_ptr += at * 4 * PADDED
    diagonal_ptr += at * HEAD_SIZE
    squares_ptr += at * HEAD_SIZE
    index = tl.arange(0, PADDED)
    inside = index < HEAD_SIZE

    trace = tl.sum(tl.load(covariance_ptr + index * (HEAD_SIZE + 1), mask=inside, other=0.0), 0)
    # Not "where positive": a trace of NaN must make everything NaN.
    none = trace <= 0
    scale = tl.where(none, 0.0, 0.5 / tl.where(none, 1.0, trace))
    for start in range(0, HEAD_SIZE, ROWS):
        lines = start + tl.arange(0, ROWS)
        mask = (lines < HEAD_SIZE)[:, None] & inside[None, :]
        place = lines[:, None] * HEAD_SIZE + index[None, :]
        mirror = index[None, :] * HEAD_SIZE + lines[:, None]
        tile = tl.load(covariance_ptr + place, mask=mask, other=0.0)
        tile += tl.load(covariance_ptr + mirror, mask=mask, other=0.0)
        tl.store(matrix_ptr + place, tile * scale, mask=mask)
    v = tl.zeros((PADDED,), dtype=tl.float32)
    w = tl.zeros((PADDED,), dtype=tl.float32)
    tl.store(vectors_ptr + 2 * PADDED + index, v)
    tl.store(vectors_ptr + 3 * PADDED + index, w)
    tl.debug_barrier()

    for k in range(0, HEAD_SIZE):
        new = vectors_ptr + (k % 2) * 2 * PADDED
        old = vectors_ptr + (1 - k % 2) * 2 * PADDED
        column = tl.load(matrix_ptr + k * HEAD_SIZE + index, mask=inside, other=0.0)
        column -= v * tl.load(old + PADDED + k) + w * tl.load(old + k)
        tl.store(diagonal_ptr + index, column, mask=index == k)
        below = tl.where((index > k) & inside, column, 0.0)
        square = tl.sum(below * below, 0)
        tl.store(squares_ptr + index, tl.zeros_like(v) + square, mask=index == k)
        norm = tl.sqrt_rn(square)  # rounded: an error here would leave no reflection, every step
        head = tl.sum(tl.where(index == k + 1, below, 0.0), 0)
        gap = tl.where(head < 0, head - norm, head + norm)  # no cancellation
        reflector = tl.where(index == k + 1, gap, below)
        zero = square == 0
        beta = tl.where(zero, 0.0, tl.div_rn(1.0, tl.where(zero, 1.0, norm * tl.abs(gap))))
        tl.store(new + index, reflector)
        tl.debug_barrier()

        product = tl.zeros((PADDED,), dtype=tl.float32)
        for start in range((k + 1) // ROWS * ROWS, HEAD_SIZE, ROWS):
            lines = start + tl.arange(0, ROWS)
            mask = (lines < HEAD_SIZE)[:, None] & inside[None, :]
            place = matrix_ptr + lines[:, None] * HEAD_SIZE + index[None, :]
            v_lines = tl.load(old + lines, mask=lines < HEAD_SIZE, other=0.0)
            w_lines = tl.load(old + PADDED + lines, mask=lines < HEAD_SIZE, other=0.0)
            reflector_lines = tl.load(new + lines, mask=lines < HEAD_SIZE, other=0.0)
            tile = tl.load(place, mask=mask, other=0.0)
            tile -= v_lines[:, None] * w[None, :] + w_lines[:, None] * v[None, :]
            tl.store(place, tile, mask=mask)
            product += tl.sum(tile * reflector_lines[:, None], 0)
        product = tl.where((index > k) & inside, product * beta, 0.0)
        half = 0.5 * beta * tl.sum(product * reflector, 0)
        v = reflector
        w = product - half * reflector
        tl.store(new + PADDED + index, w)
        tl.debug_barrier()


@triton.jit
def entropy_kernel(
    diagonal_ptr, squares_ptr, eigenvalues_ptr, entropy_ptr, scale,
    KEPT: tl.constexpr, RENORMALIZED: tl.constexpr, HEAD_SIZE: tl.constexpr,
    PADDED: tl.constexpr, HALVINGS: tl.constexpr,
):  # fmt: skip
    """Eigenvalues and entropy of one tridiagonal matrix of trace one. Grid (B,).

    Lane i bisects for the i-th largest eigenvalue: the number of negative pivots of T - x I is the
    number of eigenvalues below x. Lanes of clustered eigenvalues do the same and need no care.
    """
    at = tl.program_id(0).to(tl.int64)
    diagonal_ptr += at * HEAD_SIZE
    squares_ptr += at * HEAD_SIZE
    index = tl.arange(0, PADDED)
    inside = index < HEAD_SIZE
    diagonal = tl.load(diagonal_ptr + index, mask=inside, other=0.0)
    squares = tl.load(squares_ptr + index, mask=inside, other=0.0)
    before = tl.load(squares_ptr + index - 1, mask=inside & (index > 0), other=0.0)
    # Gershgorin's bound, a little widened; below 0 nothing is looked for: it would be cut to 0.
    radius = tl.sqrt(squares) + tl.sqrt(before)
    top = tl.max(diagonal + radius, 0) * 1.0001
    low = tl.zeros((PADDED,), dtype=tl.float32)
    high = low + top
    smaller = HEAD_SIZE - 1 - index  # eigenvalues below the one that is looked for
    for _ in range(HALVINGS):
        middle = 0.5 * (low + high)
        pivot = tl.zeros((PADDED,), dtype=tl.float32) + 1.0
        negative = tl.zeros((PADDED,), dtype=tl.int32)
        square = 0.0
        for i in range(0, HEAD_SIZE):
            pivot = tl.load(diagonal_ptr + i) - middle - square / pivot
            pivot = tl.where(tl.abs(pivot) < 1e-20, -1e-20, pivot)
            negative += (pivot < 0).to(tl.int32)
            square = tl.load(squares_ptr + i)
        above = negative > smaller
        high = tl.where(above, middle, high)
        low = tl.where(above, low, middle)
    values = tl.where(inside, low, 0.0)

    total = tl.sum(values, 0)
    tl.store(
        eigenvalues_ptr + at * HEAD_SIZE + index, values / tl.maximum(total, 1e-30), mask=inside
    )
    kept = tl.where(index < KEPT, values, 0.0)
    if RENORMALIZED:
        total = tl.sum(kept, 0)
    share = kept / tl.maximum(total, 1e-30)
    terms = tl.where(share > 0, -share * tl.log(tl.where(share > 0, share, 1.0)), 0.0)
    result = tl.minimum(tl.maximum(tl.sum(terms, 0) * scale, 0.0), 1.0)
    # Comparisons with NaN are false, so the bisection would end in a number.
    poison = tl.sum(diagonal + squares, 0) * 0.0
    tl.store(entropy_ptr + at, result + poison)
