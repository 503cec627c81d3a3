// The target attributes of functions for more than plain NEON. gcc and clang have no spelling in common.
//
// Their instructions are written as assembler: clang 14 has the intrinsics for none but whole files of such a target.
#pragma once

#if defined(__clang__)
#define EXLLAMA_NEON_DOTPROD __attribute__((target("dotprod")))
#define EXLLAMA_NEON_I8MM __attribute__((target("dotprod,i8mm")))
#else
#define EXLLAMA_NEON_DOTPROD __attribute__((target("arch=armv8.2-a+dotprod")))
#define EXLLAMA_NEON_I8MM __attribute__((target("arch=armv8.2-a+dotprod+i8mm")))
#endif
