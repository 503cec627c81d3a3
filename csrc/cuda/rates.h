// The figures of the cost model that a GPU can be asked or timed for, all in one place.
//
// They are from data sheets, published measurements, and the code in benchmarks/results/cuda-device-code.md. No GPU has
// been timed. The first that is can replace them: docs/decisions/cuda-kernels.md says how each is measured. Counts of
// instructions are with the kernels, in gemm_*.h.
#pragma once

#include "problem.h"

namespace exllama::cuda::cost {

// What an SM does in a clock cycle, from this compute capability on. benchmarks/gpus.py has the data sheets.
struct Rates {
  int32_t arch;
  double dram_bytes;  // where the driver does not tell the DRAM's rate
  double ghz;         // where it does not tell the clock
  double issues;      // instructions of a lane: four schedulers of 32 lanes (sm_60: two)
  double floats;      // multiply-adds and sums of float32
  double mma;   // multiply-adds of 16 bits with float32 sums, by mma.sync; GeForce has half of a workstation card's
  double blas;  // the same by a BLAS, with the instructions of its chip
};
inline constexpr Rates kRates[] = {
    {60, 8.8, 1.48, 64, 64, 0, 64},           // P100
    {61, 7.5, 1.53, 128, 128, 0, 128},        // P40
    {70, 7.4, 1.53, 128, 64, 0, 512},         // V100
    {75, 5.0, 1.59, 128, 64, 512, 512},       // T4
    {80, 13.4, 1.41, 128, 64, 1024, 1024},    // A100 80 GB
    {86, 6.7, 1.70, 128, 128, 256, 256},      // RTX 3090
    {89, 3.1, 2.52, 128, 128, 256, 256},      // RTX 4090
    {90, 13.9, 1.83, 128, 128, 1024, 2048},   // H100
    {100, 29.2, 1.85, 128, 128, 1024, 4096},  // B200
    {120, 4.4, 2.41, 128, 128, 256, 256},     // RTX 5090
};

// A kernel of one thread block in a graph of many takes this long: it is what a launch adds to the time of its work.
inline constexpr double kLaunchUs = 2;
// What it adds to a kernel that the last thread block of a tile adds up the sums of the others: a fence, a ticket, and a
// load from L2, one after the other.
inline constexpr double kTicketUs = 1;
// What it adds to a kernel that its thread blocks find their expert before they load anything else: offsets from L2, a scan
// and two barriers.
inline constexpr double kFindExpertUs = 0.5;
// From a load to its data in DRAM, while others load too. Fewer bytes in flight than this times the rate leave it idle.
inline constexpr double kDramLatencyUs = 0.7;
// The part of the DRAM's nominal rate that a kernel which only reads gets.
inline constexpr double kDramEfficiency = 0.92;
// Bytes that an SM gets from L2 in a cycle: half of what its port could take.
inline constexpr double kL2BytesPerCycle = 32;
// Numbers of x that an SM brings in a cycle if each lies in a sector of its own.
inline constexpr double kGatheredPerCycle = 8;
// The part of the time of all resources but the slowest that is not hidden behind it.
inline constexpr double kNotOverlapped = 0.1;

// A BLAS computes tiles of so many numbers of the result. An SM has one of them at a time, at this part of its rate.
struct BlasTile {
  int64_t rows, columns;
  double efficiency;
};
inline constexpr BlasTile kBlasTiles[] = {{128, 256, 0.85}, {128, 128, 0.8}, {64, 128, 0.65}, {64, 64, 0.5}};

}  // namespace exllama::cuda::cost
