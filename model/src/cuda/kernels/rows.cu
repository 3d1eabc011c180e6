// What is done row by row or element by element.

// x[row] = table[tokens[row]]. One block a row.
template <typename W> __device__ void embed(T *x, const W *table, const u32 *tokens, int width) {
    const W *from = table + (u64)tokens[blockIdx.x] * width;
    T *to = x + (u64)blockIdx.x * width;
    for (int i = threadIdx.x; i < width; i += blockDim.x) store(to + i, value_of(from[i]));
}
extern "C" __global__ void embed_f32(T *x, const float *table, const u32 *tokens, int width) { embed(x, table, tokens, width); }
extern "C" __global__ void embed_bf16(T *x, const bf16 *table, const u32 *tokens, int width) { embed(x, table, tokens, width); }

// out = weight * x / sqrt(mean(x^2) + eps), rounded before and after the weight. One block a row.
extern "C" __global__ void rms_norm(T *out, const T *x, u32 x_stride, const float *weight, int width, float eps) {
    const T *from = x + (u64)blockIdx.x * x_stride;
    T *to = out + (u64)blockIdx.x * width;
    float squares = 0;
    for (int i = threadIdx.x; i < width; i += blockDim.x) squares += value_of(from[i]) * value_of(from[i]);
    float scale = 1.0f / sqrtf(block_sum(squares) / width + eps);
    for (int i = threadIdx.x; i < width; i += blockDim.x) store(to + i, rounded(value_of(from[i]) * scale) * weight[i]);
}

// x += added, then its norm into out. One block a row.
extern "C" __global__ void add_rms_norm(T *out, T *x, const T *added, const float *weight, int width, float eps) {
    T *row = x + (u64)blockIdx.x * width, *to = out + (u64)blockIdx.x * width;
    const T *more = added + (u64)blockIdx.x * width;
    float squares = 0;
    for (int i = threadIdx.x; i < width; i += blockDim.x) {
        float sum = rounded(value_of(row[i]) + value_of(more[i]));
        store(row + i, sum);
        squares += sum * sum;
    }
    float scale = 1.0f / sqrtf(block_sum(squares) / width + eps);
    for (int i = threadIdx.x; i < width; i += blockDim.x) store(to + i, rounded(value_of(row[i]) * scale) * weight[i]);
}

// out[row] = silu(gate) * up, of both[row] = gate and up side by side. One thread an element.
extern "C" __global__ void silu_times(T *out, const T *both, int width, u64 elements) {
    for (u64 i = (u64)blockIdx.x * blockDim.x + threadIdx.x; i < elements; i += (u64)gridDim.x * blockDim.x) {
        const T *row = both + i / width * 2 * width;
        float gate = value_of(row[i % width]), up = value_of(row[width + i % width]);
        store(out + i, rounded(gate / (1.0f + expf(-gate))) * up);
    }
}

struct Partials {
    const void *of[64];
};

// x += the partial results, summed in their order first.
template <typename P> __device__ void combine(T *x, Partials partials, int count, u64 elements) {
    for (u64 i = (u64)blockIdx.x * blockDim.x + threadIdx.x; i < elements; i += (u64)gridDim.x * blockDim.x) {
        float sum = value_of(((const P *)partials.of[0])[i]);
        for (int part = 1; part < count; part++) sum += value_of(((const P *)partials.of[part])[i]);
        store(x + i, value_of(x[i]) + rounded(sum));
    }
}
extern "C" __global__ void combine_f32(T *x, Partials partials, int count, u64 elements) { combine<float>(x, partials, count, elements); }
extern "C" __global__ void combine_bf16(T *x, Partials partials, int count, u64 elements) { combine<bf16>(x, partials, count, elements); }

// Rows as FP8: for every 128 elements the codes of what is divided by their scale. One warp a group.
extern "C" __global__ void quantise(u8 *codes, float *scales, const T *x, int width, int groups, u64 all) {
    u64 group = ((u64)blockIdx.x * blockDim.x + threadIdx.x) / 32;
    if (group >= all) return;
    u64 row = group / groups;
    int first = (int)(group % groups) * 128 + threadIdx.x % 32 * 4;
    float values[4], most = 0;
    for (int i = 0; i < 4; i++) {
        values[i] = first + i < width ? value_of(x[row * width + first + i]) : 0.0f;
        most = fmaxf(most, fabsf(values[i]));
    }
    for (int step = 16; step; step /= 2) most = fmaxf(most, __shfl_xor_sync(~0u, most, step));
    float scale = fmaxf(most, 1e-10f) / 448.0f;
    if (threadIdx.x % 32 == 0) scales[group] = scale;
    for (int i = 0; i < 4; i += 2) {
        u16 both = fp8_pair(values[i] / scale, values[i + 1] / scale);
        if (first + i < width) codes[row * width + first + i] = (u8)both;
        if (first + i + 1 < width) codes[row * width + first + i + 1] = (u8)(both >> 8);
    }
}

// And back: out = code * the scale of its 128 elements. One thread an element.
extern "C" __global__ void dequantise(T *out, const u8 *codes, const float *scales, int width, int groups, u64 elements) {
    for (u64 i = (u64)blockIdx.x * blockDim.x + threadIdx.x; i < elements; i += (u64)gridDim.x * blockDim.x)
        store(out + i, half_value((u16)halves_of_fp8(codes[i])) * scales[i / width * groups + i % width / 128]);
}

// Values that look like weights or activations, for measurements: even in -scale..scale, from a hash of place and seed.
__device__ __forceinline__ float noise(u64 place, u32 seed) {
    u64 bits = (place + 1) * 0x9e3779b97f4a7c15ull ^ (u64)seed * 0xd1b54a32d192ed03ull;
    bits = (bits ^ (bits >> 31)) * 0xbf58476d1ce4e5b9ull;
    return (float)((bits >> 40) & 0xffff) / 32768.0f - 1.0f;
}
extern "C" __global__ void fill(T *x, u64 elements, float scale, u32 seed) {
    for (u64 i = (u64)blockIdx.x * blockDim.x + threadIdx.x; i < elements; i += (u64)gridDim.x * blockDim.x)
        store(x + i, noise(i, seed) * scale);
}
extern "C" __global__ void fill_fp8(u8 *codes, u64 elements, u32 seed) {
    for (u64 i = (u64)blockIdx.x * blockDim.x + threadIdx.x; i < elements; i += (u64)gridDim.x * blockDim.x) {
        codes[i] = (u8)fp8_pair(noise(i, seed) * 100.0f, 0.0f);
    }
}
extern "C" __global__ void fill_f32(float *x, u64 elements, float value) {
    for (u64 i = (u64)blockIdx.x * blockDim.x + threadIdx.x; i < elements; i += (u64)gridDim.x * blockDim.x) x[i] = value;
}

// What a wait without stream memory operations would be: it is measured, never used.
extern "C" __global__ void spin(const volatile u64 *word) {
    while (*word == 0) {}
}
