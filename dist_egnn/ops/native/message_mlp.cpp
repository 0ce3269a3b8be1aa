// The message MLP of EGNN and FastEGNN, forward and backward, over edges and over pairs of a node and a virtual node.
//
//   a1 = (what the caller adds up for each message), m = SiLU(W2 SiLU(a1) + b2), scale_k = w_k . SiLU(W_k m + b_k), k < K
//
// Messages are processed in blocks of ROWS rows that stay in the first two caches: no array with a row per message exists in
// memory. The backward pass recomputes the forward pass of its block. The source is written with the compiler's vector
// extensions and is compiled once per instruction set (see build.py); float and double come from one template. Sums over
// many messages are gathered in the working precision over at most FLUSH rows, then in double, in a fixed order.
//
// Legend: N destinations, M sources, E edges, B graphs, C virtual nodes, H width, A edge attributes, S = 1 + A scalars of an
// edge, K coordinate MLPs. All arrays are row-major.

#include <cmath>
#include <cstdint>
#include <cstring>
#include <memory>
#include <new>
#include <type_traits>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

#ifndef VECTOR_BYTES
#define VECTOR_BYTES 16
#endif
#ifndef SOURCE_SUM
#define SOURCE_SUM 0
#endif
#ifndef PANEL  // vectors of a register block
#define PANEL 2
#endif

