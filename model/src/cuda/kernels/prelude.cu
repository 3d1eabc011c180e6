// What every kernel uses. Compiled at run time, for the device at hand: with ROUNDS, activations are bf16 and every value is
// rounded to it where the CPU rounds; without, they are 32-bit.

typedef unsigned char u8;
typedef unsigned short u16;
typedef unsigned int u32;
typedef unsigned long long u64;

struct bf16 {
    u16 bits;
};

// What a product's inputs are.
enum Multiply { BF16, F16, FP8 };
