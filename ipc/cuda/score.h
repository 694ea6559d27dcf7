/* SPDX-License-Identifier: MIT */
#pragma once
/* What score.cu and its launch (score.c) have to agree on. */
#include "shm/scorer.h"

/*
 * Chunks of weights in shared memory. Compute capability 9.0 has room for many, so that a block's two groups of
 * warps may be half a tile apart: one multiplies while the other is between layers.
 */
#define SCORE_STAGES_90 24u
#define SCORE_STAGES_80 6u

/* Bytes of shared memory: the chunks, the vectors of two lanes, RoPE's turns, barriers. */
#define SCORE_SHARED(stages, dim, vecs) ((stages) * (SCORER_CHUNK + 16) + 2 * (vecs)*4 + (dim) / 2 * 8)
