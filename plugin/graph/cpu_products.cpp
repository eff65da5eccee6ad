// The two products of tokens with the vectors of their slots, for a CPU: what `plugin/graph/slot_products.py` says of them.
//
// A step of many requests reads the vectors of every slot once, from memory: then a token goes through them alone, in
// the order in which they lie, and what comes next is prefetched. The tokens of one request lie together, and in a
// prefill are many: then four of them share what is read and converted, and four ranks at a time share the tokens.

#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>

#ifdef __AVX512BF16__
#include <immintrin.h>
#endif

namespace {

using BFloat16 = at::BFloat16;

constexpr int TOGETHER = 4;                  // tokens that share what is read of their slot, ranks that share them
constexpr int64_t AHEAD = 8192;              // bytes between what is used and what is prefetched, or one token
constexpr int64_t WORTH_A_THREAD = 1 << 16;  // numbers read

// -- registers of numbers, as float32 --------------------------------------------------------------------------------

#if defined(__AVX512F__)
constexpr int LANES = 16;
#elif defined(__AVX__)
constexpr int LANES = 8;
#else
constexpr int LANES = 4;
#endif
using Floats = float __attribute__((vector_size(LANES * sizeof(float))));

Floats load(const float* from) {
    Floats values;
    std::memcpy(&values, from, sizeof values);
    return values;
}

Floats load(const BFloat16* from) {  // the upper half of a float32
    using Words = uint32_t __attribute__((vector_size(LANES * sizeof(uint32_t))));
    uint16_t __attribute__((vector_size(LANES * sizeof(uint16_t)))) halves;
    std::memcpy(&halves, from, sizeof halves);
    return (Floats)(__builtin_convertvector(halves, Words) << 16);
}

void store(float* to, Floats values) { std::memcpy(to, &values, sizeof values); }

float sum(Floats values) {
    float lanes[LANES];
    store(lanes, values);
    for (int half = LANES / 2; half > 0; half /= 2)
        for (int lane = 0; lane < half; lane++) lanes[lane] += lanes[lane + half];
    return lanes[0];
}

template <class X, class R>
struct Products {  // one register's part of a dot product
    static constexpr int NUMBERS = LANES;
    template <class N>
    static Floats take(const N* from) { return load(from); }
    static Floats add(Floats sums, Floats x, Floats read) { return sums + x * read; }
};

#ifdef __AVX512BF16__
template <>
struct Products<BFloat16, BFloat16> {  // exact products in pairs, added up in float32
    static constexpr int NUMBERS = 2 * LANES;
    static __m512bh take(const BFloat16* from) {
        __m512bh values;
        std::memcpy(&values, from, sizeof values);
        return values;
    }
    static Floats add(Floats sums, __m512bh x, __m512bh read) {
        return (Floats)_mm512_dpbf16_ps((__m512)sums, x, read);
    }
};
#endif

// -- the vectors of a slot, [ranks, width], and those that the next token will want ----------------------------------

template <class N>
struct Vectors {
    const N *first, *next;
    int64_t ranks, width;

    const N* of(int64_t rank) const { return first + rank * width; }

