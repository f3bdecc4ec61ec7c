// The inner loops of the gradient of h of swiglu_stats on a CPU, compiled once per instruction set
// (RELNEURON_ISA) from this one source: dh, gate and up are read once, d_gate and d_up written once.
// Use nothing here from headers that have inline functions (see swiglu_stats_kernel.cpp).
#include "swiglu_gradient.h"

#include "elements.h"
#include "swiglu_gradient_curves.h"

namespace relneuron {
namespace RELNEURON_ISA {
namespace {

// d_gate and d_up in float64 vectors, half of a plane each, where they are rounded to float32: every
// rounding on the way would show. For 16-bit types float32 is as far beyond them.
template <Activation activation, typename Vector>
RELNEURON_INLINE void multiply(Vector dh, Vector gate, Vector up, Vector& d_gate, Vector& d_up) {
  const Curve<Vector> found = curve<activation>(gate);
  d_gate = sloped<activation>(dh, up, gate, found.slope);
  d_up = dh * found.value;
}

template <Activation activation>
RELNEURON_INLINE void multiply_wide(F32 dh, F32 gate, F32 up, F32& d_gate, F32& d_up) {
  F64 wide[2][2];
  multiply<activation>(widen<0>(dh), widen<0>(gate), widen<0>(up), wide[0][0], wide[1][0]);
  multiply<activation>(widen<1>(dh), widen<1>(gate), widen<1>(up), wide[0][1], wide[1][1]);
  d_gate = narrow(wide[0][0], wide[0][1]);
  d_up = narrow(wide[1][0], wide[1][1]);
}

template <typename Element>
struct Row {
  using Storage = typename Element::Storage;
  const Storage *dh, *gate, *up;  // up null: h is act
  Storage *d_gate, *d_up;         // null: not wanted
  const uint32_t* keep;           // of the token's condition, null: all stay
};

template <typename Element>
RELNEURON_INLINE void write(typename Element::Storage* to, Block x, const Row<Element>& row,
                            int64_t f) {
  U32 packed[block_width * sizeof(typename Element::Storage) / sizeof(U32)];
  for (F32& plane : x.plane) plane = Element::round(plane);
  Element::pack(x, packed);
  if (row.keep) Element::keep(row.keep[f / 32] >> (f % 32), packed);
  memcpy(to, packed, sizeof packed);
}

template <typename Element, Activation activation>
RELNEURON_INLINE void do_block(const Row<Element>& row, int64_t at, int64_t f) {
  const Block dh = Element::load_block(row.dh + at), gate = Element::load_block(row.gate + at);
  Block up = {splat(1.0f), splat(1.0f)}, d_gate, d_up;
  if (row.up) up = Element::load_block(row.up + at);
  for (int i = 0; i < 2; ++i) {
    const F32 d = dh.plane[i], x = gate.plane[i], y = up.plane[i];
    if constexpr (Element::is_half) {
      multiply<activation>(d, x, y, d_gate.plane[i], d_up.plane[i]);
    } else {
      multiply_wide<activation>(d, x, y, d_gate.plane[i], d_up.plane[i]);
    }
  }
  if (row.d_gate) write<Element>(row.d_gate + at, d_gate, row, f);
  if (row.d_up) write<Element>(row.d_up + at, d_up, row, f);
}

template <typename Element, Activation activation>
void do_row(const Row<Element>& row, int64_t f_begin, int64_t f_end) {
  using Storage = typename Element::Storage;
  int64_t at = f_begin;
  for (; at + block_width <= f_end; at += block_width) do_block<Element, activation>(row, at, at);
  if (at == f_end) return;
  // The last columns in a block of their own, filled up with zeros.
  alignas(64) Storage rest[5][block_width] = {};
  const size_t rest_bytes = static_cast<size_t>(f_end - at) * sizeof(Storage);
  memcpy(rest[0], row.dh + at, rest_bytes);
  memcpy(rest[1], row.gate + at, rest_bytes);
  if (row.up) memcpy(rest[2], row.up + at, rest_bytes);
  const Row<Element> rest_row = {rest[0], rest[1], row.up ? rest[2] : nullptr,
                                 row.d_gate ? rest[3] : nullptr, row.d_up ? rest[4] : nullptr,
                                 row.keep};
  do_block<Element, activation>(rest_row, 0, at);
  if (row.d_gate) memcpy(row.d_gate + at, rest[3], rest_bytes);
  if (row.d_up) memcpy(row.d_up + at, rest[4], rest_bytes);
}

template <typename Element, Activation activation>
void do_part(const SwigluGradientArgs& args, int64_t t_begin, int64_t t_end, int64_t f_begin,
             int64_t f_end) {
  using Storage = typename Element::Storage;
  const auto at = [](auto* base, int64_t offset) { return base ? base + offset : nullptr; };
  for (int64_t t = t_begin; t < t_end; ++t) {
    const int64_t condition = args.condition_ids ? args.condition_ids[t] : 0;
    const Row<Element> row = {
        static_cast<const Storage*>(args.dh) + t * args.stride_dt,
        static_cast<const Storage*>(args.gate) + t * args.stride_gt,
        at(static_cast<const Storage*>(args.up), t * args.stride_ut),
        at(static_cast<Storage*>(args.d_gate), t * args.F),
        at(static_cast<Storage*>(args.d_up), t * args.F),
        at(args.keep, condition * ((args.F + 31) / 32)),
    };
    do_row<Element, activation>(row, f_begin, f_end);
  }
}

template <Activation... each>
struct List {};
using Activations = List<Activation::silu, Activation::gelu, Activation::gelu_tanh, Activation::relu,
                         Activation::relu2, Activation::quick_gelu, Activation::tanh>;

template <typename Element, Activation... each>
void for_activation(List<each...>, const SwigluGradientArgs& args, int64_t t_begin, int64_t t_end,
                    int64_t f_begin, int64_t f_end) {
  constexpr decltype(&do_part<Element, Activation::silu>) table[] = {do_part<Element, each>...};
  table[static_cast<int>(args.activation)](args, t_begin, t_end, f_begin, f_end);
}

void part(const SwigluGradientArgs& args, int64_t t_begin, int64_t t_end, int64_t f_begin,
          int64_t f_end) {
  if (args.dtype == DType::bfloat16) {
    for_activation<BFloat16>(Activations{}, args, t_begin, t_end, f_begin, f_end);
  } else if (args.dtype == DType::float16) {
    for_activation<Float16>(Activations{}, args, t_begin, t_end, f_begin, f_end);
  } else {
    for_activation<Float32>(Activations{}, args, t_begin, t_end, f_begin, f_end);
  }
}

}  // namespace

const SwigluGradientKernel swiglu_gradient_kernel = {part};

}  // namespace RELNEURON_ISA
}  // namespace relneuron
