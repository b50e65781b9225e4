// Conversions between the element types in memory and fp32, which everything is computed in.
#pragma once

#include "../common/dtype.h"
#include "platform.h"

namespace fg::FG_LEVEL {

FG_DEVICE float to_float(float x) { return x; }

FG_DEVICE float to_float(bf16 x) { return float_of(static_cast<uint32_t>(x.bits) << 16); }

#ifdef FG_HOST_EMULATION

FG_DEVICE float to_float(f16 x) {
  const uint32_t sign = static_cast<uint32_t>(x.bits & 0x8000) << 16, rest = x.bits & 0x7fff;
  if (rest >= 0x7c00) return float_of(sign | 0x7f800000 | (rest << 13));  // infinity or NaN
  // The exponent is 112 too small; the product repairs it, for subnormal numbers too.
  return float_of(sign | bits_of(float_of(rest << 13) * 0x1p112f));
}

// Bits of the nearest number, ties to even.
FG_DEVICE uint16_t to_bf16_bits(float x) {
  const uint32_t bits = bits_of(x);
  if ((bits & 0x7fffffff) > 0x7f800000) return 0x7fff;
  return static_cast<uint16_t>((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}

FG_DEVICE uint16_t to_f16_bits(float x) {
  const uint32_t bits = bits_of(x), sign = (bits >> 16) & 0x8000, rest = bits & 0x7fffffff;
  if (rest > 0x7f800000) return 0x7fff;
  if (rest >= 0x477ff000) return static_cast<uint16_t>(sign | 0x7c00);  // from 65520 on
  if (rest < 0x38800000)  // below 2^-14: adding 1/2 leaves the subnormal's bits, rounded, at the end
    return static_cast<uint16_t>(sign | (bits_of(float_of(rest) + 0.5f) - 0x3f000000));
  return static_cast<uint16_t>(sign | ((rest - 0x38000000 + 0xfff + ((rest >> 13) & 1)) >> 13));
}

FG_DEVICE uint32_t two_bits(bf16, float low, float high) {
  return to_bf16_bits(low) | static_cast<uint32_t>(to_bf16_bits(high)) << 16;
}
FG_DEVICE uint32_t two_bits(f16, float low, float high) {
  return to_f16_bits(low) | static_cast<uint32_t>(to_f16_bits(high)) << 16;
}

#else

FG_DEVICE float to_float(f16 x) { return __half2float(__ushort_as_half(x.bits)); }

FG_DEVICE uint16_t to_bf16_bits(float x) { return __bfloat16_as_ushort(__float2bfloat16_rn(x)); }
FG_DEVICE uint16_t to_f16_bits(float x) { return __half_as_ushort(__float2half_rn(x)); }

// Two numbers by one instruction.
FG_DEVICE uint32_t two_bits(bf16, float low, float high) {
  const __nv_bfloat162 pair = __floats2bfloat162_rn(low, high);
  return *reinterpret_cast<const uint32_t*>(&pair);
}
FG_DEVICE uint32_t two_bits(f16, float low, float high) {
  const __half2 pair = __floats2half2_rn(low, high);
  return *reinterpret_cast<const uint32_t*>(&pair);
}

#endif

template <class T>
FG_DEVICE T from_float(float x);
template <>
FG_DEVICE float from_float<float>(float x) {
  return x;
}
template <>
FG_DEVICE bf16 from_float<bf16>(float x) {
  return {to_bf16_bits(x)};
}
template <>
FG_DEVICE f16 from_float<f16>(float x) {
  return {to_f16_bits(x)};
}

// x as it is after being stored as T.
template <class T>
FG_DEVICE float rounded_to(float x) {
  return to_float(from_float<T>(x));
}

}  // namespace fg::FG_LEVEL
