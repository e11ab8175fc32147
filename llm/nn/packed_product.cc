// Products of float32 rows with packed matrices, for XLA on CPU: llm/nn/packed.py says how they are packed,
// llm/nn/native.py builds this.
//
// Few rows are rounded to 16 bits, and the products are of whole numbers, straight from the packed weights; more rows
// share weights that are unpacked once. Vectors are those that GCC and Clang write for any processor; where they write
// AVX2 poorly, it is asked for by name.
#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <memory>
#include <thread>
#include <vector>

#if defined(__AVX2__) || defined(__F16C__)
#include <immintrin.h>
#endif

#include "xla/ffi/api/ffi.h"

namespace ffi = xla::ffi;

namespace {

constexpr int kGroup = 32, kLanes = 8;  // a group of inputs shares a scale
typedef float Floats __attribute__((vector_size(4 * kLanes)));
typedef int32_t Words __attribute__((vector_size(4 * kLanes)));
typedef int16_t Half __attribute__((vector_size(kGroup)));  // of a group's weights or inputs
typedef uint16_t Fours __attribute__((vector_size(kGroup)));  // of two groups' weights, four in each
typedef uint16_t HalfFours __attribute__((vector_size(kGroup / 2)));
typedef int8_t HalfBytes __attribute__((vector_size(kGroup / 2)));

template <typename T>
T Load(const void* from) {
  T value;
  std::memcpy(&value, from, sizeof(T));
  return value;
}

float FromHalf(uint16_t half) {
  // The exponent's bias differs by 112; the product also gives what is below the smallest normal half.
  const uint32_t bits = static_cast<uint32_t>(half & 0x7fff) << 13;
  const float value = Load<float>(&bits) * 0x1p112f;
  return half & 0x8000 ? -value : value;
}

void FromHalves(const uint16_t* halves, int64_t count, float* floats) {
  int64_t i = 0;
#ifdef __F16C__
  for (; i + kLanes <= count; i += kLanes) _mm256_storeu_ps(floats + i, _mm256_cvtph_ps(Load<__m128i>(halves + i)));
#endif
  for (; i < count; ++i) floats[i] = FromHalf(halves[i]);
}

Half Wide(HalfBytes bytes) {
#ifdef __AVX2__
  return reinterpret_cast<Half>(_mm256_cvtepi8_epi16(reinterpret_cast<__m128i>(bytes)));
#else
  return __builtin_convertvector(bytes, Half);
#endif
}

// Bytes, as many as there are lanes.
Floats Numbers(const int8_t* bytes) {
#ifdef __AVX2__
  const __m128i eight = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(bytes));
  return reinterpret_cast<Floats>(_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(eight)));
#else
  Floats lanes;
  for (int i = 0; i < kLanes; ++i) lanes[i] = bytes[i];
  return lanes;
#endif
}

// The products of two numbers each, summed.
Words Pairs(Half a, Half b) {
#ifdef __AVX2__
  return reinterpret_cast<Words>(_mm256_madd_epi16(reinterpret_cast<__m256i>(a), reinterpret_cast<__m256i>(b)));
#else
  Words sums;
  for (int i = 0; i < kLanes; ++i) sums[i] = a[2 * i] * b[2 * i] + a[2 * i + 1] * b[2 * i + 1];
  return sums;
#endif
}

// A row of x in whole numbers. With 4 bits the places of two groups are those in which Straight takes the weights out
// of their words of 16 bits: the lowest four bits of each, the next, ...
struct Row {
  const int16_t* rounded;  // pairs of groups x 64
  const float* scales;     // groups
  const float* sums;       // groups, scaled
  const float* lanes;      // pairs of groups x kLanes: the scale of one in the first half, of the other in the second
};

// One number in the first half of the lanes, the next in the other.
Floats Halves(const float* two) {
#ifdef __AVX2__
  const __m256 first = _mm256_castps128_ps256(_mm_broadcast_ss(two));
  return reinterpret_cast<Floats>(_mm256_insertf128_ps(first, _mm_broadcast_ss(two + 1), 1));
#else
  return Floats{two[0], two[0], two[0], two[0], two[1], two[1], two[1], two[1]};
#endif
}

