"""Every constant that was chosen by measurement, with the measurement.

None of them changes a result beyond rounding; each picks the faster or smaller of two equal ways.
Measured on two cores of an Intel Xeon and of an AMD EPYC with `python -m benchmarks step` unless
said; values for a GPU are estimates (not measured).
"""

from __future__ import annotations

# ---- symmetric products (linalg.moments) ------------------------------------------------------

# A product of fewer rows takes no longer than its entries to be written, and is not split.
FEWEST_SPLIT_ROWS = 64
# Width of the panels of a symmetric product: up to 18 % faster per product than one piece. A GPU
# needs larger ones to be busy.
PANEL_WIDTH, PANEL_WIDTH_ELSEWHERE = {"cpu": 128}, 1024
# Rows of bfloat16 products that are summed before they enter a float32 sum.
ROWS_PER_BFLOAT16_SUM = 1024

# ---- factors that are few rows (linalg.low_rank) ----------------------------------------------

# What a multiplication costs in a factorisation and in a triangular solve, in multiplications of a
# matrix product.
FACTORISATION, SOLVE = 2.0, 1.6
# From this many vectors per row of a factor on its inverse is formed, and applied by products.
VECTORS_FOR_EXPLICIT_INVERSE = 1.5
# With d / 8 rows a pass over a factor of side d costs more than several over the rows.
FEW_ROWS = 8

# ---- factorisations (linalg.inverses) -----------------------------------------------------------

# LAPACK walks through a triangle column by column, which takes as long as the factorisation itself
# where all of a row falls into the same cache lines (sides that are multiples of 512): padding
# moves it. Side 1,024: 9.9 ms -> 5.3 ms.
SLOW_SIDE, SLOW_SIDE_PADDING = 512, 16
# A Gram matrix of more rows takes too long in float64.
MOST_ROWS_IN_FLOAT64 = 256
# Factors up to this side are factorised together; a larger one fills the device by itself.
LARGEST_BATCHED_SIDE, LARGEST_BATCHED_SIDE_ELSEWHERE = {"cpu": 128}, 1024

# ---- convolutions (linalg.patches, correlations, shifted_products) ------------------------------

# Above so many counts, patches are summed one dimension after the other.
MOST_JOINT_COUNTS = 1 << 14
# Channels per group below which gathering patches is as fast as slicing.
FEWEST_SLICED_CHANNELS = 4
# Patches are materialised at most this many entries at a time.
PATCH_CHUNK_ELEMENTS = 1 << 23
# Channels per group below which materialised patches are faster than shifted products.
FEWEST_SHIFTED_CHANNELS = 8
# Positions per channel from which on products of gradients image by image are faster.
POSITIONS_PER_CHANNEL = 4
# Entries of a spectrum, and of its products, at a time.
SPECTRUM_CHUNK_ELEMENTS = 1 << 22

# ---- embeddings, norms --------------------------------------------------------------------------

# A vocabulary up to which A of a reduced embedding, which is not diagonal, is kept whole.
LARGEST_DENSE_VOCABULARY = 2048
# Entries of a BatchNorm's input that stay in a CPU's cache between two passes over them.
NORM_CHUNK_ELEMENTS = {"cpu": 1 << 18}

# ---- the loss's own pass (fisher.loss_pass) -----------------------------------------------------

# Entries of a dot product that a CPU adds up one by one: 1e-6 of the sum in float32.
LONGEST_DOT = 1 << 15

# ---- work on many blocks at once (blocks.batches, linalg.eigenbasis) ----------------------------

# Gradients of more entries are worked on alone: a CPU is full at about 180 x 180.
LARGEST_BATCHED_ENTRIES, LARGEST_BATCHED_ENTRIES_ELSEWHERE = {"cpu": 1 << 15}, 1 << 20
# Entries that the elementwise part of a rule works on together; more only takes more memory.
ELEMENTWISE_ENTRIES = 1 << 20
# Uses of an inverse from which an explicit one always pays.
MANY_USES = 1 << 30
# Portions in which inverses are made: old and new ones of one portion are in memory together. Not
# a speed: more portions wait for a GPU more often.
INVERSION_PORTIONS = 8
# Rows of a symmetric matrix that are packed at a time for a collective.
PACKED_ROWS = 128
