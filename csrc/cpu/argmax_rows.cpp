// SPDX-License-Identifier: Apache-2.0
// redrafter::argmax_rows on the CPU: torch.argmax of some rows of a matrix, read where they are.
#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <cstdint>

#include "common/check.h"
#include "common/threads.h"
#include "cpu/argmax_kernel.h"

namespace redrafter {
namespace {

FloatKind kind_of(const Tensor& values) {
  switch (values.scalar_type()) {
    case ScalarType::Float:
      return FloatKind::kFloat;
    case ScalarType::BFloat16:
      return FloatKind::kBFloat16;
    default:
      STD_TORCH_CHECK(values.scalar_type() == ScalarType::Half, "values has dtype ",
                      torch::headeronly::toString(values.scalar_type()),
                      "; it must be float32, bfloat16 or float16.");
      return FloatKind::kHalf;
  }
}

void argmax_rows_cpu(const Tensor& out, const Tensor& values, const Tensor& rows) {
  check_dims(values, 2, "values");
  check_dims(rows, 1, "rows");
  const FloatKind kind = kind_of(values);
  const int64_t count = rows.size(0), most = values.size(0), columns = values.size(1);
  STD_TORCH_CHECK(columns >= 1, "values has no columns.");
  STD_TORCH_CHECK(columns < 2 || values.stride(1) == 1, "values must have contiguous rows.");
  const int64_t* wanted = vector_data<int64_t>(rows, ScalarType::Long, count, "rows");
  int64_t* found = contiguous_data<int64_t>(out, ScalarType::Long, {count}, "out");
  for (int64_t i = 0; i < count; ++i) {
    STD_TORCH_CHECK(wanted[i] >= 0 && wanted[i] < most, "rows holds ", wanted[i], "; with ", most,
                    " rows of values it must be 0 to ", most - 1, ".");
  }
  const char* data = static_cast<const char*>(values.const_data_ptr());
  const int64_t row_bytes = values.stride(0) * (kind == FloatKind::kFloat ? 4 : 2);
  const auto kernel = REDRAFTER_VARIANT_OF(argmax);
  const int threads = omp_in_parallel() || count * columns < 1 << 16
                          ? 1
                          : static_cast<int>(std::min<int64_t>(omp_get_max_threads(), count));
  REDRAFTER_OMP(parallel for num_threads(threads) if (threads > 1))
  for (int64_t i = 0; i < count; ++i) {
    found[i] = kernel(data + wanted[i] * row_bytes, columns, kind);
  }
}

}  // namespace
}  // namespace redrafter

STABLE_TORCH_LIBRARY_IMPL(redrafter, CPU, m) {
  m.impl("argmax_rows", TORCH_BOX(&redrafter::argmax_rows_cpu));
}
