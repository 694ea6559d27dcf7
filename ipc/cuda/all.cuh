/* SPDX-License-Identifier: MIT */
/* One translation unit: kvtier-cuda.fatbin. */
#include "ipc/cuda/gather.cu"
#if __has_include("ipc/cuda/scatter.cu")
#include "ipc/cuda/scatter.cu"
#endif
#if __has_include("ipc/cuda/compact.cu")
#include "ipc/cuda/compact.cu"
#endif
#if __has_include("ipc/cuda/score.cu")
#include "ipc/cuda/score.cu"
#endif
#if __has_include("ipc/cuda/recall.cu")
#include "ipc/cuda/recall.cu"
#endif
