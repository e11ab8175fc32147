// Products of float32 rows with packed matrices, for XLA on CPU: llm/nn/packed.py says how they are packed,
// llm/nn/native.py builds this.
#include <algorithm>
#include <atomic>
#include <cstdint>
#include <cstring>
#include <memory>
#include <thread>
#include <vector>

#include "xla/ffi/api/ffi.h"

namespace ffi = xla::ffi;

namespace {

constexpr int kLanes = 8, kPlaces = 4, kGroup = kLanes * kPlaces;  // a group of inputs shares a scale
typedef float Floats __attribute__((vector_size(4 * kLanes)));
typedef int32_t Words __attribute__((vector_size(4 * kLanes)));
typedef int32_t HalfWords __attribute__((vector_size(2 * kLanes)));

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

// A group's weights: byte `place` of word `lane` is weight kPlaces * lane + place.
template <int kBits>
Words Group(const uint8_t* values) {
  if constexpr (kBits == 8) return Load<Words>(values);
  const HalfWords both = Load<HalfWords>(values);
  const Words twice = __builtin_shufflevector(both, both, 0, 1, 2, 3, 0, 1, 2, 3);
  return (twice >> Words{0, 0, 0, 0, 4, 4, 4, 4}) & 0x0f0f0f0f;  // low halves of the bytes, then high ones
}

Floats Place(Words words, int place) { return __builtin_convertvector((words << (24 - 8 * place)) >> 24, Floats); }

struct Problem {
  const uint8_t* values;    // outputs x groups x bytes of a group
  const uint16_t* scales;   // outputs x groups
  const uint16_t* least;    // the same; of 4 bits
  const float* x;           // rows x groups x places x lanes: the inputs in the order of a group's weights
  const float* sums;        // rows x groups x lanes: of the places, of 4 bits
  float* y;                 // rows x outputs
  int64_t rows, groups, outputs;
};

float Sum(Floats lanes) {
  float sum = 0;
  for (int lane = 0; lane < kLanes; ++lane) sum += lanes[lane];
  return sum;
}

// An output of one row, straight from the packed weights.
template <int kBits>
void One(const Problem& p, int64_t output, int64_t row) {
  Floats total = {};
  for (int64_t g = 0; g < p.groups; ++g) {
    const int64_t group = output * p.groups + g;
    const Words words = Group<kBits>(p.values + group * kGroup * kBits / 8);
    Floats part = {};
#pragma GCC unroll 4
    for (int place = 0; place < kPlaces; ++place) {
      part += Place(words, place) * Load<Floats>(p.x + (row * p.groups + g) * kGroup + place * kLanes);
    }
    total += FromHalf(p.scales[group]) * part;
    if constexpr (kBits == 4) total += FromHalf(p.least[group]) * Load<Floats>(p.sums + (row * p.groups + g) * kLanes);
  }
  p.y[row * p.outputs + output] = Sum(total);
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
    const Words words = Group<kBits>(p.values + group * kGroup * kBits / 8);
    const float scale = FromHalf(p.scales[group]), least = kBits == 4 ? FromHalf(p.least[group]) : 0.0f;
#pragma GCC unroll 4
    for (int place = 0; place < kPlaces; ++place) {
      const Floats weights = Place(words, place) * scale + least;
      std::memcpy(unpacked + g * kGroup + place * kLanes, &weights, sizeof(weights));
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
  for (; output < end; ++output) {
    for (int64_t row = 0; row < p.rows; ++row) One<kBits>(p, output, row);
  }
}

// Chunks of outputs, each taken by whoever is free. The caller works too, and waits only for chunks that others have
// begun: a pool without a free thread makes it slower, never stuck.
struct Work {
  Problem problem;
  int bits;
  int64_t chunk, chunks;
  std::vector<float> x, sums;
  std::atomic<int64_t> next{0}, done{0};

  void Run() {
    for (int64_t i; (i = next.fetch_add(1)) < chunks; done.fetch_add(1, std::memory_order_release)) {
      const int64_t begin = i * chunk, end = std::min(begin + chunk, problem.outputs);
      bits == 8 ? Outputs<8>(problem, begin, end) : Outputs<4>(problem, begin, end);
    }
  }
};

ffi::Error PackedProduct(ffi::ThreadPool pool, ffi::Buffer<ffi::F32> x, ffi::AnyBuffer values,
                         ffi::Buffer<ffi::F16> scales, ffi::Buffer<ffi::F16> least, ffi::ResultBuffer<ffi::F32> y) {
  const auto shape = values.dimensions();
  if (shape.size() != 3 || (shape[2] != kGroup && shape[2] != kGroup / 2)) {
    return ffi::Error::InvalidArgument("values: expected (outputs, groups, 32 or 16)");
  }
  const int64_t rows = x.dimensions()[0], outputs = shape[0], groups = shape[1];
  auto work = std::make_shared<Work>();
  work->bits = shape[2] == kGroup ? 8 : 4;
  work->x.resize(rows * groups * kGroup);
  if (work->bits == 4) work->sums.resize(rows * groups * kLanes);
  for (int64_t g = 0; g < rows * groups; ++g) {
    const float* from = x.typed_data() + g * kGroup;
    for (int place = 0; place < kPlaces; ++place) {
      for (int lane = 0; lane < kLanes; ++lane) {
        work->x[g * kGroup + place * kLanes + lane] = from[kPlaces * lane + place];
        if (work->bits == 4) work->sums[g * kLanes + lane] += from[kPlaces * lane + place];
      }
    }
  }
  work->problem = {static_cast<const uint8_t*>(values.untyped_data()),
                   reinterpret_cast<const uint16_t*>(scales.typed_data()),
                   reinterpret_cast<const uint16_t*>(least.typed_data()),
                   work->x.data(),
                   work->sums.data(),
                   y->typed_data(),
                   rows,
                   groups,
                   outputs};
  // A chunk is worth a thread's while: some 65,000 products or more.
  const int64_t threads = std::max<int64_t>(1, pool.num_threads());
  const int64_t worth = (1 << 16) / (groups * kGroup * rows) + 1;
  work->chunk = std::max(worth, (outputs + 4 * threads - 1) / (4 * threads));
  work->chunk = (work->chunk + kTile - 1) / kTile * kTile;
  work->chunks = (outputs + work->chunk - 1) / work->chunk;
  for (int64_t i = 1; i < std::min(threads, work->chunks); ++i) pool.Schedule([work] { work->Run(); });
  work->Run();
  while (work->done.load(std::memory_order_acquire) < work->chunks) std::this_thread::yield();
  return ffi::Error::Success();
}

}  // namespace

XLA_FFI_DEFINE_HANDLER_SYMBOL(packed_product, PackedProduct,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::Buffer<ffi::F16>>()
                                  .Arg<ffi::Buffer<ffi::F16>>()
                                  .Ret<ffi::Buffer<ffi::F32>>());