namespace {

constexpr int MR = 6;                 // rows of a register block: MR * PANEL accumulators
constexpr int64_t ROWS = 96;          // messages of a block, a multiple of MR
constexpr int64_t FLUSH = 64 * ROWS;  // messages that are summed in the working precision
constexpr int MAX_H = 256;

template <class T>
struct Simd {
    static constexpr int lanes = VECTOR_BYTES / sizeof(T);
    typedef T vec __attribute__((vector_size(VECTOR_BYTES), aligned(alignof(T)), may_alias));
    using Int = std::conditional_t<sizeof(T) == 4, int32_t, int64_t>;
    typedef Int ivec __attribute__((vector_size(VECTOR_BYTES)));
};

#define INLINE static inline __attribute__((always_inline))

template <class T>
using vec_t = typename Simd<T>::vec;

template <class T>
INLINE vec_t<T> load(const T* p) {
    return *reinterpret_cast<const vec_t<T>*>(p);
}

template <class T>
INLINE void store(T* p, vec_t<T> v) {
    *reinterpret_cast<vec_t<T>*>(p) = v;
}

template <class T>
INLINE vec_t<T> broadcast(T value) {
    return vec_t<T>{} + value;
}

// the sum of the lanes, by halves
template <class T, int bytes = VECTOR_BYTES, class V>
INLINE T sum_lanes(V v) {
    if constexpr (bytes == sizeof(T)) {
        return v[0];
    } else if constexpr (bytes == 2 * sizeof(T)) {
        return v[0] + v[1];
    } else {
        typedef T half __attribute__((vector_size(bytes / 2)));
        half low, high;
        __builtin_memcpy(&low, &v, bytes / 2);
        __builtin_memcpy(&high, reinterpret_cast<const char*>(&v) + bytes / 2, bytes / 2);
        return sum_lanes<T, bytes / 2>(low + high);
    }
}

template <class T>
INLINE T sum(vec_t<T> v) {
    return sum_lanes<T>(v);
}

// the smaller and the larger of limit and x; x where it is NaN
template <class V>
INLINE V least(V limit, V x) {
#if defined(__AVX512F__)
    if constexpr (sizeof(x[0]) == 4) return (V)_mm512_min_ps((__m512)limit, (__m512)x);
#elif defined(__AVX2__)
    if constexpr (sizeof(x[0]) == 4) return (V)_mm256_min_ps((__m256)limit, (__m256)x);
#endif
    return limit < x ? limit : x;
}

template <class V>
INLINE V most(V limit, V x) {
#if defined(__AVX512F__)
    if constexpr (sizeof(x[0]) == 4) return (V)_mm512_max_ps((__m512)limit, (__m512)x);
#elif defined(__AVX2__)
    if constexpr (sizeof(x[0]) == 4) return (V)_mm256_max_ps((__m256)limit, (__m256)x);
#endif
    return limit > x ? limit : x;
}

// e^x for x clamped to [-87, 87]; NaN stays NaN. x / ln 2 = n + f: n by adding and subtracting 1.5 * 2^23, 2^f by a polynomial.
INLINE vec_t<float> exponential(vec_t<float> x) {
    using ivec = Simd<float>::ivec;
    x = least(broadcast(87.0f), most(broadcast(-87.0f), x));
    const float magic = 12582912.0f, log2e = 1.44269504f;
    const vec_t<float> shifted = x * log2e + magic;
    const vec_t<float> f = x * log2e - (shifted - magic);
    vec_t<float> p = f * 1.535336188319500e-4f + 1.339887440266574e-3f;
    p = p * f + 9.618437357674640e-3f;
    p = p * f + 5.550332471162809e-2f;
    p = p * f + 2.402264791363012e-1f;
    p = p * f + 6.931472028550421e-1f;
    p = p * f + 1.0f;
    const ivec scale = ((ivec)shifted << 23) + 0x3f800000;  // the low bits of `shifted` are n
    return p * (vec_t<float>)scale;
}

INLINE vec_t<double> exponential(vec_t<double> x) {
    using ivec = Simd<double>::ivec;
    x = least(broadcast(700.0), most(broadcast(-700.0), x));
    const double magic = 6755399441055744.0;
    const vec_t<double> shifted = x * 1.4426950408889634 + magic;
    const vec_t<double> n = shifted - magic;
    vec_t<double> r = x - n * 6.93145751953125e-1;
    r = r - n * 1.42860682030941723212e-6;
    vec_t<double> p = broadcast(1.0 / 6227020800.0);  // Taylor to the 13th power: |r| < 0.35
    const double factor[] = {1.0 / 479001600.0, 1.0 / 39916800.0, 1.0 / 3628800.0, 1.0 / 362880.0, 1.0 / 40320.0,
                             1.0 / 5040.0,      1.0 / 720.0,      1.0 / 120.0,     1.0 / 24.0,     1.0 / 6.0,
                             0.5,               1.0,              1.0};
    for (double f : factor) p = p * r + f;
    const ivec scale = ((ivec)shifted << 52) + 0x3ff0000000000000;
    return p * (vec_t<double>)scale;
}

#if defined(__AVX512F__)
// e^-x for x up to 87, beyond that e^-87, in 12 instructions. -x / ln 2 = n / 16 + f: 16 powers in a register, and a polynomial for 2^f.
// It needs no lower limit: the reciprocal of 1 + e^-x for x < -87 is zero, whatever the sign of an overflow.
INLINE vec_t<float> exponential_of_minus(vec_t<float> x) {
    const __m512 powers = _mm512_setr_ps(1.0f, 1.04427378f, 1.09050773f, 1.13878863f, 1.18920712f, 1.24185781f, 1.29683955f,
                                         1.35425555f, 1.41421356f, 1.47682615f, 1.54221083f, 1.61049033f, 1.68179283f,
                                         1.75625216f, 1.83400809f, 1.91520656f);
    x = least(broadcast(87.0f), x);
    const float magic = 786432.0f, log2e = -1.44269504f;  // 1.5 * 2^19: the low bits of `shifted` are n
    const vec_t<float> shifted = x * log2e + magic, n = shifted - magic, f = x * log2e - n;
    const vec_t<float> p = ((f * 5.5504109e-2f + 2.4022651e-1f) * f + 6.9314718e-1f) * f;
    const vec_t<float> power = (vec_t<float>)_mm512_permutexvar_ps((__m512i)shifted, powers);
    return (vec_t<float>)_mm512_scalef_ps((__m512)(power * p + power), (__m512)n);
}
#endif

// low: to 6e-4 of its value, for products in bfloat16
template <class T, bool low>
INLINE vec_t<T> sigmoid(vec_t<T> x) {
#if defined(__AVX512BF16__)
    if constexpr (low && sizeof(T) == 4) {
        const vec_t<T> scaled = x * -1.44269504f, f = (vec_t<T>)_mm512_reduce_ps((__m512)scaled, 0);
        vec_t<T> p = f * 5.171758e-2f + 2.4261114e-1f;
        p = p * f + 6.9326098e-1f;
        p = p * f + 9.9992807e-1f;
        return (vec_t<T>)_mm512_rcp14_ps((__m512)(1.0f + (vec_t<T>)_mm512_scalef_ps((__m512)p, (__m512)(scaled - f))));
    }
#endif
#if defined(__AVX512F__)
    if constexpr (sizeof(T) == 4) return T(1) / (T(1) + exponential_of_minus(x));
#endif
    return T(1) / (T(1) + exponential(-x));
}

// y = SiLU(a) over n values, a multiple of the lanes; y may be a
template <bool low, class T>
void silu(int64_t n, const T* a, T* y) {
    for (int64_t k = 0; k < n; k += Simd<T>::lanes) {
        const vec_t<T> x = load(a + k);
        store(y + k, x * sigmoid<T, low>(x));
    }
}

// y = SiLU(a) and its derivative d
template <bool low, class T>
void silu_and_derivative(int64_t n, const T* a, T* y, T* d) {
    for (int64_t k = 0; k < n; k += Simd<T>::lanes) {
        const vec_t<T> x = load(a + k), g = sigmoid<T, low>(x), s = x * g;
        store(y + k, s);
        store(d + k, s * (T(1) - g) + g);
    }
}

// what a product multiplies: values of T, or pairs of bfloat16 that lie one after the other in the summed direction
struct Pair {
    uint32_t bits;
};

template <class T>
INLINE vec_t<T> spread(const T* p) {
    return broadcast(*p);
}

template <class T>
INLINE vec_t<T> multiply_add(vec_t<T> sum, vec_t<T> left, vec_t<T> right) {
    return sum + left * right;
}

#if defined(__AVX512BF16__)
constexpr bool has_bfloat16 = true;
INLINE __m512i load(const Pair* p) { return _mm512_loadu_si512(p); }
INLINE __m512i spread(const Pair* p) { return _mm512_set1_epi32(static_cast<int>(p->bits)); }
template <class T>
INLINE vec_t<T> multiply_add(vec_t<T> sum, __m512i left, __m512i right) {
    return (vec_t<T>)_mm512_dpbf16_ps((__m512)sum, (__m512bh)left, (__m512bh)right);
}
INLINE __m512i widened(const float* p) {
    return _mm512_cvtepu16_epi32((__m256i)_mm512_cvtneps_pbh(_mm512_loadu_ps(p)));
}
#else
constexpr bool has_bfloat16 = false;
#endif

// c[r][:] = start + sum over k of a[r * row + k * step] * b[k][:] for M rows and V vectors of columns
template <class T, class E, int M, int V>
INLINE void register_block(int64_t depth, const E* a, int64_t row, int64_t step, const E* b, int64_t ldb, const T* bias,
                           bool add, T* c, int64_t ldc) {
    constexpr int L = Simd<T>::lanes;
    vec_t<T> acc[M][V];
#pragma GCC unroll 8
    for (int r = 0; r < M; r++)
#pragma GCC unroll 4
        for (int j = 0; j < V; j++) acc[r][j] = add ? load(c + r * ldc + j * L) : bias ? load(bias + j * L) : vec_t<T>{};
    for (int64_t k = 0; k < depth; k++) {
        decltype(load(b)) right[V];
#pragma GCC unroll 4
        for (int j = 0; j < V; j++) right[j] = load(b + k * ldb + j * L);
#pragma GCC unroll 8
        for (int r = 0; r < M; r++) {
            const auto left = spread(a + r * row + k * step);
#pragma GCC unroll 4
            for (int j = 0; j < V; j++) acc[r][j] = multiply_add<T>(acc[r][j], left, right[j]);
        }
    }
#pragma GCC unroll 8
    for (int r = 0; r < M; r++)
#pragma GCC unroll 4
        for (int j = 0; j < V; j++) store(c + r * ldc + j * L, acc[r][j]);
}

template <int V, class T, class E>
void column_panel(int64_t rows, int64_t depth, const E* a, int64_t row, int64_t step, const E* b, int64_t ldb, const T* bias,
                  bool add, T* c, int64_t ldc) {
    int64_t r = 0;
    for (; r + MR <= rows; r += MR)
        register_block<T, E, MR, V>(depth, a + r * row, row, step, b, ldb, bias, add, c + r * ldc, ldc);
    for (; r + 2 <= rows; r += 2)
        register_block<T, E, 2, V>(depth, a + r * row, row, step, b, ldb, bias, add, c + r * ldc, ldc);
    for (; r < rows; r++) register_block<T, E, 1, V>(depth, a + r * row, row, step, b, ldb, bias, add, c + r * ldc, ldc);
}

// c (rows, width) [+]= a b [+ bias]; a element (r, k) lies at a[r * row + k * step], b (depth, width) has rows of width ldb
template <class T, class E>
void product(int64_t rows, int64_t width, int64_t depth, const E* a, int64_t row, int64_t step, const E* b, int64_t ldb,
             const T* bias, bool add, T* c) {
    constexpr int L = Simd<T>::lanes;
    int64_t j = 0;
    for (; j + PANEL * L <= width; j += PANEL * L)
        column_panel<PANEL>(rows, depth, a, row, step, b + j, ldb, bias ? bias + j : nullptr, add, c + j, width);
    if (j + 2 * L <= width) {
        column_panel<2>(rows, depth, a, row, step, b + j, ldb, bias ? bias + j : nullptr, add, c + j, width);
        j += 2 * L;
    }
    for (; j < width; j += L)
        column_panel<1>(rows, depth, a, row, step, b + j, ldb, bias ? bias + j : nullptr, add, c + j, width);
}

template <class T>
struct Buffer {  // aligned, not initialised
    std::unique_ptr<T[], void (*)(T*)> data;
    explicit Buffer(int64_t n)
        : data(static_cast<T*>(::operator new[](sizeof(T) * (n ? n : 1), std::align_val_t(64))),
               [](T* p) { ::operator delete[](p, std::align_val_t(64)); }) {}
    operator T*() const { return data.get(); }
};

template <class T>
void clear(T* values, int64_t n) {  // memset must not get the null pointer of an empty array
    if (n) std::memset(values, 0, sizeof(T) * n);
}

template <class T>
struct Weights {  // of the networks after the first layer
    const T *w2, *b2;       // (H, H), (H,)
    const T *wx, *bx, *w;   // (K, H, H), (K, H), (K, H): coordinate MLPs
};

// rows 2k and 2k + 1 of a matrix (rows, width) as one row of pairs; an odd last row is paired with zeros
inline void pair_rows([[maybe_unused]] int64_t rows, [[maybe_unused]] int64_t width, [[maybe_unused]] const float* a,
                      [[maybe_unused]] Pair* pairs) {
#if defined(__AVX512BF16__)
    for (int64_t r = 0; r < rows; r += 2)
        for (int64_t c = 0; c < width; c += 16) {
            __m512i both = widened(a + r * width + c);
            if (r + 1 < rows) both = _mm512_or_si512(both, _mm512_slli_epi32(widened(a + (r + 1) * width + c), 16));
            _mm512_storeu_si512(pairs + r / 2 * width + c, both);
        }
#endif
}

// neighbouring columns of a matrix as pairs: (rows, width / 2)
inline void pair_columns([[maybe_unused]] int64_t values, [[maybe_unused]] const float* a, [[maybe_unused]] Pair* pairs) {
#if defined(__AVX512BF16__)
    for (int64_t k = 0; k < values; k += 16)
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(pairs + k / 2), (__m256i)_mm512_cvtneps_pbh(_mm512_loadu_ps(a + k)));
#endif
}

