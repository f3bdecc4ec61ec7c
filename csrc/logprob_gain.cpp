// Drives the kernel of logprob_gain: neurons in large blocks, and for each of them the vocabulary in
// pieces that all threads pack and then go through. A pair belongs to one thread at a time and meets
// the tiles in order, so the sums do not depend on the number of threads.
#include "logprob_gain.h"

#include <algorithm>
#include <atomic>
#include <cmath>
#include <vector>

#include "runtime.h"

namespace relneuron {
namespace {

constexpr const LogprobGainKernel* kernels[] = RELNEURON_KERNELS(logprob_gain_kernel);

// In bytes. Threads wait for each other after each piece of the vocabulary, so pieces are large.
constexpr int64_t packed_values_max = int64_t{32} << 20, packed_unembed_max = int64_t{6} << 20;
constexpr double min_products_per_thread = 1e6;

int64_t round_up(int64_t n, int64_t step) { return (n + step - 1) / step * step; }

// Calls work(0) ... work(n - 1) on all threads.
template <typename Work>
void for_each(int64_t n, int64_t n_threads, const Work& work) {
  std::atomic<int64_t> next{0};
  auto run = [&] {
    const DefaultFloatMode mode;
    for (int64_t i; (i = next++) < n;) work(i);
  };
  run_parallel(run, std::min(n_threads, n));
}

// What some tiles in a row need, and their places in it.
struct Piece {
  Piece(const LogprobGainArgs& args, int64_t n)
      : memory(make_scratch(n * tile_tokens * 4 * (args.D + args.E * (args.tilt ? 3 : 2)))),
        weight(static_cast<size_t>(n * args.E)),
        z_span(static_cast<size_t>(n * args.E)),
        tiles(static_cast<size_t>(n)) {
    float* next = reinterpret_cast<float*>(memory.get());
    const auto take = [&](int64_t n_floats) {
      next += n_floats;
      return next - n_floats;
    };
    for (int64_t i = 0; i < n; ++i) {
      Tile& tile = tiles[static_cast<size_t>(i)];
      tile.unembed = take(tile_tokens * args.D);
      tile.p = take(tile_tokens * args.E);
      tile.logp = take(tile_tokens * args.E);
      tile.z = args.tilt ? take(tile_tokens * args.E) : nullptr;
      tile.weight = weight.data() + i * args.E;
      tile.z_span = z_span.data() + i * args.E;
    }
  }

  Scratch memory;
  std::vector<double> weight;
  std::vector<float> z_span;
  std::vector<Tile> tiles;
};

void write_sums(const LogprobGainArgs& args, const PairSum* sums, const double* total) {
  const int64_t n = args.row_start[args.K];
  for (int64_t i = 0; i < n; ++i) {
    const PairSum& sum = sums[i];
    args.log_sums[i] =
        sum.has_large
            ? sum.shift +
                  std::log(sum.large + (sum.weight + sum.small) * std::exp(-sum.shift)) -
                  std::log(total[args.sentence[i]])
            : std::log1p(sum.small);
  }
}

}  // namespace

void logprob_gain(const LogprobGainArgs& args, const char* isa, int n_threads) {
  const LogprobGainKernel& kernel = *kernels[find_isa("logprob_gain", isa)];
  const double products = static_cast<double>(args.K) * args.V * (args.D + args.E);
  const int64_t threads = std::max<int64_t>(
      1, std::min<int64_t>(n_threads, static_cast<int64_t>(products / min_products_per_thread)));

  const int64_t whole = round_up(args.K, block_rows);
  const int64_t fitting = packed_values_max / (4 * args.D) / block_rows * block_rows;
  const int64_t rows_at_once = std::min(whole, std::max(block_rows, fitting));
  const Scratch values = make_scratch(4 * rows_at_once * args.D);
  const int64_t n_tiles = (args.V + tile_tokens - 1) / tile_tokens;
  const int64_t tiles_at_once = std::min(
      n_tiles, std::max<int64_t>(1, packed_unembed_max / (4 * tile_tokens * (args.D + args.E))));
  Piece piece(args, tiles_at_once);
  const Scratch scratch = make_scratch(4 * threads * block_rows * tile_tokens);
  std::vector<double> total(static_cast<size_t>(args.E));
  std::vector<PairSum> sums(static_cast<size_t>(args.log_sums ? args.row_start[args.K] : 0));
  std::fill(args.largest, args.largest + args.K, 0.0f);
  if (args.second) {
    std::fill(args.second, args.second + args.K * args.E, 0.0);
    std::fill(args.third, args.third + args.K * args.E, 0.0);
  }
  const int64_t n_panels = tile_tokens / kernel.tokens_per_panel, n_parts = n_panels + args.E;

  LogprobGainPlan plan;
  plan.values = reinterpret_cast<float*>(values.get());
  plan.sums = sums.data();
  for (plan.first_row = 0; plan.first_row < args.K; plan.first_row += rows_at_once) {
    plan.n_rows = std::min(rows_at_once, args.K - plan.first_row);
    const int64_t n_blocks = (plan.n_rows + block_rows - 1) / block_rows;
    for_each(n_blocks * block_rows / kernel.rows_per_panel, threads,
             [&](int64_t panel) { kernel.pack_values(args, plan, panel); });
    std::fill(total.begin(), total.end(), 0.0);
    for (int64_t first = 0; first < n_tiles; first += tiles_at_once) {
      const int64_t n = std::min(tiles_at_once, n_tiles - first);
      for (int64_t i = 0; i < n; ++i) {
        Tile& tile = piece.tiles[static_cast<size_t>(i)];
        tile.first_token = (first + i) * tile_tokens;
        tile.n_tokens = std::min(tile_tokens, args.V - tile.first_token);
      }
      for_each(n * n_parts, threads, [&](int64_t part) {
        const Tile& tile = piece.tiles[static_cast<size_t>(part / n_parts)];
        const int64_t i = part % n_parts;
        if (i < n_panels) {
          kernel.pack_unembed(args, tile, i);
        } else {
          kernel.pack_sentence(args, tile, i - n_panels);
        }
      });
      for (int64_t i = 0; i < n * args.E; ++i) {
        total[static_cast<size_t>(i % args.E)] += piece.weight[static_cast<size_t>(i)];
      }
      std::atomic<int64_t> next_block{0}, next_thread{0};
      auto run = [&] {
        const DefaultFloatMode mode;
        float* own = reinterpret_cast<float*>(scratch.get()) +
                     next_thread++ * block_rows * tile_tokens;
        for (int64_t block; (block = next_block++) < n_blocks;) {
          for (int64_t i = 0; i < n; ++i) {
            kernel.block(args, plan, piece.tiles[static_cast<size_t>(i)], block * block_rows, own);
          }
        }
      };
      run_parallel(run, std::min(threads, n_blocks));
    }
  }
  if (args.log_sums) write_sums(args, sums.data(), total.data());
}

}  // namespace relneuron
