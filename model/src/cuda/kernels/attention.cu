// Decode attention: the query heads of a row share one key and value head, whose cache lies in pages of 16 tokens,
// [layers, pages, key or value, 16, head_dim]. A sequence is cut every `split` tokens, whatever else is in the batch; each part
// has a softmax of its own, and the parts are joined at the end.

struct Rows {
    const int *position;  // [rows]
    const int *table;     // [rows, pages_a_row]: the pages of each row's sequence
    int pages_a_row;
    u64 layer;            // where the layer's pages begin, in pages
};

// Rotates the queries in place and the key on its way into the cache; pairs are i and i + head_dim / 2. One block a row; `qkv`
// holds the key and value from `key_at` on.
extern "C" __global__ void rotate_and_store(T *q, const T *kv, u32 kv_stride, u32 key_at, T *cache, Rows rows, const float *frequencies, int heads, int head_dim) {
    extern __shared__ float turn[];
    int half = head_dim / 2, row = blockIdx.x, position = rows.position[row];
    for (int i = threadIdx.x; i < half; i += blockDim.x) {
        float angle = (float)position * frequencies[i];
        turn[i] = rounded(cosf(angle));
        turn[half + i] = rounded(sinf(angle));
    }
    __syncthreads();
    T *queries = q + (u64)row * heads * head_dim;
    for (int i = threadIdx.x; i < heads * half; i += blockDim.x) {
        T *a = queries + i / half * head_dim + i % half, *b = a + half;
        float x = value_of(*a), y = value_of(*b), c = turn[i % half], s = turn[half + i % half];
        store(a, rounded(x * c) - rounded(y * s));
        store(b, rounded(y * c) + rounded(x * s));
    }
    u64 page = rows.layer + rows.table[(u64)row * rows.pages_a_row + position / 16];
    T *to = cache + page * 32 * head_dim + position % 16 * head_dim;
    const T *key = kv + (u64)row * kv_stride + key_at, *value = key + head_dim;
    for (int i = threadIdx.x; i < half; i += blockDim.x) {
        float x = value_of(key[i]), y = value_of(key[i + half]), c = turn[i], s = turn[half + i];
        store(to + i, rounded(x * c) - rounded(y * s));
        store(to + i + half, rounded(y * c) + rounded(x * s));
        to[16 * head_dim + i] = value[i];
        to[16 * head_dim + i + half] = value[i + half];
    }
}

// Any shape: one block of 128 threads for a head of a row and a part.
extern "C" __global__ void __launch_bounds__(128) attend(T *out, float *parts, float *states, const T *q, const T *cache, Rows rows, int heads, int head_dim, int split, int splits, float scale) {
    extern __shared__ float scratch[];
    float *query = scratch, *scores = scratch + head_dim, *sums = scores + 128;
    int head = blockIdx.z, row = blockIdx.y, part = blockIdx.x, position = rows.position[row];
    int from = part * split, until = min(position + 1, from + split);
    if (from > position) return;
    for (int i = threadIdx.x; i < head_dim; i += 128) {
        query[i] = value_of(q[((u64)row * heads + head) * head_dim + i]);
        sums[i] = 0;
    }
    const int *table = rows.table + (u64)row * rows.pages_a_row;
    float most = -__int_as_float(0x7f800000), sum = 0;
    __shared__ float shared_most[4];
    for (int first = from; first < until; first += 128) {
        __syncthreads();
        int token = first + threadIdx.x;
        float score = -__int_as_float(0x7f800000);
        if (token < until) {
            const T *key = cache + (rows.layer + table[token / 16]) * 32 * head_dim + token % 16 * head_dim;
            score = 0;
            for (int i = 0; i < head_dim; i++) score = fmaf(query[i], value_of(key[i]), score);
            score *= scale;
        }
        float highest = score;
        for (int step = 16; step; step /= 2) highest = fmaxf(highest, __shfl_xor_sync(~0u, highest, step));
        if (threadIdx.x % 32 == 0) shared_most[threadIdx.x / 32] = highest;
        __syncthreads();
        float now = fmaxf(most, fmaxf(fmaxf(shared_most[0], shared_most[1]), fmaxf(shared_most[2], shared_most[3])));
        float before = expf(most - now), p = token < until ? expf(score - now) : 0.0f;
        most = now;
        sum = sum * before + block_sum(p);
        scores[threadIdx.x] = rounded(p);
        __syncthreads();
        int tokens = min(128, until - first);
        for (int i = threadIdx.x; i < head_dim; i += 128) {
            float value = sums[i] * before;
            for (int t = 0; t < tokens; t++)
                value = fmaf(scores[t], value_of(cache[(rows.layer + table[(first + t) / 16]) * 32 * head_dim + (16 + (first + t) % 16) * head_dim + i]), value);
            sums[i] = value;
        }
    }
    bool whole = position < split;
    u64 place = ((u64)row * splits + part) * heads + head;
    for (int i = threadIdx.x; i < head_dim; i += 128) {
        if (whole) store(out + ((u64)row * heads + head) * head_dim + i, sums[i] / sum);
        else parts[place * head_dim + i] = sums[i];
    }
    if (!whole && threadIdx.x == 0) states[place * 2] = most, states[place * 2 + 1] = sum;
}