// sums over messages: in T over some blocks, then in double
template <class T>
struct Sum {
    int64_t n;
    Buffer<T> part;
    double* total;
    Sum(int64_t n, double* total) : n(n), part(n), total(total) { clear<T>(part, n); }
    void flush() {
        for (int64_t k = 0; k < n; k++) total[k] += part[k], part[k] = 0;
    }
};

// the MLP on one block of rows
template <class T>
struct Block {
    const int64_t H, K;
    const Weights<T>& w;
    const bool low;                    // products in bfloat16, summed in float
    Buffer<T> w2t, wxt;                // transposed: right-hand sides of the forward products
    Buffer<T> a1, s1, d1, m, d2, a3, g, h;  // (ROWS, H) each
    Buffer<T> scale;                   // (K, ROWS)
    Buffer<Pair> w2_low, w2t_low, wx_low, wxt_low, left_low, right_low;

    Block(int64_t H, int64_t K, const Weights<T>& w, bool wants_low)
        : H(H), K(K), w(w), low(wants_low && has_bfloat16 && std::is_same_v<T, float>), w2t(H * H), wxt(K * H * H),
          a1(ROWS * H), s1(ROWS * H), d1(ROWS * H), m(ROWS * H), d2(ROWS * H), a3(ROWS * H), g(ROWS * H), h(ROWS * H),
          scale(K * ROWS), w2_low(low ? H * H / 2 : 0), w2t_low(low ? H * H / 2 : 0), wx_low(low ? K * H * H / 2 : 0),
          wxt_low(low ? K * H * H / 2 : 0), left_low(low ? ROWS * H / 2 : 0), right_low(low ? ROWS * H / 2 : 0) {
        for (int64_t r = 0; r < H; r++)
            for (int64_t c = 0; c < H; c++) {
                w2t[c * H + r] = w.w2[r * H + c];
                for (int64_t k = 0; k < K; k++) wxt[k * H * H + c * H + r] = w.wx[k * H * H + r * H + c];
            }
        if constexpr (std::is_same_v<T, float>)
            if (low) {
                pair_rows(H, H, w.w2, w2_low), pair_rows(H, H, w2t, w2t_low);
                pair_rows(K * H, H, w.wx, wx_low), pair_rows(K * H, H, wxt, wxt_low);
            }
    }

