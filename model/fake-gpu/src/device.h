// CUDA C++ as the processor's code: what a kernel's source needs to be compiled by a C++ compiler and run block by block.
//
// A thread of a block is a fiber. Fibers run in turn until they come to a barrier or to an exchange between the lanes of a warp,
// or return. Blocks run one after the other, so that what a block shares is a static variable.

#include <setjmp.h>
#include <ucontext.h>

#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <vector>

#define __device__
#define __global__
#define __shared__ static
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __align__(bytes) __attribute__((aligned(bytes)))

struct uint3 {
    unsigned x, y, z;
};
struct uint4 {
    unsigned x, y, z, w;
};
struct float2 {
    float x, y;
};
inline float2 make_float2(float x, float y) { return {x, y}; }

static uint3 threadIdx, blockIdx, blockDim, gridDim;

namespace device {

constexpr size_t STACK = 256 << 10, SHARED = 256 << 10, LANES = 32;

struct Fiber {
    jmp_buf place;
    std::vector<char> stack = std::vector<char>(STACK);
    bool is_over = true;
};

static std::vector<Fiber *> fibers;  // never freed: they wait for the next block
static jmp_buf scheduler;
static size_t running, live;
static const std::function<void()> *body;
alignas(1024) static unsigned char shared[SHARED];

// Those that have come to a barrier, and how often all of them have.
struct Barrier {
    size_t arrived = 0, turns = 0, members = 0;
};
static Barrier block;
static std::vector<Barrier> warps;
// What lanes show one another.
struct Shown {
    uint64_t words[LANES][8];
};
static std::vector<Shown> shown;

__attribute__((noinline)) static void pass() {
    if (!_setjmp(fibers[running]->place)) _longjmp(scheduler, 1);
}

static void arrive(Barrier &barrier) {
    size_t turn = barrier.turns;
    if (++barrier.arrived >= barrier.members) {
        barrier.arrived = 0;
        barrier.turns++;
        return;
    }
    while (barrier.turns == turn) pass();
}

// One who returns is waited for no more.
static void leave(Barrier &barrier) {
    barrier.members--;
    if (barrier.members > 0 && barrier.arrived >= barrier.members) {
        barrier.arrived = 0;
        barrier.turns++;
    }
}

static void life() {
    for (;;) {
        (*body)();
        fibers[running]->is_over = true;
        live--;
        leave(block);
        leave(warps[running / LANES]);
        pass();
    }
}

static void resume(size_t index) {
    running = index;
    threadIdx = {(unsigned)index, 0, 0};
    if (!_setjmp(scheduler)) _longjmp(fibers[index]->place, 1);
}

static void begin(size_t index) {
    if (index < fibers.size()) return;
    fibers.push_back(new Fiber);
    static ucontext_t here, there;
    static bool has_begun;
    has_begun = false;
    getcontext(&there);
    there.uc_stack.ss_sp = fibers[index]->stack.data();
    there.uc_stack.ss_size = STACK;
    there.uc_link = nullptr;
    makecontext(&there, (void (*)())[] {
        // Its first place is the beginning of its life.
        if (!_setjmp(fibers[fibers.size() - 1]->place)) setcontext(&here);
        life();
    }, 0);
    getcontext(&here);
    if (!has_begun) {
        has_begun = true;
        setcontext(&there);
    }
}

static void run_block(size_t threads) {
    size_t count = (threads + LANES - 1) / LANES;
    live = threads;
    block = Barrier{0, 0, threads};
    warps.assign(count, Barrier{});
    shown.resize(count);
    for (size_t i = 0; i < threads; i++) {
        begin(i);
        fibers[i]->is_over = false;
        warps[i / LANES].members++;
    }
    while (live > 0)
        for (size_t i = 0; i < threads; i++)
            if (!fibers[i]->is_over) resume(i);
}

static void run(const unsigned *grid, unsigned threads, unsigned bytes, const std::function<void()> &kernel) {
    if (bytes > SHARED || threads > 1024) abort();
    body = &kernel;
    blockDim = {threads, 1, 1};
    gridDim = {grid[0], grid[1], grid[2]};
    for (unsigned z = 0; z < grid[2]; z++)
        for (unsigned y = 0; y < grid[1]; y++)
            for (unsigned x = 0; x < grid[0]; x++) {
                blockIdx = {x, y, z};
                // As on a GPU, nobody may count on what is there.
                memset(shared, 0xab, bytes);
                run_block(threads);
            }
}

static size_t lane() { return running % LANES; }
static Barrier &warp() { return warps[running / LANES]; }

// Every lane shows a value, and looks at those of all: `look` runs when they are there, and they stay until it is over in all.
template <typename Value, typename Look> static auto exchange(const Value &value, Look look) {
    static_assert(sizeof(Value) <= sizeof(uint64_t) * 8);
    Shown &place = shown[running / LANES];
    memcpy(place.words[lane()], &value, sizeof(Value));
    arrive(warp());
    auto of = [&](size_t lane) {
        Value value;
        memcpy(&value, place.words[lane], sizeof(Value));
        return value;
    };
    auto result = look(of);
    arrive(warp());
    return result;
}

static float half_value(uint16_t bits) {
    _Float16 value;
    memcpy(&value, &bits, 2);
    return (float)value;
}
static uint16_t half_bits(float value) {
    _Float16 half = (_Float16)value;
    uint16_t bits;
    memcpy(&bits, &half, 2);
    return bits;
}
static float wide(uint32_t bits) {
    float value;
    memcpy(&value, &bits, 4);
    return value;
}
static uint32_t bits_of(float value) {
    uint32_t bits;
    memcpy(&bits, &value, 4);
    return bits;
}
static float fp8_value(uint8_t code) {
    int exponent = code >> 3 & 15, mantissa = code & 7;
    float value = (code & 0x7f) == 0x7f ? NAN : exponent ? ldexpf(8 + mantissa, exponent - 10) : ldexpf(mantissa, -9);
    return code & 0x80 ? -value : value;
}
static uint8_t fp8_code(float value) {
    uint8_t sign = bits_of(value) >> 31 ? 0x80 : 0;
    float size = fabsf(value);
    if (std::isnan(value)) return sign | 0x7f;
    if (size >= 448.0f) return sign | 0x7e;
    // The step between two neighbours, of which there are eight to a power of two, and as wide below the smallest.
    int exponent;
    frexpf(size, &exponent);
    int step = (exponent - 4 < -9) ? -9 : exponent - 4;
    float steps = nearbyintf(ldexpf(size, -step));
    float rounded = ldexpf(steps, step);
    if (rounded < ldexpf(1, -6)) return sign | (uint8_t)steps;
    frexpf(rounded, &exponent);
    return sign | (uint8_t)((exponent + 6) << 3 | ((int)ldexpf(rounded, 4 - exponent) - 8));
}

// What one of a product's inputs is, of 32 bits.
template <int KIND> static float input(uint32_t word, int index) {
    if (KIND == 2) return fp8_value(word >> (8 * index));
    uint16_t bits = word >> (16 * index);
    return KIND == 1 ? half_value(bits) : wide((uint32_t)bits << 16);
}

}  // namespace device

