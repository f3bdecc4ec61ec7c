// The inner loops of swiglu_stats on a CPU, compiled once per instruction set (RELNEURON_ISA) from
// this one source. swiglu_stats.cpp calls it for each thread's columns. Use nothing here from headers
// that have inline functions: the linker would keep one copy for all instruction sets, maybe one
// that the processor cannot run.
#include "swiglu_stats.h"

#include "swiglu_stats_rows.h"

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

// do_rows of 1, 2 and n_rows_max rows.
template <typename Storage>
struct Loops {
  void (*by_rows[3])(const Task&, const Rows<Storage>&, int64_t, int64_t, int64_t, int64_t,
                     int64_t);
};

template <typename Element, Activation activation, Out out>
constexpr Loops<typename Element::Storage> loops = {{
    do_rows<Element, activation, 1, out>, do_rows<Element, activation, 2, out>,
    do_rows<Element, activation, n_rows_max, out>}};

template <typename Element>
void run_columns(const Loops<typename Element::Storage>& chosen, const SwigluStatsArgs& args,
                 const SwigluStatsPlan& plan, int64_t f_begin, int64_t f_end,
                 unsigned char* scratch) {
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
          if (args.out) rows.out[r] = static_cast<Storage*>(args.out) + row * args.stride_ht + f;
          const int64_t condition = args.condition_ids ? args.condition_ids[row] : 0;
          if (args.keep) rows.keep[r] = args.keep + condition * keep_stride;
        }
        t += n_rows;
        const int64_t n_next = t + n_rows <= args.T ? n_rows : 0;
        const auto run = chosen.by_rows[n_rows == n_rows_max ? 2 : n_rows - 1];
        run(task, rows, f, 0, width, n_next * args.stride_gt, n_next * args.stride_ut);
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
const Loops<typename Element::Storage>& pick_out(Out out) {
  if constexpr (activation != Activation::residual) {
    if (out == Out::act) return loops<Element, activation, Out::act>;
  }
  return out == Out::none ? loops<Element, activation, Out::none>
                          : loops<Element, activation, Out::product>;
}

template <Activation... each>
const Loops<float>& pick_float(List<each...>, Activation activation, Out out) {
  static_assert(sizeof...(each) == n_activations, "each activation has its loops");
  constexpr decltype(&pick_out<Float32, Activation::silu>) table[] = {pick_out<Float32, each>...};
  return table[static_cast<int>(activation)](out);
}

// 16-bit types look the activation up, so the same loops serve all of them.
template <typename Element>
const Loops<uint16_t>& pick_half(Activation activation, Out out) {
  return activation == Activation::residual ? pick_out<Element, Activation::residual>(out)
                                            : pick_out<Element, Activation::silu>(out);
}

void columns(const SwigluStatsArgs& args, const SwigluStatsPlan& plan, int64_t f_begin,
             int64_t f_end, unsigned char* scratch) {
  const Out out = !args.out ? Out::none : args.up ? Out::product : Out::act;
  if (args.dtype == DType::bfloat16) {
    const auto& chosen = pick_half<BFloat16>(args.activation, out);
    run_columns<BFloat16>(chosen, args, plan, f_begin, f_end, scratch);
  } else if (args.dtype == DType::float16) {
    const auto& chosen = pick_half<Float16>(args.activation, out);
    run_columns<Float16>(chosen, args, plan, f_begin, f_end, scratch);
  } else {
    const auto& chosen = pick_float(Activations{}, args.activation, out);
    run_columns<Float32>(chosen, args, plan, f_begin, f_end, scratch);
  }
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