    // c (n, H) [+]= a b [+ bias] for a (n, H) and weights b (H, H), also given as pairs
    void multiply(int64_t n, const T* a, const T* b, [[maybe_unused]] const Pair* b_low, const T* bias, bool add, T* c) const {
#if defined(__AVX512BF16__)
        if constexpr (std::is_same_v<T, float>)
            if (low) {
                pair_columns(n * H, a, left_low);
                return product<T, Pair>(n, H, H / 2, left_low, H / 2, 1, b_low, H, bias, add, c);
            }
#endif
        product<T, T>(n, H, H, a, H, 1, b, H, bias, add, c);
    }

    // c (H, H) += aᵀ b for a, b (n, H)
    void outer(int64_t n, const T* a, const T* b, T* c) const {
#if defined(__AVX512BF16__)
        if constexpr (std::is_same_v<T, float>)
            if (low) {
                pair_rows(n, H, a, left_low), pair_rows(n, H, b, right_low);
                return product<T, Pair>(H, H, (n + 1) / 2, left_low, 1, H, right_low, H, nullptr, true, c);
            }
#endif
        product<T, T>(H, H, n, a, 1, H, b, H, nullptr, true, c);
    }

    // a1 → m and scale
    void forward(int64_t n) { low ? forward_by<true>(n) : forward_by<false>(n); }

    template <bool coarse>
    void forward_by(int64_t n) {
        silu<coarse, T>(n * H, a1, a1);
        multiply(n, a1, w2t, w2t_low, w.b2, false, m);
        silu<coarse, T>(n * H, m, m);
        for (int64_t k = 0; k < K; k++) {
            multiply(n, m, wxt + k * H * H, wxt_low + k * H * H / 2, w.bx + k * H, false, a3);
            for (int64_t r = 0; r < n; r++) {
                vec_t<T> dot{};
                for (int64_t c = 0; c < H; c += Simd<T>::lanes) {
                    const vec_t<T> x = load(a3 + r * H + c);
                    dot += x * sigmoid<T, coarse>(x) * load(w.w + k * H + c);
                }
                scale[k * ROWS + r] = sum<T>(dot);
            }
        }
    }

    // a1 → scale, m and what the rest of the backward pass needs of them
    void forward_for_backward(int64_t n) { low ? forward_for_backward_by<true>(n) : forward_for_backward_by<false>(n); }

    template <bool coarse>
    void forward_for_backward_by(int64_t n) {
        silu_and_derivative<coarse, T>(n * H, a1, s1, d1);
        multiply(n, s1, w2t, w2t_low, w.b2, false, a3);
        silu_and_derivative<coarse, T>(n * H, a3, m, d2);
    }

    // scale = w . SiLU(a3), g = its gradient times that of scale, and the sums for the gradients of w and b; V vectors of columns
    template <int V, bool coarse>
    void last_layer(int64_t n, const T* g_scale, const T* weights, int64_t c, T* scales, T* of_w, T* of_b) {
        constexpr int L = Simd<T>::lanes;
        vec_t<T> weight[V], sum_w[V], sum_b[V];
#pragma GCC unroll 4
        for (int j = 0; j < V; j++)
            weight[j] = load(weights + c + j * L), sum_w[j] = load(of_w + c + j * L), sum_b[j] = load(of_b + c + j * L);
        for (int64_t r = 0; r < n; r++) {
            const vec_t<T> grad = broadcast(g_scale[r]);
            vec_t<T> dot{};
#pragma GCC unroll 4
            for (int j = 0; j < V; j++) {
                const vec_t<T> x = load(a3 + r * H + c + j * L), s = sigmoid<T, coarse>(x), y = x * s;
                const vec_t<T> g3 = grad * weight[j] * (y * (T(1) - s) + s);
                dot += y * weight[j];
                sum_w[j] += grad * y;
                sum_b[j] += g3;
                store(g + r * H + c + j * L, g3);
            }
            scales[r] += sum<T>(dot);
        }
#pragma GCC unroll 4
        for (int j = 0; j < V; j++) store(of_w + c + j * L, sum_w[j]), store(of_b + c + j * L, sum_b[j]);
    }

    // after forward_for_backward: scale of one coordinate MLP; h [+]= its part of the gradient of m, given that of scale
    void coordinate(int64_t n, int64_t k, const T* g_scale, Sum<T>& d_wx, Sum<T>& d_bx, Sum<T>& d_w) {
        constexpr int L = Simd<T>::lanes;
        multiply(n, m, wxt + k * H * H, wxt_low + k * H * H / 2, w.bx + k * H, false, a3);
        T *of_w = d_w.part + k * H, *of_b = d_bx.part + k * H, *scales = scale + k * ROWS;
        const T* weights = w.w + k * H;
        for (int64_t r = 0; r < n; r++) scales[r] = 0;
        for (int64_t c = 0; c < H;) {
            const bool panel = c + PANEL * L <= H;
            if (panel)
                low ? last_layer<PANEL, true>(n, g_scale, weights, c, scales, of_w, of_b)
                    : last_layer<PANEL, false>(n, g_scale, weights, c, scales, of_w, of_b);
            else
                low ? last_layer<1, true>(n, g_scale, weights, c, scales, of_w, of_b)
                    : last_layer<1, false>(n, g_scale, weights, c, scales, of_w, of_b);
            c += panel ? PANEL * L : L;
        }
        outer(n, g, m, d_wx.part + k * H * H);
        multiply(n, g, w.wx + k * H * H, wx_low + k * H * H / 2, nullptr, k > 0, h);
    }

