// A few neighbouring rows of swiglu_stats: what is computed, recorded and written of them.
// swiglu_stats_kernel.cpp, which includes it, says which rows, groups and columns.
#pragma once

#include "swiglu_stats.h"
#include "swiglu_stats_activation.h"
#include "swiglu_stats_records.h"

namespace relneuron {
namespace RELNEURON_ISA {
namespace {

// Neighbouring rows of one range of columns, their tokens in the same group and prompt.

constexpr int n_rows_max = 4;

template <typename Storage>
struct Rows {
  const Storage* gate[n_rows_max];
  const Storage* up[n_rows_max];
  Storage* out[n_rows_max];
  const uint32_t* keep[n_rows_max];  // of the token's condition, from the first column of F on
};

// What h is: of a call without up it is act.
enum class Out { none, product, act };

struct Task {
  Slot slots[n_sites_max];        // by site, of the tokens' group
  int64_t* counts[n_sites_max];   // in place of slots: of the group, from the range's first column on
  bool is_counted[n_sites_max];   // by site
  float* responses[n_sites_max];  // by site, in planes of the range; null = none
  bool is_direct, has_moments, has_keep, stream;
  bool needs_act, needs_product;  // of statistics and responses; h needs its own
  bool is_part_full;              // after these rows
  float threshold;
  const float* act_table;
};

// `at` counts columns within the range, `f` within F; the rows begin at `at`. With Out::none only
// what the statistics need is loaded and computed.
template <typename Element, Activation activation, int n_rows, Out out>
RELNEURON_INLINE void do_block(const Task& task, const Rows<typename Element::Storage>& rows,
                               int64_t at, int64_t f) {
  Block act[n_rows] = {}, product[n_rows] = {};
  const bool needs_product = out == Out::product || task.needs_product;
  const bool needs_act = out != Out::none || task.needs_act;
  // Responses of gate and up are added here, where their values are at hand.
  float* const gate_sums = task.responses[site_gate];
  float* const up_sums = task.responses[site_up];
  Block gate_sum = {}, up_sum = {};
  if (gate_sums) gate_sum = Float32::load_block(gate_sums + at);
  if (up_sums) up_sum = Float32::load_block(up_sums + at);
  for (int r = 0; r < n_rows; ++r) {
    const Block gate = Element::load_block(rows.gate[r] + at);
    Block up = {};
    if (needs_product || up_sums) up = Element::load_block(rows.up[r] + at);
    if (gate_sums) {
      for (int i = 0; i < 2; ++i) gate_sum.plane[i] += gate.plane[i];
    }
    if (up_sums) {
      for (int i = 0; i < 2; ++i) up_sum.plane[i] += up.plane[i];
    }
    if constexpr (activation == Activation::residual) {
      act[r] = gate;
    } else if (!needs_act) {
      continue;
    } else if constexpr (Element::is_half) {
      U32 index[2];
      Element::load_indices(rows.gate[r] + at, index);
      for (int i = 0; i < 2; ++i) act[r].plane[i] = look_up(task.act_table, index[i]);
    } else {
      for (int i = 0; i < 2; ++i) act[r].plane[i] = activate<activation>(gate.plane[i]);
    }
    if (!needs_product) continue;
    for (int i = 0; i < 2; ++i) {
      const F32 x = act[r].plane[i], y = up.plane[i];
      product[r].plane[i] = Element::round(activation == Activation::residual ? y + x : x * y);
    }
  }
  if (gate_sums) Float32::to_natural(gate_sums + at, gate_sum);
  if (up_sums) Float32::to_natural(up_sums + at, up_sum);

  const auto record = [&](Site site, const Block (&value)[n_rows]) RELNEURON_LAMBDA {
    if (task.is_counted[site] && task.is_direct) {
      U32 hits[2] = {};
      for (const Block& x : value) {
        for (int i = 0; i < 2; ++i) {
          hits[i] = add_where_greater(hits[i], x.plane[i], splat(task.threshold), 1u);
        }
      }
      add_hits<Element>(task.counts[site] + at, hits[0], hits[1]);
    } else if (task.is_counted[site]) {
      add_counts(task.slots[site].counts(at), value, splat(task.threshold));
      if (task.has_moments) {
        add_moments(task.slots[site].moments(at), task.slots[site].totals(at), value,
                    task.is_part_full);
      }
    }
    if (site != site_gate && site != site_up && task.responses[site]) {
      add_responses(task.responses[site] + at, value);
    }
  };
  const auto record_input = [&](Site site, const typename Element::Storage* const* from)
      RELNEURON_LAMBDA {
    if (!task.is_counted[site]) return;
    Block value[n_rows];
    for (int r = 0; r < n_rows; ++r) value[r] = Element::load_block(from[r] + at);
    record(site, value);
  };
  if constexpr (activation == Activation::residual) {
    record(site_gate, act);
  } else {
    record_input(site_gate, rows.gate);
    record_input(site_up, rows.up);
    record(site_act, act);
    if (task.is_counted[site_product] || task.responses[site_product]) {
      Block value[n_rows];
      for (int r = 0; r < n_rows; ++r) {
        for (int i = 0; i < 2; ++i) value[r].plane[i] = Element::exact(product[r].plane[i]);
      }
      record(site_product, value);
    }
  }

  if constexpr (out == Out::none) return;
  for (int r = 0; r < n_rows; ++r) {
    U32 packed[block_width * sizeof(typename Element::Storage) / sizeof(U32)];
    Element::pack(out == Out::act ? act[r] : product[r], packed);
    if (task.has_keep) {
      const uint32_t bits = rows.keep[r][f / 32] >> (f % 32);
      if constexpr (activation == Activation::residual) {
        // Where the neuron is dropped the residual alone is left.
        U32 rest[sizeof packed / sizeof(U32)];
        memcpy(rest, rows.up[r] + at, sizeof rest);
        Element::keep(bits, packed);
        Element::keep(~bits, rest);
        for (size_t i = 0; i < sizeof packed / sizeof(U32); ++i) packed[i] |= rest[i];
      } else {
        Element::keep(bits, packed);
      }
    }
    for (size_t i = 0; i < sizeof packed / sizeof(U32); ++i) {
      void* const to = reinterpret_cast<U32*>(rows.out[r] + at) + i;
      if (task.stream) {
        stream(to, packed[i]);
      } else {
        store(to, packed[i]);
      }
    }
  }
}

// Columns `begin` to `end` of the range. The rows after these, to be fetched meanwhile, are
// `next_gate` and `next_up` elements away.
template <typename Element, Activation activation, int n_rows, Out out>
void do_rows(const Task& task, const Rows<typename Element::Storage>& rows, int64_t f,
             int64_t begin, int64_t end, int64_t next_gate, int64_t next_up) {
  using Storage = typename Element::Storage;
  const bool needs_up = out == Out::product || task.needs_product || task.is_counted[site_up];
  int64_t at = begin;
  for (; at + block_width <= end; at += block_width) {
    for (int r = 0; r < n_rows; ++r) {
      const char* const gate = reinterpret_cast<const char*>(rows.gate[r] + at + next_gate);
      const char* const up = reinterpret_cast<const char*>(rows.up[r] + at + next_up);
      for (size_t line = 0; line < block_width * sizeof(Storage); line += 64) {
        __builtin_prefetch(gate + line, 0, 3);
        if (needs_up) __builtin_prefetch(up + line, 0, 3);
      }
    }
    do_block<Element, activation, n_rows, out>(task, rows, at, f + at);
  }
  if (at == end) return;
  // The last columns in blocks of their own, filled up with zeros; by a call of this function, as
  // do_block is long, and compiled into each place that has it.
  alignas(64) Storage rest[3][n_rows][block_width] = {};
  const size_t rest_bytes = static_cast<size_t>(end - at) * sizeof(Storage);
  Rows<Storage> rest_rows = rows;
  for (int r = 0; r < n_rows; ++r) {
    memcpy(rest[0][r], rows.gate[r] + at, rest_bytes);
    memcpy(rest[1][r], rows.up[r] + at, rest_bytes);
    rest_rows.gate[r] = rest[0][r] - at;
    rest_rows.up[r] = rest[1][r] - at;
    rest_rows.out[r] = rest[2][r] - at;
  }
  Task rest_task = task;
  int64_t rest_counts[n_sites_max][block_width] = {};
  if (task.is_direct) {
    for (int site = 0; site < n_sites_max; ++site) rest_task.counts[site] = rest_counts[site] - at;
  }
  do_rows<Element, activation, n_rows, out>(rest_task, rest_rows, f, at, at + block_width, 0, 0);
  for (int site = 0; task.is_direct && site < n_sites_max; ++site) {
    if (!task.is_counted[site]) continue;
    for (int64_t i = at; i < end; ++i) task.counts[site][i] += rest_counts[site][i - at];
  }
  if constexpr (out == Out::none) return;
  for (int r = 0; r < n_rows; ++r) memcpy(rows.out[r] + at, rest[2][r], rest_bytes);
}

}  // namespace
}  // namespace RELNEURON_ISA
}  // namespace relneuron