struct Problem {
  const uint8_t* values;    // outputs x groups x bytes of a group
  const uint16_t* scales;   // outputs x groups
  const uint16_t* least;    // the same; of 4 bits
  const float* x;           // rows x inputs
  const Row* rounded;       // rows: the same
  float* y;                 // rows x outputs
  int64_t rows, groups, outputs;
};

float Sum(Floats lanes) {
  lanes += __builtin_shufflevector(lanes, lanes, 4, 5, 6, 7, 0, 1, 2, 3);
  lanes += __builtin_shufflevector(lanes, lanes, 2, 3, 0, 1, 6, 7, 4, 5);
  return lanes[0] + lanes[1];
}

// An output's product with a rounded row. No sum of a group exceeds 32 * 127 * 32767: it fits.
template <int kBits>
float Straight(const uint8_t* values, const float* scales, const float* least, const Row& row, int64_t groups) {
  Floats total = {};
  if constexpr (kBits == 8) {
    const int16_t* x = row.rounded;
    for (int64_t g = 0; g < groups; ++g, values += kGroup, x += kGroup) {
      __builtin_prefetch(values + 2048);  // reading is what limits this one
      const Words sums = Pairs(Wide(Load<HalfBytes>(values)), Load<Half>(x)) +
                         Pairs(Wide(Load<HalfBytes>(values + kGroup / 2)), Load<Half>(x + kGroup / 2));
      total += scales[g] * row.scales[g] * __builtin_convertvector(sums, Floats);
    }
    return Sum(total);
  }
  float low = 0, high = 0;
  int64_t g = 0;
  const auto add = [&](Fours fours, Floats own) {
    const int16_t* x = row.rounded + g * kGroup;
    const Words sums = Pairs(reinterpret_cast<Half>(fours & 15), Load<Half>(x)) +
                       Pairs(reinterpret_cast<Half>(fours >> 4 & 15), Load<Half>(x + 16)) +
                       Pairs(reinterpret_cast<Half>(fours >> 8 & 15), Load<Half>(x + 32)) +
                       Pairs(reinterpret_cast<Half>(fours >> 12), Load<Half>(x + 48));
    total += own * Load<Floats>(row.lanes + g * kLanes / 2) * __builtin_convertvector(sums, Floats);
  };
  for (; g + 1 < groups; g += 2, values += kGroup) {
    add(Load<Fours>(values), Halves(scales + g));
    low += least[g] * row.sums[g];
    high += least[g + 1] * row.sums[g + 1];
  }
  if (g < groups) {
    const HalfFours one = Load<HalfFours>(values);
    const Fours two = __builtin_shufflevector(one, HalfFours{}, 0, 1, 2, 3, 4, 5, 6, 7, 8, 8, 8, 8, 8, 8, 8, 8);
    add(two, Floats{} + scales[g]);
    low += least[g] * row.sums[g];
  }
  return Sum(total) + (low + high);
}

// Outputs that are unpacked together, and the block of them and of rows that eight sums are kept of: a row or weight
// that was loaded serves several products, from the nearest cache.
constexpr int kTile = 8, kOutputs = 2, kRows = 4;

