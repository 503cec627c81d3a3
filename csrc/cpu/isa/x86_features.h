// What an x86 CPU has, and the operating system saves the registers of.
#pragma once

namespace exllama::cpu::x86 {

bool has_avx2();      // with FMA and F16C
bool has_avx_vnni();  // with what has_avx2 asks for
bool has_avx512();    // F, BW, DQ and VL
bool has_avx512_vnni();
bool has_amx_int8();  // with what has_avx512_vnni asks for

}  // namespace exllama::cpu::x86
