// Convolutions of 3x3 that keep size and number of channels, in a training step on a CPU: forward,
// and the gradients of input and weights, by Winograd's F(2x2, 3x3) of Lavin and Gray (CVPR 2016).
//
// An image is cut into tiles of 2x2 pixels; a tile of the output depends on 4x4 of the input. With
// the matrices B, G and A of their section 4.1, a tile is A^T [sum over channels (G g G^T) * (B^T d
// B)] A: 16 products a pair of channels instead of 36, each a product of matrices over tiles and
// channels. The gradient of the input is the same with the filter turned around; that of the weights
// G^T [sum over tiles (B^T d B) * (A dy A^T)] G.
//
// Tensors are in channels-last memory, float32: images [N, H, W, C], filters [C out, 3, 3, C in].
// H and W are even. What is added up has the same order for any number of threads.

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <memory>

#include "channels.h"

namespace {

#if defined(__AVX512F__)
constexpr int LANES = 16, SUMS = 24;  // floats of a register; registers that sums may have
#elif defined(__AVX__)
constexpr int LANES = 8, SUMS = 12;
#else
constexpr int LANES = 4, SUMS = 12;
#endif
constexpr int POINTS = 16;  // of a tile, after its transformation
constexpr int PARTS = 16;   // of all tiles, that gradients of weights are summed up over

typedef float Vector __attribute__((vector_size(4 * LANES)));

inline Vector load(const float* at) {
    Vector values;
    std::memcpy(&values, at, sizeof values);
    return values;
}

inline void store(Vector values, float* at) { std::memcpy(at, &values, sizeof values); }

// A block of tiles, as matrices [TILES, C] a point: what the caches of a core hold.
template <int C>
struct Block {
    static constexpr int TILES = 768 / C;
    static constexpr int POINT = TILES * C + 16;  // floats; a power of two would share lines of a cache
    alignas(64) float values[POINTS * POINT] = {};

    float* at(int point, int tile) { return values + point * POINT + tile * C; }
};

struct Images {
    int64_t number;
    int height, width;

    int64_t tiles() const { return number * (height / 2) * (width / 2); }