// A tile's outputs of all rows, which are kRows or more: the weights are unpacked once for all of them.
template <int kBits>
void Tile(const Problem& p, int64_t output, float* unpacked) {
  const int64_t inputs = p.groups * kGroup;
  for (int64_t g = 0; g < kTile * p.groups; ++g) {
    const int64_t group = output * p.groups + g;
    const uint8_t* values = p.values + group * kGroup * kBits / 8;
    int8_t weights[kGroup];
    if constexpr (kBits == 8) {
      std::memcpy(weights, values, kGroup);
    } else {
      const HalfBytes both = Load<HalfBytes>(values), low = both & 15, high = both >> 4 & 15;
      std::memcpy(weights, &low, sizeof(low));
      std::memcpy(weights + kGroup / 2, &high, sizeof(high));
    }
    const float scale = FromHalf(p.scales[group]), least = kBits == 4 ? FromHalf(p.least[group]) : 0.0f;
    for (int i = 0; i < kGroup; i += kLanes) {
      const Floats lanes = Numbers(weights + i) * scale + least;
      std::memcpy(unpacked + g * kGroup + i, &lanes, sizeof(lanes));
    }
  }
  for (int64_t row = 0; row < p.rows; row += kRows) {
    const int64_t from = std::min(row, p.rows - kRows);  // the last block repeats rows rather than be a smaller one
    for (int first = 0; first < kTile; first += kOutputs) {
      Floats sums[kOutputs][kRows] = {};
      const float* x = p.x + from * inputs;
      const float* w = unpacked + first * inputs;
      for (int64_t i = 0; i < inputs; i += kLanes) {
        Floats weights[kOutputs];
#pragma GCC unroll 8
        for (int o = 0; o < kOutputs; ++o) weights[o] = Load<Floats>(w + o * inputs + i);
#pragma GCC unroll 8
        for (int r = 0; r < kRows; ++r) {
          const Floats row = Load<Floats>(x + r * inputs + i);
#pragma GCC unroll 8
          for (int o = 0; o < kOutputs; ++o) sums[o][r] += weights[o] * row;
        }
      }
      for (int o = 0; o < kOutputs; ++o) {
        for (int r = 0; r < kRows; ++r) p.y[(from + r) * p.outputs + output + first + o] = Sum(sums[o][r]);
      }
    }
  }
}

template <int kBits>
void Outputs(const Problem& p, int64_t begin, int64_t end) {
  int64_t output = begin;
  if (p.rows >= kRows) {
    std::vector<float> unpacked(kTile * p.groups * kGroup);
    for (; output + kTile <= end; output += kTile) Tile<kBits>(p, output, unpacked.data());
  }
  std::vector<float> scales(kTile * p.groups), least(kTile * p.groups);
  for (int64_t from = output; output < end; from = output) {
    const int64_t count = std::min<int64_t>(kTile, end - from) * p.groups;
    FromHalves(p.scales + from * p.groups, count, scales.data());
    if (kBits == 4) FromHalves(p.least + from * p.groups, count, least.data());
    for (int64_t at = 0; at < count; at += p.groups, ++output) {
      const uint8_t* values = p.values + output * p.groups * kGroup * kBits / 8;
      for (int64_t row = 0; row < p.rows; ++row) {
        p.y[row * p.outputs + output] =
            Straight<kBits>(values, scales.data() + at, least.data() + at, p.rounded[row], p.groups);
      }
    }
  }
}

// Chunks of outputs of all matrices, each taken by whoever is free. The caller works too, and waits only for chunks
// that others have begun: a pool without a free thread makes it slower, never stuck.
struct Work {
  std::vector<Problem> problems;
  int bits;
  int64_t chunk, chunks = 0;
  std::vector<int16_t> rounded;
  std::vector<float> scales, sums, lanes;
  std::vector<Row> rows;
  std::atomic<int64_t> next{0}, done{0};

  int64_t Chunks(const Problem& problem) const { return (problem.outputs + chunk - 1) / chunk; }

  void Run() {
    for (int64_t i; (i = next.fetch_add(1)) < chunks; done.fetch_add(1, std::memory_order_release)) {
      int64_t before = 0;
      const Problem* problem = problems.data();
      for (; i - before >= Chunks(*problem); ++problem) before += Chunks(*problem);
      const int64_t begin = (i - before) * chunk, end = std::min(begin + chunk, problem->outputs);
      bits == 8 ? Outputs<8>(*problem, begin, end) : Outputs<4>(*problem, begin, end);
    }
  }
};

