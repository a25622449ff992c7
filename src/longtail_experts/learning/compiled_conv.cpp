// Convolutions of 3x3 that keep size and number of channels, in a training step on a CPU: forward,
// and the gradients of input and weights, by Winograd's F(4x4, 3x3) of Lavin and Gray (CVPR 2016).
//
// An image is cut into tiles of 4x4 pixels; a tile of the output depends on 6x6 of the input. With
// the matrices B, G and A of their section 4.1, a tile is A^T [sum over channels (G g G^T) * (B^T d
// B)] A: 36 products a pair of channels instead of 144, each a product of matrices over tiles and
// channels. The gradient of the input is the same with the filter turned around; that of the weights
// G^T [sum over tiles (B^T d B) * (A dy A^T)] G.
//
// The matrices evaluate polynomials at 0, P, -P, Q, -Q and infinity. With P = 1 and Q = 2, which are
// Lavin and Gray's, rounding errors are twice as large as with those taken here.
//
// Tensors are in channels-last memory: images [N, H, W, C], of bf16 or float; filters [C out, 3, 3, C
// in], of float. H and W are multiples of 4. All is computed in float, and what is added up has the same
// order for any number of threads.

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <memory>

#include "compiled.h"

namespace {

#if defined(__AVX512F__)
constexpr int LANES = 16, SUMS = 24;  // floats of a register; registers that sums may have
#elif defined(__AVX__)
constexpr int LANES = 8, SUMS = 12;
#else
constexpr int LANES = 4, SUMS = 12;
#endif
constexpr int TILE = 4, SIDE = 6;  // pixels of a side: of an output, and of what it depends on
constexpr int POINTS = SIDE * SIDE;  // of a tile, after its transformation
constexpr int PARTS = 16;            // of all tiles, that gradients of weights are summed up over
constexpr float P = .625f, Q = 1.5f, PP = P * P, QQ = Q * Q;
// Of the rows of G: one over the product of a point's distances from the others.
constexpr float AT_0 = 1 / (PP * QQ), AT_P = 1 / (2 * PP * (PP - QQ)), AT_Q = 1 / (2 * QQ * (QQ - PP));

typedef float Vector __attribute__((vector_size(4 * LANES)));
typedef uint32_t Words __attribute__((vector_size(4 * LANES)));
typedef bf16 Halves __attribute__((vector_size(2 * LANES)));

inline Vector load(const float* at) {
    Vector values;
    std::memcpy(&values, at, sizeof values);
    return values;
}

inline Vector load(const bf16* at) {
    Halves halves;
    std::memcpy(&halves, at, sizeof halves);
    return (Vector)(__builtin_convertvector(halves, Words) << 16);
}

inline void store(Vector values, float* at) { std::memcpy(at, &values, sizeof values); }

// Rounded to the nearest, of two to the even one. What is not a number stays so: it comes from bf16 or
// from an operation of the processor, with nothing in its lower half to carry.
inline void store(Vector values, bf16* at) {
    Words bits = (Words)values, up = bits + 0x7fff + ((bits >> 16) & 1);
    Halves halves = __builtin_convertvector(up >> 16, Halves);
    std::memcpy(at, &halves, sizeof halves);
}

// B^T d
inline void transform_input(const Vector (&d)[SIDE], Vector (&out)[SIDE]) {
    Vector even_p = d[4] - QQ * d[2], odd_p = d[3] - QQ * d[1];
    Vector even_q = d[4] - PP * d[2], odd_q = d[3] - PP * d[1];
    out[0] = d[4] - (PP + QQ) * d[2] + (PP * QQ) * d[0];
    out[1] = even_p + P * odd_p;
    out[2] = even_p - P * odd_p;
    out[3] = even_q + Q * odd_q;
    out[4] = even_q - Q * odd_q;
    out[5] = d[5] - (PP + QQ) * d[3] + (PP * QQ) * d[1];
}

// A^T m
inline void transform_output(const Vector (&m)[SIDE], Vector (&out)[TILE]) {
    Vector even_p = m[1] + m[2], odd_p = P * (m[1] - m[2]);
    Vector even_q = m[3] + m[4], odd_q = Q * (m[3] - m[4]);
    out[0] = m[0] + even_p + even_q;
    out[1] = odd_p + odd_q;
    out[2] = PP * even_p + QQ * even_q;
    out[3] = PP * odd_p + QQ * odd_q + m[5];
}

// A dy
inline void transform_gradient(const Vector (&dy)[TILE], Vector (&out)[SIDE]) {
    Vector even_p = dy[0] + PP * dy[2], odd_p = P * (dy[1] + PP * dy[3]);
    Vector even_q = dy[0] + QQ * dy[2], odd_q = Q * (dy[1] + QQ * dy[3]);
    out[0] = dy[0];
    out[1] = even_p + odd_p;
    out[2] = even_p - odd_p;
    out[3] = even_q + odd_q;
    out[4] = even_q - odd_q;
    out[5] = dy[3];
}

// G g
inline void transform_filter(const Vector (&g)[3], Vector (&out)[SIDE]) {
    Vector even_p = AT_P * (g[0] + PP * g[2]), odd_p = AT_P * P * g[1];
    Vector even_q = AT_Q * (g[0] + QQ * g[2]), odd_q = AT_Q * Q * g[1];
    out[0] = AT_0 * g[0];
    out[1] = even_p + odd_p;
    out[2] = even_p - odd_p;
    out[3] = even_q + odd_q;
    out[4] = even_q - odd_q;
    out[5] = g[2];
}

// G^T u
inline void transform_sums(const Vector (&u)[SIDE], Vector (&out)[3]) {
    Vector even_p = AT_P * (u[1] + u[2]), odd_p = AT_P * P * (u[1] - u[2]);
    Vector even_q = AT_Q * (u[3] + u[4]), odd_q = AT_Q * Q * (u[3] - u[4]);
    out[0] = AT_0 * u[0] + even_p + even_q;
    out[1] = odd_p + odd_q;
    out[2] = PP * even_p + QQ * even_q + u[5];
}

// T t T^T of a tile t, which is OUT x OUT for one of IN x IN, where `transform` is T of a line of it.
// give_column(number, column of zeros to fill), take(row, column, value).
template <int IN, int OUT, typename Give, typename Take>
inline void transform_tile(void (*transform)(const Vector (&)[IN], Vector (&)[OUT]),
                           const Give& give_column, const Take& take) {
    Vector rows[OUT][IN];  // T t
    for (int j = 0; j < IN; j++) {
        Vector column[IN] = {}, out[OUT];
        give_column(j, column);
        transform(column, out);
        for (int i = 0; i < OUT; i++) rows[i][j] = out[i];
    }
    for (int i = 0; i < OUT; i++) {
        Vector out[OUT];
        transform(rows[i], out);
        for (int j = 0; j < OUT; j++) take(i, j, out[j]);
    }
}

// A block of tiles, as matrices [TILES, C] a point: what the caches of a core hold.
template <int C>
struct Block {
    static constexpr int TILES = C == 16 ? 24 : 12;
    static constexpr int POINT = TILES * C + 16;  // floats; a power of two would share lines of a cache
    alignas(64) float values[POINTS * POINT] = {};

