/* SPDX-License-Identifier: MIT */
/* What the device can do at most, measured: a large copy, a large TF32 product. Random data: zeros run faster.
 */
#include <cublas_v2.h>
#include <cuda_runtime.h>

static __global__ void scatter(float *p, size_t n)
{
	for (size_t i = blockIdx.x * (size_t)blockDim.x + threadIdx.x; i < n;
	     i += (size_t)gridDim.x * blockDim.x) {
		unsigned x = (unsigned)i * 2654435761u;

		x ^= x >> 15;
		x *= 2246822519u;
		p[i] = (float)(x >> 8) * 0x1p-24f - 0.5f;
	}
}

template <typename F> static double milliseconds(int times, F f)
{
	cudaEvent_t from, to;
	float ms = -1;

	if (cudaEventCreate(&from) != cudaSuccess || cudaEventCreate(&to) != cudaSuccess)
		return -1;
	for (int i = 0; i < 3; i++)
		f();
	cudaEventRecord(from);
	for (int i = 0; i < times; i++)
		f();
	cudaEventRecord(to);
	if (cudaEventSynchronize(to) != cudaSuccess || cudaEventElapsedTime(&ms, from, to) != cudaSuccess)
		return -1;
	cudaEventDestroy(from);
	cudaEventDestroy(to);
	return ms / times;
}

/* GB/s, bytes read and written, and TFLOP/s; -1: could not be measured. */
extern "C" void ceilings(double *copy, double *tf32)
{
	const size_t n = (size_t)1 << 29; /* 2 GiB each */
	const int side = 8192;
	const float one = 1, zero = 0;
	float *a = NULL, *b = NULL;
	cublasHandle_t blas = NULL;
	double ms;

	*copy = *tf32 = -1;
	if (cudaMalloc(&a, n * 4) == cudaSuccess && cudaMalloc(&b, n * 4) == cudaSuccess &&
	    cublasCreate(&blas) == CUBLAS_STATUS_SUCCESS) {
		scatter<<<2048, 256>>>(a, n);
		ms = milliseconds(20, [&] { cudaMemcpyAsync(b, a, n * 4, cudaMemcpyDeviceToDevice); });
		if (ms > 0 && cudaGetLastError() == cudaSuccess)
			*copy = 2.0 * (double)n * 4 / ms / 1e6;
		ms = milliseconds(10, [&] {
			cublasGemmEx(blas, CUBLAS_OP_T, CUBLAS_OP_N, side, side, side, &one, a, CUDA_R_32F,
				     side, a + (size_t)side * side, CUDA_R_32F, side, &zero, b, CUDA_R_32F,
				     side, CUBLAS_COMPUTE_32F_FAST_TF32, CUBLAS_GEMM_DEFAULT);
		});
		if (ms > 0 && cudaGetLastError() == cudaSuccess)
			*tf32 = 2.0 * side * side * side / ms / 1e9;
	}
	cublasDestroy(blas);
	cudaFree(a);
	cudaFree(b);
}
