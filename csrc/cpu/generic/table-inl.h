// The table of a vector ISA: all that is written once.
#pragma once

#include "cpu/generic/panels-inl.h"
#include "cpu/generic/product-inl.h"
#include "cpu/generic/transposed-inl.h"
#include "cpu/generic/x-inl.h"

namespace exllama::cpu {
namespace {

// With dot products of bytes, which need VNNI: without them int8 values go through the int16 panel.
template <bool vnni>
Kernels vector_kernels() {
  Kernels table;
  table.load = load;
  table.store = store;
  table.quantize = quantize;
  table.pack_bytes = pack_bytes;
  table.load_zeros = load_zeros;
  table.load_scales = load_scales;
  table.unpack_int16 = unpack_int16;
  table.unpack_float = unpack_float;
  table.unpack_transposed = unpack_transposed;
  table.multiply_int16 = multiply_rows<Int16Product<vnni>>;
  table.multiply_float = multiply_rows<FloatProduct>;
  if constexpr (vnni) {
    table.int8_panels = Int8Panels::kCentered;
    table.gemv_int8 = true;
    table.unpack_int8 = unpack_int8;
    table.multiply_int8 = multiply_rows<Int8Product>;
  }
  return table;
}

}  // namespace
}  // namespace exllama::cpu
