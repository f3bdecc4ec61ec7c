// The inner loops of swiglu_stats on a CPU, compiled once per instruction set (RELNEURON_ISA) from
// this one source. swiglu_stats.cpp calls it for each thread's columns. Use nothing here from headers
// that have inline functions: the linker would keep one copy for all instruction sets, maybe one
// that the processor cannot run.
#include "swiglu_stats.h"

#include "swiglu_stats_activation.h"
#include "swiglu_stats_records.h"

namespace relneuron {
namespace RELNEURON_ISA {
namespace {

// ---- Slots to and from the statistics. The totals of a slot begin as those of its group, so that its
// parts join them in the order of the rows.

template <typename Element, typename Visit>
RELNEURON_INLINE void for_each_column(int64_t width, Visit visit) {
  for (int64_t at = 0; at < width; at += block_width) {
    for (int plane = 0; plane < 2; ++plane) {
      for (int lane = 0; lane < n_lanes; ++lane) {
        const int64_t column = at + Element::column(plane, lane);
        if (column < width) visit(column, at, plane, lane);
      }
    }
  }
}

// Hits of a block in planes, added to the counts of its columns.
template <typename Element>
RELNEURON_INLINE void add_hits(int64_t* count, U32 plane0, U32 plane1) {
  float natural[block_width];
  Element::to_natural(natural, {float_of(plane0), float_of(plane1)});
  constexpr int half = n_lanes / 2;
  for (int at = 0; at < block_width; at += n_lanes) {
    const U32 hits = load<U32>(natural + at);
    store(count + at, load<U64>(count + at) + widen<0>(hits));
    store(count + at + half, load<U64>(count + at + half) + widen<1>(hits));
  }
}

template <typename Element>
void add_slot_counts(const SwigluStatsArgs& args, const Slot& slot, int64_t first, int64_t width) {
  int64_t at = 0;
  for (; at + block_width <= width; at += block_width) {
    const U32 pair = load<U32>(slot.counts(at).pair);
    add_hits<Element>(args.count + first + at, pair & 0xffffu, pair >> 16);
  }
  const Counts& rest = slot.counts(at);
  for_each_column<Element>(width - at, [&](int64_t column, int64_t, int plane, int lane) {
    args.count[first + at + column] += plane ? rest.pair[lane] >> 16 : rest.pair[lane] & 0xffffu;
  });
}

template <typename Element>
void load_moments(const SwigluStatsArgs& args, const Slot& slot, int64_t first, int64_t width) {
  for_each_column<Element>(width, [&](int64_t column, int64_t at, int plane, int lane) {
    const int place = plane * n_lanes + lane;
    slot.totals(at).sum[place] = args.sum[first + column];
    slot.totals(at).sum_sq[place] = args.sum_sq[first + column];
    slot.moments(at).max[place] = args.max[first + column];
  });
}

template <typename Element>
void store_moments(const SwigluStatsArgs& args, const Slot& slot, int64_t first, int64_t width) {
  for (int64_t at = 0; at < width; at += block_width) {
    flush_part(slot.moments(at).part_sum, slot.totals(at).sum);
    flush_part(slot.moments(at).part_sum_sq, slot.totals(at).sum_sq);
  }
  for_each_column<Element>(width, [&](int64_t column, int64_t at, int plane, int lane) {
    const Totals& totals = slot.totals(at);
    const int place = plane * n_lanes + lane;
    args.sum[first + column] = totals.sum[place];
    args.sum_sq[first + column] = totals.sum_sq[place];
    args.max[first + column] = slot.moments(at).max[place] + 0.0f;  // turns -0 into +0
    args.n_nonfinite[first + column] += totals.n_nonfinite[place];
  });
}

// ---- Responses of the prompt at hand, in planes; loaded and written back when the prompt changes.

template <typename Element>
void move_response(float* row, float* planes, int64_t width, bool write) {
  int64_t at = 0;
  for (; at + block_width <= width; at += block_width) {
    if (write) {
      Element::to_natural(row + at, Float32::load_block(planes + at));
    } else {
      Float32::to_natural(planes + at, Element::from_natural(row + at));
    }
  }
  if (at == width) return;
  float rest[block_width] = {};
  const size_t rest_bytes = 4 * static_cast<size_t>(width - at);
  if (write) {
    Element::to_natural(rest, Float32::load_block(planes + at));
    memcpy(row + at, rest, rest_bytes);
  } else {
    memcpy(rest, row + at, rest_bytes);
    Float32::to_natural(planes + at, Element::from_natural(rest));
  }
}

// ---- Neighbouring rows of one range of columns, their tokens in the same group and prompt.

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

// The rows after these, to be fetched meanwhile, are `next_gate` and `next_up` elements away.
template <typename Element, Activation activation, int n_rows, Out out>
void do_rows(const Task& task, const Rows<typename Element::Storage>& rows, int64_t f,
             int64_t width, int64_t next_gate, int64_t next_up) {
  using Storage = typename Element::Storage;
  const bool needs_up = out == Out::product || task.needs_product || task.is_counted[site_up];
  int64_t at = 0;
  for (; at + block_width <= width; at += block_width) {
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
  if (at == width) return;
  // The last columns in blocks of their own, filled up with zeros.
  alignas(64) Storage rest[3][n_rows][block_width] = {};
  const size_t rest_bytes = static_cast<size_t>(width - at) * sizeof(Storage);
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
  do_block<Element, activation, n_rows, out>(rest_task, rest_rows, at, f + at);
  for (int site = 0; task.is_direct && site < n_sites_max; ++site) {
    if (!task.is_counted[site]) continue;
    for (int64_t i = at; i < width; ++i) task.counts[site][i] += rest_counts[site][i - at];
  }
  if constexpr (out == Out::none) return;
  for (int r = 0; r < n_rows; ++r) memcpy(rows.out[r] + at, rest[2][r], rest_bytes);
}

template <typename Element, Activation activation, Out out>
void run_columns(const SwigluStatsArgs& args, const SwigluStatsPlan& plan, int64_t f_begin,
                 int64_t f_end, unsigned char* scratch) {
  using Storage = typename Element::Storage;
  const Layout layout(args, f_end - f_begin);
  const int64_t keep_stride = (args.F + 31) / 32;
  unsigned char* const slot_memory = scratch + layout.response_bytes * args.n_responses;
  const auto slot_of = [&](int64_t slot, int64_t s) {
    unsigned char* const records = slot_memory + (slot * args.n_sites + s) * layout.slot_bytes;
    return Slot{records, records + layout.width / block_width * layout.record_bytes,
                layout.record_bytes};
  };
  const auto response_of = [&](int64_t s) {
    return reinterpret_cast<float*>(scratch + s * layout.response_bytes);
  };
  Task task = {};
  task.has_moments = args.sum != nullptr;
  task.has_keep = args.keep != nullptr;
  task.stream = plan.stream;
  const auto is_site = [&](Site site) {
    bool found = false;
    for (int s = 0; s < args.n_sites; ++s) found |= args.sites[s] == site;
    for (int s = 0; s < args.n_responses; ++s) found |= args.response_sites[s] == site;
    return found;
  };
  task.needs_product = is_site(site_product);
  task.needs_act = is_site(site_act) || task.needs_product;
  // An address, in place of an up that is not there and that nothing needs.
  const auto* const up = static_cast<const Storage*>(args.up ? args.up : args.gate);
  memcpy(&task.threshold, &args.threshold_bits, sizeof task.threshold);
  task.act_table = plan.act_table;
  const auto prompt_of = [&](int64_t t) -> int64_t {
    return args.prompt_ids ? args.prompt_ids[t] : -1;
  };

  for (int64_t f = f_begin; f < f_end; f += layout.width) {
    const int64_t width = f_end - f < layout.width ? f_end - f : layout.width;
    int64_t prompt = -1;
    const auto change_prompt = [&](int64_t next) {
      for (int s = 0; s < args.n_responses; ++s) {
        float* const column = args.responses[s] + f;
        float* const sums = response_of(s);
        if (prompt >= 0) {
          move_response<Element>(column + prompt * args.strides_rn[s], sums, width, true);
        }
        if (next >= 0) {
          move_response<Element>(column + next * args.strides_rn[s], sums, width, false);
        }
        task.responses[args.response_sites[s]] = next >= 0 ? sums : nullptr;
      }
      prompt = next;
    };
    for (int64_t i = 0; i < plan.n_segments; ++i) {
      const Segment& segment = plan.segments[i];
      const auto for_each_slot = [&](auto visit) {
        for (int64_t slot = segment.slot_begin; slot < segment.slot_end; ++slot) {
          for (int s = 0; s < args.n_sites; ++s) {
            const int64_t row = s * args.G + plan.groups[slot];
            visit(slot_of(slot - segment.slot_begin, s), row * args.F + f);
          }
        }
      };
      task.is_direct = segment.is_direct;
      if (!task.is_direct) for_each_slot([&](const Slot& slot, int64_t first) {
        memset(slot.records, 0, static_cast<size_t>(layout.slot_bytes));
        if (args.sum) load_moments<Element>(args, slot, first, width);
      });
      int n_part_sums[n_slots_max] = {};  // in each slot's part
      for (int64_t t = segment.t_begin; t < segment.t_end;) {
        const int64_t slot = plan.slots[t];
        for (int s = 0; s < args.n_sites; ++s) {
          task.is_counted[args.sites[s]] = slot >= 0;
          if (slot >= 0 && task.is_direct) {
            const int64_t row = s * args.G + plan.groups[segment.slot_begin + slot];
            task.counts[args.sites[s]] = args.count + row * args.F + f;
          } else if (slot >= 0) {
            task.slots[args.sites[s]] = slot_of(slot, s);
          }
        }
        if (prompt_of(t) != prompt) change_prompt(prompt_of(t));
        int n_rows = 1;
        while (n_rows < n_rows_max && t + n_rows < segment.t_end && plan.slots[t + n_rows] == slot &&
               prompt_of(t + n_rows) == prompt) {
          ++n_rows;
        }
        n_rows = n_rows < 2 ? 1 : n_rows < n_rows_max ? 2 : n_rows_max;
        if (slot >= 0) {
          task.is_part_full = ++n_part_sums[slot] == part_sums;
          if (task.is_part_full) n_part_sums[slot] = 0;
        }
        Rows<Storage> rows;
        for (int r = 0; r < n_rows; ++r) {
          const int64_t row = t + r;
          rows.gate[r] = static_cast<const Storage*>(args.gate) + row * args.stride_gt + f;
          rows.up[r] = up + row * args.stride_ut + f;
          if constexpr (out != Out::none) {
            rows.out[r] = static_cast<Storage*>(args.out) + row * args.stride_ht + f;
          }
          const int64_t condition = args.condition_ids ? args.condition_ids[row] : 0;
          if (args.keep) rows.keep[r] = args.keep + condition * keep_stride;
        }
        t += n_rows;
        const int64_t n_next = t + n_rows <= args.T ? n_rows : 0;
        const auto run = n_rows == 1   ? do_rows<Element, activation, 1, out>
                         : n_rows == 2 ? do_rows<Element, activation, 2, out>
                                       : do_rows<Element, activation, n_rows_max, out>;
        run(task, rows, f, width, n_next * args.stride_gt, n_next * args.stride_ut);
      }
      if (!task.is_direct) for_each_slot([&](const Slot& slot, int64_t first) {
        add_slot_counts<Element>(args, slot, first, width);
        if (args.sum) store_moments<Element>(args, slot, first, width);
      });
    }
    change_prompt(-1);
  }
#if defined(__AVX2__)
  _mm_sfence();  // the streamed rows are visible before the thread reports that it is done
#endif
}

// All activations, in the order of their numbers, so that a table has one entry for each.
template <Activation... each>
struct List {};
using Activations =
    List<Activation::silu, Activation::gelu, Activation::gelu_tanh, Activation::relu,
         Activation::relu2, Activation::quick_gelu, Activation::tanh, Activation::residual>;

template <typename Element, Activation activation>
auto pick_out(Out out) {
  if constexpr (activation != Activation::residual) {
    if (out == Out::act) return run_columns<Element, activation, Out::act>;
  }
  return out == Out::none ? run_columns<Element, activation, Out::none>
                          : run_columns<Element, activation, Out::product>;
}

template <Activation... each>
auto pick_float(List<each...>, Activation activation, Out out) {
  static_assert(sizeof...(each) == n_activations, "each activation has a function");
  constexpr decltype(&pick_out<Float32, Activation::silu>) table[] = {pick_out<Float32, each>...};
  return table[static_cast<int>(activation)](out);
}

// 16-bit types look the activation up, so one function serves all of them.
template <typename Element>
auto pick_half(Activation activation, Out out) {
  return activation == Activation::residual ? pick_out<Element, Activation::residual>(out)
                                            : pick_out<Element, Activation::silu>(out);
}

auto pick(DType dtype, Activation activation, Out out) {
  if (dtype == DType::bfloat16) return pick_half<BFloat16>(activation, out);
  if (dtype == DType::float16) return pick_half<Float16>(activation, out);
  return pick_float(Activations{}, activation, out);
}

void columns(const SwigluStatsArgs& args, const SwigluStatsPlan& plan, int64_t f_begin,
             int64_t f_end, unsigned char* scratch) {
  const Out out = !args.out ? Out::none : args.up ? Out::product : Out::act;
  pick(args.dtype, args.activation, out)(args, plan, f_begin, f_end, scratch);
}

int64_t scratch_bytes(const SwigluStatsArgs& args, const SwigluStatsPlan& plan, int64_t n_columns) {
  const Layout layout = Layout::widest(args, n_columns);
  return layout.response_bytes * args.n_responses +
         layout.slot_bytes * args.n_sites * plan.n_slots;
}

template <typename Element, Activation activation>
void fill(float* table) {
  for (int first = 0; first < 65536; first += block_width) {
    uint16_t pattern[block_width];
    for (int i = 0; i < block_width; ++i) pattern[i] = static_cast<uint16_t>(first + i);
    Block x = Element::load_block(pattern);
    for (F32& plane : x.plane) plane = Element::exact(Element::round(activate<activation>(plane)));
    Element::to_natural(table + first, x);
  }
}

template <typename Element, Activation... each>
void fill_for(List<each...>, Activation activation, float* table) {
  constexpr decltype(&fill<Element, Activation::silu>) functions[] = {fill<Element, each>...};
  functions[static_cast<int>(activation)](table);
}

void fill_act_table(DType dtype, Activation activation, float* table) {
  if (dtype == DType::bfloat16) fill_for<BFloat16>(Activations{}, activation, table);
  if (dtype == DType::float16) fill_for<Float16>(Activations{}, activation, table);
}

}  // namespace

const SwigluStatsKernel swiglu_stats_kernel = {columns, scratch_bytes, fill_act_table};

}  // namespace RELNEURON_ISA
}  // namespace relneuron