    // Where to prefetch while the vector of a rank is used: further on, and then in those of the next token.
    const N* ahead(int64_t rank, int64_t at_once = 1) const {
        int64_t bytes = width * sizeof(N), then = rank + std::clamp((AHEAD + bytes - 1) / bytes, at_once, ranks);
        return then < ranks ? of(then) : next + (then - ranks) * width;
    }
};

// -- read[k] . x[t] --------------------------------------------------------------------------------------------------

// For TOKENS from x on and RANKS from k on. Every sum is made in one order, whoever shares the tokens and ranks.
template <int TOKENS, int RANKS, class X, class R>
void dots(const X* x, int64_t stride, const Vectors<R>& read, int64_t k, float* out) {
    using Product = Products<X, R>;
    const R *directions[RANKS], *ahead[RANKS];
    for (int rank = 0; rank < RANKS; rank++) {
        directions[rank] = read.of(k + rank);
        ahead[rank] = read.ahead(k + rank, RANKS);
    }
    Floats sums[TOKENS][RANKS] = {};
    int64_t i = 0;
    for (; i + Product::NUMBERS <= read.width; i += Product::NUMBERS) {
        for (int rank = 0; rank < RANKS; rank++) {
            if (TOKENS == 1) __builtin_prefetch(ahead[rank] + i);
            auto direction = Product::take(directions[rank] + i);
            for (int t = 0; t < TOKENS; t++)
                sums[t][rank] = Product::add(sums[t][rank], Product::take(x + t * stride + i), direction);
        }
    }
    for (int t = 0; t < TOKENS; t++) {
        for (int rank = 0; rank < RANKS; rank++) {
            float product = sum(sums[t][rank]);
            for (int64_t rest = i; rest < read.width; rest++)
                product = std::fma(float(x[t * stride + rest]), float(directions[rank][rest]), product);
            out[t * read.ranks + k + rank] = product;
        }
    }
}

template <int TOKENS, class X, class R>
void dots(const X* x, int64_t stride, const Vectors<R>& read, float* out) {
    constexpr int RANKS = TOKENS == 1 ? 1 : TOGETHER;  // a token that is alone keeps to the order of memory
    int64_t k = 0;
    for (; k + RANKS <= read.ranks; k += RANKS) dots<TOKENS, RANKS>(x, stride, read, k, out);
    for (; k < read.ranks; k++) dots<TOKENS, 1>(x, stride, read, k, out);
}

// -- sum_k strengths[t, k] write[k] ----------------------------------------------------------------------------------

template <class W>  // what does not fill a register
void combine_rest(const float* strengths, const Vectors<W>& write, float* out) {
    for (int64_t o = write.width / LANES * LANES; o < write.width; o++) {
        out[o] = 0;
        for (int64_t k = 0; k < write.ranks; k++) out[o] = std::fma(strengths[k], float(write.of(k)[o]), out[o]);
    }
}

template <int RANKS, class W>
void combine_alone(const float* strengths, const Vectors<W>& write, int64_t k, float* out) {
    const W *directions[RANKS], *ahead[RANKS];
    for (int rank = 0; rank < RANKS; rank++) {
        directions[rank] = write.of(k + rank);
        ahead[rank] = write.ahead(k + rank, RANKS);
    }
    for (int64_t o = 0; o + LANES <= write.width; o += LANES) {
        Floats sums = k == 0 ? Floats{} : load(out + o);
        for (int rank = 0; rank < RANKS; rank++) {
            __builtin_prefetch(ahead[rank] + o);
            sums += strengths[k + rank] * load(directions[rank] + o);
        }
        store(out + o, sums);
    }
}

template <class W>
void combine_alone(const float* strengths, const Vectors<W>& write, float* out) {
    int64_t k = 0;
    for (; k + TOGETHER <= write.ranks; k += TOGETHER) combine_alone<TOGETHER>(strengths, write, k, out);
    for (; k < write.ranks; k++) combine_alone<1>(strengths, write, k, out);
    combine_rest(strengths, write, out);
}

template <class W>
void combine_together(const float* strengths, const Vectors<W>& write, float* out) {
    for (int64_t o = 0; o + LANES <= write.width; o += LANES) {
        Floats sums[TOGETHER] = {};
        for (int64_t k = 0; k < write.ranks; k++) {
            Floats direction = load(write.of(k) + o);
            for (int t = 0; t < TOGETHER; t++) sums[t] += strengths[t * write.ranks + k] * direction;
        }
        for (int t = 0; t < TOGETHER; t++) store(out + t * write.width + o, sums[t]);
    }
    for (int t = 0; t < TOGETHER; t++) combine_rest(strengths + t * write.ranks, write, out + t * write.width);
}

// -- over the tokens of a step ---------------------------------------------------------------------------------------

// alone(t, its vectors) and together(t, the vectors of TOGETHER tokens from t on) for all that have edits, and zeros
// for those of the base model.
template <class N, class Alone, class Together>
void by_slot(const at::Tensor& slots, const N* first, const at::Tensor& vectors, float* out, int64_t out_width,
             Alone&& alone, Together&& together) {
    const int32_t* slot_of = slots.const_data_ptr<int32_t>();
    int64_t count = vectors.size(0), ranks = vectors.size(1), width = vectors.size(2);
    int64_t grain = std::max<int64_t>(TOGETHER, WORTH_A_THREAD / std::max<int64_t>(1, ranks * width));
    at::parallel_for(0, slots.size(0), grain, [&](int64_t begin, int64_t end) {
        for (int64_t t = begin, stop; t < end; t = stop) {
            int64_t slot = slot_of[t];
            TORCH_CHECK(0 <= slot && slot < count, "token ", t, " is of slot ", slot, " of ", count);
            for (stop = t + 1; stop < end && slot_of[stop] == slot;) stop++;
            if (slot == 0) {
                std::fill_n(out + t * out_width, (stop - t) * out_width, 0.0f);
                continue;
            }
            const N* here = first + slot * vectors.stride(0);
            for (; t + TOGETHER <= stop; t += TOGETHER) together(t, Vectors<N>{here, here, ranks, width});
            for (; t < stop; t++) {
                const N* next = t + 1 < end ? first + slot_of[t + 1] * vectors.stride(0) : here;
                alone(t, Vectors<N>{here, next, ranks, width});
            }
        }
    });
}

void check(const at::Tensor& vectors, const at::Tensor& tokens, const at::Tensor& slots) {
    TORCH_CHECK(vectors.dim() == 3 && vectors.stride(2) == 1 && vectors.stride(1) == vectors.size(2),
                "expected [slots, rank, width], each slot's in one piece, found ", vectors.sizes());
    TORCH_CHECK(tokens.dim() == 2 && tokens.stride(1) == 1, "expected [tokens, width], found ", tokens.sizes());
    TORCH_CHECK(slots.dim() == 1 && slots.is_contiguous() && slots.size(0) == tokens.size(0),
                "expected a slot for each of ", tokens.size(0), " tokens, found ", slots.sizes());
}

template <class Call>  // call(the numbers, as what they are)
void with_numbers(const at::Tensor& tensor, Call&& call) {
    if (tensor.scalar_type() == at::kBFloat16) return call(tensor.const_data_ptr<BFloat16>());
    TORCH_CHECK(tensor.scalar_type() == at::kFloat, "expected float32 or bfloat16, found ", tensor.scalar_type());
    call(tensor.const_data_ptr<float>());
}

at::Tensor slot_dots(const at::Tensor& x, const at::Tensor& read, const at::Tensor& slots) {
    check(read, x, slots);
    TORCH_CHECK(x.size(1) == read.size(2), "vectors of ", read.size(2), " numbers cannot read ", x.size(1));
    int64_t ranks = read.size(1), stride = x.stride(0);
    at::Tensor products = at::empty({x.size(0), ranks}, x.options().dtype(at::kFloat));
    float* out = products.mutable_data_ptr<float>();
    with_numbers(x, [&](auto* tokens) {
        with_numbers(read, [&](auto* numbers) {
            by_slot(
                slots, numbers, read, out, ranks,
                [&](int64_t t, auto&& vectors) { dots<1>(tokens + t * stride, stride, vectors, out + t * ranks); },
                [&](int64_t t, auto&& vectors) {
                    dots<TOGETHER>(tokens + t * stride, stride, vectors, out + t * ranks);
                });
        });
    });
    return products;
}

at::Tensor slot_combine(const at::Tensor& strengths, const at::Tensor& write, const at::Tensor& slots) {
    check(write, strengths, slots);
    int64_t ranks = write.size(1), width = write.size(2);
    TORCH_CHECK(strengths.size(1) == ranks && strengths.is_contiguous(),
                "expected strengths of ", ranks, " directions, found ", strengths.sizes());
    at::Tensor sums = at::empty({slots.size(0), width}, strengths.options());
    const float* weights = strengths.const_data_ptr<float>();
    float* out = sums.mutable_data_ptr<float>();
    with_numbers(write, [&](auto* numbers) {
        by_slot(
            slots, numbers, write, out, width,
            [&](int64_t t, auto&& vectors) { combine_alone(weights + t * ranks, vectors, out + t * width); },
            [&](int64_t t, auto&& vectors) { combine_together(weights + t * ranks, vectors, out + t * width); });
    });
    return sums;
}

}  // namespace

TORCH_LIBRARY(vllm_edits, library) {
    library.def("slot_dots(Tensor x, Tensor read, Tensor slots) -> Tensor");
    library.def("slot_combine(Tensor strengths, Tensor write, Tensor slots) -> Tensor");
}

TORCH_LIBRARY_IMPL(vllm_edits, CPU, library) {
    library.impl("slot_dots", slot_dots);
    library.impl("slot_combine", slot_combine);
}
