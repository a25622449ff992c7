// Batch norm, what is added to it and ReLU in a training step on a CPU, forward and backward.
//
// A tensor in channels-last memory is a matrix here: rows are pixels, columns are channels. Each way
// goes over it twice: for sums over the pixels, then for what depends on them. PyTorch goes over it
// once more for each of ReLU, what is added, and the variance, and not with the widest instructions.
//
// Sums are float over BLOCK rows and double beyond, in PARTS parts that are added in their order:
// the same for any number of threads. Comparisons are such that what is not a number stays so.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>

#include "compiled.h"

namespace {

constexpr int PARTS = 64;
constexpr int BLOCK = 64;

inline float wide(float value) { return value; }

inline float wide(bf16 value) {
    uint32_t bits = uint32_t(value) << 16;
    float result;
    std::memcpy(&result, &bits, sizeof result);
    return result;
}

inline void put(float value, float& at) { at = value; }

inline void put(float value, bf16& at) {  // rounded to the nearest, of two to the even one
    uint32_t bits;
    std::memcpy(&bits, &value, sizeof bits);
    uint32_t up = bits + 0x7fff + ((bits >> 16) & 1);
    at = value != value ? 0x7fc0 : up >> 16;
}

// Rows [begin, end) of a part.
inline int64_t begin_of(int64_t rows, int part) { return rows * part / PARTS; }

// The sums of every column over all rows: `add(row, first, second)` adds a row's values to two.
template <int C, typename Add>
void sum_up(int64_t rows, int threads, const Add& add, double* first, double* second) {
    double parts[PARTS][2][C] = {};
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int part = 0; part < PARTS; part++) {
        int64_t end = begin_of(rows, part + 1);
        for (int64_t block = begin_of(rows, part); block < end; block += BLOCK) {
            float sums[2][C] = {};
            for (int64_t row = block; row < std::min(block + BLOCK, end); row++)
                add(row, sums[0], sums[1]);
            for (int c = 0; c < C; c++) {
                parts[part][0][c] += sums[0][c];
                parts[part][1][c] += sums[1][c];
            }
        }
    }
    for (int c = 0; c < C; c++) {
        first[c] = second[c] = 0;
        for (int part = 0; part < PARTS; part++) {
            first[c] += parts[part][0][c];
            second[c] += parts[part][1][c];
        }
    }
}

template <typename Do>
void for_rows(int64_t rows, int threads, const Do& work) {
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int part = 0; part < PARTS; part++)
        for (int64_t row = begin_of(rows, part); row < begin_of(rows, part + 1); row++) work(row);
}

// `moments` [2, C]: mean and variance of x. Distances from the mean of the first pixels are summed
// up: of values far from 0 squares would lose what they differ by.
template <int C>
void find_moments(const Value* x, int64_t rows, int threads, float* moments) {
    float from[C] = {};
    int64_t first = std::min<int64_t>(BLOCK, rows);
    for (int64_t row = 0; row < first; row++)
        for (int c = 0; c < C; c++) from[c] += wide(x[row * C + c]) / first;
    double sums[C], squares[C];
    auto add = [&](int64_t row, float* sum, float* square) {
        const Value* in = x + row * C;
#pragma omp simd
        for (int c = 0; c < C; c++) {
            float apart = wide(in[c]) - from[c];
            sum[c] += apart;
            square[c] += apart * apart;
        }
    };
    sum_up<C>(rows, threads, add, sums, squares);
    for (int c = 0; c < C; c++) {
        double mean = sums[c] / rows;
        moments[c] = from[c] + mean;
        moments[C + c] = squares[c] / rows - mean * mean;
    }
}

// Batch norm is x * scale + shift.
template <int C>
struct Affine {
    float mean[C], inverse[C], scale[C], shift[C];

    Affine(const float* moments, const float* weight, const float* bias, double eps) {
        for (int c = 0; c < C; c++) {
            mean[c] = moments[c];
            inverse[c] = 1 / std::sqrt(moments[C + c] + eps);
            scale[c] = weight[c] * inverse[c];
            shift[c] = bias[c] - mean[c] * scale[c];
        }
    }
};

template <int C, bool ADDS, bool RELU>
void normalise(const Value* x, const Value* added, Value* y, const Affine<C>& affine, int64_t rows,
               int threads) {
    for_rows(rows, threads, [&](int64_t row) {
        const Value *in = x + row * C, *also = added + row * C;
        Value* out = y + row * C;
#pragma omp simd
        for (int c = 0; c < C; c++) {
            float value = wide(in[c]) * affine.scale[c] + affine.shift[c];
            if (ADDS) value += wide(also[c]);
            if (RELU) value = value <= 0.f ? 0.f : value;
            put(value, out[c]);
        }
    });
}

