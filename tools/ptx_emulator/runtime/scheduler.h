// What the fake CUDA runtime asks of the scheduler.
#pragma once

#include <string>
#include <vector>

#include "thread.h"

namespace emu {

enum class Order { ascending, descending, random };

struct Settings {
    Order order = Order::ascending;
    u64 seed = 0;
    bool only_last_block = false;
    bool mma_truncates = false;
    bool mma_flushes_subnormals = false;
};
extern Settings settings;

struct Range {
    u64 begin, end;
};
extern bool check_ranges;
extern std::vector<Range> ranges;           // what kernels may touch, when check_ranges is set
extern std::vector<Range> variable_ranges;  // __device__ and __constant__ variables: always allowed

// The first fault since the last reset; kernels that follow do not run, as on the device.
extern std::string fault_text;

struct Extent {
    u32 x, y, z;
};
// Runs all blocks of a kernel to their end, or to the first fault. One that overlaps with the grid before must wait for it.
void run_grid(const Kernel& kernel, Extent grid, Extent block, u32 shared_bytes, const unsigned char* parameters,
              bool overlaps);

}  // namespace emu
