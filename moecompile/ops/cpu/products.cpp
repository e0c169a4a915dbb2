// Products of the rows of many experts with their weights, for few rows per expert, on a CPU with AVX512.
//
// A library product first packs (copies) its factors. With few rows, packing the weight takes most of the time. Here
// weights are read in place, once for every kRows rows.
//
// Legend: R rows of all experts in expert order, M of one; E experts; K, N the sizes of a weight, multiples of 64.
//   product_transposed  (R, K) by (E, N, K) -> (R, N)    out = a b^T: sums along the rows of both, `dots`
//   product             (R, K) by (E, K, N) -> (R, N)    out = a b:   rows of b times numbers of a, `multiples`
//   product_gradient    (R, K) by (R, N) -> (E, K, N)    out = a^T b: the same, zero for an expert without rows
// fp32, or bf16 (the upper 16 bits) in one of two ways, both with sums in fp32 that are rounded once: multiplied in
// pairs if the processor has an instruction for it, or widened first (`_wide`), which is faster on some processors.

#include <cstdint>
#include <cstring>
#include <type_traits>
#include <vector>

// GCC 12 supports everything used here; clang 14 keeps the sums in memory and is slower than a library.
#if defined(__AVX512F__) && !defined(__clang__) && __GNUC__ >= 12
#define HAS_PRODUCTS 1
#else
#define HAS_PRODUCTS 0
#endif

extern "C" int has_products() { return HAS_PRODUCTS; }

#if HAS_PRODUCTS
#include <immintrin.h>