// Of the output's gradient dy: `dadded`, which is dy where the ReLU was open, and that of x. Where
// nothing was added, x says where the ReLU was open; else y does.
template <int C, bool ADDS, bool RELU>
void differentiate(const Value* dy, const Value* x, const Value* y, Value* dx, Value* dadded,
                   const Affine<C>& affine, float* dweight, float* dbias, int64_t rows, int threads) {
    auto passed = [&](float gradient, float in, float out, int c) {
        if (!RELU) return gradient;
        float value = ADDS ? out : in * affine.scale[c] + affine.shift[c];
        return value <= 0.f ? 0.f : gradient;
    };
    double plain[C], by_normal[C];
    auto add = [&](int64_t row, float* sum, float* product) {
        const Value *in = x + row * C, *gradient = dy + row * C, *out = y + row * C;
        Value* masked = dadded + row * C;
#pragma omp simd
        for (int c = 0; c < C; c++) {
            float value = wide(in[c]);
            float d = passed(wide(gradient[c]), value, ADDS ? wide(out[c]) : 0.f, c);
            if (ADDS) put(d, masked[c]);
            sum[c] += d;
            product[c] += d * (value - affine.mean[c]);
        }
    };
    sum_up<C>(rows, threads, add, plain, by_normal);
    // Ioffe, Szegedy (2015), section 3: dx = scale (d - mean(d) - normal mean(d normal)).
    float of_x[C], constant[C];
    for (int c = 0; c < C; c++) {
        by_normal[c] *= affine.inverse[c];
        dbias[c] = plain[c];
        dweight[c] = by_normal[c];
        of_x[c] = -affine.scale[c] * affine.inverse[c] * by_normal[c] / rows;
        constant[c] = -affine.scale[c] * plain[c] / rows - of_x[c] * affine.mean[c];
    }
    for_rows(rows, threads, [&](int64_t row) {
        const Value *in = x + row * C, *gradient = (ADDS ? dadded : dy) + row * C;
        Value* out = dx + row * C;
#pragma omp simd
        for (int c = 0; c < C; c++) {
            float value = wide(in[c]), d = wide(gradient[c]);
            if (!ADDS) d = passed(d, value, 0.f, c);
            put(d * affine.scale[c] + value * of_x[c] + constant[c], out[c]);
        }
    });
}

}  // namespace

extern "C" {

// y = relu((x - mean) / std * weight + bias + added); running statistics as PyTorch has them.
// `added` may be null. For 16, 32 or 64 channels.
void norm_forward(int channels, int64_t rows, const Value* x, const Value* added, Value* y,
                  float* moments, const float* weight, const float* bias, float* running_mean,
                  float* running_var, double momentum, double eps, int relu, int threads) {
    for_channels(channels, [&](auto constant) {
        constexpr int C = decltype(constant)::value;
        find_moments<C>(x, rows, threads, moments);
        for (int c = 0; c < C; c++) {
            double unbiased = moments[C + c] * (rows / (rows - 1.0));
            running_mean[c] += momentum * (moments[c] - running_mean[c]);
            running_var[c] += momentum * (unbiased - running_var[c]);
        }
        Affine<C> affine(moments, weight, bias, eps);
        auto call = added ? relu ? normalise<C, true, true> : normalise<C, true, false>
                    : relu ? normalise<C, false, true> : normalise<C, false, false>;
        call(x, added ? added : x, y, affine, rows, threads);
    });
}

// The gradients of x, weight and bias; with `dadded`, of what was added before a ReLU, too.
void norm_backward(int channels, int64_t rows, const Value* dy, const Value* x, const Value* y,
                   Value* dx, Value* dadded, const float* moments, const float* weight,
                   const float* bias, float* dweight, float* dbias, double eps, int relu,
                   int threads) {
    for_channels(channels, [&](auto constant) {
        constexpr int C = decltype(constant)::value;
        Affine<C> affine(moments, weight, bias, eps);
        auto call = dadded ? differentiate<C, true, true>
                    : relu ? differentiate<C, false, true> : differentiate<C, false, false>;
        call(dy, x, dadded ? y : x, dx, dadded ? dadded : dx, affine, dweight, dbias, rows, threads);
    });
}

}