// Joins the parts of a row that has more than one. One block for a head of a row.
extern "C" __global__ void join(T *out, const float *parts, const float *states, Rows rows, int heads, int head_dim, int split, int splits) {
    int head = blockIdx.y, row = blockIdx.x, used = rows.position[row] / split + 1;
    if (used == 1) return;
    float most = -__int_as_float(0x7f800000), sum = 0;
    for (int part = 0; part < used; part++) most = fmaxf(most, states[(((u64)row * splits + part) * heads + head) * 2]);
    for (int part = 0; part < used; part++) {
        const float *state = states + (((u64)row * splits + part) * heads + head) * 2;
        sum += state[1] * expf(state[0] - most);
    }
    for (int i = threadIdx.x; i < head_dim; i += blockDim.x) {
        float value = 0;
        for (int part = 0; part < used; part++) {
            u64 place = ((u64)row * splits + part) * heads + head;
            value += parts[place * head_dim + i] * expf(states[place * 2] - most);
        }
        store(out + ((u64)row * heads + head) * head_dim + i, value / sum);
    }
}

#if ROUNDS
// The released shape on tensor cores: 64 heads of 256 elements, which read keys and values once for all. Four warps have 16 heads
// each; 32 tokens at a time; two blocks on a multiprocessor, so that one computes while the other waits. Rows lie in shared memory
// with their 16-byte pieces exchanged by row. An FP8 cache is widened to half precision on its way.
template <bool IS_FP8>
__device__ void attend_64_256(bf16 *out, float *parts, float *states, const bf16 *q, const u8 *cache, Rows rows, int heads, int split, int splits, float scale) {
    constexpr Multiply KIND = IS_FP8 ? F16 : BF16;
    constexpr int D = 256, TOKENS = 32, ROW = D * 2, BYTES = IS_FP8 ? 1 : 2, TILE = TOKENS * D * BYTES, STAGES = IS_FP8 ? 3 : 2;
    extern __shared__ __align__(1024) u8 stages[];
    const int thread = threadIdx.x, lane = thread % 32, warp = thread / 32;
    const int row = blockIdx.y, part = blockIdx.x, position = rows.position[row], first_head = blockIdx.z * 64;
    const int from = part * split, until = min(position + 1, from + split);
    if (from > position) return;
    const u32 q_base = shared_address(stages), wide_base = q_base + 64 * ROW, raw_base = wide_base + (IS_FP8 ? 2 * TOKENS * ROW : 0);
    const int *table = rows.table + (u64)row * rows.pages_a_row;
    const u64 page_bytes = (u64)32 * D * BYTES;

    const bf16 *queries = q + ((u64)row * heads + first_head) * D;
    for (int i = thread; i < 64 * 32; i += 128) {
        int r = i / 32, piece = i % 32;
        u32 to = r * ROW + ((piece ^ (r & 7)) << 4);
        uint4 eight = *(const uint4 *)(queries + r * D + piece * 8);
        if (IS_FP8) {
            u32 *words = (u32 *)&eight;
            for (int j = 0; j < 4; j++) words[j] = pack<F16>(__uint_as_float(words[j] << 16), __uint_as_float(words[j] & 0xffff0000u));
        }
        *(uint4 *)(stages + to) = eight;
    }
    const int tiles = (until - from + TOKENS - 1) / TOKENS;
    constexpr int PIECES = D * BYTES / 16;  // of a token's key
    auto load = [&](int tile) {
        u32 to = raw_base + tile % STAGES * 2 * TILE;
#pragma unroll 4
        for (int i = 0; i < 2 * TOKENS * PIECES / 128; i++) {
            int at = i * 128 + thread, piece = at % PIECES, token = at / PIECES % TOKENS, which = at / PIECES / TOKENS;
            int global = from + tile * TOKENS + token;
            bool has = global < until;
            const u8 *page = cache + (rows.layer + (has ? table[global / 16] : table[0])) * page_bytes;
            int place = IS_FP8 ? piece : piece ^ (token & 7);
            copy_16(to + which * TILE + token * D * BYTES + (place << 4), page + (which * 16 + global % 16) * D * BYTES + piece * 16, has);
        }
    };
    float sums[32][4] = {}, most[2], sum[2] = {0, 0};
    most[0] = most[1] = -__int_as_float(0x7f800000);
    for (int tile = 0; tile < STAGES - 1; tile++) {
        if (tile < tiles) load(tile);
        copies_end();
    }
    for (int tile = 0; tile < tiles; tile++) {
        copies_wait<STAGES - 2>();
        __syncthreads();
        if (tile + STAGES - 1 < tiles) load(tile + STAGES - 1);
        copies_end();
        u32 k_base = raw_base + tile % STAGES * 2 * TILE, v_base = k_base + TILE;
        if (IS_FP8) {
            const u8 *raw = stages + (k_base - q_base);
            u8 *wide = stages + (wide_base - q_base);
#pragma unroll 2
            for (int i = 0; i < 2 * TOKENS * D / 16 / 128; i++) {
                int at = i * 128 + thread, piece = at % 16, token = at / 16;
                uint4 codes = *(const uint4 *)(raw + at * 16);
                u32 values[8];
                const u32 *words = (const u32 *)&codes;
#pragma unroll
                for (int j = 0; j < 4; j++) {
                    values[2 * j] = halves_of_fp8((u16)words[j]);
                    values[2 * j + 1] = halves_of_fp8((u16)(words[j] >> 16));
                }
                *(uint4 *)(wide + token * ROW + (((2 * piece) ^ (token & 7)) << 4)) = *(uint4 *)values;
                *(uint4 *)(wide + token * ROW + (((2 * piece + 1) ^ (token & 7)) << 4)) = *(uint4 *)(values + 4);
            }
            k_base = wide_base, v_base = wide_base + TOKENS * ROW;
            __syncthreads();
        }
        float scores[4][4] = {};
#pragma unroll 4
        for (int kk = 0; kk < 16; kk++) {
            u32 a[4], b[4];
            int r = warp * 16 + lane % 16;
            load_matrices(a, q_base + r * ROW + (((kk * 2 + lane / 16) ^ (r & 7)) << 4));
#pragma unroll
            for (int n = 0; n < 2; n++) {
                int token = n * 16 + lane % 8 + lane / 16 * 8;
                load_matrices(b, k_base + token * ROW + (((kk * 2 + lane / 8 % 2) ^ (token & 7)) << 4));
                multiply<KIND>(scores[n * 2], a, b[0], b[1]);
                multiply<KIND>(scores[n * 2 + 1], a, b[2], b[3]);
            }
        }
        int last = until - from - tile * TOKENS;
        float highest[2] = {most[0], most[1]};
#pragma unroll
        for (int n = 0; n < 4; n++)
#pragma unroll
            for (int i = 0; i < 4; i++) {
                bool has = n * 8 + lane % 4 * 2 + i % 2 < last;
                scores[n][i] = has ? scores[n][i] * scale : -__int_as_float(0x7f800000);
                highest[i / 2] = fmaxf(highest[i / 2], scores[n][i]);
            }
        float before[2];
#pragma unroll
        for (int half = 0; half < 2; half++) {
            highest[half] = fmaxf(highest[half], __shfl_xor_sync(~0u, highest[half], 1));
            highest[half] = fmaxf(highest[half], __shfl_xor_sync(~0u, highest[half], 2));
            before[half] = exp2f((most[half] - highest[half]) * 1.4426950408889634f);
            most[half] = highest[half];
            sum[half] *= before[half];
        }
#pragma unroll
        for (int n = 0; n < 4; n++)
#pragma unroll
            for (int i = 0; i < 4; i++) {
                scores[n][i] = exp2f((scores[n][i] - most[i / 2]) * 1.4426950408889634f);
                sum[i / 2] += scores[n][i];
            }
        if (__any_sync(~0u, before[0] != 1.0f || before[1] != 1.0f)) {
#pragma unroll
            for (int n = 0; n < 32; n++)
#pragma unroll
                for (int i = 0; i < 4; i++) sums[n][i] *= before[i / 2];
        }
#pragma unroll
        for (int kk = 0; kk < 2; kk++) {
            u32 a[4] = {pack<KIND>(scores[kk * 2][0], scores[kk * 2][1]), pack<KIND>(scores[kk * 2][2], scores[kk * 2][3]),
                        pack<KIND>(scores[kk * 2 + 1][0], scores[kk * 2 + 1][1]), pack<KIND>(scores[kk * 2 + 1][2], scores[kk * 2 + 1][3])};
            int token = kk * 16 + lane % 16;
#pragma unroll
            for (int n = 0; n < 16; n++) {
                u32 b[4];
                load_matrices_transposed(b, v_base + token * ROW + (((n * 2 + lane / 16) ^ (token & 7)) << 4));
                multiply<KIND>(sums[n * 2], a, b[0], b[1]);
                multiply<KIND>(sums[n * 2 + 1], a, b[2], b[3]);
            }
        }
        if (IS_FP8) __syncthreads();
    }
    copies_wait<0>();
    bool whole = position < split;
#pragma unroll
    for (int half = 0; half < 2; half++) {
        sum[half] += __shfl_xor_sync(~0u, sum[half], 1);
        sum[half] += __shfl_xor_sync(~0u, sum[half], 2);
        int head = first_head + warp * 16 + lane / 4 + half * 8;
        u64 place = ((u64)row * splits + part) * heads + head;
        if (whole) {
            bf16 *to = out + ((u64)row * heads + head) * D + lane % 4 * 2;
#pragma unroll
            for (int n = 0; n < 32; n++) *(u32 *)(to + n * 8) = pack<BF16>(sums[n][half * 2] / sum[half], sums[n][half * 2 + 1] / sum[half]);
        } else {
            float *to = parts + place * D + lane % 4 * 2;
#pragma unroll
            for (int n = 0; n < 32; n++) *(float2 *)(to + n * 8) = make_float2(sums[n][half * 2], sums[n][half * 2 + 1]);
            if (lane % 4 == 0) states[place * 2] = most[half], states[place * 2 + 1] = sum[half];
        }
    }
}
extern "C" __global__ void __launch_bounds__(128, 2) attend_bf16(bf16 *out, float *parts, float *states, const bf16 *q, const u8 *cache, Rows rows, int heads, int split, int splits, float scale) {
    attend_64_256<false>(out, parts, states, q, cache, rows, heads, split, splits, scale);
}
extern "C" __global__ void __launch_bounds__(128, 2) attend_fp8(bf16 *out, float *parts, float *states, const bf16 *q, const u8 *cache, Rows rows, int heads, int split, int splits, float scale) {
    attend_64_256<true>(out, parts, states, q, cache, rows, heads, split, splits, scale);
}
#endif
