#include "cpu/gemm/packed_x.h"

#include <algorithm>

namespace exllama::cpu {

int unit_step(const MatrixUnit& unit, const Weight& weight) {
  return static_cast<int>(std::min<int64_t>(unit.most_step, round_up(Spans(weight, kSpanRows).longest(), 4)));
}

PackedX::PackedX(Arena& arena, const Weight& weight, int64_t rows_of_x, NumberClass numbers) : M(rows_of_x) {
  const Spans spans(weight, kSpanRows);
  const MatrixUnit* unit = kernels().matrix_unit;
  stride = round_up(spans.longest(), unit ? std::max(8, unit_step(*unit, weight)) : 8);
  // A matrix unit reads on beyond the last row.
  const int64_t entries = spans.count() * M + (unit ? unit->rows : 0);
  if (numbers == NumberClass::kFloat) {
    floats = arena.take<float>(entries * stride);
    return;
  }
  first = arena.take<int16_t>(entries * stride);
  if (numbers == NumberClass::kInt16) second = arena.take<int16_t>(entries * stride);
  if (numbers == NumberClass::kInt8) bytes = arena.take<uint8_t>(entries * stride);
  scales = arena.take<SpanScale>(entries);
}

void XPacker::pack(int64_t m, int64_t index, const Span& span) const {
  const int64_t entry = packed_.entry(index, m);
  const int stride = static_cast<int>(packed_.stride);
  const void* row = source_.row(m);
  if (plan_.numbers == NumberClass::kFloat) {
    isa_.load(row, source_.dtype, source_.perm, span.row, span.rows, packed_.floats + entry * stride);
    return;
  }
  const bool int16 = plan_.numbers == NumberClass::kInt16;
  const auto quantize = [&](int16_t* to, int16_t* to_second) {
    return isa_.quantize(row, source_.dtype, source_.perm, span, stride, int16 ? 32767 : 127, to, to_second);
  };
  int16_t* first = packed_.first + entry * stride;
  int16_t* second = packed_.second ? packed_.second + entry * stride : nullptr;
  if (plan_.two_bytes) {
    alignas(64) int16_t limb[2][kSpanRows];
    const SpanScale scale = quantize(limb[0], limb[1]);
    pack_two_bytes(limb[0], first);
    if (scale.limbs == Limbs::kTwo) pack_two_bytes(limb[1], second);
    packed_.scales[entry] = scale;
    return;
  }
  packed_.scales[entry] = quantize(first, second);
  // Centered panels take unsigned x, the kernels of words and of matrix units signed.
  const bool is_signed = plan_.gemv || plan_.words || plan_.unit || isa_.int8_panels != Int8Panels::kCentered;
  const int offset = is_signed ? 0 : kInt8Offset;
  if (plan_.int8) isa_.pack_bytes(first, stride, bits_, 0, offset, packed_.bytes + entry * stride);
}

void XPacker::pack_two_bytes(const int16_t* limb, int16_t* out) const {
  uint8_t* bytes = reinterpret_cast<uint8_t*>(out);
  const int stride = static_cast<int>(packed_.stride);
  isa_.pack_bytes(limb, stride, bits_, 8, 0, bytes);
  isa_.pack_bytes(limb, stride, bits_, 0, plan_.unit ? plan_.unit->low_offset : 0, bytes + stride);
}

}  // namespace exllama::cpu