    // h: gradient of m → g: gradient of a1
    void rest(int64_t n, Sum<T>& d_w2, Sum<T>& d_b2) {
        constexpr int L = Simd<T>::lanes;
        for (int64_t c = 0; c < H; c += L) {
            vec_t<T> total = load(d_b2.part + c);
            for (int64_t r = 0; r < n; r++) {
                const vec_t<T> value = load(h + r * H + c) * load(d2 + r * H + c);
                store(h + r * H + c, value);
                total += value;
            }
            store(d_b2.part + c, total);
        }
        outer(n, h, s1, d_w2.part);
        multiply(n, h, w.w2, w2_low, nullptr, false, g);
        for (int64_t k = 0; k < n * H; k += L) store(g + k, load(g + k) * load(d1 + k));
    }
};

}  // namespace

extern "C" {

// the caller's view, see kernels.py; pointers are to T
struct Edges {
    int64_t hidden, attributes, destinations, normalize, low;
    const int32_t* start;    // (N + 1,) where the in-edges of each destination begin
    const int32_t* source;   // (E,) row of the source
    const int32_t* row;      // (E,) row of the edge in `e` and `shift`; null: its own number
    const void *p, *q;       // (N, H), (M, H): the ends' shares of the first layer
    const void *x_dst, *x_src;  // (N, 3), (M, 3)
    const void *e, *shift;   // (rows, A), (rows, 3); null: none
    const void *w_s;         // (S, H): columns of the first layer for squared length and e
    const void *w2, *b2, *wx, *bx, *w;
    void *mean_m, *mean_dx;  // (N, H) or null, (N, 3): means over in-edges; in the backward pass their gradients
    void *d_p, *d_q, *d_x_dst, *d_x_src, *d_e;  // gradients, added to; d_e may be null
    double *d_w_s, *d_w2, *d_b2, *d_wx, *d_bx, *d_w;
};

struct Pairs {
    int64_t hidden, virtual_nodes, nodes, graphs, low;
    const int32_t* graph;      // (N,) graph of each node; null: all lie in graph 0
    const void *p;             // (N, H), the node's share of the first layer; null: none
    const void *x;             // (N, 3)
    const void *z, *u;         // (B, C, 3), (B, C, H): positions, and the virtual node's share of the first layer
    const void *w_d;           // (H,): column of the first layer for the distance
    const void *w2, *b2, *wx, *bx, *w;  // K = 2: φ_xv, φ_z
    // results, null where not wanted, dx if to_z is null (arrays without rows are null too); backward: their gradients
    void *dx, *m;              // (N, 3), (N, H): means over c
    void *to_z, *to_s;         // (B, C, 3), (B, C, H): sums over nodes
    void *d_p, *d_x;           // gradients (N, …), written
    double *d_z, *d_u, *d_w_d, *d_w2, *d_b2, *d_wx, *d_bx, *d_w;
};

struct Linear {
    int64_t rows, inputs, outputs, add;  // inputs and outputs are multiples of 16; add: to what y contains
    const void *x, *w, *b;          // (rows, inputs), (outputs, inputs), (outputs,) or null
    void* y;                        // (rows, outputs); in the backward pass its gradient
    void* d_x;                      // (rows, inputs), written; null: not wanted
    double *d_w, *d_b;              // added to; d_b may be null
};
}

