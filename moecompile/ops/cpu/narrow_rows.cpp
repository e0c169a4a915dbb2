// Rows as e4m3 with a scale for each block of numbers, and back, on a CPU: moecompile/ops/narrow_rows.py says what for.
// Plain loops that a compiler vectorizes. The bytes are those of torch's functions, bit for bit.
//
// Shapes, row-major: rows (R, width); bytes (R, width + blocks * scale_bytes), a row's codes before its scales.
// bf16 is read and written as its upper 16 bits of a float; all arithmetic is fp32.

#include <cstdint>
#include <cstring>

namespace {

using bf16 = uint16_t;

inline float from_bits(uint32_t bits) {
  float out;
  std::memcpy(&out, &bits, sizeof out);
  return out;
}
inline uint32_t to_bits(float value) {
  uint32_t out;
  std::memcpy(&out, &value, sizeof out);
  return out;
}
inline float load(float value) { return value; }
inline float load(bf16 value) { return from_bits(static_cast<uint32_t>(value) << 16); }
inline void store(float* to, float value) { *to = value; }
inline void store(bf16* to, float value) {  // to the nearest, ties to even
  const uint32_t bits = to_bits(value), rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  *to = static_cast<bf16>(value == value ? rounded : 0x7fc0u);
}

constexpr uint32_t kSign = 0x80000000u, kInfinity = 0x7f800000u, kNanScale = 255, kNanCode = 0x7f;
constexpr float kLargest = 448.0f;

// The nearest e4m3 of a number of at most 464, ties to even. Of 2^-6 and more: the upper 3 bits of the mantissa, with
// another bias; below: multiples of 2^-9, which is the last bit of 2^14.
inline uint8_t encoded(float value) {
  const uint32_t bits = to_bits(value), magnitude = bits & ~kSign;
  const uint32_t normal = ((magnitude + 0x7ffffu + ((magnitude >> 20) & 1u)) >> 20) - ((127u - 7u) << 3);
  const uint32_t small = to_bits(from_bits(magnitude) + 16384.0f) - 0x46800000u;
  const uint32_t code = magnitude < 0x3c800000u ? small : normal;
  return static_cast<uint8_t>(code | (bits & kSign) >> 24);
}

inline float decoded(uint8_t code) {
  const uint32_t magnitude = code & 0x7fu;
  const float normal = from_bits((magnitude << 20) + ((127u - 7u) << 23)), small = static_cast<float>(static_cast<int32_t>(magnitude)) * (1.0f / 512);
  const float value = magnitude < 8 ? small : normal;
  return from_bits(to_bits(value) | static_cast<uint32_t>(code & 0x80u) << 24);
}

// One block of `count` numbers: its codes, and its scale.
template <class T>
inline void pack_block(const T* in, uint8_t* codes, uint8_t* scale, int64_t count, int64_t scale_bytes) {
  uint32_t largest = 0;
#pragma omp simd reduction(max : largest)
  for (int64_t j = 0; j < count; ++j) {
    const uint32_t magnitude = to_bits(load(in[j])) & ~kSign;
    largest = largest > magnitude ? largest : magnitude;
  }
  const bool finite = largest < kInfinity;
  if (!finite) std::memset(codes, kNanCode, static_cast<size_t>(count));
  if (scale_bytes == 1) {
    int32_t exponent = static_cast<int32_t>(largest >> 23) - 8 + ((largest & 0x7fffffu) > 0x600000u);  // 448 = 1.75 * 2^8
    exponent = exponent < 1 ? 1 : exponent;
    *scale = static_cast<uint8_t>(finite ? static_cast<uint32_t>(exponent) : kNanScale);
    if (!finite) return;
    const float factor = from_bits(static_cast<uint32_t>(254 - exponent) << 23);
#pragma omp simd
    for (int64_t j = 0; j < count; ++j) codes[j] = encoded(load(in[j]) * factor);
  } else {
    const float least = kLargest * from_bits(1u << 23), amax = from_bits(largest);
    const float of_block = finite ? (amax > least ? amax : least) / kLargest : from_bits(0x7fc00000u);
    std::memcpy(scale, &of_block, sizeof of_block);
    if (!finite) return;
#pragma omp simd
    for (int64_t j = 0; j < count; ++j) codes[j] = encoded(load(in[j]) / of_block);
  }
}

template <class T>
inline void unpack_block(const uint8_t* codes, const uint8_t* scale, T* out, int64_t count, int64_t scale_bytes) {
  float of_block;
  if (scale_bytes == 1)
    of_block = from_bits(*scale == kNanScale ? 0x7fc00000u : static_cast<uint32_t>(*scale) << 23);
  else
    std::memcpy(&of_block, scale, sizeof of_block);
#pragma omp simd
  for (int64_t j = 0; j < count; ++j) store(out + j, decoded(codes[j]) * of_block);
}

template <class T>
void pack(const T* rows, uint8_t* bytes, int64_t num_rows, int64_t width, int64_t block, int64_t scale_bytes) {
  const int64_t row_bytes = width + (width + block - 1) / block * scale_bytes;
  for (int64_t i = 0; i < num_rows; ++i) {
    const T* in = rows + i * width;
    uint8_t *codes = bytes + i * row_bytes, *scales = codes + width;
    for (int64_t first = 0; first < width; first += block, scales += scale_bytes)
      if (block == 32 && width - first >= 32)  // a constant length is unrolled
        pack_block(in + first, codes + first, scales, 32, scale_bytes);
      else
        pack_block(in + first, codes + first, scales, width - first < block ? width - first : block, scale_bytes);
  }
}

template <class T>
void unpack(const uint8_t* bytes, T* rows, int64_t num_rows, int64_t width, int64_t block, int64_t scale_bytes) {
  const int64_t row_bytes = width + (width + block - 1) / block * scale_bytes;
  for (int64_t i = 0; i < num_rows; ++i) {
    T* out = rows + i * width;
    const uint8_t *codes = bytes + i * row_bytes, *scales = codes + width;
    for (int64_t first = 0; first < width; first += block, scales += scale_bytes)
      if (block == 32 && width - first >= 32)
        unpack_block(codes + first, scales, out + first, 32, scale_bytes);
      else
        unpack_block(codes + first, scales, out + first, width - first < block ? width - first : block, scale_bytes);
  }
}

}  // namespace

extern "C" {

void pack_f32(const float* rows, uint8_t* bytes, int64_t num_rows, int64_t width, int64_t block, int64_t scale_bytes) {
  pack(rows, bytes, num_rows, width, block, scale_bytes);
}

void pack_bf16(const bf16* rows, uint8_t* bytes, int64_t num_rows, int64_t width, int64_t block, int64_t scale_bytes) {
  pack(rows, bytes, num_rows, width, block, scale_bytes);
}

void unpack_f32(const uint8_t* bytes, float* rows, int64_t num_rows, int64_t width, int64_t block, int64_t scale_bytes) {
  unpack(bytes, rows, num_rows, width, block, scale_bytes);
}

void unpack_bf16(const uint8_t* bytes, bf16* rows, int64_t num_rows, int64_t width, int64_t block, int64_t scale_bytes) {
  unpack(bytes, rows, num_rows, width, block, scale_bytes);
}

}  // extern "C"