    // Tiles [first, first + count) of all by rows: visit(number within these, images' pixel at its
    // upper left corner, that one's row and column, tiles that follow in the row with it).
    template <typename Visit>
    void visit_rows(int64_t first, int count, const Visit& visit) const {
        int across = width / 2, down = height / 2, column = first % across;
        int64_t row = first / across;
        for (int done = 0; done < count; row++, column = 0) {
            int length = std::min(across - column, count - done);
            visit(done, (2 * row) * width + 2 * column, int(row % down) * 2, 2 * column, length);
            done += length;
        }
    }
};

// Fetches a sixteenth of a block's pixels into the cache, while something else is computed.
template <int C>
void prefetch(const float* pixels, int64_t first, int part) {
    constexpr int EACH = Block<C>::TILES * 4 * C / POINTS;
    const float* at = pixels + first * 4 * C + part * EACH;
    for (int i = 0; i < EACH; i += 16) __builtin_prefetch(at + i);
}

// B^T d B of every tile.
template <int C>
void transform_input(const float* x, Images images, int64_t first, int count, Block<C>& block) {
    int64_t line = images.width * C;
    images.visit_rows(first, count, [&](int done, int64_t pixel, int y, int x0, int length) {
        bool above = y > 0, below = y + 2 < images.height;
        for (int c = 0; c < C; c += LANES) {
            const float* from = x + pixel * C + c;
            Vector rows[4][4] = {};  // B^T d
            auto column = [&](int j, int at) __attribute__((always_inline)) {
                const float* in = from + at * C;
                Vector d0 = above ? load(in - line) : Vector{}, d1 = load(in), d2 = load(in + line);
                Vector d3 = below ? load(in + 2 * line) : Vector{};
                rows[0][j] = d0 - d2;
                rows[1][j] = d1 + d2;
                rows[2][j] = d2 - d1;
                rows[3][j] = d1 - d3;
            };
            if (x0 > 0) column(0, -1);
            column(1, 0);
            for (int tile = 0; tile < length; tile++) {
                column(2, 2 * tile + 1);
                if (x0 + 2 * tile + 2 < images.width)
                    column(3, 2 * tile + 2);
                else
                    for (auto& row : rows) row[3] = Vector{};
                for (int i = 0; i < 4; i++) {
                    Vector* row = rows[i];
                    store(row[0] - row[2], block.at(4 * i, done + tile) + c);
                    store(row[1] + row[2], block.at(4 * i + 1, done + tile) + c);
                    store(row[2] - row[1], block.at(4 * i + 2, done + tile) + c);
                    store(row[1] - row[3], block.at(4 * i + 3, done + tile) + c);
                    row[0] = row[2];  // the next tile begins two pixels further
                    row[1] = row[3];
                }
            }
        }
    });
}

// A^T m A of every tile, plus `added` where it is not null.
template <int C>
void transform_output(Block<C>& block, Images images, int64_t first, int count, const float* added,
                      float* y) {
    images.visit_rows(first, count, [&](int done, int64_t pixel, int, int, int length) {
        for (int tile = 0; tile < length; tile++)
            for (int c = 0; c < C; c += LANES) {
                Vector rows[2][4];
                for (int j = 0; j < 4; j++) {
                    Vector m[4];
                    for (int i = 0; i < 4; i++) m[i] = load(block.at(4 * i + j, done + tile) + c);
                    rows[0][j] = m[0] + m[1] + m[2];
                    rows[1][j] = m[1] - m[2] - m[3];
                }
                for (int i = 0; i < 2; i++) {
                    Vector* row = rows[i];
                    int64_t at = (pixel + i * images.width + 2 * tile) * C + c;
                    Vector left = row[0] + row[1] + row[2], right = row[1] - row[2] - row[3];
                    if (added) {
                        left += load(added + at);
                        right += load(added + at + C);
                    }
                    store(left, y + at);
                    store(right, y + at + C);
                }
            }
    });
}

// A dy A^T of every tile.
template <int C>
void transform_gradient(const float* dy, Images images, int64_t first, int count, Block<C>& block) {
    images.visit_rows(first, count, [&](int done, int64_t pixel, int, int, int length) {
        for (int tile = 0; tile < length; tile++)
            for (int c = 0; c < C; c += LANES) {
                const float* from = dy + (pixel + 2 * tile) * C + c;
                Vector columns[4][2];
                for (int j = 0; j < 2; j++) {
                    Vector upper = load(from + j * C), lower = load(from + (images.width + j) * C);
                    columns[0][j] = upper;
                    columns[1][j] = upper + lower;
                    columns[2][j] = upper - lower;
                    columns[3][j] = -lower;
                }
                for (int i = 0; i < 4; i++) {
                    Vector left = columns[i][0], right = columns[i][1];
                    store(left, block.at(4 * i, done + tile) + c);
                    store(left + right, block.at(4 * i + 1, done + tile) + c);
                    store(left - right, block.at(4 * i + 2, done + tile) + c);
                    store(-right, block.at(4 * i + 3, done + tile) + c);
                }
            }
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

// G g G^T of every filter, [16, C in, C out]; or of those turned around, [16, C out, C in].
template <int C>
void transform_filters(const float* weight, bool backward, float* u, int threads) {
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int o = 0; o < C; o++) {
        float out[POINTS][C];
#pragma omp simd
        for (int i = 0; i < C; i++) {
            float g[4][3];  // of a row
            for (int x = 0; x < 3; x++) {
                const float* taps = weight + (o * 9 + (backward ? 2 - x : x)) * C + i;
                float first = taps[backward ? 6 * C : 0], middle = taps[3 * C];
                float last = taps[backward ? 0 : 6 * C];
                g[0][x] = first;
                g[1][x] = .5f * (first + middle + last);
                g[2][x] = .5f * (first - middle + last);
                g[3][x] = last;
            }
            for (int y = 0; y < 4; y++) {
                out[4 * y][i] = g[y][0];
                out[4 * y + 1][i] = .5f * (g[y][0] + g[y][1] + g[y][2]);
                out[4 * y + 2][i] = .5f * (g[y][0] - g[y][1] + g[y][2]);
                out[4 * y + 3][i] = g[y][2];
            }
        }
        for (int point = 0; point < POINTS; point++)
            for (int i = 0; i < C; i++)
                u[point * C * C + (backward ? o * C + i : i * C + o)] = out[point][i];
    }
}

template <int C>
void convolve(const float* x, const float* weight, const float* added, float* y, Images images,
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
            transform_input<C>(x, images, first, count, in);
            for (int point = 0; point < POINTS; point++) {
                prefetch<C>(x, first + TILES, point);
                prefetch<C>(y, first, point);
                for (int tile = 0; tile < count; tile += ROWS<C>)
                    multiply_rows<C, ROWS<C>, C, 1>(
                        in.at(point, tile), &u[point * C * C], out.at(point, tile), C, false);
            }
            transform_output<C>(out, images, first, count, added, y);
        }
    }
}

template <int C>
void weigh(const float* x, const float* dy, float* dweight, Images images, int threads) {
    constexpr int TILES = Block<C>::TILES, LAST = C % ROWS<C>;
    std::unique_ptr<float[]> parts(new float[PARTS * POINTS * C * C]);
    int64_t tiles = images.tiles();
#pragma omp parallel num_threads(threads)
    {
        Block<C> in, out;
#pragma omp for schedule(static)
        for (int part = 0; part < PARTS; part++) {
            float* sums = &parts[part * POINTS * C * C];
            int64_t begin = tiles * part / PARTS, end = tiles * (part + 1) / PARTS;
            if (begin == end) std::fill(sums, sums + POINTS * C * C, 0.f);
            for (int64_t first = begin; first < end; first += TILES) {
                int count = std::min<int64_t>(TILES, end - first);
                transform_input<C>(x, images, first, count, in);
                transform_gradient<C>(dy, images, first, count, out);
                for (int point = 0; point < POINTS; point++) {
                    prefetch<C>(x, first + TILES, point);
                    prefetch<C>(dy, first + TILES, point);
                    const float *dm = out.at(point, 0), *v = in.at(point, 0);
                    float* du = sums + point * C * C;
                    for (int o = 0; o + ROWS<C> <= C; o += ROWS<C>)
                        multiply_rows<C, ROWS<C>, 1, C>(dm + o, v, du + o * C, count, first > begin);
                    if constexpr (LAST > 0)
                        multiply_rows<C, LAST, 1, C>(dm + C - LAST, v, du + (C - LAST) * C, count,
                                                     first > begin);
                }
            }
        }
#pragma omp for schedule(static)
        for (int o = 0; o < C; o++) {
            float u[4][4][C] = {};
            for (int part = 0; part < PARTS; part++)
                for (int point = 0; point < POINTS; point++)
                    for (int i = 0; i < C; i++)
                        u[point / 4][point % 4][i] += parts[((part * POINTS + point) * C + o) * C + i];
            float* taps = dweight + o * 9 * C;
#pragma omp simd
            for (int i = 0; i < C; i++) {
                float rows[3][4];  // G^T u
                for (int j = 0; j < 4; j++) {
                    float sum = .5f * (u[1][j][i] + u[2][j][i]);
                    rows[0][j] = u[0][j][i] + sum;
                    rows[1][j] = .5f * (u[1][j][i] - u[2][j][i]);
                    rows[2][j] = sum + u[3][j][i];
                }
                for (int y = 0; y < 3; y++) {
                    float sum = .5f * (rows[y][1] + rows[y][2]);
                    taps[(3 * y) * C + i] = rows[y][0] + sum;
                    taps[(3 * y + 1) * C + i] = .5f * (rows[y][1] - rows[y][2]);
                    taps[(3 * y + 2) * C + i] = sum + rows[y][3];
                }
            }
        }
    }
}

}  // namespace

extern "C" {

// y [N, H, W, C], for 16, 32 or 64 channels. With `backward`, y is the gradient of the input for x,
// that of the output, plus `added`, which may be null.
void convolution(int channels, int64_t number, int height, int width, const float* x,
                 const float* weight, const float* added, float* y, int backward, int threads) {
    for_channels(channels, [&](auto constant) {
        convolve<decltype(constant)::value>(x, weight, added, y, {number, height, width}, backward,
                                            threads);
    });
}

// dweight [C out, 3, 3, C in], of the input x and the output's gradient dy.
void weight_gradient(int channels, int64_t number, int height, int width, const float* x,
                     const float* dy, float* dweight, int threads) {
    for_channels(channels, [&](auto constant) {
        weigh<decltype(constant)::value>(x, dy, dweight, {number, height, width}, threads);
    });
}

}
