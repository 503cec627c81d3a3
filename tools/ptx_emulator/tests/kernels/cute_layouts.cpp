// Where CuTe says the fragments of the mma instructions lie, a line for each operand: its name, and the element that
// each value of each thread is, thread by thread. Elements count down the columns of A (M, K), B (N, K) and C (M, N).
#include <cstdio>
#include <cute/atom/mma_traits_sm75.hpp>
#include <cute/atom/mma_traits_sm80.hpp>

template <class Layout> void print(const char* instruction, const char* operand, Layout layout) {
    std::printf("%s %s", instruction, operand);
    for (int thread = 0; thread < 32; ++thread)
        for (int value = 0; value < cute::size<1>(layout); ++value) std::printf(" %d", int(layout(thread, value)));
    std::printf("\n");
}
template <class Instruction> void print_all(const char* name) {
    using Traits = cute::MMA_Traits<Instruction>;
    print(name, "a", typename Traits::ALayout{});
    print(name, "b", typename Traits::BLayout{});
    print(name, "c", typename Traits::CLayout{});
}

int main() {
    print_all<cute::SM75_16x8x8_F32F16F16F32_TN>("two_mma_f16");
    print_all<cute::SM80_16x8x16_F32F16F16F32_TN>("mma_f16");
    print_all<cute::SM80_16x8x16_F32BF16BF16F32_TN>("mma_bf16");
}
