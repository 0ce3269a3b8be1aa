// The kernels on buffers of exactly the sizes that kernels.py passes, for the address and undefined-behaviour sanitisers.
#include "message_mlp.cpp"

#include <cstdio>
#include <random>
#include <vector>

namespace {

std::mt19937 draw(1);

template <class T>
std::vector<T> normal(int64_t n) {
    std::normal_distribution<double> law(0, 0.3);
    std::vector<T> values(n);
    for (T& value : values) value = static_cast<T>(law(draw));
    return values;
}

template <class T>
void edges(int64_t H, int64_t A, int64_t N, int64_t M, int64_t E, bool periodic, int (*forward)(const Edges*), int (*backward)(const Edges*)) {
    std::vector<int32_t> start(N + 1), source(E);
    for (int64_t k = 0; k < E; k++) {
        source[k] = static_cast<int32_t>(draw() % M);
        start[1 + draw() % N]++;
    }
    for (int64_t k = 0; k < N; k++) start[k + 1] += start[k];
    auto p = normal<T>(N * H), q = normal<T>(M * H), xd = normal<T>(N * 3), xs = normal<T>(M * 3), e = normal<T>(E * A);
    auto shift = normal<T>(E * 3), ws = normal<T>((1 + A) * H), w2 = normal<T>(H * H), b2 = normal<T>(H), wx = normal<T>(H * H);
    auto bx = normal<T>(H), w = normal<T>(H), m = normal<T>(N * H), dx = normal<T>(N * 3);
    auto dp = normal<T>(N * H), dq = normal<T>(M * H), dxd = normal<T>(N * 3), dxs = normal<T>(M * 3), de = normal<T>(E * A);
    auto dws = normal<double>((1 + A) * H), dw2 = normal<double>(H * H), db2 = normal<double>(H), dwx = normal<double>(H * H);
    auto dbx = normal<double>(H), dw = normal<double>(H);
    Edges g{H, A, N, 1, 1, start.data(), source.data(), nullptr, p.data(), q.data(), xd.data(), xs.data(), A ? e.data() : nullptr,
            periodic ? shift.data() : nullptr, ws.data(), w2.data(), b2.data(), wx.data(), bx.data(), w.data(), m.data(), dx.data(),
            dp.data(), dq.data(), dxd.data(), dxs.data(), A ? de.data() : nullptr, dws.data(), dw2.data(), db2.data(), dwx.data(),
            dbx.data(), dw.data()};
    if (forward(&g) || backward(&g)) std::abort();
    g.mean_m = nullptr;
    if (forward(&g) || backward(&g)) std::abort();
}

template <class T>
void pairs(int64_t H, int64_t C, int64_t N, int64_t B, bool features, int (*forward)(const Pairs*), int (*backward)(const Pairs*)) {
    std::vector<int32_t> graph(N);
    for (auto& of : graph) of = static_cast<int32_t>(draw() % B);
    auto p = normal<T>(N * H), x = normal<T>(N * 3), z = normal<T>(B * C * 3), u = normal<T>(B * C * H), wd = normal<T>(H);
    auto w2 = normal<T>(H * H), b2 = normal<T>(H), wx = normal<T>(2 * H * H), bx = normal<T>(2 * H), w = normal<T>(2 * H);
    auto dx = normal<T>(N * 3), m = normal<T>(N * H), toz = normal<T>(B * C * 3), tos = normal<T>(B * C * H);
    auto dp = normal<T>(N * H), d_x = normal<T>(N * 3);
    auto dz = normal<double>(B * C * 3), du = normal<double>(B * C * H), dwd = normal<double>(H), dw2 = normal<double>(H * H);
    auto db2 = normal<double>(H), dwx = normal<double>(2 * H * H), dbx = normal<double>(2 * H), dw = normal<double>(2 * H);
    Pairs g{H, C, N, B, 0, B > 1 ? graph.data() : nullptr, features ? p.data() : nullptr, x.data(), z.data(), u.data(), wd.data(),
            w2.data(), b2.data(), wx.data(), bx.data(), w.data(), dx.data(), features ? m.data() : nullptr, toz.data(),
            features ? tos.data() : nullptr, features ? dp.data() : nullptr, d_x.data(), dz.data(), du.data(), dwd.data(), dw2.data(),
            db2.data(), dwx.data(), dbx.data(), dw.data()};
    if (forward(&g) || backward(&g)) std::abort();
    g.dx = g.to_z = g.to_s = nullptr;
    if (forward(&g)) std::abort();
}

}  // namespace

int main() {
    for (int64_t H : {16, 64, 80})
        for (int64_t E : {0, 1, 95, 96, 97, 500}) {
            edges<float>(H, E % 3, 7, 5, E, E % 2, edges_forward_f32, edges_backward_f32);
            edges<double>(H, E % 3, 7, 5, E, E % 2, edges_forward_f64, edges_backward_f64);
        }
    for (int64_t C : {1, 3, 16})
        for (int64_t N : {0, 1, 40}) {
            pairs<float>(32, C, N, 2, true, pairs_forward_f32, pairs_backward_f32);
            pairs<double>(32, C, N, 1, false, pairs_forward_f64, pairs_backward_f64);
        }
    std::puts("done");
}
