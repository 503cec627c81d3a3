// What an aarch64 CPU has beside NEON.
#pragma once

namespace exllama::cpu::arm {

bool has_dotprod();  // sdot, udot
bool has_i8mm();     // smmla, with what has_dotprod asks for

}  // namespace exllama::cpu::arm
