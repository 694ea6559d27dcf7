/* SPDX-License-Identifier: MIT */
/*
 * Products of matrices, all lanes of a group in one call. Ours are row-major,
 * cuBLAS' column-major: our [rows][cols] is its cols x rows.
 */
#include "policy/train/cuda/device.cuh"

static void multiply(struct cuda_backend *b, cublasOperation_t ta, cublasOperation_t tb, uint32_t m, uint32_t n,
		     uint32_t k, const float *a, uint32_t lda, uint64_t stride_a, const float *c, uint32_t ldc,
		     uint64_t stride_c, float *y, uint32_t ldy, uint64_t stride_y, uint32_t batch)
{
	const float one = 1, zero = 0;

	if (b->failed)
		return;
	blas_ok(b,
		cublasGemmStridedBatchedEx(b->blas, ta, tb, (int)m, (int)n, (int)k, &one, a, CUDA_R_32F,
					   (int)lda, (long long)stride_a, c, CUDA_R_32F, (int)ldc,
					   (long long)stride_c, &zero, y, CUDA_R_32F, (int)ldy,
					   (long long)stride_y, (int)batch, b->math, CUBLAS_GEMM_DEFAULT),
		"cublasGemmStridedBatchedEx");
}

void product_forward(struct cuda_backend *b, const float *w, uint32_t in, uint32_t out, const float *x,
		     uint32_t xld, float *y, uint32_t yld, uint32_t lanes)
{
	uint64_t rows = b->rows.padded;

	multiply(b, CUBLAS_OP_T, CUBLAS_OP_N, out, b->rows.padded, in, w, in, b->net.stride, x, xld, rows * xld,
		 y, yld, rows * yld, lanes);
}

void product_input(struct cuda_backend *b, const float *w, uint32_t in, uint32_t out, const float *dy,
		   uint32_t dyld, float *dx, uint32_t dxld, uint32_t lanes)
{
	uint64_t rows = b->rows.padded;

	multiply(b, CUBLAS_OP_N, CUBLAS_OP_N, in, b->rows.padded, out, w, in, b->net.stride, dy, dyld,
		 rows * dyld, dx, dxld, rows * dxld, lanes);
}

/* The rows of a lane in SPLITS parts, each a product of its own: one per lane would leave most of the device
 * idle. */
void product_weight(struct cuda_backend *b, float *dw, uint32_t in, uint32_t out, const float *x, uint32_t xld,
		    const float *dy, uint32_t dyld, uint32_t lanes)
{
	uint32_t rows = b->rows.padded / SPLITS;
	struct segments to = {{{0, 0, in * out}}, 1};

	multiply(b, CUBLAS_OP_N, CUBLAS_OP_T, in, out, rows, x, xld, (uint64_t)rows * xld, dy, dyld,
		 (uint64_t)rows * dyld, b->part, in, (uint64_t)in * out, lanes * SPLITS);
	sum_parts(b, b->part, SPLITS, in * out, dw, &to, lanes);
}

/* grid (cols / BLOCK, lanes) */
static __global__ void add_parts(const float *part, uint32_t parts, uint32_t cols, float *grad, uint32_t stride,
				 struct segments to)
{
	uint32_t col = blockIdx.x * BLOCK + threadIdx.x, lane = blockIdx.y;
	float sum = 0;

	if (col >= cols)
		return;
	part += (size_t)lane * parts * cols + col;
	for (uint32_t p = 0; p < parts; p++)
		sum += part[(size_t)p * cols];
	for (uint32_t i = 0; i < to.count; i++)
		if (col - to.s[i].src < to.s[i].len) /* unsigned: below src is far above */
			grad[(size_t)lane * stride + to.s[i].dst + (col - to.s[i].src)] = sum;
}

void sum_parts(struct cuda_backend *b, const float *part, uint32_t parts, uint32_t cols, float *grad,
	       const struct segments *to, uint32_t lanes)
{
	LAUNCH(b, add_parts, dim3((cols + BLOCK - 1) / BLOCK, lanes), 0, part, parts, cols, grad, b->net.stride,
	       *to);
}