namespace {

// the edges of a block: destination, offset x_i − x_j, its square and, for `normalize`, one over its length
template <class T>
struct Ends {
    int32_t destination[ROWS];
    T r[ROWS * 3], inverse[ROWS];
    Buffer<T> scalars;  // (ROWS, S): squared length and attributes
    explicit Ends(int64_t attributes) : scalars(ROWS * (1 + attributes)) {}
};

template <class T>
void first_layer(const Edges& g, int64_t from, int64_t n, int64_t& node, Ends<T>& ends, T* a1) {
    const int64_t H = g.hidden, A = g.attributes;
    const T *p = static_cast<const T*>(g.p), *q = static_cast<const T*>(g.q), *w_s = static_cast<const T*>(g.w_s);
    const T *xd = static_cast<const T*>(g.x_dst), *xs = static_cast<const T*>(g.x_src);
    const T *attribute = static_cast<const T*>(g.e), *shift = static_cast<const T*>(g.shift);
    for (int64_t k = 0; k < n; k++) {
        while (g.start[node + 1] <= from + k) node++;
        const int64_t j = g.source[from + k], row = g.row ? g.row[from + k] : from + k;
        ends.destination[k] = static_cast<int32_t>(node);
        if (k + 6 < n)  // sources are rows in any order
            for (int64_t c = 0; c < H; c += 64 / sizeof(T)) __builtin_prefetch(q + g.source[from + k + 6] * H + c);
        T squared = 0;
        for (int c = 0; c < 3; c++) {
            const T r = xd[3 * node + c] - xs[3 * j + c] - (shift ? shift[3 * row + c] : T(0));
            ends.r[3 * k + c] = r;
            squared += r * r;
        }
        T* scalars = ends.scalars + k * (1 + A);
        scalars[0] = squared;
        for (int64_t s = 0; s < A; s++) scalars[1 + s] = attribute[row * A + s];
        ends.inverse[k] = g.normalize ? T(1) / (std::sqrt(squared) + T(1e-8)) : T(1);
        for (int64_t c = 0; c < H; c += Simd<T>::lanes) store(a1 + k * H + c, load(p + node * H + c) + load(q + j * H + c));
    }
    product<T, T>(n, H, 1 + A, ends.scalars, 1 + A, 1, w_s, H, nullptr, true, a1);
}

template <class T>
Weights<T> weights_of(const void* w2, const void* b2, const void* wx, const void* bx, const void* w) {
    return {static_cast<const T*>(w2), static_cast<const T*>(b2), static_cast<const T*>(wx), static_cast<const T*>(bx),
            static_cast<const T*>(w)};
}

template <class T>
void edges_forward(const Edges& g) {
    constexpr int L = Simd<T>::lanes;
    const int64_t H = g.hidden, edges = g.start[g.destinations];
    const Weights<T> w = weights_of<T>(g.w2, g.b2, g.wx, g.bx, g.w);
    Block<T> block(H, 1, w, g.low);
    Ends<T> ends(g.attributes);
    T *mean_m = static_cast<T*>(g.mean_m), *mean_dx = static_cast<T*>(g.mean_dx);
    if (mean_m) clear<T>(mean_m, g.destinations * H);
    clear<T>(mean_dx, g.destinations * 3);
    int64_t node = 0;
    for (int64_t from = 0; from < edges; from += ROWS) {
        const int64_t n = edges - from < ROWS ? edges - from : ROWS;
        first_layer<T>(g, from, n, node, ends, block.a1);
        block.forward(n);
        for (int64_t k = 0; k < n; k++) {
            const int64_t i = ends.destination[k];
            const T share = T(1) / (g.start[i + 1] - g.start[i]);
            const T scaled = block.scale[k] * share * ends.inverse[k];
            for (int c = 0; c < 3; c++) mean_dx[3 * i + c] += ends.r[3 * k + c] * scaled;
            if (!mean_m) continue;
            for (int64_t c = 0; c < H; c += L)
                store(mean_m + i * H + c, load(mean_m + i * H + c) + share * load(block.m + k * H + c));
        }
    }
}

template <class T>
void edges_backward(const Edges& g) {
    constexpr int L = Simd<T>::lanes;
    const int64_t H = g.hidden, A = g.attributes, edges = g.start[g.destinations];
    const Weights<T> w = weights_of<T>(g.w2, g.b2, g.wx, g.bx, g.w);
    Block<T> block(H, 1, w, g.low);
    Ends<T> ends(g.attributes);
    Sum<T> d_w_s((1 + A) * H, g.d_w_s), d_w2(H * H, g.d_w2), d_b2(H, g.d_b2), d_wx(H * H, g.d_wx), d_bx(H, g.d_bx), d_w(H, g.d_w);
    const T *g_m = static_cast<const T*>(g.mean_m), *g_dx = static_cast<const T*>(g.mean_dx);
    const T* w_s = static_cast<const T*>(g.w_s);
    T *d_p = static_cast<T*>(g.d_p), *d_q = static_cast<T*>(g.d_q), *d_e = static_cast<T*>(g.d_e);
    T *d_x_dst = static_cast<T*>(g.d_x_dst), *d_x_src = static_cast<T*>(g.d_x_src);
    T share[ROWS], g_scale[ROWS];
    int64_t node = 0, summed = 0;
    for (int64_t from = 0; from < edges; from += ROWS) {
        const int64_t n = edges - from < ROWS ? edges - from : ROWS;
        first_layer<T>(g, from, n, node, ends, block.a1);
        block.forward_for_backward(n);
        for (int64_t k = 0; k < n; k++) {
            const int64_t i = ends.destination[k];
            const T *of = g_dx + 3 * i, *r = ends.r + 3 * k;
            share[k] = T(1) / (g.start[i + 1] - g.start[i]);
            g_scale[k] = (of[0] * r[0] + of[1] * r[1] + of[2] * r[2]) * share[k] * ends.inverse[k];
        }
        block.coordinate(n, 0, g_scale, d_wx, d_bx, d_w);
        if (g_m)
            for (int64_t k = 0; k < n; k++) {
                T* row = block.h + k * H;
                const T* of = g_m + static_cast<int64_t>(ends.destination[k]) * H;
                for (int64_t c = 0; c < H; c += L) store(row + c, load(row + c) + share[k] * load(of + c));
            }
        block.rest(n, d_w2, d_b2);
        product<T, T>(1 + A, H, n, ends.scalars, 1, 1 + A, block.g, H, nullptr, true, d_w_s.part);
        for (int64_t k = 0; k < n; k++) {
            const int64_t i = ends.destination[k], j = g.source[from + k], row = g.row ? g.row[from + k] : from + k;
            const T* g1 = block.g + k * H;
            vec_t<T> dot{};
            for (int64_t c = 0; c < H; c += L) {
                const vec_t<T> value = load(g1 + c);
                store(d_p + i * H + c, load(d_p + i * H + c) + value);
                store(d_q + j * H + c, load(d_q + j * H + c) + value);
                dot += value * load(w_s + c);
            }
            for (int64_t s = 0; d_e && s < A; s++) {
                vec_t<T> of_e{};
                for (int64_t c = 0; c < H; c += L) of_e += load(g1 + c) * load(w_s + (1 + s) * H + c);
                d_e[row * A + s] += sum<T>(of_e);
            }
            const T along = 2 * sum<T>(dot), across = block.scale[k] * share[k] * ends.inverse[k];
            for (int c = 0; c < 3; c++) {
                const T value = along * ends.r[3 * k + c] + across * g_dx[3 * i + c];
                d_x_dst[3 * i + c] += value;
                d_x_src[3 * j + c] -= value;
            }
        }
        if ((summed += n) >= FLUSH || from + n == edges) {
            d_w_s.flush(), d_w2.flush(), d_b2.flush(), d_wx.flush(), d_bx.flush(), d_w.flush();
            summed = 0;
        }
    }
}

// the pairs of a block: offset x_i − z_c and distance
template <class T>
struct Offsets {
    T r[ROWS * 3], distance[ROWS];
};

template <class T>
void first_layer(const Pairs& g, int64_t from, int64_t n, Offsets<T>& offsets, T* a1) {
    const int64_t H = g.hidden, C = g.virtual_nodes;
    const T *p = static_cast<const T*>(g.p), *x = static_cast<const T*>(g.x), *z = static_cast<const T*>(g.z);
    const T *u = static_cast<const T*>(g.u), *w_d = static_cast<const T*>(g.w_d);
    for (int64_t k = 0; k < n; k++) {
        const int64_t i = (from + k) / C, at = (g.graph ? g.graph[i] : 0) * C + (from + k) % C;
        T squared = 0;
        for (int c = 0; c < 3; c++) {
            const T r = x[3 * i + c] - z[3 * at + c];
            offsets.r[3 * k + c] = r;
            squared += r * r;
        }
        offsets.distance[k] = std::sqrt(squared);
        const vec_t<T> length = broadcast(offsets.distance[k]);
        for (int64_t c = 0; c < H; c += Simd<T>::lanes) {
            vec_t<T> value = load(u + at * H + c) + length * load(w_d + c);
            if (p) value += load(p + i * H + c);
            store(a1 + k * H + c, value);
        }
    }
}

template <class T>
void pairs_forward(const Pairs& g) {
    constexpr int L = Simd<T>::lanes;
    const int64_t H = g.hidden, C = g.virtual_nodes, rows = g.nodes * C, cells = g.graphs * C;
    const Weights<T> w = weights_of<T>(g.w2, g.b2, g.wx, g.bx, g.w);
    Offsets<T> offsets;
    T *dx = static_cast<T*>(g.dx), *m = static_cast<T*>(g.m), *to_z = static_cast<T*>(g.to_z), *to_s = static_cast<T*>(g.to_s);
    Block<T> block(H, to_z ? 2 : 0, w, g.low);
    Buffer<double> sum_z(cells * 3), sum_s(to_s ? cells * H : 0);
    clear<double>(sum_z, cells * 3);
    if (to_s) clear<double>(sum_s, cells * H);
    if (to_z) clear<T>(dx, g.nodes * 3);
    if (m) clear<T>(m, g.nodes * H);
    const T share = T(1) / C;
    for (int64_t from = 0; from < rows; from += ROWS) {
        const int64_t n = rows - from < ROWS ? rows - from : ROWS;
        first_layer<T>(g, from, n, offsets, block.a1);
        block.forward(n);
        for (int64_t k = 0; k < n; k++) {
            const int64_t i = (from + k) / C, at = (g.graph ? g.graph[i] : 0) * C + (from + k) % C;
            const T *row = block.m + k * H, *r = offsets.r + 3 * k;
            for (int c = 0; to_z && c < 3; c++) {
                dx[3 * i + c] += r[c] * (block.scale[k] * share);
                sum_z[3 * at + c] -= r[c] * block.scale[ROWS + k];
            }
            if (m)
                for (int64_t c = 0; c < H; c += L) store(m + i * H + c, load(m + i * H + c) + share * load(row + c));
            if (to_s)
                for (int64_t c = 0; c < H; c++) sum_s[at * H + c] += row[c];
        }
    }
    for (int64_t k = 0; to_z && k < cells * 3; k++) to_z[k] = static_cast<T>(sum_z[k]);
    for (int64_t k = 0; to_s && k < cells * H; k++) to_s[k] = static_cast<T>(sum_s[k]);
}

template <class T>
void pairs_backward(const Pairs& g) {
    constexpr int L = Simd<T>::lanes;
    const int64_t H = g.hidden, C = g.virtual_nodes, rows = g.nodes * C;
    const Weights<T> w = weights_of<T>(g.w2, g.b2, g.wx, g.bx, g.w);
    Block<T> block(H, 2, w, g.low);
    Offsets<T> offsets;
    Sum<T> d_w_d(H, g.d_w_d), d_w2(H * H, g.d_w2), d_b2(H, g.d_b2), d_wx(2 * H * H, g.d_wx), d_bx(2 * H, g.d_bx), d_w(2 * H, g.d_w);
    const T *g_dx = static_cast<const T*>(g.dx), *g_m = static_cast<const T*>(g.m);
    const T *g_z = static_cast<const T*>(g.to_z), *g_s = static_cast<const T*>(g.to_s), *w_d = static_cast<const T*>(g.w_d);
    T *d_p = static_cast<T*>(g.d_p), *d_x = static_cast<T*>(g.d_x);
    if (d_p) clear<T>(d_p, g.nodes * H);
    clear<T>(d_x, g.nodes * 3);
    const T share = T(1) / C;
    T g_scale[2][ROWS];
    int64_t summed = 0;
    for (int64_t from = 0; from < rows; from += ROWS) {
        const int64_t n = rows - from < ROWS ? rows - from : ROWS;
        first_layer<T>(g, from, n, offsets, block.a1);
        block.forward_for_backward(n);
        for (int64_t k = 0; k < n; k++) {
            const int64_t i = (from + k) / C, at = (g.graph ? g.graph[i] : 0) * C + (from + k) % C;
            const T *r = offsets.r + 3 * k, *of_x = g_dx + 3 * i, *of_z = g_z + 3 * at;
            g_scale[0][k] = (of_x[0] * r[0] + of_x[1] * r[1] + of_x[2] * r[2]) * share;
            g_scale[1][k] = -(of_z[0] * r[0] + of_z[1] * r[1] + of_z[2] * r[2]);
        }
        for (int64_t k = 0; k < 2; k++) block.coordinate(n, k, g_scale[k], d_wx, d_bx, d_w);
        for (int64_t k = 0; k < n && (g_m || g_s); k++) {
            const int64_t i = (from + k) / C, at = (g.graph ? g.graph[i] : 0) * C + (from + k) % C;
            T* row = block.h + k * H;
            for (int64_t c = 0; c < H; c += L) {
                vec_t<T> value = load(row + c);
                if (g_m) value += share * load(g_m + i * H + c);
                if (g_s) value += load(g_s + at * H + c);
                store(row + c, value);
            }
        }
        block.rest(n, d_w2, d_b2);
        for (int64_t k = 0; k < n; k++) {
            const int64_t i = (from + k) / C, at = (g.graph ? g.graph[i] : 0) * C + (from + k) % C;
            const T *g1 = block.g + k * H, *r = offsets.r + 3 * k;
            vec_t<T> dot{};
            for (int64_t c = 0; c < H; c += L) {
                const vec_t<T> value = load(g1 + c);
                if (d_p) store(d_p + i * H + c, load(d_p + i * H + c) + value);
                dot += value * load(w_d + c);
                store(d_w_d.part + c, load(d_w_d.part + c) + offsets.distance[k] * value);
            }
            for (int64_t c = 0; c < H; c++) g.d_u[at * H + c] += g1[c];
            const T distance = offsets.distance[k], along = distance > 0 || distance != distance ? sum<T>(dot) / distance : T(0);
            for (int c = 0; c < 3; c++) {
                const T value = along * r[c] + block.scale[k] * share * g_dx[3 * i + c] - block.scale[ROWS + k] * g_z[3 * at + c];
                d_x[3 * i + c] += value;
                g.d_z[3 * at + c] -= value;
            }
        }
        if ((summed += n) >= FLUSH || from + n == rows) {
            d_w_d.flush(), d_w2.flush(), d_b2.flush(), d_wx.flush(), d_bx.flush(), d_w.flush();
            summed = 0;
        }
    }
}

template <class T>
void linear_forward(const Linear& g) {
    const int64_t I = g.inputs, O = g.outputs;
    const T *x = static_cast<const T*>(g.x), *w = static_cast<const T*>(g.w);
    Buffer<T> transposed(I * O);
    for (int64_t r = 0; r < O; r++)
        for (int64_t c = 0; c < I; c++) transposed[c * O + r] = w[r * I + c];
    product<T, T>(g.rows, O, I, x, I, 1, transposed, O, static_cast<const T*>(g.b), g.add, static_cast<T*>(g.y));
}

template <class T>
void linear_backward(const Linear& g) {
    const int64_t I = g.inputs, O = g.outputs;
    const T *x = static_cast<const T*>(g.x), *w = static_cast<const T*>(g.w), *grad = static_cast<const T*>(g.y);
    if (g.d_x) product<T, T>(g.rows, I, O, grad, O, 1, w, I, nullptr, false, static_cast<T*>(g.d_x));
    Sum<T> d_w(O * I, g.d_w), d_b(O, g.d_b);
    for (int64_t from = 0; from < g.rows; from += FLUSH) {
        const int64_t n = g.rows - from < FLUSH ? g.rows - from : FLUSH;
        for (int64_t block = from; block < from + n; block += ROWS) {
            const int64_t rows = from + n - block < ROWS ? from + n - block : ROWS;
            product<T, T>(O, I, rows, grad + block * O, 1, O, x + block * I, I, nullptr, true, d_w.part);
        }
        d_w.flush();
        for (int64_t r = 0; g.d_b && r < n; r++)
            for (int64_t c = 0; c < O; c++) d_b.part[c] += grad[(from + r) * O + c];
        if (g.d_b) d_b.flush();
    }
}

// 0 if all went well, 1 if there was no memory for the buffers
template <class Arguments>
int guarded(void (*kernel)(const Arguments&), const Arguments* arguments) {
    try {
        kernel(*arguments);
        return 0;
    } catch (const std::bad_alloc&) {
        return 1;
    }
}

}  // namespace