namespace {

using bf16 = uint16_t;
constexpr int kLanes = 16;    // fp32 numbers in a vector
constexpr int kRows = 6;      // rows of out at a time: 6 x 4 sums and their operands fit in the 32 registers
constexpr int kColumns = 4;   // in `dots`
constexpr int kVectors = 4;   // in `multiples`
constexpr int kAhead = 8;     // rows of b to prefetch
typedef float Vector __attribute__((vector_size(64)));
typedef uint32_t Bits __attribute__((vector_size(64)));
typedef uint16_t Pairs __attribute__((vector_size(64)));
typedef uint16_t Halves __attribute__((vector_size(32)));

// -- numbers ----------------------------------------------------------------------------------------------------------

template <class To, class From>
inline To bits_of(const From& from) {
  static_assert(sizeof(To) == sizeof(From), "the same bits");
  To to;
  std::memcpy(&to, &from, sizeof to);
  return to;
}

// Reads a value at any address.
template <class To>
inline To read(const void* from) {
  To to;
  std::memcpy(&to, from, sizeof to);
  return to;
}

inline Vector load(const float* from) { return read<Vector>(from); }
inline Vector load(const bf16* from) {
  return bits_of<Vector>(__builtin_convertvector(read<Halves>(from), Bits) << 16);
}

inline Halves rounded(Vector value) {  // to the nearest, ties to even
  const Bits bits = bits_of<Bits>(value);
  const Bits out = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  return __builtin_convertvector(value == value ? out : Bits{} + 0x7fc0u, Halves);
}
inline void store(float* to, Vector value) { std::memcpy(to, &value, sizeof value); }
inline void store(bf16* to, Vector value) {
  const Halves halves = rounded(value);
  std::memcpy(to, &halves, sizeof halves);
}

// Bypasses the caches: a weight's gradient is not read soon, and the memory need not be read before it is written.
inline void stream(float* to, Vector value) { _mm512_stream_ps(to, bits_of<__m512>(value)); }
inline void stream(bf16* to, Vector value) {
  _mm256_stream_si256(reinterpret_cast<__m256i*>(to), bits_of<__m256i>(rounded(value)));
}

// -- arithmetic: how many adjacent terms of a sum are multiplied at a time, and how --------------------------------------

template <class T>
struct Widened {
  using Number = T;
  using Left = float;  // type of a
  static constexpr int kStep = 1;
  static Vector left(const Left* a) { return load(a); }
  static Vector right(const T* b) { return load(b); }
  static Vector spread(Left a) { return a - Vector{}; }
  static void rows(const T* b, int64_t, Vector* out) {
    for (int v = 0; v < kVectors; ++v) out[v] = load(b + v * kLanes);
  }
  static Vector add(Vector sum, Vector a, Vector b) { return sum + a * b; }
  static const Left* along(const float* a, int64_t, int64_t, std::vector<Left>&) { return a; }
  static const Left* along(const bf16* a, int64_t rows, int64_t width, std::vector<Left>& scratch) {
    scratch.resize(rows * width);
    for (int64_t i = 0; i < rows * width; i += kLanes) store(scratch.data() + i, load(a + i));
    return scratch.data();
  }
  static const Left* across(const T* a, int64_t rows, int64_t width, std::vector<Left>& scratch) {
    return along(a, rows, width, scratch);
  }
};

#ifdef __AVX512BF16__
// clang-format off
#define FIRST_HALF 0, 32, 1, 33, 2, 34, 3, 35, 4, 36, 5, 37, 6, 38, 7, 39, 8, 40, 9, 41, 10, 42, 11, 43, 12, 44, 13, 45, 14, 46, 15, 47
#define SECOND_HALF 16, 48, 17, 49, 18, 50, 19, 51, 20, 52, 21, 53, 22, 54, 23, 55, 24, 56, 25, 57, 26, 58, 27, 59, 28, 60, 29, 61, 30, 62, 31, 63
// clang-format on

struct Paired {
  using Number = bf16;
  using Left = uint32_t;  // two adjacent numbers
  static constexpr int kStep = 2;
  static Vector left(const Left* a) { return read<Vector>(a); }
  static Vector right(const bf16* b) { return read<Vector>(b); }
  static Vector spread(Left a) { return bits_of<Vector>(a - Bits{}); }
  static void rows(const bf16* b, int64_t next, Vector* out) {  // row b interleaved with the next row, or with zeros
    for (int v = 0; v < kVectors; v += 2) {
      const Pairs one = read<Pairs>(b + v * kLanes), two = next ? read<Pairs>(b + next + v * kLanes) : Pairs{};
      out[v] = bits_of<Vector>(__builtin_shufflevector(one, two, FIRST_HALF));
      out[v + 1] = bits_of<Vector>(__builtin_shufflevector(one, two, SECOND_HALF));
    }
  }
  static Vector add(Vector sum, Vector a, Vector b) {
    return bits_of<Vector>(_mm512_dpbf16_ps(bits_of<__m512>(sum), bits_of<__m512bh>(a), bits_of<__m512bh>(b)));
  }
  static const Left* along(const bf16* a, int64_t, int64_t, std::vector<Left>&) {
    return reinterpret_cast<const Left*>(a);
  }
  static const Left* across(const bf16* a, int64_t rows, int64_t width, std::vector<Left>& scratch) {
    scratch.resize((rows + 1) / 2 * width);
    for (int64_t i = 0; i < rows; i += 2)
      for (int64_t j = 0; j < width; ++j) {
        const uint32_t one = a[i * width + j], two = i + 1 < rows ? a[(i + 1) * width + j] : 0;
        scratch[i / 2 * width + j] = one | two << 16;
      }
    return scratch.data();
  }
};
#endif

// -- kRows rows of out --------------------------------------------------------------------------------------------------

// ROWS x 64 of out = sum over k of a(i, k) * b[k]; a(i, k) = a[i * a_row + k * a_step]. `odd`: the last row of b is not
// paired.
template <class Math, int ROWS, bool STREAM>
void multiples(const typename Math::Left* a, int64_t a_row, int64_t a_step, const typename Math::Number* b,
               int64_t width, typename Math::Number* out, int64_t steps, bool odd) {
  Vector sums[ROWS][kVectors] = {};
  for (int64_t k = 0; k < steps; ++k, b += Math::kStep * width) {
    Vector of_b[kVectors];
    Math::rows(b, odd && k == steps - 1 ? 0 : width, of_b);
    if (!STREAM)
      for (int step = 0; step < Math::kStep; ++step)
        for (int v = 0; v < kVectors; ++v) __builtin_prefetch(b + (kAhead + step) * width + v * kLanes);
    for (int i = 0; i < ROWS; ++i) {
      const Vector of_a = Math::spread(a[i * a_row + k * a_step]);
      for (int v = 0; v < kVectors; ++v) sums[i][v] = Math::add(sums[i][v], of_a, of_b[v]);
    }
  }
  for (int i = 0; i < ROWS; ++i)
    for (int v = 0; v < kVectors; ++v) {
      auto* to = out + i * width + v * kLanes;
      STREAM ? stream(to, sums[i][v]) : store(to, sums[i][v]);
    }
}

// The sum of each of four vectors.
inline __m128 added_up(Vector a, Vector b, Vector c, Vector d) {
  const __m512 p = _mm512_add_ps(_mm512_unpacklo_ps(a, b), _mm512_unpackhi_ps(a, b));
  const __m512 q = _mm512_add_ps(_mm512_unpacklo_ps(c, d), _mm512_unpackhi_ps(c, d));
  const __m512 r = _mm512_add_ps(_mm512_shuffle_ps(p, q, 0x44), _mm512_shuffle_ps(p, q, 0xee));
  const __m512 s = _mm512_add_ps(r, _mm512_shuffle_f32x4(r, r, 0x4e));
  return _mm_add_ps(_mm512_castps512_ps128(s), _mm512_extractf32x4_ps(s, 1));
}
inline void store_four(float* to, __m128 value) { _mm_storeu_ps(to, value); }
inline void store_four(bf16* to, __m128 value) {
  const Halves all = rounded(bits_of<Vector>(_mm512_castps128_ps512(value)));
  std::memcpy(to, &all, 4 * sizeof *to);
}

// ROWS x 4 of out = a b^T. AHEAD: prefetches the 4 rows of b that follow.
template <class Math, int ROWS, bool AHEAD>
void dots(const typename Math::Left* a, const typename Math::Number* b, int64_t depth, typename Math::Number* out,
          int64_t width) {
  const int64_t a_row = depth / Math::kStep;
  Vector sums[ROWS][kColumns] = {};
  for (int64_t k = 0; k < a_row; k += kLanes) {
    Vector of_b[kColumns];
    for (int c = 0; c < kColumns; ++c) {
      of_b[c] = Math::right(b + c * depth + k * Math::kStep);
      if (AHEAD) __builtin_prefetch(b + (kColumns + c) * depth + k * Math::kStep);
    }
    for (int i = 0; i < ROWS; ++i) {
      Vector of_a = Math::left(a + i * a_row + k);
      __asm__("" : "+v"(of_a));  // keep it in a register: the compiler would reload it for every column
      for (int c = 0; c < kColumns; ++c) sums[i][c] = Math::add(sums[i][c], of_a, of_b[c]);
    }
  }
#pragma GCC unroll 8
  for (int i = 0; i < ROWS; ++i) store_four(out + i * width, added_up(sums[i][0], sums[i][1], sums[i][2], sums[i][3]));
}

// -- all rows, all experts ----------------------------------------------------------------------------------------------

// Calls f(first row, number of rows, a constant) for parts of at most kRows rows, as equal as possible.
template <class F>
void in_parts(int64_t rows, F f) {
  const int64_t parts = (rows + kRows - 1) / kRows;
  for (int64_t part = 0, i = 0; part < parts; ++part) {
    const int64_t size = (rows - i + parts - part - 1) / (parts - part);
    switch (size) {
      case 1: f(i, std::integral_constant<int, 1>()); break;
      case 2: f(i, std::integral_constant<int, 2>()); break;
      case 3: f(i, std::integral_constant<int, 3>()); break;
      case 4: f(i, std::integral_constant<int, 4>()); break;
      case 5: f(i, std::integral_constant<int, 5>()); break;
      default: f(i, std::integral_constant<int, kRows>());
    }
    i += size;
  }
}

template <class Math, class T = typename Math::Number>
void transposed_of(const T* a, const T* b, T* out, const int64_t* counts, int64_t experts, int64_t depth,
                   int64_t width) {
  std::vector<typename Math::Left> scratch;
  for (int64_t e = 0; e < experts; ++e, b += depth * width) {
    const auto* left = Math::along(a, counts[e], depth, scratch);
    for (int64_t j = 0; j < width; j += kColumns)
      in_parts(counts[e], [&](int64_t i, auto size) {
        const auto* rows = left + i * depth / Math::kStep;
        auto* to = out + i * width + j;
        i ? dots<Math, size.value, false>(rows, b + j * depth, depth, to, width)
          : dots<Math, size.value, true>(rows, b + j * depth, depth, to, width);
      });
    a += counts[e] * depth, out += counts[e] * width;
  }
}

template <class Math, class T = typename Math::Number>
void product_of(const T* a, const T* b, T* out, const int64_t* counts, int64_t experts, int64_t depth, int64_t width) {
  std::vector<typename Math::Left> scratch;
  const int64_t steps = depth / Math::kStep;
  for (int64_t e = 0; e < experts; ++e, b += depth * width) {
    const auto* left = Math::along(a, counts[e], depth, scratch);
    for (int64_t j = 0; j < width; j += kVectors * kLanes)
      in_parts(counts[e], [&](int64_t i, auto size) {
        multiples<Math, size.value, false>(left + i * steps, steps, 1, b + j, width, out + i * width + j, steps, false);
      });
    a += counts[e] * depth, out += counts[e] * width;
  }
}

template <class Math, class T = typename Math::Number>
void gradient_of(const T* a, const T* b, T* out, const int64_t* counts, int64_t experts, int64_t depth, int64_t width) {
  std::vector<typename Math::Left> scratch;
  for (int64_t e = 0; e < experts; ++e, out += depth * width) {
    const auto* left = Math::across(a, counts[e], depth, scratch);
    const int64_t steps = (counts[e] + Math::kStep - 1) / Math::kStep;
    const bool odd = counts[e] % Math::kStep;
    for (int64_t j = 0; j < width; j += kVectors * kLanes)
      in_parts(depth, [&](int64_t i, auto size) {
        multiples<Math, size.value, true>(left + i, 1, depth, b + j, width, out + i * width + j, steps, odd);
      });
    a += counts[e] * depth, b += counts[e] * width;
  }
  _mm_sfence();
}

#ifdef __AVX512BF16__
using Narrow = Paired;
#else
using Narrow = Widened<bf16>;
#endif

}  // namespace

#define EXPORT(NAME, FUNCTION, MATH)                                                                            \
  extern "C" void NAME(const MATH::Number* a, const MATH::Number* b, MATH::Number* out, const int64_t* counts,  \
                       int64_t experts, int64_t depth, int64_t width) {                                         \
    FUNCTION<MATH>(a, b, out, counts, experts, depth, width);                                                   \
  }
EXPORT(product_transposed_f32, transposed_of, Widened<float>)
EXPORT(product_transposed_bf16, transposed_of, Narrow)
EXPORT(product_transposed_bf16_wide, transposed_of, Widened<bf16>)
EXPORT(product_f32, product_of, Widened<float>)
EXPORT(product_bf16, product_of, Narrow)
EXPORT(product_bf16_wide, product_of, Widened<bf16>)
EXPORT(product_gradient_f32, gradient_of, Widened<float>)
EXPORT(product_gradient_bf16, gradient_of, Narrow)
EXPORT(product_gradient_bf16_wide, gradient_of, Widened<bf16>)
#endif
