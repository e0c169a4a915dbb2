// SwiGLU with a routing weight per row, forward and backward, and the transpose for weight gradients, on a CPU.
// Plain loops that a compiler vectorizes; only standard headers, so it compiles in a second.
//
// Shapes, row-major: gate_up (rows, 2 * width), gate first; weight (rows); hidden, grad_hidden (rows, width).
// bf16 is read and written as its upper 16 bits of a float; all arithmetic is fp32. NaN stays NaN.

#include <cstdint>
#include <cstring>

namespace {

using bf16 = uint16_t;

inline float load(float value) { return value; }
inline float load(bf16 value) {
  const uint32_t bits = static_cast<uint32_t>(value) << 16;
  float out;
  std::memcpy(&out, &bits, sizeof out);
  return out;
}
inline void store(float* to, float value) { *to = value; }
inline void store(bf16* to, float value) {  // to the nearest, ties to even
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  const uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  *to = static_cast<bf16>(value == value ? rounded : 0x7fc0u);
}

// exp(x) = 2^k exp(r), |r| <= ln(2) / 2, a Taylor polynomial of degree 7 for exp(r): relative error below 1e-7.
inline float exponential(float x) {
  x = x > 88.0f ? 88.0f : x;
  x = x < -87.0f ? -87.0f : x;
  const float k = __builtin_rintf(x * 1.442695041f);
  float r = x - k * 0.693359375f;  // ln(2) in two parts, so that k ln(2) is exact
  r = r + k * 2.12194440e-4f;
  float p = 1.0f / 5040;
  p = p * r + 1.0f / 720;
  p = p * r + 1.0f / 120;
  p = p * r + 1.0f / 24;
  p = p * r + 1.0f / 6;
  p = p * r + 0.5f;
  p = p * r * r + r + 1.0f;
  const int32_t power = (static_cast<int32_t>(k) + 127) << 23;
  float two_k;
  std::memcpy(&two_k, &power, sizeof two_k);
  return p * two_k;
}

// hidden = weight * silu(gate) * up
template <class T>
void forward(const T* gate_up, const float* weight, T* hidden, int64_t rows, int64_t width) {
  for (int64_t i = 0; i < rows; ++i) {
    const T *gate = gate_up + i * 2 * width, *up = gate + width;
    T* out = hidden + i * width;
    const float w = weight[i];
#pragma omp simd
    for (int64_t j = 0; j < width; ++j) {
      const float g = load(gate[j]);
      store(out + j, g / (1.0f + exponential(-g)) * load(up[j]) * w);
    }
  }
}

// Gradients of `forward`, and hidden recomputed, which was not kept.
template <class T>
void backward(const T* gate_up, const float* weight, const T* grad_hidden, T* grad_gate_up, T* hidden,
              float* grad_weight, int64_t rows, int64_t width) {
  for (int64_t i = 0; i < rows; ++i) {
    const T *gate = gate_up + i * 2 * width, *up = gate + width, *grad = grad_hidden + i * width;
    T *grad_gate = grad_gate_up + i * 2 * width, *grad_up = grad_gate + width, *out = hidden + i * width;
    const float w = weight[i];
    float sum = 0.0f;
#pragma omp simd reduction(+ : sum)
    for (int64_t j = 0; j < width; ++j) {
      const float g = load(gate[j]), u = load(up[j]), d = load(grad[j]);
      const float sigmoid = 1.0f / (1.0f + exponential(-g)), silu = g * sigmoid, h = silu * u;
      sum += h * d;
      store(out + j, h * w);
      store(grad_up + j, d * w * silu);
      store(grad_gate + j, d * w * u * (sigmoid + silu * (1.0f - sigmoid)));
    }
    grad_weight[i] = sum;
  }
}

#if defined(__clang__) || __GNUC__ >= 12
typedef uint16_t v16 __attribute__((vector_size(32), aligned(2)));
#define LOW(a, b) __builtin_shufflevector(a, b, 0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23)
#define HIGH(a, b) __builtin_shufflevector(a, b, 8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31)

// Interleaving row k with row k + 8 four times transposes 16 x 16.
inline void interleave(const v16* in, v16* out) {
  for (int k = 0; k < 8; ++k) {
    out[2 * k] = LOW(in[k], in[k + 8]);
    out[2 * k + 1] = HIGH(in[k], in[k + 8]);
  }
}

// The first `count` of 16 rows; the others are neither read nor written.
inline void transpose_tile(const uint16_t* from, int64_t from_stride, uint16_t* to, int64_t to_stride, int64_t count) {
  v16 a[16], b[16];
  for (int i = 0; i < 16; ++i) a[i] = *reinterpret_cast<const v16*>(from + (i < count ? i : 0) * from_stride);
  interleave(a, b);
  interleave(b, a);
  interleave(a, b);
  interleave(b, a);
  if (count >= 16)
    for (int i = 0; i < 16; ++i) *reinterpret_cast<v16*>(to + i * to_stride) = a[i];
  else
    for (int i = 0; i < 16; ++i) std::memcpy(to + i * to_stride, &a[i], static_cast<size_t>(count) * sizeof *to);
}
#else
inline void transpose_tile(const uint16_t* from, int64_t from_stride, uint16_t* to, int64_t to_stride, int64_t count) {
  for (int64_t i = 0; i < 16; ++i)
    for (int64_t j = 0; j < (count < 16 ? count : 16); ++j) to[i * to_stride + j] = from[j * from_stride + i];
}
#endif

}  // namespace

extern "C" {

void forward_f32(const float* gate_up, const float* weight, float* hidden, int64_t rows, int64_t width) {
  forward(gate_up, weight, hidden, rows, width);
}

void forward_bf16(const bf16* gate_up, const float* weight, bf16* hidden, int64_t rows, int64_t width) {
  forward(gate_up, weight, hidden, rows, width);
}

void backward_f32(const float* gate_up, const float* weight, const float* grad_hidden, float* grad_gate_up,
                  float* hidden, float* grad_weight, int64_t rows, int64_t width) {
  backward(gate_up, weight, grad_hidden, grad_gate_up, hidden, grad_weight, rows, width);
}

void backward_bf16(const bf16* gate_up, const float* weight, const bf16* grad_hidden, bf16* grad_gate_up, bf16* hidden,
                   float* grad_weight, int64_t rows, int64_t width) {
  backward(gate_up, weight, grad_hidden, grad_gate_up, hidden, grad_weight, rows, width);
}

// (rows, width) -> (width, rows) of 16-bit numbers; width is a multiple of 16.
void transpose_16bit(const uint16_t* from, uint16_t* to, int64_t rows, int64_t width) {
  for (int64_t i = 0; i < rows; i += 16)
    for (int64_t j = 0; j < width; j += 16) transpose_tile(from + i * width + j, width, to + j * rows + i, rows, rows - i);
}

}  // extern "C"