extern "C" {
int edges_forward_f32(const Edges* g) { return guarded(edges_forward<float>, g); }
int edges_forward_f64(const Edges* g) { return guarded(edges_forward<double>, g); }
int edges_backward_f32(const Edges* g) { return guarded(edges_backward<float>, g); }
int edges_backward_f64(const Edges* g) { return guarded(edges_backward<double>, g); }
int pairs_forward_f32(const Pairs* g) { return guarded(pairs_forward<float>, g); }
int pairs_forward_f64(const Pairs* g) { return guarded(pairs_forward<double>, g); }
int pairs_backward_f32(const Pairs* g) { return guarded(pairs_backward<float>, g); }
int pairs_backward_f64(const Pairs* g) { return guarded(pairs_backward<double>, g); }

int linear_forward_f32(const Linear* g) { return guarded(linear_forward<float>, g); }
int linear_forward_f64(const Linear* g) { return guarded(linear_forward<double>, g); }
int linear_backward_f32(const Linear* g) { return guarded(linear_backward<float>, g); }
int linear_backward_f64(const Linear* g) { return guarded(linear_backward<double>, g); }

int source_sum() { return static_cast<int>(SOURCE_SUM); }  // checksum of this file, for library.py
int has_bfloat16_products() { return has_bfloat16; }
int64_t size_of_arguments(int which) { return which == 2 ? sizeof(Linear) : which ? sizeof(Pairs) : sizeof(Edges); }  // for kernels.py's tests

// the position of the best instruction set in build.py's list that this processor has
int processor_level() {
#if defined(__x86_64__)
    __builtin_cpu_init();
    if (!(__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"))) return 0;
    if (!(__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512bw") &&
          __builtin_cpu_supports("avx512vl")))
        return 1;
    return __builtin_cpu_supports("avx512bf16") ? 3 : 2;
#else
    return 0;
#endif
}
}
