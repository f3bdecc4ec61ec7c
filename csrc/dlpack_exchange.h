// What is needed of DLPack 1 (dmlc/dlpack, ABI of version 1): how torch lends a tensor's address, shape and
// strides to C code in a few nanoseconds, without libtorch. torch.Tensor carries the table of functions
// in the capsule `__dlpack_c_exchange_api__`.
#pragma once

#include <cstdint>

namespace relneuron {

enum DLDeviceType : int32_t { dl_cpu = 1 };
enum DLTypeCode : uint8_t { dl_int = 0, dl_float = 2, dl_bfloat = 4 };

struct DLTensor {
  void* data;
  int32_t device_type, device_id;
  int32_t ndim;
  uint8_t type_code, type_bits;
  uint16_t type_lanes;
  int64_t* shape;
  int64_t* strides;  // in elements
  uint64_t byte_offset;
};

struct DLPackExchange {
  uint32_t major, minor;
  void* previous;
  void* allocate;
  void* managed_from_object;
  void* object_from_managed;
  // Fills in a tensor that lives as long as the object does. 0, or -1 with a Python exception.
  int (*from_object)(void* object, DLTensor* out);
  void* current_stream;
};
constexpr uint32_t dlpack_major = 1;
constexpr char dlpack_capsule[] = "dlpack_exchange_api";

}  // namespace relneuron