#define __syncthreads() device::arrive(device::block)
#define __syncwarp() device::arrive(device::warp())

template <typename Value> static Value __shfl_xor_sync(unsigned, Value value, int step) {
    size_t other = device::lane() ^ step;
    return device::exchange(value, [&](auto &of) { return of(other); });
}
static unsigned __ballot_sync(unsigned, bool is) {
    return device::exchange(is, [&](auto &of) {
        unsigned those = 0;
        for (size_t lane = 0; lane < device::LANES; lane++) those |= of(lane) ? 1u << lane : 0;
        return those;
    });
}
static bool __any_sync(unsigned mask, bool is) { return __ballot_sync(mask, is) != 0; }
static bool __all_sync(unsigned mask, bool is) { return __ballot_sync(mask, is) == ~0u; }
static int __popc(unsigned bits) { return __builtin_popcount(bits); }
static float __uint_as_float(unsigned bits) { return device::wide(bits); }
static float __int_as_float(int bits) { return device::wide(bits); }
static int min(int a, int b) { return a < b ? a : b; }
using std::isfinite;

// In place of `ptx.cu`.

static uint16_t bf16_bits(float value) {
    uint32_t bits = device::bits_of(value);
    if (std::isnan(value)) return 0x7fff;
    return (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
}
static uint16_t fp8_pair(float low, float high) { return device::fp8_code(low) | device::fp8_code(high) << 8; }
static uint32_t halves_of_fp8(uint16_t both) {
    return device::half_bits(device::fp8_value(both)) | (uint32_t)device::half_bits(device::fp8_value(both >> 8)) << 16;
}
static float half_value(uint16_t bits) { return device::half_value(bits); }
static uint32_t shared_address(const void *pointer) { return (const unsigned char *)pointer - device::shared; }
template <int BYTES> static void copy(uint32_t to, const void *from, bool valid) {
    if (valid) memcpy(device::shared + to, from, BYTES);
    else memset(device::shared + to, 0, BYTES);
}
static void copy_16(uint32_t to, const void *from, bool valid) { copy<16>(to, from, valid); }
static void copy_4(uint32_t to, const void *from, bool valid) { copy<4>(to, from, valid); }
static void copies_end() {}
template <int N> static void copies_wait() {}

static void load_matrices_as(uint32_t (&to)[4], uint32_t from, bool transposed) {
    device::exchange(from, [&](auto &of) {
        size_t lane = device::lane(), across = lane / 4, along = lane % 4 * 2;
        for (size_t matrix = 0; matrix < 4; matrix++) {
            auto element = [&](size_t row, size_t column) {
                uint16_t value;
                memcpy(&value, device::shared + of(matrix * 8 + row) + column * 2, 2);
                return (uint32_t)value;
            };
            to[matrix] = transposed ? element(along, across) | element(along + 1, across) << 16
                                    : element(across, along) | element(across, along + 1) << 16;
        }
        return 0;
    });
}
static void load_matrices(uint32_t (&to)[4], uint32_t from) { load_matrices_as(to, from, false); }
static void load_matrices_transposed(uint32_t (&to)[4], uint32_t from) { load_matrices_as(to, from, true); }

template <int KIND> static void multiply(float (&sums)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
    struct Given {
        uint32_t a[4], b[2];
    } given = {{a[0], a[1], a[2], a[3]}, {b0, b1}};
    device::exchange(given, [&](auto &of) {
        constexpr int EACH = KIND == 2 ? 4 : 2;
        size_t lane = device::lane();
        for (size_t out = 0; out < 4; out++) {
            size_t row = lane / 4, column = lane % 4 * 2 + out % 2;
            float sum = 0;
            for (size_t half = 0; half < 2; half++)
                for (size_t quarter = 0; quarter < 4; quarter++) {
                    uint32_t left = of(row * 4 + quarter).a[half * 2 + out / 2], right = of(column * 4 + quarter).b[half];
                    for (int i = 0; i < EACH; i++) sum += device::input<KIND>(left, i) * device::input<KIND>(right, i);
                }
            sums[out] += sum;
        }
        return 0;
    });
}
template <int KIND> static uint32_t pack(float low, float high) {
    if (KIND == 1) return device::half_bits(low) | (uint32_t)device::half_bits(high) << 16;
    return bf16_bits(low) | (uint32_t)bf16_bits(high) << 16;
}
