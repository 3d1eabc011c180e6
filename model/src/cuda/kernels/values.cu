// Values as they are stored and rounded.

__device__ __forceinline__ float value_of(float value) { return value; }
__device__ __forceinline__ float value_of(bf16 value) { return __uint_as_float((u32)value.bits << 16); }
__device__ __forceinline__ void store(float *place, float value) { *place = value; }
__device__ __forceinline__ void store(bf16 *place, float value) { place->bits = bf16_bits(value); }

#if ROUNDS
typedef bf16 T;
__device__ __forceinline__ float rounded(float value) { return __uint_as_float((u32)bf16_bits(value) << 16); }
#else
typedef float T;
__device__ __forceinline__ float rounded(float value) { return value; }
#endif

// The sum over a block of up to 1024 threads, in every thread. Always in the same order.
__device__ __forceinline__ float block_sum(float value) {
    __shared__ float parts[32];
    for (int step = 16; step; step /= 2) value += __shfl_xor_sync(~0u, value, step);
    int warps = (blockDim.x + 31) / 32;
    __syncthreads();
    if (threadIdx.x % 32 == 0) parts[threadIdx.x / 32] = value;
    __syncthreads();
    float sum = 0;
    for (int warp = 0; warp < warps; warp++) sum += parts[warp];
    return sum;
}
