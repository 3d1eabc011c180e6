// The router's choice, and the way of rows to their experts and back.

// For each row of scores the most likely experts over the softmax of all, the lower index first among equals. One warp a row.
// A row that is not finite gets the id 65535.
extern "C" __global__ void choose(u16 *ids, float *weights, const T *scores, int rows, int experts, int top_k, int normalises) {
    extern __shared__ float probabilities[];
    int row = blockIdx.x * (blockDim.x / 32) + threadIdx.x / 32, lane = threadIdx.x % 32;
    float *p = probabilities + threadIdx.x / 32 * experts;
    if (row >= rows) return;
    float most = -__int_as_float(0x7f800000);
    bool finite = true;
    for (int e = lane; e < experts; e += 32) {
        float score = value_of(scores[(u64)row * experts + e]);
        finite = finite && isfinite(score);
        p[e] = score;
        most = fmaxf(most, score);
    }
    finite = __all_sync(~0u, finite);
    for (int step = 16; step; step /= 2) most = fmaxf(most, __shfl_xor_sync(~0u, most, step));
    float sum = 0;
    for (int e = lane; e < experts; e += 32) sum += p[e] = expf(p[e] - most);
    for (int step = 16; step; step /= 2) sum += __shfl_xor_sync(~0u, sum, step);
    for (int e = lane; e < experts; e += 32) p[e] /= sum;
    float chosen = 0;
    for (int k = 0; k < top_k; k++) {
        float best = -1;
        int at = 0x7fffffff;
        for (int e = lane; e < experts; e += 32)
            if (p[e] > best) best = p[e], at = e;
        for (int step = 16; step; step /= 2) {
            float other = __shfl_xor_sync(~0u, best, step);
            int where = __shfl_xor_sync(~0u, at, step);
            if (other > best || (other == best && where < at)) best = other, at = where;
        }
        if (lane == at % 32 && at < experts) p[at] = -1;
        if (lane == 0) {
            ids[(u64)row * top_k + k] = finite ? (u16)at : (u16)65535;
            weights[(u64)row * top_k + k] = best;
        }
        chosen += best;
        __syncwarp();
    }
    for (int k = lane; k < top_k; k += 32) {
        float weight = weights[(u64)row * top_k + k];
        weights[(u64)row * top_k + k] = rounded(normalises ? weight / chosen : weight);
    }
}

// Sorts the visits to experts first .. first + count by expert and row: ends[e] is where the visits of expert e end, order[i]
// the row of visit i, place[v] where visit v went, or -1. One block of 32 warps; a warp has an expert at a time.
extern "C" __global__ void sort_visits(int *ends, int *order, int *place, const u16 *ids, int rows, int top_k, int first, int count) {
    extern __shared__ int held[];
    int warp = threadIdx.x / 32, lane = threadIdx.x % 32, visits = rows * top_k;
    for (int e = warp; e < count; e += 32) {
        int mine = 0;
        for (int v = lane; v < visits; v += 32) mine += ids[v] == first + e;
        for (int step = 16; step; step /= 2) mine += __shfl_xor_sync(~0u, mine, step);
        if (lane == 0) held[e] = mine;
    }
    for (int v = threadIdx.x; v < visits; v += blockDim.x)
        if (ids[v] < first || ids[v] >= first + count) place[v] = -1;
    __syncthreads();
    if (threadIdx.x == 0) {
        int end = 0;
        for (int e = 0; e < count; e++) {
            int mine = held[e];
            held[e] = end;
            end += mine;
            ends[e] = end;
        }
    }
    __syncthreads();
    for (int e = warp; e < count; e += 32) {
        int next = held[e];
        for (int from = 0; from < visits; from += 32) {
            int v = from + lane;
            bool is = v < visits && ids[v] == first + e;
            u32 those = __ballot_sync(~0u, is);
            if (is) {
                int at = next + __popc(those & ((1u << lane) - 1));
                order[at] = v / top_k;
                place[v] = at;
            }
            next += __popc(those);
        }
    }
}

// out[row] = the results of its experts times their weights, in the order of experts, and then the shared expert's.
extern "C" __global__ void gather_results(T *out, const T *results, const T *shared, const u16 *ids, const float *weights, const int *place, int top_k, int width) {
    u64 row = blockIdx.x;
    for (int i = threadIdx.x; i < width; i += blockDim.x) {
        float sum = 0;
        int before = -1;
        for (int turn = 0; turn < top_k; turn++) {
            int next = 65536, at = 0;
            for (int k = 0; k < top_k; k++) {
                int id = ids[row * top_k + k];
                if (id > before && id < next) next = id, at = k;
            }
            before = next;
            int where = place[row * top_k + at];
            if (where >= 0) sum = rounded(sum + rounded(weights[row * top_k + at] * value_of(results[(u64)where * width + i])));
        }
        store(out + row * width + i, sum + value_of(shared[row * width + i]));
    }
}