    float* at(int point, int tile) { return values + point * POINT + tile * C; }
};

struct Images {
    int64_t number;
    int height, width;

    int64_t tiles() const { return number * (height / TILE) * (width / TILE); }

    // Tiles [first, first + count) of all: visit(number within these, images' pixel at its upper left
    // corner, that one's row and column).
    template <typename Visit>
    void visit_tiles(int64_t first, int count, const Visit& visit) const {
        int across = width / TILE, down = height / TILE, column = first % across;
        int64_t line = first / across;
        int row = line % down;
        for (int tile = 0; tile < count; tile++) {
            visit(tile, TILE * (line * width + column), TILE * row, TILE * column);
            if (++column < across) continue;
            column = 0, line++;
            row = row + 1 < down ? row + 1 : 0;
        }
    }
};

// Fetches what a block's pixels have for a point into the cache, while something else is computed.
template <int C>
void prefetch(const Value* pixels, int64_t first, int point) {
    constexpr int ALL = Block<C>::TILES * TILE * TILE * C, LINE = 64 / sizeof(Value);
    const Value* at = pixels + first * TILE * TILE * C;
    for (int i = point * LINE; i < ALL; i += POINTS * LINE) __builtin_prefetch(at + i);
}

// B^T d B of every tile.
template <int C>
void transform_inputs(const Value* x, Images images, int64_t first, int count, Block<C>& block) {
    int64_t line = images.width * C;
    images.visit_tiles(first, count, [&](int tile, int64_t pixel, int row, int left) {
        bool above = row > 0, below = row + TILE < images.height;
        for (int c = 0; c < C; c += LANES)
            transform_tile(
                transform_input,
                [&](int j, Vector* d) {
                    if ((j == 0 && left == 0) || (j > TILE && left + TILE == images.width)) return;
                    const Value* in = x + (pixel + j - 1) * C + c;
                    if (above) d[0] = load(in - line);
                    for (int i = 0; i < TILE; i++) d[i + 1] = load(in + i * line);
                    if (below) d[TILE + 1] = load(in + TILE * line);
                },
                [&](int i, int j, Vector d) { store(d, block.at(SIDE * i + j, tile) + c); });
    });
}

// A^T m A of every tile, plus `added` where it is not null.
template <int C>
void transform_outputs(Block<C>& block, Images images, int64_t first, int count,
                       const Value* added, Value* y) {
    images.visit_tiles(first, count, [&](int tile, int64_t pixel, int, int) {
        for (int c = 0; c < C; c += LANES)
            transform_tile(
                transform_output,
                [&](int j, Vector* m) {
                    for (int i = 0; i < SIDE; i++) m[i] = load(block.at(SIDE * i + j, tile) + c);
                },
                [&](int i, int j, Vector sum) {
                    int64_t at = (pixel + i * images.width + j) * C + c;
                    store(added ? sum + load(added + at) : sum, y + at);
                });
    });
}

// A dy A^T of every tile.
template <int C>
void transform_gradients(const Value* dy, Images images, int64_t first, int count,
                         Block<C>& block) {
    images.visit_tiles(first, count, [&](int tile, int64_t pixel, int, int) {
        for (int c = 0; c < C; c += LANES)
            transform_tile(
                transform_gradient,
                [&](int j, Vector* d) {
                    const Value* in = dy + (pixel + j) * C + c;
                    for (int i = 0; i < TILE; i++) d[i] = load(in + i * images.width * C);
                },
                [&](int i, int j, Vector d) { store(d, block.at(SIDE * i + j, tile) + c); });
    });
}

// Sums in registers are rows of so many vectors.
template <int C>
constexpr int VECTORS = LANES == 16 ? C / LANES : 2;
template <int C>
constexpr int ROWS = SUMS / VECTORS<C>;

// out [NUM, C] = a [NUM, depth] b [depth, C], or added to it; an element of a is
// a[row * A_ROW + k * A_STEP].
template <int C, int NUM, int A_ROW, int A_STEP>
void multiply_rows(const float* a, const float* b, float* out, int depth, bool adds) {
    for (int column = 0; column < C; column += VECTORS<C> * LANES) {
        Vector sums[NUM][VECTORS<C>] = {};
        for (int k = 0; k < depth; k++) {
            Vector values[VECTORS<C>];
            for (int n = 0; n < VECTORS<C>; n++) values[n] = load(b + k * C + column + n * LANES);
#pragma GCC unroll 24
            for (int row = 0; row < NUM; row++)
#pragma GCC unroll 4
                for (int n = 0; n < VECTORS<C>; n++)
                    sums[row][n] += a[row * A_ROW + k * A_STEP] * values[n];
        }
#pragma GCC unroll 24
        for (int row = 0; row < NUM; row++)
#pragma GCC unroll 4
            for (int n = 0; n < VECTORS<C>; n++) {
                float* at = out + row * C + column + n * LANES;
                store(adds ? load(at) + sums[row][n] : sums[row][n], at);
            }
    }
}

// G g G^T of every filter, [POINTS, C in, C out]; or of those turned around, [POINTS, C out, C in].
template <int C>
void transform_filters(const float* weight, bool backward, float* u, int threads) {
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int o = 0; o < C; o++) {
        float out[POINTS][C];
        for (int i = 0; i < C; i += LANES)
            transform_tile(
                transform_filter,
                [&](int x, Vector* g) {
                    for (int tap = x, y = 0; y < 3; y++, tap += 3)
                        g[y] = load(weight + (o * 9 + (backward ? 8 - tap : tap)) * C + i);
                },
                [&](int y, int x, Vector g) { store(g, &out[SIDE * y + x][i]); });
        for (int point = 0; point < POINTS; point++)
            for (int i = 0; i < C; i++)
                u[point * C * C + (backward ? o * C + i : i * C + o)] = out[point][i];
    }
}