// Rounds the rows to whole numbers within +-32767, a scale for each group.
void Round(const float* x, int64_t rows, int64_t groups, Work& work) {
  const int64_t pairs = (groups + 1) / 2;
  work.rounded.resize(rows * pairs * 2 * kGroup);
  work.scales.resize(rows * groups);
  work.sums.resize(rows * groups);
  work.lanes.resize(rows * pairs * kLanes);
  for (int64_t row = 0; row < rows; ++row) {
    int16_t* rounded = work.rounded.data() + row * pairs * 2 * kGroup;
    float* lanes = work.lanes.data() + row * pairs * kLanes;
    for (int64_t g = 0; g < groups; ++g, x += kGroup) {
      float largest = 0, nothing = 0;
      for (int i = 0; i < kGroup; ++i) {
        largest = std::max(largest, std::fabs(x[i]));
        nothing += 0 * x[i];
      }
      if (nothing != 0) largest = 0;  // the row is not finite, and so is the scale
      const float inverse = largest > 0 ? 32767 / largest : 0, scale = largest / 32767 + nothing;
      int32_t sum = 0;
      for (int i = 0; i < kGroup; ++i) {
        const auto whole = static_cast<int16_t>(inverse > 0 ? std::lrint(x[i] * inverse) : 0);
        const int byte = i % 16, place = byte % 2 * 2 + i / 16;
        rounded[work.bits == 8 ? g * kGroup + i : g / 2 * 2 * kGroup + place * 16 + g % 2 * 8 + byte / 2] = whole;
        sum += whole;
      }
      work.scales[row * groups + g] = scale;
      work.sums[row * groups + g] = scale * static_cast<float>(sum);
      std::fill_n(lanes + g * kLanes / 2, kLanes / 2, scale);
    }
    work.rows.push_back({rounded, work.scales.data() + row * groups, work.sums.data() + row * groups, lanes});
  }
}

// The arguments after x are values, scales and least of each matrix; each has a result.
ffi::Error PackedProduct(ffi::ThreadPool pool, ffi::Buffer<ffi::F32> x, ffi::RemainingArgs matrices,
                         ffi::RemainingRets results) {
  const int64_t rows = x.dimensions()[0], inputs = x.dimensions()[1], groups = inputs / kGroup;
  auto work = std::make_shared<Work>();
  int64_t outputs = 0;
  for (size_t i = 0; i < results.size(); ++i) {
    const auto values = matrices.get<ffi::AnyBuffer>(3 * i);
    const auto scales = matrices.get<ffi::Buffer<ffi::F16>>(3 * i + 1);
    const auto least = matrices.get<ffi::Buffer<ffi::F16>>(3 * i + 2);
    auto y = results.get<ffi::Buffer<ffi::F32>>(i);
    if (!values || !scales || !least || !y) {
      return ffi::Error::InvalidArgument("expected values, float16 scales and least of each matrix, float32 results");
    }
    const auto shape = values->dimensions();
    const bool known = shape.size() == 3 && shape[1] == groups && (shape[2] == kGroup || shape[2] == kGroup / 2);
    if (!known || (i > 0 && work->bits != (shape[2] == kGroup ? 8 : 4))) {
      return ffi::Error::InvalidArgument("values: expected (outputs, groups, 32 or 16), in all matrices alike");
    }
    work->bits = shape[2] == kGroup ? 8 : 4;
    outputs += shape[0];
    work->problems.push_back({static_cast<const uint8_t*>(values->untyped_data()),
                              reinterpret_cast<const uint16_t*>(scales->typed_data()),
                              reinterpret_cast<const uint16_t*>(least->typed_data()), x.typed_data(), nullptr,
                              (*y)->typed_data(), rows, groups, shape[0]});
  }
  Round(x.typed_data(), rows, groups, *work);
  // A chunk is worth a thread's while: some 65,000 products or more.
  const int64_t threads = std::max<int64_t>(1, pool.num_threads());
  const int64_t worth = (1 << 16) / (inputs * rows) + 1;
  work->chunk = std::max(worth, (outputs + 4 * threads - 1) / (4 * threads));
  work->chunk = (work->chunk + kTile - 1) / kTile * kTile;
  for (Problem& problem : work->problems) {
    problem.rounded = work->rows.data();
    work->chunks += work->Chunks(problem);
  }
  for (int64_t i = 1; i < std::min(threads, work->chunks); ++i) pool.Schedule([work] { work->Run(); });
  work->Run();
  while (work->done.load(std::memory_order_acquire) < work->chunks) std::this_thread::yield();
  return ffi::Error::Success();
}

}  // namespace

XLA_FFI_DEFINE_HANDLER_SYMBOL(
    packed_product, PackedProduct,
    ffi::Ffi::Bind().Ctx<ffi::ThreadPool>().Arg<ffi::Buffer<ffi::F32>>().RemainingArgs().RemainingRets());
