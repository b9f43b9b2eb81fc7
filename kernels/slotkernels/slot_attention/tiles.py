"""Block sizes of the Triton kernels: a function of the call and the device.

The rules: the accumulators of the slots are in registers (there are 256 KiB; products and addresses need the rest).
Wider accumulators are cut into slices, computed by different programs. What several products read is kept in shared
memory if all of it fits, together with the next one or two tiles of tokens. Otherwise it is read again from the caches.
"""

from typing import NamedTuple

KEPT_BYTES = 98304  # most fp32 accumulators of a program that keeps its tile: 32 slots x 768
STREAMED_BYTES = 65536  # most fp32 accumulators of a program that streams
# Shared memory that a program may use, by compute capability; between two of them, the lower one counts.
SHARED_BYTES = {80: 163840, 86: 99328, 90: 229376, 120: 99328}
MAX_COLUMNS, MAX_DIM = 128, 1024


class Tile(NamedTuple):
    """Block sizes and launch options of one kernel."""

    block_m: int
    block_g: int  # groups of slots, padded
    block_p: int  # slots of a group, padded
    block_d: int
    chunks: int  # pieces of the width D
    block_dv: int
    value_chunks: int  # pieces of the width Dv
    slice_chunks: int  # pieces that one program accumulates: of Dv forward, of D backward
    keep: bool  # queries and a tile of tokens stay in shared memory for all products
    warps: int
    stages: int


def power_of_two(value: int) -> int:
    """The smallest power of two that is at least ``value``."""
    return 1 << max(value - 1, 0).bit_length()


def pieces(dim: int, widest: int) -> tuple[int, int]:
    """Width and number of the pieces of ``dim``: the widest pieces that pad ``dim`` by at most an eighth."""
    for width in (256, 128, 64, 32, 16):
        count = -(-dim // width)
        if width <= widest and count * width * 8 <= dim * 9:
            return width, count
    width = min(max(power_of_two(dim), 16), 64)
    return width, -(-dim // width)


def group_columns(slots_per_group: int, groups: int) -> tuple[int, int]:
    """Columns for groups, and for the slots of a group; at least 16 together, the least size of a product."""
    block_g = power_of_two(groups)
    return block_g, max(power_of_two(slots_per_group), 16 // block_g)


def splits(programs: int, tokens: int, block_m: int, token_bytes: int, row_bytes: int, processors: int) -> int:
    """How many programs share the tokens of one sample.

    The busiest processor runs ``ceil(programs * splits / processors)`` programs. Each reads its share of the tokens
    and, if there are several shares, writes its fp32 sums, which are read again. The number with the fewest bytes for
    the busiest processor is returned; of several, the smallest.
    """
    tiles = -(-tokens // block_m)

    def cost(count: int) -> int:
        share = -(-tiles // count) * block_m * token_bytes
        return -(-programs * count // processors) * (share + (2 * row_bytes if count > 1 else 0))

    return min(range(1, tiles + 1), key=cost)


def shared_bytes(capability: int) -> int:
    """Shared memory that one program may use on a device of this compute capability (90 for 9.0)."""
    return SHARED_BYTES[max(known for known in SHARED_BYTES if known <= capability)]


def tile(
    slots_per_group: int, groups: int, dim: int, value_dim: int, shared: bool, itemsize: int, capability: int, kind: str
) -> Tile:
    """Block sizes of a ``kind`` of kernel: "forward", or backward for "queries", for "tokens", or for "both" at once.

    Registers and shared memory that these rules lead to are pinned in profiling/results/resources.csv.
    """
    block_g, block_p = group_columns(slots_per_group, groups)
    block_n = block_g * block_p
    if shared and itemsize == 2 and block_n <= 32 and kind != "tokens":
        block_d, chunks = pieces(dim, 256)
        operand = block_n * chunks * block_d * itemsize  # queries; backward grad_updates too, each in two layouts if
        kept = {"forward": 1, "queries": 2, "both": 4}[kind] * operand  # the tokens' gradient is a product of them
        for block_m in (32, 16):
            for stages in (3, 2):
                tokens = (stages - 1) * block_m * chunks * block_d * itemsize
                fits = kept + tokens + 8 * block_n * block_m + 4096 <= shared_bytes(capability)
                if fits and 4 * block_n * chunks * block_d <= KEPT_BYTES:
                    sizes = (block_d, chunks, block_d, chunks, chunks)
                    # Few slots occupy few warps: docs/develop/facts_kernels.md. On sm_100 it would spill.
                    warps = 4 if block_n == 16 and kind != "both" and capability == 90 else 8
                    return Tile(block_m, block_g, block_p, *sizes, keep=True, warps=warps, stages=stages)

    # Operands of backward, and of products in three parts of tf32, take registers from the accumulators.
    backward, single, many = kind != "forward", itemsize != 2, block_n > 64
    budget = STREAMED_BYTES // 2 if backward or single else STREAMED_BYTES
    # With 64 columns, operands 128 wide leave the assembler a few registers short.
    narrow = kind == "queries" and block_n == 64 and not single
    widest = 128 >> single + many + narrow
    block_d, chunks = pieces(dim, widest)
    block_dv, value_chunks = pieces(value_dim, widest)
    width, count = (block_dv, value_chunks) if kind == "forward" else (block_d, chunks)
    share = count if kind == "tokens" else min(count, max(1, budget // (4 * block_n * width)))
    sizes = (block_d, chunks, block_dv, value_chunks, share)
    # Before sm_90, products read registers: 64 columns leave none for the addresses of a second tile.
    full = capability < 90 and block_n == 64 and (kind == "queries" or (single and not backward))
    stages = 1 if full or (backward and (single or many)) else 2
    return Tile(16 if single else 32, block_g, block_p, *sizes, keep=False, warps=8, stages=stages)