template <int C>
void convolve(const Value* x, const float* weight, const Value* added, Value* y, Images images,
              bool backward, int threads) {
    constexpr int TILES = Block<C>::TILES;
    static_assert(TILES % ROWS<C> == 0, "else the last rows lie past the block");
    std::unique_ptr<float[]> u(new float[POINTS * C * C]);
    transform_filters<C>(weight, backward, u.get(), threads);
    int64_t tiles = images.tiles();
#pragma omp parallel num_threads(threads)
    {
        Block<C> in, out;
#pragma omp for schedule(static)
        for (int64_t first = 0; first < tiles; first += TILES) {
            int count = std::min<int64_t>(TILES, tiles - first);
            transform_inputs<C>(x, images, first, count, in);
            for (int point = 0; point < POINTS; point++) {
                prefetch<C>(x, first + TILES, point);
                prefetch<C>(y, first, point);
                if (added) prefetch<C>(added, first, point);
                for (int tile = 0; tile < count; tile += ROWS<C>)
                    multiply_rows<C, ROWS<C>, C, 1>(
                        in.at(point, tile), &u[point * C * C], out.at(point, tile), C, false);
            }
            transform_outputs<C>(out, images, first, count, added, y);
        }
    }
}

// Sums of products of tiles, a matrix [C out, C in] a point.
template <int C>
struct Sums {
    static constexpr int POINT = C * C + 16;  // as in a block
    alignas(64) float values[POINTS * POINT];

