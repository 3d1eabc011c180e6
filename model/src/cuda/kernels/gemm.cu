// out = x * weights^T, one matrix for all rows or one for each group of rows (an expert's). A row's sums run along k in one
// order, whatever the tile: its result does not depend on its batch.

// One group: `rows` rows in order. More: group g has the rows from ends[g - 1] to ends[g]; row i of them all is x[order[i]].
struct Gemm {
    const void *x;
    const void *const *weights;
    void *out;
    const float *x_scales;
    const float *const *weight_scales;
    const int *ends;
    const int *order;
    int rows, groups, n, k, scale_groups;
};

// Which group and rows a block has; false if none.
__device__ __forceinline__ bool find_tile(const Gemm &g, int tile_rows, int &group, int &first, int &last) {
    if (!g.ends) {
        group = 0, first = blockIdx.y * tile_rows, last = g.rows;
        return first < last;
    }
    int tile = blockIdx.y, start = 0;
    for (group = 0; group < g.groups; group++) {
        int end = g.ends[group], tiles = (end - start + tile_rows - 1) / tile_rows;
        if (tile < tiles) {
            first = start + tile * tile_rows, last = end;
            return true;
        }
        tile -= tiles;
        start = end;
    }
    return false;
}

#if !ROUNDS
// 32-bit: 64 x 64 of the result by 256 threads, 16 of k at a time.
extern "C" __global__ void __launch_bounds__(256) gemm_f32(Gemm g) {
    __shared__ float a[16][68], b[16][68];
    int group, first, last;
    if (!find_tile(g, 64, group, first, last)) return;
    const float *x = (const float *)g.x, *w = (const float *)g.weights[group];
    int column = blockIdx.x * 64, tx = threadIdx.x % 16, ty = threadIdx.x / 16;
    float sums[4][4] = {};
    for (int k = 0; k < g.k; k += 16) {
        for (int i = threadIdx.x; i < 64 * 16; i += 256) {
            int row = i / 16, at = k + i % 16;
            bool has = first + row < last && at < g.k;
            u64 source = has ? (g.order ? g.order[first + row] : first + row) : 0;
            a[i % 16][row] = has ? x[source * g.k + at] : 0.0f;
            b[i % 16][row] = column + row < g.n && at < g.k ? w[(u64)(column + row) * g.k + at] : 0.0f;
        }
        __syncthreads();
        for (int i = 0; i < 16; i++)
            for (int r = 0; r < 4; r++)
                for (int c = 0; c < 4; c++) sums[r][c] = fmaf(a[i][ty * 4 + r], b[i][tx * 4 + c], sums[r][c]);
        __syncthreads();
    }
    for (int r = 0; r < 4; r++)
        for (int c = 0; c < 4; c++) {
            int row = first + ty * 4 + r, col = column + tx * 4 + c;
            if (row < last && col < g.n) ((float *)g.out)[(u64)row * g.n + col] = sums[r][c];
        }
}
#else
// Tensor cores: BM x BN of the result, WM x WN of it by each warp. A stage is 128 bytes of k of each row: 64 elements of bf16, or
// 128 of FP8, which is what a scale is for. Rows lie in shared memory with their 16-byte pieces exchanged by row, so that eight
// rows of a piece touch all banks. The scales of a stage's rows and columns come with it, behind all stages.
template <Multiply KIND, int BM, int BN, int WM, int WN, int STAGES>
__device__ void gemm(const Gemm &g) {
    constexpr int WARPS = (BM / WM) * (BN / WN), THREADS = WARPS * 32, STAGE = (BM + BN) * 128, PIECE = KIND == FP8 ? 16 : 8;
    extern __shared__ __align__(1024) u8 stages[];
    int group, first, last;
    if (!find_tile(g, BM, group, first, last)) return;
    const int thread = threadIdx.x, lane = thread % 32, warp = thread / 32;
    const int warp_m = warp / (BN / WN) * WM, warp_n = warp % (BN / WN) * WN, column = blockIdx.x * BN;
    const u32 base = shared_address(stages);
    constexpr int BYTES = KIND == FP8 ? 1 : 2;
    const u8 *x = (const u8 *)g.x, *w = (const u8 *)g.weights[group];
    const u64 pitch = (u64)g.k * BYTES;
    const int steps = (g.k + PIECE * 8 - 1) / (PIECE * 8);

    // A thread copies the same piece of every so many rows.
    constexpr int ROWS_AT_ONCE = THREADS / 8;
    constexpr int A_COPIES = (BM + ROWS_AT_ONCE - 1) / ROWS_AT_ONCE, B_COPIES = (BN + ROWS_AT_ONCE - 1) / ROWS_AT_ONCE;
    const int piece = thread % 8, copy_row = thread / 8;
    const u8 *a_from[A_COPIES], *b_from[B_COPIES];
#pragma unroll
    for (int i = 0; i < A_COPIES; i++) {
        int row = first + copy_row + i * ROWS_AT_ONCE;
        bool has = row < last && copy_row + i * ROWS_AT_ONCE < BM;
        u64 source = has ? (g.order ? g.order[row] : row) : 0;
        a_from[i] = has ? x + source * pitch : nullptr;
    }
#pragma unroll
    for (int i = 0; i < B_COPIES; i++) {
        int row = column + copy_row + i * ROWS_AT_ONCE;
        b_from[i] = row < g.n ? w + (u64)row * pitch : nullptr;
    }
    constexpr int SCALES = KIND == FP8 ? BM + BN : 0, S_COPIES = KIND == FP8 ? (SCALES + THREADS - 1) / THREADS : 1;
    const float *s_from[S_COPIES];
    if (KIND == FP8) {
#pragma unroll
        for (int i = 0; i < S_COPIES; i++) {
            int at = thread + i * THREADS, row = first + at, col = column + at - BM;
            if (at < BM) s_from[i] = row < last ? g.x_scales + (u64)(g.order ? g.order[row] : row) * g.scale_groups : nullptr;
            else s_from[i] = at < SCALES && col < g.n ? g.weight_scales[group] + (u64)col * g.scale_groups : nullptr;
        }
    }
    auto load = [&](int step) {
        u32 to = base + step % STAGES * STAGE;
        int at = (step * 8 + piece) * 16;
        bool inside = (u64)at < pitch;
#pragma unroll
        for (int i = 0; i < A_COPIES; i++) {
            int row = copy_row + i * ROWS_AT_ONCE;
            bool has = a_from[i] && inside;
            if (BM % ROWS_AT_ONCE == 0 || row < BM) copy_16(to + row * 128 + ((piece ^ (row & 7)) << 4), has ? a_from[i] + at : x, has);
        }
        to += BM * 128;
#pragma unroll
        for (int i = 0; i < B_COPIES; i++) {
            int row = copy_row + i * ROWS_AT_ONCE;
            bool has = b_from[i] && inside;
            copy_16(to + row * 128 + ((piece ^ (row & 7)) << 4), has ? b_from[i] + at : w, has);
        }
        if (KIND == FP8) {
            to = base + STAGES * STAGE + step % STAGES * SCALES * 4;
#pragma unroll
            for (int i = 0; i < S_COPIES; i++) {
                int scale = thread + i * THREADS;
                if (scale < SCALES) copy_4(to + scale * 4, s_from[i] ? s_from[i] + step : g.x_scales, s_from[i]);
            }
        }
    };

    float sums[WM / 16][WN / 8][4] = {};
    for (int step = 0; step < STAGES - 1; step++) {
        if (step < steps) load(step);
        copies_end();
    }
    for (int step = 0; step < steps; step++) {
        copies_wait<STAGES - 2>();
        __syncthreads();
        if (step + STAGES - 1 < steps) load(step + STAGES - 1);
        copies_end();
        u32 a_base = base + step % STAGES * STAGE, b_base = a_base + BM * 128;
        float part[KIND == FP8 ? WM / 16 : 1][KIND == FP8 ? WN / 8 : 1][4] = {};
#pragma unroll
        for (int kk = 0; kk < 4; kk++) {
            u32 a[WM / 16][4];
#pragma unroll
            for (int m = 0; m < WM / 16; m++) {
                int row = warp_m + m * 16 + lane % 16, at = kk * 2 + lane / 16;
                load_matrices(a[m], a_base + row * 128 + ((at ^ (row & 7)) << 4));
            }
#pragma unroll
            for (int n = 0; n < WN / 16; n++) {
                u32 b[4];
                int row = warp_n + n * 16 + lane % 8 + lane / 16 * 8, at = kk * 2 + lane / 8 % 2;
                load_matrices(b, b_base + row * 128 + ((at ^ (row & 7)) << 4));
#pragma unroll
                for (int m = 0; m < WM / 16; m++) {
                    if (KIND == FP8) {
                        multiply<KIND>(part[m][n * 2], a[m], b[0], b[1]);
                        multiply<KIND>(part[m][n * 2 + 1], a[m], b[2], b[3]);
                    } else {
                        multiply<KIND>(sums[m][n * 2], a[m], b[0], b[1]);
                        multiply<KIND>(sums[m][n * 2 + 1], a[m], b[2], b[3]);
                    }
                }
            }
        }
        if (KIND == FP8) {
            const float *of_rows = (const float *)(stages + STAGES * STAGE) + step % STAGES * SCALES + warp_m + lane / 4;
            const float *of_cols = (const float *)(stages + STAGES * STAGE) + step % STAGES * SCALES + BM + warp_n + lane % 4 * 2;
            float of_col[WN / 8][2];
#pragma unroll
            for (int n = 0; n < WN / 8; n++) of_col[n][0] = of_cols[n * 8], of_col[n][1] = of_cols[n * 8 + 1];
#pragma unroll
            for (int m = 0; m < WM / 16; m++) {
                float of_row[2] = {of_rows[m * 16], of_rows[m * 16 + 8]};
#pragma unroll
                for (int n = 0; n < WN / 8; n++)
#pragma unroll
                    for (int i = 0; i < 4; i++) sums[m][n][i] += part[m][n][i] * (of_row[i / 2] * of_col[n][i % 2]);
            }
        }
    }
    copies_wait<0>();
#pragma unroll
    for (int m = 0; m < WM / 16; m++)
#pragma unroll
        for (int n = 0; n < WN / 8; n++)
#pragma unroll
            for (int half = 0; half < 2; half++) {
                int row = first + warp_m + m * 16 + lane / 4 + half * 8, col = column + warp_n + n * 8 + lane % 4 * 2;
                if (row >= last) continue;
                bf16 *to = (bf16 *)g.out + (u64)row * g.n + col;
                float low = sums[m][n][half * 2], high = sums[m][n][half * 2 + 1];
                if (col + 1 < g.n && g.n % 2 == 0)
                    *(u32 *)to = pack<BF16>(low, high);
                else {
                    if (col < g.n) store(to, low);
                    if (col + 1 < g.n) store(to + 1, high);
                }
            }
}
extern "C" __global__ void __launch_bounds__(128) gemm_bf16_16(Gemm g) { gemm<BF16, 16, 128, 16, 32, 4>(g); }
extern "C" __global__ void __launch_bounds__(256) gemm_bf16_64(Gemm g) { gemm<BF16, 64, 128, 32, 32, 4>(g); }
extern "C" __global__ void __launch_bounds__(256) gemm_bf16_128(Gemm g) { gemm<BF16, 128, 256, 64, 64, 4>(g); }
extern "C" __global__ void __launch_bounds__(128) gemm_fp8_16(Gemm g) { gemm<FP8, 16, 128, 16, 32, 4>(g); }
extern "C" __global__ void __launch_bounds__(256) gemm_fp8_64(Gemm g) { gemm<FP8, 64, 128, 32, 32, 4>(g); }
extern "C" __global__ void __launch_bounds__(256) gemm_fp8_128(Gemm g) { gemm<FP8, 128, 128, 64, 32, 4>(g); }
#endif