    float* at(int point, int o) { return values + point * POINT + o * C; }
};

// G^T u G, as filters are.
template <int C>
void transform_all_sums(Sums<C>& u, float* filters) {
    for (int o = 0; o < C; o++)
        for (int i = 0; i < C; i += LANES)
            transform_tile(
                transform_sums,
                [&](int x, Vector* column) {
                    for (int y = 0; y < SIDE; y++) column[y] = load(u.at(SIDE * y + x, o) + i);
                },
                [&](int y, int x, Vector g) { store(g, filters + (o * 9 + 3 * y + x) * C + i); });
}

template <int C>
void weigh(const Value* x, const Value* dy, float* dweight, Images images, int threads) {
    constexpr int TILES = Block<C>::TILES, LAST = C % ROWS<C>, FILTERS = C * 9 * C;
    std::unique_ptr<float[]> parts(new float[PARTS * FILTERS]);
    int64_t tiles = images.tiles();
#pragma omp parallel num_threads(threads)
    {
        Block<C> in, out;
        std::unique_ptr<Sums<C>> sums(new Sums<C>);
#pragma omp for schedule(static)
        for (int part = 0; part < PARTS; part++) {
            int64_t begin = tiles * part / PARTS, end = tiles * (part + 1) / PARTS;
            if (begin == end) std::fill_n(sums->values, POINTS * Sums<C>::POINT, 0.f);
            for (int64_t first = begin; first < end; first += TILES) {
                int count = std::min<int64_t>(TILES, end - first);
                transform_inputs<C>(x, images, first, count, in);
                transform_gradients<C>(dy, images, first, count, out);
                for (int point = 0; point < POINTS; point++) {
                    prefetch<C>(x, first + TILES, point);
                    prefetch<C>(dy, first + TILES, point);
                    const float *dm = out.at(point, 0), *v = in.at(point, 0);
                    bool adds = first > begin;
                    for (int o = 0; o + ROWS<C> <= C; o += ROWS<C>)
                        multiply_rows<C, ROWS<C>, 1, C>(dm + o, v, sums->at(point, o), count, adds);
                    if constexpr (LAST > 0)
                        multiply_rows<C, LAST, 1, C>(dm + C - LAST, v, sums->at(point, C - LAST),
                                                     count, adds);
                }
            }
            transform_all_sums<C>(*sums, &parts[part * FILTERS]);
        }
#pragma omp for schedule(static)
        for (int tap = 0; tap < 9 * C; tap++)
            for (int i = 0; i < C; i++) {
                float sum = 0;
                for (int part = 0; part < PARTS; part++) sum += parts[part * FILTERS + tap * C + i];
                dweight[tap * C + i] = sum;
            }
    }
}

}  // namespace

extern "C" {

// y [N, H, W, C], for 16, 32 or 64 channels. With `backward`, y is the gradient of the input for x,
// that of the output, plus `added`, which may be null.
void convolution(int channels, int64_t number, int height, int width, const Value* x,
                 const float* weight, const Value* added, Value* y, int backward, int threads) {
    for_channels(channels, [&](auto constant) {
        convolve<decltype(constant)::value>(x, weight, added, y, {number, height, width}, backward,
                                            threads);
    });
}

// dweight [C out, 3, 3, C in], of the input x and the output's gradient dy.
void weight_gradient(int channels, int64_t number, int height, int width, const Value* x,
                     const Value* dy, float* dweight, int threads) {
    for_channels(channels, [&](auto constant) {
        weigh<decltype(constant)::value>(x, dy, dweight, {number, height, width}, threads);
    });
}

}
